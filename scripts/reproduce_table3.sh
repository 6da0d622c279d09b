#!/usr/bin/env bash
# Table 3 of the paper, three seeds; without CONFIG on the embedded tiny pair.
#   bash scripts/reproduce_table3.sh [CONFIG] [--jobs N] [--set KEY=VALUE ...]
# Example: bash scripts/reproduce_table3.sh configs/qwen3_8b_to_4b.json
set -euo pipefail
source "$(dirname "$0")/help.sh"
config=(); if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then config=("$1"); shift; fi
exec bash "$(dirname "$0")/reproduce.sh" --table 3 "${config[@]}" --seeds 0,1,2 --jobs 2 "$@"
