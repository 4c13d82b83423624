"""What a model must beat. In: a prepared data folder; out: bits per byte of two that know nothing of language."""

import math
import zlib
from pathlib import Path

import numpy as np

from regpt2.data.tokenizer import Tokenizer
from regpt2.data.tokens.shards import open_tokens

_TRAIN_TOKENS = 10_000_000  # enough to know the frequencies
_VAL_TOKENS = 1_000_000


def baselines(folder: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte on the validation split.

    unigram: every token drawn by its frequency in the training split (add-one smoothed), whatever came before.
    gzip:    the text compressed by DEFLATE at its highest level.
    """
    train, val = open_tokens(folder, "train"), open_tokens(folder, "val")
    try:
        counts = np.ones(tokenizer.vocab_size, dtype=np.int64)
        counts += np.bincount(train.read(0, min(train.n_tokens, _TRAIN_TOKENS)), minlength=tokenizer.vocab_size)
        ids = val.read(0, min(val.n_tokens, _VAL_TOKENS))
    finally:
        train.close()
        val.close()
    bits = -np.log2(counts / counts.sum())[ids].sum()
    n_bytes = int(tokenizer.token_bytes()[ids].sum())
    text = tokenizer.decode_bytes([int(i) for i in ids if i != tokenizer.eot])
    packed_bits = 8 * len(zlib.compress(text, 9))
    return {"unigram": float(bits) / max(1, n_bytes), "gzip": packed_bits / max(1, len(text))}


def is_near_uniform(loss: float, vocab_size: int) -> bool:
    """Whether a first loss is that of an untrained model, ln(vocabulary), within half a nat."""
    return abs(loss - math.log(vocab_size)) < 0.5
