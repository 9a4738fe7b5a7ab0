#!/usr/bin/env bash
# Write launch/locks/ACCELERATOR.txt: every package of launch/Dockerfile, by version and hash.
#
# Usage: bash launch/lock.sh [cpu | cuda12 | cuda13 | tpu]
#
# Needs: Linux on x86-64, and Python 3.12 with pip, like the image; $PYTHON names one, else python3 is taken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
case "${1:-cpu}" in cpu | cuda12 | cuda13 | tpu) ;; *) mf_refuse "'$1' is not cpu, cuda12, cuda13 or tpu" ;; esac
lock="launch/locks/${1:-cpu}.txt"
mkdir -p launch/locks
"${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed \
  --report=- -r requirements.txt "jax[${1:-cpu}]" "etils[epath-gcs]" | "${PYTHON:-python3}" -c '
import json, sys
for each in sorted(json.load(sys.stdin)["install"], key=lambda each: each["metadata"]["name"].lower()):
    name, version = each["metadata"]["name"], each["metadata"]["version"]
    digest = each["download_info"]["archive_info"]["hashes"]["sha256"]
    print(f"{name.lower().replace(chr(95), chr(45))}=={version} --hash=sha256:{digest}")
' >"$lock.new"
mv "$lock.new" "$lock"
