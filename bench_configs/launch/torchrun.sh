#!/usr/bin/env bash
# One node of several, without a scheduler; start it on each node, the first one too:
#
#     bash bench_configs/launch/torchrun.sh FIRST_ADDRESS OWN_ADDRESS NUM_NODES [engine.run's options]
#
# An address is one that all nodes reach (tools/verify doctor --nodes --rendezvous FIRST_ADDRESS).
# The rendezvous' store is on the node whose own address is the first one: both are said outright,
# since torchrun guesses by a machine's name, and in containers that means the container itself.
# RDZV_PORT is another port than 29400, RANKS_PER_NODE where it is not one a GPU.
# --out should be a folder that all nodes see: a run that goes on may have its rank 0 elsewhere.
set -euo pipefail

first=${1:?the address of the first node}
own=${2:?the address of this node}
num_nodes=${3:?how many nodes}
shift 3

exec torchrun \
    --nnodes "$num_nodes" --nproc-per-node "${RANKS_PER_NODE:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "$first:${RDZV_PORT:-29400}" --rdzv-id tmnist \
    --rdzv-conf "is_host=$([[ $own == "$first" ]] && echo 1 || echo 0)" --local-addr "$own" \
    --max-restarts 3 \
    -m engine.run --out runs/nodes --resume auto "$@"
