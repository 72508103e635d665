#!/usr/bin/env bash
# One command's worth of a GPU that is lent by the minute, on a machine with torch, triton, nvcc and no network:
#
#   EFFNET_OPS_COMMIT=... OUT=... bash benchmarks/gpu/lent.sh tests|kernels|networks|tune [SECONDS]
#
# A machine that was given back between two calls is bare again, so each call begins with the build for this GPU, and
# stops there unless both GPU backends run. Rows go straight to $OUT: what the time limit cuts off is not lost. Nothing
# begins after SECONDS.
set -euo pipefail
cd "$(dirname "$0")/../.."
limit=${2:-560}
: "${EFFNET_OPS_COMMIT:?must be the commit of these files: rows belong to one}"

mkdir -p benchmarks/results/gpu
cp -r benchmarks/results/gpu/. "$OUT"
export EFFNET_OPS_GPU_ROWS=$OUT

# PyTorch's compiler would give its own process another cache than the one that is filled here.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${HOME:-/tmp}/.triton/cache}

runs='import effnet_ops
reasons = {name: effnet_ops.available_backends()[name] for name in ("cuda", "triton")}
raise SystemExit(f"does not run here: {reasons}" if any(reasons.values()) else 0)'
if ! python3 -c "$runs" 2>/dev/null; then
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
    [ "$capability" = 9.0 ] && capability=9.0a
    FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$capability \
        python3 -m pip install -q --no-build-isolation --no-deps --no-index -e .
    python3 -c "$runs"
fi

# part SECONDS SCRIPT ARGUMENTS: one that ends for want of time or with failed rows does not keep the next from its
# turn. Exit code 2 before the time is up is a lost GPU, and what is left goes on in a process of its own.
part() {
    local end=$((SECONDS + $1)) code
    [ "$end" -le "$limit" ] || end=$limit
    for _ in 1 2 3; do
        [ "$SECONDS" -lt "$end" ] || break
        code=0
        python3 "benchmarks/gpu/$2" "${@:3}" --seconds $((end - SECONDS)) || code=$?
        [ "$code" -eq 0 ] || echo "exit code $code of $2"
        [ "$code" -eq 2 ] || break
    done
}

case "${1:-}" in
tests)
    # An interrupted pytest still prints what has failed so far.
    timeout --signal=INT --kill-after=20 200 python3 -m pytest -n 14 -v -rf tests/gpu --maxfail=20 -p no:cacheprovider \
        2>&1 | tee "$OUT/tests.txt" | tail -n 60 || true
    part 70 baselines.py --part machine --part depthwise
    part 40 precompile.py --part sanitizer
    part 120 sanitize.py
    ;;
kernels)
    part 90 precompile.py --part kernels --part depthwise
    part 190 ours.py --part kernels --part depthwise
    part 200 baselines.py --part networks --part depthwise
    ;;
networks)
    part 120 precompile.py --part networks --part operations
    part 210 ours.py --part networks --part profile --part blocks --part operations
    part 50 baselines.py --part profile
    part 120 counters.py
    part 60 baselines.py --part networks --part blocks
    ;;
tune)
    part 60 precompile.py --part kernels
    part 480 tune.py
    cp kernels/tuning.json "$OUT"
    ;;
*)
    echo "usage: bash benchmarks/gpu/lent.sh tests|kernels|networks|tune [SECONDS]" >&2
    exit 2
    ;;
esac
