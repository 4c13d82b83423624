"""Every entry of every shelf keeps its contract from the day it appears."""

import inspect

import pytest

from regpt2.base import shelves
from regpt2.base.errors import UsageError

ENTRIES = [(shelf, name) for shelf in shelves.SHELVES for name in shelves.entries(shelf)]


@pytest.mark.parametrize(("shelf", "name"), ENTRIES)
def test_an_entry_has_what_its_shelf_promises(shelf: str, name: str) -> None:
    entry = shelves.load(shelf, name)  # raises what is missing
    if shelf in ("data.datasets", "evals"):
        assert entry.DESCRIPTION
        assert "\n" not in entry.DESCRIPTION
    assert inspect.getdoc(entry)


@pytest.mark.parametrize("shelf", shelves.SHELVES)
def test_a_wrong_name_is_met_with_what_there_is(shelf: str) -> None:
    with pytest.raises(UsageError, match=shelves.entries(shelf)[0]):
        shelves.load(shelf, "nothing_like_it")
    with pytest.raises(UsageError):
        shelves.load(shelf, "../base/errors")
