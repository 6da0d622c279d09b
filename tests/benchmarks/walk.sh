#!/usr/bin/env bash
# The way of a new user, timed: a fresh clone, the main job with the environment that it sets up, its token map in a
# browser. It needs Chromium, which scripts/test.sh installs.
#   bash tests/benchmarks/walk.sh
set -euo pipefail
repository="$(git -C "$(dirname "$0")" rev-parse --show-toplevel)"
folder="$(mktemp -d)"; trap 'rm -rf "$folder"' EXIT
SECONDS=0
git clone --quiet "$repository" "$folder/clone"; cd "$folder/clone"
echo "$SECONDS s: cloned"
bash scripts/run_math500_soft_or.sh > "$folder/job.log" 2>&1 || { tail "$folder/job.log"; exit 1; }
echo "$SECONDS s: the main job is done"
page="$(find outputs -name tokens.html)"
chromium --headless=new --no-sandbox --disable-gpu --virtual-time-budget=10000 --dump-dom "file://$PWD/$page" \
  > "$folder/page.html" 2> "$folder/browser.log"
tokens="$(grep -o 'class="t[ "]' "$folder/page.html" | wc -l)"
[ "$tokens" -gt 0 ] || { echo "$page shows no token"; exit 1; }
echo "$SECONDS s: $page shows $tokens tokens"
