#!/usr/bin/env bash
# Format, lint and tests, on up to four cores. Sets the environment up on first use; the arguments go to pytest. With
# --vllm as the first one: the tests of vLLM, on a CPU in an environment of its own (.venv-vllm).
#   bash scripts/test.sh [--vllm] [--run-slow] [-k NAME] [...]
# Example: bash scripts/test.sh -k loss
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh "$@"
source .venv/bin/activate
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
if [ "${1:-}" = --vllm ]; then exec python -m pytest tests/test_vllm.py tests/test_kernels.py --run-vllm "${@:2}"; fi
if ! command -v chromedriver >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "test: installing Chromium, in which tests look at the pages" >&2
  { apt-get update -qq && apt-get install -qq -y chromium chromium-driver; } >/dev/null 2>&1 ||
    echo "test: Chromium cannot be installed, so these tests are skipped" >&2
fi
ruff format --check .
ruff check .
# A file stays on one core, because its tests share what they build once.
python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile "$@"
