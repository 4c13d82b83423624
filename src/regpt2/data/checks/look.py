"""Look inside data. In: opened folders; out: manifest, counts and text in words and for JSON, or where two differ."""

from dataclasses import asdict
from typing import Any

from regpt2.base.console import ProgressLine, say
from regpt2.base.errors import UsageError
from regpt2.data.characters import META_NAME
from regpt2.data.checks.counts import STRETCH_TOKENS, Counts, count_tokens
from regpt2.data.checks.excerpts import excerpt, find_parting
from regpt2.data.checks.folder import OpenFolder
from regpt2.data.checks.show import COLUMNS, N_COMMON, n_files, show_counts, show_field, show_folder, show_text, visible
from regpt2.data.tokenizer import OWN_FILE, Tokenizer
from regpt2.data.tokens.manifest import SPLITS

MOST_COUNTED = 1_000_000_000  # tokens of a split; of a larger one, a sample
DEFAULT_STRETCHES = 256


def look(
    folder: OpenFolder, positions: tuple[int, ...], *, n_tokens: int, n_stretches: int | None, count_all: bool
) -> dict[str, Any]:
    """Print a folder's manifest, counts and text; return the same for JSON.

    With `positions` the `n_tokens` from each position of the first split are shown, and no counts. `n_stretches`: count
    a sample of that many; None: everything, or a sample if the split is large and `count_all` is not set.

    Raises:
        UsageError: a position is not in the split.
    """
    places = [(next(iter(folder.splits)), at) for at in positions] or [(name, 0) for name in folder.splits]
    for name, at in places:
        size = folder.splits[name].n_tokens
        if not 0 <= at < size:
            raise UsageError(f"--at {at} is outside the {name} split of {size:,} tokens: give 0 to {size - 1}.")
    found: dict[str, Any] = {"folder": str(folder.path), "manifest": None, "counts": {}, "excerpts": []}
    if folder.manifest is not None:
        found["manifest"] = folder.manifest.content()
    show_folder(folder)
    for name in () if positions else folder.splits:
        counts = _count(name, folder, n_stretches, count_all)
        show_counts(name, counts, folder)
        found["counts"][name] = _counts_for_json(counts, folder.tokenizer)
    for name, at in places:
        shown = excerpt(folder.splits[name], folder.tokenizer, at, n_tokens)
        say(f"\n{name} from token {at:,}: {shown.file}, its token {shown.file_position:,}")
        show_text(shown)
        found["excerpts"].append({"split": name, **asdict(shown)})
    return found


def _count(name: str, folder: OpenFolder, n_stretches: int | None, count_all: bool) -> Counts:
    stream = folder.splits[name]
    if n_stretches is None and stream.n_tokens > MOST_COUNTED and not count_all:
        n_stretches = DEFAULT_STRETCHES
    n_tokens = min(stream.n_tokens, (n_stretches or stream.n_tokens) * STRETCH_TOKENS)
    with ProgressLine(f"counting {name}", n_tokens, "tokens") as line:
        return count_tokens(stream, folder.tokenizer.eot, n_stretches, line.advance)


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
        found["length"] = counts.length_summary()
    found["histogram"] = [{"from": first, "documents": documents} for first, documents in counts.histogram()]
    found["most_common"] = [
        {"id": token, "token": visible(token, tokenizer), "times": times}
        for token, times in counts.most_common(N_COMMON)
    ]
    return found


def compare(a: OpenFolder, b: OpenFolder, n_tokens: int) -> dict[str, Any]:
    """Print where two folders differ; return the same for JSON, with `equal`: whether their tokens are."""
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
            show_field("  A", first)
            show_field("  B", second)
    splits = {name: _compare_split(name, a, b, n_tokens) for name in SPLITS if name in a.splits or name in b.splits}
    equal = all(split["equal"] for split in splits.values()) and a.tokenizer.fingerprint == b.tokenizer.fingerprint
    say("\nTheir tokens are equal." if equal else "\nTheir tokens are different.")
    return {"a": str(a.path), "b": str(b.path), "fields": fields, "splits": splits, "equal": equal}


def _whose_tokens(folder: OpenFolder) -> str:
    """What the tokens of a folder without a manifest are taken to be."""
    stream = next(iter(folder.splits.values()))
    if stream.tokenizer_fingerprint is None:
        return "its tokens taken to be GPT-2's"
    return f"its tokens those of {META_NAME if stream.vocab is None else OWN_FILE}"


def _facts(folder: OpenFolder) -> dict[str, str]:
    """A folder's description, each field by its name in the manifest."""
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
            if (counted := manifest.splits[name].counted) is not None:
                facts[f"splits.{name}.counted"] = f"{counted:,}"
        facts |= {f"splits.{name}.tokens": f"{stream.n_tokens:,}", f"splits.{name}.shards": f"{len(stream.files):,}"}
    return facts


def _compare_split(name: str, a: OpenFolder, b: OpenFolder, n_tokens: int) -> dict[str, Any]:
    """Print whether a split is equal, and if not, both texts around the first difference."""
    if name not in a.splits or name not in b.splits:
        say(f"\n{name}: only {'A' if name in a.splits else 'B'} has it")
        return {"equal": False}
    ours, theirs = a.splits[name], b.splits[name]
    parting = find_parting(ours, theirs, a.tokenizer.eot, name)
    if parting is None:
        say(f"\n{name}: equal, {ours.n_tokens:,} tokens, in {n_files(ours)} and in {n_files(theirs)}")
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
        show_text(shown, {at: mark})
        found[side.lower()] = asdict(shown)
    return found
