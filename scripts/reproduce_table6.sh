#!/usr/bin/env bash
# Table 6 of the paper, three seeds; without CONFIG on the embedded tiny pair.
#   bash scripts/reproduce_table6.sh [CONFIG] [--jobs N] [--set KEY=VALUE ...]
# Example: bash scripts/reproduce_table6.sh configs/qwen3_8b_to_4b.json
set -euo pipefail
source "$(dirname "$0")/help.sh"
config=(); if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then config=("$1"); shift; fi
exec bash "$(dirname "$0")/reproduce.sh" --table 6 "${config[@]}" --seeds 0,1,2 --jobs 2 "$@"
