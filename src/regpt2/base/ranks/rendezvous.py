"""How the ranks of one attempt find each other. In: torchrun's store; out: a part of it that no attempt has used.

After a restart torchrun may reuse the store of the previous attempt (torch 2.13 does), with the addresses of dead
ranks: a new rank that reads one of those cannot connect, and the restart fails. Environment variables do not help:
agents on several machines count restarts differently. So the ranks first agree on a new name.
"""

import secrets
import time

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from regpt2.base.errors import Problem

_POLL_S = 0.01


def private_store(store: Store, rank: int, size: int, *, timeout_s: float) -> Store:
    """The store under a prefix of this attempt's own.

    Each rank publishes a new word. Rank 0 answers every word that it finds, those of dead ranks too, with the name of
    the attempt, until all living ranks have confirmed this name.

    Raises:
        Problem: some ranks did not connect in time.
    """
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        name, missing = secrets.token_hex(8), set(range(1, size))
        while missing:
            for other in sorted(missing):
                if store.check([f"regpt2/word/{other}"]):
                    store.set(f"regpt2/name/{store.get(f'regpt2/word/{other}').decode()}", name)
                if store.check([f"regpt2/here/{name}/{other}"]):
                    missing.remove(other)
            _sleep_until(deadline, f"rank 0 waits for rank(s) {', '.join(map(str, sorted(missing)[:8]))}")
    else:
        word = secrets.token_hex(8)
        store.set(f"regpt2/word/{rank}", word)
        while not store.check([f"regpt2/name/{word}"]):
            _sleep_until(deadline, f"rank {rank} waits for rank 0")
        name = store.get(f"regpt2/name/{word}").decode()
        store.set(f"regpt2/here/{name}/{rank}", "")
    return PrefixStore(f"regpt2/{name}", store)


def _sleep_until(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise Problem(f"{what}, but it never connected: it did not start or it crashed; see that rank's own log.")
    time.sleep(_POLL_S)
