#!/usr/bin/env bash
# Run a table or a profile on the machines of a SLURM job, with Ray:
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 scripts/slurm.sh TABLE=fimaq \
#       IMAGENET=/data/imagenet DEVICE=cuda
#
# Submit it in the checkout, after `make setup`. All machines must share the file system of
# checkout, data and results, at the same path. Arguments are those of `make reproduce-table`.
# Finished cells are kept: the same job, submitted again, goes on where it stopped.
# FIMAQ_START_SECONDS (300) is the time that machines have to join.
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
# The head's address for the other machines. Its own name may resolve to the loopback device.
ip=$(getent ahostsv4 "$head" | awk 'NR == 1 {print $1}' || true)
if [[ -z "$ip" || "$ip" == 127.* ]]; then
    ip=$(hostname -I | awk '{print $1}')
fi
[[ -n "$ip" ]] || fail "no IPv4 address of $head is known."
address="$ip:$((20000 + SLURM_JOB_ID % 10000))"  # several jobs may share a machine

export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
# Before it stops, Ray would wait 30 s for requests that it serves. Here it serves none.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN

.venv/bin/python -m benchmarks.run.ray  # refuses a folder that Ray cannot use

steps=()
driver=
stop() {
    trap - EXIT
    trap '' TERM INT
    if [[ -n "$driver" ]] && kill -0 "$driver" 2>/dev/null; then
        kill -TERM -- "-$driver" 2>/dev/null || true
        wait "$driver" || true
    fi
    # Not `ray stop`: that would end the Ray of other jobs on the same machine too.
    if ((${#steps[@]})); then
        kill -TERM "${steps[@]}" 2>/dev/null || true
        wait "${steps[@]}" || true
    fi
}
trap stop EXIT
stopped="Stopped: finished cells are kept; submit the same job again to go on."
trap 'echo "$stopped" >&2; exit 143' TERM INT

# Starts Ray on one machine, in a job step that ends with Ray. Arguments: the machine, then those of
# `ray start`.
start() {
    local node=$1
    shift
    # Only the machine itself knows its share of the job.
    # shellcheck disable=SC2016
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --cpu-bind=none \
        bash -c 'exec .venv/bin/ray start --block --disable-usage-stats \
            --object-store-memory=104857600 --num-cpus="${SLURM_CPUS_ON_NODE:-1}" "$@"' ray "$@" &
    steps+=($!)
}

# Runs a command in the background, so that this script receives signals meanwhile, and in its own
# process group, so that the command and its processes can be stopped together.
follow() {
    setsid "$@" &
    driver=$!
    wait "$driver"
}

start "$head" --head --node-ip-address="$ip" --port="${address##*:}" --include-dashboard=false
follow .venv/bin/python -m benchmarks.run.ray "$address" 1 "${FIMAQ_START_SECONDS:-300}"
for node in "${nodes[@]:1}"; do
    start "$node" --address="$address"
done
follow .venv/bin/python -m benchmarks.run.ray "$address" "${#nodes[@]}" \
    "${FIMAQ_START_SECONDS:-300}"
follow make reproduce-table ENGINE=ray RAY_ADDRESS="$address" "$@"
