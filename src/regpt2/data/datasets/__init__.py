"""SHELF: one file per data set; the file name is the name on the command line.

`plan(source) -> Plan` is cheap (names and sizes; it may download first) and has always the same order.
`documents(part, skipped) -> Iterator[Document]` reads one part, in a process of its own. It says in `skipped.file`
which file it reads, and counts what it leaves out. Files from elsewhere (`InputFile.url`) have been fetched by then.
`ready` has shards and no text: instead of the two, `shards(source) -> ReadyPlan` (data/preparing/ready_shards.py).
Own options are in `source.options` and `part.options`. `FIELD` is the record's field where --field is not given.
An entry of conversations has `ADDED_TOKENS`, texts added to the vocabulary, and gives documents with `messages`.
"""

from regpt2.base.shelves import Contract

CONTRACT = Contract(
    required={"DESCRIPTION": str},  # a line, for --help
    ways=[
        {"plan": "(source) -> Plan", "documents": "(part, skipped) -> Iterator[Document]"},
        {"shards": "(source) -> ReadyPlan"},
    ],
    optional={"FIELD": str, "ADDED_TOKENS": tuple},
)
