#!/usr/bin/env bash
# Trains on two "machines", which are two network namespaces of this one with a cable between them, and compares the
# weights with those of two processes in one namespace: they have to be the same bytes. Needs Linux, root and `ip`.
#
#     tools/two_machines.sh FOLDER_OF_PARQUET_FILES [OPTION of pretrain.py ...]
set -euo pipefail
data=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
work=$(mktemp -d)
names=("cbsa-a-$$" "cbsa-b-$$")
clean() {
    for name in "${names[@]}"; do ip netns del "$name" 2>/dev/null || true; done
    rm -rf "$work"
}
trap clean EXIT

for name in "${names[@]}"; do ip netns add "$name"; done
ip link add veth-a netns "${names[0]}" type veth peer name veth-b netns "${names[1]}"
for i in 0 1; do
    cable=$([ "$i" = 0 ] && echo veth-a || echo veth-b)
    ip -n "${names[$i]}" addr add "10.99.0.$((i + 1))/24" dev "$cable"
    ip -n "${names[$i]}" link set "$cable" up
    ip -n "${names[$i]}" link set lo up
done

export ACCELERATE_USE_CPU=true HF_HUB_OFFLINE=1
launch() { # namespace, network interface, options of the launcher -- options of the script
    local inside=$1 interface=$2
    shift 2
    GLOO_SOCKET_IFNAME=$interface ip netns exec "$inside" python -m accelerate.commands.launch --multi_gpu \
        --num_processes 2 --mixed_precision no --dynamo_backend no "$@"
}
script=(training/pretrain.py --dataset_name "$data" "$@")
launch "${names[1]}" veth-b --num_machines 2 --machine_rank 1 --main_process_ip 10.99.0.1 --main_process_port 29500 \
    "${script[@]}" --output_dir "$work/two" &
second=$!
launch "${names[0]}" veth-a --num_machines 2 --machine_rank 0 --main_process_ip 10.99.0.1 --main_process_port 29500 \
    "${script[@]}" --output_dir "$work/two"
wait "$second"
launch "${names[0]}" lo --num_machines 1 --main_process_port 29501 "${script[@]}" --output_dir "$work/one"
cmp "$work/one/model.safetensors" "$work/two/model.safetensors"
echo "Two machines end with the weights of one, to the last bit."
