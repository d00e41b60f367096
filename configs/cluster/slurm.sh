#!/usr/bin/env bash
# Trains on four nodes of eight GPUs, one process a GPU, as JAX expects it under SLURM:
#   sbatch configs/cluster/slurm.sh runs/mine
# The run's folder lies on a disk that all nodes share. Two minutes before the time is up, SLURM sends SIGTERM: the run
# saves, ends with code 0 and status "interrupted", and the job queues once more; a node that dies ends all others.
#SBATCH --job-name=moe_jax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

workdir=${1:?usage: sbatch configs/cluster/slurm.sh WORKDIR}

srun --kill-on-bad-exit=1 python -m experiments.train --config configs/train_mesh.py \
  --config.mesh.data=-1 --config.mesh.expert=8 --config.data.batch_size=256 --workdir "$workdir" --hosts=auto

if grep -q '"status": "interrupted"' "$workdir/status.json"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
