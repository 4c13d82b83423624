"""`regpt2 verify`: a good run and good data are ok to the last file; each kind of damage is named; nothing changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from regpt2.base.files import sha256_file
from regpt2.commands.verify import main
from regpt2.config.recipe_files import load_recipe
from regpt2.data.preparing.options import PrepareOptions
from regpt2.data.preparing.prepare import prepare
from regpt2.data.tokens.manifest import Manifest
from regpt2.data.tokens.shards import write_shard
from regpt2.run.loop import train

pytestmark = pytest.mark.seconds  # all of them together


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    for n in range(20):
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{n:02d}.txt").write_text(f"document {n} " * 60)
    options = PrepareOptions("text_files", input=folder / "text", out=folder / "data", tokenizer="bytes", workers=1,
                             val_fraction=0.2, shard_tokens=4000)  # fmt: skip
    prepare(options)
    return folder / "data"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    from conftest import TINY_RECIPE

    folder = tmp_path_factory.mktemp("verify_run")
    (folder / "tiny.toml").write_text(f'run = "{folder / "run"}"\ndata = "{data}"\n{TINY_RECIPE}')
    assert train(load_recipe(str(folder / "tiny.toml"))).exit_code == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def own_data(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "data"))


def verify(capsys: pytest.CaptureFixture[str], *folders: Path) -> tuple[int, list[str], str]:
    """Exit code, the lines that say BAD, everything."""
    before = {path: path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}
    capsys.readouterr()
    code = main([str(folder) for folder in folders])
    said = capsys.readouterr().out
    after = {path: path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}
    assert before == after, "nothing is changed"
    return code, [line for line in said.splitlines() if line.startswith("BAD")], said


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_good_run_and_good_data_are_ok_to_the_last_file(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, bad, said = verify(capsys, run, data)
    assert (code, bad) == (0, [])
    files = [p for p in (run / "checkpoints").rglob("*") if p.is_file()] + list(data.glob("*.bin"))
    for path in [*files, run / "config.toml", run / "metrics.jsonl", data / "manifest.json"]:
        assert f"ok   {path}" in said
    assert "none bad" in said and "the data that the run was trained on" in said and "documents" in said
    assert main([str(run), "--json", str(tmp_path / "f.json")]) == 0
    findings = json.loads((tmp_path / "f.json").read_text())
    assert {finding["status"] for finding in findings} == {"ok"} and len(findings) > 15


NAMES = ("model.safetensors", "config.json", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [flip, lambda p: p.write_bytes(p.read_bytes()[:-3]), lambda p: p.unlink()])
def test_each_damaged_file_of_a_checkpoint_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], object]
) -> None:
    damage(run / "checkpoints" / "step-00000008" / name)
    code, bad, _ = verify(capsys, run)
    assert code == 1 and bad
    assert all("step-00000008" in line for line in bad)
    assert name == "manifest.json" or (len(bad) == 1 and f"step-00000008/{name}" in bad[0])


def rewrite(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors and make the manifest fit: what only a look at the content can find."""
    tensors = load_file(folder / name)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / name)
    seal(folder, name)


def seal(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("model.safetensors", lambda t: t["wpe.weight"][0].fill_(float("nan")), "wpe.weight has values that are not"),
        ("model.safetensors", lambda t: t.pop("wpe.weight"), "wpe.weight is missing"),
        ("model.safetensors", lambda t: t.update({"wpe.weight": torch.ones(3, 3)}), "has shape"),
        ("optimizer.safetensors", lambda t: t["wpe.weight/exp_avg"].fill_(float("inf")), "not finite"),
        ("optimizer.safetensors", lambda t: t.pop("wpe.weight/exp_avg_sq"), "lacks exp_avg_sq of wpe.weight"),
        ("optimizer.safetensors", lambda t: t.update({"wpe.weight/exp_avg": torch.ones(2, 2)}), "no weight of the"),
    ],
)
def test_content_that_no_hash_can_tell_is_found(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, change: Callable[..., object], said: str
) -> None:
    rewrite(run / "checkpoints" / "step-00000012", name, change)
    code, bad, _ = verify(capsys, run / "checkpoints" / "step-00000012")
    assert code == 1 and len(bad) == 1 and said in bad[0]


def test_a_checkpoint_of_another_step_and_swapped_files_are_found(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = run / "checkpoints"
    one, two = checkpoints / "step-00000004", checkpoints / "step-00000008"
    (one / "model.safetensors").rename(run / "x")
    (two / "model.safetensors").rename(one / "model.safetensors")
    (run / "x").rename(two / "model.safetensors")
    code, bad, _ = verify(capsys, run)
    assert code == 1 and len(bad) == 2 and all("model.safetensors is damaged" in line for line in bad)
    (checkpoints / "step-00000012").rename(checkpoints / "step-00000013")
    assert any("is that of step 12, expected 13" in line for line in verify(capsys, run)[1])
    state = one.parent / "step-00000013" / "state.json"
    manifest = json.loads((state.parent / "manifest.json").read_text())
    (state.parent / "manifest.json").write_text(json.dumps(manifest | {"step": 13}))
    assert any("state.json is that of step 12" in line for line in verify(capsys, run)[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [x for x in lines if '"step":7,' not in x or '"train"' not in x], "step 8 follows step 6"),
        (lambda lines: lines + [x for x in lines if '"step":7,' in x and '"train"' in x], "step 7 is repeated"),
        (lambda lines: [*lines[:5], "{half", *lines[5:]], "is not an event"),
        (lambda lines: lines[:5], "before the newest checkpoint"),
    ],
)
def test_gaps_repeats_and_damage_in_the_record_are_found(
    run: Path, capsys: pytest.CaptureFixture[str], change: Callable[[list[str]], list[str]], said: str
) -> None:
    path = run / "metrics.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    code, bad, _ = verify(capsys, run)
    assert code == 1 and len(bad) == 1 and said in bad[0]


def test_what_is_no_fault_is_a_note(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(run / "metrics.jsonl", "a") as record:
        record.write('{"event":"tra')
    shutil.copytree(run / "checkpoints" / "step-00000004", run / "checkpoints" / "bad-step-00000004")
    (run / "checkpoints" / "tmp-step-00000013-7").mkdir()
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('data = "', 'data = "/not/here'))
    code, bad, said = verify(capsys, run)
    assert (code, bad) == (0, [])
    assert said.count("note ") == 3 and "the last line is cut short" in said
    (run / "config.toml").write_text("no_such_key = 1")
    assert len(verify(capsys, run)[1]) == 1


def test_other_data_than_the_run_was_trained_on_is_found(
    run: Path, tiny_data: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace(str(data), str(tiny_data)))
    code, bad, _ = verify(capsys, run)
    assert code == 1 and len(bad) == 1 and "the run was trained on" in bad[0]


@pytest.mark.parametrize("damage", [flip, lambda p: p.write_bytes(p.read_bytes()[:-3]), lambda p: p.unlink()])
def test_each_damaged_shard_is_named(
    own_data: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    shard = sorted(own_data.glob("*_train_*.bin"))[1]
    damage(shard)
    code, bad, _ = verify(capsys, own_data)
    assert code == 1 and len(bad) == 1 and str(shard) in bad[0]


def test_ids_and_documents_are_counted(own_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The manifest is made to fit, so that only the ids can tell."""
    val = next(own_data.glob("*_val_*.bin"))
    ids = np.fromfile(val, dtype="<u2", offset=1024)
    manifest = Manifest.read(own_data)

    def put(ids: "np.ndarray[tuple[int], np.dtype[np.uint16]]") -> None:
        shard = write_shard(val, len(ids), [ids])
        split = manifest.splits["val"]
        changed = manifest.splits | {"val": type(split)(split.documents, split.tokens, split.text_bytes, (shard,))}
        Manifest(**{**vars(manifest), "splits": changed}).write(own_data)

    put(np.where(ids == 256, 32, ids).astype(np.uint16))
    assert "0 documents, expected" in verify(capsys, own_data)[1][0]
    put(np.where(np.arange(len(ids)) == 5, 257, ids).astype(np.uint16))
    assert "holds id 257 at token 5" in verify(capsys, own_data)[1][0]
    (own_data / "manifest.json").write_text("{")
    assert "is not JSON" in verify(capsys, own_data)[1][0]


def test_data_of_another_project_is_checked_as_far_as_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d").mkdir()
    np.arange(100, dtype="<u2").tofile(tmp_path / "d" / "train.bin")
    code, _, said = verify(capsys, tmp_path / "d")
    assert code == 0 and "only sizes and ids can be checked" in said and "100 tokens" in said
    np.array([50257], dtype="<u2").tofile(tmp_path / "d" / "val.bin")
    assert "holds id 50257" in verify(capsys, tmp_path / "d")[1][0]
    (tmp_path / "d" / "train.bin").write_bytes(b"odd")
    assert "odd number" in verify(capsys, tmp_path / "d")[1][0]
    (tmp_path / "d" / ".prepare.json").write_text("{}")
    assert "not finished" in verify(capsys, tmp_path / "d")[1][0]


def test_wrong_usage_is_told_before_any_work(tmp_path: Path, regpt2: Callable[..., object]) -> None:
    for arguments, said in (([], "nothing to check"), ([tmp_path / "no"], "no such folder"), ([tmp_path], "holds no")):
        done = regpt2("verify", *arguments)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
