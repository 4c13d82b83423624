"""Ranks of an attempt find each other, whatever an earlier attempt has left in the store."""

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store

from regpt2.base.errors import Problem
from regpt2.base.ranks.rendezvous import private_store


def meet(store: Store, size: int, *, timeout_s: float = 10.0) -> list[Store]:
    found: list[Store | None] = [None] * size

    def rank_main(rank: int) -> None:
        found[rank] = private_store(store, rank, size, timeout_s=timeout_s)

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(size)]
    for thread in reversed(threads):  # rank 0 last
        thread.start()
    for thread in threads:
        thread.join(20)
    return [one for one in found if one is not None]


def test_all_ranks_of_an_attempt_share_a_part_that_no_earlier_attempt_has() -> None:
    shared = HashStore()
    shared.set_timeout(timedelta(seconds=5))
    for attempt in range(5):
        stores = meet(shared, 4)
        assert len(stores) == 4
        assert not any(store.check(["address"]) for store in stores), "the address of a dead rank is still there"
        stores[0].set("address", f"of attempt {attempt}")
        assert all(store.get("address") == f"of attempt {attempt}".encode() for store in stores)


def test_a_word_of_a_rank_that_died_while_it_waited_does_not_mislead() -> None:
    shared = HashStore()
    with pytest.raises(Problem, match="rank 1 waits for rank 0, but it never connected"):
        private_store(shared, 1, 2, timeout_s=0.05)
    with pytest.raises(
        Problem, match=r"rank 0 waits for rank\(s\) 1, but it never connected"
    ):  # it answers the dead rank's word
        private_store(shared, 0, 2, timeout_s=0.05)
    first, second = meet(shared, 2)
    first.set("key", "value")
    assert second.get("key") == b"value"


def test_rank_0_says_which_ranks_are_missing() -> None:
    with pytest.raises(Problem, match=r"rank 0 waits for rank\(s\) 1, 2, but it never connected"):
        private_store(HashStore(), 0, 3, timeout_s=0.05)
