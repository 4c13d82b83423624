"""GPT-2, reproduced: text to a trained, verified, resumable GPT-2.

As a command it is `regpt2`; in Python it is what this package lists, each explained in `regpt2.api`. A name is loaded,
and torch with it, when it is first used.
"""

import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "GPT", "CheckpointError", "Completion", "ConfigError", "DataError", "Document", "DownloadError", "GPTConfig",
    "Manifest", "Model", "ModelFiles", "Part", "Plan", "Problem", "Results", "Score", "Summary", "TokenLogprob",
    "TokenizerRef", "UsageError", "evaluate", "load", "plot", "prepare", "read_record", "report", "tensors_of",
    "train", "use_plugins",
]  # fmt: skip

if TYPE_CHECKING:
    from regpt2.api import (
        GPT,
        CheckpointError,
        Completion,
        ConfigError,
        DataError,
        Document,
        DownloadError,
        GPTConfig,
        Manifest,
        Model,
        ModelFiles,
        Part,
        Plan,
        Problem,
        Results,
        Score,
        Summary,
        TokenizerRef,
        TokenLogprob,
        UsageError,
        evaluate,
        load,
        plot,
        prepare,
        read_record,
        report,
        tensors_of,
        train,
        use_plugins,
    )
else:  # a type checker would take it for leave to use any name

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        from regpt2 import api  # noqa: PLC0415  (torch takes seconds to load)

        globals().update({each: getattr(api, each) for each in __all__})
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
