"""Weights to another format. In: a model and an empty place; out: a file or folder, proven to be the same model.

regpt2 convert runs/gpt2_124m export --to huggingface
regpt2 convert runs/gpt2_124m gpt2.gguf --to gguf --dtype q8_0
regpt2 convert hf:gpt2 gpt2 --to native
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from regpt2.base.console import say
from regpt2.base.options import parse
from regpt2.model.conversion import check_expressible, plan_export, write_export
from regpt2.model.files.load import load_model
from regpt2.sampling.tokenizer import vocabulary_of


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
    """The meta.pkl or tokenizer.json of the data, for a model that does not include it, as nanoGPT's or llm.c's."""


def main(argv: list[str]) -> int:
    """The verb `regpt2 convert`."""
    convert(parse(ConvertOptions, argv, "regpt2 convert"))
    return 0


def convert(options: ConvertOptions) -> float:
    """Write the model to `dst` and return the largest difference of logits, relative to the largest logit.

    Raises:
        UsageError: no such format or type, one that cannot hold this model, or `dst` holds something.
        CheckpointError: the source is not a readable GPT-2, or the written model differs.
    """
    export = plan_export(options.src, options.dst, options.to, options.dtype, replace=options.force)
    loaded = load_model(options.src)
    check_expressible(export, loaded)
    vocabulary = vocabulary_of(loaded, options.tokenizer)
    difference, proof = write_export(export, loaded, vocabulary)
    model, block_size = loaded.model, loaded.model.config.block_size
    say(f"{export.dst}: {model.n_params():,} parameters from {loaded.source} as {export.to}, {export.dtype}. {proof}")
    if (trained := model.context_size) < block_size:
        say(f"Its positions {trained:,} to {block_size - 1:,} were never trained: give it at most {trained:,} tokens.")
    if vocabulary is not None and vocabulary.characters is not None:
        default = f"{options.to} does not hold them: keep the meta.pkl of its data."
        note = getattr(export.entry, "CHARACTERS_NOTE", default)
        say(f"Its {model.config.vocab_size:,} tokens are characters. {note}".rstrip())
    return difference
