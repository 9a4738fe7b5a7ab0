#!/usr/bin/env bash
# Set up, then train configs/digits.py, evaluate it and draw samples, on this machine.
#
# Usage: bash launch/local.sh [ARGUMENTS OF python -m mf_jax.main ...]
#   bash launch/local.sh                                  the main job: train, eval, sample
#   bash launch/local.sh --config=configs/toy2d.py        the same with another config
#   bash launch/local.sh --mode=sample --config.sample.steps=2    one mode alone
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

config=(--config=configs/digits.py)
modes=(train eval sample)
for argument in "$@"; do
  case "$argument" in
    --config=* | --config) config=() ;;
    --mode=* | --mode) modes=("") ;;
  esac
done
for mode in "${modes[@]}"; do
  "$python" -m mf_jax.main "${config[@]}" "$@" ${mode:+--mode="$mode"}
done
