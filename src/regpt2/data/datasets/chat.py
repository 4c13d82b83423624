"""Conversations: a .jsonl, .json or .parquet (each also .gz, .zst), or a data set on the hub, in; documents out.

A record has a list of messages, {"role": ..., "content": ...}, in `messages` or in the field that --field names, or of
ShareGPT's {"from": ..., "value": ...}. Each conversation is one document in the form of data/chat_template.py, whose
special tokens are added to the vocabulary. Only the answers count in the loss. A record that does not fit is left out
and counted by its reason.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regpt2.base.byte_level.merges import END_OF_TEXT
from regpt2.base.errors import DataError, UsageError
from regpt2.data.chat_template import ASSISTANT, SPECIAL, SYSTEM, USER, Message, check, render
from regpt2.data.sources import hub, hub_splits, records
from regpt2.data.sources.plan import Document, Part, Plan, Skipped, Source, Wanted, group, input_file, revision_of
from regpt2.data.sources.published import described, refuse, whole_files

DESCRIPTION = "conversations: --input FILE or folder of .jsonl .json .parquet, or --repo OWNER/NAME; trains the answers"
FIELD = "messages"
ADDED_TOKENS = SPECIAL

KINDS = (*records.JSONL, *records.PARQUET)
_SHAREGPT = {"system": SYSTEM, "human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT}


def plan(source: Source) -> Plan:
    """The parts of a file, of all files below a folder, or of a split of a data set on the hub."""
    if (source.input is None) == (not source.repo):
        raise UsageError(
            "chat needs either --input PATH, a .jsonl, .json or .parquet file of conversations or a folder of such, "
            "or --repo OWNER/NAME, a data set on the hub, as in --repo HuggingFaceTB/smoltalk."
        )
    return _of_hub(source) if source.input is None else _of_files(source, source.input)


def documents(part: Part, skipped: Skipped) -> Iterator[Document]:
    return records.documents(part, skipped, CONVERSATION)


def conversation(value: list[Any]) -> Document | str:
    """The document of a list of messages; or why there is none, to follow "whose field 'messages'"."""
    if not value:
        return "has no message"
    messages = [_message(one) for one in value]
    if None in messages:
        return "has a message without the texts role and content"
    found = tuple(message for message in messages if message is not None)
    try:
        check(found)
    except DataError:
        return "has no user and assistant in turn, after a system message or none"
    if not any(message.role == ASSISTANT for message in found):
        return "has no answer"
    return Document(render(found).removeprefix(END_OF_TEXT), messages=found)


CONVERSATION = Wanted(list, "a list of messages", conversation)


def _message(value: Any) -> Message | None:
    if not isinstance(value, dict):
        return None
    role, content = value.get("role"), value.get("content")
    if "from" in value and "role" not in value:
        role, content = _SHAREGPT.get(str(value["from"]), value["from"]), value.get("value")
    return Message(role, content) if isinstance(role, str) and isinstance(content, str) else None


def _of_hub(source: Source) -> Plan:
    split = source.split or "train"
    commit = hub.resolve(source.repo, source.revision or "main")
    commit, found = hub_splits.files_of(source.repo, commit, source.config, split)
    if text := [file.name for file in found if records.kind_of(file.name) not in KINDS]:
        raise DataError(f"{source.repo} has {text[0]}, which holds no messages; choose a data set of conversations.")
    return Plan(
        parts=whole_files(found[: source.first], source.field),
        source=described(source.repo, source.config, split, first=source.first),
        revision=commit,
    )


def _of_files(source: Source, top: Path) -> Plan:
    refuse("chat with --input", config=source.config, split=source.split, revision=source.revision)
    if not top.exists():
        raise UsageError(f"--input {top}: there is no such file or folder.")
    skipped = Skipped()
    paths = sorted(path for path in top.rglob("*") if path.is_file()) if top.is_dir() else [top]
    files = []
    for path in paths:
        name = path.relative_to(top).as_posix() if top.is_dir() else path.name
        if records.kind_of(path.name) in KINDS and not name.startswith(".") and "/." not in name:
            files.append(input_file(path, name))
        else:
            skipped.add("files hidden or of a kind not read", name)
    if not files:
        raise DataError(f"--input {top}: no .jsonl, .json or .parquet (also .gz, .zst) file of conversations in it.")
    slices = (sized for file in files for sized in records.slices(file, source.field, CONVERSATION))
    return Plan(
        parts=group(slices, source.field),
        source=top.resolve().name,
        revision=f"{len(files)} files, names and sizes {revision_of(files)}",
        skipped=skipped,
    )
