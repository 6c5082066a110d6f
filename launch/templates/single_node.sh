#!/usr/bin/env bash
# Train on all GPUs of this machine (on its CPU cores where it has none). Arguments are overrides of gqa-train:
#
#   bash single_node.sh model=llama3.1_8b parallel.tp=8
#   NPROC_PER_NODE=2 bash single_node.sh experiment=demo parallel.tp=2
#
# Each launch gets a run directory of its own under runs/. To go on after a stop, name one and launch again:
#
#   bash single_node.sh model=llama3.1_8b parallel.tp=8 run_dir=runs/first
#
# Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint.
set -euo pipefail

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# seconds that torchrun leaves the ranks for their last checkpoint before it kills them
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"

# exec: a signal sent to this script reaches torchrun, which passes it on to the ranks
exec torchrun \
    --standalone \
    --nproc-per-node="${NPROC_PER_NODE:-auto}" \
    --max-restarts=0 \
    -m gqa_parallel.launch.train "$@"
