#!/usr/bin/env bash
# A model teaches itself on a CPU: with a worked solution in its prompt it is right, and it learns to be right without.
# Three teachers in one table: the weights before update 1, their moving average, and the present ones.
#   bash scripts/demo_self_distillation.sh [--seeds 0,1,2] [--jobs N] [--set KEY=VALUE ...]
# Example: bash scripts/demo_self_distillation.sh --seeds 0
set -euo pipefail
source "$(dirname "$0")/help.sh"
cd "$(dirname "$0")/.."
teachers="all 1.0 weights=ema decay=0.98,all 1.0 weights=live"
exec bash scripts/reproduce.sh --table self configs/tiny_self.json --arms "$teachers" --jobs 2 "$@"
