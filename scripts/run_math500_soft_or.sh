#!/usr/bin/env bash
# The main job: full-token baseline and Soft-OR 50 % from the same student and seed, then one table.
#   bash scripts/run_math500_soft_or.sh [CONFIG] [--set KEY=VALUE ...]     no CONFIG: the embedded tiny pair
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source .venv/bin/activate

if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then config="$1"; shift; else
  config=configs/tiny.json
  echo "No CONFIG given: running the embedded tiny pair, a constructed testbed, on the CPU." >&2
  echo "The paper's pair on this machine's GPUs: bash scripts/run_math500_soft_or.sh configs/qwen3_8b_to_4b.json" >&2
fi
if [ "$config" = configs/tiny.json ]; then python -m data.tiny.build >/dev/null; fi
name="$(basename "$config" .json)"

baseline="$(python -m opd.train --config "$config" --set run_name="$name-all" "$@")"
soft_or="$(python -m tip.train --config "$config" --set run_name="$name-soft_or-0.5" --set tip.rule=soft_or --set tip.retention=0.5 "$@")"
python -m tip.report "$baseline" "$soft_or" --out "$(dirname "$soft_or")/$name-main"
echo "Next: other rules and retentions,  python -m tip.train --config $config --set run_name=NAME --set tip.rule=entropy_topk --set tip.retention=0.2"
echo "      curves and sample rollouts,  tensorboard --logdir $(dirname "$soft_or")"
