#!/usr/bin/env bash
# Set up, then rerun the paper's ablations in miniature on the 8x8 digits, and write
# docs/ablations.md with a plot for each group.
#
# Rows that are finished are skipped, a row that was killed continues from its checkpoint: the same
# command continues. Everything but the document lies under runs/ablations. Hardware: 2 CPU cores,
# an estimated half an hour.
#
# Usage: bash launch/ablations.sh [ARGUMENTS]
#   bash launch/ablations.sh                      all rows that are not finished, then the document
#   bash launch/ablations.sh --only=tangent       the rows of one group, then the document
#   bash launch/ablations.sh --document           the document alone, from the rows that are finished
#
# Needs: what launch/setup.sh needs.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

exec "$python" -m launch.ablations "$@"
