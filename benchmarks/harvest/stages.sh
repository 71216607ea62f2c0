# Sourced by harvest.sh and harvest2.sh: stages in time boxes. No `set -e`: a stage that fails or hangs costs its own box.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
PYTHON=${PYTHON:-python3}
FIRST=build/harvest/first # where the second call finds what the first one found
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ -n "${HARVEST_DRY_RUN:-}" ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
fi

# begin SECONDS: the clock starts, and the eight files are there whatever follows.
begin() {
    SECONDS=0 TOTAL=$1
    OUT=${OUT:-build/harvest/$(date -u +%Y%m%d-%H%M%S)}
    mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit
    export OUT
    if [ -s "$OUT/results.jsonl" ]; then
        echo "$OUT has the results of another run, which are kept: name another folder" >&2
        exit 1
    fi
    touch "$OUT"/{env.txt,stages.txt,smoke.jsonl,results.jsonl,pytest.log,junit.xml,ncu.txt,sanitizer.txt}
    RUNNING=$(mktemp -d)
    trap finish EXIT
    trap 'exit 130' INT TERM
    if [ -z "${HARVEST_DRY_RUN:-}" ] && ! nvidia-smi -L >/dev/null 2>&1; then
        say "no GPU here: nothing was measured (HARVEST_DRY_RUN=1 walks through the stages without one)"
        exit 1
    fi
    say "at most $TOTAL s, into $OUT"
}

# What still runs of the stages is ended with the script.
finish() {
    for group in "$RUNNING"/*.pid; do
        [ -e "$group" ] && kill -KILL -- "-$(cat "$group")" 2>/dev/null
    done
    rm -rf "$RUNNING"
}

say() { echo "$*" | tee -a "$OUT/stages.txt"; }

# stage NAME BOX COMMAND...: one line with its status, below it what it printed. HARVEST_BOX_NAME overrides the box.
stage() {
    local name=$1 box="HARVEST_BOX_${1^^}" left=$((TOTAL - SECONDS)) log="$RUNNING/$1.log" status
    box=${!box:-${HARVEST_DRY_RUN:+$left}} # the boxes are for a GPU
    box=${box:-$2}
    shift 2
    ((box <= left)) || box=$left
    if ((box < 1)); then
        say "stage $name: skipped, no time is left"
        return
    fi
    local start=$SECONDS
    HARVEST_BOX=$box timeout -k 5 "$box" "$@" >"$log" 2>&1 &
    local group=$! # timeout makes a process group of its own
    echo $group >"$RUNNING/$name.pid"
    wait $group
    case $? in
    0) status=ok ;;
    77) status=skipped ;; # the stage says why it does not run here
    124 | 137) status="timed out" ;;
    *) status=failed ;;
    esac
    kill -KILL -- -$group 2>/dev/null # what it may have left behind
    rm "$RUNNING/$name.pid"
    {
        echo "stage $name: $status after $((SECONDS - start)) s of $box s"
        { head -c 30000 "$log" && tail -c +30001 "$log" | tail -c 30000; } | sed 's/^/    | /'
    } >"$log.said"
    cat "$log.said" >>"$OUT/stages.txt" # at once: two stages may run beside each other
    head -n 1 "$log.said"
}

python_stage() { stage "$1" "$2" "$PYTHON" -m benchmarks.harvest "${3:-$1}"; }

# end STAGE...: what came of them, last on the screen; 0 if each did all its work.
end() { "$PYTHON" -m benchmarks.harvest report "$OUT" "$@"; }
