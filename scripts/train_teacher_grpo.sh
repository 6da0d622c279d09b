#!/usr/bin/env bash
# A teacher by GRPO, as the paper's Qwen3-8B, with TRL in an environment of its own; all GPUs of the machine.
#   bash scripts/train_teacher_grpo.sh CONFIG [--model PATH] [--out DIR] [--lr 1e-6] [--steps N] [--micro-batch 8] [--vllm]
#     [--deepspeed FILE] [--set KEY=VALUE ...]
# CONFIG gives the problems, the chat template, the number and length of responses, and the model, which is its teacher.
# It prints a folder for teacher.path. Stopped, the same command continues.
# Example: bash scripts/train_teacher_grpo.sh configs/qwen3_8b_to_4b.json --out outputs/qwen3-8b-grpo
set -euo pipefail
source "$(dirname "$0")/help.sh"
if [ $# -eq 0 ]; then echo "error: no CONFIG given. Usage: bash scripts/train_teacher_grpo.sh CONFIG [--out DIR]" >&2; exit 2; fi
config="$(realpath "$1")"; shift
cd "$(dirname "$0")/.."
if [ ! -f .venv-trl/installed ] || ! cmp -s requirements-trl.txt .venv-trl/installed; then
  "${PYTHON:-python3}" -m venv --clear .venv-trl
  .venv-trl/bin/pip install --quiet --disable-pip-version-check --requirement requirements-trl.txt
  cp requirements-trl.txt .venv-trl/installed
fi
gpus="$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)"
if [ "$gpus" -gt 1 ]; then
  exec .venv-trl/bin/torchrun --standalone --nproc-per-node "$gpus" -m data.grpo_teacher --config "$config" "$@"
fi
exec .venv-trl/bin/python -m data.grpo_teacher --config "$config" "$@"
