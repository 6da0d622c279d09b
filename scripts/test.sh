#!/usr/bin/env bash
# Lint and tests. Sets the environment up on first use; extra arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source .venv/bin/activate
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
ruff check .
python -m pytest "$@"
