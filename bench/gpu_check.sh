#!/bin/sh
# Installs the package without network, runs the op tests on the GPU, under compute-sanitizer too where it is on the path,
# tunes, and runs the kernel benchmarks.
#   bench/gpu_check.sh [PYTHON] [FOLDER]     results: FOLDER/*.json and *.png, and the tables in FOLDER/report.md
set -eu
python=${1:-python3}
out=${2:-build/gpu-check}
mkdir -p "$out"
"$python" -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else "error: no CUDA device.")'
"$python" -m pip install --quiet --no-deps --no-build-isolation --editable .
"$python" -m pytest tests/ops tests/native -m "not slow" -q --junitxml "$out/tests.xml"
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" bench/sanitize.py
    done
fi
# The table of this run is the one that decides what `auto` gives to torch; it stays beside the results.
XDG_CACHE_HOME=$(cd "$out" && pwd)
export XDG_CACHE_HOME
"$python" - <<'PY'
import torch
from slicegpt_fast.ops.tuning import block_shapes, tune

for width in (2872, 3072, 3328):
    for measured in tune(block_shapes(width, 4096, 4096, 11008, (1, 4096)), torch.bfloat16):
        print(measured)
PY
"$python" -m pytest bench --quiet --benchmark-quiet --benchmark-json "$out/run.json"
"$python" bench/report.py "$out/run.json" --out "$out" > "$out/report.md"
cat "$out/report.md"
