"""The command `regpt2 tokenizer train`. In: files of text and a number of tokens; out: a `tokenizer.json`.

regpt2 tokenizer train --input my/texts --vocab-size 8192 --out my/tokenizer.json
regpt2 prepare text_files --input my/texts --tokenizer my/tokenizer.json --out data/mine
"""

from regpt2.base.errors import UsageError, did_you_mean
from regpt2.base.options import parse
from regpt2.data.train_tokenizer import TrainTokenizerOptions, train_tokenizer

ACTIONS = ("train",)


def main(argv: list[str]) -> int:
    """Make a tokenizer from text; progress and a summary are printed."""
    action = argv[0] if argv else ""
    if action not in ACTIONS and not {"-h", "--help"} & set(argv):
        raise UsageError(
            f"regpt2 tokenizer: there is no {action!r}{did_you_mean(action, ACTIONS)} Available: {', '.join(ACTIONS)}."
        )
    rest = argv[1:] if action in ACTIONS else argv
    train_tokenizer(parse(TrainTokenizerOptions, rest, "regpt2 tokenizer train"))
    return 0
