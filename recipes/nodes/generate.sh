#!/usr/bin/env bash
# One vLLM server per GPU of this node, for a trainer on other nodes. Ends when the first server ends.
#   export IGRPO_SERVER_SECRET=...   the same on every node
#   recipes/nodes/generate.sh RECIPE ADDRESS [--key value ...]      ADDRESS: this node's private address
set -euo pipefail
if [ "$#" -lt 2 ]; then
    echo "usage: $0 RECIPE ADDRESS [--key value ...]" >&2
    exit 2
fi
recipe=$1 address=$2
shift 2
: "${IGRPO_SERVER_SECRET:?export the same value on every node, for example from: openssl rand -hex 24}"
gpus=${GPUS_PER_NODE:-8}
port=${FIRST_PORT:-8000}

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for ((gpu = 0; gpu < gpus; gpu++)); do
    CUDA_VISIBLE_DEVICES=$gpu python -m igrpo.serve --config "$recipe" \
        --vllm_server_host "$address" --vllm_server_port "$((port + gpu))" "$@" &
done
wait -n
