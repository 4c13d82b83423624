"""ONNX. In: a model; out: a folder with `model.onnx`, from ids (batch, length) to logits; it is only written.

Needs the extra `onnx`. Above 2 GB, the limit of such a file, the weights are in a second file.
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regpt2.base.errors import UsageError
from regpt2.model.architecture import build_model
from regpt2.model.files.contract import Vocabulary
from regpt2.model.files.fill_model import load_into, tensors_of
from regpt2.model.language_model import LanguageModel

MODEL = "model.onnx"
FILES = (MODEL, f"{MODEL}.data")
DTYPES = ("fp32",)
ANY_ARCHITECTURE = True
CLIENT = "onnxruntime"
MOST_BYTES = 2_000_000_000


def write(model: LanguageModel, folder: Path, vocabulary: Vocabulary | None, dtype: str = "fp32") -> None:
    """Write `model.onnx` for every batch and length; a UsageError if a package for it is not installed."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise UsageError(f"onnx needs the package {missing[0]}; install it with: pip install 'regpt2[onnx]'")
    unpadded = build_model(replace(model.config, vocab_multiple=1)).eval()
    load_into(unpadded, tensors_of(model))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=model.config.block_size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it complains about packages for other kinds of models
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            unpadded,
            (torch.zeros(2, min(4, model.config.block_size), dtype=torch.int64),),
            folder / MODEL,
            input_names=["ids"],
            output_names=["logits"],
            dynamic_shapes={"ids": {0: batch, 1: length}},
            external_data=4 * model.n_params() > MOST_BYTES,
            dynamo=True,
            verbose=False,
        )


def client_logits(folder: Path, ids: Tensor) -> Tensor | None:
    """What onnxruntime computes with the folder."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"ids": ids.numpy()})
    return torch.from_numpy(logits)[:, -1]
