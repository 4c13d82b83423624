"""What both APIs ask for. In: the fields of a body; out: which model, how to draw, when to stop."""

import secrets
from dataclasses import dataclass

from regpt2.base.errors import did_you_mean
from regpt2.sampling.draw import Choice
from regpt2.sampling.writing import Request
from regpt2.serving.api.errors import ApiError
from regpt2.serving.api.fields import Fields
from regpt2.serving.models import Models, Served

MOST_LOGPROBS = 20
MOST_STOPS, MOST_STOP_CHARS = 16, 1000
MOST_NEW = 2**31 - 1
MOST_KEPT = 500_000  # tokens and log-probabilities of a whole answer: about 100 MB

SHARED = (
    *(
        "model",
        "max_tokens",
        "n",
        "stop",
        "seed",
        "temperature",
        "top_p",
        "stream",
        "stream_options",
        "user",
        "logprobs",
    ),
    *("presence_penalty", "frequency_penalty", "logit_bias"),  # accepted where neutral
    *("top_k", "min_p", "repetition_penalty"),  # ours, and those of many servers
)


@dataclass(frozen=True)
class Ask:
    """What a client asks for, checked."""

    served: Served
    requests: tuple[Request, ...]
    """One for each prompt."""
    stream: bool
    include_usage: bool
    """Of a stream: usage in a last event."""
    score_prompts: bool = False
    only_score: bool = False
    """Nothing is to be written."""


def served_by(fields: Fields, models: Models) -> Served:
    """The model that is asked for, the first one by default."""
    name = fields.text("model")
    return next(iter(models.values())) if name is None else model_named(name, models)


def model_named(name: str, models: Models) -> Served:
    """The model of this name.

    Raises:
        ApiError: there is none.
    """
    if name not in models:
        known = ", ".join(models)
        message = f"The model {name!r:.80} does not exist{did_you_mean(name[:80], models)} Served: {known}."
        raise ApiError(404, message, param="model", code="model_not_found")
    return models[name]


def choice_of(fields: Fields) -> Choice:
    """How tokens are drawn. The default is the model's own distribution, as at OpenAI."""
    fields.only("presence_penalty", 0, 0.0, why="use repetition_penalty")
    fields.only("frequency_penalty", 0, 0.0, why="use repetition_penalty")
    fields.only("logit_bias", {}, why="no id can be made likelier")
    temperature, top_p = fields.number("temperature", 0), fields.number("top_p", 0, 1, above=True)
    min_p, penalty = fields.number("min_p", 0, 1), fields.number("repetition_penalty", 0, above=True)
    return Choice(
        1.0 if temperature is None else temperature,
        fields.whole("top_k", 0, MOST_NEW) or 0,
        1.0 if top_p is None else top_p,
        min_p or 0.0,
        1.0 if penalty is None else penalty,
    )


def stops_of(fields: Fields) -> tuple[str, ...]:
    """The texts that end an answer."""
    value = fields.get("stop")
    stops = [] if value is None else value if isinstance(value, list) else [value]
    expected = f"a text or up to {MOST_STOPS} texts, each of 1 to {MOST_STOP_CHARS:,} characters"
    if len(stops) > MOST_STOPS:
        fields.refuse("stop", expected)
    texts = tuple(one for one in stops if isinstance(one, str) and 0 < len(one) <= MOST_STOP_CHARS)
    if len(texts) < len(stops):
        fields.refuse("stop", expected)
    return texts


def n_of(fields: Fields, served: Served) -> int:
    """Continuations of each prompt."""
    slots = served.engine.slots
    return fields.whole("n", 1, slots, ", as many as the server writes at once") or 1


def seed_of(fields: Fields) -> int:
    """Of the draws; one of its own for each request that has none, as at OpenAI. Negative ones have another's draws."""
    seed = fields.whole("seed", -(2**63), 2**63 - 1)
    return secrets.randbits(62) if seed is None else seed % 2**62


def stream_of(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether to end with the usage."""
    stream = fields.flag("stream")
    options = fields.inner("stream_options", ("include_usage", "include_obfuscation"))
    if options.body and not stream:
        raise ApiError(400, "stream_options needs stream: true.", param="stream_options")
    options.flag("include_obfuscation")
    return stream, options.flag("include_usage")


def require_fit(served: Served, n_prompt: int, n_new: int) -> None:
    """An ApiError in OpenAI's words if prompt and answer are longer than the context."""
    if n_prompt + n_new > served.context:
        raise too_long(
            served,
            f"you requested {n_prompt + n_new:,} tokens ({n_prompt:,} in your prompt; {n_new:,} for the completion)",
        )


def require_small(ask: Ask) -> Ask:
    """What is asked; an ApiError if its whole answer would take much memory. A stream keeps nothing."""
    n_tokens = sum(one.n * (one.max_new_tokens + ask.score_prompts * len(one.ids)) for one in ask.requests)
    n_each = 1 + (ask.requests[0].logprobs or 0)
    if n_tokens * n_each > MOST_KEPT and not ask.stream:
        message = (
            f"The answer may have {n_tokens:,} tokens with {n_each:,} values each; one answer has at most "
            f"{MOST_KEPT:,}. Ask for fewer prompts, n, max_tokens or logprobs, or for a stream."
        )
        raise ApiError(400, message, code="answer_too_large")
    return ask


def too_long(served: Served, what: str, param: str = "prompt") -> ApiError:
    """The error of a prompt that does not fit."""
    message = (
        f"This model's maximum context length is {served.context:,} tokens, however {what}. "
        "Please reduce your prompt; or completion length."
    )
    return ApiError(400, message, param, "context_length_exceeded")


def require_short(served: Served, text: str) -> None:
    """An ApiError for a text that cannot fit, whatever its tokens: to tokenize it might take long."""
    n_bytes = len(text.encode())
    longest = served.longest_token
    if n_bytes > served.context * longest:
        least = -(-n_bytes // longest)
        raise too_long(served, f"your text of {n_bytes:,} bytes has at least {least:,} tokens")
