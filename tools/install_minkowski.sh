#!/usr/bin/env bash
# Build MinkowskiEngine 0.5.4 for the CPU, in the environment that has torch: about ten
# CPU-minutes. Only sparse='minkowski' needs it. OpenBLAS comes from Debian's packages,
# elsewhere install it first.
set -euo pipefail

if command -v dpkg > /dev/null && ! dpkg -s libopenblas-dev &> /dev/null; then
    as_root=()
    [ "$(id -u)" -eq 0 ] || as_root=(sudo)
    "${as_root[@]}" apt-get update
    "${as_root[@]}" apt-get install -y libopenblas-dev
fi

pip install --no-build-isolation \
    --config-settings="--global-option=--cpu_only" \
    --config-settings="--global-option=--blas=openblas" \
    MinkowskiEngine==0.5.4
