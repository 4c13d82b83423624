"""HellaSwag: each protocol by hand, one ending at a time; both forms of the file; a random model is at 25 %."""

import json
import random
import struct
from pathlib import Path

import pytest
import torch

from regpt2.base.errors import DataError
from regpt2.base.ranks.world import World
from regpt2.data.tokenizer import load_tokenizer
from regpt2.evals import EvalContext
from regpt2.evals.hellaswag import _scene, evaluate
from regpt2.model.gpt import GPT, GPTConfig

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
BYTES = load_tokenizer("bytes")
MODEL = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=256, vocab_size=257), seed=3)
WORDS = ["a", "man", "is", "on", "the roof.", "[step]", "[title]", "he", "starts", "Then", "é", "goes,", "(slowly)"]


def context(path: Path, **changes: object) -> EvalContext:
    values = {"model": MODEL, "world": ALONE, "data": None, "seq_len": 256, "batch": 4, "val_tokens": 1}
    values |= {"tokenizer": BYTES, "files": {"hellaswag": path}}
    return EvalContext(**{**values, **changes})  # type: ignore[arg-type]


def scenes(n: int, seed: int = 0) -> list[dict[str, object]]:
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    made = []
    for i in range(n):
        a, b = text(2, 6), text(0, 2)
        made.append({"ind": i, "activity_label": "Roof work", "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}".strip()})
        made[-1] |= {"endings": [text(1, 5) for _ in range(4)], "label": i % 4}
    return made


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def token_nats(before: str, ending: str) -> list[float]:
    ids = torch.tensor([BYTES.encode(before + ending)])
    n = len(BYTES.encode(ending))
    log_p = MODEL(ids[:, :-1])[0].double().log_softmax(dim=1)[-n:]
    return (-log_p[range(n), ids[0, -n:]]).tolist()


def harness_text(text: str) -> str:
    """What lm_eval/tasks/hellaswag/utils.py does, step by step and without its expressions."""
    text = text.strip().replace(" [title]", ". ")
    while "[" in text and "]" in text[text.index("[") :]:
        start = text.index("[")
        text = text[:start] + text[text.index("]", start) + 1 :]
    return text.replace("  ", " ")


def test_every_protocol_is_what_it_says(tmp_path: Path) -> None:
    rows = scenes(40)
    right = {"acc_norm": 0, "acc": 0, "harness_acc": 0, "harness_acc_norm": 0}
    for row in rows:
        nats = [token_nats(str(row["ctx"]), " " + ending) for ending in row["endings"]]  # type: ignore[attr-defined]
        prompt = harness_text(f"Roof work: {row['ctx_a']} {str(row['ctx_b']).capitalize()}")
        cleaned = [harness_text(ending) for ending in row["endings"]]  # type: ignore[attr-defined]
        moved = " " * (len(prompt) - len(prompt.rstrip()))  # spaces at its end are scored with the ending
        theirs = [sum(token_nats(prompt.rstrip(), f"{moved} {ending}")) for ending in cleaned]
        losses = {
            "acc_norm": [sum(x) / len(x) for x in nats],
            "acc": [sum(x) for x in nats],
            "harness_acc": theirs,
            "harness_acc_norm": [x / max(1, len(ending)) for x, ending in zip(theirs, cleaned, strict=True)],
        }
        for name, loss in losses.items():
            right[name] += loss.index(min(loss)) == row["label"]
    found = evaluate(context(write(tmp_path / "hellaswag_val.jsonl", rows)))
    assert found["count"] == 40
    assert {name: found[name] for name in right} == {name: n / 40 for name, n in right.items()}
    assert len(set(right.values())) > 1, "the protocols should differ on this set"
    share = right["acc"] / 40
    assert found["acc_stderr"] == pytest.approx((share * (1 - share) / 39) ** 0.5)


def test_brief_is_the_completion_alone_and_limit_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "hellaswag_val.jsonl", scenes(12))
    brief = evaluate(context(path, brief=True))
    assert set(brief) == {"acc_norm", "acc_norm_stderr", "acc", "acc_stderr", "count"}
    assert evaluate(context(path))["acc_norm"] == brief["acc_norm"]
    assert evaluate(context(tmp_path, limit=5))["count"] == 5


def test_a_processed_file_says_that_it_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"activity_label": "x", "ctx": "a b", "query": "x: a b", "endings": list("abcd"), "label": 1}] * 3
    found = evaluate(context(write(tmp_path / "p.jsonl", rows)))
    assert found["processed_text"] == 1
    assert "text is processed" in capsys.readouterr().err


def test_a_model_that_knows_nothing_is_at_chance(tmp_path: Path) -> None:
    """400 scenes whose right ending is equally often each of four: 25 % within three standard errors of 2.2 %."""
    found = evaluate(context(write(tmp_path / "hellaswag_val.jsonl", scenes(400, seed=1)), brief=True))
    assert found["acc_norm"] == pytest.approx(0.25, abs=0.065)
    assert found["acc"] == pytest.approx(0.25, abs=0.065)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: .*expected activity_label"),
        ("[]", "line 2: .*expected"),
        ('{"ctx": "a"}', "line 2: no 'endings'"),
        (
            '{"ctx":"a","ctx_a":"a","ctx_b":"","activity_label":"x","endings":["b","c"],"label":2}',
            "right choice 2 of 2",
        ),
    ],
)
def test_a_bad_line_is_named(line: str, told: str, tmp_path: Path) -> None:
    path = write(tmp_path / "hellaswag_val.jsonl", scenes(1))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=told):
        evaluate(context(path))


def write_llmc(path: Path, rows: list[dict[str, object]]) -> Path:
    """As llm.c's dev/data/hellaswag.py packs them: a header of 256 int32, then uint16."""
    encode, stream, longest = load_tokenizer("gpt2").encode, list[int](), 0
    for number, row in enumerate(rows):
        tokens = [encode(str(row["ctx"])), *(encode(f" {ending}") for ending in row["endings"])]  # type: ignore[attr-defined]
        one = [65535, 0, number, row["label"], 4]
        for ids in tokens:
            one += [len(ids), *ids]
        one[1] = 2 * len(one)
        longest = max(longest, one[1])  # type: ignore[call-overload]
        stream += one  # type: ignore[arg-type]
    header = struct.pack("<256i", 20240522, 1, len(rows), longest, *[0] * 252)
    path.write_bytes(header + struct.pack(f"<{len(stream)}H", *stream))
    return path


@pytest.fixture(scope="module")
def gpt2() -> dict[str, object]:
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=50257), seed=3)
    return {"model": model, "tokenizer": load_tokenizer("gpt2"), "seq_len": 64}


def test_llm_c_s_packed_file_gives_the_figures_of_the_text(
    gpt2: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = scenes(30, seed=2)
    text = evaluate(context(write(tmp_path / "h.jsonl", rows), **gpt2, brief=True))
    assert text["acc_norm"] != text["acc"], "the two should differ on this set"
    folder = tmp_path / "llm.c"
    folder.mkdir()
    path = write_llmc(folder / "hellaswag_val.bin", rows)
    assert evaluate(context(path, **gpt2, brief=True)) == text
    assert not capsys.readouterr().err
    assert evaluate(context(folder, **gpt2)) == text
    assert "holds no text, so only acc_norm and acc" in capsys.readouterr().err
    assert evaluate(context(path, **gpt2, limit=7))["count"] == 7


def test_llm_c_s_packed_file_is_refused_for_another_tokenizer_and_where_it_is_damaged(
    gpt2: dict[str, object], tmp_path: Path
) -> None:
    path = write_llmc(tmp_path / "hellaswag_val.bin", scenes(3))
    with pytest.raises(DataError, match=r"tokens of GPT-2's tokenizer, this model's is bytes; give the text: --files"):
        evaluate(context(path))
    whole = path.read_bytes()
    for length in (100, 1025, 1024, 1030, len(whole) // 4 * 2, len(whole) - 2):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"hellaswag_val\.bin"):
            evaluate(context(path, **gpt2))
    for place, value in ((4, 2), (8, 0), (8, 4), (1024, 1), (1026, 3), (1030, 4), (1032, 3), (1034, 0), (1036, 50257)):
        path.write_bytes(whole[:place] + struct.pack("<H", value) + whole[place + 2 :])
        with pytest.raises(DataError, match=r"hellaswag_val\.bin"):
            evaluate(context(path, **gpt2))


def test_the_harness_s_wording_of_a_scene_with_tags() -> None:
    record = {"activity_label": "Home [x]", "ctx": "raw [header] How [title] Take it.", "label": "1"}
    record |= {"ctx_a": "[header] How to [title] Take  it. [step] Go", "ctx_b": "ann is"}
    scene = _scene({**record, "endings": ["[substeps] sits.", "left [title] Right", "a", "b"]})
    assert scene.harness.context == "Home : How to. Take it. Go Ann is"
    assert list(scene.harness.choices) == [" sits.", "left. Right", "a", "b"]
    assert (scene.completion.context, scene.completion.choices[0]) == (record["ctx"], "[substeps] sits.")
    assert scene.completion.gold == scene.harness.gold == 1
