#!/usr/bin/env bash
# Runs Python as on a machine with an H200. In: the folder that build.sh made, and what Python shall run.
# Usage: run.sh DIR SCRIPT.py [ARG ...]      or: run.sh DIR -m regpt2 doctor --quick
# PYTHONPATH chooses the code; by default this project's src/.
set -euo pipefail
if [ $# -lt 2 ] || [ "${1#-}" != "$1" ]; then sed -n '2,4s/^# //p' "$0"; exit 2; fi
here=$(cd "$(dirname "$0")" && pwd)
dir=$(cd "$1" && pwd); shift
mkdir -p "$dir/tmp"
export PYTHONPATH=${PYTHONPATH:-$here/../../src} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export LD_LIBRARY_PATH=$dir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} TRITON_LIBCUDA_PATH=$dir PATH=$dir/bin:$PATH
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1  # cuDNN builds its plans on the card itself; flash is taken instead
# What was compiled for this card stays apart from what a real one may have here.
export TMPDIR=$dir/tmp TORCHINDUCTOR_CACHE_DIR=$dir/tmp/inductor TRITON_CACHE_DIR=$dir/tmp/triton
LD_PRELOAD=$dir/libcuda.so.1 exec "$dir/venv/bin/python" "$@"
