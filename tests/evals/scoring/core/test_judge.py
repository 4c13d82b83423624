"""Tokens, windows and rules of CORE: what counts, what is shared, and the four ways to get it wrong."""

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from regpt2.data.tokenizer import BytePairTokenizer, BytesTokenizer, Tokenizer
from regpt2.evals.scoring.core.judge import Window, _is_right, encoded, shared, windows
from regpt2.evals.scoring.core.prompts import Item, prompts, read_items
from regpt2.evals.scoring.core.tasks import TASKS
from regpt2.evals.scoring.endings import Question, Scored

SHARED = Path(__file__).parents[5] / "shared" / "data"
BYTES = BytesTokenizer()
START = BYTES.start_id


class Merging(Tokenizer):
    """Bytes, of which a space and a digit after it are one token: like a vocabulary with merges across words."""

    name, vocab_size, eot, start_id, fingerprint, encoder = "merging", 300, 256, 256, "", ""

    def __init__(self) -> None:
        super().__init__([bytes([byte]) for byte in range(256)] + [b""] * 44)

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint16]:
        ids: list[int] = []
        for byte in text.encode():
            if ids and ids[-1] == 32 and 48 <= byte < 58:
                ids[-1] = 257 + byte - 48
            else:
                ids.append(byte)
        return np.array(ids, dtype=np.uint16)


def scored(nats: Iterable[Iterable[float]], n: Iterable[Iterable[int]], greedy: object = False) -> Scored:
    nats, n = torch.tensor(nats, dtype=torch.float64), torch.tensor(n)
    return Scored(nats, n, torch.full(n.shape, bool(greedy)))


def test_every_sequence_begins_with_end_of_text() -> None:
    """The first pitfall: without it a prompt's first token is never predicted, and all positions are shifted."""
    assert encoded(BYTES, ["ab", "ac"]) == [(START, 97, 98), (START, 97, 99)]
    assert encoded(BYTES, ["", "a"]) == [(START,), (START, 97)]


@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
def test_of_too_long_a_sequence_the_last_tokens_are_kept(kind: str) -> None:
    """The second: at most `context_size` tokens with the answer in it, and what counts is counted from the end."""
    rows = {
        "multiple_choice": [(START, *range(10), 50), (START, *range(10), 51, 52)],
        "schema": [(START, 60, *range(10), 50), (START, 61, 62, *range(10), 50)],
        "language_modeling": [(START, *range(10)), (START, *range(10), 50, 51)],
    }[kind]
    n_scored = {"multiple_choice": [1, 2], "schema": [11, 11], "language_modeling": [2]}[kind]
    found = windows(kind, rows, 6)  # type: ignore[arg-type]
    kept = rows[-len(n_scored) :]
    assert [window.ids for window in found] == [row[-6:] for row in kept]
    assert [window.n_cut for window in found] == [len(row) - 6 for row in kept]
    assert [window.n_scored for window in found] == [min(n, 5) for n in n_scored], "nothing predicts the first"
    whole = windows(kind, rows, 100)  # type: ignore[arg-type]
    assert [(window.ids, window.n_cut, window.n_scored) for window in whole] == [
        (row, 0, n) for row, n in zip(kept, n_scored, strict=True)
    ]


def test_a_prompt_need_not_be_a_token_prefix_of_prompt_and_answer() -> None:
    """The third: the ids of both are compared. A space at the prompt's end is dropped."""
    task = TASKS["lambada_openai"]
    item = Item(("n = 7",), 0, "n = ")
    without, whole = encoded(Merging(), prompts(task, [item], 0))
    assert without == (256, *b"n =")
    (window,) = windows(task.kind, [without, whole], 100)
    assert window == Window((256, *b"n =", 264), 0, 1), "' 7' is one token"
    odd = Item(("n =7 8",), 0, "n =7 ")
    rows = [(256, *b"n =", 55, 32), (256, *b"n =", 55, 265)]  # as if the space had been kept
    assert windows(task.kind, rows, 100)[0].n_scored == 1
    assert [window.n_scored for window in windows(task.kind, encoded(Merging(), prompts(task, [odd], 0)), 100)] == [1]


def test_a_schema_counts_only_what_all_contexts_share_at_the_end() -> None:
    """The fourth: one ending after several contexts; of what differs nothing counts."""
    item = Item(("The cat sat.", "The horse sat."), 0)
    rows = encoded(BYTES, prompts(TASKS["winograd"], [item], 0))
    found = windows("schema", rows, 100)
    assert [BYTES.decode(window.ids[-window.n_scored :]) for window in found] == [" sat.", " sat."]
    (question,), places = shared(found)
    assert BYTES.decode(question.context[1:]) == "The "
    assert [BYTES.decode(ending) for ending in question.endings] == ["cat sat.", "horse sat."]
    assert question.unscored == (3, 5)
    assert places == [(0, 0), (0, 1)]


def test_the_lowest_mean_is_chosen_and_of_equals_the_first() -> None:
    item = Item(("a", "b", "c"), 1)
    places = [(0, 0), (0, 1), (0, 2)]
    assert _is_right("multiple_choice", item, scored([[3.0, 4.0, 9.0]], [[1, 2, 3]]), places), "2 < 3, not 3 < 4"
    assert not _is_right("schema", item, scored([[2.0, 4.0, 9.0]], [[1, 2, 3]]), places)
    assert _is_right("language_modeling", Item(("a",), 0), scored([[1.0]], [[2]], greedy=True), [(0, 0)])
    assert not _is_right("language_modeling", Item(("a",), 0), scored([[1.0]], [[2]]), [(0, 0)])


def test_a_choice_without_tokens_of_its_own_wins_only_as_the_first() -> None:
    """'cat' beside 'cat food' shares all its tokens: its mean is NaN, and so Python's `min` treats it in nanochat."""
    for wholes, chosen in ((("Q cat", "Q cat food"), 0), (("Q cat food", "Q cat"), 0)):
        found = windows("multiple_choice", encoded(BYTES, wholes), 100)
        assert sorted(window.n_scored for window in found) == [0, 5]
        questions, places = shared(found)
        numbers = [[len(ending) for ending in questions[0].endings]]
        result = scored([[float(n) for n in numbers[0]]], numbers)
        assert _is_right("multiple_choice", Item(wholes, chosen), result, places)


def test_windows_that_begin_alike_share_all_that_they_can() -> None:
    rows = [(START, 1, 2, 3, 4), (START, 1, 2, 3, 5, 6), (START, 1, 2, 3, 4)]
    questions, places = shared(windows("multiple_choice", rows, 100))
    assert questions == [Question((START, 1, 2, 3), ((4,), (5, 6)), (0, 0))]
    assert places == [(0, 0), (0, 1), (0, 0)], "equal choices are scored once, so that they are equal"
    cut, places = shared(windows("multiple_choice", rows, 5))
    assert cut == [Question((START, 1, 2, 3), ((4,),), (0,)), Question((1, 2, 3), ((5, 6),), (0,))]
    assert places == [(0, 0), (1, 0), (0, 0)], "after another cut no position is the same"


def test_nothing_is_lost_in_sharing() -> None:
    """Random rows: each window is its question's context and ending, and the same tokens count."""
    rng = random.Random(0)
    for _ in range(300):
        start, end = ([rng.randrange(3) for _ in range(rng.randint(0, 6))] for _ in range(2))
        middles = ([rng.randrange(3) for _ in range(rng.randint(0, 4))] for _ in range(rng.randint(2, 4)))
        rows = [(9, *start, *middle, *end) for middle in middles]
        for kind in ("multiple_choice", "schema"):
            found = windows(kind, rows, rng.choice([4, 8, 99]))  # type: ignore[arg-type]
            questions, places = shared(found)
            for window, (i, j) in zip(found, places, strict=True):
                question = questions[i]
                assert len(question.context) >= 1
                assert (*question.context, *question.endings[j]) == window.ids
                assert len(question.endings[j]) - question.unscored[j] == window.n_scored
                assert 0 <= window.n_scored < len(window.ids)
                assert question.unscored[j] >= 0


@pytest.mark.skipif(not (SHARED / "core").is_dir(), reason="no ../shared/data/core")
def test_encoding_the_shared_text_once_gives_the_same_ids() -> None:
    merges = b"".join((SHARED / "gpt2_bpe/vocab.bpe").read_bytes().splitlines(keepends=True)[:5001])
    tokenizer = BytePairTokenizer(merges)
    for name in ("piqa", "commonsense_qa", "winogrande", "bigbench_dyck_languages", "bigbench_operators", "copa"):
        items = read_items(TASKS[name], next((SHARED / "core").glob(f"{Path(TASKS[name].asset.name).stem}.jsonl.xz")))
        for i in range(30):
            texts = prompts(TASKS[name], items, i)
            assert encoded(tokenizer, texts) == [(tokenizer.start_id, *tokenizer.encode(text)) for text in texts]


def test_a_cut_never_falls_into_a_token() -> None:
    """A vocabulary whose tokens span what tempts to cut there: letters, a space and its word, line ends."""
    tokenizer = BytePairTokenizer("#version: 0.2\nb c\nĠ b\nĊ Ċ\nĠ Ġ\n' t\n".encode())
    for texts in (
        ["a bc", "a bd"],
        ["a  b", "a  c"],
        ["a \n\n", "a \n\nb"],
        ["", "b"],
        ["don't", "don'x"],
        ["a\n", "a\n\n b", "a\n b"],
        ["a\n\nb", "a\n\n"],
    ):
        assert encoded(tokenizer, texts) == [(tokenizer.start_id, *tokenizer.encode(text)) for text in texts]
