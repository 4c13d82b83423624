"""LoRA: small matrices learn what is added to frozen large ones. In: a model; out: its view with adapters, and back.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. Every linear layer of the blocks
computes x (W + (alpha / rank) B A)^T. W is frozen: it has no gradient, and the optimizer knows A and B alone.

A checkpoint holds the merged model, and the adapters as two files that the library peft reads and writes.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from regpt2.base.errors import CheckpointError, ConfigError
from regpt2.model.architecture import build_model
from regpt2.model.files.fill_model import give_memory
from regpt2.model.files.tensors import read_tensors
from regpt2.model.gpt import Linear
from regpt2.model.language_model import GPTConfig, LanguageModel

# r = rank

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft names them


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters for all linear layers of the blocks."""

    rank: int = 0
    """Train adapters of this rank (LoRA), and freeze the model's own weights; 0 trains all weights."""
    alpha: float = 16.0
    """The product of the two matrices of an adapter is multiplied by alpha / rank."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"lora.rank = {self.rank} must be at least 0 (0 = no adapters, all weights train).")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora.alpha = {self.alpha} must be above 0 and finite.")

    def check(self, model: GPTConfig, optimizer: str, strategy: str) -> None:
        """Refuse what does not go with adapters.

        Raises:
            ConfigError: a rank above the matrices', an optimizer or a strategy that needs the whole matrices.
        """
        if self.rank > model.n_embd:
            raise ConfigError(
                f"lora.rank = {self.rank} must be at most model.n_embd = {model.n_embd}; 4 to 64 is usual."
            )
        if self.rank and optimizer == "muon":
            raise ConfigError(
                "optim.name = 'muon' is for whole matrices, and lora.rank trains two thin factors of each; take "
                "--optim.name adamw, or --lora.rank 0."
            )
        if self.rank and strategy == "fsdp":
            raise ConfigError(
                "parallel.strategy = 'fsdp' cannot shard a model with adapters (lora.rank); take "
                "--parallel.strategy ddp: frozen weights have neither gradients nor moments."
            )


class LoraLinear(Linear):
    """A linear layer with its own frozen weights and an adapter. A and B are fp32, rounded where they are used."""

    def __init__(self, linear: Linear, config: LoraConfig, generator: torch.Generator) -> None:
        nn.Module.__init__(self)  # makes no weights: they are those of `linear`
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        # Kaiming-uniform with a = sqrt(5), as in the paper's code and peft: the bound is 1 / sqrt(in).
        a = torch.empty(config.rank, self.in_features, device="cpu")
        a.uniform_(-1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features), generator=generator)
        self.lora_A = nn.Parameter(a.to(linear.weight.device))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.rank, device=linear.weight.device))  # (out, r)
        self.scale = config.alpha / config.rank

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        down = F.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        return torch.add(super().forward(x), F.linear(down, self.lora_B.to(x.dtype)), alpha=self.scale)

    def delta(self) -> Tensor:
        """What merging adds to the weight: (out, in)."""
        return self.scale * (self.lora_B @ self.lora_A)


def with_adapters(model: LanguageModel, config: LoraConfig, *, seed: int) -> LanguageModel:
    """A view of `model` with an adapter in every linear layer of its blocks; `model` itself where the rank is 0.

    The view shares the weights of `model`, and freezes them. At first it computes what `model` computes: B is zero.
    """
    if not config.rank:
        return model
    model.requires_grad_(False)
    view = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # another structure over the same tensors
    generator = torch.Generator().manual_seed(seed)
    for name, part in list(view.h.named_modules()):
        if isinstance(part, Linear):
            parent, _, last = name.rpartition(".")
            setattr(view.h.get_submodule(parent), last, LoraLinear(part, config, generator))
    return view


@torch.no_grad()
def merged(view: LanguageModel) -> LanguageModel:
    """A plain model whose weights are W + (alpha / rank) B A: what is evaluated, sampled and saved.

    A copy: subtracting B A from a merged weight would not give back the bits of W.
    """
    with torch.device("meta"):
        plain = build_model(view.config)
    give_memory(plain, next(view.parameters()).device)
    plain.trained_seq_len = view.trained_seq_len
    plain.set_window(view.window)
    for name, p in plain.named_parameters():
        p.copy_(view.get_parameter(name))
    for name, part in view.named_modules():
        if isinstance(part, LoraLinear):
            plain.get_submodule(name).get_parameter("weight").add_(part.delta())
    return plain.train(view.training)


def adapters(view: LanguageModel) -> dict[str, nn.Parameter]:
    """Every A and B by name: `h.0.attn.c_attn.lora_A` and so on."""
    return {name: p for name, p in view.named_parameters() if name.endswith((".lora_A", ".lora_B"))}


def adapter_files(view: LanguageModel, config: LoraConfig) -> dict[str, bytes]:
    """The adapters as peft stores them: its two files by name.

    The tensors are ours, not transposed: A is (r, in) and B is (out, r) there too. Only their product is transposed for
    transformers' GPT-2, whose layers hold (in, out), which peft calls fan_in_fan_out.
    """
    is_gpt2 = view.config.architecture == "gpt2"
    tensors = {_at_peft(name, is_gpt2): p.detach().cpu().contiguous() for name, p in adapters(view).items()}
    settings = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": is_gpt2,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": ["c_attn", "c_fc", "c_proj"],
        "task_type": "CAUSAL_LM",
    }
    return {WEIGHTS: save(tensors, {"format": "pt"}), CONFIG: (json.dumps(settings, indent=1) + "\n").encode()}


def _at_peft(name: str, is_gpt2: bool) -> str:
    return f"base_model.model.{'transformer.' * is_gpt2}{name}.weight"


def read_adapters(folder: Path) -> dict[str, Tensor]:
    """The adapters of a checkpoint by our names; empty if it has none."""
    if not (folder / WEIGHTS).is_file():
        return {}
    prefixes = ("base_model.model.", "transformer.")
    found = read_tensors(folder / WEIGHTS)
    return {
        name.removeprefix(prefixes[0]).removeprefix(prefixes[1]).removesuffix(".weight"): tensor
        for name, tensor in found.items()
    }


@torch.no_grad()
def load_adapters(view: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy A and B into the view, strictly.

    Raises:
        CheckpointError: one is missing, too many, or has another shape; nothing was copied.
    """
    mine = adapters(view)
    if mine.keys() != tensors.keys():
        name = min(mine.keys() ^ tensors.keys())
        raise CheckpointError(
            f"{WEIGHTS} holds {len(tensors)} tensors, expected {len(mine)}; the first to differ is {name}."
        )
    for name, p in mine.items():
        if tensors[name].shape != p.shape:
            raise CheckpointError(f"{WEIGHTS}: {name} is {list(tensors[name].shape)}, expected {list(p.shape)}.")
    for name, p in mine.items():
        p.copy_(tensors[name])
