"""Both forms of GELU: a model is read, written and trained with its own; a file that does not say which is named."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpt import EXACT, SHAPES, batch, gradient_differences, random_gpt, transformers_twin
from test_weights_foreign import object_of_script
from test_weights_shelf import BOTH_WAYS, unpickle_here, written
from torch import Tensor, nn
from torch.nn import functional as F

from regpt2.base.errors import CheckpointError, ConfigError, UsageError
from regpt2.base.record.metrics import read_events
from regpt2.commands.convert import ConvertOptions, convert
from regpt2.config.recipe_files import load_recipe
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.kernels.activation import Activation
from regpt2.model.modern import ModernConfig
from regpt2.model.weights import huggingface, native
from regpt2.run.loop import train

TANH = SHAPES[2]  # as EXACT, but for the form of GELU
SAYS_WHICH = ["huggingface", "nanogpt", "native", "safetensors"]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(batch(EXACT)[0])
    return found


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# --- transformers ---


def test_a_model_of_transformers_with_the_exact_gelu_is_that_model(tmp_path: Path) -> None:
    twin = transformers_twin(random_gpt(EXACT))
    twin.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["activation_function"] == "gelu"
    loaded = load_model(tmp_path).model
    assert loaded.config.activation == "gelu"
    with torch.no_grad():
        assert relative(logits(loaded), twin(batch(EXACT)[0]).logits) < 2e-6  # fp32 sums in another order
    assert max(gradient_differences(loaded, twin).values()) < 1e-4


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        *((name, "gelu_tanh") for name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")),
        *((name, "gelu") for name in ("gelu", "gelu_python")),
    ],
)
def test_every_name_of_transformers_for_a_form_of_gelu_is_that_form(
    tmp_path: Path, name: str, activation: Activation
) -> None:
    """By their own functions: the two forms are 1e-4 apart there, and roundings some 1e-6."""
    from transformers.activations import get_activation

    x = torch.linspace(-4, 4, 1000)
    ours = F.gelu(x, approximate=replace(TANH, activation=activation).gelu_form)
    assert (get_activation(name)(x) - ours).abs().max() < 1e-5
    huggingface.write(random_gpt(TANH), tmp_path, None)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {"activation_function": name}))
    assert load_model(tmp_path).model.config.activation == activation


# --- nanoGPT ---


class TheirBlock(nn.Module):
    """A block by torch's own layers, with the names that nanoGPT has."""

    def __init__(self, C: int, n_head: int, gelu: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "gelu": gelu, "c_proj": nn.Linear(4 * C, C)})
        self.n_head = n_head

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attn["c_attn"](self.ln_1(x)).unflatten(-1, (3 * self.n_head, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=1)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        seen = torch.ones_like(scores[0, 0]).tril().bool()
        y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        x = x + self.attn["c_proj"](y.transpose(1, 2).flatten(2))
        after: Tensor = x + self.mlp["c_proj"](self.mlp["gelu"](self.mlp["c_fc"](self.ln_2(x))))
        return after


class TheirGPT(nn.Module):
    """nanoGPT's modules, as far as the names in its checkpoints show them."""

    def __init__(self, config: GPTConfig, gelu: nn.Module) -> None:
        super().__init__()
        blocks = nn.ModuleList(TheirBlock(config.n_embd, config.n_head, gelu) for _ in range(config.n_layer))
        wte, wpe = nn.Embedding(config.vocab_size, config.n_embd), nn.Embedding(config.block_size, config.n_embd)
        self.transformer = nn.ModuleDict({"wte": wte, "wpe": wpe, "h": blocks, "ln_f": nn.LayerNorm(config.n_embd)})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = wte.weight
        for p in self.parameters():
            nn.init.normal_(p, std=0.2)

    def forward(self, ids: Tensor) -> Tensor:
        parts = self.transformer
        x = parts["wte"](ids) + parts["wpe"].weight[: ids.shape[1]]
        for block in parts["h"]:  # type: ignore[union-attr]
            x = block(x)
        found: Tensor = self.lm_head(parts["ln_f"](x))
        return found


def arguments(**changed: Any) -> dict[str, Any]:
    sizes = {name: getattr(EXACT, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    return sizes | {"bias": True, "dropout": 0.0} | changed


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TheirGPT:
    """A model with the exact GELU, and its checkpoint in ckpt.pt."""
    unpickle_here(monkeypatch)
    torch.manual_seed(0)
    model = TheirGPT(EXACT, nn.GELU())
    torch.save({"model": model.state_dict(), "model_args": arguments()}, tmp_path / "ckpt.pt")
    return model


def test_a_checkpoint_of_nanogpt_gives_its_logits_and_gradients(tmp_path: Path, theirs: TheirGPT) -> None:
    model, (ids, targets) = load_model(tmp_path / "ckpt.pt").model, batch(EXACT)
    assert relative(logits(model), logits(theirs)) < 2e-6  # fp32 sums in another order
    model(ids, targets).backward()
    F.cross_entropy(theirs(ids).flatten(0, 1), targets.flatten()).backward()
    found, expected = dict(model.named_parameters()), dict(theirs.transformer.named_parameters())
    for name, p in expected.items():
        got, wanted = found[name].grad, p.grad
        assert got is not None and wanted is not None
        assert (got[: len(wanted)] - wanted).abs().max() < 1e-4 * wanted.abs().max(), name


def test_in_doubt_nanogpts_exact_gelu_is_taken_aloud_and_can_be_chosen(
    tmp_path: Path, theirs: TheirGPT, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ckpt.pt"
    assert load_model(path).model.config.activation == "gelu"
    said = capsys.readouterr().err
    assert f"{path} does not say which GELU it has: the exact one is taken" in said
    assert f"give {path}:gelu_tanh as MODEL" in said
    older = load_model(f"{path}:gelu_tanh")
    assert (older.model.config.activation, older.source) == ("gelu_tanh", f"{path}:gelu_tanh")
    assert 1e-5 < relative(logits(older.model), logits(theirs)) < 1e-1
    assert load_model(f"{path}:gelu").model.config.activation == "gelu"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("writer", ["nanogpt of 2022", "an export of ours from before", "build-nanogpt"])
def test_writers_that_had_only_the_tanh_form_are_known(
    tmp_path: Path, theirs: TheirGPT, writer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint: dict[str, Any] = {"model": theirs.state_dict(), "model_args": arguments()}
    if writer == "nanogpt of 2022":
        del checkpoint["model_args"]["bias"]
    elif writer == "build-nanogpt":
        config = object_of_script("GPTConfig", monkeypatch)
        config.__dict__.update(arguments())
        checkpoint = {"model": theirs.state_dict(), "config": config}
    else:
        checkpoint |= {"tokenizer": "bytes", "tokenizer_fingerprint": "f" * 64}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert load_model(tmp_path / "ckpt.pt").model.config.activation == "gelu_tanh"
    assert "GELU" not in capsys.readouterr().err


def test_a_file_that_says_which_and_is_used_with_the_other_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native.write(random_gpt(EXACT), tmp_path, None)
    assert load_model(f"{tmp_path}:gelu_tanh").model.config.activation == "gelu_tanh"
    assert f"{tmp_path} has activation = 'gelu'; using 'gelu_tanh' instead" in capsys.readouterr().err
    (tmp_path / "a:gelu").mkdir()
    native.write(random_gpt(TANH), tmp_path / "a:gelu", None)
    assert load_model(tmp_path / "a:gelu").model.config.activation == "gelu_tanh"  # a folder of that name
    with pytest.raises(UsageError, match=r"MODEL = '.*:gelu_tahn' does not exist"):
        load_model(f"{tmp_path}:gelu_tahn")


# --- formats ---


@pytest.mark.parametrize("config", [EXACT, TANH], ids=["exact", "tanh"])
@pytest.mark.parametrize("name", SAYS_WHICH)
def test_a_format_that_says_which_gives_back_the_same_logits(
    tmp_path: Path, name: str, config: GPTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpickle_here(monkeypatch)
    model, place = written(tmp_path, name, config)
    loaded = load_model(place).model
    assert loaded.config.activation == config.activation
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("to", "config", "theirs"), [("llmc", EXACT, "gelu_tanh"), ("gguf", EXACT, "gelu_tanh"), ("nanogpt", TANH, "gelu")]
)
def test_a_format_whose_readers_compute_the_other_form_is_refused(
    tmp_path: Path, to: str, config: GPTConfig, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the weights where the user says that they are for that form, and then holds that model."""
    unpickle_here(monkeypatch)
    monkeypatch.delattr(huggingface, "client_logits")
    monkeypatch.delattr(BOTH_WAYS["gguf"], "client_logits")
    (tmp_path / "a").mkdir()
    native.write(random_gpt(config), tmp_path / "a", None)
    with pytest.raises(UsageError) as caught:
        convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to=to))
    said = str(caught.value)
    assert f"--to {to}: programs that read this format compute GELU as {theirs!r}" in said
    assert "Formats that record the form: huggingface, native, onnx, safetensors." in said
    assert f"give {tmp_path / 'a'}:{theirs} as SOURCE" in said
    assert not (tmp_path / "b").exists()
    assert convert(ConvertOptions(f"{tmp_path / 'a'}:{theirs}", tmp_path / "b", to=to)) == 0
    written_model = load_model(tmp_path / "b").model
    assert written_model.config.activation == theirs
    assert torch.equal(logits(written_model), logits(load_model(f"{tmp_path / 'a'}:{theirs}").model))


def test_what_nanogpt_computes_with_our_export_is_our_model(tmp_path: Path) -> None:
    """Its own GPTConfig and modules, as `sample.py` makes them."""
    model, place = written(tmp_path, "nanogpt", EXACT)
    checkpoint = torch.load(place, weights_only=True)
    assert checkpoint["model_args"] == arguments()
    theirs = TheirGPT(EXACT, nn.GELU())
    theirs.load_state_dict(checkpoint["model"])
    assert relative(logits(theirs), logits(model)) < 2e-6


def test_a_conversion_to_huggingface_keeps_the_exact_gelu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(huggingface, "client_logits")
    (tmp_path / "a").mkdir()
    native.write(random_gpt(EXACT), tmp_path / "a", None)
    assert convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to="huggingface")) == 0
    assert json.loads((tmp_path / "b" / "config.json").read_text())["activation_function"] == "gelu"


def test_a_native_folder_from_before_has_the_tanh_form(tmp_path: Path) -> None:
    native.write(random_gpt(TANH), tmp_path, None)
    rewrite(tmp_path / "config.json", without_activation)
    assert load_model(tmp_path).model.config == TANH


@pytest.mark.parametrize(
    ("value", "message"),
    [("relu", "model.activation = 'relu' must be gelu_tanh or gelu"), (7, "model.activation = 7 must be of type str")],
)
def test_a_native_folder_with_another_activation_is_refused(tmp_path: Path, value: object, message: str) -> None:
    native.write(random_gpt(TANH), tmp_path, None)
    rewrite(tmp_path / "config.json", lambda model: model | {"activation": value})
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value)


def test_an_unknown_activation_in_a_checkpoint_is_refused(
    tmp_path: Path, theirs: TheirGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"model": theirs.state_dict(), "model_args": arguments(activation="swish")}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="activation = 'swish', expected gelu_tanh or gelu"):
        load_model(tmp_path / "ckpt.pt")


def test_a_modern_model_without_gelu_has_no_form_of_it() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.activation = 'gelu' has no effect beside model\.relu_squared = true"
    ):
        ModernConfig(activation="gelu")
    assert ModernConfig(activation="gelu", relu_squared=False).gelu_form == "none"


# --- training ---


def without_activation(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key != "activation"}


def rewrite(path: Path, change: Any) -> None:
    """Change what a native configuration says of its model."""
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"model": change(document["model"])}))


def run(
    recipe: Path, data: Path, folder: Path, *, steps: int = 12, activation: Activation | None = None
) -> list[float]:
    """Train to a step, and return every training loss in the record."""
    config = replace(load_recipe(str(recipe)), data=str(data), run=str(folder), max_steps=steps)
    if activation is not None:
        config = replace(config, model=replace(config.model, activation=activation))
    train(config)
    return [event["loss"] for event in read_events(folder / "metrics.jsonl") if event["event"] == "train"]


def test_a_recipe_names_the_activation_and_a_run_keeps_it(tmp_path: Path, tiny_recipe: Path, tiny_data: Path) -> None:
    exact = tmp_path / "exact.toml"
    exact.write_text(tiny_recipe.read_text().replace("[model]\n", '[model]\nactivation = "gelu"\n'))
    assert run(exact, tiny_data, tmp_path / "a") != run(tiny_recipe, tiny_data, tmp_path / "b")
    assert isinstance(model := load_model(tmp_path / "a").model, GPT) and model.config.activation == "gelu"
    with pytest.raises((CheckpointError, ConfigError), match="activation"):
        run(tiny_recipe, tiny_data, tmp_path / "a", steps=13)


def test_a_run_begun_before_there_was_a_choice_resumes_to_the_same_losses(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path
) -> None:
    straight = run(tiny_recipe, tiny_data, tmp_path / "straight")
    run(tiny_recipe, tiny_data, tmp_path / "old", steps=4)
    (folder,) = (tmp_path / "old" / "checkpoints").iterdir()
    rewrite(folder / "config.json", without_activation)
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "config.json").read_bytes()
    manifest["files"]["config.json"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    toml = tmp_path / "old" / "config.toml"
    lines = toml.read_text().splitlines(keepends=True)
    toml.write_text("".join(line for line in lines if not line.startswith("activation")))
    assert toml.read_text().count("activation") == 0
    with pytest.raises(ConfigError, match=r"model\.activation was gelu_tanh in .* and is gelu now"):
        run(tiny_recipe, tiny_data, tmp_path / "old", activation="gelu")
    assert run(tiny_recipe, tiny_data, tmp_path / "old") == straight
