"""The exchange of gradients: buckets beside the backward pass, by hand and at their limits."""

import dataclasses

import pytest

from regpt2.machine.known_gpus import MACHINES
from regpt2.machine.planning.exchange import (
    BUCKET,
    Gradients,
    Wires,
    buckets,
    exposed_seconds,
    gathering_seconds,
    gradients_of,
    sent_after,
)
from regpt2.machine.planning.formulas import Place
from regpt2.model.gpt import GPTConfig
from regpt2.model.modern import ModernConfig
from regpt2.training.memory import Setup

MiB = 1 << 20
SMALL = Setup(model=GPTConfig(), micro_batch=8, seq_len=1024, ranks=8)
H100 = Place(MACHINES["H100"], 8).wires


def test_three_buckets_by_hand() -> None:
    """Four ranks: a number of 4 bytes passes a wire 2 x 3/4 times, so 1,000 of them take 6,000 / 1,000 = 6 s, and 1 s.

    The buckets are full after 2, 4 and 20 s. The first is on its way from 2 to 9 s, the second has to wait and ends at
    16 s, the third (500 numbers: 3 + 1 s) leaves at 20 s and ends at 24 s: 4 s after the backward pass.
    """
    wires = Wires(ranks=4, bus=1000.0, latency_s=1.0)
    filled = [Gradients(2.0, 1000), Gradients(4.0, 1000), Gradients(20.0, 500)]
    assert sent_after(filled, wires, 20.0) == pytest.approx(4.0)
    assert sent_after(filled[:2], wires, 20.0) == 0.0  # all hidden
    assert sent_after(filled[:2], wires, 10.0) == pytest.approx(6.0)  # a queue
    assert sent_after(filled, dataclasses.replace(wires, gradient_bytes=2), 20.0) == pytest.approx(2.5)


def test_buckets_fill_as_ddps_do() -> None:
    """1 MiB first, then 25 MiB each, a large gradient whole; the last takes what is left."""
    sizes = [100, MiB // 4, 10 * MiB // 4, 16 * MiB // 4, 150 * MiB // 4, 7]
    filled = buckets([Gradients(float(i), n) for i, n in enumerate(sizes)])
    assert [(b.ready_s, b.numbers) for b in filled] == [
        (1.0, 100 + MiB // 4),
        (3.0, 26 * MiB // 4),
        (4.0, 150 * MiB // 4),
        (5.0, 7),
    ]


@pytest.mark.parametrize("model", [GPTConfig(), ModernConfig(), GPTConfig(n_layer=48, n_head=25, n_embd=1600)])
def test_every_gradient_is_sent_once_and_the_embeddings_last(model: GPTConfig) -> None:
    one = dataclasses.replace(SMALL, model=model)
    found = gradients_of(one, 1.0)
    assert sum(some.numbers for some in found) == one.n_params
    assert [some.ready_s for some in found] == sorted(some.ready_s for some in found)
    embedding = model.padded_vocab_size * model.n_embd
    assert found[-1].ready_s == 1.0
    assert found[-1].numbers >= embedding
    untied = isinstance(model, ModernConfig)
    assert (found[0] == Gradients(0.0, embedding)) == untied
    assert len(buckets(found)) < 1 + one.n_params * 4 / BUCKET + 1


def test_the_tied_heads_gradient_is_never_hidden() -> None:
    """154 MB over eight H100 on NVLink: 2 x 7/8 x 154.5e6 / 380e9 = 0.71 ms, however long the backward pass."""
    for micro_s in (0.1, 10.0):
        assert exposed_seconds(SMALL, H100, micro_s) == pytest.approx(0.71e-3, rel=0.25)
        assert exposed_seconds(SMALL, H100, micro_s) >= 0.71e-3


def test_without_time_to_hide_in_all_of_it_is_exposed() -> None:
    n_buckets = len(buckets(gradients_of(SMALL, 0.0)))
    whole_s = 2 * 7 / 8 * 4 * SMALL.n_params / 380e9 + n_buckets * H100.latency_s
    assert exposed_seconds(SMALL, H100, 0.0) == pytest.approx(whole_s)
    assert exposed_seconds(SMALL, H100, 0.0) > exposed_seconds(SMALL, H100, 1.0)


def test_over_infinitely_fast_wires_only_the_last_buckets_latency_is_left() -> None:
    fast = dataclasses.replace(H100, bus=float("inf"))
    assert exposed_seconds(SMALL, fast, 1.0) == pytest.approx(fast.latency_s)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "ordered"])
def test_one_rank_exchanges_nothing_and_slow_networks_expose_more(strategy: str) -> None:
    one = dataclasses.replace(SMALL, strategy=strategy, ranks=64)
    alone = Place(MACHINES["H100"]).wires
    assert exposed_seconds(one, alone, 0.02) == 0.0
    times = [exposed_seconds(one, Place(MACHINES["H100"], 64, 8, gbps).wires, 0.02) for gbps in (400, 100, 25)]
    assert 0 < times[0] < times[1] < times[2]


def test_fsdp_gathers_weights_in_each_micro_step_and_scatters_gradients_in_the_last() -> None:
    """Nothing hides behind passes without length: 2 x 2 bytes a parameter gathered, and once 4 scattered."""
    one = dataclasses.replace(SMALL, strategy="fsdp", ranks=8)
    wires = dataclasses.replace(H100, latency_s=0.0)
    assert gathering_seconds(one, wires, 0.0) == pytest.approx(7 / 8 * 4 * one.n_params / wires.bus)
    assert exposed_seconds(one, wires, 0.0) == pytest.approx(7 / 8 * 4 * one.n_params / wires.bus)
    assert gathering_seconds(SMALL, wires, 0.0) == 0.0


def test_half_the_bytes_take_half_the_time() -> None:
    """parallel.reduce_dtype = bf16, where only the tied head is exposed: all but the latencies halves."""
    wires = dataclasses.replace(H100, latency_s=0.0)
    half = dataclasses.replace(wires, gradient_bytes=2)
    assert exposed_seconds(SMALL, half, 1.0) == pytest.approx(exposed_seconds(SMALL, wires, 1.0) / 2)


def test_what_counts_between_nodes_is_the_sum_of_a_nodes_network_cards() -> None:
    """8 x 400 Gbit/s are 400 GB/s, of which an all-reduce gets 300; one such card alone gets 37.5."""
    h100 = MACHINES["H100"]
    assert Place(h100, 8).wires.bus == 380e9
    assert Place(h100, 64).wires.bus == pytest.approx(300e9)
    assert Place(h100, 64, gpus_per_node=1).wires.bus == pytest.approx(37.5e9)
    assert Place(h100, 64, network_gbps=800).wires.bus == 380e9  # then NVLink is the narrower
    assert Place(MACHINES["A100-80"], 16).wires.bus == pytest.approx(150e9)
    assert Place(MACHINES["4090"], 16).wires.bus == pytest.approx(9.4e9, rel=0.01)
    assert [Place(h100, n).nodes for n in (1, 8, 16, 512)] == [1, 1, 2, 64]
    assert Place(h100, 512).wires.latency_s == pytest.approx(110e-6)
