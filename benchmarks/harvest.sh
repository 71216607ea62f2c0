#!/usr/bin/env bash
# benchmarks/harvest.sh SECONDS: every figure of a GPU in one call, most worthwhile first, into eight files under $OUT.
#
# OUT              where the files go; a fresh folder under build/harvest by default
# PYTHON           the Python that has torch; python3 by default
# HARVEST_WHEELS   a folder of wheels of rivals (inf-cl, memeff, flash-kmeans); without it they are left out
# HARVEST_DRY_RUN  every stage without a GPU: interpreted and emulated kernels, tiny sizes; its lines are marked
# HARVEST_BOX_X    the seconds of stage X, such as HARVEST_BOX_SMOKE=60
#
# Needs no network, and git only if there is no file COMMIT with the commit's name.
source "$(dirname "$0")/harvest/stages.sh"
begin "${1:-580}"

python_stage environment 25
python_stage wheels 15
export PYTHONPATH=$PYTHONPATH:$PWD/build/harvest/wheels
# The CUDA extension for this GPU alone, and beside it the Triton kernels of all that follows.
python_stage build 45 &
python_stage warm 45 &
wait
python_stage smoke 30
python_stage losses 100
python_stage launches 70
python_stage kmeans 45
python_stage profile 40
python_stage sanitize 35
python_stage tests "$TOTAL"

mkdir -p "$FIRST" && cp "$OUT/junit.xml" "$OUT/results.jsonl" "$FIRST"
end environment wheels build warm smoke losses launches kmeans profile sanitize tests
