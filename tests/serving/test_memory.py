"""What a server holds: keys and values by the formula of docs/serving.md, and no more for each new length."""

import os
import subprocess
import sys

import pytest

from serving.tiny_server import TEXT_MODEL, Running

SHAPES = """
import sys, torch
from pathlib import Path
from regpt2.base.device import choose_compute, keep_few_products

def rss_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

if sys.argv[1] == "few":
    keep_few_products()
choose_compute("fp32", torch.device("cpu"))
q, k = torch.randn(4, 64, 32), torch.randn(4, 512, 32)
shapes = [(T, S) for S in range(64, 300) for T in (8, 16, 24, 32)]
for T, S in shapes[:400]:
    q[:, :T] @ k[:, :S].transpose(1, 2)
middle = rss_mb()
for T, S in shapes[400:800]:
    q[:, :T] @ k[:, :S].transpose(1, 2)
print(rss_mb() - middle)
"""


def growth_mb(what: str) -> float:
    """From 400 to 800 shapes of a product, in a process of its own: the caches read their size once."""
    done = subprocess.run([sys.executable, "-c", SHAPES, what], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_every_new_length() -> None:
    assert growth_mb("few") < 25  # as torch comes it is 260, where oneDNN computes the products


def test_a_server_asks_for_few_products(server: Running) -> None:
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == os.environ["LRU_CACHE_CAPACITY"] == "128"


def test_keys_and_values_take_what_the_page_says(server: Running) -> None:
    served = server.models[TEXT_MODEL]
    config, engine = served.loaded.model.config, served.engine
    assert engine.cache_bytes == 2 * config.n_layer * config.n_embd * served.context * 4 * engine.slots
    shown = {(12, 768): 75, (24, 1024): 201, (36, 1280): 377, (48, 1600): 629}  # MB of a slot, docs/serving.md
    assert {sizes: 2 * sizes[0] * sizes[1] * 1024 * 4 // 10**6 for sizes in shown} == shown
