"""The verb evaluate: figures beside published ones, a failure that costs no other evaluation, any number of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Run, needs_bf16
from rank_processes import command_on_ranks
from regpt2.base.errors import UsageError
from regpt2.commands.evaluate import main
from regpt2.data.tokenizer import load_tokenizer
from regpt2.evals.measuring.measure import GROUPS
from regpt2.evals.measuring.show import paper_table
from regpt2.model.files.contract import TokenizerRef, Vocabulary
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import native
from regpt2.references.scores import nearest, references, references_for

PREMISES = [
    {"query": f"The {thing} fell, therefore", "choices": ["it broke.", "it flew away again."], "gold": n % 2}
    for n, thing in enumerate(("glass", "stone", "old clock", "bird", "leaf", "tall tree", "cup", "rain"))
]
PASSAGES = [{"text": f"He took the {thing} and gave her the {thing}"} for thing in ("key", "old coin", "letter")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of bytes with random weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer("bytes")
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=tokenizer.vocab_size)
    ref = TokenizerRef(tokenizer.name, tokenizer.fingerprint)
    native.write(GPT(config, seed=3), folder, Vocabulary(ref.name, ref.fingerprint, tokenizer.eot))
    for name, lines in (("copa", PREMISES), ("lambada", PASSAGES)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def files(model: Path, *names: str) -> list[str]:
    return ["--files", *(f"{name}={model / name}.jsonl" for name in names)]


def run(model: Path, out: Path, *arguments: object) -> dict[str, Any]:
    code = main([str(model), "--out", str(out), *map(str, arguments)])
    return {**json.loads(out.read_text()), "exit_code": code}


def test_each_figure_stands_with_its_protocol_error_and_references(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(model, tmp_path / "a.json", "--evals", "lambada", "copa", *files(model, "lambada", "copa"))
    said = capsys.readouterr().out
    assert found["exit_code"] == 0 and not found["failed"]
    copa, lambada = found["results"]["copa"], found["results"]["lambada"]
    assert copa["count"] == len(PREMISES) and 0 <= copa["acc"] <= 1 and copa["acc_stderr"] > 0
    assert set(lambada["protocol"]) == {"perplexity", "accuracy"}
    beside = [one["value"] for one in lambada["references"]["perplexity"] if one["model"] == "GPT-2 124M"]
    assert beside == [35.13, 40.0554], "the paper's and the harness's"
    assert "35.13" in said and "40.055" in said
    assert "15.6" not in said, "only the published model of the nearest size is printed"
    assert "lambada, 3 examples" in said


def test_one_that_fails_does_not_cost_the_others(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": 7}\n')
    arguments = ["--evals", "lambada", "copa", *files(model, "copa"), f"lambada={tmp_path / 'bad.jsonl'}"]
    found = run(model, tmp_path / "a.json", *arguments)
    assert found["exit_code"] == 1
    assert list(found["results"]) == ["copa"]
    assert "line 1" in found["failed"]["lambada"]
    assert "lambada was not measured" in capsys.readouterr().err


def test_offline_a_missing_data_set_is_one_clear_message(model: Path, tmp_path: Path, regpt2: Run) -> None:
    proxy = {"https_proxy": "http://127.0.0.1:9", "REGPT2_CACHE": str(tmp_path / "cache")}
    done = regpt2("evaluate", model, "--evals", "hellaswag", **proxy)
    assert done.returncode == 1
    assert "could not download" in done.stderr and "--files hellaswag=PATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_limit_is_the_first_examples(model: Path, tmp_path: Path) -> None:
    few = run(model, tmp_path / "a.json", "--evals", "copa", "--limit", 3, *files(model, "copa"))
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PREMISES[:3]))
    three = run(model, tmp_path / "b.json", "--evals", "copa", "--files", f"copa={tmp_path / 'three.jsonl'}")
    assert few["results"]["copa"]["acc"] == three["results"]["copa"]["acc"]
    assert few["results"]["copa"]["count"] == 3 and few["limit"] == 3


@needs_bf16
def test_another_precision_is_compared_with_fp32(model: Path, tmp_path: Path) -> None:
    arguments = ["--evals", "lambada", *files(model, "lambada"), "--precision", "bf16", "--device", "cpu"]
    found = run(model, tmp_path / "a.json", *arguments)["results"]["lambada"]
    full = run(model, tmp_path / "b.json", *arguments[:-4])["results"]["lambada"]
    assert found["fp32_check"]["examples"] == 64
    difference = found["perplexity"] - full["perplexity"]
    assert difference != 0
    assert found["fp32_check"]["difference"]["perplexity"] == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evals", "hellaswagg"], "hellaswag"),
        (["--evals", "copa", "--limit", "-1"], "--limit -1 must be at least 0"),
        (["--evals", "copa", "--files", "copa"], "expected NAME=PATH"),
        (["--evals", "copa", "--check-fp32", "-1"], "--check-fp32 -1"),
        (["--out", "no/such/folder/a.json"], "--out"),
    ],
)
def test_wrong_options_are_refused_before_any_work(model: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main([str(model), *arguments])


def test_two_ranks_count_as_one(model: Path, tmp_path: Path, unused_port: int) -> None:
    arguments = ["--evals", "copa", "lambada", *files(model, "copa", "lambada"), "--batch", "1", "--device", "cpu"]
    alone = run(model, tmp_path / "one.json", *arguments)["results"]
    command_on_ranks(2, unused_port, tmp_path, "evaluate", model, *arguments, "--out", tmp_path / "two.json")
    both = json.loads((tmp_path / "two.json").read_text())["results"]
    for name, figures in alone.items():
        for key in set(figures) - {"elapsed_s"}:
            assert both[name][key] == figures[key], f"{name}.{key}"


def test_the_table_of_the_paper_has_its_rows_below_ours() -> None:
    heads, ours, smallest, *_, largest = paper_table({"lambada": {"perplexity": 30.0, "accuracy": 0.5}}).split("\n")
    assert ours.split() == ["this", "model", "30.00", "50.00", *["-"] * 8]
    # Radford et al. 2019, table 3, its first and its last row
    row = ["35.13", "45.99", "87.65", "83.40", "29.41", "65.85", "1.16", "1.17", "37.50", "75.20"]
    assert smallest.split() == ["GPT-2", "124M,", "paper", *row]
    assert largest.split()[3:] == [
        "8.63",
        "63.24",
        "93.30",
        "89.05",
        "18.34",
        "35.76",
        "0.93",
        "0.98",
        "17.48",
        "42.16",
    ]
    assert len({len(line) for line in (heads, ours, smallest, largest)}) == 1


def test_references_are_of_metrics_that_exist() -> None:
    from regpt2.base import shelves

    for one in references():
        assert one.metric.removesuffix("_centered") in shelves.load("evals", one.eval).PROTOCOLS, one
        assert one.source and 0 < one.n_params < 2e9


def test_a_loss_is_held_only_against_the_same_text() -> None:
    on = {name: references_for("val_loss", "loss", name)[0].value for name in ("fineweb_edu", "fineweb", "openwebtext")}
    assert on == {"fineweb_edu": 3.2924, "fineweb": 3.424958, "openwebtext": 3.12}
    assert references_for("val_loss", "loss", "my_text") == []


def test_the_nearest_size_of_each_family_is_shown() -> None:
    found = references_for("hellaswag", "acc_norm")
    assert [one.model for one in nearest(found, 124_439_808)] == ["GPT-2 124M", "GPT-3 124M"]
    assert [one.model for one in nearest(found, 2_000_000_000)] == ["GPT-2 1558M", "GPT-3 1558M"]


def test_groups_hold_entries_that_exist() -> None:
    from regpt2.base import shelves

    assert {name for group in GROUPS.values() for name in group} <= set(shelves.entries("evals"))
