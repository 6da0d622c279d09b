#!/usr/bin/env bash
# Table 6 of the paper, three seeds: bash scripts/reproduce_table6.sh [CONFIG] [--jobs N] [--set KEY=VALUE ...]
set -euo pipefail
config=(); if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then config=("$1"); shift; fi
exec bash "$(dirname "$0")/reproduce.sh" --table 6 "${config[@]}" --seeds 0,1,2 --jobs 2 "$@"
