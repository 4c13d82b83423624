"""The verb explore: counts add up, statistics are those of the tensors, pictures are pictures."""

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from regpt2.config import load_recipe
from regpt2.explore import describe, main
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.load import LoadedModel, TokenizerRef, Vocabulary, tensors_of
from regpt2.model.weights import native

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=257)


def test_every_tensor_has_a_line_with_its_figures() -> None:
    model = GPT(CONFIG)
    text = describe(LoadedModel(model, TokenizerRef("bytes", "f" * 64), "here", step=1200))
    assert text.startswith(
        "here, step 1,200: GPT-2 with 2 layers, 2 heads, 16 wide, 32 positions, 257 tokens (tokenizer bytes)\n"
    )
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    for name, tensor in tensors_of(model).items():
        x = tensor.double().numpy()
        figures = [f"{value:.4f}" for value in (x.mean(), x.std(), x.min(), x.max())]
        shape = " x ".join(str(size) for size in x.shape)
        assert lines[name].split(shape, 1)[1].split() == [f"{x.size:,}", *figures]
    assert "257 x 16" in lines["wte.weight"]  # without padding


@pytest.mark.parametrize("recipe", ["gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1558m"])
def test_parts_add_up_to_the_whole(recipe: str) -> None:
    """By hand, with L layers of width C: attention 4 C^2 + 4 C, MLP 8 C^2 + 5 C, norms 4 C, and one norm at the end."""
    config = load_recipe(recipe).model
    L, C = config.n_layer, config.n_embd
    parts = {
        "token embeddings = head": 50257 * C,
        "position embeddings": 1024 * C,
        "attention": L * (4 * C * C + 4 * C),
        "MLP": L * (8 * C * C + 5 * C),
        "LayerNorm": (4 * L + 2) * C,
    }
    from regpt2.explore import _parts

    with torch.device("meta"):
        model = GPT(config)
        lines = _parts(tensors_of(model))
    for line, (part, n) in zip(lines, parts.items(), strict=False):
        assert line.startswith(part) and f" {n:,} " in line
    assert lines[5].split() == ["total", f"{model.n_params():,}"]
    assert sum(parts.values()) == model.n_params()
    assert "tied" in lines[-1]


@pytest.mark.parametrize("n_embd", [16, 320])
def test_pictures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], n_embd: int) -> None:
    config = GPTConfig(n_layer=1, n_head=2, n_embd=n_embd, block_size=32, vocab_size=257)
    native.write(GPT(config), tmp_path, Vocabulary("bytes", "f" * 64))
    assert main([str(tmp_path), "--pictures", str(tmp_path / "pictures")]) == 0
    for name in ("wpe.png", "wte.png"):
        picture = imread(tmp_path / "pictures" / name)
        assert picture.shape[0] > 300 and picture.shape[1] > 600
        assert picture.std() > 0.05  # not blank
    assert "wpe.png and wte.png are written." in capsys.readouterr().out
