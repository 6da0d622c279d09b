#!/usr/bin/env bash
# Does this trainer work on this machine's GPU, and how fast? Exactness, memory against the plan, speed, exact resume.
#   bash scripts/check_gpu.sh [--minutes 8] [--toy] [--only NAME,NAME] [--out FOLDER]
# It writes outputs/check_gpu/{results.json,table.md}; exit code 1 if a check fails. Without a network the Python at
# hand runs, and checks whose packages it lacks are skipped. On a CPU and with --toy: toy sizes, a minute.
# Example: bash scripts/check_gpu.sh --minutes 8
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
if PIP_RETRIES=0 PIP_DEFAULT_TIMEOUT=15 bash scripts/setup.sh; then
  source .venv/bin/activate; python=python
else
  echo "check_gpu: .venv cannot be made, so $python runs with the packages that it has" >&2
fi
export HF_HUB_OFFLINE=1
PYTHONPATH=. "$python" tests/benchmarks/check_gpu.py "$@"
