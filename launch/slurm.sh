#!/usr/bin/env bash
# Several nodes under SLURM, a process for each GPU. JAX finds the others by the variables that srun sets.
#
#     sbatch launch/slurm.sh --config=configs/FILE.py --workdir=FOLDER_THAT_ALL_NODES_SHARE
#
#SBATCH --job-name=mocosfl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
# SIGTERM to all processes five minutes before the end, which they take to save; then the job queues again and
# goes on from there. It does so too when SLURM loses a node or preempts the job.
#SBATCH --signal=TERM@300
#SBATCH --requeue
# Each start adds to the same log.
#SBATCH --open-mode=append
set -uo pipefail
# A process that is lost ends the others; SLURM then ends what is left of the step.
srun --kill-on-bad-exit=1 python -m mocosfl_jax.train "$@"
status=$?
# 143: stopped by SIGTERM, and saved. Others from 128 on: a process was killed (137, out of memory) or lost the
# others (134), which may pass; but not for ever. A mistake of the user's is 2, and ends the job.
if [ "$status" -eq 143 ] || { [ "$status" -ge 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
