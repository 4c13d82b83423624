"""The command `regpt2 prepare`. In: a data set's name and options; out: a folder of shards with its `manifest.json`."""

from regpt2.base import shelves
from regpt2.base.options import parse
from regpt2.data.preparing.options import SHELF, PrepareOptions
from regpt2.data.preparing.prepare import prepare


def main(argv: list[str]) -> int:
    """Prepare a data set, or resume; progress and a summary are printed."""
    entries = [f"  {name:<17} {shelves.load(SHELF, name).DESCRIPTION}." for name in shelves.entries(SHELF)]
    about = "\n".join(["Text to tokens to shards. Data sets:", *entries])
    kind = shelves.extended(PrepareOptions, SHELF, [word for word in argv if word in shelves.entries(SHELF)])
    prepare(parse(kind, argv, "regpt2 prepare", about=about))
    return 0
