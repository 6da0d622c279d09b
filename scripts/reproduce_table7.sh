#!/usr/bin/env bash
# Table 7 of the paper, three seeds; without CONFIG on the embedded planning pair.
#   bash scripts/reproduce_table7.sh [CONFIG] [--jobs N] [--set KEY=VALUE ...]
# Example: bash scripts/reproduce_table7.sh configs/qwen3_14b_to_1.7b_deepplanning.json
set -euo pipefail
source "$(dirname "$0")/help.sh"
config=("$(dirname "$0")/../configs/tiny_planning.json")
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then config=("$1"); shift; fi
exec bash "$(dirname "$0")/reproduce.sh" --table 7 "${config[@]}" --seeds 0,1,2 --jobs 2 "$@"
