#!/usr/bin/env bash
# A run on a cluster, of one node or of many, that starts again by itself when its time is up.
#
#   sbatch docker/slurm.sh experiments/ddpm.yaml runs/ddpm
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 docker/slurm.sh experiments/ddpm.yaml runs/ddpm --seed_everything 1
#   PYTHON="apptainer exec --nv lit_diffusion.sif python" sbatch docker/slurm.sh experiments/ddpm.yaml runs/ddpm
#
# One task is one GPU: give --ntasks-per-node and --gpus-per-node the same number. Keys after the folder go to `fit`.
#SBATCH --job-name=lit_diffusion
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# To the tasks, not to this script: each of them saves, and srun brings back their exit code.
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: sbatch docker/slurm.sh CONFIG RUN_DIR [keys of fit ...]" >&2
  exit 2
fi
config=$1
run_dir=$2
shift 2
read -r -a python <<<"${PYTHON:-python}"

# A task that has saved ends before the others; it must not take them with it.
code=0
srun --kill-on-bad-exit=0 "${python[@]}" -m lit_diffusion fit --config "$config" --run_dir "$run_dir" --resume auto \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.strategy ddp "$@" || code=$?

# 75: the state was saved after a signal. A cancelled job does not get here: SIGTERM ends this script at once.
if [ "$code" -eq 75 ]; then
  echo "saved, and to be continued: job $SLURM_JOB_ID is queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
