"""Which files make up a configuration and split of a data set on the hub, as the `datasets` library decides it.

In: the hub's listing, and the card's configurations; out: files in the order of the card's patterns, then by path. A
data set whose files we cannot read is taken from the hub's own conversion to .parquet, on a branch of its own.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from regpt2.base.errors import DataError, UsageError, did_you_mean
from regpt2.data.sources.hub import card_configs, list_files, resolve
from regpt2.data.sources.plan import InputFile
from regpt2.data.sources.records import JSONL, PARQUET, kind_of

Patterns = Mapping[str, Sequence[str]]  # of each split

CONVERTED = "refs/convert/parquet"
TEXT = (".txt",)
KINDS = (PARQUET, JSONL, TEXT)
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
IGNORED = ("README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dummy_data.zip", "dataset_dict.json")
_SEPARATORS = "[-._ 0-9]"
_IN_FOLDER = ("**/{0}/**", "**/{0}{1}*/**", "**/*{1}{0}/**", "**/*{1}{0}{1}*/**")
_IN_NAME = ("**/{0}{1}*", "**/*{1}{0}{1}*")
_SHARDED = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")


def files_of(repo: str, commit: str, config: str, split: str) -> tuple[str, list[InputFile]]:
    """The files, and the commit that has them: another one where they are the hub's conversion.

    Args:
        config: "" for the default one.

    Raises:
        UsageError: there is no such configuration or split.
        DataError: there are no files that we can read.
        DownloadError: the hub cannot be reached.
    """
    listed = list_files(repo, commit)
    folder, patterns = _chosen(repo, card_configs(repo, commit), config, listed)
    inside = [file for file in listed if file.name.startswith(folder)]
    if not patterns:
        patterns = _usual_patterns([file.name.removeprefix(folder) for file in inside])
    _require("split", split, patterns, repo)
    found = {
        file.name: file
        for pattern in patterns[split]
        for file in inside
        if matches(file.name.removeprefix(folder), pattern)
    }
    readable = _most_common_kind(list(found.values()))
    return (commit, readable) if readable else _converted(repo, config, split)


def matches(path: str, pattern: str) -> bool:
    """Whether a shell pattern names a file: `**` is any number of folders; hidden ones only if it names them so."""
    parts, wanted = path.split("/"), pattern.removeprefix("./").split("/")
    if _n_hidden(parts) != _n_hidden(wanted) or (parts[-1] in IGNORED and parts[-1] != wanted[-1]):
        return False
    *wanted, last = wanted
    reached = {0}  # the numbers of parts that may have been matched so far
    for word in wanted:
        if word == "**":
            reached = set(range(min(reached, default=len(parts)), len(parts)))
        else:
            reached = {n + 1 for n in reached if n < len(parts) and fnmatchcase(parts[n], word)}
    if last == "**":
        return any(n < len(parts) for n in reached)
    return len(parts) - 1 in reached and fnmatchcase(parts[-1], last)


def _n_hidden(parts: Sequence[str]) -> tuple[int, int]:
    hidden = sum(part.startswith(".") and part.strip(".") != "" for part in parts)
    return hidden, sum(part.startswith("__") for part in parts[:-1])


def _chosen(repo: str, card: Any, config: str, listed: Sequence[InputFile]) -> tuple[str, Patterns]:
    """The folder of a configuration, with a slash, and its patterns; none if the default ones decide."""
    try:
        configs = {entry["config_name"]: entry for entry in card or ()}
        if configs:
            usual = [name for name, e in configs.items() if len(configs) == 1 or name == "default" or e.get("default")]
            name = config or (usual[0] if usual else "")
            _require("config", name, configs, repo)
            folder = (configs[name].get("data_dir") or "").strip("/")
            return (f"{folder}/" if folder else ""), _patterns(configs[name].get("data_files"))
    except (TypeError, KeyError, AttributeError):
        raise DataError(f"{repo}: its card describes its configurations in a way that is not understood.") from None
    if config in ("", "default"):
        return "", {}
    folders = {file.name.split("/")[0] for file in listed if "/" in file.name}
    _require("config", config, folders, repo)
    return f"{config}/", {}


def _patterns(data_files: Any) -> Patterns:
    """The `data_files` of a card: a pattern, a list of them, or lists by split."""
    if not data_files:
        return {}
    if isinstance(data_files, dict):
        return {str(split): _strings(paths) for split, paths in data_files.items()}
    if isinstance(data_files, list) and isinstance(data_files[0], dict):
        return {str(entry["split"]): _strings(entry["path"]) for entry in data_files}
    return {"train": _strings(data_files)}


def _strings(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(each, str) for each in values):
        raise TypeError("a pattern is a text")
    return values


def _usual_patterns(paths: Sequence[str]) -> Patterns:
    """By the names of folders, else of files; else all is the train split."""
    sharded = dict.fromkeys(match[1] for path in paths if (match := _SHARDED.fullmatch(path)))
    if sharded:
        return {split: [f"data/{split}-{'[0-9]' * 5}-of-{'[0-9]' * 5}*.*"] for split in sharded}
    for forms in (_IN_FOLDER, _IN_NAME):
        by_split = {
            split: [form.format(word, _SEPARATORS) for word in words for form in forms]
            for split, words in KEYWORDS.items()
        }
        found = {
            split: patterns
            for split, patterns in by_split.items()
            if any(matches(path, pattern) for pattern in patterns for path in paths)
        }
        if found:
            return found
    return {"train": ["**"]}


def _most_common_kind(files: Sequence[InputFile]) -> list[InputFile]:
    """The files of the kind that most of them have, if it is one that we read."""
    counts = Counter({kinds: sum(kind_of(file.name) in kinds for file in files) for kinds in KINDS})
    kinds, n_files = counts.most_common(1)[0]
    return [file for file in files if kind_of(file.name) in kinds] if n_files else []


def _converted(repo: str, config: str, split: str) -> tuple[str, list[InputFile]]:
    """From the hub's conversion, {config}/{split}/{number}.parquet."""
    commit = resolve(repo, CONVERTED)
    files = [file for file in list_files(repo, commit) if file.name.count("/") == 2 and file.name.endswith(PARQUET)]
    configs = dict.fromkeys(file.name.split("/")[0] for file in files)
    name = config or ("default" if "default" in configs or len(configs) != 1 else next(iter(configs)))
    _require("config", name, configs, repo)
    splits = dict.fromkeys(file.name.split("/")[1] for file in files if file.name.startswith(f"{name}/"))
    if f"partial-{split}" in splits:
        raise DataError(
            f"{repo}: its own files are of no kind that can be read, and the hub's conversion of {name}/{split} ends "
            "after 5 GB; download the files, make .jsonl or .parquet of them, and give text_files --input FOLDER."
        )
    _require("split", split, splits, repo)
    return commit, [file for file in files if file.name.startswith(f"{name}/{split}/")]


def _require(option: str, got: str, known: Any, repo: str) -> None:
    if got in known:
        return
    names = sorted(map(str, known))
    if not got:
        raise UsageError(f"{repo} has several configurations: {', '.join(names)}; choose one with --{option}.")
    raise UsageError(
        f"{repo} has no --{option} {got!r}{did_you_mean(got, names)} Available: {', '.join(names) or 'nothing'}."
    )
