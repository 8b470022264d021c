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
# goes on from there. The same happens when it is preempted.
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -uo pipefail
# A process that is lost ends the others; SLURM then ends what is left of the step.
srun --kill-on-bad-exit=1 python -m mocosfl_jax.train "$@"
status=$?
# 143: stopped by SIGTERM, and saved.
if [ "$status" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
