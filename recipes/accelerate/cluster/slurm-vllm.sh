#!/bin/bash
# Two nodes: the first serves the base with vLLM, the second trains and sends it nothing but the vectors.
#   sbatch recipes/accelerate/cluster/slurm-vllm.sh recipes/configs/NAME.yaml [--setting VALUE]
#SBATCH --job-name=steer-vllm
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
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
model=$(sed -n 's/^model: *//p' "$config")
# VLLM_SERVER_DEV_MODE opens the route that takes vectors: keep the port inside the cluster.
srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" env VLLM_SERVER_DEV_MODE=1 \
  vllm serve "$model" --logprobs-mode processed_logprobs --tensor-parallel-size 8 --port 8000 &
server=$!
trap 'kill "$server" 2> /dev/null || true' EXIT
srun --nodes=1 --ntasks=1 --nodelist="${nodes[1]}" accelerate launch --config_file recipes/accelerate/ddp.yaml \
  recipes/grpo_steer.py --config "$config" --use_vllm true --vllm_mode server \
  --vllm_server_base_url "http://${nodes[0]}:8000" --vllm_server_timeout 1800 "$@"
