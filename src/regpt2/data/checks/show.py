"""A data folder in words. In: what was found in it; out: lines, tables and bars for a person."""

from itertools import zip_longest
from textwrap import wrap

from rich.cells import chop_cells, set_cell_size

from regpt2.base.console import safe_text, say
from regpt2.data.checks.counts import Counts
from regpt2.data.checks.excerpts import Excerpt
from regpt2.data.checks.folder import OpenFolder
from regpt2.data.tokenizer import Tokenizer
from regpt2.data.tokens.manifest import described
from regpt2.data.tokens.shards import TokenStream

COLUMNS = 100
N_COMMON = 16
BAR_COLUMNS = 20
EIGHTHS = " ▏▎▍▌▋▊▉█"


def show_folder(folder: OpenFolder) -> None:
    manifest = folder.manifest
    if manifest is None:
        say(f"{folder.path}")
        show_field("note", next(iter(folder.splits.values())).note)
        for name, stream in folder.splits.items():
            say(f"  {name:<5} {stream.n_tokens:,} tokens in {n_files(stream)}")
        return
    say(f"{folder.path}: {manifest.dataset}, {manifest.source}")
    skipped = "; ".join(described(manifest.skipped, manifest.first_skipped))
    for name, value in {
        "revision": manifest.revision,
        "tokenizer": f"{manifest.tokenizer}, {manifest.vocab_size:,} ids, {manifest.tokenizer_fingerprint}",
        "added tokens": " ".join(manifest.added),
        "options": ", ".join(f"{name} {value}" for name, value in manifest.options.items()) or "none",
        "skipped": skipped or "nothing",
        "fingerprint": manifest.fingerprint,
    }.items():
        if value:
            show_field(name, value)
    say(f"\n  {'split':<5} {'documents':>14} {'tokens':>17} {'bytes per token':>17} {'shards':>8}")
    for name, split in manifest.splits.items():
        ratio = split.text_bytes / max(1, split.tokens)
        say(f"  {name:<5} {split.documents:>14,} {split.tokens:>17,} {ratio:>17.3f} {len(split.shards):>8,}")
    for name, split in manifest.splits.items():
        if (counted := split.counted) is not None:
            share = counted / max(1, split.tokens)
            say(f"  {name:<5} {counted:,} tokens, those of the answers, count in the loss: {share:.1%}")


def show_field(name: str, value: str) -> None:
    """A name and its value; a long value is wrapped below its first line."""
    label = f"  {name:<14}"
    for line in wrap(safe_text(value), COLUMNS, initial_indent=label, subsequent_indent=" " * len(label)):
        say(line)


def n_files(stream: TokenStream) -> str:
    return "1 file" if len(stream.files) == 1 else f"{len(stream.files):,} files"


def show_counts(name: str, counts: Counts, folder: OpenFolder) -> None:
    vocab_size = folder.tokenizer.vocab_size
    if counts.is_whole:
        say(f"\n{name}: all {counts.n_tokens:,} tokens counted")
    else:
        say(f"\n{name}: a sample of {counts.n_read:,} of {counts.n_tokens:,} tokens counted; --all counts them all")
    _show_documents(counts, folder, name)
    say(f"  {counts.n_used:,} of {vocab_size:,} ids occur, {counts.n_used / vocab_size:.1%} of the vocabulary")
    lengths = f"{'tokens from':>12} {'documents':>12}  {'':{BAR_COLUMNS}}"
    say(f"\n  {lengths}   {'id':>6}  {'most common':<16} {'times':>14} {'share':>7}")
    for bar, token in zip_longest(_bars(counts), _common(counts, folder.tokenizer), fillvalue=""):
        say(f"  {bar:<{len(lengths)}}   {token}".rstrip())


def _show_documents(counts: Counts, folder: OpenFolder, name: str) -> None:
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
        shown = "median {median:,}, mean {mean:,.0f}, 95 % at most {percent_95:,}, longest {longest:,}"
        say("  tokens per document: " + shown.format(**counts.length_summary()))
    stated = folder.manifest.splits[name].documents if folder.manifest else counts.n_documents
    if counts.is_whole and stated != counts.n_documents:
        say(f"  but the manifest says {stated:,} documents; run `regpt2 verify {folder.path}`")


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
        f"{token:>6}  {set_cell_size(visible(token, tokenizer), 16)} {times:>14,} {times / counts.n_read:>7.2%}"
        for token, times in counts.most_common(N_COMMON)
    ]


def visible(token: int, tokenizer: Tokenizer) -> str:
    """A token in quotes with its spaces and line ends visible; one that is no whole character as bytes."""
    data = tokenizer.decode_bytes([token])
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return repr(data)


def show_text(shown: Excerpt, marks: dict[int, str] | None = None) -> None:
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
