"""The memory model against what autograd keeps and what is alive at the fullest moment, counted in real steps."""

import dataclasses
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from regpt2.base import shelves
from regpt2.base.errors import ConfigError
from regpt2.base.ranks.world import World
from regpt2.config.recipe_files import load_recipe
from regpt2.machine.known_gpus import MACHINES
from regpt2.model.architecture import build_model
from regpt2.model.gpt import GPTConfig
from regpt2.model.kernels import attention, loss, recompute
from regpt2.model.language_model import LanguageModel
from regpt2.model.modern import ModernConfig
from regpt2.training import memory
from regpt2.training.lora import LoraConfig, merged, with_adapters
from regpt2.training.memory import Setup, fits, micro_batches, require_memory, step_memory, still_needed
from regpt2.training.optimizer import OptimConfig, build_optimizer, state_tensors
from regpt2.training.ranks.strategy import make_trainable
from regpt2.training.step import train_step

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
SHAPE: dict[str, Any] = dict(n_layer=4, n_head=4, n_embd=64, block_size=512, vocab_size=257)
TINY = GPTConfig(**SHAPE)


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def setup(model: GPTConfig, micro_batch: int, seq_len: int, accum: int, precision: str) -> Setup:
    return Setup(
        model=model,
        micro_batch=micro_batch,
        seq_len=seq_len,
        grad_accum_steps=accum,
        precision=precision,
        device="cpu",
        compiled=False,
    )


def trainable_of(model: LanguageModel, one: Setup) -> torch.nn.Module:
    dtype = torch.bfloat16 if one.width_bytes == 2 else torch.float32
    return make_trainable(model, dtype, ALONE, compiled=False)


def random_batches(one: Setup) -> list[tuple[torch.Tensor, torch.Tensor]]:
    size = (one.grad_accum_steps, one.micro_batch, one.seq_len)
    ids = torch.randint(0, one.model.vocab_size, size)
    return [(row, row) for row in ids]


def kept_by_autograd(model: LanguageModel, one: Setup) -> int:
    """Bytes that one forward pass keeps for its backward pass, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainable_of(model, one)(*random_batches(one)[0])
    assert loss.requires_grad
    return sum(found.values())


@pytest.mark.seconds
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("seq_len", [128, 512])
@pytest.mark.parametrize(
    "shape",
    [
        TINY,
        ModernConfig(**SHAPE),
        ModernConfig(**SHAPE, qk_norm=False),
        ModernConfig(**SHAPE, rms_norm=False, relu_squared=False),
        ModernConfig(**SHAPE, rotary=False, qk_norm=False),
    ],
    ids=["gpt2", "modern", "no qk_norm", "GPT-2's norm and MLP", "no rotary, no qk_norm"],
)
def test_activations_are_what_autograd_keeps(shape: GPTConfig, precision: str, seq_len: int) -> None:
    """The difference between five layers and four: what one layer keeps, its rounded weights included."""

    def kept(n_layer: int) -> int:
        one = setup(dataclasses.replace(shape, n_layer=n_layer), 2, seq_len, 1, precision)
        return kept_by_autograd(build_model(one.model), one)

    def predicted(n_layer: int) -> int:
        one = setup(dataclasses.replace(shape, n_layer=n_layer), 2, seq_len, 1, precision)
        return memory._kept_bytes(one) + memory._rounded_bytes(one)

    assert predicted(5) - predicted(4) == pytest.approx(kept(5) - kept(4), rel=0.01)  # what is left: vectors


EVERYTHING: dict[str, Any] = dict(
    weightless_norms=True, value_embeddings=True, unet_skips=True, x0_mixing=True, mlp_only_layer=3, half_rotary=True
)


@pytest.mark.seconds
@pytest.mark.parametrize(("precision", "seq_len"), [("bf16", 128), ("fp32", 512), ("bf16", 512)])
@pytest.mark.parametrize(
    "switches",
    [
        {"weightless_norms": True},
        {"value_embeddings": True},
        {"unet_skips": True, "weightless_norms": True},
        {"x0_mixing": True},
        {"mlp_only_layer": 1},
        EVERYTHING,
    ],
    ids=lambda switches: " ".join(switches) if len(switches) < 3 else "everything",
)
def test_each_ingredient_keeps_what_autograd_keeps(switches: dict[str, Any], precision: str, seq_len: int) -> None:
    """What it adds to a plain modern model of 6 layers, to a few rows of numbers; everything together as well."""

    def both(**ingredients: Any) -> tuple[int, int]:
        shape = ModernConfig(**{**SHAPE, "n_layer": 6, **ingredients})
        one = setup(shape, 2, seq_len, 1, precision)
        return kept_by_autograd(build_model(shape), one), memory._kept_bytes(one) + memory._rounded_bytes(one)

    (kept, predicted), (plain_kept, plain_predicted) = both(**switches), both()
    width = 2 * seq_len * 64 * (2 if precision == "bf16" else 4)
    assert predicted - plain_predicted == pytest.approx(kept - plain_kept, abs=0.25 * width)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("kind", "precision", "micro_batch"),
    [(GPTConfig, "bf16", 16), (GPTConfig, "fp32", 2), (ModernConfig, "bf16", 2), (ModernConfig, "fp32", 16)],
)  # of 16 sequences GELU is computed again
def test_with_lora_a_layer_keeps_what_autograd_keeps(
    kind: type[GPTConfig], precision: str, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "_WORTH", 1 << 17)
    monkeypatch.setattr(memory, "RECOMPUTED_NUMBERS", 1 << 17)

    def both(n_layer: int) -> tuple[int, int]:
        shape = kind(**{**SHAPE, "n_layer": n_layer})
        one = dataclasses.replace(setup(shape, micro_batch, 128, 1, precision), lora=LoraConfig(rank=16))
        view = with_adapters(build_model(shape), one.lora, seed=1)
        assert one.n_adapters == sum(p.numel() for p in view.parameters() if p.requires_grad)
        return kept_by_autograd(view, one), memory._kept_bytes(one) + memory._rounded_bytes(one)

    (kept, predicted), (more, more_predicted) = both(4), both(5)
    assert more_predicted - predicted == pytest.approx(more - kept, rel=0.01)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("kind", "shape", "micro_batch", "seq_len", "accum", "precision"),
    [
        (GPTConfig, (4, 4, 64, 257), 9, 512, 2, "fp32"),
        (ModernConfig, (4, 4, 64, 257), 16, 128, 1, "bf16"),
        pytest.param(GPTConfig, (2, 4, 128, 4096), 4, 300, 3, "bf16", marks=pytest.mark.slow),
        (GPTConfig, (2, 4, 64, 8192), 1, 32, 1, "fp32"),  # the merged copy counts most
    ],
)
def test_the_fullest_moment_with_lora(
    kind: type[GPTConfig], shape: tuple[int, int, int, int], micro_batch: int, seq_len: int, accum: int, precision: str
) -> None:
    n_layer, n_head, n_embd, vocab_size = shape
    config = kind(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=seq_len, vocab_size=vocab_size)
    one = dataclasses.replace(setup(config, micro_batch, seq_len, accum, precision), lora=LoraConfig(rank=8))
    with Alive() as alive:
        view = with_adapters(build_model(config), one.lora, seed=1)
        optimizer = build_optimizer(view, OptimConfig())
        trainable, batches = trainable_of(view, one), random_batches(one)
        for _ in range(2):
            alive.peak = 0
            train_step(trainable, optimizer, batches, lr=1e-3, grad_clip=1.0, world=ALONE)
        alive.peak = max(alive.peak, alive.now)
        merged(view)
    parts = step_memory(one)
    assert parts["optimizer state"] == 8 * one.n_adapters
    predicted = sum(parts.values()) - parts["heap"] - parts["process"]
    assert predicted == pytest.approx(alive.peak, rel=0.05)


def test_lora_of_the_1558m_model_fits_on_24_gb() -> None:
    large = GPTConfig(n_layer=48, n_head=25, n_embd=1600)
    one = Setup(model=large, micro_batch=4, seq_len=1024, grad_accum_steps=8, lora=LoraConfig(rank=16))
    parts = step_memory(one)
    assert one.n_adapters == 16 * 16 * 1600 * 48
    assert parts["weights"] == 4 * (one.n_params + one.n_adapters)
    assert parts["optimizer state"] == 2 * parts["gradients"] == 8 * one.n_adapters
    for compiled in (True, False):
        few = dataclasses.replace(one, micro_batch=4 if compiled else 2, compiled=compiled)
        assert fits(still_needed(few), MACHINES["4090"].usable_bytes, "cuda")
        assert not fits(
            still_needed(dataclasses.replace(few, lora=LoraConfig())), MACHINES["4090"].usable_bytes, "cuda"
        )
    with pytest.raises(ConfigError, match=r"use a smaller model, shorter sequences\. "):
        require_memory(dataclasses.replace(one, grad_accum_steps=1), 4096, 8 << 30)


CASES = [
    ((4, 4, 64, 257), 16, 128, 1, "bf16"),
    ((4, 4, 64, 257), 9, 512, 2, "fp32"),  # GELU is computed again
    ((2, 4, 64, 8192), 4, 512, 1, "bf16"),  # the head counts most
    ((2, 4, 64, 8192), 1, 32, 2, "fp32"),  # the embedding's gradient does
]
LONG = ((2, 4, 128, 4096), 4, 300, 3, "bf16")
SQUARE = ((1, 4, 128, 257), 9, 512, 1, "fp32")  # the backward pass through relu(x)^2 counts most


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("kind", "shape", "micro_batch", "seq_len", "accum", "precision"),
    [
        *((kind, *case) for kind in (GPTConfig, ModernConfig) for case in CASES),
        (ModernConfig, *SQUARE),
        *(pytest.param(kind, *LONG, marks=pytest.mark.slow) for kind in (GPTConfig, ModernConfig)),
    ],
)
def test_the_fullest_moment_is_what_is_alive_in_a_real_step(
    kind: type[GPTConfig], shape: tuple[int, int, int, int], micro_batch: int, seq_len: int, accum: int, precision: str
) -> None:
    n_layer, n_head, n_embd, vocab_size = shape
    model_config = kind(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=seq_len, vocab_size=vocab_size)
    one = setup(model_config, micro_batch, seq_len, accum, precision)
    with Alive() as alive:
        model = build_model(one.model)
        optimizer = build_optimizer(model, OptimConfig())
        trainable, batches = trainable_of(model, one), random_batches(one)
        for _ in range(2):  # the optimizer's state is made at the end of the first
            alive.peak = 0
            train_step(trainable, optimizer, batches, lr=1e-3, grad_clip=1.0, world=ALONE)
    parts = step_memory(one)
    assert one.n_params == sum(p.numel() for p in model.parameters())
    predicted = sum(parts.values()) - parts["heap"] - parts["process"]
    assert predicted == pytest.approx(alive.peak, rel=0.05)


@pytest.mark.parametrize("name", shelves.entries("training.optim"))
def test_each_optimizers_state_and_muons_update_are_counted(name: str) -> None:
    """So few tokens that Muon's stacks are the most there ever is."""
    model_config = GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=32, vocab_size=257)
    one = dataclasses.replace(setup(model_config, 1, 32, 1, "fp32"), optim=OptimConfig(name=name))
    with Alive() as alive:
        model = build_model(one.model)
        optimizer = build_optimizer(model, OptimConfig(name=name))
        for _ in range(2):
            alive.peak = 0
            train_step(trainable_of(model, one), optimizer, random_batches(one), lr=1e-3, grad_clip=1.0, world=ALONE)
    parts = step_memory(one)
    counted = sum(t.nbytes for t in state_tensors(optimizer, model).values() if t.dim())
    assert parts["optimizer state"] == counted
    assert ("orthogonalization" in parts) == (name == "muon")
    if name == "muon":
        assert sum(parts.values()) - parts["heap"] - parts["process"] == pytest.approx(alive.peak, rel=0.05)


def test_the_state_of_the_124m_model_is_16_bytes_a_parameter() -> None:
    one = Setup(model=GPTConfig(), micro_batch=1, seq_len=1024, grad_accum_steps=8)
    parts = step_memory(one)
    assert one.n_params == 124_475_904
    assert parts["weights"] + parts["optimizer state"] + parts["gradients"] == 16 * one.n_params


DRY_GPU = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*_dry_gpu_memory.json"))[-1]
ON_A_GPU = {
    "gpt2": GPTConfig(),
    "gpt2_350m": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "dropout": GPTConfig(dropout=0.1),
    "modern": ModernConfig(),
    "document": ModernConfig(document_mask=True),
}


@pytest.mark.parametrize("row", json.loads(DRY_GPU.read_text())["rows"], ids=lambda row: row["name"])
def test_a_step_on_a_gpu_holds_what_torchs_allocator_counted(row: dict[str, Any]) -> None:
    """Measured by `benchmarks/dry_gpu/plan_memory.py`: a change of the formulas is held against the same peaks."""
    one = Setup(
        model=ON_A_GPU[row["model"]],
        micro_batch=row["micro_batch"],
        seq_len=1024,
        grad_accum_steps=4,
        precision=row["precision"],
        compiled=row["mode"] == "compiled",
        optim=OptimConfig(name=row["optimizer"]),
    )
    assert sum(step_memory(one).values()) == pytest.approx(row["peak_bytes"], rel=0.05)


@pytest.mark.parametrize("model", [GPTConfig(), ModernConfig()], ids=["gpt2", "modern"])
def test_64_sequences_of_124m_do_not_fit_on_24_gb(model: GPTConfig) -> None:
    one = Setup(model=model, micro_batch=64, seq_len=1024, grad_accum_steps=8)
    assert not fits(still_needed(one), MACHINES["4090"].usable_bytes, "cuda")


def test_more_ranks_divide_the_state_with_fsdp_alone() -> None:
    one = Setup(model=GPTConfig(), micro_batch=8, seq_len=1024, ranks=8)
    ddp, fsdp = step_memory(one), step_memory(dataclasses.replace(one, strategy="fsdp"))
    assert ddp["optimizer state"] == 8 * one.n_params
    assert fsdp["optimizer state"] == one.n_params


def test_with_fsdp_gradients_are_whole_until_the_last_micro_step() -> None:
    """So it is told not to scatter them before (training/ranks/strategy.py, gradient_sync)."""
    one = Setup(model=GPTConfig(), micro_batch=8, seq_len=1024, ranks=8, strategy="fsdp", grad_accum_steps=4)
    assert step_memory(one)["gradients"] == 4 * one.n_params
    assert "gradients" not in step_memory(dataclasses.replace(one, grad_accum_steps=1))


def test_ordered_sums_hold_a_gradient_for_each_level_of_their_tree() -> None:
    one = Setup(model=GPTConfig(), micro_batch=1, seq_len=1024, grad_accum_steps=8, strategy="ordered")
    assert step_memory(one)["gradients"] == 3 * 4 * one.n_params


def test_a_compiled_step_in_32_x_2048_tokens_is_near_nanochats() -> None:
    """Its d12: 34 GB at 32 x 2048. Of ours the activations; its own logits (32,768 words, fp32) and states (Muon)."""
    one = Setup(model=GPTConfig(block_size=2048), micro_batch=32, seq_len=2048)
    logits, states = 8 * 32_768 * one.n_tokens, 12.6 * 162e6
    assert memory._kept_bytes(one) + logits + states == pytest.approx(34e9, rel=0.15)


def test_micro_batches_divide_the_update() -> None:
    one = setup(TINY, 12, 128, 1, "fp32")
    assert [(s.micro_batch, s.grad_accum_steps) for s in micro_batches(one, 12 * 128)] == [
        (1, 12),
        (2, 6),
        (3, 4),
        (4, 3),
        (6, 2),
        (12, 1),
    ]


def test_what_cannot_run_is_refused_with_the_micro_batch_that_fits() -> None:
    one = setup(TINY, 64, 512, 1, "fp32")
    smaller = dataclasses.replace(one, micro_batch=16, grad_accum_steps=4)
    free_bytes = int(1.2 * still_needed(smaller))
    with pytest.raises(ConfigError, match=r"micro_batch = 64 .* --batch\.micro-batch 16 fits.*--no-check-memory"):
        require_memory(one, 64 * 512, free_bytes)


def test_nothing_is_refused_that_may_run() -> None:
    one = setup(TINY, 64, 512, 1, "fp32")
    need = still_needed(one)
    assert require_memory(one, 64 * 512, None) == ""
    assert require_memory(one, 64 * 512, int(1.11 * need)) == ""
    assert "lower" not in require_memory(one, 64 * 512, int(0.95 * need))
    assert "fits" in require_memory(one, 64 * 512, int(0.95 * need))
    with pytest.raises(ConfigError):
        require_memory(one, 64 * 512, int(0.85 * need))


def test_where_no_micro_batch_fits_other_ways_are_named() -> None:
    with pytest.raises(ConfigError, match="no micro-batch fits"):
        require_memory(setup(TINY, 4, 512, 1, "fp32"), 4 * 512, 1000)


def test_the_models_own_constants_are_meant() -> None:
    assert memory.HEAD_PARTS == loss._CPU_PARTS
    assert loss._BLOCK_BYTES["cpu"] == memory.BLOCK_BYTES
    assert memory.BLOCK == attention._BLOCK
    assert memory.RECOMPUTED_NUMBERS == recompute._WORTH


def test_a_child_does_not_begin_with_its_parents_peak() -> None:
    ballast = torch.ones(200_000_000)  # 800 MB
    code = "import torch; from regpt2.base.device import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 600_000_000 < ballast.nbytes


def test_a_step_in_long_windows_holds_what_torchs_allocator_counted() -> None:
    """As above, of the recipe with windows of 65,536 tokens; one graph, and no wait for the device."""
    file = DRY_GPU.with_name("2026-11-30_dry_gpu_long.json")
    (row,) = json.loads(file.read_text())["rows"]
    config = load_recipe("modern_124m_long")
    one = Setup(model=config.model, micro_batch=1, seq_len=config.batch.seq_len, grad_accum_steps=4, optim=config.optim)
    assert sum(step_memory(one).values()) == pytest.approx(row["peak_bytes"], rel=0.05)
    assert (row["of_model"]["graphs"], row["of_model"]["breaks"], row["waits_in_step"]) == (1, 0, 0)
    assert row["windows_added"] == {"graphs": 0, "breaks": 0, "waits": 0}, "a longer window compiled the step again"
