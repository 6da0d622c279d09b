#!/usr/bin/env bash
# The main job: Soft-OR 50 %, its full-token baseline and the random control from the same student, then one table.
#   bash scripts/run_math500_soft_or.sh [CONFIG] [--seeds 0,1,2] [--jobs N] [--set KEY=VALUE ...]
# Without CONFIG it runs the embedded tiny pair.
# Example: bash scripts/run_math500_soft_or.sh configs/qwen3_8b_to_4b.json --seeds 0,1,2
set -euo pipefail
source "$(dirname "$0")/help.sh"
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
  echo "No CONFIG given: running the embedded tiny pair, a constructed testbed, on the CPU." >&2
  echo "The paper's pair, on a GPU: bash scripts/run_math500_soft_or.sh configs/qwen3_8b_to_4b.json" >&2
fi
config=(); if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then config=("$1"); shift; fi
exec bash "$(dirname "$0")/reproduce.sh" --table main "${config[@]}" --jobs 3 "$@"
