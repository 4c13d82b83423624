"""Chat models for tests, by hand: one that says what a test wants, one of random weights."""

from pathlib import Path

import torch

from regpt2.data.added_tokens import AddedTokens
from regpt2.data.chat_template import SPECIAL, Message, prompt_ids
from regpt2.data.tokenizer import load_tokenizer
from regpt2.model.files.contract import TokenizerRef
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import native

BYTES = AddedTokens(load_tokenizer("bytes"), SPECIAL)
START, END, EOT = 257, 258, 256


@torch.no_grad()
def write_random(folder: Path, name: str = "gpt2", block_size: int = 128, ends_at: int | None = None) -> GPT:
    """Random weights, each tensor another, so that text depends on every one; an answer ends at the latest there."""
    base = load_tokenizer(name)
    rows = base.vocab_size + len(SPECIAL)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=block_size, vocab_size=rows))
    generator = torch.Generator().manual_seed(1)
    for key, p in model.named_parameters():
        mean, std = 1.0 if "ln" in key and key.endswith("weight") else 0.0, 0.6 if key.startswith("h.") else 0.15
        p.normal_(mean=mean, std=std, generator=generator)
    model.wte.weight[rows:] = 0.0
    if ends_at is not None:  # from there on one direction outweighs all others, and the end's row has it
        direction = torch.randn(32, generator=generator).sign()
        model.wpe.weight[ends_at:] = 20.0 * direction
        model.wte.weight[rows - 1] = direction
    folder.mkdir(exist_ok=True)
    native.write(model, folder, TokenizerRef(base.name, base.fingerprint, added=SPECIAL))
    return model.eval()


@torch.no_grad()
def write_parrot(
    folder: Path, *answers: tuple[str, str], block_size: int = 128, ends: int = END, after: str = ""
) -> None:
    """A model of bytes that answers each of these messages with these words, if they come in this order.

    Each position shouts the id that comes next: those of the answer from where the prompt ends. All others
    shout `ends`, but for those that shout `after` once an answer has ended.
    """
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=259, block_size=block_size, vocab_size=259))
    for p in model.parameters():
        p.zero_()
    model.ln_f.weight.fill_(100.0)
    model.wte.weight[:259] = torch.eye(259)
    model.wpe.weight[:, ends] = 100.0
    messages: list[Message] = []
    for question, answer in answers:
        messages.append(Message("user", question))
        at = len(prompt_ids(messages, BYTES)) - 1
        for place, token in enumerate([*answer.encode(), ends, *after.encode()], start=at):
            model.wpe.weight[place] = 0.0
            model.wpe.weight[place, token] = 100.0
        messages.append(Message("assistant", answer))
    folder.mkdir(exist_ok=True)
    native.write(model, folder, TokenizerRef("bytes", BYTES.fingerprint, added=SPECIAL))
