#!/usr/bin/env bash
# The main job: full-token baseline and Soft-OR 50 % from the same student and seed, then one table.
#   bash scripts/run_math500_soft_or.sh [CONFIG] [--set KEY=VALUE ...]     no CONFIG: the embedded tiny pair
set -euo pipefail
config="configs/tiny.json"
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then config="$(realpath "$1")"; shift; given=1; fi
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source .venv/bin/activate

name="$(basename "$config" .json)"
if [ -z "${given:-}" ]; then
  echo "No CONFIG given: running the embedded tiny pair, a constructed testbed, on the CPU." >&2
  echo "The paper's pair, on a GPU: bash scripts/run_math500_soft_or.sh configs/qwen3_8b_to_4b.json" >&2
fi
case "$name" in
  tiny) python -m data.tiny.build >/dev/null ;;
  tiny_addition) python -m data.tiny.build --task addition >/dev/null ;;
esac
all=(python -m tip.train --config "$config" "$@" --set run_name="$name-all" --set tip.rule=all)
soft_or=(python -m tip.train --config "$config" --set tip.retention=0.5 "$@" --set run_name="$name-soft_or" --set tip.rule=soft_or)
for word in "$@"; do if [ "$word" = --dry-run ]; then "${all[@]}"; "${soft_or[@]}"; exit; fi; done
baseline="$("${all[@]}")"; selected="$("${soft_or[@]}")"
python -m tip.report "$baseline" "$selected" --out "$(dirname "$selected")/$name-main"
echo "Next: --set tip.retention=0.2, another rule (python -m tip.train with --set run_name=NAME --set tip.rule=RULE), or tensorboard --logdir $(dirname "$selected")"
