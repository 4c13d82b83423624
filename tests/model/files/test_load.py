"""Models by name: run folders, checkpoints, folders, the hub; a bad checkpoint is skipped with a warning."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights_shelf import unpickle_here

from hub_server import FakeHub
from regpt2.base.errors import CheckpointError, DownloadError, UsageError
from regpt2.base.files import sha256_file
from regpt2.model.files.contract import TokenizerRef, Vocabulary
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import huggingface, nanogpt, native

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=50)
BYTES = Vocabulary("bytes", "f" * 64, eot=49)


def write_checkpoint(run: Path, step: int) -> Path:
    """As training writes it: the native files, others, and a manifest. Its weights are known by the seed `step`."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    native.write(GPT(CONFIG, seed=step), folder, BYTES)
    (folder / "state.json").write_text("{}")
    names = ("model.safetensors", "config.json", "state.json")
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def flip_bit(path: Path, seed: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(seed).randrange(len(data))] ^= 1
    path.write_bytes(data)


def has_seed(model: GPT, seed: int) -> bool:
    return torch.equal(model.wpe.weight, GPT(CONFIG, seed=seed).wpe.weight)


def test_run_folder_gives_its_newest_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 20, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / "tmp-step-00000200-77").mkdir()
    (tmp_path / "checkpoints" / "bad-step-00000300").mkdir()
    loaded = load_model(tmp_path)
    assert has_seed(loaded.model, 100)
    assert (loaded.step, loaded.tokenizer) == (100, TokenizerRef("bytes", "f" * 64))
    assert loaded.source.endswith("step-00000100")
    assert not loaded.model.training and loaded.model.wte.weight.requires_grad
    assert capsys.readouterr().err == ""


def test_a_checkpoint_folder_is_a_model(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 7)
    loaded = load_model(str(folder))
    assert has_seed(loaded.model, 7) and loaded.step == 7


@pytest.mark.parametrize(
    "damage",
    ["bit in weights", "bit in config", "cut weights", "no weights", "no manifest", "bad manifest", "unlisted"],
)
def test_a_bad_checkpoint_is_passed_over_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    write_checkpoint(tmp_path, 1)
    bad = write_checkpoint(tmp_path, 2)
    weights = bad / "model.safetensors"
    match damage:
        case "bit in weights":
            flip_bit(weights)
        case "bit in config":
            flip_bit(bad / "config.json")
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "no weights":
            weights.unlink()
        case "no manifest":
            (bad / "manifest.json").unlink()
        case "bad manifest":
            (bad / "manifest.json").write_text("{")
        case "unlisted":
            (bad / "manifest.json").write_text('{"files": {}}')
    loaded = load_model(tmp_path)
    assert has_seed(loaded.model, 1) and loaded.step == 1
    said = capsys.readouterr().err
    assert "warning: " in said and str(bad) in said and "Trying the checkpoint before it" in said


def test_a_bad_checkpoint_named_directly_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    flip_bit(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its SHA-256 is [0-9a-f]{64}, expected"):
        load_model(folder)


@pytest.mark.parametrize("n_bad", [0, 2])
def test_a_run_without_a_whole_checkpoint_is_refused(tmp_path: Path, n_bad: int) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in range(n_bad):
        flip_bit(write_checkpoint(tmp_path, step) / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"holds no whole checkpoint: {n_bad} in .*none usable; train further"):
        load_model(tmp_path)


@pytest.mark.parametrize("spec", ["runs/nowhere", "gpt2", "gpt2-xl"])
def test_what_does_not_exist_is_refused_with_the_four_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_model(spec)
    message = str(caught.value)
    assert f"MODEL = '{spec}' does not exist" in message
    for kind in ("a run folder", "a checkpoint", "a Hugging Face folder", "hf:gpt2"):
        assert kind in message
    assert (f"Did you mean hf:{spec}?" in message) == spec.startswith("gpt2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json is missing"),
        ("{", r"config\.json is damaged: "),
        ("[1]", r"config\.json holds a JSON list, expected an object"),
        ("{}", "is in none of the known formats"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model\.pt is in none of the known formats \(gguf, huggingface, llmc, "):
        load_model(tmp_path / "model.pt")


def test_weights_come_in_the_type_asked_for(tmp_path: Path) -> None:
    native.write(GPT(CONFIG, seed=3), tmp_path, None)
    model = load_model(tmp_path, dtype=torch.bfloat16).model
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert torch.equal(model.wpe.weight, GPT(CONFIG, seed=3).wpe.weight.bfloat16())
    assert not model.wte.weight[50:].any()


def hub_cache(folder: Path, repo: str) -> Path:
    """A hub cache as huggingface_hub keeps it, with one model in it."""
    place = folder / f"models--{repo.replace('/', '--')}"
    commit = "0123456789" * 4
    (place / "snapshots" / commit).mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    return place / "snapshots" / commit


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "repo"),
    [
        ("hf:gpt2", "openai-community/gpt2"),
        ("hf:gpt2-medium", "openai-community/gpt2-medium"),
        ("hf:openai-community/gpt2", "openai-community/gpt2"),
        ("hf:someone/else", "someone/else"),
    ],
)
def test_hub_names_are_found_in_the_hub_cache(offline_cache: Path, spec: str, repo: str) -> None:
    huggingface.write(GPT(CONFIG, seed=8), hub_cache(offline_cache, repo), BYTES)
    loaded = load_model(spec)
    assert has_seed(loaded.model, 8)
    assert loaded.source == f"hf:{repo}"


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub without models, and an empty cache."""
    from huggingface_hub import constants

    with FakeHub({}) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def repository(folder: Path, weights: list[str]) -> dict[str, bytes]:
    """The files of a model's repository with these kinds of weights, each in two shards if it is so called."""
    folder.mkdir()
    huggingface.write(GPT(CONFIG, seed=8), folder, BYTES)
    raw = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for kind in weights:
        stem, end, save = (
            ("model", "safetensors", save_file) if "safetensors" in kind else ("pytorch_model", "bin", torch.save)
        )
        if "shards" not in kind:
            save(raw, folder / f"{stem}.{end}")
            continue
        names = {name: f"{stem}-0000{1 + n % 2}-of-00002.{end}" for n, name in enumerate(raw)}
        for shard in set(names.values()):
            save({name: tensor for name, tensor in raw.items() if names[name] == shard}, folder / shard)
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "tf_model.h5").write_bytes(b"x" * 999)  # what nobody asked for
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["safetensors", "safetensors in shards", "bin", "bin in shards"])
def test_a_model_is_fetched_whatever_kind_of_weights_it_has(
    tmp_path: Path, online: FakeHub, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once: the second time nothing is sent but the listing."""
    unpickle_here(monkeypatch)
    online.put("someone/else", repository(tmp_path / "repository", [kind]))
    assert has_seed(load_model("hf:someone/else").model, 8)
    fetched = {request.path for request in online.requests if request.n_sent}
    assert fetched & {"tf_model.h5"} == set() and any(kind.split()[0] in path for path in fetched)
    online.requests.clear()
    assert has_seed(load_model("hf:someone/else").model, 8)
    assert not any(request.n_sent for request in online.requests)


def test_pickled_weights_are_not_fetched_beside_safetensors(tmp_path: Path, online: FakeHub) -> None:
    online.put("someone/else", repository(tmp_path / "repository", ["safetensors", "bin", "bin in shards"]))
    assert has_seed(load_model("hf:someone/else").model, 8)
    assert not [request.path for request in online.requests if request.path.endswith(".bin")]


@pytest.mark.parametrize("spec", ["hf:a/b/c", "hf:../x", "hf:", "hf:a b"])
def test_what_can_be_no_name_on_the_hub_is_refused_before_asking_it(spec: str) -> None:
    with pytest.raises(UsageError, match="cannot be a model of the hub; give hf:gpt2, or hf:owner/name"):
        load_model(spec)


def nanogpt_checkpoint(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    nanogpt.write(GPT(CONFIG, seed=seed), path, BYTES)


def test_a_folder_of_nanogpt_is_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unpickle_here(monkeypatch)
    nanogpt_checkpoint(tmp_path / "out" / "ckpt.pt", 3)
    (tmp_path / "out" / "notes.pt").write_text("no checkpoint")
    assert has_seed(load_model(tmp_path / "out").model, 3)
    assert capsys.readouterr().err == ""


def test_a_log_folder_of_build_nanogpt_is_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unpickle_here(monkeypatch)
    for step in (5000, 19072, 10000):
        nanogpt_checkpoint(tmp_path / "log" / f"model_{step:05d}.pt", step)
    (tmp_path / "log" / "log.txt").write_text("0 train 10.9")
    assert has_seed(load_model(tmp_path / "log").model, 19072)
    said = capsys.readouterr().err
    assert f"{tmp_path / 'log'} holds 3 checkpoints. Loading model_19072.pt, of the last step" in said


def test_checkpoints_without_numbers_are_named_and_not_guessed(tmp_path: Path) -> None:
    for age, name in enumerate(("best.pt", "ckpt.pt", "a.pt")):
        nanogpt_checkpoint(tmp_path / "out" / name, 1)
        os.utime(tmp_path / "out" / name, (1e9 - age, 1e9 - age))
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "out")
    said = str(caught.value)
    assert "holds 3 checkpoints: a.pt, best.pt, ckpt.pt. Give one of them as MODEL; the newest is" in said
    assert said.endswith(f"{tmp_path / 'out' / 'best.pt'}.")


@pytest.mark.parametrize("spec", ["hf:gpt2", "hf:no/such-name"])
def test_no_network_says_what_to_do(offline_cache: Path, spec: str) -> None:
    with pytest.raises(DownloadError) as caught:
        load_model(spec)
    message = str(caught.value)
    assert message.startswith(f"{spec}: could not get ") and "Hugging Face hub" in message
    assert "--local-dir FOLDER" in message and "\n" not in message
