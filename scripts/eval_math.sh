#!/usr/bin/env bash
# Any model on MATH-500, AIME 2024 and AIME 2025, as the paper does: mean@16 at temperature 1.
#   [CONFIG=FILE] bash scripts/eval_math.sh MODEL [--limit N] [--benchmark NAME ...] [--out DIR] [--set KEY=VALUE ...]
# CONFIG names the pair file whose prompt form, dtype and batch size are used. Stopped, the same command continues.
# Example: bash scripts/eval_math.sh Qwen/Qwen3-1.7B --limit 50
set -euo pipefail
source "$(dirname "$0")/help.sh"
if [ $# -eq 0 ]; then echo "error: no model given. Usage: bash scripts/eval_math.sh MODEL [--limit N]" >&2; exit 2; fi
model="$1"; shift
if [ -d "$model" ]; then model="$(realpath "$model")"; fi
config="$(realpath "${CONFIG:-$(dirname "$0")/../configs/qwen3_8b_to_4b.json}")"
cd "$(dirname "$0")/.."
bash scripts/setup.sh "$@"
source .venv/bin/activate
python -m opd.launch opd.evaluate --config "$config" --model "$model" "$@"
