"""Detokenizers: sentences with known answers; WikiText's as the harness's own, on the real test set."""

from pathlib import Path

import pytest

from regpt2.base.files import sha256_bytes
from regpt2.evals.scoring.detokenize import penn_treebank, wikitext
from regpt2.evals.wikitext import articles

REAL = Path(__file__).parents[4] / "shared" / "data" / "eval" / "wiki.test.raw"


@pytest.mark.parametrize(
    ("tokenized", "text"),
    [
        (" no it was n't black monday ", "no it wasn't black monday"),
        ("mr. <unk> 's $ N million of stock is n't theirs", "mr. <unk>'s $N million of stock isn't theirs"),
        ("`` Oh , do n't ! '' said the King ; `` I wo n't . ''", '"Oh, don\'t!" said the King; "I won\'t."'),
        ("' Yes , ' he said -LRB- twice -RRB- .", "' Yes,' he said (twice)."),
        ("` Yes , ' he said .", "'Yes,' he said."),
        ("the boys ' house , they 'll say", "the boys' house, they'll say"),
        ('It \'s " Crazy Talk : You . "', 'It\'s "Crazy Talk: You."'),
        ("He paid $ 5 , or 10 % ( see [ this ] ) .", "He paid $5, or 10% (see [this])."),
        ("a U.S. -based firm 's 9 : 30", "a U.S. -based firm's 9: 30"),
        ("nothing to do here", "nothing to do here"),
    ],
)
def test_penn_treebank(tokenized: str, text: str) -> None:
    assert penn_treebank(tokenized) == text


@pytest.mark.parametrize(
    ("tokenized", "text"),
    [
        (" = Robert Boulter = \n \n He was", " = Robert Boulter =\n\nHe was"),
        ("\n = = Career = = \n", "\n== Career ==\n"),
        ("a guest @-@ starring role", "a guest-starring role"),
        ("1 @,@ 000 and 3 @.@ 5 km", "1,000 and 3.5 km"),
        ('role as " Craig " in', 'role as "Craig" in'),
        ("( Sophie Stanton ) , Jr. , and", "(Sophie Stanton), Jr., and"),
        ("the players ' goals", "the players' goals"),
        ("Teddy 's Story", "Teddy's Story"),
        ("at 5 ° C ; why ? no", "at 5°C; why? no"),
    ],
)
def test_wikitext(tokenized: str, text: str) -> None:
    assert wikitext(tokenized) == text


@pytest.mark.skipif(not REAL.exists(), reason="no ../shared/data")
def test_the_real_test_set_is_detokenized_as_by_the_harness() -> None:
    parts = articles(REAL.read_bytes().decode())
    assert len(parts) == 62
    found = sha256_bytes("\0".join(map(wikitext, parts)).encode())
    assert (
        found == "b0ae50e166add20959a5406d9b3c99fe1f23819ec0a10149047149434fb85d81"
    )  # of lm-eval 0.4.13: preprocess_wikitext.py on wikitext_document_level
