#!/usr/bin/env bash
# A table or figure of the paper; without CONFIG on the embedded tiny pair.
#   bash scripts/reproduce.sh --table N|--figure N [CONFIG] [--seeds 0,1,2] [--jobs 2] [--set KEY=VALUE ...]
# Example: bash scripts/reproduce.sh --table 5 --seeds 0,1,2 --jobs 2
set -euo pipefail
source "$(dirname "$0")/help.sh"
what=("$1" "$2"); shift 2
config="configs/tiny.json"
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then config="$(realpath "$1")"; shift; fi
cd "$(dirname "$0")/.."
bash scripts/setup.sh "$@"
source .venv/bin/activate
exec python -m tip.reproduce "${what[@]}" --config "$config" "$@"
