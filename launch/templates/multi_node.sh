#!/usr/bin/env bash
# Train on several machines without a scheduler. Run the same command on every one, within 10 minutes of each other:
#
#   NNODES=4 RDZV_ENDPOINT=node0:29400 RUN_ID=first bash multi_node.sh model=llama3.1_70b parallel.tp=8
#
#   NNODES          machines
#   RDZV_ENDPOINT   where they meet: host name of any one of them, and a port that is free on it and open to the others
#   RUN_ID          the same on all of them. The run directory is runs/<model>-<RUN_ID>: launch again with the same
#                   RUN_ID to go on from the newest checkpoint (resume=auto), with a new one to start anew
#   NPROC_PER_NODE  ranks per machine; default: its GPUs
#   MAX_RESTARTS    default 0: when a rank fails, all machines stop within seconds, and a new launch resumes.
#                   Above 0 torchrun starts the ranks again by itself, from the newest checkpoint
#
# Run directory and data.paths belong on a file system that all machines share: each rank writes its part of a
# checkpoint there. Keep parallel.tp within a machine: its collectives run in every layer.
# Where the default network interface is the wrong one, set NCCL_SOCKET_IFNAME (GPU) or GLOO_SOCKET_IFNAME (CPU).
set -euo pipefail

: "${NNODES:?set NNODES to the number of machines}"
: "${RDZV_ENDPOINT:?set RDZV_ENDPOINT to host:port of one of the machines}"
: "${RUN_ID:?set RUN_ID to a name for the run, the same on every machine}"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# seconds that torchrun leaves the ranks for their last checkpoint before it kills them
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
# the ranks make a store of their own: sharing the rendezvous' hangs now and then when they are restarted
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# exec: a signal sent to this script reaches torchrun, which passes it on to the ranks
exec torchrun \
    --nnodes="$NNODES" \
    --nproc-per-node="${NPROC_PER_NODE:-auto}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$RDZV_ENDPOINT" \
    --rdzv-id="$RUN_ID" \
    --max-restarts="${MAX_RESTARTS:-0}" \
    -m gqa_parallel.launch.train "$@"
