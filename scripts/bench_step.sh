#!/usr/bin/env bash
# A whole update against TRL's: rollouts, teacher, scoring and update on the same pair, prompts, lengths and optimizer.
#   bash scripts/bench_step.sh [--quick] [--repeats N] [--out FOLDER]     --quick: a toy pair, a minute
# It writes outputs/bench_step/{results.json,table.md,update.png}. TRL has an environment of its own.
# Example: bash scripts/bench_step.sh --quick
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh --peers
source .venv/bin/activate
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
PYTHONPATH=. python tests/benchmarks/bench_step.py "$@"
