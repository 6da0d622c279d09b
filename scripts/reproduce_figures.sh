#!/usr/bin/env bash
# Figures 1, 3 and 4 of the paper, three seeds: bash scripts/reproduce_figures.sh [CONFIG] [--jobs N] [--set KEY=VALUE ...]
set -euo pipefail
config=(); if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then config=("$1"); shift; fi
for n in 1 3 4; do
  bash "$(dirname "$0")/reproduce.sh" --figure $n "${config[@]}" --seeds 0,1,2 --jobs 2 "$@"
done
