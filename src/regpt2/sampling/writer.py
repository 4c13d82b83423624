"""What a loaded model writes, in Python. In: prompts; out: texts, completions, or pieces as they are written."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any, TypeVar

from regpt2.base.errors import UsageError
from regpt2.data.tokenizer import Tokenizer
from regpt2.model.files.load import LoadedModel
from regpt2.sampling.continue_text import Completion, Long, SampleOptions, completions, rows_of
from regpt2.sampling.writing import Row

Prompt = TypeVar("Prompt", str, list[str])
OF_THE_COMMAND = {"model", "prompts", "device", "dtype", "deterministic", "tokenizer", "stream", "json"}


class Writer(ABC):
    """The methods of `regpt2.Model` that write text."""

    _loaded: LoadedModel

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """That of the model's training."""

    @abstractmethod
    def _options(self, **values: Any) -> SampleOptions:
        """Checked options."""

    @abstractmethod
    def _set_up(self) -> AbstractContextManager[None]:
        """Inside this context torch computes as it does for the command."""

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = SampleOptions.max_new_tokens,
        *,
        temperature: float = SampleOptions.temperature,
        top_k: int = SampleOptions.top_k,
        top_p: float = SampleOptions.top_p,
        min_p: float = SampleOptions.min_p,
        repetition_penalty: float = SampleOptions.repetition_penalty,
        stop: str | Sequence[str] = (),
        context: int | None = SampleOptions.context,
        long: Long = SampleOptions.long,
        batch: int = SampleOptions.batch,
        seed: int = SampleOptions.seed,
    ) -> Prompt:
        """The prompt and its continuation; for a list of prompts a list, in their order.

        The text is that of `regpt2 sample` with the same options. Prompts of any lengths are computed together. What is
        drawn for one depends on the seed, on the prompt and on how many times it is in the list, not on the others.
        A prompt that is n times in the list gets n continuations, drawn together, as by `--n n`.

        Args:
            prompt: "" begins a document.
            max_new_tokens: at most this many; fewer where the model ends the document. None: 100, or what fits.
            temperature: 0 always takes the likeliest token.
            top_k, top_p, min_p: draw from the k likeliest tokens (0 = all), of those from the likeliest that together
                have the probability top_p, and of those from the ones with min_p times the likeliest one's or more.
            repetition_penalty: above 1 makes tokens less likely that the text has already.
            stop: a text, or several; the continuation ends before the first of them.
            context: the most tokens, prompt included; None: the context length of training.
            long: "crop" lets prompt and text be longer than the context, of which the model then sees only the end.
            batch: the most continuations that are computed at once.

        Raises:
            UsageError: an option is out of range, or the prompt is too long.
            CheckpointError: there is no tokenizer, or a weight is not finite.
        """
        options = self._options(
            max_new_tokens=max_new_tokens, context=context, long=long, temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, stop=stop, batch=batch, seed=seed,
        )  # fmt: skip
        prompts = [prompt] if isinstance(prompt, str) else prompt
        with self._set_up():
            texts = [one.prompt + one.text for one in completions(options, self._loaded, self.tokenizer, prompts)]
        return texts[0] if isinstance(prompt, str) else texts

    def complete(
        self, prompt: str | Sequence[str], max_new_tokens: int | None = None, **options: Any
    ) -> list[Completion]:
        """Continuations with all that is known of them; several if `n` says so, or for several prompts.

        Args:
            options: those of `generate`, and `n=2`, `logprobs=5`: for each token its log-probability in the model's own
                distribution, and the 5 likeliest ids with theirs.

        Returns:
            For each `prompt`, `text` (the continuation alone), `tokens`, `finish_reason` ("stop", "length" or
            "end_of_text") and `logprobs`.

        Raises:
            UsageError, CheckpointError: as for `generate`.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        wanted = self._options(max_new_tokens=max_new_tokens, **options)
        with self._set_up():
            return list(completions(wanted, self._loaded, self.tokenizer, prompts))

    def stream(self, prompt: str, max_new_tokens: int | None = None, **options: Any) -> Generator[str, None, None]:
        """The continuation in pieces as it is written: whole characters, and never a part of a stop text.

        Joined they are the text that `generate` adds to the prompt. `close()`, or leaving the loop, ends the work.

        Args:
            options: those of `generate`.

        Raises:
            UsageError: as for `generate`, at once.
        """
        wanted = self._options(prompt=prompt, max_new_tokens=max_new_tokens, **options)
        if wanted.n != 1:
            raise UsageError(f"n = {wanted.n}: a stream has one continuation.")
        with self._set_up():
            steps = rows_of(wanted, self._loaded, self.tokenizer)
        return self._pieces(steps)

    def _pieces(self, steps: Generator[list[Row], None, None]) -> Generator[str, None, None]:
        """torch's settings are the caller's between two pieces."""
        with closing(steps):
            while True:
                with self._set_up():
                    rows = next(steps, None)
                if rows is None:
                    return
                if rows[0].new:
                    yield rows[0].new
