#!/bin/bash
# Trains on a Slurm cluster, one worker per task. Run it from the root of the
# repository, on a file system that all nodes share:
#
#     sbatch examples/cluster/slurm.sh examples.digits.train --scale=16
#
# Fill in the #SBATCH lines here or as options of sbatch. See README.md in this
# folder.
#
#SBATCH --job-name=tf-adascale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# For GPUs, use one task per GPU: --ntasks-per-node=8 --gpus-per-task=1
#
# Slurm sends SIGTERM to the workers in time for a last checkpoint.
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

PYTHON=${PYTHON:-.venv/bin/python}
MAX_RESTARTS=${MAX_RESTARTS:-20}

# When one worker ends, the others have two minutes to notice and to save.
srun --label --kill-on-bad-exit=0 --wait=120 \
	--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
	"$PYTHON" -m "$@" --strategy=multiworker --cluster=slurm
code=$?

# Exit code 75 means that the run can resume, and a code above 128 that a signal
# ended a worker. srun returns the highest code of all workers. If one worker
# fails, the others end with 75, which looks like a lost node: hence the limit.
if ((code == 75 || code > 128)) &&
	((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
	scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
