"""What to prepare, and how. In: options as on the command line; out: checked, and what shapes the shards."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from regpt2.base import shelves
from regpt2.base.errors import UsageError
from regpt2.data.fast_tokenizer import EncoderName
from regpt2.data.preparing.cluster import OPTIONS, check_options
from regpt2.data.sources.filters import Filters
from regpt2.data.sources.plan import Plan, Source
from regpt2.data.tokenizer import Tokenizer
from regpt2.data.tokens.manifest import IDENTITY
from regpt2.data.tokens.writing import DEFAULT_SHARD_TOKENS

SHELF = "data.datasets"
DEFAULT_VAL_FRACTION = 0.05


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare, and how."""

    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """The data set, one of those listed above."""
    out: Path
    """The folder to write. After an interruption, run the same command again to resume."""
    input: Path | None = None
    """For text_files: your file or folder. For a published data set: a local copy instead of the download."""
    field: str = ""
    """Field or column of .jsonl, .json, .parquet, .csv; default: text (chat: messages). meta.text is text in meta."""
    suffixes: tuple[str, ...] = ()
    """For text_files: read only files with these suffixes, such as .py .rst .txt; default: those in its line above."""
    repo: str = ""
    """For hub: the id of the data set, owner/name."""
    config: str = ""
    """The configuration of a published data set; see its line above."""
    split: str = ""
    """For hub: the split; default: train."""
    revision: str = ""
    """Branch, tag or commit of a published data set, instead of the pinned one."""
    first: int | None = None
    """Use only the first N files of a published data set, to try it."""
    tokenizer: str = "gpt2"
    """gpt2 (50,257 ids), bytes (257), or your own: the tokenizer.json of `regpt2 tokenizer train`, or its folder;
    builtin:novels has that of the model of this name."""
    vocab: Path | None = None
    """A vocab.bpe of your own for gpt2; it must be GPT-2's."""
    encoder: EncoderName = "auto"
    """What computes gpt2's ids: auto uses gigatoken if it is installed and gives equal ids, else tiktoken."""
    workers: int = dataclasses.field(default_factory=_cores)
    """Number of processes; it does not change the result."""
    engine: Annotated[str, tyro.conf.arg(metavar=f"{{processes,{','.join(OPTIONS)}}}")] = "processes"
    """Where to encode: processes on this machine, a Slurm job array, or tasks on a Ray cluster."""
    tasks: int | None = None
    """With slurm or ray: number of tasks that share the work; default: four for each of --workers."""
    engine_options: tuple[str, ...] = ()
    """With slurm or ray: its options as NAME=VALUE, such as partition=cpu time=04:00:00 for slurm."""
    val_fraction: float | None = None
    """Approximate share of the documents in the validation split; default: 0.05."""
    val_tokens: int | None = None
    """Take the first N tokens as the validation split, as in the lecture."""
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    """Tokens per shard; the last shard of each split is shorter."""
    dedup: bool = False
    """Leave out exact duplicates of earlier documents."""
    filters: Annotated[Filters, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Filters)
    disk_limit: float | None = None
    """Use at most N GB of disk at any time, shards included, by working on fewer files at once."""

    @property
    def source(self) -> Source:
        asked = (self.input, self.field_name, self.repo, self.config, self.split, self.revision, self.first)
        return Source(*asked, self.suffixes, options=shelves.own_options(self, self.dataset))

    @property
    def field_name(self) -> str:
        """The field with the text, also where none was given."""
        return self.field or str(getattr(shelves.load(SHELF, self.dataset), "FIELD", "text"))

    @property
    def own(self) -> dict[str, Any]:
        """The options that this data set alone has."""
        own = self.source.options
        return {field.name: getattr(own, field.name) for field in dataclasses.fields(own)} if own else {}

    @property
    def engine_settings(self) -> dict[str, str]:
        """`("partition=cpu", ...)` by name."""
        pairs = [item.partition("=") for item in self.engine_options]
        if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
            raise UsageError(f"--engine-options {wrong[0]!r}: expected NAME=VALUE, as in partition=cpu.")
        return {name: value for name, _, value in pairs}

    def validation(self, plan: Plan) -> tuple[int, float | None]:
        """How many of the first tokens are the validation split and None; or 0, and its share of the documents."""
        val_tokens = (
            0 if self.val_fraction is not None else plan.val_tokens if self.val_tokens is None else self.val_tokens
        )
        return val_tokens, None if val_tokens else self.val_fraction or DEFAULT_VAL_FRACTION

    def _check_input(self) -> None:
        if self.suffixes and self.dataset != "text_files":
            raise UsageError(f"--suffixes is for text_files; leave it out for {self.dataset}.")
        if self.input is not None and self.out.resolve().is_relative_to(self.input.resolve()):
            raise UsageError(f"--out {self.out} must not lie inside --input {self.input}; choose a folder beside it.")

    def check(self) -> None:
        """Check everything that needs no data.

        Raises:
            UsageError: an option is impossible, or two exclude each other.
        """
        for name in ("val_tokens", "workers", "first", "tasks"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UsageError(f"--{name.replace('_', '-')} {number} must be at least 1.")
        if self.val_fraction is not None and self.val_tokens is not None:
            raise UsageError("--val-fraction and --val-tokens both choose the validation split; leave one out.")
        if self.val_fraction is not None and not 0 < self.val_fraction <= 0.5:
            raise UsageError(
                f"--val-fraction {self.val_fraction} must be above 0 and at most 0.5; the default is 0.05."
            )
        if not 1 <= self.shard_tokens < 2**31:
            raise UsageError(
                f"--shard-tokens {self.shard_tokens} must be from 1 to 2,147,483,647; the default is 100000000."
            )
        self._check_input()
        if self.engine != "processes":
            check_options(self.engine, self.engine_settings)
            if self.disk_limit is not None:
                raise UsageError(f"--disk-limit does not work with --engine {self.engine}; leave one out.")
        elif self.engine_options or self.tasks is not None:
            raise UsageError("--tasks and --engine-options need --engine slurm or ray; choose one, or leave them out.")

    def shaping(self, plan: Plan) -> dict[str, str]:
        """The options that decide what the shards hold; rules only where they are not the default."""
        val_tokens, val_fraction = self.validation(plan)
        validation = {"val_tokens": str(val_tokens)} if val_tokens else {"val_fraction": str(val_fraction)}
        rules = dataclasses.asdict(self.filters) | {"dedup": self.dedup}
        defaults = dataclasses.asdict(Filters()) | {"dedup": False}
        changed = {name: str(value) for name, value in rules.items() if value != defaults[name]}
        changed |= {"suffixes": " ".join(self.suffixes)} if self.suffixes else {}
        changed |= {f"{self.dataset}.{name}": str(value) for name, value in self.own.items()}
        changed |= {f"plugin {name}": one["sha256"] for name, one in shelves.origins((SHELF, self.dataset)).items()}
        return {"field": self.field_name, "shard_tokens": str(self.shard_tokens)} | validation | changed

    def settings(self, plan: Plan, tokenizer: Tokenizer) -> dict[str, str]:
        """All that decides what the shards hold. A folder made with other settings is another preparation."""
        identity = (self.dataset, plan.source, plan.revision, tokenizer.name, tokenizer.fingerprint)
        return dict(zip(IDENTITY, identity, strict=True)) | self.shaping(plan)
