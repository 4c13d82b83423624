"""SHELF: one file per weight format; the file name is the name on the command line. An entry reads, or writes, or both.

`matches` looks at the content and never raises. `read` raises CheckpointError for what is damaged or is no GPT-2.
`write` goes into an existing folder, or makes the file `place`; each file atomically.
"""

from regpt2.base.shelves import Contract

CONTRACT = Contract(
    required={},
    ways=[
        {"matches": "(path) -> bool", "read": "(path) -> ModelFiles"},
        {
            "write": "(model, place, vocabulary, dtype) -> None",
            "FILES": tuple,  # names that `write` can leave in a folder; none: the format is one file
            "DTYPES": tuple,  # types of weights that it can write, the default first
        },
    ],
    optional={
        "peek": "(path) -> ModelFiles",  # as `read` without tensors, where that is faster
        "ANY_ARCHITECTURE": bool,  # it holds every model of ours; left out: GPT-2 alone
        "ACTIVATION": str,  # the only form of GELU that its readers compute; left out: it says which
        "CHARACTERS_NOTE": str,  # what to say where ids are characters; left out: it does not hold them
        "CLIENT": str,  # others who read the format
        "client_logits": "(place, ids) -> Tensor | None",  # theirs (n, vocab_size) after ids (n, T), up to a constant
    },
)
