"""Ranks exchange gradients while the backward pass goes on, compiled or not: bucket by bucket, as they become whole."""

import json

import pytest

from warm_processes import run_python

# One process that believes to be the first of two ranks: nothing is exchanged, and all else is torch's own.
CODE = """
import functools, json, sys, torch, torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from regpt2.base.ranks.world import World
from regpt2.model.architecture import build_model
from regpt2.model.gpt import GPTConfig
from regpt2.model.modern import ModernConfig
from regpt2.training.ranks import strategy

class SmallBuckets(strategy.DistributedDataParallel):
    def __init__(self, *given, **named):
        super().__init__(*given, **named, bucket_cap_mb=1)  # a layer has 1.77 MB

strategy.DistributedDataParallel = SmallBuckets
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # the same graphs, without a C++ compiler
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
shape = dict(n_layer=4, n_head=2, n_embd=192, block_size=16, vocab_size=300)
model = build_model(GPTConfig(**shape) if sys.argv[1] == "gpt2" else ModernConfig(**shape, document_mask=True))
world = World(rank=0, local_rank=0, size=2, device=torch.device("cpu"))
trainable = strategy.make_trainable(model, torch.float32, world, compiled=sys.argv[2] == "compiled")

def sent(state, bucket):
    with torch.profiler.record_function("sent"):
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

trainable.register_comm_hook(None, sent)
ids = torch.zeros(2, 16, dtype=torch.int64)
for _ in range(2):  # buckets get their final order in the second
    trainable(ids, ids).backward()
loss = trainable(ids, ids)
with profile(activities=[ProfilerActivity.CPU]) as seen:
    loss.backward()
events = sorted(seen.events(), key=lambda event: event.time_range.start)
names = {"sent": "s", "aten::mm": "m", "aten::bmm": "m"}
print(json.dumps("".join(names.get(event.name, "") for event in events)))
"""


@pytest.mark.parametrize(
    ("model", "mode"),
    [
        ("gpt2", "eager"),
        ("gpt2", "compiled"),
        pytest.param("modern", "eager", marks=pytest.mark.slow),
        pytest.param("modern", "compiled", marks=pytest.mark.slow),
    ],
)
def test_most_buckets_are_sent_before_the_last_products(model: str, mode: str) -> None:
    done = run_python("-c", CODE, model, mode, timeout=250)
    assert done.returncode == 0, done.stderr
    order = json.loads(done.stdout.strip().splitlines()[-1])  # s: a bucket is sent, m: a product
    in_the_midst = order.rstrip("s").count("s")
    assert in_the_midst >= 4, f"one graph gives all its gradients at its end: {order}"
