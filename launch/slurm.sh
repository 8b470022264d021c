#!/usr/bin/env bash
# Several nodes under SLURM, with one process per GPU. The processes find each other by the variables that srun sets.
#
#     sbatch launch/slurm.sh --config=configs/FILE.py --workdir=FOLDER_THAT_ALL_NODES_SHARE
#
#SBATCH --job-name=mocosfl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
# All processes get SIGTERM five minutes before the time limit, so that they can save. The job is then queued again
# and resumes from the checkpoint. The same happens when SLURM loses a node or preempts the job.
#SBATCH --signal=TERM@300
#SBATCH --requeue
# Every start appends to the same log.
#SBATCH --open-mode=append
set -uo pipefail
# When a process is lost, the others end too, and SLURM ends the rest of the step.
srun --kill-on-bad-exit=1 python -m mocosfl_jax.train "$@"
status=$?
# 143: stopped by SIGTERM after saving. Other values from 128: a process was killed (137, out of memory) or lost the
# others (134). Such errors may be temporary, so the job is queued again, but only 50 times. Status 2, an error in
# the configuration, ends the job.
if [ "$status" -eq 143 ] || { [ "$status" -ge 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
