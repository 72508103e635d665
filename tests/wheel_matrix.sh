#!/usr/bin/env bash
# Installs one wheel of dist/ beside each of TORCH_VERSIONS, one after the other, and runs the operators' tests there: one
# library has to serve them all. An environment is some 5 GB, and is removed again; KEEP=1 keeps them.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
TORCH_VERSIONS=${TORCH_VERSIONS:-2.10.0 2.11.0 2.13.0 2.14.1}
# The words, and what PyTorch expects of an operator.
TESTS=${TESTS:-test_operators test_depthwise test_pointwise test_squeeze_excite test_mbconv test_packed}

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
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
        "torch==$version" "${wheels[0]}" numpy pytest hypothesis
    "$environment/bin/python" -m pip check
    (
        cd "$folder/checkout"
        "$environment/bin/python" -c "import effnet_ops, torch; print(torch.__version__, effnet_ops.available_backends())"
        # shellcheck disable=SC2046,SC2086
        OMP_WAIT_POLICY=passive "$environment/bin/pytest" -q -m "not slow" $(printf 'tests/%s.py ' $TESTS)
    ) || failed+=("$version")
    [ "${KEEP:-0}" = 1 ] || rm -rf "$environment"
done
[ ${#failed[@]} = 0 ] || { echo "the tests failed with torch ${failed[*]}" >&2; exit 1; }
