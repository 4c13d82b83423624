"""How the cost of an update grows with the number of GPUs. In: how one GPU trains, a place; out: a row for each number.

An update keeps its tokens, so each GPU gets fewer of them: at some number its passes are too small to fill it, and the
exchange too long to hide behind them.
"""

from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

from regpt2.machine.planning.formulas import Place, step_seconds
from regpt2.training.memory import Setup, fits, micro_batches, still_needed

MOST_GPUS = 512
LOW_EFFICIENCY = 0.80
LARGER = 4  # times the tokens of an update, for comparison
CLEARLY = 0.90  # of DDP's time: FSDP's own work on the host is not counted, so a small gain is none


@dataclass(frozen=True)
class Row:
    """One number of GPUs."""

    place: Place
    setup: Setup | None
    """With the fastest micro-batch that fits; None: none fits."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of an update."""
    efficiency: float = 0.0
    """Tokens per second of each GPU beside the most in the table."""

    @property
    def step_s(self) -> float:
        """Of an update."""
        return sum(self.parts.values())

    @property
    def exposed_s(self) -> float:
        """Of it, what no pass hides of the exchange and of FSDP's gathers."""
        return self.parts.get("exchange", 0.0) + self.parts.get("gathering", 0.0)

    @property
    def tokens_per_s(self) -> float:
        """Of all GPUs; 0 where it does not fit."""
        return self.place.gpus * self.per_gpu

    @property
    def per_gpu(self) -> float:
        """Tokens per second of each."""
        return self.setup.grad_accum_steps * self.setup.n_tokens / self.step_s if self.setup else 0.0


@dataclass(frozen=True)
class Scaling:
    """The rows, and what follows from them."""

    rows: list[Row]
    base: Row
    """The most efficient, usually one GPU."""
    low: Row | None
    """The first after it whose efficiency is below LOW_EFFICIENCY."""
    low_at_larger_batch: float
    """Efficiency there with LARGER times the tokens in an update."""
    fsdp: Row | None
    """The first, from two GPUs on, where FSDP fits and DDP does not, or FSDP is clearly faster."""
    ddp_there: Row | None
    """With DDP; its setup is None where it does not fit."""


@dataclass(frozen=True)
class Work:
    """What each number of GPUs has to do."""

    one_gpu: Setup
    """All of an update's tokens on one GPU."""
    least_tokens: int
    """Of the smallest update, which a micro-batch has to divide."""
    free_bytes: int
    """Of each GPU."""

    def numbers(self, gpus_per_node: int) -> list[int]:
        """1, 2, 4, ... in the first node, then whole nodes, as far as they share the smallest update evenly."""
        sequences = self.least_tokens // self.one_gpu.seq_len
        doubled = [1 << i for i in range(MOST_GPUS.bit_length())]
        in_one = takewhile(lambda n: n < gpus_per_node, doubled)
        nodes = (gpus_per_node * n for n in doubled)
        return [n for n in (*in_one, *nodes) if n <= MOST_GPUS and sequences % n == 0]

    def row(self, place: Place, strategy: Literal["ddp", "fsdp"] | None = None) -> Row:
        """With the fastest micro-batch that fits there."""
        sequences = self.one_gpu.micro_batch * self.one_gpu.grad_accum_steps // place.gpus
        shared = replace(
            self.one_gpu,
            micro_batch=1,
            grad_accum_steps=sequences,
            ranks=place.gpus,
            strategy=strategy or self.one_gpu.strategy,
        )
        rows = [
            Row(place, setup, step_seconds(setup, place))
            for setup in micro_batches(shared, self.least_tokens)
            if fits(still_needed(setup), self.free_bytes, setup.device)
        ]
        return min(rows, key=lambda row: row.step_s, default=Row(place, None))

    def larger(self, times: int) -> "Work":
        """With `times` as many tokens in an update."""
        more = replace(self.one_gpu, grad_accum_steps=times * self.one_gpu.grad_accum_steps)
        return replace(self, one_gpu=more, least_tokens=times * self.least_tokens)


def scaling_of(work: Work, place: Place) -> Scaling:
    """For 1, 2, 4, ... GPUs, in nodes as at `place`."""
    places = [replace(place, gpus=n) for n in work.numbers(place.gpus_per_node)]
    rows = [work.row(where) for where in places]
    most = max(row.per_gpu for row in rows)
    rows = [replace(row, efficiency=row.per_gpu / most) if most else row for row in rows]
    base = max(rows, key=lambda row: row.efficiency)
    low = next((row for row in rows[rows.index(base) :] if row.setup and row.efficiency < LOW_EFFICIENCY), None)
    larger = 0.0
    if low is not None:
        more = work.larger(LARGER)
        larger = more.row(low.place).per_gpu / more.row(base.place).per_gpu
    both = ((work.row(where, "fsdp"), work.row(where, "ddp")) for where in places if where.gpus > 1)
    fsdp, ddp = next((pair for pair in both if _pays(*pair)), (None, None))
    return Scaling(rows, base, low, larger, fsdp, ddp)


def _pays(fsdp: Row, ddp: Row) -> bool:
    return fsdp.setup is not None and (ddp.setup is None or fsdp.step_s < CLEARLY * ddp.step_s)
