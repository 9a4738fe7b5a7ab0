#!/usr/bin/env bash
# Run mf_jax on a Cloud TPU slice of any number of hosts: a queued resource with one node, the same
# command on every host.
#
# Usage: bash launch/tpu_pod.sh ACTION [OPTIONS] [ARGUMENTS OF mf_jax.main ...]
#   create    ask for the slice and wait until it is there
#   setup     copy requirements.txt, mf_jax, configs and launch of this checkout to all hosts (or clone --repo at --commit)
#             and make their environments with jax[tpu]
#   run       start the command on all hosts, detached: it outlives this machine's connection
#   status    print the slice's state, then what each host runs
#   log       show the newest output of host 0 and follow it
#   stop      send SIGTERM to host 0: all hosts save the same step and end
#   follow    all of the above until the run is finished: create, setup, run, wait; after a preemption delete, and again.
#             Ctrl-C leaves the run alone, the same command follows it again
#   delete    give the slice back
# Options, each with the environment variable that sets its default:
#   --project=ID     MF_TPU_PROJECT
#   --zone=ZONE      MF_TPU_ZONE
#   --type=TYPE      MF_TPU_TYPE      for example v5litepod-16, v5p-32, v6e-16 (create, follow)
#   --runtime=NAME   MF_TPU_RUNTIME   the image of the hosts, by default the one for TYPE
#   --capacity=KIND  MF_TPU_CAPACITY  spot (default) or on-demand
#   --name=NAME      MF_TPU_NAME      of the slice, by default mf-jax
#   --repo=URL --commit=ID            clone this on the hosts instead of copying the checkout
#   --poll=SECONDS                    between two looks, by default 30
#   --retries=N                       follow gives up at the N-th failure that no preemption explains, by default 3
#   --dry-run                         print the commands (of one round, for follow) and run nothing
#   bash launch/tpu_pod.sh follow --project=P --zone=us-west4-a --type=v5litepod-16 \
#     --config=configs/imagenet_b2.py --workdir=gs://BUCKET/imagenet_b2 \
#     --config.data.path=gs://BUCKET/imagenet256_latents --config.data.copy_to=/tmp/latents
#
# Needs: gcloud, logged in (gcloud auth login), the TPU API, quota, a key for ssh (ssh-add
# ~/.ssh/google_compute_engine), and a bucket that the hosts' service account may write. Hosts need
# a way to the package registry. follow exits with 0 when the run is finished, 2 for bad input, the
# run's exit code or 1 when it gives up.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

project="${MF_TPU_PROJECT:-}" zone="${MF_TPU_ZONE:-}" type="${MF_TPU_TYPE:-}" runtime="${MF_TPU_RUNTIME:-}"
capacity="${MF_TPU_CAPACITY:-spot}" name="${MF_TPU_NAME:-mf-jax}" repo="" commit="" poll=30 retries=3
action="${1:-}"
case "$action" in
  create | setup | run | status | log | stop | follow | delete) shift ;;
  *) mf_refuse "'$action': the action must be create, setup, run, status, log, stop, follow or delete" ;;
esac
mf_sort_arguments "project zone type runtime capacity name repo commit poll retries" "$@"
[ -n "$project" ] || mf_refuse "--project is missing (or MF_TPU_PROJECT)"
[ -n "$zone" ] || mf_refuse "--zone is missing (or MF_TPU_ZONE)"
[[ $name =~ ^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$ ]] || mf_refuse "--name=$name: lower-case letters, digits and -, from a letter"
mf_positive --poll "$poll"
mf_positive --retries "$retries"
case "$capacity" in spot | on-demand) ;; *) mf_refuse "--capacity=$capacity: must be spot or on-demand" ;; esac
[[ $commit != -* ]] || mf_refuse "--commit=$commit: must be a commit, not an option"
[ -z "$repo$commit" ] || { [ -n "$repo" ] && [ -n "$commit" ]; } || mf_refuse "--repo and --commit belong together"

case "$action" in
  create | follow)
    [ -n "$type" ] || mf_refuse "--type is missing (or MF_TPU_TYPE); for example --type=v5litepod-16"
    if [ -z "$runtime" ]; then
      case "$type" in
        v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        *) mf_refuse "--type=$type: no image is known for it; name one with --runtime" ;;
      esac
    fi
    ;;
esac
case "$action" in
  run | follow)
    mf_need_config
    # runs/NAME would be another folder on every host
    [[ " ${arguments[*]}" =~ " --workdir="(gs://|/). ]] ||
      mf_refuse "--workdir is missing or relative: all hosts must see it; for example --workdir=gs://BUCKET/imagenet_b2"
    ;;
  *) [ "${#arguments[@]}" = 0 ] || mf_refuse "'${arguments[0]}': $action takes no arguments of mf_jax.main" ;;
esac

where=(--project="$project" --zone="$zone" --quiet)
tpus=(gcloud compute tpus)
# A run's folder on the hosts is named after its command, so that follow does not take another's end
# for this one's.
tag=$(printf '%s\n' "${arguments[@]+"${arguments[@]}"}" | cksum | cut -d ' ' -f 1)

on() { # HOST COMMAND
  mf_run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

# The state of the queued resource; nothing if there is none. Fails when gcloud does.
state() {
  mf_run "${tpus[@]}" queued-resources list "${where[@]}" --filter="name~/$name\$" --format="value(state.state)"
}

ask_for_slice() {
  local flags=("${where[@]}" --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
  [ "$capacity" = on-demand ] || flags+=(--spot)
  mf_run "${tpus[@]}" queued-resources create "$name" "${flags[@]}"
}

delete() { mf_run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force; }

create() {
  ask_for_slice || return
  local now="" before=""
  while :; do
    now=$(state) || now="$before" # one look that failed
    if [ "$dry_run" = 1 ]; then
      echo "$now"
      return
    fi
    [ "$now" = "$before" ] || echo "$name: ${now:-gone}" >&2
    case "$now" in
      ACTIVE) return ;;
      FAILED | SUSPEND*) return 1 ;;
    esac
    before="$now"
    sleep "$poll"
  done
}

setup() {
  local get archive="" code=0
  if [ -n "$repo" ]; then
    get="git clone --quiet -- $(mf_print "$repo") mf_jax/checkout && git -C mf_jax/checkout checkout --quiet $(mf_print "$commit") --"
  else
    archive=TEMPORARY
    [ "$dry_run" = 1 ] || archive=$(mktemp -d) || return # a folder that nobody else can have made
    mf_run tar -czf "$archive/$name.tar.gz" -C "$root" --exclude=__pycache__ requirements.txt mf_jax configs launch || return
    mf_run "${tpus[@]}" tpu-vm scp "$archive/$name.tar.gz" "$name:mf_jax.tar.gz" "${where[@]}" --worker=all || code=$?
    mf_run rm -rf "$archive"
    [ "$code" = 0 ] || return "$code"
    get="mkdir -p mf_jax/checkout && tar -xzf mf_jax.tar.gz -C mf_jax/checkout"
  fi
  # images of TPU hosts have an older Python; uv brings one
  on all "set -e; rm -rf mf_jax/checkout; $get; PATH=\$HOME/.local/bin:\$PATH; \
command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv; \
MF_ACCELERATOR=tpu MF_VENV=\$HOME/mf_jax/venv bash mf_jax/checkout/launch/setup.sh"
}

run() {
  local command
  command=$(mf_print ../venv/bin/python -m mf_jax.main "${arguments[@]}" "$@")
  on all "cd mf_jax/checkout && mkdir -p ../runs && ln -sfn $tag ../runs/latest && \
bash launch/detached.sh start ../runs/$tag $command"
}

# A line of each host: running, exited CODE, lost or none.
hosts() { # FOLDER
  on all "bash mf_jax/checkout/launch/detached.sh status mf_jax/runs/$1 2>/dev/null || echo none"
}

status() { state && hosts latest; }
log() { on 0 "tail -n 50 -F mf_jax/runs/latest/log"; }
stop() { on 0 "bash mf_jax/checkout/launch/detached.sh stop mf_jax/runs/latest"; }

failures=0
# Note a failure that no preemption explains, and give up with exit code $1 after too many.
failed() {
  failures=$((failures + 1))
  echo "$name: $2 (failure $failures of $retries)" >&2
  [ "$failures" -lt "$retries" ] || exit "$1"
}

# Look at the hosts of a slice that is there: start what does not run, and exit when it is finished.
attend() {
  local seen code
  if ! seen=$(hosts "$tag"); then
    unreachable=$((unreachable + 1)) # or just preempted, which the next look at the slice tells
    if [ "$unreachable" = 10 ]; then
      unreachable=0
      failed 1 "the hosts cannot be reached"
    fi
    return 0
  fi
  unreachable=0
  if grep -q '^running' <<<"$seen"; then
    ours=1
    return
  fi
  code=$(sed -n 's/^exited \([0-9]*\)$/\1/p' <<<"$seen" | sort -n | tail -n 1)
  if ! grep -q '^none\|^lost' <<<"$seen" && [ "$code" = 0 ]; then
    echo "$name: finished" >&2
    exit 0
  fi
  # the end of a run that this call did not see says nothing: its cause may be mended
  if [ "$ours" = 1 ] && [ -n "$code" ] && [ "$code" != 75 ] && ! grep -q '^lost' <<<"$seen"; then
    on all "tail -n 20 mf_jax/runs/$tag/log" >&2 || true
    # one alone may have ended with 2 because it waited for the others in vain
    grep -qvx 'exited 2' <<<"$seen" || exit 2
    failed "$code" "the run ended with exit code $code"
  fi
  ours=0
  echo "$name: starting the run" >&2
  # stopped by a machine that goes down, it ends with 75: not finished
  if setup && run --config.job.stopped_exit_code=75; then ours=1; else failed 1 "the run could not be started"; fi
}

follow() {
  local now ours=0 unreachable=0
  if [ "$dry_run" = 1 ]; then
    state
    delete
    ask_for_slice
    hosts "$tag"
    setup
    run --config.job.stopped_exit_code=75
    return
  fi
  while :; do
    now=$(state) || now=UNKNOWN
    case "$now" in
      ACTIVE) attend ;;
      FAILED | SUSPENDED)
        [ "$now" != FAILED ] || failed 1 "the slice could not be made"
        echo "$name: $now; deleting it and asking for another" >&2
        ours=0
        if delete; then continue; fi
        ;;
      "")
        echo "$name: asking for a slice" >&2
        ask_for_slice || failed 1 "the slice was refused"
        ;;
    esac
    sleep "$poll"
  done
}

"$action"
