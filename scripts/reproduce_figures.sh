#!/usr/bin/env bash
# Figures 1, 3 and 4 of the paper, three seeds. Figure 4 is of agents, so its pair is the second one.
#   bash scripts/reproduce_figures.sh [CONFIG [CONFIG_OF_AGENTS]] [--jobs N] [--set KEY=VALUE ...]
# Without CONFIG on the embedded pairs.
# Example: bash scripts/reproduce_figures.sh configs/qwen3_8b_to_4b.json configs/qwen3_14b_to_1.7b_deepplanning.json
set -euo pipefail
source "$(dirname "$0")/help.sh"
configs=("$(dirname "$0")/../configs/tiny.json" "$(dirname "$0")/../configs/tiny_planning.json")
for i in 0 1; do
  if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then configs[i]="$1"; shift; fi
done
for n in 1 3 4; do
  bash "$(dirname "$0")/reproduce.sh" --figure $n "${configs[n / 4]}" --seeds 0,1,2 --jobs 2 "$@"
done
