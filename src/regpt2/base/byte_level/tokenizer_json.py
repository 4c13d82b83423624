"""Hugging Face's `tokenizer.json` of a byte-level byte-pair encoding. In: ids and merges; out: the file, and back.

Ids depend on every part of such a file. So each part that changes them is compared with GPT-2's: no normalizer, its
split, no space in front, plain merges.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_CHANGED_MERGING = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
_CHANGED_SPLIT = ("lstrip", "rstrip", "single_word")
_SPLIT = (("type", None), ("add_prefix_space", True), ("use_regex", True))  # with the default of each
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


class Fault(Exception):
    """The file describes another kind of tokenizer: `kind`, and why, as a sentence that follows the file's name."""

    def __init__(self, why: str, kind: str = "bpe") -> None:
        super().__init__(why)
        self.kind = kind


@dataclass(frozen=True)
class Described:
    """What a `tokenizer.json` holds, not yet compared with any vocabulary."""

    ids: dict[str, Any]
    """The id of each token, in printable characters."""
    merges: list[str]
    added: list[tuple[Any, Any]]
    """The id and the text of each added token."""


def special(text: str) -> dict[str, Any]:
    """A special token, as the files describe it."""
    return {"content": text, **dict.fromkeys((*_CHANGED_SPLIT, "normalized"), False), "special": True}


def description(
    ids: Mapping[str, int], merges: Sequence[str], specials: Mapping[int, dict[str, Any]]
) -> dict[str, Any]:
    """The content of the file."""
    model = {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token")),
        **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), ""),
        **dict.fromkeys(("fuse_unk", "byte_fallback"), False),
        "vocab": dict(ids),
        "merges": list(merges),
    }
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding")),
        "added_tokens": [{"id": n, **flags} for n, flags in specials.items()],
        "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL,
        "post_processor": _BYTE_LEVEL | {"trim_offsets": False},
        "decoder": _BYTE_LEVEL,
        "model": model,
    }


def described(fast: Mapping[str, Any]) -> Described:
    """The vocabulary in the content of a file.

    Raises:
        Fault: a part of it gives other ids than GPT-2's byte-pair encoding with the same merges would.
    """
    model = fast.get("model")
    if not isinstance(model, dict):
        raise Fault("has no object 'model'")
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind != "BPE":
        raise Fault(f"describes a model of type {kind!r:.80}, expected 'BPE'", kind=str(kind)[:80].lower())
    for key in _CHANGED_MERGING:
        if model.get(key):
            raise Fault(f"has model.{key} = {model[key]!r:.80}, which GPT-2's has not")
    if fast.get("normalizer"):
        raise Fault(f"has the normalizer {_kinds(fast['normalizer'])}, GPT-2's has none")
    split = fast.get("pre_tokenizer")
    if not isinstance(split, dict) or any(_BYTE_LEVEL[key] != split.get(key, default) for key, default in _SPLIT):
        raise Fault(f"splits text by {_kinds(split)}, expected ByteLevel without add_prefix_space")
    tokens, ids, merges = fast.get("added_tokens") or [], model.get("vocab"), model.get("merges")
    if not isinstance(tokens, list) or not isinstance(ids, dict) or not isinstance(merges, list):
        raise Fault("has no lists of added tokens, ids and merges")
    texts = [text_of(token) for token in tokens]
    added = [(token.get("id"), text) for token, text in zip(tokens, texts, strict=True)]
    return Described(ids, [" ".join(map(str, one)) if isinstance(one, list) else str(one) for one in merges], added)


def text_of(token: Any) -> Any:
    """The text of an added token, which must not take white space beside it.

    Raises:
        Fault: it does, or it is no description of a token.
    """
    if not isinstance(token, dict) or "content" not in token:
        raise Fault(f"has an added token {token!r:.80}")
    if flags := [flag for flag in _CHANGED_SPLIT if token.get(flag)]:
        raise Fault(f"has {flags[0]} = true for the token {token.get('content')!r:.80}, expected false")
    return token["content"]


def _kinds(part: Any) -> str:
    """The types within a part of the file, in short."""
    return ", ".join(re.findall(r'"type": "(\w+)"', json.dumps(part)))[:120] or json.dumps(part)[:120]
