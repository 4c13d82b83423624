"""LAMBADA and the Children's Book Test: known answers of made-up models, and a slow reference on real passages."""

import io
import json
import math
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rank_processes import spawn
from regpt2.base.errors import DataError, Problem
from regpt2.base.ranks.world import World
from regpt2.data.tokenizer import load_tokenizer
from regpt2.evals import cbt, lambada
from regpt2.evals.scoring.context import EvalContext
from regpt2.evals.scoring.questions import question
from regpt2.model.gpt import GPT, GPTConfig

REAL = Path(__file__).parents[3] / "shared" / "data" / "eval" / "lambada_test.jsonl"
V, T = 257, 256


def model_that_likes(byte: str, logit: float) -> GPT:
    """Wherever it is, one byte has this logit and all others have 0."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=T, vocab_size=V))
    with torch.no_grad():
        model.wte.weight.zero_()
        model.wte.weight[ord(byte), 0] = logit
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    return model


def nats_of(text: str, liked: str, logit: float) -> float:
    """Of the same model, by hand."""
    return len(text) * math.log(V - 1 + math.exp(logit)) - logit * text.count(liked)


CONTEXT = EvalContext(
    model=model_that_likes(" ", 3.0),
    world=World(rank=0, local_rank=0, size=1, device=torch.device("cpu")),
    data=None,
    seq_len=T,
    batch=8,
    val_tokens=0,
    tokenizer=load_tokenizer("bytes"),
)


def given(name: str, path: Path, **changes: object) -> EvalContext:
    return replace(CONTEXT, files={name: path}, **changes)  # type: ignore[arg-type]


def test_a_question_is_cut_where_the_harness_cuts() -> None:
    gpt2 = load_tokenizer("gpt2")
    one = question(gpt2, "It is  ", ["there", " far"])
    assert [gpt2.decode(ids) for ids in (one.context, *one.endings)] == ["It is", "  there", "   far"]
    assert question(gpt2, "", ["there"]).context == [gpt2.eot]


def passages(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_lambada_of_a_model_that_says_nothing_but_spaces(tmp_path: Path) -> None:
    texts = ["the last word", "two spaces end this one  ", "and here three   ", "an ö"]
    targets = [" word", "  ", "   ", " Ã¶"]  # spaces before the last one go with it; a byte is a token here
    nats = torch.tensor([nats_of(target, " ", 3.0) for target in targets], dtype=torch.float64)
    found = lambada.evaluate(given("lambada", passages(tmp_path / "p.jsonl", *texts)))
    perplexity = math.exp(float(nats.mean()))
    assert found == {
        "accuracy": 0.5,
        "accuracy_stderr": pytest.approx(math.sqrt(0.5 * 0.5 / 3)),  # n - 1 = 3
        "perplexity": pytest.approx(perplexity, rel=1e-5),
        "perplexity_stderr": pytest.approx(perplexity * float(nats.std()) / 2, rel=1e-5),
        "count": 4,
    }
    one = lambada.evaluate(given("lambada", tmp_path / "p.jsonl", limit=1))
    assert (one["count"], one["accuracy"], one["accuracy_stderr"]) == (1, 0.0, None)


@pytest.mark.parametrize("line", ["word", "not json", "[]", '{"text": 1}', '{"text": "word"}', "[" * 100_000])
def test_what_is_no_passage_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = passages(tmp_path / "p.jsonl", "a b")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl, line 2: expected"):
        lambada.evaluate(given("lambada", path))


@pytest.mark.skipif(not REAL.exists(), reason="no ../shared/data")
def test_real_passages_equal_a_slow_reference() -> None:
    gpt2 = load_tokenizer("gpt2")
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=T, vocab_size=50257), seed=1).eval()
    with torch.no_grad():
        model.wte.weight.mul_(20)  # far from uniform
    nats = []
    for line in REAL.read_text(encoding="utf-8").splitlines()[:20]:
        text = json.loads(line)["text"]
        before = text[: text.rindex(" ")]
        ids, n_before = gpt2.encode(text), len(gpt2.encode(before))
        with torch.no_grad():
            log_p = model(torch.tensor([ids]))[0].double().log_softmax(1)
        nats.append(-sum(float(log_p[i - 1, ids[i]]) for i in range(n_before, len(ids))))
    found = lambada.evaluate(given("lambada", REAL, model=model, tokenizer=gpt2, limit=20))
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / 20), rel=1e-4)
    assert found["count"] == 20


SENTENCES = "".join(f"{n} Sentence {n} , it was n't much .\n" for n in range(1, 21))
CLOZE = SENTENCES + "21 `` Dear XXXXX , '' he said .\t{answer}\t\t{words}\n\n"


@pytest.fixture
def cbt_archive(tmp_path: Path) -> Path:
    kinds = {
        "CN": CLOZE.format(answer="qqqq", words="four|qqqq|five|nine") + CLOZE.format(answer="four", words="four|qqqq"),
        "NE": CLOZE.format(answer="Tim", words="Tim|Bill") + CLOZE.format(answer="Bill", words="Tim|Bill|qq"),
    }
    with tarfile.open(tmp_path / "cbt.tar.gz", "w:gz") as packed:
        for kind, text in kinds.items():
            entry = tarfile.TarInfo(f"CBTest/data/cbtest_{kind}_valid_2000ex.txt")
            entry.size = len(text)
            packed.addfile(entry, io.BytesIO(text.encode()))
    return tmp_path / "cbt.tar.gz"


def test_cbt_of_a_model_that_likes_a_letter(cbt_archive: Path) -> None:
    """Of words of one length it takes that with the letter; else the shortest, as each byte costs it the same."""
    context = given("cbt", cbt_archive, model=model_that_likes("q", 3.0))
    found = cbt.evaluate(context)
    assert found == {
        "cn_accuracy": 0.5,
        "cn_accuracy_stderr": 0.5,
        "ne_accuracy": 0.5,
        "ne_accuracy_stderr": 0.5,
        "count": 4,
    }
    assert cbt.evaluate(replace(context, limit=1))["cn_accuracy"] == 1.0
    brief = cbt.evaluate(replace(context, brief=True, files={"cbt": cbt_archive.parent}))
    assert brief == {"cn_accuracy": 0.5, "cn_accuracy_stderr": 0.5, "count": 2}


def test_a_cloze_is_detokenized_around_its_blank(cbt_archive: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    (one, answer), _ = cbt._read(given("cbt", cbt_archive), "NE")
    passage = " ".join(f"Sentence {n}, it wasn't much." for n in range(1, 21)) + ' "Dear'
    assert tokenizer.decode(one.context) == passage
    assert [tokenizer.decode(ending) for ending in one.endings] == [' Tim," he said.', ' Bill," he said.']
    assert answer == 0


def test_what_is_no_cloze_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cbtest_CN_valid_2000ex.txt"
    for text, message in (
        ("1 a b .\n21 no blank .\ta\t\ta|b\n", r"CN, line 2: expected a sentence with XXXXX"),
        ("21 a XXXXX .\tc\t\ta|b\n", r"CN, line 1: expected"),
        ("21 a XXXXX .\n", r"CN, line 1: expected"),
        ("1 nothing else\n", "no questions"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            cbt.evaluate(given("cbt", tmp_path, brief=True))
    with pytest.raises(DataError, match=r"give the folder that holds them"):
        cbt.evaluate(given("cbt", path))


def one_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    world = World(rank=rank, local_rank=rank, size=2, device=torch.device("cpu"))
    said = []
    for path in (Path(folder) / "p.jsonl", Path(folder) / ("p.jsonl" if rank else "absent")):
        try:
            said.append(json.dumps(lambada.evaluate(given("lambada", path, world=world, batch=1))))
        except Problem as problem:
            said.append(str(problem))
    Path(folder, f"{rank}.txt").write_text("\n".join(said))
    os._exit(0)  # torch's own end of a group may wait forever, or abort


def test_two_ranks_give_the_figures_of_one_and_none_waits_for_one_without_data(
    tmp_path: Path, unused_port: int
) -> None:
    passages(tmp_path / "p.jsonl", *(f"passage {'x' * n} of word{n}" for n in range(40)))
    spawn(one_rank, args=(unused_port, str(tmp_path)), nprocs=2)
    alone = lambada.evaluate(given("lambada", tmp_path / "p.jsonl"))
    for rank, failure in enumerate(("there is no file", "lambada failed on 1 other rank(s)")):
        figures, said = (tmp_path / f"{rank}.txt").read_text().split("\n")
        assert json.loads(figures) == pytest.approx(alone, rel=1e-6)
        assert failure in said
