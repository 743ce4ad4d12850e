#!/usr/bin/env bash
# Run a table or a grid on the machines of a SLURM job, by Ray:
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 \
#       scripts/slurm.sh TABLE=fimaq IMAGENET=/data/imagenet DEVICE=cuda
#
# Submit it in the checkout, after `make setup` there. Checkout, data and results must be on a file
# system that all machines share, at the same path. The arguments are those of
# `make reproduce-table`. Finished cells are kept: the same job, submitted again, continues.
# FIMAQ_START_SECONDS (300): seconds that machines may take to join.
#
#SBATCH --job-name=fimaq
#SBATCH --output=fimaq-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@120
#SBATCH --no-kill
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

[[ -n "${SLURM_JOB_ID:-}" && -n "${SLURM_JOB_NODELIST:-}" ]] ||
    fail "not in a SLURM job: submit this script with sbatch."
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -x .venv/bin/ray ]] ||
    fail "no .venv/bin/ray in $PWD: submit from the checkout, after make setup there."

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
((${#nodes[@]} > 0)) || fail "scontrol names no machine in '$SLURM_JOB_NODELIST'."
head=${nodes[0]}
# Address of the head that other machines can reach. On the head itself, its name may resolve to the
# loopback device.
ip=$(getent ahostsv4 "$head" | awk 'NR == 1 {print $1}' || true)
if [[ -z "$ip" || "$ip" == 127.* ]]; then
    ip=$(hostname -I | awk '{print $1}')
fi
[[ -n "$ip" ]] || fail "no IPv4 address of $head is known."
address="$ip:$((20000 + SLURM_JOB_ID % 10000))"  # several jobs may share a machine

export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
# Otherwise Ray, when it stops, waits 30 s for open requests. Here there are none.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN

.venv/bin/python -m benchmarks.run.cluster  # fails if Ray cannot use its folder

steps=()
driver=
stop() {
    trap - EXIT
    trap '' TERM INT HUP
    if [[ -n "$driver" ]] && kill -0 "$driver" 2>/dev/null; then
        kill -TERM -- "-$driver" 2>/dev/null || true
        wait "$driver" || true
    fi
    # `ray stop` would also stop the Ray of other jobs on the same machine.
    if ((${#steps[@]})); then
        kill -TERM "${steps[@]}" 2>/dev/null || true
        wait "${steps[@]}" || true
    fi
}
trap stop EXIT
kept="Stopped: finished cells are kept; submit the same job again to continue."
trap 'echo "$kept" >&2; exit 143' TERM INT HUP

# Start Ray on one machine, in a job step that lasts as long as Ray.
# Arguments: the machine, then those of ray start.
start() {
    local node=$1
    shift
    # SLURM_CPUS_ON_NODE is known on the machine itself only.
    # shellcheck disable=SC2016
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --cpu-bind=none \
        bash -c 'exec .venv/bin/ray start --block --disable-usage-stats \
            --object-store-memory=104857600 --num-cpus="${SLURM_CPUS_ON_NODE:-1}" "$@"' ray "$@" &
    steps+=($!)
}

# Run a command in the background, so that this script can handle signals meanwhile, and in its own
# process group, so that the command and its children can be stopped together.
follow() {
    setsid "$@" &
    driver=$!
    wait "$driver"
}

start "$head" --head --node-ip-address="$ip" --port="${address##*:}" --include-dashboard=false
follow .venv/bin/python -m benchmarks.run.cluster "$address" 1 "${FIMAQ_START_SECONDS:-300}"
for node in "${nodes[@]:1}"; do
    start "$node" --address="$address"
done
follow .venv/bin/python -m benchmarks.run.cluster \
    "$address" "${#nodes[@]}" "${FIMAQ_START_SECONDS:-300}"
follow make reproduce-table ENGINE=ray RAY_ADDRESS="$address" "$@"
