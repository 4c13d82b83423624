"""Every weight format: there and back, by its own rounding, without padding rows; what is cut short is refused."""

import re
from pathlib import Path

import pytest
import torch
from test_gpt import SHAPES, batch, random_gpt, shape_name

from regpt2.base import shelves
from regpt2.base.errors import CheckpointError
from regpt2.model.files import safe_pickle
from regpt2.model.files.contract import SHELF, TokenizerRef, Vocabulary
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import native

CONFIG = SHAPES[2]  # 3 layers, 257 tokens of 320 rows
BYTES = Vocabulary("bytes", "f" * 64, eot=256)
SHELVED = {name: shelves.load(SHELF, name) for name in shelves.entries(SHELF)}
BOTH_WAYS = {name: entry for name, entry in SHELVED.items() if hasattr(entry, "read") and hasattr(entry, "write")}


def unpickle_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, without the child's limits: starting a child takes seconds."""

    def unpickle(path: Path, copy: Path, kind: str, timeout_s: float) -> str:
        try:
            safe_pickle.unpickle(path, copy, kind)
        except Exception as error:
            return safe_pickle.refusal(error)
        return ""

    monkeypatch.setattr(safe_pickle, "_run_child", unpickle)


def written(folder: Path, name: str, config: GPTConfig, dtype: str = "fp32") -> tuple[GPT, Path]:
    """A random model, and the file or folder that it was written to."""
    entry, model = BOTH_WAYS[name], random_gpt(config)
    place = folder if entry.FILES else folder / "model"
    entry.write(model, place, BYTES, dtype)
    return model, place


@pytest.mark.seconds
@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize("config", SHAPES, ids=shape_name)
def test_every_format_gives_back_the_same_bits(
    tmp_path: Path, name: str, config: GPTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpickle_here(monkeypatch)
    model, place = written(tmp_path, name, config)
    assert BOTH_WAYS[name].matches(place)
    assert {path.name for path in tmp_path.iterdir()} <= set(BOTH_WAYS[name].FILES or ["model"])
    loaded = load_model(place)
    if config.vocab_multiple == 64:  # the formats of others say no padding: reading makes our usual one
        assert all(map(torch.equal, model.parameters(), loaded.model.parameters()))
    ids, _ = batch(config)
    with torch.no_grad():
        assert torch.equal(model(ids), loaded.model(ids))
    if name != "llmc":  # which has no place for it
        assert loaded.tokenizer == TokenizerRef("bytes", "f" * 64)


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, entry in BOTH_WAYS.items() for dtype in entry.DTYPES[1:]]
)
def test_other_types_lose_no_more_than_they_must(tmp_path: Path, name: str, dtype: str) -> None:
    """bf16 keeps 8 bits of a number, fp16 11; Q8_0 has 127 steps to the largest of 32, itself rounded to 11 bits."""
    model, place = written(
        tmp_path, name, GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=16, vocab_size=100), dtype
    )
    tensors = BOTH_WAYS[name].read(place).tensors
    relative = {"bf16": 2**-8, "fp16": 2**-11, "q8_0": 0.0}[dtype]
    lost = 0.0
    for key, p in native.tensors(model).items():
        off = (tensors[key] - p).abs()
        most = p.abs() * relative
        if dtype == "q8_0" and p.dim() == 2:
            blocks = p.view(-1, 32).abs().amax(1, keepdim=True).expand(-1, 32).reshape(p.shape)
            most = blocks * (0.5 / 127 + 2**-11)
        assert (off <= most * 1.001 + 1e-7).all(), key
        lost = max(lost, float(off.max()))
    assert lost > 0


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_padding_rows_are_in_no_file(tmp_path: Path, name: str) -> None:
    """They are zero in a model that we trained; here they are not, so as to be seen."""
    model = random_gpt(CONFIG)
    with torch.no_grad():
        model.wte.weight[CONFIG.vocab_size :] = 1234.5
    entry = BOTH_WAYS[name]
    entry.write(model, tmp_path if entry.FILES else tmp_path / "model", BYTES)
    row = model.wte.weight[-1].detach().numpy().tobytes()
    assert not [path for path in tmp_path.iterdir() if row in path.read_bytes()]


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unpickle_here(monkeypatch)
    _, place = written(tmp_path, name, CONFIG)
    path = max((path for path in tmp_path.iterdir()), key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    for cut in (1, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_model(place)


def test_formats_are_told_apart_by_content(tmp_path: Path) -> None:
    readers = {name: entry for name, entry in SHELVED.items() if hasattr(entry, "matches")}
    for name in BOTH_WAYS:
        (tmp_path / name).mkdir()
        _, place = written(tmp_path / name, name, CONFIG)
        assert [other for other, entry in readers.items() if entry.matches(place)] == [name]
        assert not any(entry.matches(tmp_path / "nothing") for entry in readers.values())
