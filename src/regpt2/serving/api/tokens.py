"""Tokens as the API shows them. In: ids and log-probabilities; out: OpenAI's two forms of `logprobs`."""

from collections.abc import Sequence

from regpt2.data.tokenizer import StreamDecoder, Tokenizer
from regpt2.sampling.writing import TokenLogprob

LEAST_LOGPROB = -9999.0  # as OpenAI writes what is very unlikely; JSON has no infinity


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Its text; `bytes:\\xe2\\x80` for a part of a character, as OpenAI has it."""
    data = tokenizer.decode_bytes((token,))
    try:
        return data.decode() if data else f"token_id:{token}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    """A number that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


class CompletionLogprobs:
    """The form of /v1/completions, for one choice: `text_offset` counts on from token to token."""

    def __init__(self, tokenizer: Tokenizer, n_top: int) -> None:
        self.tokenizer, self.n_top = tokenizer, n_top
        self._decoder, self._offset = StreamDecoder(tokenizer), 0

    def of(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> dict[str, list[object]]:
        """Of the next tokens."""
        names, scores, tops, offsets = list[object](), list[object](), list[object](), list[object]()
        for token, kept in zip(tokens, logprobs, strict=True):
            names.append(token_text(self.tokenizer, token))
            scores.append(None if kept is None else finite(kept.logprob))
            tops.append(None if kept is None else self._top(kept))
            offsets.append(self._offset)
            self._offset += len(self._decoder.feed(token)) if token != self.tokenizer.eot else 0
        return {"tokens": names, "token_logprobs": scores, "top_logprobs": tops, "text_offset": offsets}

    def end_prompt(self, text: str) -> None:
        """What follows is written after this text."""
        self._decoder, self._offset = StreamDecoder(self.tokenizer), len(text)

    def _top(self, kept: TokenLogprob) -> dict[str, float]:
        """The likeliest, and the one that was drawn if it is none of them."""
        top = dict[str, float]()
        for token, logprob in (*kept.top[: self.n_top], (kept.token, kept.logprob)):
            top.setdefault(token_text(self.tokenizer, token), finite(logprob))
        return top


def chat_logprob(tokenizer: Tokenizer, kept: TokenLogprob, n_top: int) -> dict[str, object]:
    """The form of /v1/chat/completions, of one token."""

    def named(token: int, logprob: float) -> dict[str, object]:
        data = list(tokenizer.decode_bytes((token,)))
        return {"token": token_text(tokenizer, token), "bytes": data, "logprob": finite(logprob)}

    return {**named(kept.token, kept.logprob), "top_logprobs": [named(*pair) for pair in kept.top[:n_top]]}
