"""Detokenizers. In: text as the corpora of language modeling have it, words apart; out: as people write it.

GPT-2 was trained on the latter. Its paper undoes such artifacts by invertible detokenizers (section 3.1) but prints
none of them; these follow the same idea. No word is added or dropped, so the loss can be divided by the words of the
original.
"""

import re

_Rules = tuple[tuple[str, str], ...]  # pattern and replacement, applied in this order

# Those of lm-evaluation-harness's task `wikitext`, so that its figures and ours can be compared.
_WIKITEXT: _Rules = (
    (r"s '", "s'"),  # the players ' -> the players'
    (r" @([-,.])@ ", r"\1"),  # 1 @,@ 000 -> 1,000; mid @-@ table -> mid-table
    *((rf" [{mark}] ", f"{mark} ") for mark in ":;.!?,"),  # no space before punctuation; one after the other: `. ,`
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),  # none inside of brackets
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),  # nor of quotes
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),  # headings
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),  # 5 ° C -> 5°C
    (r" ?\n ?", "\n"),  # lines begin and end without a space
    (r" N ", " 1 "),  # a number in the Penn Treebank; here it harms, but the harness does it
    (r" 's", "'s"),
)

# Of the Penn Treebank's manner: also the Children's Book Test and, in part, the One Billion Word Benchmark.
_PENN: _Rules = (
    (r"-LRB- ?", "("),  # brackets by their names
    (r" ?-RRB-", ")"),
    (r"-LSB- ?", "["),
    (r" ?-RSB-", "]"),
    (r"-LCB- ?", "{"),
    (r" ?-RCB-", "}"),
    (r"`` ?", '"'),  # `` so '' -> "so"
    (r" ?''", '"'),
    (r"(^|(?<= ))` ", "'"),  # ` so ' -> 'so'
    (r'(^|(?<=[ (]))" ([^"]*?) "(?=$|[ ).,;:!?])', r'"\2"'),  # straight quotes in pairs
    (r" (n't|'(?:s|S|m|M|d|D|re|ve|ll|RE|VE|LL)?)(?=$|\W)", r"\1"),  # do n't -> don't, it 's -> it's, the boys '
    (r" ([.,;:!?%])(?=$|[ \"')\]])", r"\1"),  # no space before punctuation
    (r"([(\[]) ", r"\1"),  # none inside of brackets
    (r" ([)\]])", r"\1"),
    (r"([$£#]) (?=[\dN])", r"\1"),  # $ 5 -> $5, $ N -> $N
)


def wikitext(text: str) -> str:
    """An article of WikiText, tokenized or raw: ` = Title = ` and ` @-@ ` and all."""
    return _apply(_WIKITEXT, text)


def penn_treebank(line: str) -> str:
    """A sentence in the manner of the Penn Treebank."""
    return _apply(_PENN, line.strip())


def _apply(rules: _Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text
