"""Loss, speed and time left. In: each update's figures, still on the device; out: lines of record and screen."""

import math
import time

import torch

from regpt2.base.console import count, duration, say
from regpt2.base.device import synchronize
from regpt2.base.record.metrics import TIMED
from regpt2.data.checks.baselines import is_near_uniform
from regpt2.model.flops import flops_per_token, mfu
from regpt2.run.intervals import note
from regpt2.run.setup import TrainingRun
from regpt2.training.guard import Guard
from regpt2.training.step import StepStats


class StepLog:
    """Reads the device only when a line is due, for that waits for every update. Observing is not timed."""

    def __init__(self, run: TrainingRun, guard: Guard, first: int) -> None:
        self.run, self.guard, self.first = run, guard, first
        self.step = first
        """The newest update."""
        self._pending: list[tuple[int, StepStats, int]] = []
        self._began_at = time.perf_counter()
        self._busy_s = 0.0
        self._training_s = 0.0
        self._spoke_at = 0.0

    def add(self, step: int, stats: StepStats, digest: int) -> None:
        """Remember an update, and the digest of its data, without reading it."""
        self._pending.append((step, stats, digest))
        self.step = step

    def pause(self) -> None:
        """Stop the clock, once the device has finished: what it still has queued is training time."""
        synchronize(self.run.world.device)
        self._busy_s += time.perf_counter() - self._began_at

    def resume(self) -> None:
        """Start the clock again."""
        self._began_at = time.perf_counter()

    def read(self) -> None:
        """Read all pending updates, if there are any, and record them.

        Raises:
            Problem: too many updates in a row were skipped.
        """
        run, config = self.run, self.run.config
        if not self._pending:
            return
        on_device = [torch.stack([s.loss, s.grad_norm, s.accepted, s.spike_limit]) for _, s, _ in self._pending]
        rows = torch.stack(on_device).tolist()
        digests = run.world.sum_on_cpu(torch.tensor([_signed(d) for _, _, d in self._pending])).tolist()
        self.pause()
        batch, last = config.batch, self._pending[-1][0]
        step_s = self._busy_s / len(rows)
        self._training_s += self._busy_s
        tokens_per_s = (batch.tokens_until(last) - batch.tokens_until(last - len(rows))) / self._busy_s
        flops = flops_per_token(config.model, batch.seq_len, lora_rank=config.lora.rank, window=config.window_at(last))
        used = mfu(tokens_per_s, flops, run.peak.flops if run.peak else None, run.world.size)
        for (step, stats, _), row, digest in zip(self._pending, rows, digests, strict=True):
            loss, grad_norm, accepted, _ = row
            run.metrics.log(
                "train",
                step,
                loss=loss,
                grad_norm=grad_norm,
                lr=stats.lr,
                step_ms=1e3 * step_s,
                tokens_per_s=tokens_per_s,
                mfu=used,
                tokens=batch.tokens_until(step),
                skipped=not accepted,
                data=f"{digest % 2**64:016x}",
            )
            self._remark(step, row, stats.scale)
        self._say(last, rows[-1], self._pending[-1][1].lr, step_s, tokens_per_s, used)
        self._pending.clear()
        self._busy_s = 0.0
        self.resume()

    def _remark(self, step: int, row: list[float], scale: float) -> None:
        run, (loss, grad_norm, accepted, spike_limit) = self.run, row
        if step == 1 and not run.config.init and not is_near_uniform(loss, run.config.model.vocab_size):
            expected = math.log(run.config.model.vocab_size)
            note(run, step, f"the first loss is {loss:.3f}; an untrained model should have ln(V) = {expected:.3f}")
        for remark in self.guard.observe(
            step, loss, grad_norm, accepted=bool(accepted), spike_limit=spike_limit, scale=scale
        ):
            note(run, step, remark)

    def _share(self, used: float) -> str:
        peak = self.run.peak
        timed = peak is not None and peak.source == TIMED
        return f"{'matmul share' if timed else 'mfu'} {used:.1%}"

    def _say(
        self, step: int, row: list[float], lr: float, step_s: float, tokens_per_s: float, used: float | None
    ) -> None:
        """A line for the first steps, the last, and at most one in two seconds between."""
        config, now = self.run.config, time.perf_counter()
        if not self.run.world.is_main or (self.first + 3 < step < config.max_steps and now - self._spoke_at < 2.0):
            return
        self._spoke_at = now
        seen, done, all_tokens = map(config.batch.tokens_until, (self.first, step, config.max_steps))
        left_s = (all_tokens - done) * self._training_s / (done - seen)
        loss, grad_norm, *_ = row
        busy = "" if used is None else f"{self._share(used)} | "
        say(
            f"step {step:>6,}/{config.max_steps:,} | loss {loss:.4f} | norm {grad_norm:.3f} | lr {lr:.2e} | "
            f"{1e3 * step_s:,.1f} ms | {count(tokens_per_s)} tok/s | {busy}{duration(left_s)} left"
        )


def _signed(digest: int) -> int:
    """64 bits as the integer that a tensor can hold; sums of such wrap around as those of the digests do."""
    return digest - 2**64 if digest >= 2**63 else digest
