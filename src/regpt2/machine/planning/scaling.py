"""How an update scales over GPUs. In: how one GPU trains, and where; out: a row for each number of GPUs.

The tokens of an update stay the same, so each GPU gets fewer as their number grows: at some point its passes are too
small to keep it busy, and too short to hide the exchange.
"""

from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

from regpt2.machine.planning.formulas import Place, step_seconds
from regpt2.training.memory import Setup, fits, micro_batches, still_needed

MOST_GPUS = 512
LOW_EFFICIENCY = 0.80
LARGER = 4  # times the tokens of an update, to see if a larger batch scales better
CLEARLY = 0.90  # of DDP's time: the formula leaves out FSDP's work on the host, so a smaller gain may be none


@dataclass(frozen=True)
class ScalingRow:
    """The run on one number of GPUs."""

    place: Place
    setup: Setup | None  # with the fastest micro-batch that fits; None: none fits
    parts: dict[str, float] = field(default_factory=dict)  # seconds of an update
    efficiency: float = 0.0  # tokens per second per GPU, relative to the best row
    hours: float = 0.0  # of the whole run, if a plan has filled it in

    @property
    def step_s(self) -> float:
        return sum(self.parts.values())

    @property
    def exposed_s(self) -> float:
        """Time of the exchange and of FSDP's gathers that no pass hides."""
        return self.parts.get("exchange", 0.0) + self.parts.get("gathering", 0.0)

    @property
    def tokens_per_s(self) -> float:
        """Of all GPUs; 0 if no micro-batch fits."""
        return self.place.gpus * self.per_gpu

    @property
    def per_gpu(self) -> float:
        """Tokens per second of one GPU."""
        return self.setup.grad_accum_steps * self.setup.n_tokens / self.step_s if self.setup else 0.0


@dataclass(frozen=True)
class Scaling:
    """The table, and the conclusions from it."""

    rows: list[ScalingRow]
    base: ScalingRow  # the most efficient row, usually one GPU
    low: ScalingRow | None  # the first row after it with an efficiency below LOW_EFFICIENCY
    low_at_larger_batch: float  # efficiency there with LARGER times the tokens in an update
    fsdp: ScalingRow | None
    """The first row, from two GPUs on, where FSDP fits and DDP does not, or FSDP is clearly faster."""
    ddp_there: ScalingRow | None  # the same number of GPUs with DDP; its setup is None if DDP does not fit


@dataclass(frozen=True)
class Work:
    """The work that any number of GPUs shares."""

    one_gpu: Setup  # all of an update's tokens on one GPU
    least_tokens: int  # of the smallest update: the micro-batch must divide it
    free_bytes: int  # of each GPU

    def numbers(self, gpus_per_node: int) -> list[int]:
        """1, 2, 4, ... in the first node, then whole nodes, if they divide the smallest update evenly."""
        sequences = self.least_tokens // self.one_gpu.seq_len
        doubled = [1 << i for i in range(MOST_GPUS.bit_length())]
        in_one = takewhile(lambda n: n < gpus_per_node, doubled)
        nodes = (gpus_per_node * n for n in doubled)
        return [n for n in (*in_one, *nodes) if n <= MOST_GPUS and sequences % n == 0]

    def row(self, place: Place, strategy: Literal["ddp", "fsdp"] | None = None) -> ScalingRow:
        """The row with the fastest micro-batch that fits."""
        sequences = self.one_gpu.micro_batch * self.one_gpu.grad_accum_steps // place.gpus
        shared = replace(self.one_gpu, micro_batch=1, grad_accum_steps=sequences, ranks=place.gpus)
        shared = replace(shared, strategy=strategy or shared.strategy)
        rows = [
            ScalingRow(place, setup, step_seconds(setup, place))
            for setup in micro_batches(shared, self.least_tokens)
            if fits(still_needed(setup), self.free_bytes, setup.device)
        ]
        return min(rows, key=lambda row: row.step_s, default=ScalingRow(place, None))


def scaling_of(work: Work, place: Place) -> Scaling:
    """The table for 1, 2, 4, ... GPUs, in nodes like those of `place`."""
    places = [replace(place, gpus=n) for n in work.numbers(place.gpus_per_node)]
    rows = [work.row(where) for where in places]
    most = max(row.per_gpu for row in rows)
    rows = [replace(row, efficiency=row.per_gpu / most) if most else row for row in rows]
    base = max(rows, key=lambda row: row.efficiency)
    low = next((row for row in rows[rows.index(base) :] if row.setup and row.efficiency < LOW_EFFICIENCY), None)
    larger = 0.0
    if low is not None:
        more_steps = replace(work.one_gpu, grad_accum_steps=LARGER * work.one_gpu.grad_accum_steps)
        more = replace(work, one_gpu=more_steps, least_tokens=LARGER * work.least_tokens)
        larger = more.row(low.place).per_gpu / more.row(base.place).per_gpu
    shardable = places if not work.one_gpu.lora.rank else []
    both = ((work.row(where, "fsdp"), work.row(where, "ddp")) for where in shardable if where.gpus > 1)
    pays = ((f, d) for f, d in both if f.setup and (d.setup is None or f.step_s < CLEARLY * d.step_s))
    fsdp, ddp = next(pays, (None, None))
    return Scaling(rows, base, low, larger, fsdp, ddp)
