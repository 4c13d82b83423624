"""The record beside the shards, `manifest.json`: what they hold, where it came from, and the SHA-256 of each.

It is the same, byte for byte, for the same input and options: it holds no times and no paths of a machine.
Conversations have a mask beside each shard (data/tokens/masks.py), and keys for it that other data sets lack.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regpt2.base.errors import DataError
from regpt2.base.files import read_small, sha256_bytes, write_atomic

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
SPLITS = ("train", "val")
IDENTITY = ("dataset", "source", "revision", "tokenizer", "tokenizer_fingerprint")
HEADER_BYTES = 1024  # 256 little-endian int32 before the tokens of a shard
TOKEN_BYTES = 2  # uint16
MASK_SUFFIX = ".mask"  # instead of a shard's suffix, the file of its mask


@dataclass(frozen=True)
class Shard:
    """One file of tokens. `bytes` is the size of the whole file, header included."""

    file: str
    tokens: int
    bytes: int
    sha256: str
    mask_sha256: str | None = None
    """Of the file of its mask; None: every token counts in the loss, and there is no such file."""
    counted: int | None = None
    """How many of its tokens count in the loss, by its mask."""

    @property
    def mask(self) -> str | None:
        """The file of its mask, if it has one."""
        return None if self.mask_sha256 is None else Path(self.file).with_suffix(MASK_SUFFIX).name


@dataclass(frozen=True)
class Split:
    """What one split holds. `tokens` counts the end-of-text before each document, `text_bytes` does not."""

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[Shard, ...]

    @property
    def counted(self) -> int | None:
        """Tokens that count in the loss; None where all do."""
        counted = [shard.counted for shard in self.shards if shard.counted is not None]
        return sum(counted) if counted else None


@dataclass(frozen=True)
class Manifest:
    """Everything that `manifest.json` says. `revision` names the exact input, `options` what shaped the shards."""

    dataset: str
    source: str
    revision: str
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    options: dict[str, str]
    splits: dict[str, Split]
    skipped: dict[str, int]
    first_skipped: dict[str, str] = field(default_factory=dict)
    """For each reason in `skipped` the first file with it, by its name within the input."""
    characters: str | None = None
    """For the tokenizer "characters" the character of each id, in order."""
    added: tuple[str, ...] = ()
    """Special tokens beyond the tokenizer's vocabulary; their ids are the last ones of `vocab_size`."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' SHA-256s and the tokenizer's: equal means the same tokens in the same order.

        Of conversations also over the added tokens and the masks.
        """
        shards = [shard for name in SPLITS if name in self.splits for shard in self.splits[name].shards]
        lines = [*(shard.sha256 for shard in shards), self.tokenizer_fingerprint]
        lines += [f"mask {shard.mask_sha256}" for shard in shards if shard.mask_sha256 is not None]
        lines += [f"added {json.dumps(text)}" for text in self.added]
        return sha256_bytes("\n".join(lines).encode())

    @property
    def shards(self) -> list[Shard]:
        return [shard for split in self.splits.values() for shard in split.shards]

    def content(self) -> dict[str, Any]:
        """All fields and the fingerprint, for JSON; a shard without a mask has no keys for one."""
        content = asdict(self) | {"fingerprint": self.fingerprint}
        for shard in [shard for split in content["splits"].values() for shard in split["shards"]]:
            if shard["mask_sha256"] is None:
                del shard["mask_sha256"], shard["counted"]
        return content

    def write(self, folder: Path) -> None:
        content = {"version": MANIFEST_VERSION, **self.content()}
        if not self.first_skipped:
            del content["first_skipped"]
        for name in ("characters", "added"):
            if not content[name]:
                del content[name]
        write_atomic(folder / MANIFEST_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of `folder`, strictly.

        Raises:
            DataError: it is missing or not whole, has an unknown or missing key, or contradicts itself.
        """
        path = folder / MANIFEST_NAME
        try:
            content = json.loads(read_small(path, DataError))
            # Half a surrogate pair, which could be neither hashed nor written, is an error here.
            json.dumps(content, ensure_ascii=False).encode()
        except FileNotFoundError:
            raise DataError(f"{path}: there is no manifest; prepare the folder with `regpt2 prepare`.") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON ({error}); prepare the folder again.") from None
        if isinstance(content, dict) and content.get("version") != MANIFEST_VERSION:
            raise DataError(
                f"{path} has version {content.get('version')!r}, this program reads {MANIFEST_VERSION}; "
                "prepare the folder again, or use the program that wrote it."
            )
        reader = _Strict(path)
        if isinstance(content, dict):
            content.setdefault("first_skipped", {})
        expected: dict[str, type] = dict.fromkeys(("fingerprint", *IDENTITY), str)
        expected |= {"version": int, "vocab_size": int}
        expected |= dict.fromkeys(("options", "splits", "skipped", "first_skipped"), dict)
        if isinstance(content, dict):
            expected |= {name: kind for name, kind in (("characters", str), ("added", list)) if name in content}
        top = reader.fields("manifest", content, expected)
        top["added"] = reader.texts("added", top.get("added", []))
        top.pop("version")
        stated = top.pop("fingerprint")
        if unknown := set(top["splits"]) - set(SPLITS):
            raise reader.wrong("splits", f"unknown {sorted(unknown)}")
        for name, kind in (("options", str), ("skipped", int), ("first_skipped", str)):
            top[name] = reader.fields(name, top[name], dict.fromkeys(top[name], kind))
        if stray := top["first_skipped"].keys() - top["skipped"].keys():
            raise reader.wrong("first_skipped", f"got {sorted(stray)}, which are not in skipped")
        top["splits"] = {name: reader.split(f"splits.{name}", value) for name, value in top["splits"].items()}
        manifest = cls(**top)
        if manifest.fingerprint != stated:
            raise reader.wrong("fingerprint", f"got {stated}, the shards listed give {manifest.fingerprint}")
        return manifest


def described(skipped: Mapping[str, int], first_skipped: Mapping[str, str]) -> list[str]:
    """What was left out or repaired: for each reason how often, and where first."""
    where = {reason: f", first in {place}" for reason, place in first_skipped.items()}
    return [f"{reason}: {number:,}{where.get(reason, '')}" for reason, number in sorted(skipped.items())]


class _Strict:
    """Reads parts of one JSON file and names the file, the place and the fault when they are not as expected."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def wrong(self, place: str, fault: str) -> DataError:
        return DataError(f"{self.path}: {place}: {fault}; prepare the folder again.")

    def fields(self, place: str, value: Any, expected: dict[str, type]) -> dict[str, Any]:
        """`value` as an object with exactly the `expected` keys and types; a number is from 0 to 2**63 - 1."""
        if not isinstance(value, dict):
            raise self.wrong(place, f"got {type(value).__name__}, expected an object")
        if value.keys() != expected.keys():
            missing, unknown = sorted(expected.keys() - value.keys()), sorted(value.keys() - expected.keys())
            raise self.wrong(place, f"missing keys {missing}, unknown keys {unknown}")
        for key, kind in expected.items():
            if type(value[key]) is not kind or (kind is int and not 0 <= value[key] < 2**63):
                raise self.wrong(f"{place}.{key}", f"got {value[key]!r:.80}, expected {kind.__name__}")
        return dict(value)

    def texts(self, place: str, value: list[Any]) -> tuple[str, ...]:
        if not all(isinstance(text, str) and text for text in value):
            raise self.wrong(place, f"got {value!r:.80}, expected texts")
        return tuple(value)

    def split(self, place: str, value: Any) -> Split:
        found = self.fields(place, value, {"documents": int, "tokens": int, "text_bytes": int, "shards": list})
        shards = [self.shard(f"{place}.shards[{n}]", shard) for n, shard in enumerate(found["shards"])]
        if len({shard.mask is None for shard in shards}) > 1:
            raise self.wrong(f"{place}.shards", "some have a mask and some have none")
        if sum(shard.tokens for shard in shards) != found["tokens"]:
            raise self.wrong(f"{place}.tokens", f"got {found['tokens']:,}, not the sum over its shards")
        return Split(**(found | {"shards": tuple(shards)}))

    def shard(self, place: str, value: Any) -> Shard:
        expected: dict[str, type] = {"file": str, "tokens": int, "bytes": int, "sha256": str}
        if isinstance(value, dict) and "mask_sha256" in value:
            expected |= {"mask_sha256": str, "counted": int}
        shard = Shard(**self.fields(place, value, expected))
        if Path(shard.file).name != shard.file or "\\" in shard.file or not shard.file.isprintable():
            raise self.wrong(f"{place}.file", f"got {shard.file!r}, expected a plain file name")
        if shard.bytes != HEADER_BYTES + TOKEN_BYTES * shard.tokens:
            raise self.wrong(f"{place}.bytes", f"got {shard.bytes:,} for {shard.tokens:,} tokens")
        if (shard.counted or 0) > shard.tokens:
            raise self.wrong(f"{place}.counted", f"got {shard.counted:,} of {shard.tokens:,} tokens")
        return shard
