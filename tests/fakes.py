"""Programs that stand in for the interpreter, the cloud and the installer."""

import sys

from jobs import ROOT

INSTALLED = "".join((ROOT / name).read_text() for name in ("requirements.txt", "setup.cfg"))
"""What launch/setup.sh notes of an installation."""
ECHO = """#!/usr/bin/env bash
echo "python $*"
case "$*" in
  *wait*)
    trap 'case "$*" in *full*) exit 1 ;; esac; echo saved; exit 0' TERM
    echo waiting
    while :; do read -t 0.1 <> <(:) || true; done
    ;;
  *fail*) exit 7 ;;
esac
"""
PYTHON = f"""#!/usr/bin/env bash
case "$1 $2" in
  "-c "*) exec {sys.executable} "$@" ;;
  "-m pip") exit 0 ;;
esac
me=$JAX_PROCESS_ID
trap 'echo "TERM $me" >>"$RECORD/terms"' TERM
sleep 60 &
echo "$$ $!" >"$RECORD/pids_$me.new"
env | grep -E '^(JAX_|XLA_)' | sort >"$RECORD/env_$me"
echo "process $me: $*"
mv "$RECORD/pids_$me.new" "$RECORD/pids_$me"
case "$BEHAVIOUR$me" in
  fail1)
    until [ -e "$RECORD/pids_0" ]; do :; done
    for i in {{1..30}}; do echo "line $i"; done
    exit 7
    ;;
  stop*)
    until [ -e "$RECORD/terms" ]; do read -r -t 0.05 <> <(:); done
    [ "$me" != 1 ] || /bin/sleep 2
    touch "$RECORD/saved_$me"
    exit 75
    ;;
  stuck* | fail*) while [ -e "$RECORD/venv" ]; do read -r -t 0.1 <> <(:); done ;;
esac
"""

GCLOUD = """#!/usr/bin/env bash
# A zone whose hosts are folders, where a command runs with the folder as its home.
cd "$CLOUD"
echo "$*" >>calls
argument() {
  local a
  for a in "${@:2}"; do case "$a" in "$1="*) printf '%s' "${a#*=}" ;; esac; done
}
case "$4 $5" in
  "list "*) cat state 2>/dev/null || true ;;
  "create "*) echo ACTIVE >state; mkdir -p host0 host1 ;;
  "delete "*) rm -r state host0 host1 ;;
  "scp "*) for host in host0 host1; do cp "$5" "$host/${6#*:}"; done ;;
  "ssh "*)
    worker=$(argument --worker "$@") code=0
    for host in host0 host1; do
      [ "$worker" = all ] || [ "host$worker" = "$host" ] || continue
      (cd "$host" && HOME="$PWD" HOST="$host" bash -c "$(argument --command "$@")") || code=$?
    done
    exit "$code"
    ;;
esac
"""

UV = """#!/usr/bin/env bash
# Makes an environment whose interpreter does what $CLOUD/ends says of this start: end with a code
# (A/B: of host 0 and host 1), wait, or be preempted.
echo "uv $*" >>"$CLOUD/installations"
[ "$1" = venv ] || exit 0
mkdir -p "${!#}/bin"
cat >"${!#}/bin/python" <<'STUB'
#!/usr/bin/env bash
echo "$*" >>"$CLOUD/starts_$HOST"
end=$(sed -n "$(wc -l <"$CLOUD/starts_$HOST")p" "$CLOUD/ends")
[ "$HOST" = host0 ] && end=${end%/*} || end=${end#*/}
echo "said by $HOST"
[ "$end" != wait ] || while [ -e "$CLOUD/ends" ]; do sleep 1; done
if [ "$end" = preempted ]; then
  starts=$((2 * $(wc -l <"$CLOUD/starts_$HOST")))
  while [ "$(cat "$CLOUD"/starts_* | wc -l)" -lt "$starts" ]; do sleep 1; done
  echo SUSPENDED >"$CLOUD/state"
  exit 75
fi
exit "$end"
STUB
chmod +x "${!#}/bin/python"
"""
