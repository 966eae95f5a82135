#!/usr/bin/env bash
# On a machine with a GPU, its packages and no network: installs, tests, tunes and times the kernels, in stages.
#
#   bench/gpu_check.sh PYTHON FOLDER [STAGE ...]
#
# Every stage has a time limit and leaves FOLDER/STAGE.log; a benchmark also leaves FOLDER/rows/STAGE.json, with the rows
# it got through, and renews the tables and figures in FOLDER. A stage that fails or runs out of time does not keep the
# next ones from running; only `install`, which always comes first, does. Ends with a line per stage, and fails if one
# did. Later runs into the same FOLDER add their stages to the tables and find what was tuned.
# shellcheck disable=SC2329 # the stages are called by name
set -uo pipefail

declare -A LIMITS=(  # seconds
    [install]=180 [tests]=420 [tune]=240 [block]=240 [norm_linear]=120 [residual_linear]=150 [covariance]=60
    [sanitize]=120 [decode]=420 [eager]=240 [slicing]=300
)
STAGES=(tests tune block norm_linear residual_linear covariance sanitize decode eager slicing)

export PYTHON=$1 OUT=$2
shift 2
[ $# -gt 0 ] && STAGES=("$@")
for stage in "${STAGES[@]}"; do
    [ -n "${LIMITS[$stage]:-}" ] || { echo "error: no stage is called $stage; there are ${!LIMITS[*]}." >&2; exit 2; }
done
mkdir -p "$OUT/rows"
OUT=$(cd "$OUT" && pwd)
export XDG_CACHE_HOME=$OUT  # the tuning table of these runs decides what `auto` gives to torch; it stays with the results

install() {
    "$PYTHON" -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else "error: no CUDA device.")' &&
        SLICEGPT_FAST_CUDA=1 "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --editable .
}

tests() { # without those that need no GPU and take their time; most of it Triton compiles, which several can do
    local parallel=()
    "$PYTHON" -c 'import xdist' 2> /dev/null && parallel=(-n 6)
    "$PYTHON" -m pytest tests/ops tests/native tests/test_build.py tests/patching/test_on_gpu.py -m "not slow" -q \
        --ignore tests/ops/test_compile_ahead.py --ignore tests/ops/test_cpu_isa.py \
        --junitxml "$OUT/tests.xml" "${parallel[@]}"
}

tune() { "$PYTHON" bench/tune.py; }

sanitize() {
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" bench/sanitize.py || return
    done
}

rows() { # FILE STAGE [ARGUMENT ...]
    "$PYTHON" -m pytest "bench/bench_$1.py" -q --benchmark-quiet --benchmark-json "$OUT/rows/$2.json" "${@:3}"
}
block() { rows block block; }
norm_linear() { rows norm_linear norm_linear; }
residual_linear() { rows residual_linear residual_linear; }
covariance() { rows covariance covariance; }
decode() { rows end_to_end decode -k "end_to_end and static" --timeout 0; }
eager() { rows end_to_end eager -k "end_to_end and eager"; }
slicing() { rows end_to_end slicing -k slicing; }

export -f rows "${!LIMITS[@]}"

summary=()
failed=0
stage() { # NAME: runs it within its limit
    local status begin=$SECONDS
    echo "== $1"
    timeout --signal INT --kill-after 20 "${LIMITS[$1]}" bash -c "$1" 2>&1 | tee "$OUT/$1.log"
    status=${PIPESTATUS[0]}
    summary+=("$(printf '%-16s exit status %3d %6d s' "$1" "$status" $((SECONDS - begin)))")
    [ "$status" -eq 0 ] || failed=1
    if [ -s "$OUT/rows/$1.json" ]; then
        find "$OUT/rows" -name '*.json' -size +0 -exec "$PYTHON" bench/report.py --out "$OUT" {} + > "$OUT/report.new" &&
            mv "$OUT/report.new" "$OUT/report.md"
    fi
    return "$status"
}

if stage install; then
    for name in "${STAGES[@]}"; do
        stage "$name"
    done
fi
[ -s "$OUT/report.md" ] && cat "$OUT/report.md"
printf '%s\n' "" "${summary[@]}"
exit "$failed"
