"""Entries by name: optimizers, evaluations, data sets, formats, architectures. In: a shelf and a name; out: a module.

An entry is one Python module, wherever it comes from:

- built in: a file in the shelf's folder. Its name is the file's name.
- from an installed package: an entry point `NAME = "package.module"` in the group `regpt2.optim`, `regpt2.evals`, ...
- from a plugin, `--plugin FILE.py`: a file as in the shelf's folder, with the line `SHELF = "optim"` in it.

What a module needs is the CONTRACT in the shelf's `__init__.py`; each entry is checked against it when it is loaded.
An entry may also have a dataclass `Options`: then its fields are options on the command line and in recipes.
Only the command line names a plugin. No recipe, run folder or model file can make one run.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from regpt2.base.errors import ConfigError, UsageError, did_you_mean
from regpt2.base.files import sha256_bytes, sha256_file

SHELVES = ("data.datasets", "data.token_formats", "evals", "model.architectures", "model.weights", "training.optim")

Names = Mapping[str, str | type]
T = TypeVar("T")


@dataclass(frozen=True)
class Contract:
    """What the entries of a shelf have: a function by its signature, "(a, b) -> c"; anything else by its class."""

    required: Names
    ways: Sequence[Names] = ({},)
    """At least one of these, and none of them by half."""
    optional: Names = field(default_factory=dict)


_plugins: dict[tuple[str, str], ModuleType] = {}  # by shelf and name; of this process, as sys.modules is


def kind_of(shelf: str) -> str:
    """A shelf as a person writes it: "optim" for "training.optim"."""
    return shelf.rsplit(".", 1)[-1]


def entries(shelf: str) -> list[str]:
    """Names on a shelf, those from outside first. `shelf` is a package below regpt2: "evals", "training.optim", ..."""
    return [*(name for at, name in _plugins if at == shelf), *_installed(shelf), *_built_in(shelf)]


def load(shelf: str, name: str) -> ModuleType:
    """The module of one entry.

    Raises:
        ConfigError: there is no such entry.
        UsageError: it cannot be imported, or lacks what its shelf requires.
    """
    names = entries(shelf)
    if name not in names:
        raise ConfigError(
            f"{kind_of(shelf)}: there is no {name!r}{did_you_mean(name, names)} Available: {', '.join(names)}. "
            "One of your own needs --plugin FILE.py."
        )
    if plugin := _plugins.get((shelf, name)):
        return plugin
    if name in (installed := _installed(shelf)):
        try:
            module: ModuleType = installed[name].load()
        except Exception as error:
            raise UsageError(f"{_where(installed[name])} cannot be imported: {_cause(error)}") from error
        return _checked(shelf, module, _where(installed[name]))
    module = importlib.import_module(f"regpt2.{shelf}.{name}")
    return _checked(shelf, module, str(module.__file__))


def with_part(shelf: str, name: str) -> tuple[ModuleType, str]:
    """The module of an entry and its part: of "core.piqa" core's and "piqa". Without a part it is "", the whole.

    Raises:
        ConfigError: there is no such entry, or it has no such part.
        UsageError: as for `load`.
    """
    entry, dot, part = name.partition(".")
    module = load(shelf, entry if entry in entries(shelf) else name)
    parts: tuple[str, ...] = getattr(module, "PARTS", ())
    if dot and part not in parts:
        hint = f"{did_you_mean(part, parts)} Available: {', '.join(parts)}." if parts else ", nor has it any other."
        raise ConfigError(f"{kind_of(shelf)}: {entry} has no part {part!r}{hint}")
    return module, part


def use_plugins(files: Iterable[str]) -> None:
    """Make these files the plugins of this process, instead of earlier ones. Each is run, once.

    Raises:
        UsageError: a file is missing, fails when it is imported, is no entry, or has the name of another entry.
    """
    loaded: dict[tuple[str, str], ModuleType] = {}
    for path in dict.fromkeys(Path(file).resolve() for file in files):
        shelf, module = _plugin(path)
        if (shelf, path.stem) in loaded or path.stem in [*_built_in(shelf), *_installed(shelf)]:
            raise UsageError(f"--plugin {path}: {kind_of(shelf)} has {path.stem!r} already; rename the file.")
        loaded[shelf, path.stem] = module
    _plugins.clear()
    _plugins.update(loaded)


def plugin_files() -> list[str]:
    """The plugins of this process, for `use_plugins` in another one."""
    return [str(module.__file__) for module in _plugins.values()]


def plugin_options() -> list[str]:
    """The same for a command line: `--plugin FILE.py` for each."""
    return [word for path in plugin_files() for word in ("--plugin", path)]


def origins(*entries: tuple[str, str]) -> dict[str, dict[str, str]]:
    """File and SHA-256 of those (shelf, name) that are not built in, by "shelf/name"."""
    whole = dict.fromkeys((shelf, name.partition(".")[0]) for shelf, name in entries)  # of core.piqa, core
    outside = [(shelf, name) for shelf, name in whole if name not in _built_in(shelf)]
    files = {f"{kind_of(shelf)}/{name}": str(load(shelf, name).__file__) for shelf, name in outside}
    return {name: {"file": file, "sha256": sha256_file(Path(file))} for name, file in files.items()}


def extended(kind: type[T], shelf: str, names: Iterable[object]) -> type[T]:
    """The dataclass `kind`, with a field for each of these entries that has `Options`, named as the entry.

    Raises:
        UsageError: there is no such entry, or `kind` has a field of that name.
    """
    found = {name.partition(".")[0]: with_part(shelf, name)[0] for name in names if isinstance(name, str)}
    own: Any = tuple((name, entry.Options) for name, entry in found.items() if hasattr(entry, "Options"))
    joined: type[T] = _joined(kind, own)  # type: ignore[arg-type]  # a class is hashable
    return joined


def own_options(config: object, name: str) -> Any:
    """The own options of an entry, or of the entry of a part, from a dataclass made by `extended`; None without any."""
    own = getattr(config, name.partition(".")[0], None)
    return own if is_dataclass(own) else None


def words_after(options: Sequence[str], name: str) -> list[str]:
    """The values of an option on a command line, `name a b` or `name=a`, before it is parsed."""
    at = max((at for at, word in enumerate(options) if word.partition("=")[0] == name), default=len(options))
    _, equals, value = (*options, "")[at].partition("=")
    return [value] if equals else list(takewhile(lambda word: not word.startswith("-"), options[at + 1 :]))


@cache  # one class for the same options: configs of equal values must be equal
def _joined(kind: Any, own: tuple[tuple[str, type], ...]) -> Any:
    for name, _ in own:
        if hasattr(kind, name) or name in {one.name for one in fields(kind)}:
            raise UsageError(f"the entry {name!r} has Options, and {name!r} is an option already; rename the entry.")
    added = [(name, options, field(default_factory=options)) for name, options in own]
    how: dict[str, Any] = {"bases": (kind,), "namespace": {"__doc__": kind.__doc__}, "frozen": True, "kw_only": True}
    return make_dataclass(kind.__name__, added, **how) if own else kind


def _built_in(shelf: str) -> list[str]:
    package = importlib.import_module(f"regpt2.{shelf}")
    modules = pkgutil.iter_modules(package.__path__)
    return [one.name for one in modules if not one.ispkg and not one.name.startswith("_")]


@cache
def _installed(shelf: str) -> dict[str, Any]:
    """Entry points by name."""
    metadata = importlib.import_module("importlib.metadata")  # here: it takes longer than all of the command's start
    found = {point.name: point for point in metadata.entry_points(group=f"regpt2.{kind_of(shelf)}")}
    if clash := sorted(found.keys() & set(_built_in(shelf))):
        where = _where(found[clash[0]])
        raise UsageError(f"{where}: {kind_of(shelf)} has {clash[0]!r} already; uninstall that package.")
    return found


def _where(point: Any) -> str:
    return f"{point.name} = {point.value} of the package {point.dist.name if point.dist else '?'}"


def _plugin(path: Path) -> tuple[str, ModuleType]:
    """Run the file, unless this process has; its shelf and its module."""
    if not path.is_file():
        raise UsageError(f"--plugin {path}: there is no such file.")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise UsageError(f"--plugin {path} must be called NAME.py, with a NAME of letters, digits and _.")
    name = f"regpt2_plugin_{path.stem}_{sha256_bytes(bytes(path) + path.read_bytes())}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader, "a .py file has a loader"
    if name not in sys.modules:
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look for theirs there
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise UsageError(f"--plugin {path} cannot be imported: {_cause(error)}") from error
    module, known = sys.modules[name], {kind_of(shelf): shelf for shelf in SHELVES}
    shelf = getattr(module, "SHELF", None)
    if not isinstance(shelf, str) or shelf not in known:
        got = f"SHELF = {shelf!r}" if hasattr(module, "SHELF") else "no line SHELF = ..."
        raise UsageError(f"--plugin {path} has {got}, expected one of {', '.join(map(repr, known))}.")
    return known[shelf], _checked(known[shelf], module, str(path))


def _cause(error: BaseException) -> str:
    """An exception in a line, with the place of its last call."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    line = "" if isinstance(error, SyntaxError) else f" ({Path(place.filename).name}, line {place.lineno})"
    return f"{type(error).__name__}: {error}{line}."


def _checked(shelf: str, module: ModuleType, where: str) -> ModuleType:
    """The module, if it keeps the contract of its shelf."""
    contract: Contract = importlib.import_module(f"regpt2.{shelf}").CONTRACT
    begun = [way for way in contract.ways if any(hasattr(module, name) for name in way)] or contract.ways[:1]
    wanted = {name: what for names in (contract.required, *begun) for name, what in names.items()}
    wanted |= {name: what for name, what in contract.optional.items() if hasattr(module, name)}
    for name, what in wanted.items():
        if fault := _fault(module, name, what):
            form = f"{name}: {what.__name__}" if isinstance(what, type) else f"{name}{what}"
            raise UsageError(f"{where}: an entry of {kind_of(shelf)} needs `{form}`; this one {fault}")
    if hasattr(module, "Options") and not _has_defaults(module.Options):
        raise UsageError(f"{where}: `Options` must be a dataclass whose fields all have defaults.")
    return module


def _fault(module: ModuleType, name: str, what: str | type) -> str:
    if not hasattr(module, name):
        others = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
        return f"has none. It has {', '.join(others) or 'no function'}."
    value = getattr(module, name)
    if isinstance(what, type):
        fits = issubclass(value, what) if isinstance(value, type) else isinstance(value, what)
        return "" if fits else f"has {value!r:.80}."
    if not callable(value):
        return f"has {value!r:.80}, which cannot be called."
    try:
        inspect.signature(value).bind(*what.partition(")")[0].split(","))
    except TypeError:
        return f"has {name}{inspect.signature(value)}."
    return ""


def _has_defaults(options: object) -> bool:
    try:
        return isinstance(options, type) and is_dataclass(options) and options() is not None
    except TypeError:
        return False
