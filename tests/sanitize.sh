#!/usr/bin/env bash
# Builds the C++ part with the address and undefined-behaviour sanitizers beside the normal build, and runs the operator tests on it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
target=build/sanitized

echo "==> building with sanitizers into $target"
EFFNET_OPS_BUILD=cpu EFFNET_OPS_SANITIZE=1 "$python" setup.py -q build --build-lib "$target" 2>&1 | grep -E '^effnet_ops:|error' || true

# The sanitizers' runtime must be in the process before Python; Python itself leaks by design at exit.
compiler=${CXX:-g++}
export LD_PRELOAD="$($compiler -print-file-name=libasan.so):$($compiler -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONSAFEPATH=1
export PYTHONPATH="$PWD/$target"

"$python" -c "import effnet_ops; print('==> testing', effnet_ops.__file__); assert 'sanitized' in effnet_ops.__file__"
# What is left out tests how the C library's allocator behaves, whose place the sanitizer's takes.
exec "$python" -m pytest -q -p no:cacheprovider \
    tests/test_depthwise.py tests/test_pointwise.py tests/test_squeeze_excite.py tests/test_mbconv.py tests/test_packed.py \
    tests/test_conv_norm.py \
    tests/test_native.py \
    --deselect tests/test_conv_norm.py::test_large_outputs_are_not_faulted_in_at_each_call "$@"
