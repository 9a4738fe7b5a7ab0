#!/usr/bin/env bash
# Run mf_jax on GPU nodes under SLURM: one process for each GPU, found by JAX's own SLURM detection.
#
# Two minutes before the time limit, and when the job is preempted, SLURM sends SIGTERM: all
# processes save the same step and exit with 75, and the job puts itself back into the queue and
# continues. A finished run, a cancelled job and an error end the job. The environment is made once,
# before the processes start.
#
# Usage: sbatch [OPTIONS OF sbatch] launch/slurm.sh [--dry-run] --config=configs/NAME.py [ARGUMENTS OF mf_jax.main ...]
#   sbatch --partition=gpu --nodes=4 launch/slurm.sh --config=configs/imagenet_b2.py
#   bash launch/slurm.sh --dry-run --config=configs/digits.py    print what the job would run
# The #SBATCH lines below are defaults: the command line of sbatch replaces them. --ntasks-per-node
# must equal --gpus-per-node; do not give --gpus-per-task, which hides from each process all GPUs
# but one. On CPU nodes delete the line with --gpus-per-node. MF_ACCELERATOR=cuda12 takes another
# build of JAX than cuda13.
#
# Needs: to be submitted from the checkout, which lies, as the workdir does, on a file system that
# all nodes see; internet on the first node for the first start, or an environment made before
# (MF_ACCELERATOR=cuda13 bash launch/setup.sh).

#SBATCH --job-name=mf_jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# sbatch runs a copy of this file from elsewhere
here=$(dirname "${BASH_SOURCE[0]}")
[ -f "$here/common.sh" ] || here="${SLURM_SUBMIT_DIR:-.}/launch"
if [ ! -f "$here/common.sh" ]; then
  echo "slurm.sh: $here is not of a checkout; submit from one: cd CHECKOUT && sbatch launch/slurm.sh" >&2
  exit 2
fi
# shellcheck source=launch/common.sh
source "$here/common.sh"

mf_sort_arguments "" "$@"
mf_need_config
[ "$dry_run" = 1 ] || [ -n "${SLURM_JOB_ID:-}" ] || mf_refuse "this is not a SLURM job; submit it: sbatch launch/slurm.sh ..."

if [ "${SLURM_GPUS_ON_NODE:-0}" != 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  export MF_ACCELERATOR="${MF_ACCELERATOR:-cuda13}"
fi
# shellcheck source=launch/setup.sh
source "$here/setup.sh"
cd "$root"

# The others may still be saving when the first process has ended with 75. One that has crashed is
# noticed by JAX.
flags=(--kill-on-bad-exit=0 --wait=0)
# srun does not take this from the job by itself
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || flags+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
code=0
mf_run srun "${flags[@]}" "$python" -m mf_jax.main "${arguments[@]}" --config.job.stopped_exit_code=75 || code=$?
if [ "$code" = 75 ] || [ "$dry_run" = 1 ]; then
  mf_run scontrol requeue "${SLURM_JOB_ID:-JOB_ID}"
fi
exit "$code"
