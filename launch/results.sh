#!/usr/bin/env bash
# Set up, then train every objective on the 8x8 digits and on MNIST at equal training FLOPs, three
# seeds of each, and write docs/results.md with a picture of one-step samples for each data set.
#
# Runs that are finished are skipped, a run that was killed continues from its checkpoint: the same
# command continues. Everything but the document lies under runs/results. Hardware: a CPU core,
# 3 to 6 minutes for each of the 27 runs of the digits, 8 to 10 for each of MNIST.
#
# Usage: [MF_MNIST=FILE.npz] bash launch/results.sh [ARGUMENTS]
#   bash launch/results.sh                      all runs that are not finished, then the document
#   bash launch/results.sh --only=digits        the runs of one data set (or mnist), then the document
#   bash launch/results.sh --document           the document alone, from the runs that are finished
#   MF_MNIST=/data/mnist.npz bash launch/results.sh   MNIST from a file (x uint8 [N, 28, 28, 1], label)
#                                               instead of OpenML; name it each time
#
# Needs: what launch/setup.sh needs; for MNIST without a file, a way to OpenML once.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ -n "${MF_MNIST:-}" ]; then MF_MNIST="$(realpath "$MF_MNIST")" && export MF_MNIST; fi
cd "$root"

exec "$python" -m launch.results "$@"
