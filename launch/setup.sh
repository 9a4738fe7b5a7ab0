#!/usr/bin/env bash
# Make the virtual environment .venv in the checkout and install requirements.txt into it, unless that is done already.
# Sourced by the other scripts; leaves the environment's interpreter in $python.
#
# Needs: Python 3.11 or newer ($PYTHON names one, else python3 is taken), or uv, which brings its own.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="${MF_VENV:-$root/.venv}"
python="$venv/bin/python"
stamp="$venv/.installed"

mf_install() {
  local base="${PYTHON:-python3}"
  if command -v uv >/dev/null 2>&1; then
    [ -x "$python" ] || uv venv --quiet --python "${PYTHON:->=3.11}" "$venv" || return
    uv pip install --quiet --python "$python" -r "$root/requirements.txt" || return
    return 0
  fi
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "$base is not Python 3.11 or newer; install one, or name it: PYTHON=python3.12 bash launch/local.sh" >&2
    return 2
  fi
  # an environment without pip is one whose making failed half-way
  "$python" -m pip --version >/dev/null 2>&1 || "$base" -m venv --clear "$venv" || return
  "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt"
}

if ! cmp -s "$root/requirements.txt" "$stamp"; then
  echo "installing requirements.txt into $venv (once; about a minute)"
  mf_install || exit $?
  cp "$root/requirements.txt" "$stamp"
fi
