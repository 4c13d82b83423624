"""SHELF: one file per format of token folders; the file name is the name on the command line.

`write(folder, data)` writes all splits, one after another, into an empty folder.
"""

from regpt2.base.shelves import Contract

CONTRACT = Contract(
    required={
        "write": "(folder, data) -> None",
        "SHARDED": bool,  # a split is several files of `shard_tokens`
        "END_OF_TEXT_LAST": bool,  # it comes after each document, not before it, and so in the rows that are given
    },
    optional={"HOLDS_CHARACTERS": bool},  # it can say which character each id is
)
