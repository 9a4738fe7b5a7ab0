#!/usr/bin/env bash
# Set up, then check the style and run the whole test suite on this machine.
#
# Usage: bash launch/test.sh [ARGUMENTS OF pytest ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
