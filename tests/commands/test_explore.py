"""The verb explore: figures are those of the tensors, attention is the model's own, the page is whole and harmless."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font
from matplotlib.image import imread
from matplotlib.textpath import TextPath
from torch import Tensor

from regpt2.base.errors import CheckpointError, UsageError
from regpt2.commands.explore import explore, main
from regpt2.config.recipe_files import load_recipe
from regpt2.data.tokenizer import load_tokenizer
from regpt2.exploring.measure import all_attention_weights, attention_weights, habits_of, neighbors, parts
from regpt2.exploring.page import write_page
from regpt2.exploring.pictures import drawable, head_picture, heads_picture, wpe_picture
from regpt2.exploring.terminal import describe
from regpt2.model.architecture import build_model
from regpt2.model.files.contract import TokenizerRef, Vocabulary
from regpt2.model.files.fill_model import tensors_of
from regpt2.model.files.load import LoadedModel
from regpt2.model.gpt import GPT, CausalSelfAttention, GPTConfig
from regpt2.model.language_model import LanguageModel
from regpt2.model.modern import ModernConfig
from regpt2.model.weights import huggingface, native

CONFIG = GPTConfig(n_layer=2, n_head=4, n_embd=16, block_size=32, vocab_size=257)
BYTES = TokenizerRef("bytes", load_tokenizer("bytes").fingerprint)
HOSTILE = "<script>alert(1)</script>\"'><img src=x>\u202e\x1b[2J{0}$\\frac$"


def sharp(config: GPTConfig = CONFIG) -> LanguageModel:
    """An untrained model with weights so large that its heads have preferences."""
    model = build_model(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10.0)
    return model


def test_every_tensor_has_a_line_with_its_figures() -> None:
    model = GPT(CONFIG)
    text = describe(explore(LoadedModel(model, BYTES, "here", step=1200)))
    assert text.startswith(
        "here: step 1,200: GPT-2 with 2 layers, 4 heads, 16 wide, 32 positions, 257 tokens (tokenizer bytes)\n"
    )
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    for name, tensor in tensors_of(model).items():
        x = tensor.double().numpy()
        figures = [f"{value:.4f}" for value in (x.mean(), x.std(), np.sqrt((x * x).sum()), x.min(), x.max())]
        shape = " x ".join(str(size) for size in x.shape)
        assert lines[name].split(shape, 1)[1].split() == [f"{x.size:,}", *figures]
        assert len(lines[name]) <= 120
    assert "257 x 16" in lines["wte.weight"]  # without padding


@pytest.mark.parametrize("recipe", ["gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1558m"])
def test_parts_add_up_to_the_whole(recipe: str) -> None:
    """By hand, with L layers of width C: attention 4 C^2 + 4 C, MLP 8 C^2 + 5 C, norms 4 C, and one norm at the end."""
    config = load_recipe(recipe).model
    L, C = config.n_layer, config.n_embd
    with torch.device("meta"):
        model = GPT(config)
    assert parts(tensors_of(model)) == {
        "token embeddings": 50257 * C,
        "position embeddings": 1024 * C,
        "attention": L * (4 * C * C + 4 * C),
        "MLP": L * (8 * C * C + 5 * C),
        "norms": (4 * L + 2) * C,
    }
    assert sum(parts(tensors_of(model)).values()) == model.n_params()


def test_attention_weights_are_those_that_the_model_uses() -> None:
    """Times v, through c_proj, they give what each attention of the model gave in its own forward pass."""
    model, ids = sharp(), torch.randint(257, (20,), generator=torch.Generator().manual_seed(1))
    seen: list[tuple[Tensor, Tensor]] = []
    for block in model.h:
        block.attn.register_forward_hook(lambda _, given, gave: seen.append((given[0], gave)))
    with torch.no_grad():
        model(ids[None])
        used = seen[:]
        weights = all_attention_weights(model, ids)
        assert weights.shape == (2, 4, 20, 20)
        assert weights.std() > 0.1, "the heads have preferences, or the test could not fail"
        for layer, (given, gave) in enumerate(used):
            attn = model.h[layer].attn
            v = attn.c_attn(given)[0, :, 32:].view(20, 4, 4).transpose(0, 1)  # (H, T, D)
            gathered = (weights[layer] @ v).transpose(0, 1).reshape(20, 16)
            torch.testing.assert_close(attn.c_proj(gathered), gave[0], rtol=1e-4, atol=1e-4)  # another order of sums
            torch.testing.assert_close(attention_weights(attn, given), weights[layer])
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, 20))
    assert not weights.triu(1).any()


@pytest.mark.parametrize(
    "switches",
    [{}, {"rotary": False}, {"qk_norm": False}, {"half_rotary": True}, {"window": 5}, {"document_mask": True}],
    ids=str,
)
def test_attention_weights_of_a_modern_model_are_those_that_it_uses(switches: dict[str, bool]) -> None:
    """As above: times v, through c_proj, what each attention gave."""
    config = ModernConfig(n_layer=2, n_head=4, n_embd=16, block_size=32, vocab_size=257, zero_init=False, **switches)
    model, ids = sharp(config), torch.randint(257, (20,), generator=torch.Generator().manual_seed(1))
    ids[8] = 256  # where a document begins
    weights = all_attention_weights(model, ids)
    used: list[tuple[Tensor, Tensor]] = []
    for block in model.h:
        block.attn.register_forward_hook(lambda _, given, gave: used.append((given[0], gave)))
    with torch.no_grad():
        model(ids[None])
        even = torch.ones(20, 20).tril() / torch.arange(1, 21)[:, None]
        assert (weights - even).abs().max() > 0.1, "the heads have preferences, or the test could not fail"
        for layer, (given, gave) in enumerate(used):
            attn = model.h[layer].attn
            v = attn.c_attn(given)[0, :, 32:].view(20, 4, 4).transpose(0, 1)  # (H, T, D)
            gathered = (weights[layer] @ v).transpose(0, 1).reshape(20, 16)
            torch.testing.assert_close(attn.c_proj(gathered), gave[0], rtol=1e-4, atol=1e-4)  # another order of sums


def test_a_block_without_attention_has_a_map_of_zeros_in_its_place() -> None:
    config = ModernConfig(n_layer=3, n_head=2, n_embd=16, block_size=32, vocab_size=257, mlp_only_layer=1)
    weights = all_attention_weights(sharp(config), torch.arange(9))
    assert weights.shape == (3, 2, 9, 9)
    assert weights.sum(dim=(1, 2, 3)).tolist() == pytest.approx([18.0, 0.0, 18.0])
    assert {habit.layer for habit in habits_of(weights, list(range(9)))} <= {0, 2}


@pytest.mark.seconds
def test_attention_of_a_class_of_its_own_is_not_drawn_as_gpt2s() -> None:
    class OwnAttention(CausalSelfAttention):
        pass

    model = GPT(CONFIG)
    model.h[1].attn = OwnAttention(CONFIG)
    with pytest.raises(UsageError, match="this model's is a OwnAttention"):
        all_attention_weights(model, torch.arange(9))


def test_what_a_modern_model_has_not_is_said(tmp_path: Path) -> None:
    model = build_model(ModernConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=257))
    found = explore(LoadedModel(model, BYTES, "here"))
    assert sum(found.parts.values()) == model.n_params()
    assert found.parts["head"] == found.parts["token embeddings"] == 257 * 16
    text = describe(found)
    assert "modern GPT with 2 layers, 2 heads" in text.splitlines()[0]
    assert text.splitlines()[0].endswith("rotary, qk_norm, relu_squared, zero_init, untied_head, rms_norm, softcap")
    assert "wpe: none. Positions are in attention instead" in text
    assert "The head has weights of its own" in text
    write_page(found, tmp_path)
    html = (tmp_path / "explore.html").read_text()
    assert "There are none. Positions are in attention" in html
    assert "last vector into logits" not in html
    assert not (tmp_path / "wpe.png").exists()


def test_the_head_of_each_habit_is_found() -> None:
    """Made-up heads that do one thing only; a b c a b c: what followed the second a is b, at place 1."""
    ids = [5, 6, 7, 5, 6, 7]
    places = {"previous": [0, 0, 1, 2, 3, 4], "first": [0] * 6, "self": [*range(6)], "repeat": [0, 0, 0, 1, 2, 3]}
    weights = torch.full((2, 3, 6, 6), 1 / 6)
    spots = {"previous": (0, 2), "first": (1, 0), "self": (1, 1), "repeat": (1, 2)}
    for name, (layer, head) in spots.items():
        weights[layer, head] = torch.eye(6)[places[name]]
    found = {habit.name: habit for habit in habits_of(weights, ids)}
    assert {name: (habit.layer, habit.head) for name, habit in found.items()} == spots
    assert all(habit.share == pytest.approx(1) for habit in found.values())
    assert found["previous"].even_share == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6]))
    assert found["repeat"].even_share == pytest.approx(np.mean([1 / 4, 1 / 5, 1 / 6]))
    assert {habit.name for habit in habits_of(weights[..., :3, :3], [1, 2, 3])} == {"previous", "first", "self"}
    assert habits_of(torch.ones(1, 1, 1, 1), [1]) == []


@pytest.mark.parametrize(("name", "word", "token"), [("bytes", "e", 101), ("gpt2", " king", 5822)])
def test_neighbors_are_the_largest_cosines(name: str, word: str, token: int) -> None:
    tokenizer = load_tokenizer(name)
    wte = torch.randn(tokenizer.vocab_size, 8, generator=torch.Generator().manual_seed(3))
    wte[200], wte[201] = 3 * wte[token] + 0.1, 0  # one token longer, and nearly the same way; one of no length
    (row,) = neighbors(wte, tokenizer, [word])
    x = wte.double().numpy()
    cosines = x @ x[token] / np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(x[token]), 1e-12)
    best = [i for i in np.argsort(-cosines) if i != token][:5]
    assert best[0] == 200 and row.token == word.replace(" ", "␣")
    assert [cosine for _, cosine in row.nearest] == pytest.approx(cosines[best], abs=1e-6)
    assert row.nearest[0][0] == {"bytes": "\\xc8", "gpt2": "\\x0c"}[name]


def test_what_is_no_token_is_refused_with_its_pieces() -> None:
    loaded = LoadedModel(GPT(CONFIG), BYTES, "here")
    with pytest.raises(UsageError, match=r"' it' is 3 tokens of 'bytes', expected one: ' ', 'i', 't'"):
        explore(loaded, [" it"])
    with pytest.raises(UsageError, match="--prompt is empty"):
        explore(loaded, prompt="")


def test_positions_that_change_smoothly_are_told_from_noise() -> None:
    noise = GPT(CONFIG)
    waves = GPT(CONFIG)
    angles = torch.arange(32)[:, None] / torch.linspace(5, 40, 16)
    waves.wpe.weight.data = angles.sin()
    assert abs(explore(LoadedModel(noise, BYTES, "noise")).smoothness) < 0.3
    assert explore(LoadedModel(waves, BYTES, "waves")).smoothness > 0.95


class Page(HTMLParser):
    """What is on a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.seconds
def test_page_holds_every_picture_in_light_and_dark_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    write_page(explore(LoadedModel(sharp(), BYTES, HOSTILE), ["e", "<", "\n"], HOSTILE), tmp_path)
    text = (tmp_path / "explore.html").read_text(encoding="utf-8")
    page = Page(text)
    files = {path.read_bytes() for path in tmp_path.glob("*.png")}
    shown = [base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,")) for image in page.all("img")]
    dark = [base64.b64decode(str(source["srcset"]).split(",")[1]) for source in page.all("source")]
    assert set(shown) == files and len(files) == len(dark) == 8
    for a, b in zip(shown, dark, strict=True):
        light_picture, dark_picture = imread(io.BytesIO(a)), imread(io.BytesIO(b))
        assert light_picture.shape == dark_picture.shape and min(light_picture.shape[:2]) > 300
        assert light_picture.std() > 0.02 and light_picture[0, 0, 0] > 0.9 > 0.2 > dark_picture[0, 0, 0]
    assert all(image["alt"] and image["width"] for image in page.all("img"))
    assert [len(page.all(tag)) for tag in ("h1", "h2", "script", "link", "iframe")] == [1, 4, 0, 0, 0]
    assert "http" not in re.sub(r"base64,[^\"]*|http-equiv", "", text) and "default-src 'none'" in text
    assert "\x1b" not in text and "\u202e" not in text
    assert "&lt;script&gt;alert(1)" in text and 'translate="no">&lt;</span>' in text and ">\\n</span>" in text
    assert all("tabindex" in box for box in page.all("div") if box.get("class") == "scroll")
    assert {"scope"} == set().union(*page.all("th"))


@pytest.mark.seconds
@pytest.mark.parametrize("block_size", [1, 8])
def test_a_tiny_model_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], block_size: int) -> None:
    config = GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=block_size, vocab_size=257)
    huggingface.write(GPT(config), tmp_path, Vocabulary(BYTES.name, BYTES.fingerprint))
    assert main([str(tmp_path), "--tokens", "e", "--prompt", "aaaa", "--out", str(tmp_path / "look")]) == 0
    printed = capsys.readouterr().out
    assert f"attention in {'4 tokens: a a a a' if block_size == 8 else 'the first 1 of 4 tokens: a'}\n" in printed
    assert f"Wrote {tmp_path / 'look' / 'explore.html'}" in printed
    assert (tmp_path / "look" / "attention_previous.png").exists() == (block_size > 1)


def test_a_model_of_an_unknown_tokenizer_is_explored_without_its_tokens(tmp_path: Path) -> None:
    loaded = LoadedModel(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=300)), None, "here")
    found = explore(loaded)
    assert "left out. here does not say which tokenizer" in describe(found)
    write_page(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"explore.html", "wpe.png", "wpe_channels.png", "wte.png"}
    assert (tmp_path / "explore.html").read_text(encoding="utf-8").count("does not say which tokenizer") == 2
    with pytest.raises(CheckpointError, match="does not say which tokenizer"):
        explore(loaded, prompt="a")


def test_a_diverged_model_is_described_and_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GPT(CONFIG)
    model.ln_f.weight.data[3] = float("nan")
    native.write(model, tmp_path, Vocabulary(BYTES.name, BYTES.fingerprint))
    with pytest.raises(CheckpointError, match=r"not every value is finite in ln_f\.weight; nothing is drawn"):
        main([str(tmp_path), "--out", str(tmp_path / "look")])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ln_f.weight"))
    assert "nan" in line and not (tmp_path / "look").exists()


def test_every_letter_of_a_label_is_in_the_font() -> None:
    font = FT2Font(findfont(FontProperties(family="DejaVu Sans")))
    known = font.get_charmap()
    letters = [chr(i) for i in range(0x11000) if not 0xD800 <= i < 0xE000]
    labels = {letter: drawable(letter) for letter in letters}
    assert all(ord(drawn) in known and drawn.isprintable() for label in labels.values() for drawn in label)
    assert len(set(labels.values())) == len(labels), "no two letters have one label"
    assert drawable("ключ") == "ключ" and drawable("é語") == "é\\u8a9e" and drawable("\x01") == "\\x01"
    assert len(drawable("語" * 9)) == 12


@pytest.mark.seconds
def test_labels_of_bytes_stand_apart_and_are_not_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters, a newline, and bytes that are no character by themselves: 32 of them, the most that a map shows."""
    seen: list[Any] = []
    save = Figure.savefig

    def look(self: Figure, *given: Any, **how: Any) -> None:
        save(self, *given, **how)  # also lays it out
        seen.append(self)

    monkeypatch.setattr(Figure, "savefig", look)
    found = explore(LoadedModel(sharp(), BYTES, "here"), prompt="naïve, café\nключ 漢字 \x01\x7f")
    assert found.attention is not None
    head_picture(found.attention.weights[0, 0], found.attention.tokens, "a head")
    axes = seen[0].axes[0]
    for labels, side in ((axes.get_xticklabels(), "x"), (axes.get_yticklabels(), "y")):
        texts = [label.get_text() for label in labels]
        assert texts == found.attention.tokens and {"n", "\\xc3", "\\n", "␣"} <= set(texts)
        places = [getattr(label.get_window_extent(), f"{side}0") for label in labels]
        cell = (places[-1] - places[0]) / (len(labels) - 1)
        for label in labels:  # as wide or as high as its ink
            size = label.get_fontsize() * seen[0].dpi / 72
            ink = TextPath((0, 0), label.get_text(), size=size, prop=FontProperties(family="DejaVu Sans")).get_extents()
            assert (ink.width if side == "x" and not label.get_rotation() else ink.height) < abs(cell)
        assert min(label.get_fontsize() for label in labels) >= 7
        upright = [label.get_rotation() == 0 for label in labels]
        assert upright == [len(text) == 1 or side == "y" for text in texts]


def test_the_maps_of_heads_stand_in_their_layer_and_head() -> None:
    weights = np.full((2, 3, 4, 4), 0.01, dtype=np.float32)
    weights[1, 2, :, 0] = 1
    picture = heads_picture(weights)
    gray = imread(io.BytesIO(picture.light))[..., :3].sum(axis=2)
    rows, columns = np.nonzero(gray < gray.min() + 0.05)
    height, width = gray.shape
    assert 0.5 * height < rows.min() and 0.6 * width < columns.min()
    assert picture.light == heads_picture(weights).light != picture.dark


def test_colors_are_the_sign_of_a_value() -> None:
    wpe = np.array([[1, 1], [-1, -1]], dtype=np.float32)
    pixels = imread(io.BytesIO(wpe_picture(wpe).light))
    above, below = (pixels[int(part * len(pixels)), pixels.shape[1] // 2] for part in (0.25, 0.7))
    assert above[2] > above[0] and below[0] > below[2]  # blue for positive, red for negative
