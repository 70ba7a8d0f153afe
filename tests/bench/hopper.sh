#!/usr/bin/env bash
# All that needs one Hopper GPU, in under eight minutes, into one log:  tests/bench/hopper.sh [log]
#
# Attention back ends, with and without a window; the budget of a step, beside the version in OLD; which kernels won; 200 steps
# of training of both versions with one seed, and of the old one with another; start-up with an empty and a full compile cache;
# peak memory. Without a GPU it rehearses the same with a small model. PYTHON is the interpreter, OLD another train_gpt.py.
set -uo pipefail
cd "$(dirname "$0")/../.."
LOG=$(realpath -m "${1:-hopper.log}") PYTHON=${PYTHON:-python} WORK=$(mktemp -d)
OLD=${OLD:-$(ls -d records/track_*/*/train_gpt.py | head -1)}
trap 'rm -rf "$WORK"' EXIT
exec > >(tee "$LOG") 2>&1
export TORCHINDUCTOR_CACHE_DIR=$WORK/compiled PYTHONUNBUFFERED=1
SECONDS=0

part() {  # part <most seconds> <what> <command...>: a part that fails or takes too long does not stop the others
    local most=$1 what=$2
    shift 2
    local left=$((470 - SECONDS))
    if ((left < 15)); then echo "== $what: left out, no time"; return; fi
    echo "== $what (at $SECONDS s)"
    timeout $((most < left ? most : left)) "$@" || echo "== $what: FAILED with status $?"
}

SHAPE=() STEPS=200
if command -v nvidia-smi >/dev/null && nvidia-smi; then
    GPU=(TRAIN_BATCH_TOKENS=98304 TRAIN_LOG_EVERY=10)
else
    STEPS=20 GPU=(PRESET=demo TRAIN_LOG_EVERY=2 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}) SHAPE=(PRESET=demo)
fi
train() {  # train <script> <name> <seed>
    env "${GPU[@]}" DATA_PATH=./data/datasets/demo TOKENIZER_PATH=./data/tokenizers/demo_1024_bpe.model RUN_ID="$2" SEED="$3" \
        OUT_DIR="$WORK/$2" ITERATIONS=$STEPS MAX_WALLCLOCK_SECONDS=0 VAL_LOSS_EVERY=0 VAL_LIMIT_TOKENS=16384 EVAL_STRIDE=0 \
        TTT_ENABLED=0 GPTQ=0 WARMUP_STEPS=2 LATE_QAT_THRESHOLD=0 $PYTHON "$1" |
        grep -E "^(tried|left out|attention|compile|startup|peak|final)|step:$STEPS/"
}
export -f train
export PYTHON STEPS WORK

$PYTHON -c "import torch; print('torch', torch.__version__, 'cuda', torch.version.cuda, 'cudnn', torch.backends.cudnn.version())"
part 60 "attention" env "${SHAPE[@]}" $PYTHON tests/bench/attention.py
part 60 "attention, banded" env "${SHAPE[@]}" $PYTHON tests/bench/attention.py --rows 8 --window 256 --tokens 768
part 230 "budget of a step, beside $OLD" env "${SHAPE[@]}" $PYTHON tests/bench/step.py --against "$OLD"
[ -d data/datasets/demo ] || part 40 "demo corpus" $PYTHON data/build_dataset.py --demo
for run in "old $OLD 1337" "seed $OLD 42" "new train_gpt.py 1337"; do
    read -r name script seed <<<"$run"
    part 80 "$STEPS steps: $name, seed $seed" bash -c "$(declare -p GPU); train $script $name $seed"
done
part 20 "losses" $PYTHON tests/bench/losses.py "$WORK"/{old,seed,new}/logs/*.txt
part 60 "start with a full compile cache" bash -c "$(declare -p GPU); STEPS=2 train train_gpt.py warm 1337"
echo "== done in $SECONDS s: $LOG"
