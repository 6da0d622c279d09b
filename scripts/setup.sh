#!/usr/bin/env bash
# Makes .venv with what this machine needs and the commands opd and tip; on a CPU .venv-vllm (3.4 GB) when the arguments
# ask for vLLM, and .venv-bench with TRL and Liger for --peers. Does nothing, offline too, if requirements are the same.
#   bash scripts/setup.sh [--vllm | --peers | --set rollout.engine=vllm]
# Example: bash scripts/setup.sh && source .venv/bin/activate && opd --help
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."

make() { # FOLDER REQUIREMENTS
  local wanted; wanted="$2 $(sha256sum "$2" | cut -d' ' -f1) $(pwd -P)"
  if [ -L "$1" ] || [ "$(cat "$1/installed" 2>/dev/null)" = "$wanted" ]; then return; fi  # a link may be shared
  echo "setup: $1 from $2 (a few minutes, once)" >&2
  local python="${PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is $("$python" --version 2>&1), expected Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
  "$python" -m venv --clear "$1"
  "$1/bin/pip" install --quiet --disable-pip-version-check --requirement "$2" >&2
  if [ "$1" = .venv-vllm ]; then  # what vLLM brings along breaks beside a CPU's torch
    "$1/bin/pip" uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec >&2
  fi
  echo "$wanted" > "$1/installed"
}

gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then gpu=yes; fi
if [ $gpu = yes ]; then make .venv requirements.txt; else make .venv requirements-cpu.txt; fi
if [ ! -x .venv/bin/opd ]; then  # the checkout itself, for the commands opd and tip and for imports from any folder
  .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . >&2
fi
case "$gpu $* " in "no "*" --vllm "*|"no --vllm "*|"no "*rollout.engine=vllm\ *) make .venv-vllm requirements-cpu-vllm.txt ;; esac
case " $* " in *" --peers "*) make .venv-bench requirements-bench.txt ;; esac
