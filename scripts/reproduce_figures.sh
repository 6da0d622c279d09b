#!/usr/bin/env bash
# Figures 1, 3 and 4 of the paper, three seeds; without CONFIG on the embedded tiny pair.
#   bash scripts/reproduce_figures.sh [CONFIG] [--jobs N] [--set KEY=VALUE ...]
# Example: bash scripts/reproduce_figures.sh configs/qwen3_8b_to_4b.json
set -euo pipefail
source "$(dirname "$0")/help.sh"
config=(); if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then config=("$1"); shift; fi
for n in 1 3 4; do
  bash "$(dirname "$0")/reproduce.sh" --figure $n "${config[@]}" --seeds 0,1,2 --jobs 2 "$@"
done
