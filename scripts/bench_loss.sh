#!/usr/bin/env bash
# Time, memory and exactness of the loss against TRL, Liger and plain PyTorch: outputs/bench_loss/{results.json,table.md,*.png}
#   bash scripts/bench_loss.sh [--quick]     about half an hour on 2 cores; --quick: small cells, a minute
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -f .venv-bench/installed ] || ! cmp -s requirements-bench.txt .venv-bench/installed; then
  "${PYTHON:-python3}" -m venv --clear .venv-bench
  .venv-bench/bin/pip install --quiet --disable-pip-version-check --requirement requirements-bench.txt
  cp requirements-bench.txt .venv-bench/installed
fi
PYTHONPATH=. .venv-bench/bin/python tests/benchmarks/bench_loss.py "$@"
