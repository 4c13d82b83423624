"""Every entry of every shelf keeps its contract from the day it appears."""

import inspect

import pytest

from regpt2.base import shelves
from regpt2.base.errors import UsageError

CONTRACTS = {
    "data.datasets": {"plan": 1, "documents": 2},
    "data.token_formats": {"write": 2},
    "model.weights": {"matches": 1, "read": 1, "write": 4},
    "training.optim": {"build": 4},
    "evals": {"evaluate": 1},
}
# One is only written, one only read, and `ready` has no text but `shards` (tests/data/preparing/test_ready_shards.py).
ONE_WAY = {("model.weights", "onnx"), ("model.weights", "openai_tf"), ("data.datasets", "ready")}
ENTRIES = [(shelf, name) for shelf in CONTRACTS for name in shelves.entries(shelf)]


@pytest.mark.parametrize(("shelf", "name"), ENTRIES)
def test_an_entry_has_what_its_shelf_promises(shelf: str, name: str) -> None:
    entry = shelves.load(shelf, name)
    functions = [function for function in CONTRACTS[shelf] if hasattr(entry, function) or (shelf, name) not in ONE_WAY]
    for function, n_arguments in ((function, CONTRACTS[shelf][function]) for function in functions):
        assert len(inspect.signature(getattr(entry, function)).parameters) == n_arguments
    if shelf in ("data.datasets", "evals"):
        assert entry.DESCRIPTION
        assert "\n" not in entry.DESCRIPTION
    assert inspect.getdoc(entry)


@pytest.mark.parametrize("shelf", CONTRACTS)
def test_a_wrong_name_is_met_with_what_there_is(shelf: str) -> None:
    with pytest.raises(UsageError, match=shelves.entries(shelf)[0]):
        shelves.load(shelf, "nothing_like_it")
    with pytest.raises(UsageError):
        shelves.load(shelf, "../base/errors")
