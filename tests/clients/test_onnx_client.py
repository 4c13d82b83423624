"""What we write as ONNX, in the hands of onnxruntime."""

from pathlib import Path
from typing import Any

import pytest
import torch

from regpt2.commands.convert import ConvertOptions, convert
from regpt2.model.architecture import build_model
from regpt2.model.gpt import GPTConfig
from regpt2.model.modern import ModernConfig
from regpt2.model.weights import native, onnx

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
SHAPE: dict[str, Any] = dict(n_layer=2, n_head=2, n_embd=16, block_size=300, vocab_size=257)
SWITCHES = ("document_mask", "weightless_norms", "half_rotary", "value_embeddings", "unet_skips", "x0_mixing")
LONG: dict[str, Any] = dict.fromkeys(SWITCHES, True) | {"mlp_only_layer": 3, "window": 40}


@pytest.mark.parametrize(
    ("config", "beside"),
    [
        (GPTConfig(**SHAPE), False),
        (GPTConfig(**SHAPE, activation="gelu"), True),
        (ModernConfig(**SHAPE, zero_init=False), False),
        (ModernConfig(**SHAPE | {"n_layer": 5}, zero_init=False, **LONG), False),
    ],
    ids=["gpt2", "exact GELU, weights beside", "modern", "modern with long windows"],
)
def test_onnxruntime_computes_our_logits_for_every_batch_and_length(
    tmp_path: Path, config: GPTConfig, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weights in the file, and beside it as for a large model. Lengths on both sides of attention's block."""
    pytest.importorskip("onnx")
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build_model(config).eval()
    (tmp_path / "a").mkdir()
    native.write(model, tmp_path / "a", None)
    if beside:
        monkeypatch.setattr(onnx, "MOST_BYTES", 0)
    convert(ConvertOptions(str(tmp_path / "a"), tmp_path / "b", to="onnx"))
    assert (tmp_path / "b" / "model.onnx.data").exists() == beside
    session = onnxruntime.InferenceSession(tmp_path / "b" / "model.onnx")
    for shape in ((1, 1), (1, 300), (5, 17), (2, 256)):
        ids = torch.randint(257, shape, generator=torch.Generator().manual_seed(2))
        (logits,) = session.run(None, {"ids": ids.numpy()})
        with torch.no_grad():
            assert (torch.from_numpy(logits) - model(ids)).abs().max() < 1e-5  # sums in another order
