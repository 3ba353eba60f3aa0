#!/bin/bash
# Trains on a Slurm cluster, one worker per task. From the repository's root, on
# a file system that all nodes share:
#
#     sbatch examples/cluster/slurm.sh examples.digits.train --scale=16
#
# The lines of #SBATCH are to fill in, here or as options of sbatch. README.md in
# this folder tells the rest.
#
#SBATCH --job-name=tf-adascale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# With GPUs, a task for each: --ntasks-per-node=8 --gpus-per-task=1
#
# SIGTERM to the workers in time for one more checkpoint before the limit.
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

PYTHON=${PYTHON:-.venv/bin/python}
MAX_RESTARTS=${MAX_RESTARTS:-20}

# When one worker ends, the others may still be saving, or about to notice: they
# have two minutes.
srun --label --kill-on-bad-exit=0 --wait=120 \
	--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
	"$PYTHON" -m "$@" --strategy=multiworker --cluster=slurm
code=$?

# 75 is a run that can go on, above 128 a worker that a signal ended. srun gives
# the highest code of all: an error of one worker, whose peers end with 75, looks
# like a lost node. Hence the limit.
if ((code == 75 || code > 128)) &&
	((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
	scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
