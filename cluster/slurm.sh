#!/usr/bin/env bash
# A sweep on nodes that Slurm allocates: starts Ray on them, with a token of its own, runs the sweep, and ends with it.
#
#   sbatch cluster/slurm.sh my/sweep.toml /shared/runs/today
#
# It inherits the environment that it is submitted from, which needs bt_ray (`pip install ".[gpu]"` from a clone), on a filesystem
# that all nodes share, as are the task, the run directory, and the model, if it is a folder. Further arguments are options of
# `bt-ray sweep`. EDIT the numbers of nodes and GPUs, or give them to sbatch. When the time is over, or a node is lost, the same
# command goes on from the run directory.
#SBATCH --job-name=bt-ray
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

sweep=${1:?the TOML of a sweep}
run_dir=${2:?the run directory, on a filesystem that all nodes share, or the URI of a bucket}

# srun gives both to the nodes in their environment; they stand in no command line.
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600  # seconds that nodes may take to start
export DSPY_CACHEDIR=/tmp/dspy-$SLURM_JOB_ID  # a database, which must not lie in a home directory that nodes share

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head --lines=1)

# On the first node this starts Ray's head, waits for the others, runs the sweep, and stops Ray; the others end when it does.
srun --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 --wait=180 \
    ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="$SLURM_GPUS_ON_NODE" -- \
    bt-ray sweep "$sweep" --run-dir "$run_dir" --address auto \
    --set server.count="$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))" --set server.gpus=1 --set server.cpus=4 "${@:3}"
