#!/usr/bin/env bash
# All that the first Hopper GPU is asked, in under ten minutes:  tests/bench/hopper.sh [folder for the logs]
#
# A model of three blocks comes first: a fault of the late passes shows in a minute. The compiler takes minutes for the
# whole model. So the next parts run at the same time, untimed, and fill its cache; the others are timed, one at a time, and
# find their code there. Every part runs in a process group of its own, which is killed as a whole when its time is over, and
# prints as it goes. Its output and the logs of its runs stay in the folder, and a summary ends the script whatever happened.
# The limits of all parts add up to more than LIMIT, because nobody knows how long compiling takes there; a second call with
# the same folder does what is missing. Without a GPU the same parts run small. PYTHON is the interpreter, LIMIT the seconds
# in all.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=$(realpath -m "${1:-hopper_logs}") PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-580}
# What the parts depend on: a part that was done with the same is not done again.
CODE=$( (sha256sum train_gpt.py tests/bench/{hopper.sh,step.py,kernels.py}; nvidia-smi -L 2>/dev/null
    "$PYTHON" -c 'import torch; print(torch.__version__)') | sha256sum | cut -c1-16)
mkdir -p "$OUT"
rm -f "$OUT"/*.pid "$OUT"/*.status
: > "$OUT/summary.txt"
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$OUT/compiled
export TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD=1  # as the script has it; step.py imports torch before it
SECONDS=0

is_done() { [ "$(cat "$OUT/$1.done" 2>/dev/null)" = "$CODE" ]; }
told() { echo "$*" >> "$OUT/summary.txt"; }

part() {  # part <most seconds> <name> NAME=value... <command...>; needs="<names>": left out unless these are done
    local most=$1 name=$2 left=$((LIMIT - SECONDS)) status before
    shift 2
    if is_done "$name"; then told "$name: done before"; return; fi
    for before in ${needs:-}; do is_done "$before" || { told "$name: left out, since $before is not done"; return; }; done
    if ((left < 10)); then told "$name: left out, no time"; return; fi
    echo "== $name, at $SECONDS s"
    {  # what a killed part leaves behind is killed too: it would hold the pipe, and the script would wait for it
        timeout --signal=KILL $((most < left ? most : left)) env "$@" &
        echo $! > "$OUT/$name.pid"
        wait $!
        echo $? > "$OUT/$name.status"
        kill -KILL -- -$! 2>/dev/null
        rm -f "$OUT/$name.pid"
    } 2>&1 | tee "$OUT/$name.txt" | sed -u "s/^/$name| /" &
    wait $!  # not in the foreground: bash would answer a signal only after the part
    status=$(cat "$OUT/$name.status")
    [ "$status" != 0 ] || echo "$CODE" > "$OUT/$name.done"
    told "$name: $([ "$status" = 0 ] && echo done || echo "ended with status $status") at $SECONDS s"
}

finish() {
    local started
    kill -KILL $(jobs -p) 2>/dev/null  # what would start the next part
    for started in "$OUT"/*.pid; do
        [ -e "$started" ] || continue
        kill -KILL -- "-$(cat "$started")" 2>/dev/null
        told "$(basename "$started" .pid): interrupted at $SECONDS s"
    done
    printf '== summary\n'; cat "$OUT/summary.txt"; echo "logs: $OUT"
}
trap finish EXIT
trap 'exit 130' INT TERM HUP

if command -v nvidia-smi >/dev/null && nvidia-smi -L; then PIECES=8192; else PIECES=1024; fi
NAME=demo_$PIECES  # a corpus with as many pieces as the model that is timed
[ -d data/datasets/$NAME ] || "$PYTHON" data/build_dataset.py --demo --name $NAME --vocab-size $PIECES | tail -1
DATA=(DATA_PATH=./data/datasets/$NAME TOKENIZER_PATH=./data/tokenizers/${NAME}_${PIECES}_bpe.model MAX_WALLCLOCK_SECONDS=0 VAL_LOSS_EVERY=0)
if [ $PIECES = 8192 ]; then  # 1.1 M targets are 33 streams of adapters, as many as a rank of eight has
    SMALL=(NUM_LAYERS=2 LATE_PASSES= TRAIN_BATCH_TOKENS=98304) SHAPE=(COMPILE=1)
    FULL=(LATE_PASSES_FROM=0 TRAIN_BATCH_TOKENS=98304)  # one graph for training, not two
    FIRST=("${FULL[@]}" NUM_LAYERS=3)
    STEPS=200 TARGETS=1100000
else
    SMALL=(PRESET=demo) FULL=(PRESET=demo) SHAPE=(PRESET=demo) STEPS=6 TARGETS=16384
    FIRST=(PRESET=demo LATE_PASSES=auto LATE_PASSES_FROM=0)
fi
PLAIN=(GPTQ=0 TTT_ENABLED=0 EVAL_STRIDE=0 VAL_LIMIT_TOKENS=16384)
mkdir -p "$OUT/targets"  # training text, twice: validation has too little of it to time an evaluation
for n in 0 1; do ln -sf "$PWD/data/datasets/$NAME/fineweb_train_000000.bin" "$OUT/targets/fineweb_val_00000$n.bin"; done
run() {  # run <most seconds> <name> NAME=value...: train_gpt.py with its files in the folder
    local most=$1 name=$2
    shift 2
    part "$most" "$name" "${DATA[@]}" RUN_ID="$name" OUT_DIR="$OUT/$name" "$@" "$PYTHON" train_gpt.py
}
evaluation() {  # evaluation <most seconds> <name> <run whose artifact it scores> NAME=value...
    run "$1" "$2" DATA_PATH="$OUT/targets" EVAL_ONLY="$OUT/$3/final_model.ptz" VAL_LIMIT_TOKENS=$TARGETS TTT_ENABLED=1 \
        EVAL_STRIDE=32 "${@:4}"  # the runs had neither
}

run 120 first "${FIRST[@]}" ITERATIONS=2 "${PLAIN[@]}" QUANT_FIT=level
run 360 small "${SMALL[@]}" ITERATIONS=6 WARMUP_STEPS=2 GPTQ_BATCHES=1 VAL_LIMIT_TOKENS=$((TARGETS < 65536 ? TARGETS : 65536)) &
run 360 cold_steps "${FULL[@]}" ITERATIONS=2 "${PLAIN[@]}" &
{   # an artifact of one small step on the CPU; 1 s for the adapters: they are compiled, and then left out
    run 200 file "${FULL[@]}" "${PLAIN[@]}" DEVICE=cpu ITERATIONS=1 WARMUP_STEPS=0 TRAIN_BATCH_TOKENS=2048 QUANT_FIT=level VAL_LIMIT_TOKENS=4097
    evaluation 360 cold_evaluation file EVAL_WALLCLOCK_SECONDS=1
} &
wait
kernels() { part 40 "$1" "${SHAPE[@]}" "$PYTHON" tests/bench/kernels.py "${@:2}"; }
kernels attention --document 800  # as in training
kernels attention_banded --rows 10 --tokens 6144 --window 2048
needs=cold_steps run 150 steps "${FULL[@]}" ITERATIONS=$STEPS TRAIN_LOG_EVERY=10 "${PLAIN[@]}"
needs=cold_steps part 120 step "${SHAPE[@]}" "$PYTHON" tests/bench/step.py
needs="steps cold_evaluation" evaluation 200 evaluation steps
kernels mlp --mlp
kernels attention_rows
