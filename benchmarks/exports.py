"""One random model in each runtime's own format. In: a folder, a shape and formats; out: the files.

All have the same weights, so that the results of runtimes can be compared, not only their times.

    python benchmarks/exports.py FOLDER '{"model": {...}, "formats": ["native", "huggingface"]}'
"""

import json
import sys
from pathlib import Path

from regpt2.base import shelves
from regpt2.data.tokenizer import find_vocab, load_tokenizer
from regpt2.model.files.contract import SHELF, Vocabulary
from regpt2.model.gpt import GPT, GPTConfig
from works import PLACES, Shape


def vocabulary() -> Vocabulary | None:
    """GPT-2's tokenizer, if its file is on this machine."""
    try:
        tokenizer, merges = load_tokenizer("gpt2"), find_vocab().read_bytes()
    except Exception as error:  # no copy here; formats that need it report that
        print(f"without GPT-2's vocabulary: {error}", file=sys.stderr)
        return None
    return Vocabulary("gpt2", tokenizer.fingerprint, tokenizer.eot, merges)


def export(model: GPT, folder: Path, name: str, words: Vocabulary | None) -> None:
    """Write one format."""
    place = folder / PLACES[name]
    if name == "ctranslate2":
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(folder / PLACES["huggingface"])).convert(str(place))
        return
    kind, _, dtype = name.partition("-")
    if kind != "gguf":
        place.mkdir()
    shelves.load(SHELF, kind).write(model, place, words, dtype or "fp32")


def main() -> None:
    folder, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    model, words = GPT(GPTConfig(**Shape(**job["model"]).sizes())), vocabulary()
    for name in job["formats"]:
        export(model, folder, name, words)


if __name__ == "__main__":
    main()
