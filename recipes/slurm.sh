#!/bin/bash
# recipes/ssrm.py on several machines of a Slurm cluster, started by accelerate:
#
#   sbatch recipes/slurm.sh
#
# One task a machine, which starts a process for each of its GPUs. All machines need to see the repository, the
# environment that is active when this is submitted, and `output_dir`. A job that was killed continues when it is
# submitted again.
#SBATCH --job-name=ssrm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail

export GPUS_PER_NODE=8
# Not `head`: it ends before it has read all the names, which is an error with `pipefail`.
MAIN_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MAIN_NODE

# In single quotes, since each machine has its own SLURM_NODEID. If one machine fails, all of them end.
srun --kill-on-bad-exit=1 bash -c 'accelerate launch \
    --config_file recipes/accelerate_configs/multi_gpu.yaml \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes "$((SLURM_NNODES * GPUS_PER_NODE))" \
    --main_process_ip "$MAIN_NODE" --main_process_port 29500 \
    recipes/ssrm.py --config recipes/ssrm.yaml'
