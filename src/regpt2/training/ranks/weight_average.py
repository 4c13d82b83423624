"""An exponential average of the weights. In: the weights after each update; out: the average, which is the model.

After update n, counted from 1: average = d x average + (1 - d) x weights, with d = min(ema, (1 + n) / (10 + n)). At
first the average is the weights that the run begins with. The rising decay, which is that of TensorFlow's
ExponentialMovingAverage, soon forgets them: with a constant decay of 0.999 they would weigh 0.37 after 1,000 updates,
with this one less than 1e-8. A function of the step alone, it needs nothing in a checkpoint.

The average is fp32 and lies on the weights' device, in shards where they do. Training continues from the weights
themselves ("raw" in a checkpoint).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from regpt2.base.errors import CheckpointError
from regpt2.base.ranks.world import World
from regpt2.model.language_model import LanguageModel
from regpt2.training.ranks.strategy import is_sharded, local, plain_copy, shard_like

RAW = "raw"  # the kind of a raw weight beside the moments: NAME/raw


def decay_of(ema: float, step: int) -> float:
    """The decay of the average after update `step`, from 1."""
    return min(ema, (1 + step) / (10 + step))


class WeightAverage:
    """The average of the weights of `model`, which may lie in shards. Make it once they have their first values."""

    def __init__(self, model: LanguageModel, ema: float, world: World) -> None:
        self._model, self._ema, self._world = model, ema, world
        self._averaged = None if is_sharded(model) else plain_copy(model, world)
        self.tensors: dict[str, Tensor] = (
            {name: p.detach().clone() for name, p in model.named_parameters()}
            if self._averaged is None
            else {name: p.detach() for name, p in self._averaged.named_parameters()}
        )
        """By parameter name; shards where the weights are shards."""

    @torch.no_grad()
    def take_in(self, step: int, accepted: Tensor) -> None:
        """After update `step`. The average of a skipped one does not change; nothing waits for the device.

        Args:
            accepted: 1 if the update was made, else 0; a scalar on the device.
        """
        share = (1 - decay_of(self._ema, step)) * accepted.float()
        for name, p in self._model.named_parameters():
            average = local(self.tensors[name])
            average.lerp_(local(p), share.to(average.dtype))

    def plain(self) -> LanguageModel:
        """The average as a plain model on every rank: its own weights, or gathered from shards. All ranks ask."""
        if self._averaged is None:
            return plain_copy(self._model, self._world, self.tensors)
        if self._averaged.window != self._model.window:
            self._averaged.set_window(self._model.window)
        return self._averaged.train(self._model.training)

    def raw(self) -> dict[str, Tensor]:
        """The raw weights for the optimizer's file, as `NAME/raw`; not copied."""
        return {f"{name}/{RAW}": p.detach() for name, p in self._model.named_parameters()}

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor], raw: Mapping[str, Tensor], source: Path) -> None:
        """Restore the average and the raw weights from whole tensors, as a checkpoint has them.

        Args:
            averages: without the padding of the vocabulary, which is zero.

        Raises:
            CheckpointError: a raw weight is missing, or has another shape.
        """
        for name, p in self._model.named_parameters():
            if name not in raw or raw[name].shape != p.shape:
                got = list(raw[name].shape) if name in raw else "none"
                raise CheckpointError(
                    f"{source} has no raw weight {name} of shape {list(p.shape)} (got {got}), from which a run with "
                    "optim.ema resumes; use another --run folder."
                )
            p.copy_(shard_like(raw[name].to(p.device), p))
            average = averages[name]
            if padding := p.shape[0] - average.shape[0]:
                average = torch.cat([average, average.new_zeros(padding, *average.shape[1:])])
            self.tensors[name].copy_(shard_like(average.to(p.device), p))


def split_raw(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of an optimizer's file as moments, by `NAME/kind`, and raw weights, by name."""
    raw = {key.rpartition("/")[0]: t for key, t in tensors.items() if key.endswith(f"/{RAW}")}
    return {key: t for key, t in tensors.items() if not key.endswith(f"/{RAW}")}, raw
