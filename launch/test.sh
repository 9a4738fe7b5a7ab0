#!/usr/bin/env bash
# Set up, then check the style and run the whole test suite on this machine.
#
# Usage: bash launch/test.sh [ARGUMENTS OF pytest ...]
#   bash launch/test.sh -k draws    the tests whose names have "draws" in them
#
# Needs: what launch/setup.sh needs.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
