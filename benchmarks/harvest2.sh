#!/usr/bin/env bash
# benchmarks/harvest2.sh SECONDS: the second call, right after harvest.sh on the same machine; the same variables.
#
# The tests that failed, with long tracebacks; if none did, the largest sizes and the best launches once more.
source "$(dirname "$0")/harvest/stages.sh"
begin "${1:-150}"

python_stage build 45
python_stage failed_tests "$TOTAL"
if grep -q "^stage failed_tests: skipped" "$OUT/stages.txt"; then
    python_stage large 75
    python_stage best_launches 60
fi

end build failed_tests
