"""Children's Book Test. In: a model and cloze questions; out: how often it prefers the right one of ten words.

The paper reports the validation set: a book of the test set is in its training data (section 3.2).
"""

import math
import re
import tarfile
from collections.abc import Sequence

import torch

from regpt2.base.errors import DataError
from regpt2.evals.scoring.assets import Asset, find
from regpt2.evals.scoring.context import EvalContext, Figures
from regpt2.evals.scoring.corpora import read_text
from regpt2.evals.scoring.detokenize import penn_treebank
from regpt2.evals.scoring.endings import Question, score_endings
from regpt2.evals.scoring.questions import question, read_on_all_ranks

_PROTOCOL = "the right one of ten words is the likeliest, with the rest of its sentence; validation set, detokenized"
DESCRIPTION = "Children's Book Test, common nouns and named entities: accuracy, as in the GPT-2 paper's table"
PROTOCOLS = {"cn_accuracy": f"common nouns: {_PROTOCOL}", "ne_accuracy": f"named entities: {_PROTOCOL}"}
_BLANK = "XXXXX"
# A sentence, the right word, nothing, the words to choose from.
_QUESTION = re.compile(rf"([^\t]*{_BLANK}[^\t]*)\t([^\t]+)\t+([^\t]+)")


def _asset(kind: str) -> Asset:
    """The archive, which holds all kinds; or a local folder with its files."""
    return Asset(
        "CBTest.tgz",  # 120 MB
        "https://parl.ai/downloads/cbt/cbt.tar.gz",
        "932df0cadc1337b2a12b4c696b1041c1d1c6d4b6bd319874c6288f02e4a61e92",
        licence="GNU FDL 1.3",
        other_names=("cbt.tar.gz", *(f"{folder}{_file(kind)}" for folder in ("", "data/", "CBTest/data/"))),
    )


def _file(kind: str) -> str:
    return f"cbtest_{kind}_valid_2000ex.txt"


ASSETS = (_asset("CN"), _asset("NE"))

Cloze = tuple[Question, int]
"""A question with one ending a word, and the number of the right one."""


def evaluate(context: EvalContext) -> Figures:
    """`cn_accuracy` and `ne_accuracy`, each with its standard error, and `count` questions. Brief: only the first."""
    kinds = ("CN",) if context.brief else ("CN", "NE")
    asked = read_on_all_ranks(context, "cbt", lambda: [_read(context, kind) for kind in kinds])
    scored = score_endings(context, "cbt", [one for part in asked for one, _ in part])
    right = scored.nats.argmin(dim=1) == torch.tensor([answer for part in asked for _, answer in part])
    figures: Figures = {}
    for kind, part in zip(kinds, torch.split(right.double(), [len(part) for part in asked]), strict=True):
        figures[f"{kind.lower()}_accuracy"] = float(part.mean())
        figures[f"{kind.lower()}_accuracy_stderr"] = float(part.std()) / math.sqrt(len(part)) if len(part) > 1 else None
    return {**figures, "count": len(right)}


def _read(context: EvalContext, kind: str) -> Sequence[Cloze]:
    given = context.files.get("cbt")
    if given is not None and given.is_file() and not tarfile.is_tarfile(given):
        raise DataError(f"{given} is one of several files; give the folder that holds them: --files cbt={given.parent}")
    path = find(_asset(kind), "cbt", context.files)
    found: list[Cloze] = []
    before: list[str] = []
    for n, line in enumerate(read_text(path, f"CBTest/data/{_file(kind)}").split("\n"), start=1):
        number, _, text = line.partition(" ")
        if number == "21":
            found.append(_cloze(context, before, text, f"{path}, {kind}, line {n}"))
            before = []
        elif text.strip():
            before.append(penn_treebank(text))
        if len(found) == context.limit > 0:
            break
    if not found:
        raise DataError(f"{path}: no questions of the Children's Book Test ({kind}) in it.")
    return found


def _cloze(context: EvalContext, before: Sequence[str], line: str, where: str) -> Cloze:
    """One line 21, after its sentences."""
    match = _QUESTION.fullmatch(line.strip())
    sentence, answer, words = match.groups() if match else ("", "", "")
    choices = words.split("|")
    if not sentence or answer not in choices:
        raise DataError(
            f"{where}: expected a sentence with {_BLANK}, the right word, and all words, got {line[:80]!r}."
        )
    start, _, rest = penn_treebank(sentence).partition(_BLANK)
    passage = " ".join((*before, start))
    one = question(context.need_tokenizer(), passage, [word + rest for word in choices])
    return one, choices.index(answer)
