"""What is served: named without its place, checked before it is loaded, closed at the end."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from regpt2.base.errors import Problem, UsageError
from regpt2.model.files.load import load_model
from regpt2.sampling.batching.engine import EngineClosed
from regpt2.sampling.writing import Request
from regpt2.serving.models import names_of, serving
from regpt2.serving.options import ServeOptions
from serving.tiny_server import write_tiny


def options_of(*specs: object, **options: Any) -> ServeOptions:
    return ServeOptions(models=tuple(map(str, specs)), device="cpu", **options)


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        (["runs/demo"], ["demo"]),
        (["runs/demo/", "/a/b/demo", "demo"], ["demo", "demo-2", "demo-3"]),
        (["runs/demo/checkpoints/step-00000700", "runs/demo/checkpoints/best"], ["demo-step-00000700", "demo-best"]),
        (["runs/demo/checkpoints"], ["demo"]),
        (["a", "b/a", "c/a-2"], ["a", "a-2", "a-2-2"]),
        (["hf:gpt2", "hf:owner/name"], ["gpt2", "owner/name"]),
        (["model.safetensors"], ["model.safetensors"]),
        (["x/a\x1b[2J"], ["a\\x1b[2J"]),
        (["/"], ["model"]),
    ],
    ids=str,
)
def test_a_name_is_the_last_part_of_a_place_and_another_for_each_model(specs: list[str], names: list[str]) -> None:
    assert names_of(specs) == names


def test_a_name_is_that_of_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert names_of([".", "../here"]) == ["here", "here-2"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"context": 1}, "context = 1 must be from 2 to the model's block_size, 256."),
        ({"context": 257}, "context = 257 must be from 2"),
    ],
)
def test_a_context_out_of_range_is_refused_in_one_line(tmp_path: Path, options: dict[str, Any], why: str) -> None:
    write_tiny(tmp_path)
    with pytest.raises(UsageError) as caught, serving(options_of(tmp_path, **options)):
        pass
    assert str(caught.value).startswith(why) and "\n" not in str(caught.value)


def test_models_are_closed_at_the_end_and_if_another_cannot_be_loaded(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    write_tiny(tmp_path / "b")
    n_threads = threading.active_count()
    with serving(options_of(tmp_path / "a", tmp_path / "b", slots=2, context=100)) as models:
        assert list(models) == ["a", "b"] and [one.context for one in models.values()] == [100, 100]
    for served in models.values():
        with pytest.raises(EngineClosed):
            served.engine.submit(Request((97,), 1), lambda event: None)
    with pytest.raises(Problem, match="does not exist"), serving(options_of(tmp_path / "a", tmp_path / "gone")):
        pass
    assert threading.active_count() == n_threads


def test_positions_that_training_has_not_seen_are_warned_of(tmp_path: Path, capsys: Any) -> None:
    write_tiny(tmp_path)
    config = tmp_path / "config.json"
    trained = load_model(str(tmp_path)).model
    with serving(options_of(tmp_path)) as models:
        assert models[tmp_path.name].context == trained.context_size == 256
    assert "untrained" not in capsys.readouterr().err
    config.write_text(config.read_text().replace("{", '{"trained_seq_len": 64,', 1))
    with serving(options_of(tmp_path)) as models:
        assert models[tmp_path.name].context == 64
    with serving(options_of(tmp_path, context=65)) as models:
        assert models[tmp_path.name].context == 65
    assert "was trained on sequences of 64 tokens: later positions are untrained" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no int8 instructions")
def test_a_model_in_int8_has_its_parameters_and_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    found = []
    for dtype in ("fp32", "int8"):
        with serving(options_of(tmp_path / "a", dtype=dtype)) as models:
            found.append(models["a"])
    assert found[0].loaded.model.n_params() == found[1].loaded.model.n_params()
    first = found[1].fingerprint
    found[1].loaded.model.h[1].c_fc.scale[5] *= 2
    del found[1].__dict__["fingerprint"]
    assert len({found[0].fingerprint, first, found[1].fingerprint}) == 3


def test_a_fingerprint_is_that_of_the_weights(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    found = []
    with serving(options_of(tmp_path / "a", tmp_path / "a")) as models:
        first, second = models.values()
        found += [first.fingerprint, second.fingerprint]
        with torch.no_grad():
            second.loaded.model.ln_f.weight[3] += 1e-3
        del second.__dict__["fingerprint"]
        found.append(second.fingerprint)
    assert found[0] == found[1] != found[2] and found[0].startswith("fp_")


def test_engines_share_the_cores_and_no_other_thread_computes_with_several(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    write_tiny(tmp_path / "b")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with serving(options_of(tmp_path / "a", tmp_path / "b")) as models:
            own = [served.engine.between_steps(torch.get_num_threads).result(20) for served in models.values()]
            assert own == [2, 2] and torch.get_num_threads() == 1
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
