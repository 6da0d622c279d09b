#!/usr/bin/env bash
# Makes .venv with what this machine needs. Does nothing, offline too, when the requirements have not changed.
set -euo pipefail
cd "$(dirname "$0")/.."

requirements=requirements-cpu.txt
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then requirements=requirements.txt; fi
wanted="$requirements $(sha256sum "$requirements" | cut -d' ' -f1) $(cd "$(pwd -P)" && pwd)"
if [ -f .venv/installed ] && [ "$(cat .venv/installed)" = "$wanted" ]; then exit 0; fi

echo "setup: .venv from $requirements (a few minutes, once)" >&2
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $python is $("$python" --version 2>&1), expected Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
"$python" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement "$requirements" >&2
echo "$wanted" > .venv/installed
