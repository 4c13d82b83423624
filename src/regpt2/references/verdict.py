"""A run compared with a reference. In: a curve, the run's validation losses and facts; out: a Verdict.

Compared at equal tokens. The band is what reruns of one recipe may differ by, half its width being the sum of
  0.02 nats       llm.c's recipe on 10B tokens of FineWeb was published to end at 3.2722 (modded-nanogpt
                  2024-10-13_llmc), 3.2847 (as quoted in tyler-romero/nanogpt-speedrun run.sh) and 3.29 (llm.c #481).
                  Seeds alone do less: 0.0013 at the end over 10 runs (track_3_optimization/results/20260610);
  5 % of tokens   a rerun may reach the same loss that much sooner or later: seeds differ by 1 % of the tokens at first
                  (the same 10 runs), warm-ups of 700 and 715 updates by 2 %. Wide on the steep first part, nothing at
                  the end; once a held learning rate goes down the curve is steep by its schedule, alike in all reruns,
                  and the slope from before that counts;
  3 deviations    over runs, where the curve has them;
  the margin      of a curve that is made by shape, or of a model that differs from ours in details;
  the schedule    where the run is to end elsewhere than the curve: what the two learning rates differ by at these
                  tokens, as a share of the peak, times what the curve falls between equal tokens and equal progress.

The end is compared by progress: a cosine that ends at 10.0B tokens has decayed as far as one that ends at 10.26B. The
projected end is the curve's end plus today's difference. From a quarter of a run on that was off by at most 0.04 nats
among the published runs of one model and length (FineWeb and FineWeb-Edu, either one projected by the other), at a
tenth by 0.11, so it is not reported before a quarter, nor where the lengths differ by more than 10 %.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from regpt2.base.console import count
from regpt2.references import curves
from regpt2.references.causes import Evidence, likeliest_first
from regpt2.references.curves import Curve
from regpt2.references.run_facts import Column, Event, Facts, facts_of
from regpt2.references.scores import references_for

RERUN_NATS, RERUN_TOKENS, DEVIATIONS, SAME_LENGTH, PROJECT_FROM = 0.02, 0.05, 3.0, 0.1, 0.25
NEAR_UNIFORM = 0.5  # nats around ln(vocabulary), the loss of an untrained model


@dataclass(frozen=True)
class Verdict:
    """A run compared with a reference at its newest evaluation."""

    state: str
    """"on track", "above", "better", "too early"; without a curve "no reference" or "too short"."""
    tokens: float
    loss: float
    finished: bool
    difference: float | None = None
    """Nats, run minus reference, at the same tokens."""
    band: float | None = None
    """Nats, half its width here."""
    band_reason: str = ""
    projected_end: float | None = None
    reference_end: float | None = None
    curve: str = ""
    source: str = ""
    by_shape: bool = False
    checks: tuple[str, ...] = ()
    """What to check, the likeliest cause first; empty unless something is off."""
    openai: str = ""
    """The published loss of OpenAI's model of this size on this data."""

    @property
    def worth_saying(self) -> bool:
        """Not before the first point of the curve; without a curve only at the end, or if something looks wrong."""
        return self.state != "too early" and (self.state != "no reference" or self.finished or bool(self.checks))

    def line(self) -> str:
        """One sentence; it begins with the state."""
        if self.difference is None or self.band is None:
            line = self._without_reference()
        else:
            reference = f"{self.loss - self.difference:.4f}" + (" by shape" if self.by_shape else "")
            off = "" if self.state == "on track" else f" by {abs(self.difference):.3f}"
            place = f"{self.loss:.4f}, the reference {reference}"
            line = f"{self.state}{off}{' at the end' * self.finished}: {place} (band {self.band:.3f})"
            if self.projected_end is not None and not self.finished:
                line += f"; projected end {self.projected_end:.3f}, the reference's {self.reference_end:.3f}"
        if self.finished and self.openai:
            line += f"; on this data {self.openai}"
        return line + (f"; check first: {self.checks[0]}" if self.checks else "")

    def _without_reference(self) -> str:
        if self.state == "too early":
            return f"too early to say: {self.loss:.4f} before the first point of {self.curve}"
        if self.state == "too short":
            tokens = count(self.tokens)
            return f"too short to judge: {self.loss:.4f} after {tokens} tokens, fewer than one per parameter"
        rest = "something looks wrong" if self.checks else "what can be checked without one is in order"
        return f"no reference for this model and data: {self.loss:.4f}; {rest}"

    def event(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self) | {"text": self.line()}


def of_record(events: Iterable[Event], choice: str = "auto") -> Verdict | None:
    """The verdict of a run by its record alone; None where nothing was evaluated, or `choice` is "off".

    With "auto" there is none either for a run that began from a model."""
    facts = facts_of(events)
    if facts.init and choice == "auto":  # the curves are of models that began from nothing
        return None
    if choice == "off" or not (facts.batch_tokens and facts.max_steps and len(facts.eval_steps)):
        return None
    curve = curves.choose(choice, facts.dataset, facts.n_params, facts.schedule)
    total_tokens = facts.total_tokens or facts.max_steps * facts.batch_tokens
    return judge(curve, facts.eval_tokens, facts.eval_losses, total_tokens=total_tokens, facts=facts)


def judge(
    curve: Curve | None,
    tokens: Sequence[float] | Column,
    losses: Sequence[float] | Column,
    *,
    total_tokens: float,
    facts: Facts,
) -> Verdict:
    """The verdict at the last of the points (tokens, validation loss); without a curve by the run alone."""
    now, loss = float(tokens[-1]), float(losses[-1])
    by_itself = Verdict("no reference", now, loss, now >= total_tokens, openai=_openai(facts))
    if curve is None:
        short = now < (facts.n_params or 0)
        checks = tuple(self_checks(facts, losses, short=short))
        unjudged = short and by_itself.finished and not checks
        return replace(by_itself, state="too short" if unjudged else "no reference", checks=checks)
    compared = replace(by_itself, curve=curve.name, source=curve.source, by_shape=curve.by_shape)
    end = float(curve.loss[-1]) if _same_length(curve, total_tokens) else None
    last = float(curve.tokens[-1])
    here = last if compared.finished and end is not None else min(now, last)
    if math.isnan(curve.at(here)):
        return replace(compared, state="too early")
    difference = loss - curve.at(here)
    band, reason = band_at(curve, here, total_tokens)
    state = "above" if difference > band else "better" if difference < -band else "on track"
    return replace(
        compared,
        state=state,
        difference=difference,
        band=band,
        band_reason=reason,
        projected_end=end + difference if end is not None and now >= PROJECT_FROM * total_tokens else None,
        reference_end=end,
        checks=likeliest_first(Evidence(curve, facts, np.array(tokens), np.array(losses))) if state == "above" else (),
    )


def band_at(curve: Curve, tokens: float, total_tokens: float) -> tuple[float, str]:
    """Half the width of the band, and its terms; the head of this file gives the reasons."""
    steady, end = tokens, float(curve.tokens[-1])
    if "decay_fraction" in curve.recipe:
        steady = min(tokens, (1 - curve.recipe["decay_fraction"]) * end / 1.1)  # a slope looks 10 % ahead
    terms = {
        "reruns": RERUN_NATS,
        "5 % of tokens": RERUN_TOKENS * curve.slope(steady),
        "the curve's own level": curve.margin,
    }
    if curve.spread is not None:
        deviation = np.interp(math.log(tokens), np.log(curve.tokens[1:]), curve.spread[1:])
        terms["3 deviations over runs"] = DEVIATIONS * float(deviation)
    if not _same_length(curve, total_tokens):
        equal_progress = curve.at(np.clip(tokens * end / total_tokens, curve.tokens[1], end))
        share = abs(_rate_at(curve, tokens / total_tokens) - _rate_at(curve, tokens / end))
        terms["another length"] = share * abs(curve.at(tokens) - equal_progress)
    return sum(terms.values()), " + ".join(f"{nats:.3f} ({why})" for why, nats in terms.items() if nats >= 0.0005)


def _same_length(curve: Curve, total_tokens: float) -> bool:
    return bool(abs(total_tokens / curve.tokens[-1] - 1) <= SAME_LENGTH)


def _rate_at(curve: Curve, progress: float) -> float:
    """The learning rate of the curve's schedule after this part of a run, as a share of its peak; no warm-up."""
    left = max(0.0, 1 - progress)
    if curve.recipe.get("schedule") == "stable_linear":
        way_down: float = curve.recipe["decay_fraction"]
        return min(1.0, left / way_down)
    return 0.5 - 0.5 * math.cos(math.pi * left)


def _openai(facts: Facts) -> str:
    """OpenAI's model of the same size on the same data, or nothing."""
    for reference in references_for("val_loss", "loss", facts.dataset or ""):
        size = reference.model.rsplit(" ", 1)[-1]
        if facts.n_params == curves.N_PARAMS.get(f"gpt2-{size.lower()}"):
            return f"OpenAI's {reference.model} has {reference.value:.4f}"
    return ""


def self_checks(facts: Facts, losses: Sequence[float] | Column, *, short: bool = False) -> list[str]:
    """What looks wrong in a run without a reference. A `short` one is not compared with gzip."""
    found = []
    first = facts.train_losses[0] if len(facts.train_losses) and facts.train_steps[0] == 1 else math.nan
    if facts.vocab_size and abs(first - math.log(facts.vocab_size)) > NEAR_UNIFORM:
        found.append(f"the first loss {first:.3f} is not near ln(vocabulary) = {math.log(facts.vocab_size):.3f}")
    if len(losses) > 2 and losses[-1] > min(losses) + 0.05:
        found.append(
            f"the validation loss has risen from {min(losses):.3f} to {losses[-1]:.3f}: learned by heart, or diverging"
        )
    bits = facts.eval_bits[-1] if len(facts.eval_bits) else math.nan
    if not short and facts.gzip_bits and bits > facts.gzip_bits and facts.eval_steps[-1] == facts.max_steps:
        found.append(f"{bits:.3f} bits per byte, and gzip needs {facts.gzip_bits:.3f}")
    return found
