#!/usr/bin/env bash
# Every GPU measurement in order of value within SECONDS: `hqq-oft check`, tests, suites, tables. `make gpu` calls it.
#
# Each part is a process with a share of the time left and writes as it goes, so that nothing is lost if this script is
# killed; the same command resumes. Results are in bench/results/<device>, and with OUT in an archive there.
# usage: PYTHON=python3 SECONDS_LEFT=520 OUT=folder bench/gpu.sh [options of bench.run]
set -muo pipefail # jobs have process groups of their own
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 TRITON_INTERPRET=0
read -ra python <<< "${PYTHON:-python3}"
end=$((SECONDS + ${SECONDS_LEFT:-520} - 20)) # the rest is for the tables
logs=build/gpu results=${RESULTS:-} junit=build/gpu-operations.xml failed=0
mkdir -p "$logs"
[ -n "$results" ] || results=bench/results/$("${python[@]}" -c 'from bench.environment import folder_name as f; print(f("cuda"))')

part() { # name, seconds, command: interrupted at the limit so that it writes what it has, and soon after killed
    local name=$1 seconds=$2 status=0
    shift 2
    echo "\$ $* (at most $seconds s)"
    timeout --signal=INT --kill-after=10 "$seconds" env --default-signal=INT "$@" > "$logs/$name.log" 2>&1 &
    wait $! || status=$?
    kill -KILL -- -$! 2> /dev/null # a worker left behind would disturb what is timed next
    tail -n 40 "$logs/$name.log"
    echo "$name: $([ $status = 0 ] && echo ok || echo "failed with $status")"
    [ $status = 0 ] || failed=1
    if [ -n "${OUT:-}" ]; then # one file, as a machine that returns results may return only a few
        mkdir -p "$OUT"
        tar -czf "$OUT/gpu.tar.gz.part" "$logs"/*.log $(ls -d "$results" 2> /dev/null)
        mv "$OUT/gpu.tar.gz.part" "$OUT/gpu.tar.gz"
    fi
}

if [ -z "${SKIP_TESTS:-}" ]; then
    part check 120 "${python[@]}" -m hqq_oft.cli check --device cuda
    rm -f "$junit"
    part tests 150 "${python[@]}" -m pytest -q -n 8 -p no:cacheprovider --junitxml=$junit tests/gpu/test_operations.py
fi
for suite in layer:50 ops:45 model:70 merge:90; do # and the share of the time left that it may take
    seconds=$(((end - SECONDS) * ${suite#*:} / 100))
    part "${suite%:*}" "$seconds" "${python[@]}" -m bench.run --suite "${suite%:*}" --device cuda --junit $junit \
        --out "$results" --seconds $((seconds - 15)) "$@"
done
part report 20 "${python[@]}" -m bench.report "$results"
exit $failed
