#!/usr/bin/env bash
# Set up, then disturb runs of two processes at random moments (SIGKILL, SIGTERM, a full disk, while training, saving and
# evaluating), let them continue, and compare them bit by bit with a run that nothing happened to; train on other numbers
# of processes and devices; write the tables of docs/reliability.md.
#
# What is finished is skipped, and lies under runs/faults: the same command continues. For the full disk it needs to be
# root, as it mounts small file systems. Hardware: 2 CPU cores, about an hour.
#
# Usage: bash launch/faults.sh [ARGUMENTS]
#   bash launch/faults.sh                     everything that is missing, then the tables
#   bash launch/faults.sh --runs=120          more runs
#   bash launch/faults.sh --only=topologies   one part alone: topologies | faults | scaling | document
#
# Needs: what launch/setup.sh needs.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

# all runs compile the same programs
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$root/runs/faults/compiled}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}"
exec "$python" -m launch.faults "$@"
