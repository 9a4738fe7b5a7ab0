# Shared by the launch scripts, which source it with their arguments: --help, refusals, and commands that a dry run prints.
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

# The value of a flag --NAME=VALUE, which must not be empty.
mf_value() {
  [ -n "${1#*=}" ] || mf_refuse "${1%%=*} has no value; write ${1%%=*}=VALUE"
  printf '%s\n' "${1#*=}"
}

# Refuse an argument that mf_jax.main does not have.
mf_main_argument() {
  case "$1" in
    --config=?* | --config.?*=* | --mode=?* | --workdir=?*) ;;
    *) mf_refuse "'$1': not an option here or of mf_jax.main, whose options look like --config=configs/digits.py" ;;
  esac
}

# Print a command so that it can be pasted into a shell.
mf_print() {
  local word line=""
  for word in "$@"; do
    case "$word" in
      "" | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//\'/\'\\\'\'}'" ;;
    esac
    line+=" $word"
  done
  printf '%s\n' "${line:1}"
}

# Run a command, or print it with --dry-run.
mf_run() {
  if [ "${dry_run:-0}" = 1 ]; then mf_print "$@"; else "$@"; fi
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
