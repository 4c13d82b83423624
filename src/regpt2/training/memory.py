"""Memory of a training step. In: how a rank trains; out: bytes by part, at the moment of the peak.

Every term is counted from the code of model/, training/ and the optimizer; tests/training/test_memory.py compares with
what autograd really keeps. P parameters, N = B * T tokens of a micro-batch, C = n_embd, L = n_layer, H = n_head,
V = padded_vocab_size, b bytes of a number in the compute type, r = LoRA's rank.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from regpt2.base import shelves
from regpt2.base.errors import ConfigError
from regpt2.model.flops import adapter_numbers, flops_per_token, n_weights
from regpt2.model.kernels.loss import chunk_rows
from regpt2.model.language_model import GPTConfig
from regpt2.model.modern import ModernConfig
from regpt2.training.lora import LoraConfig
from regpt2.training.optimizer import OptimConfig

FP32 = 4
MARGIN = 0.10  # relative uncertainty of a prediction, either way
ALLOCATOR_BYTES = 1 << 30  # in addition on a GPU, for fragmentation and the workspace of libraries

# What the backward pass keeps of a layer, in widths C for each token:
#   both norms' inputs and outputs 4, queries, keys and values 3, attention's result 1, before GELU 4, after it 4.
# On a CPU passes of RECOMPUTED_NUMBERS or more compute GELU again in the backward pass (model/kernels/recompute.py).
# Uncompiled on a GPU, a 16-bit LayerNorm keeps its input in fp32: 1 more each.
KEPT_WIDTHS = 16
GELU_WIDTHS, RECOMPUTED_NUMBERS = 4, 1 << 20
MODERN_WIDTHS = 3  # queries and keys before norm and rotation; attention's result in another order
KEPT_SUMS = 4  # mean and deviation of both norms
ATTENTION_WIDTHS = 6  # of KEPT_WIDTHS, those of attention and its norm: a block without it keeps none of them
MLP_BACKWARD_WIDTHS = 8  # in the backward pass of a layer: the gradients of GELU's output and input
SQUARE_WIDTHS = 8  # and of relu(x)^2: relu(x) again, and twice that
# On a GPU, in addition to what is kept when the backward pass begins: uncompiled, the head's gradient in fp32, twice;
# with relu(x)^2 the MLP of the last layer. As counted by the allocator (benchmarks/dry_gpu/plan_memory.py).
GPU_BACKWARD_WIDTHS = {"compiled": 3, "eager": 4, "eager, square": 11}
GPU_WORKSPACE_BYTES = 72_000_000  # of cuBLAS on a Hopper
BLOCK = 256  # queries at a time in the CPU's attention (model/kernels/attention.py), which keeps its weights up to 256
BLOCK_BYTES = 1 << 22  # of fp32 logits at a time on a CPU (model/kernels/loss.py)
HEAD_PARTS = 8  # of the head's gradient on a CPU (also there)

# On a CPU also the process itself (Python, torch, its libraries and kernels), and holes in glibc's heap and copies of
# oneDNN: a share of what a step allocates and frees. Both were measured (docs/speed.md).
PROCESS_BYTES = 280_000_000
COMPILER_BYTES = 140_000_000  # of torch._dynamo, which compiling imports, and the wrappers for several ranks
HEAP_SHARE = 0.30

AVERAGE = "average of weights"  # the part of optim.ema, which nothing but a run holds


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How one rank trains."""

    model: GPTConfig
    micro_batch: int
    seq_len: int
    grad_accum_steps: int = 1
    precision: str = "bf16"
    device: str = "cuda"
    compiled: bool = True
    strategy: Literal["ddp", "fsdp", "ordered"] = "ddp"
    ranks: int = 1
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mean_window: float | None = None
    """Tokens that attention reaches back, on average over a run in which that grows; None: model.window all along."""

    @property
    def n_params(self) -> int:
        """Numbers in all weights of the model, the padding of the vocabulary included."""
        return n_weights(self.model)

    @property
    def n_adapters(self) -> int:
        """Numbers in LoRA's A and B; 0 without it."""
        return adapter_numbers(self.model, self.lora.rank)

    @property
    def n_trained(self) -> int:
        """Numbers that have gradients and optimizer state: the adapters, or all weights."""
        return self.n_adapters or self.n_params

    @property
    def flops_per_token(self) -> float:
        """Matmul FLOPs of one token, forward and backward, on average over the run."""
        return flops_per_token(self.model, self.seq_len, lora_rank=self.lora.rank, window=self.mean_window)

    @property
    def state_bytes(self) -> int:
        """Of the optimizer's state, over all shards."""
        n_in_matrices = self.n_adapters or 4 * (3 * self.model.n_layer - self.n_without) * self.model.n_embd**2
        of_matrices: int
        of_others: int
        of_matrices, of_others = getattr(shelves.load("training.optim", self.optim.name), "MEANS", (2, 2))
        return FP32 * (of_matrices * n_in_matrices + of_others * (self.n_trained - n_in_matrices))

    @property
    def n_without(self) -> int:
        """Blocks without attention."""
        return int(isinstance(self.model, ModernConfig) and self.model.mlp_only_layer >= 0)

    @property
    def width_bytes(self) -> int:
        """Of a number in the compute type."""
        return 2 if self.precision in ("bf16", "fp16") else FP32

    @property
    def n_tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * self.seq_len


def step_memory(setup: Setup) -> dict[str, int]:
    """Bytes by part at the peak of an update, for each rank."""
    head_bytes = _head_gradient_bytes(setup)  # the embedding's is as large
    shards = setup.ranks if setup.strategy == "fsdp" else 1
    weights, learning = FP32 * (setup.n_params + setup.n_adapters) // shards, FP32 * setup.n_trained // shards
    held = _gradients_held(setup)
    whole = setup.grad_accum_steps > 1  # FSDP scatters gradients in the last micro-step; before it they are unsharded
    gradients = FP32 * setup.n_trained if whole else learning
    pass_parts = {"rounded weights": _rounded_bytes(setup), "activations": _kept_bytes(setup)}
    moments = [
        {"gradients": held * gradients, **pass_parts, "head and loss": _head_forward_bytes(setup)},
        {"gradients": held * gradients, **pass_parts, **_backward_parts(setup)},
        # The last gradient of a backward pass is the embedding's, which is added to the head's into a new tensor.
        {"gradients": max(1, held) * gradients, "embedding's gradient": (2 + (held > 0)) * head_bytes},
        {"gradients": learning, "orthogonalization": _orthogonalization_bytes(setup)},
        # Between updates: the plain model that is evaluated and saved (training/lora.py, `merged`).
        {"merged copy": FP32 * setup.n_params * bool(setup.lora.rank)},
    ]
    fullest = max(moments, key=lambda parts: sum(parts.values()))
    average = weights if setup.optim.ema else 0
    parts = {
        "weights": weights,
        AVERAGE: average,
        "optimizer state": setup.state_bytes // shards,
        **fullest,
    }
    if setup.device == "cpu":
        parts["heap"] = int(HEAP_SHARE * sum(fullest.values()))
        parts["process"] = PROCESS_BYTES + COMPILER_BYTES * (setup.compiled or setup.ranks > 1)
    else:
        parts["workspace"] = GPU_WORKSPACE_BYTES
    return {name: n_bytes for name, n_bytes in parts.items() if n_bytes}


def _gradients_held(setup: Setup) -> int:
    """Complete sets of gradients that are held during a forward pass."""
    if setup.strategy == "ordered":  # the partial sums of training/ranks/ordered_sums.py
        return max(i.bit_count() for i in range(setup.grad_accum_steps))
    return int(setup.grad_accum_steps > 1 or (setup.ranks > 1 and setup.strategy == "ddp"))  # ddp: its buckets


def _orthogonalization_bytes(setup: Setup) -> int:
    """Muon's largest stack, the MLPs' matrices: the input, before and after a step, and two products of a quarter."""
    if setup.optim.name != "muon":
        return 0
    stack = 8 * setup.model.n_layer * setup.model.n_embd**2 * (2 if setup.device == "cuda" else FP32)
    if setup.ranks == 1 or setup.strategy == "ordered":
        return 7 * stack // 2
    return max(7 * stack // 2 // setup.ranks, 2 * stack)  # each rank's share; then all shares, twice


def _rounded_bytes(setup: Setup) -> int:
    """Copies in the compute type that the backward pass needs: of a layer's matrices, but not of a recomputed one."""
    if setup.width_bytes == FP32:
        return 0
    C, b = setup.model.n_embd, setup.width_bytes
    again = _recomputes(setup)
    layer = (12 - 4 * again) * C * C * b + (16 - 5 * again) * setup.lora.rank * C * b
    if setup.strategy == "fsdp" and setup.ranks > 1:  # gathered in the compute type: one layer, and the next one
        return 2 * layer
    return setup.model.n_layer * layer - setup.n_without * 4 * C * C * b


def _recomputes(setup: Setup) -> bool:
    """Is GELU's output computed again instead of kept?"""
    return setup.device == "cpu" and GELU_WIDTHS * setup.model.n_embd * setup.n_tokens >= RECOMPUTED_NUMBERS


def _widens_norms(setup: Setup) -> bool:
    """Is the input of a LayerNorm kept in fp32 beside 16-bit activations? Compiled code and the RMS norm do not."""
    rms_norm = isinstance(setup.model, ModernConfig) and setup.model.rms_norm
    return setup.device == "cuda" and not setup.compiled and setup.width_bytes < FP32 and not rms_norm


def _kept_bytes(setup: Setup) -> int:
    """Activations that the backward pass needs, of all layers."""
    model, b = setup.model, setup.width_bytes
    widths = KEPT_WIDTHS + 2 * _widens_norms(setup) - GELU_WIDTHS * _recomputes(setup)
    numbers = widths * model.n_embd + KEPT_SUMS
    numbers += setup.lora.rank * (4 - _recomputes(setup))  # x A^T of each matrix
    attention = _attention_bytes(setup)
    bytes_per_token = numbers * b + attention
    if model.dropout:
        bytes_per_token += 2 * model.n_embd  # masks, a byte each
    unused = setup.n_without * ((ATTENTION_WIDTHS * model.n_embd + KEPT_SUMS // 2) * b + attention)
    return setup.n_tokens * (model.n_layer * bytes_per_token - unused) + _modern_bytes(setup)


def _modern_bytes(setup: Setup) -> int:
    """What a modern model keeps in addition."""
    model, C = setup.model, setup.model.n_embd
    if not isinstance(model, ModernConfig):
        return 0
    b, attending = setup.width_bytes, model.n_layer - setup.n_without
    layer = 2 * FP32 * model.n_head * model.qk_norm  # the lengths of queries and keys
    if (model.qk_norm or model.rotary) and _takes_flash(setup):
        layer += MODERN_WIDTHS * C * b
    embeddings = C * model.rms_norm * (b if setup.compiled else FP32)  # before their norm, or after one without weights
    if model.weightless_norms and model.x0_mixing and b == FP32:  # that is x0
        embeddings = 0
    return setup.n_tokens * (attending * layer + embeddings + b * C * _mixed_widths(setup, model))


def _mixed_widths(setup: Setup, model: ModernConfig) -> int:
    """Of all blocks: what mixing streams keeps, less what norms without weights do not."""
    L, attending = model.n_layer, sum(map(model.has_attention, range(model.n_layer)))
    widths = 0
    if model.value_embeddings:  # the tables' rows; values before, beside queries and keys in one tensor, and after
        widths += model.n_value_tables + attending * (1 if _takes_flash(setup) else 3)
    if model.x0_mixing:  # the stream before each; the first is x0
        widths += L
    if model.unet_skips:  # most of what is read again is kept anyway, as what the next block reads
        widths += 1 if model.x0_mixing or not model.weightless_norms else L // 2
    if model.weightless_norms and not setup.compiled:  # the compiler keeps their inputs all the same
        widths -= attending + L
    return widths


def _takes_flash(setup: Setup) -> bool:
    model, T = setup.model, setup.seq_len
    masked = isinstance(model, ModernConfig) and (model.document_mask or 0 < model.window < T)
    return setup.device == "cuda" or (T > BLOCK and setup.width_bytes == FP32 and not masked)


def _attention_bytes(setup: Setup) -> int:
    """Kept per token and layer in addition to queries, keys, values and result."""
    model, b, T = setup.model, setup.width_bytes, setup.seq_len
    if _takes_flash(setup):
        return FP32 * model.n_head  # the logarithm of each sum
    if T <= BLOCK:
        return b * model.n_head * T  # the weights
    return b * model.n_head * (T + BLOCK) // 2 if model.dropout else 0


def _head_gradient_bytes(setup: Setup) -> int:
    """Of the head's weights; 0 where they are frozen."""
    return 0 if setup.lora.rank else FP32 * setup.model.padded_vocab_size * setup.model.n_embd


def _head_kept_bytes(setup: Setup) -> int:
    """Between the passes: the gradients of the head and of its input, and the input of the last norm."""
    C, b = setup.model.n_embd, setup.width_bytes
    last_norm = (FP32 if _widens_norms(setup) else b) if setup.device == "cuda" else 0
    return _head_gradient_bytes(setup) + setup.n_tokens * C * (b + last_norm)


def _head_forward_bytes(setup: Setup) -> int:
    """At the last chunk of the loss: what is kept, the logits, the rounded weights, the hidden states."""
    N, C, V, b = setup.n_tokens, setup.model.n_embd, setup.model.padded_vocab_size, setup.width_bytes
    rows = chunk_rows(N, V, b, setup.device)
    rounded = V * C * b if b < FP32 else 0
    n_bytes = _head_kept_bytes(setup) + rounded + min(rows, N) * V * b + N * C * b
    if setup.device != "cpu":
        return n_bytes
    part = V * C * (b + FP32 * (b < FP32)) // HEAD_PARTS  # a few rows of the vocabulary are added at a time
    part = 0 if setup.lora.rank else part
    wide = rows * V * FP32
    log_p = min(wide, 2 * BLOCK_BYTES) + (b < FP32) * min(wide, BLOCK_BYTES)  # a few rows of the chunk at a time
    if isinstance(setup.model, ModernConfig) and setup.model.softcap and not setup.compiled:  # its tanh, and the capped
        log_p += 2 * min(wide, BLOCK_BYTES)
    return n_bytes + max(part, log_p)


def _backward_parts(setup: Setup) -> dict[str, int]:
    """At the peak of the backward pass, which is early: temporary gradients, and the head's."""
    model, C, b, head_bytes = setup.model, setup.model.n_embd, setup.width_bytes, _head_gradient_bytes(setup)
    squared = isinstance(model, ModernConfig) and model.relu_squared
    width = setup.n_tokens * C * b
    if setup.device == "cpu":
        widths = MLP_BACKWARD_WIDTHS + GELU_WIDTHS * _recomputes(setup)
        widths += SQUARE_WIDTHS if squared and not setup.compiled else 0
        return {"a layer backward": head_bytes + widths * width}
    kept = {"head and loss": _head_kept_bytes(setup)}
    if setup.compiled:
        return {**kept, "a layer backward": GPU_BACKWARD_WIDTHS["compiled"] * width}
    moments = [GPU_BACKWARD_WIDTHS["eager"] * width, width + head_bytes]  # the head's own gradient, scaled
    if squared:
        untied = isinstance(model, ModernConfig) and model.untied_head  # its gradient is already added and freed
        moments.append(GPU_BACKWARD_WIDTHS["eager, square"] * width - head_bytes * untied)
    return {**kept, "a layer backward": max(moments)}


def fits(need_bytes: int, free_bytes: int, device: str) -> bool:
    """True if the step will run even if the prediction is too low by its margin."""
    return need_bytes * (1 + MARGIN) + (ALLOCATOR_BYTES if device == "cuda" else 0) <= free_bytes


def cannot_fit(need_bytes: int, free_bytes: int) -> bool:
    """True if the step will not run even if the prediction is too high by its margin."""
    return need_bytes * (1 - MARGIN) > free_bytes


def micro_batches(setup: Setup, least_tokens: int) -> list[Setup]:
    """The setup with every micro-batch that divides the smallest update, the smallest first."""
    sequences = least_tokens // (setup.seq_len * setup.ranks)  # of one rank
    in_the_largest = setup.micro_batch * setup.grad_accum_steps
    return [
        replace(setup, micro_batch=n, grad_accum_steps=in_the_largest // n)
        for n in range(1, sequences + 1)
        if sequences % n == 0
    ]


def require_memory(setup: Setup, least_tokens: int, free_bytes: int | None) -> str:
    """Refuse a step that will run out of memory before it starts; return a warning if it may, "" if it will not.

    Args:
        least_tokens: of the smallest update: the micro-batch must divide it.
        free_bytes: what this process may still take; None: unknown, and nothing is refused.

    Raises:
        ConfigError: the memory is too small even if the prediction is too high by its margin.
    """
    need_bytes = still_needed(setup)
    if free_bytes is None or fits(need_bytes, free_bytes, setup.device):
        return ""
    smaller = [s for s in micro_batches(setup, least_tokens) if fits(still_needed(s), free_bytes, setup.device)]
    if smaller:
        mend = f"--batch.micro-batch {smaller[-1].micro_batch} fits, and the update stays the same"
    else:
        mend = f"no micro-batch fits: use a smaller model, shorter sequences{without_lora(setup)}"
    text = (
        f"micro_batch = {setup.micro_batch} x seq_len = {setup.seq_len} needs about {need_bytes / 1e9:.2f} GB of "
        f"memory and {free_bytes / 1e9:.2f} GB are free; {mend}."
    )
    if cannot_fit(need_bytes, free_bytes):
        raise ConfigError(f"{text} (--no-check-memory tries anyway.)")
    return text


def without_lora(setup: Setup) -> str:
    """The rest of an advice: what else saves memory, and does not go with adapters."""
    return "" if setup.lora.rank else ", or --parallel.strategy fsdp on more GPUs"


def still_needed(setup: Setup) -> int:
    """Bytes at the peak, without those that the process holds before it builds the model."""
    return sum(step_memory(setup).values()) - (PROCESS_BYTES if setup.device == "cpu" else 0)
