"""The Triton kernel of the loss, by Triton's own interpreter, against torch in fp64; then the whole loss with it."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# The interpreter has to be asked for before Triton is imported, so each test is a process of its own.
KERNEL = """
import json, sys, torch
from regpt2.model.kernels.loss_kernel import softmax_loss_
vocab_size, V, n, dtype, softcap, ignored = json.loads(sys.argv[1])
torch.manual_seed(0)
logits = (4 * torch.randn(n, V)).to(getattr(torch, dtype))
targets = torch.randint(vocab_size, (n,))
targets[ignored] = -100
targets[0] = vocab_size - 1
exact = logits.double().requires_grad_()
scores = exact[:, :vocab_size]
scores = softcap * torch.tanh(scores / softcap) if softcap else scores
expected = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
expected.sum().backward()
losses = softmax_loss_(logits, targets, vocab_size, softcap)
print(json.dumps({
    "loss": float((losses - expected.detach()).abs().max()),
    "gradient": float((logits.double() - exact.grad).abs().max()),
    "of small ones": float(((logits.double() - exact.grad).abs() / (exact.grad.abs() + 1e-6)).max()),
    "padding": float(logits[:, vocab_size:].abs().sum()),
    "ignored": float(losses[ignored].abs().sum() + logits[ignored].abs().sum()),
}))
"""


def interpreted(code: str, *arguments: object) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


# fp32: sums of up to 50,304 terms, each rounded to 2^-24. In 16 bits the gradient is rounded once more when it is
# written: to 2^-9 of itself in bf16; in fp16 2^-11, but to 2^-25 at least, so that small ones are off by more.
@pytest.mark.parametrize(
    ("case", "loss", "gradient", "of_small_ones"),
    [
        ((500, 512, 37, "float32", 0.0, [1, 36]), 3e-6, 1e-6, 2e-6),
        ((500, 512, 37, "float32", 15.0, [1, 36]), 3e-6, 1e-6, 1e-5),
        ((50257, 50304, 4, "bfloat16", 0.0, [3]), 1e-5, 2**-8, 2**-7),
        ((50257, 50304, 4, "bfloat16", 15.0, [3]), 1e-5, 2**-8, 2**-7),
        ((20000, 20000, 5, "float16", 15.0, [2]), 1e-5, 2**-11, 2**-5),
    ],
    ids=["fp32", "fp32 softcap", "bf16 50304", "bf16 50304 softcap", "fp16 unpadded"],
)
def test_loss_and_gradient_are_those_of_torch(
    case: tuple[object, ...], loss: float, gradient: float, of_small_ones: float
) -> None:
    found = interpreted(KERNEL, json.dumps(case))
    assert found["loss"] < loss
    assert found["gradient"] < gradient
    assert found["of small ones"] < of_small_ones
    assert found["padding"] == found["ignored"] == 0


MODELS = """
import json, sys, torch
from regpt2.model.kernels import loss, loss_kernel
from regpt2.model.architecture import build_model
from regpt2.model.gpt import GPTConfig
from regpt2.model.modern import ModernConfig
shape = dict(n_layer=1, n_head=2, n_embd=32, block_size=48, vocab_size=300)
ids = torch.randint(300, (3, 33), generator=torch.Generator().manual_seed(1))
inputs, targets = ids[:, :-1], ids[:, 1:].clone()
targets[2, 20:] = loss.IGNORED  # the last chunk has no other
worst = {}
for name, config in {"gpt2": GPTConfig(**shape), "modern": ModernConfig(**shape, zero_init=False)}.items():
    model = build_model(config, seed=1)
    x = model.hidden(inputs).flatten(0, 1)
    weight = model.head_weight if name == "modern" else model.wte.weight
    softcap = config.softcap if name == "modern" else 0.0
    logits = x.double() @ weight.double()[:300].T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten())
    wanted = [expected, *torch.autograd.grad(expected, list(model.parameters()))]
    loss._softmax_loss_ = lambda logits, targets, vocab_size, softcap, wide: (
        loss_kernel.softmax_loss_(logits, targets, vocab_size, softcap).sum())
    loss._LinearCrossEntropy.apply = lambda *given: loss._opaque_loss(*given)[0]
    loss.chunk_rows = lambda *_: 20  # of 96 tokens: the last chunk has 16
    got = model(inputs, targets)
    ours = [got, *torch.autograd.grad(got, list(model.parameters()))]
    worst[name] = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, wanted))
print(json.dumps(worst))
"""


def test_a_model_with_the_kernel_has_the_plain_formulas_gradients() -> None:
    """All of them, GPT-2's and the modern model's, in fp32: roundings of 6e-8 over some hundred terms."""
    found = interpreted(MODELS)
    assert found["gpt2"] < 3e-6
    assert found["modern"] < 3e-6
