#!/usr/bin/env bash
# Run a command so that it outlives the connection that started it, and tell later how it went.
# tpu_pod.sh calls this on the workers of a pod.
#
# The command gets a session of its own (setsid); its output goes to FOLDER/log, its exit code to
# FOLDER/exit_code. Files, rather than tmux or a systemd unit: they need neither root nor anything
# installed, any later connection can read them, and the exit code is still there after the machine
# was started anew.
#
# Usage: bash launch/detached.sh [--dry-run] start FOLDER COMMAND [ARGUMENTS ...]   exit code 1 while one runs there
#        bash launch/detached.sh [--dry-run] status FOLDER   print running, exited CODE, lost (the machine went down) or none
#        bash launch/detached.sh [--dry-run] stop FOLDER     send the command SIGTERM
#   --dry-run    print the command and run nothing
#
# Needs: Linux (setsid and flock of util-linux).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh" "${@:1:2}" # the rest belongs to the command, --help too

if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
action="${1:-}" folder="${2:-}"
case "$action" in
  start | hold) [ "$#" -gt 2 ] || mf_refuse "$action needs a folder and a command" ;; # start leaves hold behind
  status | stop) [ "$#" = 2 ] || mf_refuse "$action needs a folder and nothing else" ;;
  *) mf_refuse "'$action': the action must be start, status or stop" ;;
esac
[ -n "$folder" ] || mf_refuse "the folder must not be empty"
shift 2

# The lock is held while the command runs. Unlike a process id it means the same after the machine
# was started anew.
runs() {
  [ -d "$folder" ] || return
  [ ! -L "$folder/lock" ] || mf_refuse "$folder/lock is a link, which another may have put there: remove it"
  exec 9>>"$folder/lock"
  ! flock --nonblock 9
}

start() {
  local hold=(setsid bash "$here/detached.sh" hold "$folder" "$@")
  if [ "$dry_run" = 1 ]; then
    mf_print "${hold[@]}"
    return
  fi
  mkdir -p "$folder"
  if runs; then
    echo "detached.sh: a command runs in $folder already" >&2
    return 1
  fi
  rm -f "$folder/exit_code" "$folder/pid"
  mf_print "$@" >"$folder/command"
  "${hold[@]}" </dev/null >>"$folder/log" 2>&1 & # it inherits the lock
  while [ ! -s "$folder/pid" ] && kill -0 "$!" 2>/dev/null; do sleep 0.05; done
}

# SIGTERM to everything, as of a machine that goes down, is for the command; its exit code must
# still be written.
hold() {
  local code=0
  trap : TERM HUP INT
  # shellcheck disable=SC2016 # the inner shell's own process id, which the command takes over
  bash -c 'echo "$$" >"$0" && exec "$@"' "$folder/pid" "$@" 9>&- || code=$?
  echo "$code" >"$folder/exit_code.new"
  mv "$folder/exit_code.new" "$folder/exit_code"
}

status() {
  if runs; then
    echo running
  elif [ -s "$folder/exit_code" ]; then
    echo "exited $(cat "$folder/exit_code")"
  elif [ -s "$folder/pid" ]; then
    echo lost
  else
    echo none
  fi
}

stop() {
  if ! runs || [ ! -s "$folder/pid" ]; then
    echo "detached.sh: no command runs in $folder" >&2
    return 1
  fi
  mf_run kill -TERM "$(cat "$folder/pid")"
}

case "$action" in
  status) if [ "$dry_run" = 1 ]; then mf_print flock --nonblock "$folder/lock" true; else status; fi ;;
  *) "$action" "$@" ;;
esac
