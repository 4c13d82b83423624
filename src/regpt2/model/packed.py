"""A GPT for generating on a CPU in bf16. In: a model; out: the same model with its matrices in oneDNN's own layout.

For a few rows torch's bf16 matmul reads weights at half the memory's rate, a packed one at nearly all of it. Packing
copies the matrices once, which pays from some fifty tokens on. In fp32 it gains nothing.
"""

import copy

import torch
from torch import Tensor, nn

from regpt2.model.gpt import GPT, Block


class PackedLinear(nn.Module):
    """nn.Linear for inference: (..., C) -> (..., out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


class PackedGPT(GPT):
    """Shares embeddings and norms with `model`; has matrices of its own, as they were when it was made."""

    def __init__(self, model: GPT) -> None:
        nn.Module.__init__(self)
        self.config = model.config
        self.wte, self.wpe, self.ln_f = model.wte, model.wpe, model.ln_f
        self.h = nn.ModuleList(_packed_block(block) for block in model.h if isinstance(block, Block))
        self.lm_head = PackedLinear(model.wte.weight.to(torch.bfloat16))

    def head(self, x: Tensor) -> Tensor:
        """As GPT.head."""
        logits: Tensor = self.lm_head(x)[..., : self.config.vocab_size]
        return logits


def _packed_block(block: Block) -> Block:
    twin = copy.deepcopy(block, {id(p): p for p in block.parameters()})  # the modules are new, the tensors shared
    for part, name in ((twin.attn, "c_attn"), (twin.attn, "c_proj"), (twin.mlp, "c_fc"), (twin.mlp, "c_proj")):
        linear = getattr(part, name)
        setattr(part, name, PackedLinear(linear.weight, linear.bias))
    return twin


def packed_if_faster(model: GPT, n_tokens: int) -> GPT:
    """A packed twin where it will be faster for generating `n_tokens`, else the model itself."""
    weight = model.ln_f.weight  # of the type of the blocks' matrices, which the embeddings need not be
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or n_tokens < 50:
        return model
    try:
        return PackedGPT(model)
    except (RuntimeError, AttributeError):  # a torch or a processor without it
        return model
