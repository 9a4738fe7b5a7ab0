#!/usr/bin/env bash
# Run one job as several processes on this machine: what many hosts do, over loopback. For CPUs, to
# try a job of a pod. (All GPUs of a machine belong to one process: there, run mf_jax.main alone, or
# launch/slurm.sh.)
#
# Process 0 writes to the terminal, the others to files. When one fails, its last lines are shown,
# the others get a moment to end by themselves and are then ended; the exit code is that of the
# first failure. SIGTERM or Ctrl-C goes to process 0 alone, and all of them save the same step and
# end; a second one ends all at once.
#
# Usage: bash launch/local_processes.sh N [OPTIONS] --config=configs/NAME.py [ARGUMENTS OF mf_jax.main ...]
#   --devices-per-process=D   D CPU devices in each process, by default as many as JAX makes (1)
#   --logs=DIR                where processes 1 to N-1 write process_1.log ..., by default a temporary folder
#   --grace=SECONDS           how long the others may take to end after the first failure, by default 10
#   --dry-run                 print the commands and run nothing
#   bash launch/local_processes.sh 2 --devices-per-process=4 --config=configs/digits.py --workdir=runs/two_processes
#
# Needs: Linux, bash 4.4, and what launch/setup.sh needs.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$here/common.sh"

number="${1:-}" devices_per_process="" logs="" grace=10
mf_positive "number of processes" "$number"
mf_sort_arguments "devices-per-process logs grace" "${@:2}"
mf_positive --grace "$grace"
[ -z "$devices_per_process" ] || mf_positive --devices-per-process "$devices_per_process"
mf_need_config

# shellcheck source=launch/setup.sh
source "$here/setup.sh"
cd "$root"

export JAX_NUM_PROCESSES="$number"
settings=("JAX_NUM_PROCESSES=$number")
if [ -n "$devices_per_process" ]; then
  export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices_per_process"
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
  settings+=("XLA_FLAGS=$XLA_FLAGS" "JAX_PLATFORMS=$JAX_PLATFORMS")
fi
if [ "$dry_run" = 1 ]; then
  for ((i = 0; i < number; i++)); do
    mf_print env JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT JAX_PROCESS_ID="$i" "${settings[@]}" \
      "$python" -m mf_jax.main "${arguments[@]}"
  done
  exit 0
fi

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port"
temporary=""
if [ -z "$logs" ]; then
  temporary=$(mktemp -d)
  logs="$temporary"
fi
mkdir -p "$logs"
[ "$number" = 1 ] || echo "processes 1 to $((number - 1)) write to $logs/process_*.log" >&2

running=() # process id of those that have not ended, by number
stops=0 asked=0 first="" deadline=0 code=0

# Each process leads a group of its own, so that nothing it started is left behind.
end_group() { kill -KILL -- "-$1" 2>/dev/null || true; }
end_all() {
  local i
  for i in "${!running[@]}"; do end_group "${running[$i]}"; done
}
trap end_all EXIT
trap 'stops=$((stops + 1))' TERM INT HUP # the loop below acts on it

set -m # a group for each of the jobs that follow, which Ctrl-C at a terminal does not reach
for ((i = 0; i < number; i++)); do
  if [ "$i" = 0 ]; then
    JAX_PROCESS_ID=$i "$python" -m mf_jax.main "${arguments[@]}" </dev/null &
  else
    JAX_PROCESS_ID=$i "$python" -m mf_jax.main "${arguments[@]}" </dev/null >"$logs/process_$i.log" 2>&1 &
  fi
  running[i]=$!
done
set +m

# Note the end of process $1; the first failure sets the exit code and the time at which the others
# are ended.
note_end() {
  local status=0
  { wait "${running[$1]}" || status=$?; } 2>/dev/null # the shell's own report of a signal
  end_group "${running[$1]}"
  unset "running[$1]"
  if [ "$status" = 0 ] || [ -n "$first" ]; then return; fi
  first="$1" code="$status"
  [ "$asked" = 1 ] || deadline=$((SECONDS + grace)) # after a stop the others are still saving
  echo "process $1 of $number ended with exit code $status" >&2
  if [ "$1" != 0 ]; then
    echo "the last lines of $logs/process_$1.log:" >&2
    tail -n 20 "$logs/process_$1.log" >&2
  fi
}

# Pass a stop on to one process, which is enough: process 0 unless it has ended. The second time,
# end all.
pass_stop() {
  local i
  if [ "$stops" -gt 1 ]; then
    end_all
  elif [ "$asked" = 0 ]; then
    asked=1
    for i in "${!running[@]}"; do
      kill -TERM "${running[$i]}" 2>/dev/null || true
      return
    done
  fi
}

exec {pause}<> <(:) # a read that never gets anything: a pause without a process
while [ "${#running[@]}" -gt 0 ]; do
  for i in "${!running[@]}"; do
    kill -0 "${running[$i]}" 2>/dev/null || note_end "$i"
  done
  [ "$stops" = 0 ] || pass_stop
  [ "$deadline" = 0 ] || [ "$SECONDS" -lt "$deadline" ] || end_all
  [ "${#running[@]}" = 0 ] || read -r -t 0.1 -u "$pause" || true
done
if [ "$code" = 0 ] && [ -n "$temporary" ]; then rm -r "$temporary"; fi
exit "$code"
