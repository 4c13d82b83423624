"""What to check when a run is above its reference. In: the evidence; out: sentences, the likeliest cause first.

What a run recorded is compared with the reference: equal facts are no cause, different ones come first. What it did
not record is judged by symptoms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from regpt2.references.curves import Curve
from regpt2.references.run_facts import Column, Facts

Cause = tuple[float, str] | None
"""How likely, and what to check; None where nothing is wrong."""
CERTAIN, SYMPTOM, HINT, OPEN = 3.0, 2.0, 1.5, 1.0  # how likely a cause is; OPEN: not recorded

# Thresholds, and what was measured. "Small": eight real runs of 0.1M parameters, 300 updates (tests/references),
# against the mean of four; "public": a run on FineWeb-Edu that is published with
# its updates (anw-g01/gpt2_124m).
SCATTER = 1.6  # 0.8 to 1.1 in right runs, small and public; 2.9 with a batch of 1/8, at most 1.3 with other mistakes
LEAD = 0.15  # 0.27 with a learning rate x 10, 0.29 without warm-up; 0 with a batch of 1/8, at most 0.1 in right runs
WAVE = 0.25  # below 0.05 in shuffled runs; 0.29 to 0.55 in the first 7,000 public updates, on data in file order
GAP = 0.15  # at most 0.10 in the public run from its 2,000th update on
SAME = 0.3  # the range of the differences, as a share of their mean
STALLED = 0.75  # of the reference's fall; 0.5 for a run that stays at 7.5 where it should be at 4 (nanoGPT #411)
_TOO_HOT = "as with far too high a rate or without warm-up (the curve cannot tell the two apart)"


@dataclass(frozen=True, eq=False)
class Evidence:
    """A run beside its reference: validation losses over tokens, and what the run recorded."""

    curve: Curve
    facts: Facts
    tokens: Column
    losses: Column

    def differences(self) -> Column:
        """Nats above the reference, at the points that it covers."""
        within = np.minimum(self.tokens, self.curve.tokens[-1])
        pairs = [(loss, self.curve.at(t)) for t, loss in zip(within, self.losses, strict=True)]
        return np.array([loss - reference for loss, reference in pairs if math.isfinite(reference)])

    def fall(self) -> float:
        """How far the loss has fallen, as a share of the reference's fall over the same tokens."""
        here = self.curve.at(min(self.tokens[-1], self.curve.tokens[-1]))
        return float((self.curve.loss[0] - self.losses[-1]) / (self.curve.loss[0] - here))

    def scatter(self) -> float:
        """How much the training losses of late single updates scatter, as a multiple of the reference's."""
        late = self.facts.train_losses[len(self.facts.train_losses) // 2 :]
        late = late[np.isfinite(late)]
        if self.curve.scatter is None or len(late) < 32:
            return math.nan
        # Neighbors share the trend, so their difference is noise, sqrt(2) times that of one loss.
        return float(np.median(np.abs(np.diff(late))) / 0.6745 / math.sqrt(2) / self.curve.scatter)

    def gap(self) -> float:
        """Validation loss minus the mean of the newest training losses; NaN while too few are known."""
        newest = self.facts.train_losses[np.isfinite(self.facts.train_losses)][-64:]
        return float(self.losses[-1] - newest.mean()) if len(newest) == 64 else math.nan

    def wave(self) -> float:
        """The largest share that one period has in the training losses' ups and downs around their moving mean."""
        losses = self.facts.train_losses[np.isfinite(self.facts.train_losses)]
        losses = losses[len(losses) // 4 :]
        width = len(losses) // 16 * 2 + 1
        if width < 32:
            return 0.0
        mean = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        power = np.abs(np.fft.rfft(losses[width // 2 : -(width // 2)] - mean)) ** 2
        return float(power.max() / power.sum())


def likeliest_first(evidence: Evidence) -> tuple[str, ...]:
    """What to check, the likeliest cause first. _CHECKS breaks ties: it has the usual cause first."""
    found = [finding for check in _CHECKS if (finding := check(evidence)) is not None]
    texts = tuple(text for _, text in sorted(found, key=lambda finding: -finding[0]))
    return texts or ("all that the record says is the reference's: data (regpt2 verify), device, changed code",)


def _differs(mine: float | None, its: float | None, ratio: float) -> bool:
    """True if both are known and further apart than this ratio."""
    return mine is not None and its is not None and not its / ratio <= mine <= its * ratio


def _open(fact: object, text: str) -> Cause:
    """To check if the record does not have it."""
    return (OPEN, text) if fact is None else None


def _batch(of: Evidence) -> Cause:
    mine, its = of.facts.batch_tokens, of.curve.batch_tokens
    if _differs(mine, its, 1.25):
        return CERTAIN + 0.5, f"batch tokens: {mine:,.0f} an update, the reference has {its:,}"
    if of.facts.ramp_from:
        return CERTAIN + 0.5, f"batch tokens: they grow from {of.facts.ramp_from:,.0f}, the reference's do not"
    if (scatter := of.scatter()) > SCATTER:
        return SYMPTOM + 0.5, (
            f"batch tokens: single updates scatter {scatter:.1f} times as much as the reference's, as those of "
            f"1/{scatter**2:.0f} of its batch would; are micro-steps and ranks all averaged?"
        )
    return _open(mine, f"batch tokens: {its:,} an update")


def _learning_rate(of: Evidence) -> Cause:
    mine, its, differing = of.facts, of.curve.recipe, []
    if _differs(mine.lr, its.get("lr"), 1.25):
        differing.append(f"{mine.lr:.2g}, the reference has {its['lr']:.2g}")
    if _differs(mine.warmup_steps, its.get("warmup_steps"), 1.5):
        differing.append(f"warm-up of {mine.warmup_steps:,.0f} updates, the reference has {its['warmup_steps']:,}")
    if mine.schedule and mine.schedule != its.get("schedule", mine.schedule):
        differing.append(f"schedule {mine.schedule}, the reference has {its['schedule']}")
    if abs((mine.final_lr_fraction or 0) - its.get("final_lr_fraction", mine.final_lr_fraction or 0)) > 0.15:
        differing.append(
            f"it ends at {mine.final_lr_fraction:.0%} of its peak, the reference at {its['final_lr_fraction']:.0%}"
        )
    if differing:
        return CERTAIN + 0.4, f"learning rate: {'; '.join(differing)}"
    if of.fall() < STALLED:
        return SYMPTOM + 0.6, f"learning rate: the loss stands still at {of.losses[-1]:.2f}, {_TOO_HOT}"
    if (lead := -of.differences().min()) > LEAD:
        return SYMPTOM + 0.4, f"learning rate: {lead:.2f} below the reference at first and above it since, {_TOO_HOT}"
    return _open(mine.lr, "learning rate: peak, warm-up and the rate at the end")


def _order(of: Evidence) -> Cause:
    if of.facts.order == "one batch":
        return CERTAIN + 0.6, "data order: every update sees the same batch"
    if (wave := of.wave()) > WAVE:
        return SYMPTOM + 0.4, f"data order: one period makes {wave:.0%} of the training loss's ups and downs; shuffle"
    return _open(of.facts.order, "data order: every window once, and the same for any number of ranks")


def _precision(of: Evidence) -> Cause:
    updates = len(of.facts.train_steps)
    if of.facts.skipped > max(3, updates // 1000):
        return SYMPTOM + 0.3, f"precision: {of.facts.skipped} of {updates:,} updates were skipped as not finite"
    if of.facts.precision == "fp16":
        return HINT, "precision: fp16; compare some updates in fp32"
    return _open(of.facts.precision, "precision: bf16 with fp32 master weights")


def _tokenizer(of: Evidence) -> Cause:
    facts = of.facts
    if facts.dataset not in (None, of.curve.dataset):
        return CERTAIN + 0.9, f"data set: {facts.dataset}, the reference has {of.curve.dataset}"
    its = of.curve.recipe.get("tokenizer", "gpt2")
    if facts.tokenizer not in (None, its):
        return CERTAIN + 1, f"tokenizer: {facts.tokenizer}, the reference has {its}; their losses cannot be compared"
    if of.tokens[0] == 0 and abs(of.losses[0] - of.curve.loss[0]) > 0.5:
        return SYMPTOM + 0.7, (
            f"tokenizer: the loss starts at {of.losses[0]:.2f}, the reference's at {of.curve.loss[0]:.2f} "
            "= ln(vocabulary)"
        )
    if (gap := of.gap()) > GAP:
        return SYMPTOM + 0.6, f"validation set: {gap:.2f} above the training loss; other data, or learned by heart"
    differences = of.differences()
    if len(differences) >= 4 and np.ptp(differences) < SAME * differences.mean():
        return SYMPTOM + 0.5, f"tokenizer or validation set: the same {differences.mean():.2f} above at every point"
    return _open(facts.tokenizer, "tokenizer: GPT-2's, and the same validation set")


def _decay(of: Evidence) -> Cause:
    its = of.curve.recipe.get("weight_decay")
    if _differs(of.facts.weight_decay, its, 1.25):
        return CERTAIN, f"decay groups: weight decay {of.facts.weight_decay:g}, the reference has {its:g}"
    return _open(of.facts.weight_decay, "decay groups: 0.1 for matrices, none for biases and norms")


def _ingredients(of: Evidence) -> Cause:
    off = [name for name in of.curve.recipe.get("ingredients", ()) if of.facts.model.get(name, True) in (False, 0)]
    if off:
        return CERTAIN + 0.8, f"model: without {', '.join(off)}, which the reference has"
    mine, its = of.facts.optimizer, of.curve.recipe.get("optimizer")
    return (CERTAIN + 0.7, f"optimizer: {mine}, the reference has {its}") if mine and its and mine != its else None


def _windows(of: Evidence) -> Cause:
    """Of the curves that state theirs alone: a loss in longer windows is another question."""
    mine, its = of.facts, of.curve.recipe
    if _differs(mine.seq_len, its.get("seq_len"), 1.0):
        return CERTAIN + 0.85, (
            f"windows: sequences of {mine.seq_len:,.0f} tokens, the reference has {its['seq_len']:,}; fewer tokens "
            "before each make it harder to foretell"
        )
    if _differs(mine.window_from, its.get("window_from"), 1.0):
        grows = f"grows from {mine.window_from:,.0f}" if mine.window_from else "does not grow"
        return CERTAIN + 0.4, f"windows: attention's {grows}, the reference's grows from {its['window_from']:,} tokens"
    return None


_CHECKS: tuple[Callable[[Evidence], Cause], ...] = (
    _batch,
    _learning_rate,
    _order,
    _precision,
    _tokenizer,
    _ingredients,
    _windows,
    _decay,
)
