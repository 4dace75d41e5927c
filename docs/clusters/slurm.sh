#!/usr/bin/env bash
# jaxvlm under Slurm, a process on each node that has all of its GPUs:
#
#   sbatch docs/clusters/slurm.sh --config=configs/staged.py:qwen2_5_vl_7b ...
#
# from the clone's root, on a file system that all nodes see, where .venv has
# pip install -e '.[cuda]'. WORKDIR is the run's; the flags are jaxvlm's others.
# Ten minutes before its time is up, or when it is preempted, the run saves and
# ends, and the job is queued again until the run is finished.
#SBATCH --job-name=jaxvlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

workdir=${WORKDIR:-$PWD/runs/staged}
# A node that fails ends the step on the others too.
srun --kill-on-bad-exit=1 .venv/bin/python -u -m jaxvlm.main \
  "$@" --config.workdir="$workdir"

# hf/config.json is the last thing that a run writes.
[[ -e $workdir/hf/config.json ]] || scontrol requeue "$SLURM_JOB_ID"
