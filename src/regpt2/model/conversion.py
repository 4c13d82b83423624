"""Weights to another format. In: a loaded model and a place; out: a file or folder, proven to be the same model."""

import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regpt2.base import shelves
from regpt2.base.console import warn
from regpt2.base.errors import CheckpointError, UsageError
from regpt2.base.files import fsync_dir, require_free_space
from regpt2.model.architecture import model_class, switches_on
from regpt2.model.files.contract import SHELF, TORCH_DTYPES, Vocabulary
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.load import LoadedModel, load_model
from regpt2.model.gpt import GPT, is_plain
from regpt2.model.kernels.activation import split_activation
from regpt2.model.language_model import GPTConfig, LanguageModel

# A conversion to fp32 moves numbers and computes none, so the logits are the same to the bit. The tolerance, relative
# to the largest logit, allows for kernels whose order of sums depends on memory alignment. A wrong or transposed tensor
# is orders of magnitude above it. A wrong weight may not be, so every weight is compared too.
TOLERANCE = 1e-6
CHECK_IDS = (2, 64)  # sequences x tokens
# For log probabilities that another program computes from the written file, relative to our largest. In fp32 only the
# order of sums differs, and llama.cpp reads GELU from a table in fp16. With F16, BF16 and Q8_0 weights it rounds the
# inputs of a product in the same way.
CLIENT_TOLERANCES = {"fp32": 1e-3, "fp16": 2e-3, "bf16": 1e-2, "q8_0": 3e-2}


@dataclass(frozen=True)
class Export:
    """A format, and the place to write to: checked by `plan_export` before a model is loaded."""

    to: str
    entry: Any
    dtype: str
    src: str
    """MODEL as it was typed, for messages."""
    dst: Path


def plan_export(src: str, dst: Path, to: str, dtype: str | None = None, *, replace: bool = False) -> Export:
    """What to write where; a UsageError for an unknown format or type, or if `dst` may not be replaced."""
    entry = shelves.load(SHELF, to)
    if not hasattr(entry, "write"):
        raise UsageError(f"--to {to}: regpt2 can only read that format; choose another.")
    if dtype not in (None, *entry.DTYPES):
        raise UsageError(f"--dtype {dtype}: {to} can be written as {', '.join(entry.DTYPES)}.")
    _check_destination(dst, src, bool(entry.FILES), replace)
    return Export(to, entry, dtype or entry.DTYPES[0], src, dst.absolute())


def check_expressible(export: Export, loaded: LoadedModel) -> None:
    """Raise a UsageError if the format would describe another model: most hold GPT-2 alone, some one form of GELU."""
    model, config, entry = loaded.model, loaded.model.config, export.entry
    writers = {name: shelves.load(SHELF, name) for name in shelves.entries(SHELF)}
    writers = {name: one for name, one in writers.items() if hasattr(one, "write")}
    described = model_class(config.architecture)
    if type(model) is not described or (described is GPT and not is_plain(model)):
        raise UsageError(
            f"--to {export.to}: {loaded.source} is not the {config.architecture} model that its configuration "
            f"describes: its {type(model).__name__} is a subclass, or a part of it was replaced, patched or hooked. "
            "A file of its weights would be another model; register an architecture for it, or undo the change."
        )
    if not (getattr(entry, "ANY_ARCHITECTURE", False) or type(model) is GPT):
        switches = [name for name in switches_on(config) if name != "zero_init"]  # no format records the first weights
        has = ", ".join([*([] if isinstance(model, GPT) else ["no biases"]), *switches]) or "parts of its own"
        able = ", ".join(name for name, one in writers.items() if getattr(one, "ANY_ARCHITECTURE", False))
        raise UsageError(
            f"--to {export.to} holds GPT-2 alone, {loaded.source} has the architecture {config.architecture!r} with "
            f"{has}; formats that hold it: {able}."
        )
    theirs, ours = getattr(entry, "ACTIVATION", config.activation), config.activation
    if theirs != ours:
        able = ", ".join(name for name, one in writers.items() if not hasattr(one, "ACTIVATION"))
        raise UsageError(
            f"--to {export.to}: programs that read this format compute GELU as {theirs!r}, and {loaded.source} has "
            f"{ours!r}, so it would give other logits. Formats that record the form: {able}. To write the weights "
            f"anyway, give {split_activation(export.src)[0]}:{theirs} as SOURCE."
        )


def write_export(export: Export, loaded: LoadedModel, vocabulary: Vocabulary | None) -> tuple[float, str]:
    """Write the model; return the largest difference of logits, relative to the largest logit, and a report.

    It is written and checked under a temporary name, so that it appears whole and proven, or not at all.

    Raises:
        CheckpointError: what was written is not the same model.
    """
    dst = export.dst
    require_free_space(dst, int(1.01 * 4 * loaded.model.n_params()) + (4 << 20), f"a model as {export.to}")
    part = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        if export.entry.FILES:
            part.mkdir()
        export.entry.write(loaded.model, part, vocabulary, export.dtype)
        proof = _prove(export, part, loaded)
        _put_in_place(part, dst)
    finally:
        _remove(part)
    return proof


def _prove(export: Export, part: Path, source: LoadedModel) -> tuple[float, str]:
    entry, dtype = export.entry, export.dtype
    model, difference, report = source.model, 0.0, []
    try:
        if hasattr(entry, "read"):
            model = load_model(part).model
            difference = _same_weights(source.model, model, dtype)
            same = "the same" if dtype == "fp32" else f"the nearest in {dtype}"
            report.append(f"Read back, every weight is {same}; the largest difference of logits is {difference:.1e}")
        if hasattr(entry, "client_logits"):
            by_client = _same_for_client(export, part, model)
            if by_client is None:
                warn(
                    f"{entry.CLIENT} is not installed, or cannot read a model without a tokenizer: "
                    "its logits were not compared."
                )
            else:
                report.append(f"{entry.CLIENT} computes the same log probabilities within {by_client:.1e}")
                difference = max(difference, by_client)
    except CheckpointError as error:
        raise CheckpointError(
            f"what was written as {export.to} is not the same model as {source.source}: {error}; "
            f"nothing was written to {export.dst}."
        ) from None
    return difference, "; ".join(report) + " of the largest."


def _same_weights(source: LanguageModel, copy: LanguageModel, dtype: str) -> float:
    """The largest difference of logits, or an error if a weight is not the source's own, rounded to `dtype`."""
    if (rows := copy.config.vocab_size) != source.config.vocab_size:
        raise CheckpointError(f"it is read back with {rows:,} tokens, expected {source.config.vocab_size:,}")
    difference, most = largest_difference(source, copy), TOLERANCE if dtype == "fp32" else 1.0
    if not difference <= most:  # also true for NaN, as of weights that fp16 cannot hold
        raise CheckpointError(f"its logits differ by {difference:.1e} of the largest, expected at most {most:.0e}")
    copied = tensors_of(copy)
    for name, tensor in tensors_of(source).items():
        if not torch.equal(tensor, copied[name]) and not _is_rounded(copied[name], tensor, dtype):
            expected = "the same bits" if dtype == "fp32" else f"the nearest values of {dtype}"
            raise CheckpointError(f"tensor {name} differs, expected {expected}")
    return difference


def _is_rounded(copy: Tensor, source: Tensor, dtype: str) -> bool:
    """Is every weight the nearest one of the type?"""
    if dtype in TORCH_DTYPES:
        return torch.equal(copy, source.to(TORCH_DTYPES[dtype]).to(torch.float32))
    # q8_0: of 32 weights the largest is 127 steps, so a weight is off by half a step at most. The step is stored in
    # fp16: it is off by 2^-11 of itself, below the normal numbers of fp16 by 2^-25, and up to 127 steps with it.
    largest = source.reshape(-1, 32).abs().amax(dim=1, keepdim=True)
    off = (copy - source).reshape(-1, 32).abs()
    return bool((off <= largest / 127 / 2 + torch.clamp(largest * 2**-11, min=127 * 2**-25) + largest * 1e-6).all())


def _same_for_client(export: Export, part: Path, model: LanguageModel) -> float | None:
    """The largest difference from another program's log probabilities; None where it cannot answer.

    The program runs in a process of its own, because it may exit at a file that it rejects.
    """
    client, tolerance = export.entry.CLIENT, CLIENT_TOLERANCES[export.dtype]
    ids = _check_ids(model.config)[:, : max(1, model.config.block_size - 1)]  # llama.cpp needs room for one more
    try:
        begin = partial(_begin, shelves.plugin_files())
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=begin) as pool:
            rows = pool.submit(client_rows, export.to, part, ids.tolist()).result()
    except Exception as error:  # another program's errors may be of any kind
        raise CheckpointError(f"{client} does not read it ({str(error).strip() or type(error).__name__})") from None
    if rows is None:
        return None
    with torch.no_grad():
        expected = model(ids)[:, -1].log_softmax(-1)
    difference = float((torch.tensor(rows).log_softmax(-1) - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise CheckpointError(
            f"{client} computes log probabilities that differ by {difference:.1e} of the largest, "
            f"expected at most {tolerance:.0e}"
        )
    return difference


def client_rows(format_name: str, path: Path, ids: list[list[int]]) -> list[list[float]] | None:
    """The logits of the format's client, as plain numbers; None where it is not installed."""
    logits: Tensor | None = shelves.load(SHELF, format_name).client_logits(path, torch.tensor(ids))
    return None if logits is None else logits.tolist()


def _begin(plugins: list[str]) -> None:
    """In the client's process: take the same plugins, and mute it, since its output would mix with ours."""
    shelves.use_plugins(plugins)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)


@torch.no_grad()
def largest_difference(a: LanguageModel, b: LanguageModel) -> float:
    """The largest difference of two models' logits on the same random ids, relative to the largest logit of `a`."""
    ids = _check_ids(a.config)
    expected, got = a(ids), b(ids)
    if not expected.isfinite().all():
        raise CheckpointError("the model's logits are not finite: its weights hold NaN or infinity")
    return float((expected - got).abs().max() / expected.abs().max())


def _check_ids(config: GPTConfig) -> Tensor:
    n, seq_len = CHECK_IDS
    shape = (n, min(seq_len, config.block_size))
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def _check_destination(dst: Path, src: str, is_folder: bool, replace: bool) -> None:
    if not dst.exists():
        return
    if dst.is_dir() != is_folder:
        is_a, name_a = ("folder", "file") if dst.is_dir() else ("file", "folder")
        raise UsageError(f"DESTINATION = {dst} is a {is_a}; name a {name_a}.")
    source = Path(split_activation(src)[0])
    if source.exists() and source.samefile(dst):
        raise UsageError(f"DESTINATION = {dst} is the source itself; choose another.")
    names = sorted(path.name for path in dst.iterdir()) if is_folder else [dst.name]
    if names and not replace:
        is_not = "is not empty" if is_folder else "exists"
        raise UsageError(f"DESTINATION = {dst} {is_not}; choose another, or replace an earlier export with --force.")
    shelf = [shelves.load(SHELF, name) for name in shelves.entries(SHELF)]
    ours = {name for entry in shelf for name in getattr(entry, "FILES", ())}
    if not is_folder and any(entry.matches(dst) for entry in shelf if hasattr(entry, "matches")):
        ours.add(dst.name)
    if foreign := [name for name in names if name not in ours]:
        raise UsageError(
            f"DESTINATION = {dst} holds {foreign[0]!r}, which is not from an export, so --force does not replace it; "
            "choose another."
        )


def _put_in_place(part: Path, dst: Path) -> None:
    """Rename into place. The old export is removed only after the new one is there, and restored if it cannot be."""
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
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
