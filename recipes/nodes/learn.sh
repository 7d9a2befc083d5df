#!/usr/bin/env bash
# The learner's part on this node, one process per GPU; generation runs on the node at GENERATOR (generate.sh).
#   recipes/nodes/learn.sh RECIPE GENERATOR [--key value ...]
# More than one learner node: NODES, NODE_RANK and MAIN_ADDRESS (the address of rank 0), the same otherwise. SERVERS, where
# the generation node has another number of GPUs than this one.
set -euo pipefail
if [ "$#" -lt 2 ]; then
    echo "usage: $0 RECIPE GENERATOR [--key value ...]" >&2
    exit 2
fi
recipe=$1 generator=$2
shift 2
: "${IGRPO_SERVER_SECRET:?export the same value on every node, for example from: openssl rand -hex 24}"
gpus=${GPUS_PER_NODE:-8}
port=${FIRST_PORT:-8000}
nodes=${NODES:-1}
servers=${SERVERS:-$gpus}

urls=""
for ((server = 0; server < servers; server++)); do
    urls+="${urls:+, }http://$generator:$((port + server))"
done
settings=(--config "$recipe" --vllm_mode server --vllm_server_urls "[$urls]" "$@")

# What would stop the run is said now, before a model is loaded; servers may still be loading theirs.
if [ "${NODE_RANK:-0}" = 0 ]; then
    igrpo doctor "${settings[@]}" --wait "${SERVER_WAIT_SECONDS:-900}"
fi
exec accelerate launch --config_file "${ACCELERATE_CONFIG:-recipes/accelerate/fsdp2.yaml}" \
    --num_machines "$nodes" --num_processes "$((nodes * gpus))" --machine_rank "${NODE_RANK:-0}" \
    --main_process_ip "${MAIN_ADDRESS:-127.0.0.1}" --main_process_port "${MAIN_PORT:-29500}" \
    igrpo/train.py "${settings[@]}"
