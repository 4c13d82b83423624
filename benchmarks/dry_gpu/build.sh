#!/usr/bin/env bash
# Makes the dry GPU. In: a folder; out: in it a Python with torch for CUDA (5 GB), and the stand-in, libcuda.so.1.
# Usage: build.sh DIR      TORCH=2.11.0 chooses the version, PYTHON=python3 the interpreter, CC=gcc the compiler
# A DIR/venv that is already there is used as it is; what it lacks is installed.
set -euo pipefail
if [ $# != 1 ] || [ "${1#-}" != "$1" ]; then sed -n '2,4s/^# //p' "$0"; exit 2; fi
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/bin" "$1/build"; dir=$(cd "$1" && pwd)
torch=${TORCH:-2.11.0}; python="$dir/venv/bin/python"; cc=${CC:-gcc}

[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$dir/venv"
has() { "$python" -c "$1" >/dev/null 2>&1; }
if ! has 'import torch, sys; sys.exit(torch.version.cuda is None)'; then
  echo "Installing torch $torch with its CUDA libraries into $dir/venv: about 5 GB, some minutes."
  "$python" -m pip install --quiet --disable-pip-version-check "torch==$torch"
fi
has 'import numpy, tiktoken, safetensors, tyro, rich, matplotlib, pyarrow, huggingface_hub' &&
  has 'import pytest, pytest_timeout, xdist, hypothesis' ||
  "$python" -m pip install --quiet --disable-pip-version-check numpy tiktoken safetensors tyro rich matplotlib pyarrow \
    huggingface-hub pytest pytest-timeout pytest-xdist hypothesis

# cudaDeviceProp differs between versions of CUDA: the header has to be of the one that torch was built for.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
major=$("$python" -c 'import torch; print(torch.version.cuda.partition(".")[0])')
header=$(find "$site/nvidia" -path "*/cu$major/include/driver_types.h" -o -path '*/cuda_runtime/include/driver_types.h')
headers=$(dirname "$(head -1 <<<"$header")")
# That package lacks crt/host_defines.h, which only annotates declarations for nvcc; Triton brings it.
annotations="$site/triton/backends/nvidia/include"

cd "$dir/build"
flags="-std=c11 -O1 -fPIC -Wall -Wextra -Werror -Wno-unused-parameter -I$here/stand_in"
$cc $flags -c "$here/stand_in/driver.c" -o driver.o
$cc $flags -isystem "$headers" -isystem "$annotations" -c "$here/stand_in/runtime.c" -o runtime.o
"$python" "$here/stand_in/stubs.py" "$site" driver.o runtime.o > stubs.c
$cc $flags -c stubs.c -o stubs.o
# By this name whoever opens the driver finds what is already loaded.
$cc -shared -Wl,-soname,libcuda.so.1 -o "$dir/libcuda.so.1" driver.o runtime.o stubs.o -ldl
ln -sf libcuda.so.1 "$dir/libcuda.so"  # for the linker: Triton builds its launcher against it
cp "$here/stand_in/nvidia-smi" "$dir/bin/"
echo "Built. $here/run.sh $dir -m regpt2 doctor --quick"
