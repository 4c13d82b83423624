"""The merges of a byte-level byte-pair encoding. In: merges; out: the bytes of a `vocab.bpe`, its tokens, its faults.

A vocabulary is the bytes of a `vocab.bpe`: a head line, then a merge a line in order, in GPT-2's printable characters.
Its ids are GPT-2's layout: the 256 bytes in GPT-2's order, a token for each merge, `<|endoftext|>` last.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

END_OF_TEXT = "<|endoftext|>"
HEAD = "#version: 0.2"
N_BYTES = 256
# What the tokenizer "bytes" is, which has no vocabulary file: its fingerprint is the hash of this.
BYTES_TOKENIZER = b"regpt2 bytes 1: ids 0-255 are bytes of UTF-8, 256 is <|endoftext|>"
MOST_TOKENS = (1 << 16) - 1  # ids are uint16
LONGEST = 255  # bytes of a token: what llm.c can hold; GPT-2's longest has 128
LAYOUT = f"the layout of ids is GPT-2's 256 bytes in its order, a token for each merge, {END_OF_TEXT} last"
MOST_FILE_BYTES = 32 << 20  # 65,278 merges of two parts of 255 characters, of two bytes each in UTF-8


def byte_characters() -> dict[int, str]:
    """GPT-2's table: the printable character that stands for each byte, in the order of ids 0 to 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = sorted(set(range(256)) - set(printable))
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}


def vocab_bytes(merges: Sequence[str]) -> bytes:
    """The `vocab.bpe` of these merges, "a b" each."""
    return "\n".join([HEAD, *merges, ""]).encode("utf-8", "replace")


def merges_in(vocab: bytes) -> list[str]:
    """The merges of a `vocab.bpe`: its lines without the head."""
    return vocab.decode().split("\n")[1:-1]


def tokens_of(merges: Sequence[str]) -> list[str]:
    """Every token in the order of ids, in printable characters, the end of text last."""
    return [*byte_characters().values(), *(merge.replace(" ", "") for merge in merges), END_OF_TEXT]


def fault_in(vocab: bytes) -> str | None:
    """Why these bytes are no `vocab.bpe` of a vocabulary that fits; None if they are one."""
    try:
        merges = merges_in(vocab)
    except UnicodeDecodeError:
        return "it is not UTF-8"
    return fault_of(merges) or (None if vocab_bytes(merges) == vocab else f"its first line is not {HEAD!r}")


def fault_of(merges: Sequence[str]) -> str | None:
    """Why two programs could give different ids with these merges, or none could use them; None if all is well.

    Some programs merge by pairs, as `tokenizers`, others by the bytes of the token that results, as tiktoken. They
    agree if no token results from two pairs, and every token, alone, is merged to itself.
    """
    if len(merges) > (most := MOST_TOKENS - N_BYTES - 1):
        return f"it has {len(merges):,} merges, at most {most:,} have ids"
    known, ranks = set(byte_characters().values()), dict[tuple[str, str], int]()
    for rank, merge in enumerate(merges):
        parts = merge.split(" ")
        if len(parts) != 2 or not known.issuperset(parts):
            return f"merge {rank + 1:,}, {merge!r:.80}, is not two tokens that come before it"
        if (token := "".join(parts)) in known:
            return f"merge {rank + 1:,}, {merge!r:.80}, gives a token that an earlier one gave"
        if len(token) > LONGEST:
            return f"merge {rank + 1:,} gives a token of {len(token):,} bytes, at most {LONGEST} are supported"
        known.add(token)
        ranks[parts[0], parts[1]] = rank
    lost = next((pair for pair in ranks if not merges_to_itself("".join(pair), ranks)), None)
    return None if lost is None else f"its token {''.join(lost)!r:.80} is never formed: other merges come first"


def merges_to_itself(token: str, ranks: dict[tuple[str, str], int]) -> bool:
    """Do merges by these ranks, the lowest first and from the left, make one token of this text?"""
    parts = list(token)
    while len(parts) > 1:
        found = [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not found:
            return False
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return True


def kept(merges: Sequence[str]) -> list[str]:
    """The merges without those that `fault_of` would object to, and without those that build on these."""
    while True:
        known, ranks = set(byte_characters().values()), dict[tuple[str, str], int]()
        for merge in merges:
            left, right = merge.split(" ")
            if {left, right} <= known and left + right not in known and len(left + right) <= LONGEST:
                known.add(left + right)
                ranks[left, right] = len(ranks)
        good = [f"{left} {right}" for left, right in ranks if merges_to_itself(left + right, ranks)]
        if len(good) == len(merges):
            return good
        merges = good


def layout_fault(ids: Mapping[str, Any], merges: Sequence[str]) -> str | None:
    """Why these ids are not GPT-2's layout; None if they are. The end of text may be missing, and others may follow."""
    expected = {token: n for n, token in enumerate(tokens_of(merges))}
    of_id = {n: text for text, n in ids.items() if type(n) is int}
    for token, n in expected.items():
        if (token != END_OF_TEXT or token in ids) and (type(ids.get(token)) is not int or ids[token] != n):
            got = f"{ids[token]!r:.40}" if token in ids else "no id"
            return f"gives {token!r:.80} {'' if got == 'no id' else 'the id '}{got}, expected {n} ({LAYOUT})"
        if n in of_id and of_id[n] != token:
            return f"gives {of_id[n]!r:.80} the id {n}, expected it for {token!r:.80} ({LAYOUT})"
    return None
