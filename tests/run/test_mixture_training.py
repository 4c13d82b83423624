"""A run on a mixture: killed and resumed it is the same; another mixture is refused; the record says what it saw."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import command, evals, losses, state_of, wait_for_step

from conftest import TINY_RECIPE, Run, write_data
from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.base.ranks.world import World
from regpt2.base.record.metrics import read_events
from regpt2.commands import verify
from regpt2.commands.train import main
from regpt2.config.recipe_files import load_recipe
from regpt2.config.run import RunConfig
from regpt2.config.toml_file import read_toml
from regpt2.data.loader import BatchConfig, Loader
from regpt2.data.mixture import read_shares
from regpt2.data.tokens.manifest import Manifest
from regpt2.data.tokens.shards import open_tokens
from regpt2.evals.scoring.context import EvalContext
from regpt2.evals.val_loss import evaluate
from regpt2.model.files.load import load_model
from regpt2.pages.record import read_record
from regpt2.pages.report.certificate import certificate
from regpt2.references.run_facts import facts_of
from regpt2.run.loop import train
from warm_processes import Python

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`fineweb_edu` of 20,000 tokens and `code` of 200."""
    folder = tmp_path_factory.mktemp("mix")
    return write_data(folder / "fineweb_edu", seed=1), write_data(folder / "code", n_train=200, n_val=500, seed=2)


def mix(folders: tuple[Path, Path], *weights: object) -> tuple[str, ...]:
    return tuple(f"{folder}={weight}" for folder, weight in zip(folders, weights, strict=True))


def config_of(recipe: Path, run: Path, **changes: Any) -> RunConfig:
    return dataclasses.replace(load_recipe(str(recipe)), run=str(run), **changes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, folders: tuple[Path, Path]) -> Path:
    """One uninterrupted run, by a recipe that names the mixture."""
    folder = tmp_path_factory.mktemp("straight")
    web, code = folders
    (folder / "tiny.toml").write_text(f'mix = ["{web}=0.7", "{code}=0.3"]\n{TINY_RECIPE}')
    train(config_of(folder / "tiny.toml", folder / "run"))
    return folder / "run"


def test_the_record_says_what_the_run_saw(straight: Path, folders: tuple[Path, Path]) -> None:
    events = list(read_events(straight / "metrics.jsonl"))
    start = next(event for event in events if event["event"] == "run")
    assert [(one["name"], one["weight"], one["tokens"]) for one in start["data_sets"]] == [
        ("fineweb_edu", 0.7, 20_000),
        ("code", 0.3, 200),
    ]
    n_tokens = 12 * 256
    assert [one["epochs"] for one in start["data_sets"]] == pytest.approx(
        [0.7 * n_tokens / 20_000, 0.3 * n_tokens / 200]
    )
    assert [one["fingerprint"] for one in start["data_sets"]] == [
        Manifest.read(folder).fingerprint for folder in folders
    ]
    assert start["dataset"].startswith("mixture ")
    assert facts_of(events).dataset is None, "a mixture is not held against the curve of one of its data sets"
    (note,) = [event["text"] for event in events if event["event"] == "note"]
    assert note.startswith("this run reads the 200 tokens of code 4.6 times. Beyond 4 times repeated text")
    assert read_toml(straight / "config.toml").mix == mix(folders, 0.7, 0.3)
    assert certificate(read_record(straight))["Mixture"] == "0.7 of fineweb_edu, 0.3 of code"


def test_every_update_reads_the_mixture(straight: Path, folders: tuple[Path, Path]) -> None:
    """By the digests in the record, beside a loader that is given streams and weights by hand."""
    recorded = [e["data"] for e in read_events(straight / "metrics.jsonl") if e["event"] == "train"]
    with open_tokens(folders[0], "train") as web, open_tokens(folders[1], "train") as code:
        batch = BatchConfig(batch_tokens=256, micro_batch=4, seq_len=32)
        loader = Loader([web, code], batch, seed=1337, parts=[7, 3])
        assert recorded == [f"{loader.batch(step).digest:016x}" for step in range(1, 13)]


def test_the_validation_loss_is_the_weighted_mean_of_each_data_sets_own(
    straight: Path, folders: tuple[Path, Path]
) -> None:
    """Against the same evaluation of each folder by itself, of the saved model."""
    model = load_model(str(straight), device=torch.device("cpu")).model
    context = EvalContext(model=model, world=ALONE, data=None, seq_len=32, batch=2, val_tokens=512)
    web, code = (evaluate(dataclasses.replace(context, data=folder)) for folder in folders)
    (last,) = [e for e in read_events(straight / "metrics.jsonl") if e["event"] == "eval" and e["step"] == 12]
    assert (last["loss_fineweb_edu"], last["loss_code"]) == pytest.approx((web["loss"], code["loss"]), abs=1e-6)
    assert last["loss"] == pytest.approx(0.7 * web["loss"] + 0.3 * code["loss"], abs=1e-6)
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / math.log(2))  # a byte is a token here
    assert last["tokens"] == 512 + 480
    whole = evaluate(dataclasses.replace(context, mix=read_shares("", mix(folders, 0.7, 0.3))))
    assert whole["loss"] == pytest.approx(last["loss"], abs=1e-6)
    assert "loss_fineweb_edu" not in web


def test_a_mixture_of_one_is_that_data_set(tmp_path: Path, tiny_recipe: Path, folders: tuple[Path, Path]) -> None:
    web = folders[0]
    train(config_of(tiny_recipe, tmp_path / "plain", data=str(web)))
    train(config_of(tiny_recipe, tmp_path / "mixed", mix=(f"{web}=0.2",)))
    assert state_of(tmp_path / "plain") == state_of(tmp_path / "mixed")
    assert evals(tmp_path / "plain") == evals(tmp_path / "mixed")
    starts = [next(read_events(tmp_path / run / "metrics.jsonl")) for run in ("plain", "mixed")]
    for key in ("dataset", "data_fingerprint", "train_tokens", "data_sets", "baselines"):
        assert starts[0][key] == starts[1][key]


def test_kill_9_changes_no_bit(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    """The real command, with the mixture on the command line, killed hard on its way."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        TINY_RECIPE.replace("max_steps = 12", "max_steps = 60").replace("save_every = 4", "save_every = 20")
    )
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    train(config_of(recipe, reference, mix=mix(folders, 0.7, 0.3)))
    options = [*command(recipe, Path(), killed), "--mix", *mix(folders, 0.7, 0.3)]
    del options[options.index("--data") : options.index("--data") + 2]
    process = Python(*options)
    wait_for_step(killed, 25, process)
    process.kill()
    process.communicate(timeout=60)
    assert 25 <= max(losses(killed)) < 60
    train(config_of(recipe, killed, mix=mix(folders, 0.7, 0.3)))
    assert state_of(killed, 60) == state_of(reference, 60)
    assert losses(killed) == losses(reference)
    assert evals(killed) == evals(reference)


def test_a_run_does_not_go_on_with_another_mixture(
    tmp_path: Path, straight: Path, tiny_recipe: Path, folders: tuple[Path, Path]
) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    for changes in ({"mix": mix(folders, 0.6, 0.4)}, {"mix": mix(folders, 0.3, 0.7)}, {"data": str(folders[0])}):
        with pytest.raises(CheckpointError, match=r"was trained on data with .*; give the --data or --mix of"):
            train(config_of(tiny_recipe, run, max_steps=14, **changes))
    summary = train(config_of(tiny_recipe, run, max_steps=14, mix=mix(folders, 7, 3)[::-1]))
    assert (summary.step, summary.reason) == (14, "finished")


def test_the_command_line_takes_the_place_of_the_recipes_data(
    tmp_path: Path, tiny_recipe: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    web, code = folders
    recipe = tmp_path / "with_data.toml"
    recipe.write_text(f'data = "{web}"\n' + tiny_recipe.read_text())
    run = tmp_path / "run"
    assert main([str(recipe), "--run", str(run), "--mix", f"{web}=0.5", f"{code}=0.5"]) == 0
    assert read_toml(run / "config.toml").data == ""
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "12 updates are 3.07k tokens, 0.08 epochs of fineweb_edu (50 %, 20k tokens), "
        "7.68 epochs of code (50 %, 200 tokens)"
    ) in said
    mixed = tmp_path / "with_mix.toml"
    mixed.write_text(f'mix = ["{web}=1", "{code}=1"]\n' + tiny_recipe.read_text())
    assert main([str(mixed), "--run", str(tmp_path / "other"), "--data", str(web)]) == 0
    assert read_toml(tmp_path / "other" / "config.toml").mix == ()


def test_a_mix_that_cannot_be_ends_in_one_message(regpt2: Run, tiny_recipe: Path, folders: tuple[Path, Path]) -> None:
    web, code = folders
    done = regpt2("train", tiny_recipe, "--mix", f"{web}=0.5", f"{code}=none")
    assert done.returncode == 2
    assert done.stderr.strip().startswith(f"regpt2: mix '{code}=none': expected FOLDER=WEIGHT")
    assert "Traceback" not in done.stderr
    with pytest.raises(ConfigError, match="are both given, expected one"):
        main([str(tiny_recipe), "--data", str(web), "--mix", f"{web}=0.5"])


def test_a_recipe_with_a_mix_that_cannot_be_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_text('mix = ["a=0.5", "b=0"]')
    with pytest.raises(ConfigError, match=r"bad.toml: mix 'b=0': expected FOLDER=WEIGHT with a weight above 0"):
        load_recipe(str(recipe))


def test_verify_compares_the_mixture_with_the_run(
    straight: Path, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web, code = folders
    assert verify.main([str(straight)]) == 0
    assert f"ok   {web} {code}: the data that the run was trained on" in capsys.readouterr().out
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace(f"{code}=0.3", f"{code}=0.4"))
    assert verify.main([str(run)]) == 1
    assert f"BAD  {web} {code}: it has fingerprint" in capsys.readouterr().out
    (run / "config.toml").write_text(text.replace(str(code), str(tmp_path / "gone")))
    assert verify.main([str(run)]) == 0
    assert "gone: not found here, so not compared" in capsys.readouterr().out
