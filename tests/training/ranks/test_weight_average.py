"""The average of the weights beside one that NumPy keeps; skipped updates; what a checkpoint gives back."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.base.ranks.world import World
from regpt2.config.run import RunConfig
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.lora import LoraConfig
from regpt2.training.optimizer import OptimConfig
from regpt2.training.ranks.weight_average import WeightAverage, decay_of, split_raw

CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=17)
ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
MADE = [1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1]  # which updates were made


def changed(model: GPT, generator: torch.Generator) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)


def arrays(model: GPT) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def test_the_decay_rises_to_its_value() -> None:
    """TensorFlow's (1 + n) / (10 + n): 2/11, 3/12, ..., and 0.9 from n = 80 on."""
    assert [decay_of(0.9, n) for n in (1, 2, 9)] == [float(Fraction(a, b)) for a, b in ((2, 11), (3, 12), (10, 19))]
    assert decay_of(0.9, 79) < 0.9 == decay_of(0.9, 80) == decay_of(0.9, 10_000)
    assert decay_of(0.1, 1) == 0.1


@pytest.mark.parametrize("ema", [0.3, 0.999])
def test_the_average_is_numpys_and_skipped_updates_leave_every_bit(ema: float) -> None:
    model, generator = GPT(CONFIG, seed=1), torch.Generator().manual_seed(0)
    average = WeightAverage(model, ema, ALONE)
    expected = arrays(model)
    for step, made in enumerate(MADE, start=1):
        before = {name: t.clone() for name, t in average.tensors.items()}
        if made:
            changed(model, generator)
            d = min(ema, (1 + step) / (10 + step))
            expected = {name: d * expected[name] + (1 - d) * now for name, now in arrays(model).items()}
        average.take_in(step, torch.tensor(float(made)))
        if not made:
            assert all(torch.equal(before[name], t) for name, t in average.tensors.items())
    for name, p in average.plain().named_parameters():
        assert np.allclose(p.detach().numpy(), expected[name], rtol=0, atol=1e-6), name
    assert average.tensors["wte.weight"].data_ptr() == average.plain().get_parameter("wte.weight").data_ptr()
    assert average.tensors["wte.weight"].dtype == torch.float32


def test_the_weights_that_train_are_not_touched() -> None:
    model = GPT(CONFIG, seed=1)
    average = WeightAverage(model, 0.5, ALONE)
    changed(model, torch.Generator().manual_seed(0))
    before = arrays(model)
    average.take_in(1, torch.tensor(1.0))
    with torch.no_grad():
        for p in average.plain().parameters():
            p.zero_()
    assert all(np.array_equal(before[name], now) for name, now in arrays(model).items())


def test_the_window_of_training_is_that_of_the_average() -> None:
    model = GPT(CONFIG, seed=1)
    average = WeightAverage(model, 0.5, ALONE)
    model.set_window(3)
    model.trained_seq_len = 2
    assert average.plain().window == 3
    assert not average.plain().training or model.training


def test_a_checkpoint_gives_both_back() -> None:
    model = GPT(CONFIG, seed=1)
    average = WeightAverage(model, 0.9, ALONE)
    changed(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.wte.weight[CONFIG.vocab_size :] = 0  # as it is in training: padding has no gradient
    average.take_in(1, torch.tensor(1.0))
    held = {name: t.clone() for name, t in {**average.raw(), "wte.weight/exp_avg": torch.ones(3)}.items()}
    saved = {name: t.clone() for name, t in tensors_of(average.plain()).items()}
    moments, raw = split_raw(held)
    assert list(moments) == ["wte.weight/exp_avg"]

    other = GPT(CONFIG, seed=2)
    resumed = WeightAverage(other, 0.9, ALONE)
    resumed.load(saved, raw, Path("there"))
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in model.named_parameters())
    assert all(torch.equal(t, resumed.tensors[name]) for name, t in average.tensors.items())

    with pytest.raises(CheckpointError, match=r"there has no raw weight wte\.weight of shape \[64, 8\] \(got none\)"):
        resumed.load(saved, {}, Path("there"))
    with pytest.raises(CheckpointError, match=r"no raw weight ln_f\.weight of shape \[8\] \(got \[3\]\)"):
        resumed.load(saved, raw | {"ln_f.weight": torch.ones(3)}, Path("there"))


@pytest.mark.parametrize("ema", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_of_0_to_1_is_refused(ema: float) -> None:
    with pytest.raises(ConfigError, match=r"optim\.ema = .* must be at least 0 \(no average\) and below 1"):
        OptimConfig(ema=ema)


def test_adapters_have_no_average() -> None:
    with pytest.raises(ConfigError, match=r"optim\.ema = 0\.9 averages all weights, and with lora\.rank only adapters"):
        RunConfig(optim=OptimConfig(ema=0.9), lora=LoraConfig(rank=4))
