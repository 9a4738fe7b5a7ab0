# Shared by the launch scripts, which source it with their arguments: --help, refusals, options, and
# dry runs.
# shellcheck shell=bash

# The header of a script is its help.
mf_help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# One line, before anything is started.
mf_refuse() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# $2 must be a whole number from 1, written without a sign or leading zeros; $1 says what it is.
mf_positive() { [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || mf_refuse "$1: '$2' is not a positive whole number"; }

dry_run="${dry_run:-0}"
# Sort arguments: --dry-run, options --NAME=VALUE of the names in $1 into variables, and those of
# mf_jax.main into $arguments.
mf_sort_arguments() {
  local mf_names=" $1 " mf_argument mf_name # no option has such a name
  arguments=()
  for mf_argument in "${@:2}"; do
    mf_name="${mf_argument%%=*}" mf_name="${mf_name#--}"
    if [[ $mf_argument == --?*=* && $mf_names == *" $mf_name "* ]]; then
      [ -n "${mf_argument#*=}" ] || mf_refuse "--$mf_name has no value; write --$mf_name=VALUE"
      printf -v "${mf_name//-/_}" %s "${mf_argument#*=}"
      continue
    fi
    case "$mf_argument" in
      --dry-run) dry_run=1 ;;
      --config=?* | --config.?*=* | --mode=?* | --workdir=?*) arguments+=("$mf_argument") ;;
      *) mf_refuse "'$mf_argument': not an option here or of mf_jax.main, whose options look like --config=configs/digits.py" ;;
    esac
  done
}

mf_need_config() {
  [[ " ${arguments[*]-}" == *" --config="* ]] || mf_refuse "--config is missing; for example --config=configs/digits.py"
}

# Print a command so that it can be pasted into a shell.
mf_print() {
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s\n' "${line:1}"
}

# Run a command, or print it with --dry-run.
mf_run() {
  if [ "$dry_run" = 1 ]; then mf_print "$@"; else "$@"; fi
}

for mf_argument in "$@"; do
  case "$mf_argument" in
    --help | -h)
      mf_help
      exit 0
      ;;
  esac
done
unset mf_argument
