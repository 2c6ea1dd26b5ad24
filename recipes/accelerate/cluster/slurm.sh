#!/bin/bash
# One run on 2 nodes of 8 GPUs:  sbatch recipes/accelerate/cluster/slurm.sh recipes/configs/NAME.yaml [--setting VALUE]
# Submitted again with the same settings it goes on from its last checkpoint; --requeue does so when a node is lost.
#SBATCH --job-name=steer
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit it with sbatch, from the checkout}"
config=${1:?give a config of recipes/configs}
shift
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TOKENIZERS_PARALLELISM=false
# RECIPE=recipes/layer_sweep.py trains a population: the members are divided among the processes.
# --kill-on-bad-exit ends the other nodes' processes when one is lost, instead of leaving them to wait for it.
srun --kill-on-bad-exit=1 bash -c 'accelerate launch --config_file recipes/accelerate/multi-node.yaml \
  --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * 8)) --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$0" "${RECIPE:-recipes/grpo_steer.py}" --config "$@"' "$address" "$config" "$@"
