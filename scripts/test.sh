#!/usr/bin/env bash
# Lint and tests. Sets the environment up on first use; extra arguments go to pytest. With --vllm as the first argument: the
# tests of vLLM on a CPU, in an environment of their own (.venv-vllm, 4 GB).
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
if [ "${1:-}" = --vllm ]; then
  shift
  wanted="$(cat requirements-cpu.txt requirements-cpu-vllm.txt | sha256sum)"
  if [ "$(cat .venv-vllm/installed 2>/dev/null)" != "$wanted" ]; then
    "${PYTHON:-python3}" -m venv --clear .venv-vllm
    .venv-vllm/bin/pip install --quiet --disable-pip-version-check -r requirements-cpu.txt -r requirements-cpu-vllm.txt
    .venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # they break transformers beside a CPU's torch
    echo "$wanted" > .venv-vllm/installed
  fi
  exec .venv-vllm/bin/python -m pytest tests/test_vllm.py "$@"
fi
source .venv/bin/activate
ruff check .
python -m pytest "$@"
