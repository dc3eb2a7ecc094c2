#!/usr/bin/env bash
# A run over several machines of a Slurm cluster. What stands behind the script is a command of `train`:
#
#     sbatch --nodes 4 examples/accelerate/slurm.sh cft --config run.yaml
#     LAUNCH=examples/accelerate/ddp.yaml sbatch examples/accelerate/slurm.sh cppo --config run.yaml
#
# `out`, the data and the model lie on a file system that all machines see. A job that is requeued goes on from its last
# checkpoint, as the same command does by hand.
#SBATCH --job-name=rehearse
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1         # a launcher a machine, which starts a process a GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

processes=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1}))
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# the number of a machine is known on it alone, hence the shell there
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config_file "${LAUNCH:-examples/accelerate/fsdp2.yaml}" \
    --num_machines "$SLURM_NNODES" --num_processes "$processes" \
    --main_process_ip "$first" --main_process_port "$port" \
    -m train.cli "$@"
