"""Validation loss: the true mean over a fixed set, whatever the batch size; ln V for a model that knows nothing."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rank_processes import spawn
from regpt2.base.errors import DataError, Problem, UsageError
from regpt2.base.ranks.world import World
from regpt2.data.checks.baselines import baselines
from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.shards import open_tokens
from regpt2.evals import EvalContext, val_loss
from regpt2.evals.val_loss import PROTOCOLS, evaluate
from regpt2.model.gpt import GPT, GPTConfig

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
MODEL = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=257), seed=1)


def context(data: Path | None, model: nn.Module = MODEL, **changes: object) -> EvalContext:
    values = {"model": model, "world": ALONE, "data": data, "seq_len": 32, "batch": 4, "val_tokens": 10_000}
    return EvalContext(**{**values, **changes})  # type: ignore[arg-type]


def test_it_is_the_mean_over_every_token_for_any_batch_size(tiny_data: Path) -> None:
    """62 windows: batches of 4, 7 and 100 end with short ones; a mean of batch means would give other figures."""
    with open_tokens(tiny_data, "val") as tokens:
        ids = torch.from_numpy(tokens.read(0, tokens.n_tokens).astype(np.int64))
    n_windows = (len(ids) - 1) // 32
    with torch.no_grad():
        nats = [
            nn.functional.cross_entropy(
                MODEL(ids[None, w * 32 : w * 32 + 32])[0].double(), ids[w * 32 + 1 : w * 32 + 33]
            )
            for w in range(n_windows)
        ]
    expected = float(torch.stack(nats).mean())
    for batch in (1, 4, 7, 100):
        found = evaluate(context(tiny_data, batch=batch))
        assert found["loss"] == pytest.approx(expected, abs=1e-6)
        assert found["tokens"] == n_windows * 32
        assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(
            expected / math.log(2), rel=1e-5
        )  # one byte a token, no EOT here


@pytest.mark.parametrize("seq_len", [32, 24])
def test_a_model_with_a_window_is_also_scored_in_short_windows_on_the_same_tokens(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, seq_len: int
) -> None:
    """By hand, a row at a time; of 24 tokens the short windows of 16 do not tile the whole, and the last is shorter."""
    monkeypatch.setattr(val_loss, "SHORT", 16)
    model = GPT(MODEL.config, seed=1)
    model.set_window(5)
    most = 510
    n = most // seq_len * seq_len
    with open_tokens(tiny_data, "val") as tokens:
        ids = torch.from_numpy(tokens.read(0, n + 1).astype(np.int64))

    def by_hand(T: int) -> float:
        with torch.no_grad():
            nats = [model(ids[None, i : min(i + T, n)], ids[None, i + 1 : min(i + T, n) + 1]) for i in range(0, n, T)]
        return sum(float(x) * (min(i + T, n) - i) for x, i in zip(nats, range(0, n, T), strict=True)) / n

    for batch in (1, 3, 50):
        found = evaluate(context(tiny_data, model, batch=batch, seq_len=seq_len, val_tokens=most))
        assert found["tokens"] == n
        assert found["loss"] == pytest.approx(by_hand(seq_len), abs=1e-6)
        assert found["loss_1024"] == pytest.approx(by_hand(16), abs=1e-6)
        assert found["loss_1024"] != pytest.approx(found["loss"], abs=1e-5)
    assert list(found)[:2] == ["loss", "loss_1024"] and set(PROTOCOLS) >= {"loss", "loss_1024"}


def test_only_longer_windows_than_1024_tokens_of_a_model_that_has_one_are_scored_twice(tiny_data: Path) -> None:
    windowed = GPT(MODEL.config, seed=1)
    windowed.set_window(5)
    assert "loss_1024" not in evaluate(context(tiny_data, windowed))
    assert "loss_1024" not in evaluate(context(tiny_data))
    assert val_loss.SHORT == 1024


def test_a_pass_takes_no_more_tokens_however_long_the_sequences_are() -> None:
    rows = {T: context(None, seq_len=T, batch=8).rows_of(T) for T in (32, 1024, 8192, 16_384, 65_536, 100_000)}
    assert rows == {32: 8, 1024: 8, 8192: 8, 16_384: 4, 65_536: 1, 100_000: 1}
    assert context(None, seq_len=65_536, batch=1).rows_of(1024) == 64


def test_a_uniform_model_has_exactly_ln_v(tiny_data: Path) -> None:
    class Uniform(nn.Module):
        def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(torch.zeros(ids.numel(), 257), targets.flatten())

    assert evaluate(context(tiny_data, model=Uniform()))["loss"] == pytest.approx(math.log(257), rel=1e-6)


def test_only_so_many_tokens_are_scored(tiny_data: Path) -> None:
    assert evaluate(context(tiny_data, val_tokens=100))["tokens"] == 96


def test_the_mode_of_the_model_is_restored_also_after_an_error(tiny_data: Path) -> None:
    MODEL.train()
    evaluate(context(tiny_data))
    assert MODEL.training

    class Broken(nn.Module):
        def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    broken = Broken().train()
    with pytest.raises(RuntimeError):
        evaluate(context(tiny_data, model=broken))
    assert broken.training


def test_dropout_is_off_while_a_model_is_scored(tiny_data: Path) -> None:
    """A run evaluates the model that it trains, in training mode."""
    dropping = GPT(replace(MODEL.config, dropout=0.5), seed=1)
    assert evaluate(context(tiny_data, model=dropping.train())) == evaluate(context(tiny_data))


def test_what_is_missing_is_said(tiny_data: Path) -> None:
    with pytest.raises(UsageError, match="--data DIR"):
        evaluate(context(None))
    with pytest.raises(DataError, match="2,000 tokens, expected at least 5,001"):
        evaluate(context(tiny_data, seq_len=5_000))


def failing_rank(rank: int, port: int, data: str, out: str) -> None:
    """Rank 1 cannot read the data; both must come to an end, and the next reduction must be the next one for both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    world = World(rank=rank, local_rank=rank, size=2, device=torch.device("cpu"))
    folder = Path(data) if rank == 0 else Path(data) / "nothing"
    try:
        evaluate(context(folder, world=world))
        said = "no error"
    except Problem as problem:
        said = str(problem)
    after = float(world.sum(torch.tensor(float(rank + 1))))
    Path(out, f"{rank}.txt").write_text(f"{after}\n{said}")
    os._exit(0)  # torch's own end of a group may wait forever, or abort


def test_a_rank_that_fails_leaves_no_other_waiting(tiny_data: Path, tmp_path: Path, unused_port: int) -> None:
    spawn(failing_rank, args=(unused_port, str(tiny_data), str(tmp_path)), nprocs=2)
    assert (tmp_path / "0.txt").read_text() == "3.0\nval_loss failed on 1 other rank(s)"
    assert (tmp_path / "1.txt").read_text().startswith("3.0\n")
    assert "no such data folder" in (tmp_path / "1.txt").read_text()


def test_baselines_are_what_they_say(tiny_data: Path) -> None:
    """Against an entropy worked out in numpy, and the gzip module."""
    import gzip

    with open_tokens(tiny_data, "train") as train, open_tokens(tiny_data, "val") as val:
        counts = np.bincount(train.read(0, train.n_tokens), minlength=257) + 1
        held_out = val.read(0, val.n_tokens)
    found = baselines(tiny_data, load_tokenizer("bytes"))
    assert found["unigram"] == pytest.approx(-np.mean(np.log2(counts[held_out] / counts.sum())))
    packed = 8 * len(gzip.compress(bytes(held_out.astype(np.uint8)), 9)) / len(held_out)
    assert found["gzip"] == pytest.approx(packed, rel=0.02)  # gzip's header is 18 bytes, zlib's 6
