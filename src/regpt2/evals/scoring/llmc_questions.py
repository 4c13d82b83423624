"""Questions as llm.c packs them, `hellaswag_val.bin`. In: the file; out: GPT-2's ids of contexts and their endings."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regpt2.base.errors import DataError
from regpt2.data.tokens.manifest import HEADER_BYTES
from regpt2.data.tokens.other_formats import QUESTIONS_MAGIC, VERSION
from regpt2.evals.scoring.corpora import read_member
from regpt2.evals.scoring.endings import Question

VOCAB_SIZE = 50257  # GPT-2's: the layout is for its tokens alone
_START = 65535
_HEAD = 5  # of an example: start, its bytes, its index, the number of the right ending, how many endings


@dataclass(frozen=True)
class PackedQuestion:
    """A question, and the number of its right ending."""

    question: Question
    gold: int


def is_packed(path: Path) -> bool:
    """Does the file begin as llm.c's questions do?"""
    with open(path, "rb") as file:
        return file.read(4) == QUESTIONS_MAGIC.to_bytes(4, "little")


def read_packed(path: Path, limit: int) -> list[PackedQuestion]:
    """The questions of the file in their order; only the first `limit`, 0 = all.

    Raises:
        DataError: it is not whole, or holds something else.
    """
    data = read_member(path, "")
    if len(data) < HEADER_BYTES or len(data) % 2:
        raise DataError(f"{path} has {len(data):,} bytes, not a header and whole uint16: truncated; get it again.")
    _, version, n_questions = np.frombuffer(data, dtype="<i4", count=3).tolist()
    if version != VERSION or n_questions < 1:
        raise DataError(
            f"{path} has version {version} and {n_questions:,} questions, expected version {VERSION} and at least one; "
            "get it again."
        )
    ids = np.frombuffer(data, dtype="<u2", offset=HEADER_BYTES).tolist()
    found, at = [], 0
    for number in range(min(limit or n_questions, n_questions)):
        one = _question(ids, at, number, path)
        found.append(one)
        at += _HEAD + 1 + len(one.question.context) + sum(1 + len(ending) for ending in one.question.endings)
    return found


def _question(ids: list[int], start: int, number: int, path: Path) -> PackedQuestion:
    begin, n_bytes, _, gold, n_endings = (*ids[start : start + _HEAD], *[0] * _HEAD)[:_HEAD]
    at, rows = start + _HEAD, list[list[int]]()
    for _ in range(1 + n_endings):
        n = ids[at] if at < len(ids) else 0
        rows.append(ids[at + 1 : at + 1 + n])
        at += 1 + n
    is_sound = begin == _START and n_bytes == 2 * (at - start) and at <= len(ids) and gold < n_endings >= 2
    if not is_sound or not all(rows) or max(map(max, rows)) >= VOCAB_SIZE:
        raise DataError(
            f"{path}: question {number:,} is not as llm.c writes them (its head: {ids[start : start + _HEAD]}); the "
            "file is damaged, or not of GPT-2's tokens. Get it again, or give hellaswag_val.jsonl."
        )
    return PackedQuestion(Question(rows[0], tuple(rows[1:])), gold)
