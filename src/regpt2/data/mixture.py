"""Several data sets in one run. In: FOLDER=WEIGHT of each; out: their tokens, opened, and the data set of each window.

A weight is a share of the windows of training. Windows are dealt by a rule, not at random: of the first t windows each
of n data sets has its share of t, to within 1 + 1/2 + ... + 1/(n - 1) windows: 1 of two data sets, 1.5 of three. So
every update is the mixture in small. A data set's windows come in the order in which a run on it alone would see them.
"""

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regpt2.base.console import count
from regpt2.base.errors import ConfigError, DataError
from regpt2.base.files import sha256_bytes
from regpt2.data.tokenizer import Tokenizer
from regpt2.data.tokens.shards import TokenStream, open_tokens

_PARTS = 1_000_000  # so a number of windows times a weight stays within 63 bits
WORTHWHILE_EPOCHS = 4  # up to here repeated text is nearly as good as new: Muennighoff et al. 2023, arXiv:2305.16264


@dataclass(frozen=True)
class Share:
    """A data set and its part of a mixture."""

    folder: Path
    name: str
    """Its folder's, in the record."""
    parts: int
    """Its weight as a whole number, beside those of the others: the deal is exact."""


def read_shares(data: str, mix: Sequence[str]) -> tuple[Share, ...]:
    """One data folder, or the FOLDER=WEIGHT of several; the greatest share first.

    Raises:
        ConfigError: both or neither, not of that form, a weight that is none, or a folder twice.
    """
    if data and mix:
        raise ConfigError(f"data = {data!r} and mix = {list(mix)} are both given, expected one: leave the other out.")
    if not (data or mix):
        raise ConfigError(
            "no data folder: --data DIR, made by regpt2 prepare DATASET --out DIR; or several, --mix DIR=0.7 DIR=0.3."
        )
    folders: list[Path] = []
    weights: list[float] = []
    for item in mix or [f"{data}=1"]:
        folder, _, weight = item.rpartition("=")
        if not folder or not 0 < _number(weight) < math.inf:
            raise ConfigError(f"mix {item!r}: expected FOLDER=WEIGHT with a weight above 0, as in data/code=0.3.")
        if os.path.abspath(folder) in map(os.path.abspath, folders):
            raise ConfigError(f"mix {item!r}: this folder is given twice; give it once, with its whole weight.")
        folders.append(Path(folder))
        weights.append(float(weight))
    parts = [round(_PARTS * (weight / sum(weights))) for weight in weights]
    if 0 in parts:
        raise ConfigError(f"mix: {folders[parts.index(0)]} has less than a millionth of the weight; leave it out.")
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return tuple(sorted(map(Share, folders, names, parts), key=lambda share: -share.parts))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def deal(places: NDArray[np.int64], parts: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which data set each place of a run belongs to, and how many places that one had before.

    Of the first t places the first data set has floor(t x its share); the places that it leaves, counted anew, are
    dealt to the others in the same way. With the greatest share first no rounding weighs much on a small one.
    """
    whose, before = np.empty_like(places), np.empty_like(places)
    left, at = np.arange(len(places)), places  # the places that are not dealt yet: which ones, and their new count
    for k, part in enumerate(parts):
        whole = sum(parts[k:])
        had = at * part // whole
        takes = (at + 1) * part // whole > had
        whose[left[takes]], before[left[takes]] = k, had[takes]
        left, at = left[~takes], (at - had)[~takes]
    return whose, before


class Mixture(AbstractContextManager["Mixture"]):
    """The data of a run, opened: one data set, or several in one vocabulary."""

    def __init__(self, shares: Sequence[Share], streams: Sequence[TokenStream]) -> None:
        self.shares, self.streams = tuple(shares), tuple(streams)
        self.parts = tuple(share.parts for share in shares)
        self.weights = [part / sum(self.parts) for part in self.parts]
        self.n_tokens = sum(stream.n_tokens for stream in streams)
        self.notes = [stream.note for stream in streams if stream.note]
        self.fingerprint, self.dataset = streams[0].fingerprint, streams[0].dataset
        if len(shares) > 1:
            lines = [f"{stream.fingerprint} {part}" for stream, part in zip(streams, self.parts, strict=True)]
            self.fingerprint = sha256_bytes("\n".join(lines).encode())
            self.dataset = (
                f"mixture {self.fingerprint[:8]}"  # no data set's name, so that no published curve is compared
            )

    def __str__(self) -> str:
        folders = [str(share.folder) for share in self.shares]
        if len(folders) == 1:
            return folders[0]
        return " ".join(f"{folder}={weight:g}" for folder, weight in zip(folders, self.weights, strict=True))

    def described(self, n_tokens: int) -> list[dict[str, Any]]:
        """For the record: what each data set is, and how many epochs of it a run of `n_tokens` has."""
        return [
            {
                "name": share.name,
                "weight": weight,
                "tokens": stream.n_tokens,
                "epochs": weight * n_tokens / stream.n_tokens,
                "fingerprint": stream.fingerprint,
            }
            for share, weight, stream in zip(self.shares, self.weights, self.streams, strict=True)
        ]

    def plan(self, n_tokens: int) -> str:
        """The epochs of such a run, in words."""
        said = []
        for one in self.described(n_tokens):
            size = f"{count(one['tokens'])} tokens"
            whole = f"{one['name']} ({100 * one['weight']:.4g} %, {size})" if len(self.shares) > 1 else size
            said.append(f"{one['epochs']:.2f} epochs of {whole}")
        return ", ".join(said)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the data.

        Raises:
            DataError: a folder was made with another vocabulary than ours of the same name.
        """
        tokenizer = max(self.streams, key=lambda stream: len(stream.added)).tokenizer()
        for share, stream in zip(self.shares, self.streams, strict=True):
            if stream.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
                raise DataError(
                    f"{share.folder} was made with a {tokenizer.name!r} vocabulary of fingerprint "
                    f"{stream.tokenizer_fingerprint}, this one is {tokenizer.fingerprint}; prepare the data again."
                )
        return tokenizer

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _vocabulary(stream: TokenStream, all_added: tuple[str, ...]) -> tuple[str, int | None, str | None]:
    """What all data sets of a mixture share. Special tokens may have been added to some: all to one, or the first."""
    same = stream.vocab_size is not None and stream.added == all_added[: len(stream.added)]
    size = stream.vocab_size - len(stream.added) if same and stream.vocab_size is not None else stream.vocab_size
    own = stream.characters if stream.vocab is None else stream.tokenizer_fingerprint
    return stream.tokenizer_name, size, own


def open_mixture(shares: Sequence[Share], split: str = "train") -> Mixture:
    """The tokens of a split of each.

    Raises:
        DataError: one cannot be opened, or has another vocabulary than the first.
    """
    with ExitStack() as opened:
        streams = [opened.enter_context(open_tokens(share.folder, split)) for share in shares]
        first, all_added = streams[0], max((stream.added for stream in streams), key=len)
        for share, stream in zip(shares, streams, strict=True):
            if _vocabulary(stream, all_added) != _vocabulary(first, all_added):
                other = "another " if stream.tokenizer_name == first.tokenizer_name else ""
                raise DataError(
                    f"{share.folder} was made with the tokenizer {stream.tokenizer_name!r} of {stream.vocab_size} "
                    f"tokens, {shares[0].folder} with {other}"
                    f"{first.tokenizer_name!r} of {first.vocab_size}; prepare all data sets of a mixture with one "
                    "tokenizer."
                )
        opened.pop_all()
    return Mixture(shares, streams)
