#!/usr/bin/env bash
# One command's worth of a GPU that is lent by the minute, on a machine with torch, triton, nvcc and no network:
#
#   EFFNET_OPS_COMMIT=... OUT=... bash benchmarks/gpu/lent.sh tests|kernels|networks|tune
#
# A machine that was given back between two calls is bare again, so each call begins with the build for this GPU, and
# stops there unless both GPU backends run. Rows go straight to $OUT: what the time limit cuts off is not lost.
set -euo pipefail
cd "$(dirname "$0")/../.."

mkdir -p benchmarks/results/gpu
if [ ! -L benchmarks/results/gpu ]; then
    cp -r benchmarks/results/gpu/. "$OUT"
    rm -r benchmarks/results/gpu
    ln -s "$OUT" benchmarks/results/gpu
fi

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

# A part that ends for want of time (2) or with failed rows (1) does not keep the next from its turn.
part() { python3 "benchmarks/gpu/$@" || echo "exit code $? of $1"; }

case "${1:-}" in
tests)
    python3 -m pytest -q tests/gpu --maxfail=20 -p no:cacheprovider 2>&1 | tee "$OUT/tests.txt" | tail -n 60 || true
    part baselines.py --part machine --part depthwise --seconds 100
    part sanitize.py --seconds 150
    ;;
kernels)
    part ours.py --part kernels --part depthwise --seconds 270
    part baselines.py --part depthwise --part networks --seconds 250
    ;;
networks)
    part ours.py --part networks --part profile --part blocks --part operations --seconds 200
    part baselines.py --part profile --part blocks --seconds 110
    part counters.py --seconds 200
    ;;
tune)
    part tune.py --seconds 480
    cp kernels/tuning.json "$OUT"
    ;;
*)
    echo "usage: bash benchmarks/gpu/lent.sh tests|kernels|networks|tune" >&2
    exit 2
    ;;
esac
