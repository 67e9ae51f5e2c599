#!/usr/bin/env bash
# Train on Slurm, a task a GPU. From this repository's folder; what sbatch is told replaces the settings below:
#   sbatch --partition P --nodes 2 tools/slurm_train.sh configs/cascade/convnext_t.py --work-dir DIR [arguments of train.py]
# It goes on from the work dir's last checkpoint wherever Slurm starts it again. Two minutes before its time is up it
# tells train.py to end and puts itself into the queue again.
#SBATCH --job-name=convnext_dense
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=5
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail
: "${SLURM_JOB_ID:?start this by sbatch}" "${1:?give a config, such as configs/cascade/convnext_t.py}"

# To the tasks, not to this shell; scancel by hand sends no USR1, so that a job one cancels stays cancelled.
again=
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
srun --ntasks=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE)) --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    --kill-on-bad-exit=1 python -u tools/train.py "$@" --launcher slurm --resume auto &
training=$!
wait "$training" && code=0 || code=$?
while kill -0 "$training" 2>/dev/null; do # the signal ended `wait`, not the training
    wait "$training" && code=0 || code=$?
done
[[ -z $again ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
