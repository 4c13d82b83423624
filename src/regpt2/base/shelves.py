"""A shelf is a folder of modules: the name of a file is the name of its entry. In: shelf and name; out: the module."""

import importlib
import pkgutil
from types import ModuleType

from regpt2.base.errors import UsageError, did_you_mean


def entries(shelf: str) -> list[str]:
    """Names on a shelf, sorted. `shelf` is a package below regpt2: "data.datasets", "training.optim", ..."""
    package = importlib.import_module(f"regpt2.{shelf}")
    modules = pkgutil.iter_modules(package.__path__)
    return sorted(one.name for one in modules if not one.ispkg and not one.name.startswith("_"))


def load(shelf: str, name: str) -> ModuleType:
    """The module of one entry.

    Raises:
        UsageError: no such entry; the message lists what there is.
    """
    names = entries(shelf)
    if name not in names:
        kind = shelf.rsplit(".", 1)[-1]
        raise UsageError(f"{kind}: there is no {name!r}{did_you_mean(name, names)} Available: {', '.join(names)}.")
    return importlib.import_module(f"regpt2.{shelf}.{name}")
