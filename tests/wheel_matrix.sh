#!/usr/bin/env bash
# Installs one wheel of dist/ beside each of TORCH_VERSIONS, one after the other, and runs the operators' tests there: one
# library has to serve them all. An environment is some 5 GB, and is removed again; KEEP=1 keeps them.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
TORCH_VERSIONS=${TORCH_VERSIONS:-2.10.0 2.11.0 2.13.0 2.14.1}
# The words, what PyTorch expects of an operator, and what else is C++; of test_cpp.py the slow ones, too.
TESTS=${TESTS:-test_operators test_depthwise test_pointwise test_squeeze_excite test_mbconv test_fused_mbconv \
    test_batch_norm test_conv_norm test_packed test_recorded_calls}

wheels=(dist/effnet_ops-*.whl)
[ ${#wheels[@]} = 1 ] && [ -f "${wheels[0]}" ] || { echo "dist/ must hold one wheel: run make wheel" >&2; exit 1; }

folder=$PWD/build/wheel-matrix
rm -rf "$folder" && mkdir -p "$folder/checkout"
# The tests alone, since the package beside them would hide the installed one.
cp -r tests csrc pyproject.toml "$folder/checkout"
failed=()
for version in $TORCH_VERSIONS; do
    environment=$folder/torch-$version
    echo "==> torch $version"
    "$PYTHON" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-compile \
        "torch==$version" "${wheels[0]}" numpy pytest hypothesis efficientnet_pytorch
    # One chain: bash does not stop at the first command that fails in a list whose result is asked for.
    # shellcheck disable=SC2046,SC2086
    (
        cd "$folder/checkout" && export OMP_WAIT_POLICY=passive PATH="$environment/bin:$PATH" &&
            python -m pip check &&
            python -c "import effnet_ops, torch; print(torch.__version__, effnet_ops.available_backends())" &&
            pytest -q -m "not slow" $(printf 'tests/%s.py ' $TESTS) && pytest -q tests/test_cpp.py
    ) || failed+=("$version")
    [ "${KEEP:-0}" = 1 ] || rm -rf "$environment"
done
[ ${#failed[@]} = 0 ] || { echo "the tests failed with torch ${failed[*]}" >&2; exit 1; }
