"""Weights to begin from: their hash by the description alone, and the rows that a vocabulary gains."""

import hashlib
from dataclasses import replace

import numpy as np
import torch

from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.initial_weights import fitted, weights_sha256
from regpt2.model.modern import ModernConfig, ModernGPT

SHAPE = GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=10)


def test_the_hash_is_that_of_its_description_and_depends_on_every_weight() -> None:
    model = GPT(SHAPE, seed=1)
    digest = hashlib.sha256()
    for name in sorted(name for name, _ in model.named_parameters()):
        values = model.get_parameter(name).detach().numpy()
        values = values[:10] if name == "wte.weight" else values
        digest.update(f"{name} [{', '.join(map(str, values.shape))}]\n".encode())
        digest.update(values.astype("<f4").tobytes())
    before = weights_sha256(model)
    assert before == digest.hexdigest()
    with torch.no_grad():
        model.wte.weight[10:] = 7.0  # padding is not the model
        assert weights_sha256(model) == before
        for p in model.parameters():
            p.view(-1)[0] += 1e-3
            assert weights_sha256(model) != before
            before = weights_sha256(model)


def test_new_rows_are_the_mean_of_tokens_with_text_in_every_matrix_of_the_vocabulary() -> None:
    config = ModernConfig(n_layer=4, n_head=1, n_embd=4, block_size=8, vocab_size=10, value_embeddings=True)
    model = ModernGPT(config, seed=1)
    torch.nn.init.normal_(model.lm_head.weight)
    wanted = replace(config, vocab_size=12)
    found = fitted(model, wanted, new_ids=[8, 10, 11], textless=[8, 9])
    for name in ("wte.weight", "lm_head.weight", "wve.0.weight", "wve.1.weight"):
        old, new = model.get_parameter(name)[:10].detach().numpy(), found[name].numpy()
        assert new.shape == (12, 4)
        np.testing.assert_array_equal(np.delete(new, [8, 10, 11], axis=0), np.delete(old, 8, axis=0))
        for row in (8, 10, 11):
            np.testing.assert_allclose(new[row], old[:8].mean(axis=0, dtype=np.float64), rtol=1e-6)
    assert torch.equal(fitted(model, config)["wte.weight"], model.wte.weight[:10])
