"""Ranks for a test. In: a function of rank and arguments, the number of ranks; out: processes that have run it.

They are forks of the process of tests/warm_processes.py. A rank sees the environment as it was when the first was
started.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from regpt2.cli import main
from warm_processes import warm_context


def spawn(function: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
    """As torch.multiprocessing.spawn, which starts an interpreter for each."""
    warm_context()
    mp.start_processes(function, args, nprocs, start_method="forkserver")


def command_on_ranks(n: int, port: int, folder: Path, *arguments: object) -> str:
    """`regpt2 ARGUMENTS` on `n` ranks, as torchrun starts them; it has to end with 0. Returns what they wrote.

    tests/run/test_train.py and tests/test_deploy.py have torchrun itself.
    """
    logs = [folder / f"rank-{rank}.log" for rank in range(n)]
    spawn(_command, (n, port, [str(log) for log in logs], [str(argument) for argument in arguments]), n)
    return "".join(log.read_text() for log in logs)


def place(rank: int, n: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank by its environment."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
    return {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _command(rank: int, n: int, port: int, logs: list[str], arguments: list[str]) -> None:
    os.environ |= place(rank, n, port)
    output = os.open(logs[rank], os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(main(arguments))
