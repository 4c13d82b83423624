"""WikiText test set. In: a model and the text, raw and tokenized; out: perplexity per word and per token.

WikiText-2 and WikiText-103 have the same test articles. They differ in which rare words their tokenized files replace
by <unk>, and so do the paper's two columns; the raw file has every word.
"""

import re
from collections.abc import Sequence

from regpt2.base.console import warn
from regpt2.base.errors import DataError, DownloadError
from regpt2.data.tokenizer import Tokenizer
from regpt2.evals.scoring import detokenize
from regpt2.evals.scoring.assets import Asset, find
from regpt2.evals.scoring.context import EvalContext, Figures
from regpt2.evals.scoring.corpora import read_text
from regpt2.evals.scoring.texts import Text, score_texts

DESCRIPTION = "WikiText-2 and WikiText-103 test set: as in the GPT-2 paper's table, as in the harness, and plain"
PROTOCOLS = {
    "wikitext2_perplexity": "exp(nats of the articles, detokenized / original words), with WikiText-2's <unk>",
    "wikitext103_perplexity": "the same, with WikiText-103's <unk>",
    "word_perplexity": "the same of the raw file, words counted as in the EleutherAI harness 0.4, task wikitext",
    "plain_perplexity": "exp(nats per token) of the raw file as it is",
    "bits_per_byte": "bits / bytes of the raw file as it is",
}


def _asset(name: str, sha256: str, *other_names: str) -> Asset:
    return Asset(name, f"https://wikitext.smerity.com/{name}", sha256, "CC BY-SA 4.0", other_names)


RAW = _asset(
    "wikitext-2-raw-v1.zip", "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    "wiki.test.raw", "wikitext-2-raw/wiki.test.raw", "wikitext-103-raw/wiki.test.raw",
)  # fmt: skip
WIKITEXT2 = _asset(
    "wikitext-2-v1.zip", "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
    "wikitext-2/wiki.test.tokens",
)  # fmt: skip
WIKITEXT103 = _asset(  # 190 MB
    "wikitext-103-v1.zip", "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
    "wikitext-103/wiki.test.tokens",
)  # fmt: skip
ASSETS = (RAW,)  # all that training needs; the others are fetched when the columns are asked for

_PER_WORD = ("wikitext2_perplexity", "wikitext103_perplexity", "word_perplexity")
_TITLE = re.compile(r"^\s*= [^=](.*[^=])? =\s*$")  # of an article; sections have more signs


def evaluate(context: EvalContext) -> Figures:
    """See PROTOCOLS; a column is None if its tokenized file is not available. `limit` counts articles."""

    def read() -> Sequence[Text]:
        tokenizer, limit = context.need_tokenizer(), context.limit
        raw = read_text(find(RAW, "wikitext", context.files), "wikitext-2-raw/wiki.test.raw")
        plain = "\n".join(articles(raw)[:limit]) if limit else raw
        texts = [Text([tokenizer.encode_to_numpy(plain)], n_units=len(plain.encode()))]
        if context.brief:
            return texts
        tokenized = (_tokenized(context, WIKITEXT2, "wikitext-2"), _tokenized(context, WIKITEXT103, "wikitext-103"))
        texts += [_by_article(parts, 0, tokenizer, limit) for parts in tokenized]
        return [*texts, _by_article(articles(raw), 2, tokenizer, limit)]  # the harness counts two empty words in each

    plain, *by_article = score_texts(context, "wikitext", 1 if context.brief else 4, read)
    per_word = {metric: score.perplexity for metric, score in zip(_PER_WORD, by_article, strict=False)}
    per_token: Figures = {"plain_perplexity": plain.token_perplexity, "bits_per_byte": plain.bits}
    return {**per_word, **per_token, "tokens": plain.n_tokens, "bytes": plain.n_units}


def articles(text: str) -> list[str]:
    """The text cut before each ` = Title = `; blank text before the first is dropped."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if _TITLE.match(line):
            found.append([])
        found[-1].append(line)
    joined = ["\n".join(lines) for lines in found]
    return joined if joined[0].strip() else joined[1:]


def _by_article(parts: Sequence[str], extra_words: int, tokenizer: Tokenizer, limit: int) -> Text:
    parts = parts[: limit or None]
    documents = [tokenizer.encode_to_numpy(detokenize.wikitext(part)) for part in parts]
    return Text(documents, n_units=sum(len(part.split()) + extra_words for part in parts))


def _tokenized(context: EvalContext, asset: Asset, folder: str) -> Sequence[str]:
    """Articles of a tokenized file; none if it is not available, or if only the raw file was given."""
    given = context.files.get("wikitext")
    if given is not None and given.is_file():
        return ()
    try:
        path = find(asset, "wikitext", context.files)
    except (DataError, DownloadError) as error:
        if context.world.is_main:
            warn(f"{error} Its column is left out.")
        return ()
    return articles(read_text(path, f"{folder}/wiki.test.tokens"))
