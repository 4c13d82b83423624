"""How a run begins. In: a configuration and its data; out: what to train with which tokenizer, and weights for it."""

from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

from torch import Tensor

from regpt2.base.errors import ConfigError
from regpt2.config.initial_shape import resumes
from regpt2.config.run import TO_BE_NAMED, RunConfig
from regpt2.data.mixture import Mixture
from regpt2.data.tokenizer import Tokenizer
from regpt2.model.architecture import switches_on
from regpt2.model.files.load import LoadedModel, load_model, peek_model
from regpt2.model.initial_weights import fitted, require_fit, weights_sha256
from regpt2.model.language_model import GPTConfig
from regpt2.sampling.shared_vocabulary import SharedVocabulary, shared_vocabulary
from regpt2.sampling.tokenizer import named_tokenizer


@dataclass(frozen=True)
class Beginning:
    """What a run begins with."""

    config: RunConfig
    """Its model is of the final shape."""
    tokenizer: Tokenizer
    trained_seq_len: int
    """Tokens of the longest sequences that the weights have been trained on, this run's included."""
    weights: dict[str, Tensor] | None = None
    """Of the model that the run begins from; None: random ones, or a checkpoint's."""
    origin: dict[str, Any] = field(default_factory=dict)
    """For the record: `init_source`, as given; `init_sha256`, of its weights; `init_step`, if it is from a run."""


def begin(config: RunConfig, data: Mixture, *, is_main: bool) -> Beginning:
    """The model that `init` names, read if the run has no checkpoint yet. Every rank calls this and reads it.

    What the others would warn of, the main rank warns of.

    Raises:
        Problem: the model is missing or damaged, has another shape, or another tokenizer than the data.
    """
    with nullcontext() if is_main else redirect_stderr(StringIO()):
        return _begin(config, data, with_origin=is_main)


def _begin(config: RunConfig, data: Mixture, *, with_origin: bool) -> Beginning:
    tokenizer, seq_len = data.tokenizer(), config.batch.seq_len
    if config.init == TO_BE_NAMED:
        raise ConfigError(
            f"the recipe {config.recipe} trains a model further and does not say which: give --init MODEL, as in "
            "--init hf:gpt2 or --init runs/mine."
        )
    if not config.init:
        _check_tokenizer(config, data, tokenizer)
        return Beginning(config, tokenizer, seq_len)
    if resumes(config.run):
        peeked = peek_model(Path(config.run))
        shared = shared_vocabulary(peeked.tokenizer, peeked.config.vocab_size, config.run, tokenizer, str(data))
        config = _final(config, peeked.config, shared, config.run)
        _check_tokenizer(config, data, shared.tokenizer)
        return Beginning(config, shared.tokenizer, max(seq_len, peeked.trained_seq_len or 0))
    loaded = load_model(config.init)
    model = loaded.model
    shared = shared_vocabulary(named_tokenizer(loaded), model.config.vocab_size, loaded.source, tokenizer, str(data))
    config = _final(config, model.config, shared, loaded.source)
    _check_tokenizer(config, data, shared.tokenizer)
    if shared.new_ids and config.lora.rank:
        raise ConfigError(
            f"lora.rank trains adapters and no embeddings, but {data} has {len(shared.new_ids)} tokens that "
            f"{loaded.source} does not know: they would never be told apart. Train without --lora.rank, or begin from "
            "a model that knows them."
        )
    weights = fitted(model, config.model, new_ids=shared.new_ids, textless=shared.textless)
    trained = min(config.model.block_size, max(seq_len, model.context_size))
    return Beginning(config, shared.tokenizer, trained, weights, _origin(config, loaded) if with_origin else {})


def _final(config: RunConfig, source: GPTConfig, shared: SharedVocabulary, name: str) -> RunConfig:
    """The configuration whose model has a row for each token."""
    n_tokens, n_before = shared.tokenizer.vocab_size, source.vocab_size
    require_fit(source, {key: value for key, value in asdict(config.model).items() if key != "vocab_size"}, name)
    if config.model.vocab_size not in (n_before, n_tokens) and not resumes(config.run):
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size:,}, but {name} has {n_before:,}"
            + (f", and {n_tokens:,} with the tokens that the data adds" if n_tokens > n_before else "")
            + ". Leave it out."
        )
    settings: dict[str, Any] = {"vocab_size": n_tokens}
    eot = shared.tokenizer.eot
    if getattr(config.model, "end_of_text", 0) == -1 and eot not in (None, n_tokens - 1):
        settings["end_of_text"] = eot  # -1 would be the last id, which is an added token
    return replace(config, model=replace(config.model, **settings))


def _origin(config: RunConfig, loaded: LoadedModel) -> dict[str, Any]:
    origin: dict[str, Any] = {"init_source": config.init, "init_sha256": weights_sha256(loaded.model)}
    return origin if loaded.step is None else {**origin, "init_step": loaded.step}


def _check_tokenizer(config: RunConfig, data: Mixture, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose vocabulary the model does not have, or that the settings do not suit."""
    if config.model.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size:,}, but {data} was made with the tokenizer "
            f"{tokenizer.name!r} of {tokenizer.vocab_size:,} tokens; set --model.vocab-size {tokenizer.vocab_size} "
            "or prepare the data with the other tokenizer."
        )
    if tokenizer.eot is None and "document_mask" in switches_on(config.model):
        raise ConfigError(
            f"model.document_mask = true needs an end of text between documents, and {data} is {tokenizer.name} "
            "without one; set --model.no-document-mask."
        )
    end_of_text = getattr(config.model, "end_of_text", -1)
    if "document_mask" in switches_on(config.model) and end_of_text % tokenizer.vocab_size != tokenizer.eot:
        raise ConfigError(
            f"model.end_of_text = {end_of_text}, but documents of {data} begin with id {tokenizer.eot}; "
            f"set --model.end-of-text {tokenizer.eot}, or --model.no-document-mask."
        )
