#!/usr/bin/env bash
# All that the first Hopper GPU is asked, in under eight minutes:  tests/bench/hopper.sh [folder for the logs]
#
# Every part runs in a process group of its own, which is killed as a whole when its time is over, and prints as it goes; its
# output and the logs of its runs stay in the folder, and a summary ends the script whatever happened. Without a GPU the same
# parts run small. PYTHON is the interpreter.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=$(realpath -m "${1:-hopper_logs}") PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-470}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$OUT/compiled
SUMMARY=()
SECONDS=0

part() {  # part <most seconds> <name> NAME=value... <command...>
    local most=$1 name=$2 left=$((LIMIT - SECONDS)) status
    shift 2
    if ((left < 10)); then SUMMARY+=("$name: left out, no time"); return; fi
    echo "== $name, at $SECONDS s"
    {  # what a killed part leaves behind is killed too: it would hold the pipe, and the script would wait for it
        timeout --signal=KILL $((most < left ? most : left)) env "$@" &
        wait $!
        status=$?
        kill -KILL -- -$! 2>/dev/null
        exit $status
    } 2>&1 | tee "$OUT/$name.txt"
    status=${PIPESTATUS[0]}
    SUMMARY+=("$name: $([ "$status" = 0 ] && echo done || echo "ended with status $status") at $SECONDS s")
}

summary() { printf '== summary\n'; printf '%s\n' "${SUMMARY[@]}"; echo "logs: $OUT"; }
trap summary EXIT

if command -v nvidia-smi >/dev/null && nvidia-smi -L; then PIECES=8192; else PIECES=1024; fi
NAME=demo_$PIECES  # a corpus with as many pieces as the model that is timed
[ -d data/datasets/$NAME ] || $PYTHON data/build_dataset.py --demo --name $NAME --vocab-size $PIECES | tail -1
DATA=(DATA_PATH=./data/datasets/$NAME TOKENIZER_PATH=./data/tokenizers/${NAME}_${PIECES}_bpe.model MAX_WALLCLOCK_SECONDS=0 VAL_LOSS_EVERY=0)
if [ $PIECES = 8192 ]; then
    SMALL=(NUM_LAYERS=3 TRAIN_BATCH_TOKENS=98304) FULL=(TRAIN_BATCH_TOKENS=98304) SHAPE=(COMPILE=1)
    STEPS=200 TARGETS=500000
else
    SMALL=(PRESET=demo) FULL=(PRESET=demo) SHAPE=(PRESET=demo) STEPS=6 TARGETS=16384
fi
run() {  # run <most seconds> <name> NAME=value...: train_gpt.py with its files in the folder
    local most=$1 name=$2
    shift 2
    part "$most" "$name" "${DATA[@]}" RUN_ID="$name" OUT_DIR="$OUT/$name" "$@" "$PYTHON" train_gpt.py
}

run 90 everything_small "${SMALL[@]}" ITERATIONS=6 WARMUP_STEPS=2 GPTQ_BATCHES=1 VAL_LIMIT_TOKENS=$((TARGETS < 65536 ? TARGETS : 65536))
part 40 attention "${SHAPE[@]}" "$PYTHON" tests/bench/attention.py
part 40 attention_banded "${SHAPE[@]}" "$PYTHON" tests/bench/attention.py --rows 10 --tokens 6144 --window 2048
part 110 step "${SHAPE[@]}" "$PYTHON" tests/bench/step.py
run 110 steps "${FULL[@]}" ITERATIONS=$STEPS TRAIN_LOG_EVERY=10 GPTQ=0 TTT_ENABLED=0 EVAL_STRIDE=0 VAL_LIMIT_TOKENS=16384
mkdir -p "$OUT/targets"  # training text: validation has too little of it to time an evaluation
ln -sf "$PWD/data/datasets/$NAME/fineweb_train_000000.bin" "$OUT/targets/fineweb_val_000000.bin"
part 90 evaluation "${DATA[@]}" DATA_PATH="$OUT/targets" RUN_ID=evaluation OUT_DIR="$OUT/evaluation" EVAL_ONLY="$OUT/steps/final_model.ptz" \
    VAL_LIMIT_TOKENS=$TARGETS TTT_ENABLED=1 EVAL_STRIDE=32 "$PYTHON" train_gpt.py  # `steps` had neither
run 60 warm_start "${FULL[@]}" ITERATIONS=2 GPTQ=0 TTT_ENABLED=0 EVAL_STRIDE=0 VAL_LIMIT_TOKENS=16384
