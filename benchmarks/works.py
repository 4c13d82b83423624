"""The works and their rivals. In: a device; out: works, each with our side and its rivals."""

import dataclasses
import random
from dataclasses import dataclass
from typing import Any, Literal

PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 32, 128, 512


# The formats that exports.py writes, and their files.
PLACES = {
    "native": "native",
    "huggingface": "huggingface",
    "ctranslate2": "ctranslate2",
    "gguf-fp32": "fp32.gguf",
    "gguf-bf16": "bf16.gguf",
    "gguf-q8_0": "q8_0.gguf",
    "llmc": "llmc",
}


@dataclass(frozen=True)
class Shape:
    """A GPT-2."""

    name: str
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    vocab_size: int = 50257

    def sizes(self) -> dict[str, int]:
        """The sizes by GPT-2's own names."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "name"}

    def padded_sizes(self) -> dict[str, int]:
        """With GPT-2's vocabulary in 50,304 rows, as in build-nanogpt and nanoGPT."""
        return self.sizes() | ({"vocab_size": 50304} if self.vocab_size == 50257 else {})


GPT2 = Shape("124M")
SMALL = Shape("4 layers, 128 wide", 4, 4, 128, 64, 65)  # nanoGPT's setting for a CPU
# For --quick, which only checks that every side runs. Generation needs GPT-2's vocabulary, which some formats contain.
TINY, TINY_TRAINED = Shape("2 layers, 64 wide", 2, 2, 64, 128), Shape("2 layers, 64 wide", 2, 2, 64, 64, 257)


@dataclass(frozen=True, kw_only=True)
class TrainingWork:
    """A training step."""

    model: Shape
    micro_batch: int
    seq_len: int
    grad_accum_steps: int = 1
    device: str = "cpu"
    kind: Literal["training"] = "training"

    @property
    def tokens(self) -> int:
        """The tokens of one step."""
        return self.micro_batch * self.seq_len * self.grad_accum_steps

    def __str__(self) -> str:
        accumulated = f" x {self.grad_accum_steps}" if self.grad_accum_steps > 1 else ""
        return f"{self.model.name}, B={self.micro_batch}{accumulated}, T={self.seq_len}"

    def token_ids(self) -> list[int]:
        """The step's inputs and, shifted by one, its targets: random, and the same for every side."""
        generator = random.Random(0)
        return [generator.randrange(self.model.vocab_size) for _ in range(self.tokens + 1)]

    @staticmethod
    def from_json(table: dict[str, Any]) -> "TrainingWork":
        """From what `dataclasses.asdict` made of it."""
        return TrainingWork(**{**table, "model": Shape(**table["model"])})


@dataclass(frozen=True, kw_only=True)
class GenerationWork:
    """Greedy continuation of prompts of equal length, with a KV cache; with one new token, it is prefill."""

    model: Shape
    batch: int
    prompt_tokens: int = PROMPT_TOKENS
    new_tokens: int = NEW_TOKENS
    device: str = "cpu"
    kind: Literal["generation"] = "generation"

    @property
    def tokens(self) -> int:
        """The number of new tokens; if only one is new, the number of prompt tokens."""
        return self.batch * (self.new_tokens if self.new_tokens > 1 else self.prompt_tokens)

    def __str__(self) -> str:
        if self.new_tokens == 1:
            return f"{self.model.name}, prefill of {self.prompt_tokens} tokens"
        return f"{self.model.name}, batch {self.batch}, {self.prompt_tokens} + {self.new_tokens} tokens"

    def prompts(self) -> list[list[int]]:
        """(batch, prompt_tokens): random, and the same for every side."""
        generator = random.Random(0)
        rows, columns = range(self.batch), range(self.prompt_tokens)
        return [[generator.randrange(self.model.vocab_size - 1) for _ in columns] for _ in rows]

    @staticmethod
    def from_json(table: dict[str, Any]) -> "GenerationWork":
        """From what `dataclasses.asdict` made of it."""
        return GenerationWork(**{**table, "model": Shape(**table["model"])})


Work = TrainingWork | GenerationWork


@dataclass(frozen=True)
class SideSpec:
    """Which program does a work, and how."""

    runtime: str
    precision: str
    compiled: bool = False

    def __str__(self) -> str:
        """Its name in a column, below a precision."""
        own = {"CTranslate2": {"int8": " int8"}, "llama.cpp": {"fp32": " F32", "bf16": " BF16", "int8": " Q8_0"}}
        return self.runtime + own.get(self.runtime, {}).get(self.precision, "") + (", compiled" * self.compiled)


@dataclass(frozen=True)
class Comparison:
    """Our side and its rivals, which take turns; all `rivals` must fit into memory together."""

    work: Work
    rivals: tuple[SideSpec, ...]

    @property
    def precision(self) -> str:
        """The same on all sides."""
        return self.rivals[0].precision

    @property
    def ours(self) -> SideSpec:
        """Our side."""
        return SideSpec("regpt2", self.precision)


def plan(device: str, *, quick: bool) -> list[Comparison]:
    """Everything that is measured on this kind of device."""
    whole = (_training_on_cuda() if device == "cuda" else _training_on_cpu()) + _generation(device)
    if not quick:
        return whole
    if device == "cuda":  # llm.c's program for it has only GPT-2's sizes
        whole = [each for each in whole if each.rivals[0].runtime != "llm.c"]
    return [dataclasses.replace(each, work=_tiny(each.work)) for each in whole]


def profiles(device: str, *, quick: bool) -> list[tuple[TrainingWork, str]]:
    """Which of our steps to profile: works and their precision."""
    of = {"cuda": [(64, "bf16")], "cpu": [(4, "bf16"), (1, "fp32")]}[device]
    works = [(TrainingWork(model=GPT2, micro_batch=n, seq_len=1024, device=device), precision) for n, precision in of]
    return [(_tiny(work), precision) for work, precision in works] if quick else works


def _tiny(work: Any) -> Any:
    if isinstance(work, TrainingWork):
        return dataclasses.replace(work, model=TINY_TRAINED, seq_len=64)
    return dataclasses.replace(
        work, model=TINY, prompt_tokens=min(work.prompt_tokens, 64), new_tokens=min(work.new_tokens, 16)
    )


def _alone(work: TrainingWork, precision: str, *runtimes: str) -> list[Comparison]:
    """One rival at a time, as two and ours would not fit into memory. A name that ends with "+" is compiled."""
    sides = [SideSpec(name.removesuffix("+"), precision, name.endswith("+")) for name in runtimes]
    return [Comparison(work, (side,)) for side in sides]


def _training_on_cpu() -> list[Comparison]:
    four = TrainingWork(model=GPT2, micro_batch=4, seq_len=1024)
    one = TrainingWork(model=GPT2, micro_batch=1, seq_len=1024)
    small = TrainingWork(model=SMALL, micro_batch=12, seq_len=64)
    as_llmc = TrainingWork(model=GPT2, micro_batch=4, seq_len=64)  # as its program for a CPU
    all_four = ("build-nanogpt", "build-nanogpt+", "transformers", "transformers+")
    return [
        *_alone(four, "bf16", "build-nanogpt", "build-nanogpt+", "transformers"),
        *_alone(four, "fp32", "nanoGPT"),
        *_alone(one, "bf16", *all_four),
        *_alone(one, "fp32", "build-nanogpt", "nanoGPT", "nanoGPT+", "transformers"),
        *_alone(small, "bf16", *all_four),
        *_alone(small, "fp32", "build-nanogpt", "nanoGPT", "nanoGPT+", "transformers"),
        *_alone(as_llmc, "fp32", "llm.c"),
    ]


def _training_on_cuda() -> list[Comparison]:
    lecture = TrainingWork(model=GPT2, micro_batch=64, seq_len=1024, grad_accum_steps=8, device="cuda")
    rivals = ("build-nanogpt", "build-nanogpt+", "nanoGPT+", "transformers", "transformers+", "llm.c")
    return _alone(lecture, "bf16", *rivals)


def _generation(device: str) -> list[Comparison]:
    def work(batch: int, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS) -> GenerationWork:
        sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        return GenerationWork(model=GPT2, batch=batch, device=device, **sizes)

    def against(work: GenerationWork, precision: str, *runtimes: str) -> Comparison:
        return Comparison(work, tuple(SideSpec(runtime, precision) for runtime in runtimes))

    one, eight, prefill = work(1), work(8), work(1, PREFILL_TOKENS, 1)
    if device == "cuda":
        works = [one, eight, work(64), prefill]
        return [against(each, precision, "transformers") for each in works for precision in ("fp32", "bf16")]
    return [
        *(against(each, "fp32", "transformers", "CTranslate2", "llama.cpp") for each in (one, prefill)),
        *(against(each, "bf16", "transformers", "llama.cpp") for each in (one, prefill)),
        *(against(each, "int8", "CTranslate2", "llama.cpp") for each in (one, prefill)),
        against(eight, "fp32", "transformers", "CTranslate2"),
        against(eight, "bf16", "transformers"),
        against(eight, "int8", "CTranslate2"),
    ]
