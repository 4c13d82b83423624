"""Weights to another format. In: a model and an empty place; out: a file or folder, proven to be the same model.

regpt2 convert runs/gpt2_124m export --to huggingface
regpt2 convert runs/gpt2_124m gpt2.gguf --to gguf --dtype q8_0
regpt2 convert hf:gpt2 gpt2 --to native
"""

import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from regpt2.base import plugins
from regpt2.base.console import say, warn
from regpt2.base.errors import CheckpointError, Problem, UsageError
from regpt2.base.files import fsync_dir, require_free_space
from regpt2.base.options import parse
from regpt2.data.added_tokens import AddedTokens
from regpt2.data.tokenizer import Gpt2Tokenizer
from regpt2.model.architecture import ARCHITECTURES, switches_on
from regpt2.model.files.contract import SHELF, TORCH_DTYPES, Vocabulary
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.load import LoadedModel, load_model
from regpt2.model.gpt import GPT, is_plain
from regpt2.model.kernels.activation import split_activation
from regpt2.model.language_model import GPTConfig, LanguageModel
from regpt2.sampling.tokenizer import tokenizer_of

# A conversion to fp32 moves numbers and computes none: the logits come out bit for bit the same, and 0 is what is seen.
# The tolerance, relative to the largest logit, only allows for kernels that sum in another order by memory alignment;
# a wrong or transposed tensor is orders of magnitude above it. A single weight may not be: so all are compared as well.
TOLERANCE = 1e-6
CHECK_IDS = (2, 64)  # sequences x tokens
# Log probabilities that another program computes with the written file, relative to the largest of ours. In fp32 only
# the order of sums differs, and llama.cpp has GELU as a table in fp16. It multiplies F16, BF16 and Q8_0 weights with
# inputs that it has rounded likewise.
CLIENT_TOLERANCES = {"fp32": 1e-3, "fp16": 2e-3, "bf16": 1e-2, "q8_0": 3e-2}


@dataclass(frozen=True)
class ConvertOptions:
    """Write a model in another format; it is read back and compared before it appears."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A run folder, checkpoint, file or folder, or hf:gpt2; :gelu or :gelu_tanh behind it sets its GELU."""
    dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """The folder to write, or for a format of a single file, the file."""
    to: str
    """The format: gguf, huggingface, llmc, nanogpt, native, onnx or safetensors."""
    dtype: str | None = None
    """Data type of the weights: fp32, or if the format has it bf16, fp16 or q8_0. Default: fp32."""
    force: bool = False
    """Replace an earlier export at DESTINATION."""
    tokenizer: Path | None = None
    """The meta.pkl of the data, for a character model that does not include it, such as nanoGPT's."""


def main(argv: list[str]) -> int:
    """The verb `regpt2 convert`."""
    convert(parse(ConvertOptions, argv, "regpt2 convert"))
    return 0


def convert(options: ConvertOptions) -> float:
    """Write the model to `dst` and return the largest difference of logits, relative to the largest logit.

    What is written is checked under a temporary name: it appears whole and proven, or not at all.

    Raises:
        UsageError: no such format or type, one that cannot hold this model, or `dst` holds something.
        CheckpointError: the source is no readable GPT-2, or what was written is not the same model.
    """
    entry = plugins.load(SHELF, options.to)
    dtype = _dtype(entry, options)
    dst = options.dst.absolute()
    _check_destination(options, entry)
    loaded = load_model(options.src)
    _check_expressible(options, entry, loaded)
    _check_activation(options, entry, loaded)
    vocabulary = _vocabulary(loaded, options.tokenizer)
    n_params = loaded.model.n_params()
    require_free_space(dst, int(1.01 * 4 * n_params) + (4 << 20), f"a model as {options.to}")
    part = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        if entry.FILES:
            part.mkdir()
        entry.write(loaded.model, part, vocabulary, dtype)
        difference, proof = _prove(entry, part, loaded, options, dtype)
        _put_in_place(part, dst)
    finally:
        _remove(part)
    say(f"{dst}: {n_params:,} parameters from {loaded.source} as {options.to}, {dtype}. {proof}")
    trained, block_size = loaded.model.context_size, loaded.model.config.block_size
    if trained < block_size:
        say(f"Its positions {trained:,} to {block_size - 1:,} were never trained: give it at most {trained:,} tokens.")
    if vocabulary is not None and vocabulary.characters is not None:
        note = getattr(entry, "CHARACTERS_NOTE", f"{options.to} does not hold them: keep the meta.pkl of its data.")
        say(f"Its {loaded.model.config.vocab_size:,} tokens are characters. {note}".rstrip())
    return difference


def _dtype(entry: Any, options: ConvertOptions) -> str:
    if not hasattr(entry, "write"):
        raise UsageError(f"--to {options.to}: that format is only read; choose another.")
    known: tuple[str, ...] = entry.DTYPES
    if options.dtype not in (None, *known):
        raise UsageError(f"--dtype {options.dtype}: {options.to} can be written as {', '.join(known)}.")
    return options.dtype or known[0]


def _check_expressible(options: ConvertOptions, entry: Any, loaded: LoadedModel) -> None:
    """Most formats have no words for what GPT-2 has not."""
    model, config = loaded.model, loaded.model.config
    _, described = ARCHITECTURES[config.architecture]
    if type(model) is not described or (described is GPT and not is_plain(model)):
        raise UsageError(
            f"--to {options.to}: {loaded.source} is not the {config.architecture} model that its configuration "
            f"describes: its {type(model).__name__} is a subclass, or a part of it was replaced, patched or hooked. "
            "A file of its weights would be another model; register an architecture for it, or undo the change."
        )
    if getattr(entry, "ANY_ARCHITECTURE", False) or type(model) is GPT:
        return
    switches = [name for name in switches_on(config) if name != "zero_init"]  # how weights began, no format tells
    has = ", ".join([*([] if isinstance(model, GPT) else ["no biases"]), *switches]) or "parts of its own"
    shelf = {name: plugins.load(SHELF, name) for name in _writers()}
    able = ", ".join(name for name, format_ in shelf.items() if getattr(format_, "ANY_ARCHITECTURE", False))
    raise UsageError(
        f"--to {options.to} holds GPT-2 alone, {loaded.source} has the architecture {config.architecture!r} with "
        f"{has}; formats that hold it: {able}."
    )


def _check_activation(options: ConvertOptions, entry: Any, loaded: LoadedModel) -> None:
    """Some formats have no words for which GELU a model has: all that read them compute the same one."""
    theirs, ours = getattr(entry, "ACTIVATION", None), loaded.model.config.activation
    if theirs is None or theirs == ours:
        return
    says = ", ".join(name for name in _writers() if not hasattr(plugins.load(SHELF, name), "ACTIVATION"))
    raise UsageError(
        f"--to {options.to}: what reads this format computes GELU as {theirs!r}, and {loaded.source} has {ours!r}, so "
        f"it would give other logits. Formats that say which: {says}. To write the weights all the same, give "
        f"{split_activation(options.src)[0]}:{theirs} as SOURCE."
    )


def _writers() -> list[str]:
    """The formats that can be written."""
    return [name for name in plugins.entries(SHELF) if hasattr(plugins.load(SHELF, name), "write")]


def _prove(entry: Any, part: Path, source: LoadedModel, options: ConvertOptions, dtype: str) -> tuple[float, str]:
    """The largest difference of logits and what was compared, or an error if the written model is another one."""
    refused = f"what was written as {options.to} is not the same model as {source.source}"
    model, difference, said = source.model, 0.0, []
    try:
        if hasattr(entry, "read"):
            model = load_model(part).model
            difference = _same_weights(source.model, model, dtype)
            same = "the same" if dtype == "fp32" else f"the nearest in {dtype}"
            said.append(f"Read back, every weight is {same}; the largest difference of logits is {difference:.1e}")
        if hasattr(entry, "client_logits"):
            by_client = _same_for_client(entry, part, model, options, dtype)
            if by_client is None:
                warn(f"{entry.CLIENT} is not installed, or takes no model without a tokenizer: it was not asked.")
            else:
                said.append(f"{entry.CLIENT} computes the same log probabilities within {by_client:.1e}")
                difference = max(difference, by_client)
    except CheckpointError as error:
        raise CheckpointError(f"{refused}: {error}; nothing was written to {options.dst}.") from None
    return difference, "; ".join(said) + " of the largest."


def _same_weights(source: LanguageModel, copy: LanguageModel, dtype: str) -> float:
    """The largest difference of logits, or an error if a weight is not the source's own, rounded as `dtype` is."""
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
    # q8_0: of 32 weights the largest is 127 steps, so that a weight is off by half a step at most. The step is stored
    # in fp16: it is off by 2^-11 of itself, below the normal numbers of fp16 by 2^-25, and up to 127 steps with it.
    largest = source.reshape(-1, 32).abs().amax(dim=1, keepdim=True)
    off = (copy - source).reshape(-1, 32).abs()
    return bool((off <= largest / 127 / 2 + torch.clamp(largest * 2**-11, min=127 * 2**-25) + largest * 1e-6).all())


def _same_for_client(entry: Any, part: Path, model: LanguageModel, options: ConvertOptions, dtype: str) -> float | None:
    """The largest difference to the log probabilities by the format's own reader; None where it does not answer.

    It works in a process of its own, which it may end when it dislikes a file.
    """
    ids = _check_ids(model.config)[:, : max(1, model.config.block_size - 1)]  # llama.cpp needs room for one more
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_hush) as pool:
            rows = pool.submit(client_rows, options.to, part, ids.tolist()).result()
    except Exception as error:  # whatever another program has against the file
        raise CheckpointError(
            f"{entry.CLIENT} does not take it ({str(error).strip() or type(error).__name__})"
        ) from None
    if rows is None:
        return None
    with torch.no_grad():
        expected = model(ids)[:, -1].log_softmax(-1)
    difference = float((torch.tensor(rows).log_softmax(-1) - expected).abs().max() / expected.abs().max())
    if not difference <= CLIENT_TOLERANCES[dtype]:
        raise CheckpointError(
            f"{entry.CLIENT} computes log probabilities that differ by {difference:.1e} of the largest, "
            f"expected at most {CLIENT_TOLERANCES[dtype]:.0e}"
        )
    return difference


def client_rows(format_name: str, path: Path, ids: list[list[int]]) -> list[list[float]] | None:
    """The answer of a format's own reader, as plain numbers; None where it is not installed."""
    logits: Tensor | None = plugins.load(SHELF, format_name).client_logits(path, torch.tensor(ids))
    return None if logits is None else logits.tolist()


def _hush() -> None:
    """In the client's process: no word on the terminal."""
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


def _vocabulary(loaded: LoadedModel, meta: Path | None) -> Vocabulary | None:
    """What can be said of the model's tokenizer. A model whose tokenizer we have not is converted all the same."""
    ref = loaded.tokenizer
    try:
        tokenizer = tokenizer_of(loaded, meta)
    except Problem as problem:
        if meta is not None:
            raise
        why = str(problem) if ref is None or ref.objection is None else f"{loaded.source}: {ref.objection}"
        warn(f"{why} The weights are converted. The tokenizer's own files are left out.")
        return None if ref is None else Vocabulary(ref.name, ref.fingerprint, added=ref.added)
    base, added = (tokenizer.base, tokenizer.added) if isinstance(tokenizer, AddedTokens) else (tokenizer, ())
    merges = base.vocab if isinstance(base, Gpt2Tokenizer) else None
    name, fingerprint, characters = tokenizer.name, tokenizer.fingerprint, tokenizer.characters
    return Vocabulary(name, fingerprint, tokenizer.eot, merges, added=added, characters=characters)


def _check_destination(options: ConvertOptions, entry: Any) -> None:
    dst = options.dst
    if not dst.exists():
        return
    if dst.is_dir() != bool(entry.FILES):
        is_a, name_a = ("folder", "file") if dst.is_dir() else ("file", "folder")
        raise UsageError(f"DESTINATION = {dst} is a {is_a}; name a {name_a}.")
    src = Path(split_activation(options.src)[0])
    if src.exists() and src.samefile(dst):
        raise UsageError(f"DESTINATION = {dst} is the source itself; choose another.")
    there = sorted(path.name for path in dst.iterdir()) if dst.is_dir() else [dst.name]
    if there and not options.force:
        is_not = "is not empty" if dst.is_dir() else "exists"
        raise UsageError(f"DESTINATION = {dst} {is_not}; choose another, or replace an earlier export with --force.")
    shelf = [plugins.load(SHELF, name) for name in plugins.entries(SHELF)]
    ours = {name for format_ in shelf for name in getattr(format_, "FILES", ())}
    if dst.is_file() and any(format_.matches(dst) for format_ in shelf if hasattr(format_, "matches")):
        ours.add(dst.name)
    if foreign := [name for name in there if name not in ours]:
        raise UsageError(
            f"DESTINATION = {dst} holds {foreign[0]!r}, which is not from an export, so --force does not replace it; "
            "name another place."
        )


def _put_in_place(part: Path, dst: Path) -> None:
    """Rename into place. What was there goes only when the new one stands, and comes back if it cannot."""
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
