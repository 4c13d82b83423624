"""Long texts: every token once, in its window; equal to a slow reference, for any batch and number of ranks."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rank_processes import spawn
from regpt2.base.errors import Problem
from regpt2.base.ranks.world import World
from regpt2.data.tokenizer import load_tokenizer
from regpt2.evals.scoring import texts
from regpt2.evals.scoring.context import EvalContext
from regpt2.evals.scoring.texts import Text, score_texts
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.training.ranks.strategy import in_compute_type

T, V, EOT = 16, 257, 256
TINY = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=V)
MODEL = GPT(TINY, seed=1).double()
with torch.no_grad():
    MODEL.wpe.weight.mul_(30)  # so that a token in another place of its window has another loss
CONTEXT = EvalContext(
    model=MODEL,
    world=World(rank=0, local_rank=0, size=1, device=torch.device("cpu")),
    data=None,
    seq_len=T,
    batch=4,
    val_tokens=0,
    tokenizer=load_tokenizer("bytes"),
)
DOCUMENTS = [np.random.default_rng(n).integers(0, 256, n).astype(np.uint16) for n in (1, 5, 15, 16, 17, 32, 50)]


def read(documents: Sequence[np.ndarray] = DOCUMENTS) -> Callable[[], list[Text]]:
    return lambda: [Text(documents, n_units=7)]


def slow_nats(ids: np.ndarray) -> float:
    """One token at a time, from the start of its window, the whole logits in fp64."""
    stream, total = [EOT, *map(int, ids)], 0.0
    for target in range(1, len(stream)):
        end = min(math.ceil(target / T) * T, len(ids))  # of its window
        before = stream[max(0, end - T) : target]
        with torch.no_grad():
            total -= float(MODEL(torch.tensor([before]))[0, -1].log_softmax(0)[stream[target]])
    return total


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_it_equals_a_slow_reference_for_any_batch_size(batch: int) -> None:
    (score,) = score_texts(replace(CONTEXT, batch=batch), "test", 1, read())
    assert score.nats == pytest.approx(sum(map(slow_nats, DOCUMENTS)), rel=1e-12)
    assert score.n_tokens == sum(map(len, DOCUMENTS)) and score.n_units == 7


def test_logits_in_small_chunks_are_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = score_texts(CONTEXT, "test", 1, read())
    monkeypatch.setattr(texts, "_LOGIT_BYTES", 3 * 4 * V)  # three tokens
    (chunked,) = score_texts(CONTEXT, "test", 1, read())
    assert chunked.nats == pytest.approx(whole.nats, rel=1e-12)


def test_a_document_does_not_see_the_one_before() -> None:
    (both,) = score_texts(CONTEXT, "test", 1, read(DOCUMENTS[-2:]))
    (first,), (second,) = (score_texts(CONTEXT, "test", 1, read([document])) for document in DOCUMENTS[-2:])
    assert both.nats == pytest.approx(first.nats + second.nats, rel=1e-12)


def test_a_uniform_model_has_perplexity_v_exactly() -> None:
    model = GPT(TINY)
    torch.nn.init.zeros_(model.wte.weight)
    (score,) = score_texts(replace(CONTEXT, model=model), "test", 1, lambda: [Text(DOCUMENTS, n_units=2 * 136)])
    assert score.n_tokens == 136
    assert score.token_perplexity == pytest.approx(V, rel=1e-6)
    assert score.perplexity == pytest.approx(math.sqrt(V), rel=1e-6)  # two units a token
    assert score.bits == pytest.approx(math.log2(V) / 2, rel=1e-6)


def test_an_empty_text_has_no_perplexity() -> None:
    (score,) = score_texts(CONTEXT, "test", 1, lambda: [Text([], 0)])
    assert (score.perplexity, score.token_perplexity, score.bits) == (None, None, None)


def test_it_computes_in_the_type_of_the_model() -> None:
    model = GPT(TINY, seed=1)
    (exact,) = score_texts(replace(CONTEXT, model=model), "test", 1, read())
    (rounded,) = score_texts(replace(CONTEXT, model=in_compute_type(model, torch.bfloat16)), "test", 1, read())
    assert rounded.nats == pytest.approx(exact.nats, rel=1e-3)  # 8 bits of mantissa, the errors of 136 tokens averaged
    assert rounded.nats != exact.nats


def test_each_batch_is_announced() -> None:
    seen: list[int] = []
    score_texts(replace(CONTEXT, on_batch=lambda: seen.append(1)), "test", 1, read())
    assert len(seen) == 3  # 1 + 1 + 1 + 1 + 2 + 2 + 4 windows, four at a time


def one_rank(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    context = replace(CONTEXT, batch=1, world=World(rank=rank, local_rank=rank, size=2, device=torch.device("cpu")))
    (score,) = score_texts(context, "test", 1, read())
    said = [f"{score.nats!r} {score.n_tokens} {score.n_units}"]

    def fails() -> list[Text]:
        raise Problem("no such file")

    for reads in (read(DOCUMENTS[: 7 - rank]), fails if rank else read()):  # other data; none
        try:
            score_texts(context, "test", 1, reads)
        except Problem as problem:
            said.append(str(problem))
    Path(out, f"{rank}.txt").write_text("\n".join(said))
    os._exit(0)  # torch's own end of a group may wait forever, or abort


def test_two_ranks_give_the_score_of_one_and_notice_each_others_failures(tmp_path: Path, unused_port: int) -> None:
    spawn(one_rank, args=(unused_port, str(tmp_path)), nprocs=2)
    (alone,) = score_texts(CONTEXT, "test", 1, read())
    for rank, last in enumerate(("test failed on 1 other rank(s)", "no such file")):
        score, other_data, failure = (tmp_path / f"{rank}.txt").read_text().split("\n")
        nats, n_tokens, n_units = score.split()
        assert float(nats) == pytest.approx(alone.nats, rel=1e-14)
        assert (int(n_tokens), int(n_units)) == (136, 7)
        assert "the ranks read other data" in other_data
        assert failure == last
