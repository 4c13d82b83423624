"""Endings, many at once, against one ending at a time: whole logits of the plain model, fp64 log-probabilities."""

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rank_processes import spawn
from regpt2.base.errors import CheckpointError, Problem
from regpt2.base.ranks.world import World
from regpt2.evals import EvalContext
from regpt2.evals.scoring import endings
from regpt2.evals.scoring.endings import Question, Scored, score_endings
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.ranks.strategy import in_compute_type

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=48, vocab_size=61)


def tiny(seed: int = 1) -> GPT:
    """Weights ten times larger than at the start of a training, so that the tokens before matter."""
    model = GPT(CONFIG, seed=seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(10)
    return model


MODEL = tiny()


def context(**changes: object) -> EvalContext:
    values = {"model": MODEL, "world": ALONE, "data": None, "seq_len": 48, "batch": 4, "val_tokens": 1}
    return EvalContext(**{**values, **changes})  # type: ignore[arg-type]


def made_up(n: int = 60, seed: int = 0) -> list[Question]:
    """Contexts of 1 to 12 tokens with 1 to 5 endings of 1 to 20; some too long together, some contexts twice."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(61) for _ in range(rng.randint(low, high))]

    questions = [Question(ids(1, 12), tuple(ids(1, 20) for _ in range(rng.randint(1, 5)))) for _ in range(n)]
    questions += [Question(ids(30, 60), (ids(1, 20), ids(15, 30))) for _ in range(4)]
    questions.append(Question(questions[0].context, (*questions[1].endings, questions[0].endings[0])))
    rng.shuffle(questions)
    return questions


@torch.no_grad()
def obvious(
    model: GPT, question: Question, ending: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[float, bool]:
    """One ending, by the definition: the tokens before it, cut from the left, and each of its own."""
    block_size = model.config.block_size
    ids = torch.tensor([[*question.context, *ending][-(block_size + 1) :]])
    log_p = model(ids[:, :-1], dtype=dtype)[0].double().log_softmax(dim=1)[-len(ending) :]
    targets = ids[0, -len(log_p) :]
    return -float(log_p[range(len(log_p)), targets].sum()), bool((log_p.argmax(dim=1) == targets).all())


def check(found: Scored, questions: list[Question], *, atol: float = 1e-4) -> None:
    for i, question in enumerate(questions):
        for j in range(found.nats.shape[1]):
            if j >= len(question.endings):
                assert found.nats[i, j] == torch.inf
                assert not found.n_tokens[i, j]
                assert not found.greedy[i, j]
                continue
            nats, greedy = obvious(MODEL, question, question.endings[j])
            assert found.nats[i, j] == pytest.approx(nats, abs=atol), (i, j)
            assert found.n_tokens[i, j] == len(question.endings[j])
            assert found.greedy[i, j] == greedy


@pytest.mark.parametrize("batch", [1, 3, 1000])
@pytest.mark.parametrize("enough", [1, 512])
def test_many_at_once_are_what_one_at_a_time_is(batch: int, enough: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "_ENOUGH_TOKENS", enough)
    questions = made_up()
    check(score_endings(context(batch=batch), "made_up", questions), questions)


def test_bf16_is_the_same_up_to_its_rounding() -> None:
    """Against the definition in bf16 too: sums of at most 30 tokens, each rounded to 8 bits of about 16 nats."""
    questions = made_up(20)
    found = score_endings(context(model=in_compute_type(MODEL, torch.bfloat16)), "made_up", questions)
    for i, question in enumerate(questions):
        for j, ending in enumerate(question.endings):
            nats, _ = obvious(MODEL, question, ending, torch.bfloat16)
            assert found.nats[i, j] == pytest.approx(nats, abs=0.1 * len(ending))


def test_known_answers() -> None:
    """A model that expects the next id after each: its one ending is greedy, and costs almost nothing."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=64, block_size=16, vocab_size=61))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.wte.weight[:61, :61] = torch.eye(61)
        model.h[0].mlp.c_fc.weight[:61, :61] = 40 * torch.eye(61).roll(1, dims=0)  # the next one's direction ...
        model.h[0].mlp.c_proj.weight[:64, :64] = torch.eye(64)  # ... is added to the stream
        for norm in (model.h[0].ln_2, model.ln_f):
            norm.weight.fill_(1.0)
        model.ln_f.weight.fill_(10.0)
    endings = ([5, 6, 7], [5, 6, 8], [6, 7, 8], [5])
    found = score_endings(context(model=model), "known", [Question([3, 4], endings), Question([60], ([0],))])
    assert found.greedy.tolist() == [[True, False, False, True], [True, False, False, False]]
    assert found.nats[0, [0, 3]].max() < 1e-3
    assert found.nats[0, [1, 2]].min() > 10
    assert found.n_tokens.tolist() == [[3, 3, 3, 1], [1, 0, 0, 0]]


def test_no_questions_and_empty_endings_are_no_trouble() -> None:
    assert score_endings(context(), "none", []).nats.shape == (0, 0)
    found = score_endings(context(), "empty", [Question([1], ([], [2]))])
    assert found.nats[0, 0] == 0
    assert found.n_tokens.tolist() == [[0, 1]]


@pytest.mark.parametrize("block_size", [48, 12])
def test_the_first_tokens_of_an_ending_may_not_count(block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is as if they belonged to the context, which is still computed once; also where the left is cut."""
    monkeypatch.setattr(endings, "_ENOUGH_TOKENS", 1)
    model = GPT(replace(CONFIG, block_size=block_size), seed=4)
    rng = random.Random(3)
    questions, moved = [], []
    for _ in range(20):
        before = [rng.randrange(61) for _ in range(rng.randint(1, 5))]
        after = tuple([rng.randrange(61) for _ in range(rng.randint(1, 9))] for _ in range(3))
        skipped = tuple(rng.randint(0, len(ending)) for ending in after)
        questions.append(Question(before, after, skipped))
        moved += [Question([*before, *one[:n]], (one[n:],)) for one, n in zip(after, skipped, strict=True)]
    here = context(model=model, seq_len=block_size)
    found, expected = (score_endings(here, "skipped", these) for these in (questions, moved))
    assert found.nats.flatten().tolist() == pytest.approx(expected.nats.flatten().tolist(), abs=1e-4)
    assert torch.equal(found.n_tokens.flatten(), expected.n_tokens.flatten())
    assert torch.equal(found.greedy.flatten(), expected.greedy.flatten())
    assert 0 < int(found.greedy.sum()) < found.greedy.numel()


def test_a_longer_ending_than_the_model_takes_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    question = Question([1, 2], (list(range(60)), [3]))
    found = score_endings(context(), "long", [question])
    assert found.n_tokens.tolist() == [[48, 1]]
    assert found.nats[0, 0] == pytest.approx(obvious(MODEL, question, range(60))[0], abs=1e-4)
    assert "long: 1 endings exceed the 48 tokens of a context" in capsys.readouterr().err


def test_a_broken_model_is_refused_and_its_mode_kept() -> None:
    broken = tiny()
    with torch.no_grad():
        broken.wpe.weight[3] = torch.nan
    broken.train()
    with pytest.raises(CheckpointError, match="broken: the model's loss is not finite"):
        score_endings(context(model=broken), "broken", [Question([1, 2, 3], ([4, 5], [6]))])
    assert broken.training


def test_the_context_is_computed_once_and_no_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that pass through the model, counted: 10 of the context, 4 + 4 + 3 of endings of 5, 5, 4 and 1."""
    seen = []
    hidden = GPT.hidden

    def counted(self: GPT, ids: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(ids.numel())
        return hidden(self, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(GPT, "hidden", counted)
    monkeypatch.setattr(endings, "_ENOUGH_TOKENS", 1)
    beats = []
    question = Question([*range(10)], ([1] * 5, [2] * 5, [3] * 4, [4]))
    score_endings(context(on_batch=lambda: beats.append(1)), "counted", [question])
    assert sorted(seen) == [3, 8, 10]
    assert len(beats) == 3


def a_rank(rank: int, size: int, port: int, out: str, fails: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    world = World(rank=rank, local_rank=rank, size=size, device=torch.device("cpu"))

    def on_batch() -> None:
        if fails and rank == 1:
            raise RuntimeError("out of memory")

    try:
        found = score_endings(context(world=world, on_batch=on_batch), "shared", made_up())
        torch.save([found.nats, found.n_tokens, found.greedy], Path(out, f"{rank}.pt"))
    except (Problem, RuntimeError) as error:
        Path(out, f"{rank}.txt").write_text(str(error))
    os._exit(0)  # torch's own end of a group may wait forever, or abort


def test_two_ranks_give_the_same_bits_as_one(tmp_path: Path, unused_port: int) -> None:
    for n in (1, 2):  # both in new processes, which nothing has set up before
        (tmp_path / str(n)).mkdir()
        spawn(a_rank, args=(n, unused_port, str(tmp_path / str(n)), False), nprocs=n)
    alone = torch.load(tmp_path / "1" / "0.pt", weights_only=True)
    for rank in range(2):
        together = torch.load(tmp_path / "2" / f"{rank}.pt", weights_only=True)
        assert all(map(torch.equal, together, alone))


def test_a_rank_that_fails_leaves_no_other_waiting(tmp_path: Path, unused_port: int) -> None:
    spawn(a_rank, args=(2, unused_port, str(tmp_path), True), nprocs=2)
    assert (tmp_path / "0.txt").read_text() == "shared failed on 1 other rank(s)"
    assert (tmp_path / "1.txt").read_text() == "out of memory"
