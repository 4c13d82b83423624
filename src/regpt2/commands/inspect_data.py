"""Look inside data. In: a folder of tokens; out: its manifest, counts and text in words, or where two folders differ.

regpt2 inspect data/fineweb_edu
regpt2 inspect data/fineweb_edu --at 1000000 --tokens 200
regpt2 inspect data/mine --against data/theirs
"""

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any, Literal

import tyro
from rich.cells import chop_cells, set_cell_size

from regpt2.base.console import ProgressLine, safe_text, say
from regpt2.base.errors import DataError, UsageError
from regpt2.base.files import write_atomic
from regpt2.base.options import parse
from regpt2.data.characters import META_NAME
from regpt2.data.checks.counts import STRETCH_TOKENS, Counts, count_tokens
from regpt2.data.checks.excerpts import Excerpt, excerpt, find_parting
from regpt2.data.checks.integrity import Findings, check_data
from regpt2.data.tokenizer import Tokenizer
from regpt2.data.tokens.manifest import MANIFEST_NAME, SPLITS, Manifest, described
from regpt2.data.tokens.other_formats import foreign_files
from regpt2.data.tokens.shards import TokenStream, open_tokens

COLUMNS = 100
MOST_COUNTED = 1_000_000_000  # tokens of a split; of a larger one, a sample
DEFAULT_STRETCHES = 256
N_COMMON = 16
BAR_COLUMNS = 20
EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class InspectOptions:
    """Look inside a data folder, ours or another project's: manifest, counts, text; or compare it with another."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of tokens."""
    split: Literal["train", "val"] | None = None
    """Only this split; default: all, or train with --at."""
    at: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """Show the text at this token, counted from 0, instead of the counts; may be given several times."""
    tokens: int = 64
    """Tokens of text to show."""
    sample: int | None = None
    """Count N evenly spaced stretches of 2^20 tokens; default: 256 for a split above a billion tokens."""
    all: bool = False
    """Count every token, also in large splits."""
    verify: bool = False
    """First check every shard and every id, as `regpt2 verify` does; stop if any is bad."""
    against: Path | None = None
    """Another folder: show where the two differ. Exit code 1 if their tokens differ, whatever their files."""
    json: Path | None = None
    """Also write the results to this JSON file."""


@dataclass(frozen=True)
class Folder:
    """A data folder, opened."""

    path: Path
    manifest: Manifest | None
    splits: dict[str, TokenStream]
    tokenizer: Tokenizer


def main(arguments: list[str]) -> int:
    """The verb `regpt2 inspect`."""
    options = parse(InspectOptions, arguments, "regpt2 inspect")
    paths = [options.data] if options.against is None else [options.data, options.against]
    _check(options, paths)
    if options.verify and not all([_verify(path) for path in paths]):
        return 1
    with ExitStack() as stack:
        folders = [open_folder(path, options.split, stack) for path in paths]
        found = look(folders[0], options) if len(folders) == 1 else compare(folders[0], folders[1], options.tokens)
    if options.json is not None:
        write_atomic(options.json, json.dumps(found, indent=1) + "\n")
    return 0 if found.get("equal", True) else 1


def _check(options: InspectOptions, paths: list[Path]) -> None:
    for path in paths:
        if not path.is_dir():
            raise UsageError(
                f"{path}: there is no such data folder; make it with `regpt2 prepare DATASET --out {path}`."
            )
    for name, value, usual in (("tokens", options.tokens, 64), ("sample", options.sample, DEFAULT_STRETCHES)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value} must be at least 1; the usual is {usual}.")
    if options.sample is not None and options.all:
        raise UsageError("--sample and --all exclude each other; give one of them.")
    if options.against is not None and options.at:
        raise UsageError("--against finds the place by itself; leave out --at, or leave out --against.")
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise UsageError(f"--json {options.json} must be a file in a folder that exists.")


def _verify(path: Path) -> bool:
    findings = Findings()
    check_data(path, findings)
    say(f"{len(findings.all)} things checked, {findings.n_bad or 'none'} bad.\n")
    return not findings.n_bad


def open_folder(path: Path, split: str | None, stack: ExitStack) -> Folder:
    """Open one split of a data folder, or all that it has, until the stack ends.

    Raises:
        DataError: it is unfinished or damaged, lacks the split, or was made with another vocabulary than ours.
    """
    manifest = Manifest.read(path) if (path / MANIFEST_NAME).exists() else None
    names = [split] if split else [name for name in SPLITS if _has(path, manifest, name)] or ["train"]
    splits = {name: stack.enter_context(open_tokens(path, name)) for name in names}
    stream = splits[names[0]]
    tokenizer = stream.tokenizer()
    if stream.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
        raise DataError(
            f"{path} was prepared with a {tokenizer.name} vocabulary of fingerprint {stream.tokenizer_fingerprint}, "
            f"this one is {tokenizer.fingerprint}; prepare the data again."
        )
    return Folder(path, manifest, splits, tokenizer)


def _has(path: Path, manifest: Manifest | None, split: str) -> bool:
    if manifest is not None:
        return split in manifest.splits and bool(manifest.splits[split].shards)
    return any(file.n_tokens for file in foreign_files(path, split))


def look(folder: Folder, options: InspectOptions) -> dict[str, Any]:
    """Print a folder's manifest, counts and text; return the same for JSON.

    Raises:
        UsageError: a position is not in the split.
    """
    split: str = options.split or next(iter(folder.splits))
    places = [(split, at) for at in options.at] or [(name, 0) for name in folder.splits]
    for name, at in places:
        n_tokens = folder.splits[name].n_tokens
        if not 0 <= at < n_tokens:
            raise UsageError(f"--at {at} is outside the {name} split of {n_tokens:,} tokens: give 0 to {n_tokens - 1}.")
    found: dict[str, Any] = {"folder": str(folder.path), "manifest": None, "counts": {}, "excerpts": []}
    if folder.manifest is not None:
        found["manifest"] = asdict(folder.manifest) | {"fingerprint": folder.manifest.fingerprint}
    _print_folder(folder)
    for name in () if options.at else folder.splits:
        counts = _count(name, folder, options)
        _print_counts(name, counts, folder)
        found["counts"][name] = _counts_for_json(counts, folder.tokenizer)
    for name, at in places:
        shown = excerpt(folder.splits[name], folder.tokenizer, at, options.tokens)
        say(f"\n{name} from token {at:,}: {shown.file}, its token {shown.file_position:,}")
        _print_text(shown)
        found["excerpts"].append({"split": name, **asdict(shown)})
    return found


def _print_folder(folder: Folder) -> None:
    manifest = folder.manifest
    if manifest is None:
        say(f"{folder.path}")
        _print_field("note", next(iter(folder.splits.values())).note)
        for name, stream in folder.splits.items():
            say(f"  {name:<5} {stream.n_tokens:,} tokens in {_files(stream)}")
        return
    say(f"{folder.path}: {manifest.dataset}, {manifest.source}")
    skipped = "; ".join(described(manifest.skipped, manifest.first_skipped))
    for name, value in {
        "revision": manifest.revision,
        "tokenizer": f"{manifest.tokenizer}, {manifest.vocab_size:,} ids, {manifest.tokenizer_fingerprint}",
        "options": ", ".join(f"{name} {value}" for name, value in manifest.options.items()) or "none",
        "skipped": skipped or "nothing",
        "fingerprint": manifest.fingerprint,
    }.items():
        _print_field(name, value)
    say(f"\n  {'split':<5} {'documents':>14} {'tokens':>17} {'bytes per token':>17} {'shards':>8}")
    for name, split in manifest.splits.items():
        ratio = split.text_bytes / max(1, split.tokens)
        say(f"  {name:<5} {split.documents:>14,} {split.tokens:>17,} {ratio:>17.3f} {len(split.shards):>8,}")


def _print_field(name: str, value: str) -> None:
    """A name and its value, which goes on below itself if it is long."""
    label = f"  {name:<14}"
    for line in wrap(safe_text(value), COLUMNS, initial_indent=label, subsequent_indent=" " * len(label)):
        say(line)


def _files(stream: TokenStream) -> str:
    return "1 file" if len(stream.files) == 1 else f"{len(stream.files):,} files"


def _count(name: str, folder: Folder, options: InspectOptions) -> Counts:
    stream, n_stretches = folder.splits[name], options.sample
    if n_stretches is None and stream.n_tokens > MOST_COUNTED and not options.all:
        n_stretches = DEFAULT_STRETCHES
    n_tokens = min(stream.n_tokens, (n_stretches or stream.n_tokens) * STRETCH_TOKENS)
    with ProgressLine(f"counting {name}", n_tokens, "tokens") as line:
        return count_tokens(stream, folder.tokenizer.eot, n_stretches, line.advance)


def _print_counts(name: str, counts: Counts, folder: Folder) -> None:
    vocab_size = folder.tokenizer.vocab_size
    if counts.is_whole:
        say(f"\n{name}: all {counts.n_tokens:,} tokens counted")
    else:
        say(f"\n{name}: a sample of {counts.n_read:,} of {counts.n_tokens:,} tokens counted; --all counts them all")
    _print_documents(counts, folder, name)
    say(f"  {counts.n_used:,} of {vocab_size:,} ids occur, {counts.n_used / vocab_size:.1%} of the vocabulary")
    lengths = f"{'tokens from':>12} {'documents':>12}  {'':{BAR_COLUMNS}}"
    say(f"\n  {lengths}   {'id':>6}  {'most common':<16} {'times':>14} {'share':>7}")
    for bar, token in zip_longest(_bars(counts), _common(counts, folder.tokenizer), fillvalue=""):
        say(f"  {bar:<{len(lengths)}}   {token}".rstrip())


def _print_documents(counts: Counts, folder: Folder, name: str) -> None:
    if not counts.n_ends:
        missing = "no end of text" if counts.eot is None else f"no end of text (id {counts.eot})"
        say(f"  {missing} among them: where documents begin cannot be seen")
        return
    if counts.eot_last:
        how = "end of text ends each one (as in nanoGPT), instead of beginning it"
    elif counts.head:
        how = f"the first {counts.head:,} tokens are the end of one that began before this split"
    else:
        how = "each begins with end of text"
    documents = f"{counts.n_documents:,} document{'s' * (counts.n_documents != 1)}"
    if not counts.is_whole:
        documents = f"about {documents}, {counts.lengths.total():,} of them seen whole"
    say(f"  {documents}; {how}")
    if counts.lengths:
        median, most, longest = (counts.length_at(percent) for percent in (50, 95, 100))
        say(
            f"  tokens per document: median {median:,}, mean {counts.mean_length:,.0f}, 95 % at most {most:,}, "
            f"longest {longest:,}"
        )
    stated = folder.manifest.splits[name].documents if folder.manifest else counts.n_documents
    if counts.is_whole and stated != counts.n_documents:
        say(f"  but the manifest says {stated:,} documents; `regpt2 verify {folder.path}` tells more")


def _bars(counts: Counts) -> list[str]:
    """The histogram of lengths: a row for each power of two."""
    histogram = counts.histogram()
    most = max((documents for _, documents in histogram), default=1)
    return [f"{first:>12,} {documents:>12,}  {_bar(documents / most)}" for first, documents in histogram]


def _bar(share: float) -> str:
    """A bar as long as a share of the full one; what is above 0 shows at least a sliver."""
    eighths = max(round(8 * BAR_COLUMNS * share), int(share > 0))
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()


def _common(counts: Counts, tokenizer: Tokenizer) -> list[str]:
    return [
        f"{token:>6}  {set_cell_size(_visible(token, tokenizer), 16)} {times:>14,} {times / counts.n_read:>7.2%}"
        for token, times in counts.most_common(N_COMMON)
    ]


def _visible(token: int, tokenizer: Tokenizer) -> str:
    """A token in quotes with its spaces and line ends visible; one that is no whole character as bytes."""
    data = tokenizer.decode_bytes([token])
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return repr(data)


def _counts_for_json(counts: Counts, tokenizer: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = {
        "tokens": counts.n_tokens,
        "tokens_counted": counts.n_read,
        "documents": counts.n_documents,
        "end_of_text": None if counts.eot is None else "last" if counts.eot_last else "first",
        "continued_tokens": counts.head,
        "ids_used": counts.n_used,
        "vocab_size": tokenizer.vocab_size,
        "documents_seen_whole": counts.lengths.total(),
    }
    if counts.lengths:
        median, most, longest = (counts.length_at(percent) for percent in (50, 95, 100))
        found["length"] = {"median": median, "mean": counts.mean_length, "percent_95": most, "longest": longest}
    found["histogram"] = [{"from": first, "documents": documents} for first, documents in counts.histogram()]
    found["most_common"] = [
        {"id": token, "token": _visible(token, tokenizer), "times": times}
        for token, times in counts.most_common(N_COMMON)
    ]
    return found


def _print_text(shown: Excerpt, marks: dict[int, str] | None = None) -> None:
    """The text of an excerpt behind a line that tells it from ours; beginnings and `marks` are written into that."""
    for piece in shown.pieces:
        labels = [(marks or {}).get(piece.position, ""), "a document begins" if piece.begins_document else ""]
        if label := ", ".join(filter(None, labels)):
            say(f"  ├─ token {piece.position:,}: {label}")
        for line in safe_text(piece.text).expandtabs(4).split("\n") if piece.text else ():
            for part in chop_cells(line, COLUMNS - 4) or [""]:
                say(f"  │ {part}".rstrip())
    if shown.ends_split:
        say("  └─ the split ends")


def compare(a: Folder, b: Folder, n_tokens: int) -> dict[str, Any]:
    """Print where two folders differ; return the same for JSON, with `equal`: are their tokens?"""
    for name, folder in (("A", a), ("B", b)):
        manifest = folder.manifest
        about = f"{manifest.dataset}, {manifest.source}" if manifest else f"no manifest.json, {_whose_tokens(folder)}"
        say(f"{name}  {folder.path}: {about}")
    ours, theirs = _facts(a), _facts(b)
    fields = {name: (ours.get(name), theirs.get(name)) for name in ours | theirs}
    fields = {name: pair for name, pair in fields.items() if pair[0] != pair[1]}
    say("\nTheir descriptions differ in:" if fields else "\nTheir descriptions are equal.")
    for name, pair in fields.items():
        first, second = ("-" if value is None else value for value in pair)
        if len(first) + len(second) <= COLUMNS // 2:
            say(f"  {name:<28} A {first:<22} B {second}")
        else:
            say(f"  {name}")
            _print_field("  A", first)
            _print_field("  B", second)
    splits = {name: _compare_split(name, a, b, n_tokens) for name in SPLITS if name in a.splits or name in b.splits}
    equal = all(split["equal"] for split in splits.values()) and a.tokenizer.fingerprint == b.tokenizer.fingerprint
    say("\nTheir tokens are equal." if equal else "\nTheir tokens are different.")
    return {"a": str(a.path), "b": str(b.path), "fields": fields, "splits": splits, "equal": equal}


def _whose_tokens(folder: Folder) -> str:
    """What the tokens of a folder without a manifest are taken to be."""
    stream = next(iter(folder.splits.values()))
    return "its tokens taken to be GPT-2's" if stream.characters is None else f"its tokens those of {META_NAME}"


def _facts(folder: Folder) -> dict[str, str]:
    """What a folder says of itself, each field by its name in the manifest."""
    facts = {"tokenizer": folder.tokenizer.name, "tokenizer_fingerprint": folder.tokenizer.fingerprint}
    manifest = folder.manifest
    if manifest is not None:
        facts |= {name: getattr(manifest, name) for name in ("dataset", "source", "revision", "fingerprint")}
        facts |= {f"options.{name}": value for name, value in manifest.options.items()}
        facts |= {f"skipped.{name}": f"{value:,}" for name, value in manifest.skipped.items()}
    for name, stream in folder.splits.items():
        if manifest is not None:
            facts[f"splits.{name}.documents"] = f"{manifest.splits[name].documents:,}"
            facts[f"splits.{name}.text_bytes"] = f"{manifest.splits[name].text_bytes:,}"
        facts |= {f"splits.{name}.tokens": f"{stream.n_tokens:,}", f"splits.{name}.shards": f"{len(stream.files):,}"}
    return facts


def _compare_split(name: str, a: Folder, b: Folder, n_tokens: int) -> dict[str, Any]:
    """Print whether a split is equal, and if not, both texts around the first difference."""
    if name not in a.splits or name not in b.splits:
        say(f"\n{name}: only {'A' if name in a.splits else 'B'} has it")
        return {"equal": False}
    ours, theirs = a.splits[name], b.splits[name]
    parting = find_parting(ours, theirs, a.tokenizer.eot, name)
    if parting is None:
        say(f"\n{name}: equal, {ours.n_tokens:,} tokens, in {_files(ours)} and in {_files(theirs)}")
        return {"equal": True}
    at = parting.position
    if at == min(ours.n_tokens, theirs.n_tokens):
        shorter, longer = "AB" if at == ours.n_tokens else "BA"
        mark = f"{shorter} has ended"
        more = abs(ours.n_tokens - theirs.n_tokens)
        say(f"\n{name}: {shorter} is the beginning of {longer}, which has {more:,} tokens more after these {at:,}")
    else:
        mark = "the first difference"
        where = f"in document {parting.document:,} of A" if parting.document else "before a document begins in A"
        say(f"\n{name}: equal up to token {at:,}, {where}")
    found: dict[str, Any] = {"equal": False, **asdict(parting)}
    start = max(0, at - max(1, n_tokens // 2))
    for side, folder in (("A", a), ("B", b)):
        shown = excerpt(folder.splits[name], folder.tokenizer, start, n_tokens, cut=at)
        say(f"\n  {side} from token {start:,}: {shown.file}, its token {shown.file_position:,}")
        _print_text(shown, {at: mark})
        found[side.lower()] = asdict(shown)
    return found
