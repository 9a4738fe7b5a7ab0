#!/usr/bin/env bash
# Make the virtual environment .venv in the checkout and install the checkout into it, editable and
# with what its tests need, unless that is done already. Sourced by the other scripts; leaves the
# environment's interpreter in $python.
#
# Usage: bash launch/setup.sh [--help]
#   MF_ACCELERATOR=cuda13 bash launch/setup.sh    with the build of JAX for cuda12, cuda13 or tpu (cpu: the plain one)
#   MF_VENV=FOLDER bash launch/setup.sh           another place for the environment
#
# Needs: Python 3.11 or newer ($PYTHON names one, else python3 is taken), or uv, which brings its
# own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh" # with the arguments of the script that sources this one
venv="${MF_VENV:-$root/.venv}"
python="$venv/bin/python"

case "${MF_ACCELERATOR:-cpu}" in
  cpu) accelerator="" ;;
  cuda12 | cuda13 | tpu) accelerator="$MF_ACCELERATOR" ;;
  *) mf_refuse "MF_ACCELERATOR=$MF_ACCELERATOR: must be cpu, cuda12, cuda13 or tpu" ;;
esac
stamp="$venv/.installed${accelerator:+_$accelerator}"

mf_install() {
  local base="${PYTHON:-python3}" packages=(-r "$root/requirements.txt")
  [ ! -f "$root/setup.cfg" ] || packages+=(-e "${root}[test]") # hosts of a pod have the code alone
  [ -z "$accelerator" ] || packages+=("jax[$accelerator]")
  [ "$accelerator" != tpu ] || packages+=("etils[epath-gcs]") # workdirs of TPU slices are in buckets
  if command -v uv >/dev/null 2>&1; then
    [ -x "$python" ] || uv venv --quiet --python "${PYTHON:->=3.11}" "$venv" || return
    uv pip install --quiet --python "$python" "${packages[@]}"
    return
  fi
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "$base is not Python 3.11 or newer; install one, or name it: PYTHON=python3.12 bash launch/local.sh" >&2
    return 2
  fi
  # an environment without pip is one whose making failed half-way
  "$python" -m pip --version >/dev/null 2>&1 || "$base" -m venv --clear "$venv" || return
  "$python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
}

wanted=$(cat "$root/requirements.txt" "$root/setup.cfg" 2>/dev/null || true)
if [ "${dry_run:-0}" = 0 ] && [ "$wanted" != "$(cat "$stamp" 2>/dev/null)" ]; then
  echo "installing requirements.txt${accelerator:+ and jax[$accelerator]} into $venv (once; about a minute)"
  mf_install || exit $?
  # with an accelerator's build everything else is there too
  for each in "$venv/.installed" "$stamp"; do echo "$wanted" >"$each"; done
fi
