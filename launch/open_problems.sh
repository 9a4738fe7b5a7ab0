#!/usr/bin/env bash
# Set up, then run five experiments on the open problems of the method, on toys, Gaussians and the
# 8x8 digits, and write docs/open_problems.md with a figure for each.
#
# Runs that are finished are skipped: the same command continues. Everything but the document lies
# under runs/open_problems. Hardware: 1 CPU core, under an hour.
#
# Usage: bash launch/open_problems.sh [ARGUMENTS]
#   bash launch/open_problems.sh                      all runs that are not finished, then the document
#   bash launch/open_problems.sh --only=control       the runs of one group, then the document
#   bash launch/open_problems.sh --document           the document alone, from the runs that are finished
#
# Needs: what launch/setup.sh needs.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

exec "$python" -m launch.open_problems "$@"
