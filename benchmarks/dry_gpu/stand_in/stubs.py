"""The rest of CUDA, cuBLAS, cuDNN. In: torch's libraries, our compiled files; out: C code, a stub for each symbol.

    python stubs.py SITE_PACKAGES OBJECT.o ... > stubs.c

torch calls some 270 functions of which it only wants to hear "success" (0). Those with `gemm` in their name count as a
matrix product. Symbols that our C files define are left out, and those that the real libraries answer without a GPU.
"""

import argparse
import re
import subprocess
from pathlib import Path

LIBRARIES = ["c10_cuda", "torch_cuda", "torch_cuda_linalg", "torch_nvshmem", "torch_python"]
OF_CUDA = re.compile(r"(__cuda|cuda|cublas|cudnn)[A-Z]")
ANSWERED_BY_THE_REAL_ONES = re.compile(
    r"cudnnGet(Version|CudartVersion|Property|ErrorString|LastErrorString)"  # text and numbers that need no device
    r"|__cuda(Unr|R)egister(FatBinary|FatBinaryEnd|Function|Var)"  # libcudart's list of kernels, made at the start
)


def symbols(path: Path, which: str) -> set[str]:
    """Names in a library's or object's table; which: --undefined-only or --defined-only."""
    dynamic = ["-D"] if path.suffix == ".so" else []
    done = subprocess.run(["nm", *dynamic, which, path], capture_output=True, text=True, check=True)
    return {line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()}


def stub(name: str) -> str:
    count = " dry_gemms++;" if "gemm" in name.lower() else ""
    return f"int {name}(void) {{{count} return 0; }}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site_packages", type=Path, help="of the Python with a CUDA build of torch")
    parser.add_argument("objects", type=Path, nargs="+", help="our compiled C files")
    options = parser.parse_args()
    libraries = [options.site_packages / "torch" / "lib" / f"lib{name}.so" for name in LIBRARIES]
    wanted = set().union(*(symbols(path, "--undefined-only") for path in libraries if path.exists()))
    ours = set().union(*(symbols(path, "--defined-only") for path in options.objects))
    names = sorted(
        name for name in wanted - ours if OF_CUDA.match(name) and not ANSWERED_BY_THE_REAL_ONES.fullmatch(name)
    )
    print('#include "counts.h"', *map(stub, names), sep="\n")


if __name__ == "__main__":
    main()
