#!/usr/bin/env bash
# Peak memory of the loss and of a whole update against ordinary full logits: by share of tokens, tokens and length.
#   bash scripts/bench_memory.sh [--quick] [--out FOLDER]     --quick: toy sizes, half a minute
# It writes outputs/bench_memory/{results.json,table.md,memory.png}. With a GPU it measures the GPU's memory.
# Example: bash scripts/bench_memory.sh --quick
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source .venv/bin/activate
export OMP_NUM_THREADS=1
PYTHONPATH=. python tests/benchmarks/bench_memory.py "$@"
