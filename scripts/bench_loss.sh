#!/usr/bin/env bash
# Time, memory and exactness of the loss against TRL, Liger and plain PyTorch, in an environment of its own.
#   bash scripts/bench_loss.sh [--quick]        --quick: small cells, a minute; else half an hour on 2 cores
# It writes outputs/bench_loss/{results.json,table.md,*.png}.
# Example: bash scripts/bench_loss.sh --quick
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh --peers
PYTHONPATH=. .venv-bench/bin/python tests/benchmarks/bench_loss.py "$@"
