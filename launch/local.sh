#!/usr/bin/env bash
# Set up, then train configs/digits.py, evaluate it and draw samples, on this machine.
#
# Usage: bash launch/local.sh [ARGUMENTS OF python -m mf_jax.main ...]
#   bash launch/local.sh                                  the main job: train, eval, sample
#   bash launch/local.sh --config=configs/toy2d.py        the same with another config
#   bash launch/local.sh --mode=sample --config.sample.steps=2    one mode alone
#   bash launch/local.sh --dry-run                        print the commands and run nothing
#
# Needs: what launch/setup.sh needs.
set -euo pipefail
dry_run=0 arguments=() config=(--config=configs/digits.py) modes=(train eval sample)
for argument in "$@"; do
  case "$argument" in
    --dry-run)
      dry_run=1
      continue
      ;;
    --config=* | --config) config=() ;;
    --mode=* | --mode) modes=("") ;;
  esac
  arguments+=("$argument")
done
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

# a stop goes to the run, which saves; the modes after it are left out
child=0 stopped=0
trap 'stopped=1; [ "$child" = 0 ] || kill -TERM "$child"' TERM INT

for mode in "${modes[@]}"; do
  command=("$python" -m mf_jax.main "${config[@]}" "${arguments[@]}" ${mode:+--mode="$mode"})
  if [ "$dry_run" = 1 ]; then
    mf_print "${command[@]}"
    continue
  fi
  "${command[@]}" &
  child=$!
  code=0
  wait "$child" || code=$?
  if [ "$stopped" = 1 ]; then
    code=0
    wait "$child" || code=$? # the first wait ended with the signal, not with the run
    exit "$code"
  fi
  [ "$code" = 0 ] || exit "$code"
done
