"""regpt2 in Python. In: names, paths and options as on the command line; out: models, figures, arrays, plots.

`import regpt2` gives all of it. What the functions have in common:

- A path is a `str` or a `Path`. `**options` are those of the command, with _ for -. An unknown option, or a value of
  the wrong type, raises `UsageError`.
- Errors of the user, a file or the machine raise a `Problem`, whose message says what to do: `UsageError`
  (and `ConfigError`, a kind of it), `DataError`, `CheckpointError`, `DownloadError`.
- torch's global settings and random numbers, signal handlers and matplotlib's state are restored.
- `prepare` and `train` print their progress to standard output. The others print nothing there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from regpt2.base import shelves
from regpt2.base.device import choose_compute, pick_device, settings_kept
from regpt2.base.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DownloadError,
    Problem,
    UsageError,
    did_you_mean,
)
from regpt2.base.ranks.world import World
from regpt2.base.shelves import use_plugins
from regpt2.commands.train import failures_named
from regpt2.config.recipe_files import configured
from regpt2.config.toml_file import options_of
from regpt2.data.chat_template import messages_of
from regpt2.data.preparing.options import SHELF, PrepareOptions
from regpt2.data.preparing.prepare import prepare as prepare_data
from regpt2.data.sources.filters import Filters
from regpt2.data.sources.plan import Document, Part, Plan
from regpt2.data.tokenizer import Tokenizer
from regpt2.data.tokens.manifest import Manifest
from regpt2.evals.measuring.harness import harness_model
from regpt2.evals.measuring.measure import EvaluateOptions, Results, expanded, measure
from regpt2.evals.scoring.context import EvalContext, scoring
from regpt2.evals.scoring.texts import Score, score_text
from regpt2.model.files.contract import ModelFiles, TokenizerRef
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.load import LoadedModel
from regpt2.model.gpt import GPT
from regpt2.model.language_model import GPTConfig, LanguageModel
from regpt2.pages.charts.draw import column, overview, png
from regpt2.pages.charts.panels import panels as panels_of
from regpt2.pages.record import read_record as open_record
from regpt2.pages.report.write import heads, records_of, write_report
from regpt2.run.ending import Summary
from regpt2.run.loop import train as train_run
from regpt2.sampling.chat.conversation import Chat, ChatOptions
from regpt2.sampling.continue_text import Completion, SampleOptions, SampleType, load_in
from regpt2.sampling.tokenizer import tokenizer_of
from regpt2.sampling.writer import OF_THE_COMMAND, Writer
from regpt2.sampling.writing import TokenLogprob

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "GPT", "CheckpointError", "Completion", "ConfigError", "DataError", "Document", "DownloadError", "GPTConfig",
    "Manifest", "Model", "ModelFiles", "Part", "Plan", "Problem", "Results", "Score", "Summary", "TokenLogprob",
    "TokenizerRef", "UsageError", "evaluate", "load", "plot", "prepare", "read_record", "report", "tensors_of",
    "train", "use_plugins",
]  # fmt: skip

# B sequences, T tokens, V = vocab_size

PathLike: TypeAlias = str | Path
_BATCH = 8  # windows per forward pass of `Model.score`


class Model(Writer):
    """A model with its tokenizer, as `load` gives it."""

    def __init__(self, loaded: LoadedModel, dtype: SampleType = "fp32", tokenizer: Path | None = None) -> None:
        self._loaded, self._dtype, self._meta = loaded, dtype, tokenizer
        self._matmuls: str | None = None  # their precision in torch, once it is chosen

    def __repr__(self) -> str:
        return f"<regpt2.Model {self._loaded.source}, {self._dtype} on {self.device}>"

    @property
    def module(self) -> LanguageModel:
        """The torch module: `module(ids)` gives logits, `module(ids, targets)` the mean loss in nats per token."""
        return self._loaded.model

    @property
    def config(self) -> GPTConfig:
        """Its shape: `n_layer`, `n_head`, `n_embd`, `block_size`, `vocab_size`, ..."""
        return self.module.config

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def step(self) -> int | None:
        """Updates made, if it is from a run."""
        return self._loaded.step

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That of its training: `encode(text)` gives a list of ids, `decode(ids)` the text.

        Raises:
            CheckpointError: it is unknown or not supported. `logits` works without it.
        """
        return tokenizer_of(self._loaded, self._meta)

    def _options(self, **values: Any) -> SampleOptions:
        if given := sorted(OF_THE_COMMAND & values.keys()):
            raise UsageError(f"{given[0]} is an option of the command, not of a model's methods.")
        if isinstance(values.get("stop"), str):
            values["stop"] = [values["stop"]]
        plain = {name: one.item() if isinstance(one, np.generic) else one for name, one in values.items()}
        return options_of(SampleOptions, {**plain, "model": self._loaded.source})

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        max_new_tokens: int | None = ChatOptions.max_new_tokens,
        *,
        temperature: float = ChatOptions.temperature,
        top_k: int = ChatOptions.top_k,
        top_p: float = ChatOptions.top_p,
        context: int | None = ChatOptions.context,
        seed: int = ChatOptions.seed,
    ) -> str:
        """A chat model's answer to `[{"role": "user", "content": "Hello"}]`, or to a longer conversation.

        Args: as for `generate`. The oldest turns that do not fit into the context are left out.

        Raises:
            UsageError: it is no chat model, the last message is not the user's or leaves no room, or an option is out
                of range.
            DataError: these are no messages of system (or none), user, assistant, user, ...
        """
        options = ChatOptions(self._loaded.source, "", max_new_tokens, context, temperature, top_k, top_p, seed)
        with self._set_up():
            return Chat(self._loaded, self.tokenizer, options).answer(messages_of(messages)).text

    def logits(self, ids: ArrayLike | Tensor) -> Tensor:
        """Logits of the next token after each position: ids (T,) -> (T, V), (B, T) -> (B, T, V), fp32.

        V is the real vocabulary, without the padding rows of the embedding. The logits are on the model's device and
        have no gradient; call `module(ids)` for logits with a gradient.

        Raises:
            UsageError: a wrong shape, no ids, more than `block_size`, or an id outside the vocabulary.
        """
        rows = torch.as_tensor(ids if isinstance(ids, Tensor) else np.asarray(ids), device=self.device)
        if rows.ndim not in (1, 2) or not rows.numel() or rows.is_floating_point():
            raise UsageError(
                f"ids have the shape {tuple(rows.shape)} and the type {str(rows.dtype)[6:]}, expected whole numbers "
                "of shape (T,) or (B, T), at least one."
            )
        rows, (low, high) = rows.long(), (int(rows.min()), int(rows.max()))
        if rows.shape[-1] > self.config.block_size:
            raise UsageError(f"{rows.shape[-1]:,} ids are more than block_size = {self.config.block_size:,}.")
        if low < 0 or high >= self.config.vocab_size:
            raise UsageError(f"ids go from {low} to {high}, the vocabulary from 0 to {self.config.vocab_size - 1}.")
        with self._set_up(), scoring(self._context()):
            hidden = self.module.hidden(rows.view(-1, rows.shape[-1]))  # (B, T, n_embd)
            logits = self.module.head(hidden).float()  # (B, T, V)
        return logits.view(*rows.shape, -1)

    def score(self, text: str) -> Score:
        """How well the model predicts a text of any length: each token after <|endoftext|> and all tokens before it.

        A text longer than `context_size` tokens is scored in windows of that size, which do not overlap.

        Raises:
            UsageError: the text is empty, or has a character that the tokenizer lacks.
            CheckpointError: there is no tokenizer.
        """
        with self._set_up():
            return score_text(self._context(), text)

    def harness(self) -> Any:
        """The model as EleutherAI's harness takes it: `lm_eval.simple_evaluate(model=model.harness(), tasks=[...])`."""
        return harness_model(self._context())

    def _context(self) -> EvalContext:
        world, seq_len = World(rank=0, local_rank=0, size=1, device=self.device), self.module.context_size
        return EvalContext(
            self.module, world, data=None, seq_len=seq_len, batch=_BATCH, val_tokens=0, tokenizer=lambda: self.tokenizer
        )

    @contextmanager
    def _set_up(self) -> Iterator[None]:
        """Inside this context torch computes as it does for the command."""
        with settings_kept():
            if self._matmuls is None:
                choose_compute("bf16" if self._dtype == "bf16" else "fp32", self.device, keep_freed_memory=False)
                self._matmuls = torch.get_float32_matmul_precision()
            else:  # a stream comes here for each token, and choosing takes milliseconds
                torch.set_float32_matmul_precision(self._matmuls)
            yield


def load(
    spec: PathLike, *, device: str = "auto", dtype: SampleType = "fp32", tokenizer: PathLike | None = None
) -> Model:
    """The model that `spec` names, ready for use.

    Args:
        spec: a run folder (its newest complete checkpoint), a checkpoint, a file or folder of any known format, a
            model of the Hugging Face hub such as "hf:gpt2", or "builtin:novels", which comes with regpt2.
        device: auto (CUDA, else MPS, else the CPU), cpu, cuda, cuda:1, mps.
        dtype: fp32, bf16, or int8 (GPT-2 on a CPU, to generate and score alone).
        tokenizer: for a model that does not include its vocabulary, as nanoGPT's: the meta.pkl or tokenizer.json.

    Raises:
        UsageError: nothing is at `spec`, or the device is not available.
        CheckpointError: the model is damaged, or is not a GPT-2.
        DownloadError: the hub could not be reached, or has no such model.
    """
    with settings_kept():
        loaded = load_in(dtype, str(spec), pick_device(device))
    return Model(loaded, dtype, None if tokenizer is None else Path(tokenizer))


def prepare(source: PathLike, out: PathLike, **options: Any) -> Manifest:
    """Turn text into a folder of token shards, for `train`; resumes where an earlier call was interrupted.

    A script that prepares with several `workers` needs `if __name__ == "__main__":`; a notebook does not.

    Args:
        source: a data set's name, as `regpt2 prepare --help` lists them, or your own file or folder of text.
        out: the folder to write.
        options: `tokenizer="bytes"`, `workers=1`, `val_fraction=0.1`, `min_chars=20`, ...

    Returns:
        The folder's content: `splits["train"].tokens`, `vocab_size`, `fingerprint`, ...

    Raises:
        UsageError, DataError, DownloadError: see above; also if `out` has other content.
    """
    dataset, rules = str(source), {field.name for field in fields(Filters)} & options.keys()
    if dataset not in shelves.entries(SHELF) and Path(source).exists():
        dataset, options = "text_files", {"input": source, **options}
    if rules:
        options["filters"] = {name: options.pop(name) for name in rules}
    return prepare_data(options_of(PrepareOptions, {**options, "dataset": dataset, "out": out}))


def train(recipe: PathLike | Mapping[str, Any], **options: Any) -> Summary:
    """Train a model by a recipe, or resume the run in its folder.

    Interrupting it (Ctrl-C, a notebook's stop button) saves a checkpoint after the update and returns; the same call
    resumes. On Linux the process keeps freed memory from then on, which makes steps on a CPU a third faster. Under
    torchrun every rank calls it, once in a process.

    Args:
        recipe: a recipe's name, a TOML file, or its content as a dict, which must have `run`, the run folder.
        options: changes to it: `data="data/mine"`, `max_steps=20`, `optim={"lr": 3e-4}`, `**{"optim.lr": 3e-4}`,
            `init="hf:gpt2"` to begin from the weights of a model.

    Returns:
        The step, how the run ended, and its folder, `run`.

    Raises:
        UsageError: no such recipe or option, or the folder holds another run.
        Problem: the data or a checkpoint is damaged, or there is too little memory.
    """
    config = configured(recipe if isinstance(recipe, Mapping) else str(recipe), options)
    if not config.run:
        raise UsageError("a recipe without a name needs a run folder: run='runs/mine'.")
    with settings_kept(), failures_named(config):
        return train_run(config)


def evaluate(model: Model | PathLike, evals: str | Sequence[str] = ("val_loss",), **options: Any) -> Results:
    """Measure a model.

    Args:
        model: a loaded model (in fp32), with any changes to its module; or a `spec` as for `load`.
        evals: names of evaluations, as "hellaswag", of a part, as "core.piqa", or of groups: "paper", "choices".
        options: `data="data/mine"` for val_loss, `limit=100` examples of each, `batch`, `precision`, `out`, ...; an
            evaluation's own as `core={"examples": 50}`.

    Returns:
        `results["val_loss"]["loss"]`, nats per token; see `Results`.

    Raises:
        UsageError, DataError, DownloadError: the only evaluation failed. With several see `Results.failed`.
    """
    names = (evals,) if isinstance(evals, str) else tuple(evals)
    values, kind = {**options, "evals": names}, shelves.extended(EvaluateOptions, "evals", expanded(names))
    if not isinstance(model, Model):
        with settings_kept():
            return measure(options_of(kind, {**values, "model": str(model)}))
    if given := sorted({"device", "tokenizer"} & options.keys()):
        raise UsageError(f"{given[0]} belongs to load(): the model is loaded already.")
    if model._dtype != "fp32":
        raise UsageError(
            f"the model is loaded in {model._dtype}; load it in fp32, and give precision={model._dtype!r}."
        )
    with settings_kept():
        return measure(options_of(kind, {**values, "model": model._loaded.source}), model._loaded)


def read_record(run: PathLike) -> dict[str, NDArray[np.float64]]:
    """The recorded figures of a run, as columns of equal length: `pandas.DataFrame(regpt2.read_record(run))`.

    A row for each step that was logged or evaluated, in order; NaN where a step has no value. The columns:
    `step`; of training `loss` (nats per token), `grad_norm`, `lr`, `step_ms`, `tokens_per_s`, `mfu` (on a CPU a
    share of matmuls that the run timed), `tokens` (seen so far) and `skipped` (1 or 0); of each evaluation its figures,
    as `val_loss.loss`, `val_loss.bits_per_byte`, `hellaswag.acc_norm`.

    Raises:
        UsageError: `run` is not the folder of a run.
        DataError: the record is damaged.
    """
    return open_record(Path(run)).columns()


def plot(runs: PathLike | Sequence[PathLike], panels: str | Sequence[str] = ()) -> "Figure":
    """The report's charts of one run, or of several side by side, as a matplotlib figure. No file is written.

    A notebook shows the figure if it is the last line of a cell; `figure.savefig("loss.png")` saves it.

    Args:
        panels: loss, hellaswag, core, bits, lr, grad_norm, tokens_per_s, mfu, step_ms: one below the other; by default
            the report's picture.

    Raises:
        UsageError: not the folder of a run, too many runs, or they have no such panel.
        DataError: a record is damaged.
    """
    records = records_of(_paths(runs))
    there = {panel.name: panel for panel in panels_of(records)}
    names = [panels] if isinstance(panels, str) else panels
    for name in names:
        if name not in there:
            raise UsageError(f"there is no panel {name!r}{did_you_mean(name, there)} Available: {', '.join(there)}.")
    figure: Figure = (
        column([there[name] for name in names]) if names else overview(list(there.values()), *heads(records))
    )
    figure._repr_png_ = partial(png, figure)  # type: ignore[attr-defined]  # called by notebooks to show it
    return figure


def report(
    runs: PathLike | Sequence[PathLike], out: PathLike | None = None, results: PathLike | None = None
) -> list[Path]:
    """Write the page of a run, or of several side by side: .html, and beside it .png and .md; returns their paths.

    Args:
        out: the page; by default report.html in the folder of the only run.
        results: the file that `evaluate(..., out=FILE)` wrote for the only run's model.

    Raises:
        UsageError: not the folder of a run, too many runs, or `out` does not end in .html.
        DataError: a record or the results are damaged.
    """
    page = write_report(_paths(runs), None if out is None else Path(out), None if results is None else Path(results))
    return [page, page.with_suffix(".png"), page.with_suffix(".md")]


def _paths(runs: PathLike | Sequence[PathLike]) -> list[Path]:
    return [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
