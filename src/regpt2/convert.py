"""Weights to another format. In: a model and an empty place; out: a folder in that format, proven to be the same model.

regpt2 convert runs/gpt2_124m export --to huggingface
regpt2 convert hf:gpt2 gpt2 --to native
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from regpt2.base import plugins
from regpt2.base.console import say, warn
from regpt2.base.errors import CheckpointError, Problem, UsageError
from regpt2.base.files import fsync_dir, require_free_space
from regpt2.data.tokenizer import find_vocab
from regpt2.model.gpt import GPT
from regpt2.model.load import SHELF, LoadedModel, Vocabulary, load_model, tensors_of
from regpt2.sample import tokenizer_of

# A conversion moves fp32 numbers and computes none: the logits come out bit for bit the same, and 0 is what is seen.
# The tolerance, relative to the largest logit, only allows for kernels that sum in another order by memory alignment;
# a wrong or transposed tensor is orders of magnitude above it. A single weight may not be: so all are compared as well.
TOLERANCE = 1e-6
CHECK_IDS = (2, 64)  # sequences x tokens


@dataclass(frozen=True)
class ConvertOptions:
    """Write a model in another format; it is read back and compared before it appears."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A run folder, a checkpoint, an exported or Hugging Face folder, or hf:gpt2."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to write."""
    to: str
    """The format: huggingface or native."""
    force: bool = False
    """Replace an earlier export at DST."""


def main(argv: list[str]) -> int:
    """The verb `regpt2 convert`."""
    convert(tyro.cli(ConvertOptions, args=argv, prog="regpt2 convert"))
    return 0


def convert(options: ConvertOptions) -> float:
    """Write the model to `dst` and return the largest difference of logits, relative to the largest logit.

    The folder is written and checked under a temporary name: it appears whole and proven, or not at all.

    Raises:
        UsageError: no such format, or `dst` holds something.
        CheckpointError: the source is no readable GPT-2, or what was written is not the same model.
    """
    entry = plugins.load(SHELF, options.to)
    dst = options.dst.absolute()
    _check_destination(options)
    loaded = load_model(options.src)
    n_params = loaded.model.n_params()
    require_free_space(dst, int(1.01 * 4 * n_params) + (1 << 22), f"the {options.to} folder")
    part = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    try:
        part.mkdir(parents=True)
        entry.write(loaded.model, part, _vocabulary(loaded))
        difference = _prove_same(loaded, load_model(part).model, options)
        _put_in_place(part, dst)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    say(
        f"{dst}: {n_params:,} parameters from {loaded.source} as {options.to}. Read back, every weight is the same; "
        f"the largest difference of logits is {difference:.1e} of the largest logit."
    )
    return difference


def _prove_same(source: LoadedModel, copy: GPT, options: ConvertOptions) -> float:
    """The largest difference of logits, or an error if it is too large or a weight has changed."""
    refused = f"the {options.to} folder, read back, is not the same model as {source.source}"
    nothing = f"nothing was written to {options.dst}."
    difference = largest_difference(source.model, copy)
    if not difference <= TOLERANCE:  # also true for NaN
        raise CheckpointError(
            f"{refused}: its logits differ by {difference:.1e} of the largest, "
            f"expected at most {TOLERANCE:.0e}; {nothing}"
        )
    copied = tensors_of(copy)
    for name, tensor in tensors_of(source.model).items():
        if not torch.equal(tensor, copied[name]):
            raise CheckpointError(f"{refused}: tensor {name} differs, expected the same bits; {nothing}")
    return difference


@torch.no_grad()
def largest_difference(a: GPT, b: GPT) -> float:
    """The largest difference of two models' logits on the same random ids, relative to the largest logit of `a`."""
    n, seq_len = CHECK_IDS
    shape = (n, min(seq_len, a.config.block_size))
    ids = torch.randint(a.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    expected, got = a(ids), b(ids)
    if not expected.isfinite().all():
        raise CheckpointError("the model's logits are not finite: its weights hold NaN or infinity.")
    return float((expected - got).abs().max() / expected.abs().max())


def _vocabulary(loaded: LoadedModel) -> Vocabulary | None:
    """What can be said of the model's tokenizer. A model whose tokenizer we have not is converted all the same."""
    try:
        tokenizer = tokenizer_of(loaded)
    except Problem as problem:
        warn(f"{problem} The tokenizer's own files are left out.")
        ref = loaded.tokenizer
        return None if ref is None else Vocabulary(ref.name, ref.fingerprint)
    merges = find_vocab().read_bytes() if tokenizer.name == "gpt2" else None
    return Vocabulary(tokenizer.name, tokenizer.fingerprint, tokenizer.eot, merges)


def _check_destination(options: ConvertOptions) -> None:
    dst = options.dst
    if not dst.exists():
        return
    if not dst.is_dir():
        raise UsageError(f"DST = {dst} is a file; name a folder.")
    if Path(options.src).exists() and Path(options.src).samefile(dst):
        raise UsageError(f"DST = {dst} is the source itself; name another folder.")
    there = {path.name for path in dst.iterdir()}
    if there and not options.force:
        raise UsageError(f"DST = {dst} is not empty; name another folder, or replace an earlier export with --force.")
    ours = {name for format_name in plugins.entries(SHELF) for name in plugins.load(SHELF, format_name).FILES}
    if foreign := sorted(there - ours):
        raise UsageError(
            f"DST = {dst} holds {foreign[0]!r}, which is not from an export, so --force does not replace it; "
            "name another folder."
        )


def _put_in_place(part: Path, dst: Path) -> None:
    """Rename into place. What was there goes only when the new folder stands, and comes back if it cannot."""
    old = part.with_suffix(".old")
    if dst.exists():
        dst.rename(old)
    try:
        part.rename(dst)
    except OSError:
        if old.exists():
            old.rename(dst)
        raise
    fsync_dir(dst.parent)
    shutil.rmtree(old, ignore_errors=True)
