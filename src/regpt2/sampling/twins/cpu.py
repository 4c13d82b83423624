"""A GPT-2 for inference on a CPU. In: a model; out: its twin with its matrices laid out for few rows, or in int8.

For few rows a matmul takes as long as reading its weights. torch reads them at half the memory's rate. In oneDNN's own
layout (bf16), or transposed (fp32), it reads at nearly the full rate; int8 weights are fewer bytes. The matrices are
copied once, which pays off from about fifty tokens on.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regpt2.base.errors import UsageError
from regpt2.model.gpt import GPT, Block, is_plain
from regpt2.model.kernels.attention import causal_attention
from regpt2.model.language_model import LanguageModel, LayerCache
from regpt2.sampling.twins.twin import may_have_twin, twin_agrees

# B sequences, T tokens, C = n_embd, H = n_head, D = C / H, S = T + tokens in the cache

Matmul = Callable[[Tensor], Tensor]


class PackedLinear:
    """nn.Linear in bf16: (..., in) -> (..., out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(torch.bfloat16), 1)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


class TransposedLinear:
    """nn.Linear in fp32: (rows, in) -> (rows, out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight.detach().T.contiguous()  # (in, out)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


class Int8Linear:
    """nn.Linear with int8 weights, a scale for each output, and activations rounded to 8 bits, a scale for each row.

    Sums of products are exact integers. Both roundings are to the nearest of 255 steps from -largest to largest.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        weight = weight.detach().float()
        largest = weight.abs().amax(dim=1, keepdim=True).clamp(min=_TINY)  # (out, 1)
        rounded = (weight * (127 / largest)).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.scale = largest.flatten() / 127**2  # of the weights and of a row, but for the row's largest value
        self.bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()
        self.zero, self.half = torch.zeros(1, dtype=torch.int32), torch.tensor(128.5)

    def __call__(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out), fp32
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_(min=_TINY)  # (..., 1)
        rounded = torch.addcmul(self.half, x, largest.reciprocal(), value=127).to(torch.uint8)  # 128 is zero
        y = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, 128, self.packed, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
        )  # 1.0, 128: scale and zero of x; 1.0, 0: of y
        return torch.addcmul(self.bias, y, largest)


Layout = type[PackedLinear] | type[TransposedLinear] | type[Int8Linear]

_FEW_ROWS = 8  # up to here a transposed fp32 matrix was 1.3 to 1.5 times as fast; from 32 rows on it is not
_TINY = 1e-30  # instead of a largest value of zero


class PackedBlock(nn.Module):
    """Block without dropout, in as few operations as possible: for one token each costs as much as its call."""

    def __init__(self, block: Block, linear: Layout) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.n_head = block.ln_1, block.ln_2, block.attn.n_head
        self.gelu_form = block.mlp.gelu_form
        matrices = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        self.c_attn, self.attn_proj, self.c_fc, self.mlp_proj = (linear(m.weight, m.bias) for m in matrices)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        x = x.view(-1, C)  # (B T, C): matmuls want rows
        qkv = self.c_attn(_norm(x, self.ln_1)).view(B, T, 3, self.n_head, -1)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # three of (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        y = causal_attention(q, k, v, mask=None if cache is None else cache.mask)  # (B, H, T, D)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(-1, C))
        x = x + self.mlp_proj(F.gelu(self.c_fc(_norm(x, self.ln_2)), approximate=self.gelu_form))
        return x.view(B, T, C)


def _norm(x: Tensor, ln: nn.LayerNorm) -> Tensor:  # (..., C) -> (..., C)
    return torch.layer_norm(x, ln.normalized_shape, ln.weight, ln.bias, ln.eps)


class PackedGPT(GPT):
    """Shares embeddings and norms with `model`; its matrices are copies, made once."""

    def __init__(self, model: GPT, linear: Layout = PackedLinear) -> None:
        nn.Module.__init__(self)
        self.config, self.trained_seq_len = model.config, model.trained_seq_len
        self.wte, self.wpe, self.ln_f = model.wte, model.wpe, model.ln_f
        self.h = nn.ModuleList(PackedBlock(block, linear) for block in model.h if isinstance(block, Block))
        self.lm_head = linear(model.wte.weight)
        self._n_params = model.n_params()
        self.eval()

    def n_params(self) -> int:
        """Those of the model: the matrices here are no parameters of torch's."""
        return self._n_params

    def head(self, x: Tensor) -> Tensor:
        """As GPT.head."""
        return self.lm_head(x)[..., : self.config.vocab_size]


def packed_if_faster(model: LanguageModel, n_tokens: int, *, rows: int) -> LanguageModel:
    """A packed twin if it is faster for `n_tokens` passes over `rows` rows and gives equal logits; else the model."""
    weight = next(model.h.parameters())  # the embeddings need not be of the same type
    linear: Layout = PackedLinear if weight.dtype == torch.bfloat16 else TransposedLinear
    pays = linear is PackedLinear or (weight.dtype == torch.float32 and rows <= _FEW_ROWS)
    if not pays or isinstance(model, PackedGPT) or weight.device.type != "cpu" or n_tokens < 50:
        return model
    try:
        if not may_have_twin(model):
            return model
        twin = PackedGPT(model, linear)
        return twin if twin_agrees("the packed model", *_logits(model, twin, weight.dtype)) else model
    except (RuntimeError, AttributeError):  # torch or the processor lacks it, or there is no memory for a copy
        return model


@torch.no_grad()
def _logits(model: GPT, twin: PackedGPT, dtype: torch.dtype) -> list[Tensor]:
    """Logits (1, V) of both after the same few tokens; keeps the model's mode."""
    ids = torch.arange(min(8, model.config.block_size, model.config.vocab_size))[None]
    was_training = model.training
    model.eval()
    try:
        return [one.head(one.hidden(ids, dtype=dtype)[:, -1]) for one in (model, twin)]
    finally:
        model.train(was_training)


def in_int8(model: LanguageModel) -> PackedGPT:
    """A twin with int8 matrices, for generating on a CPU; a UsageError if the model or the CPU is not made for it."""
    if not is_plain(model):
        raise UsageError(
            f"int8 is for plain GPT-2, this {type(model).__name__} (architecture {model.config.architecture!r}) is "
            "something else; use bf16."
        )
    if model.wte.weight.device.type != "cpu":
        raise UsageError(f"int8 is for CPUs, the model is on {model.wte.weight.device}; use bf16, or --device cpu.")
    if not torch.cpu._is_vnni_supported():
        raise UsageError("int8 needs a processor with AVX512-VNNI, which this one lacks; use bf16 or fp32.")
    return PackedGPT(model, Int8Linear)
