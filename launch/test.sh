#!/usr/bin/env bash
# Set up, then check the style and run the test suite on this machine.
#
# Usage: bash launch/test.sh [--quick] [ARGUMENTS OF pytest ...]
#   bash launch/test.sh             everything
#   bash launch/test.sh --quick     a minute: flow, objectives, samplers, configs and layers
#   bash launch/test.sh -k draws    the tests whose names have "draws" in them
#
# Needs: what launch/setup.sh needs.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

quick=(architecture draws objectives samplers configs)
if [ "${1:-}" = --quick ]; then
  files=("${quick[@]/#/tests/test_}")
  # mutations, a second reading of the loss and all configs one by one take most of the time
  long="mutations or plain_reading or constant_targets or tiny_copy or every_config_is_valid"
  long="$long or published_size"
  set -- "${files[@]/%/.py}" -k "not ($long)" "${@:2}"
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
