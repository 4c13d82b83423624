"""Tasks over processes: tasks in, each handed to a free worker; out: the tasks as they are finished.

Workers are spawned, never forked, so Linux, macOS and Windows behave alike. A worker holds one end of a pipe and
nothing else: when this process ends, however it ends, the worker reads the end of the pipe and leaves.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from regpt2.base.errors import Problem
from regpt2.base.files import describe_os_error
from regpt2.base.screen import watch_streams

Task = TypeVar("Task")


Report = Callable[[int], object]  # gets the progress within a task, in the task's own unit
Work = Callable[[Any, Report], None]


def run_tasks(
    tasks: Iterable[Task],
    start: Callable[[], Work],
    workers: int,
    *,
    may_begin: Callable[[Task], bool] = lambda task: True,
    on_progress: Report = lambda amount: None,
) -> Iterator[Task]:
    """Do every task, in order of beginning; yield each when it is done. With one worker, in this process.

    `start()` is called once in each process and returns what does a task; it and the tasks must be picklable. A task
    waits while `may_begin` says no, which is asked again whenever another one is done.

    Raises:
        Problem: a task failed, or a worker was killed. The other workers are ended then, and also when the
            caller stops early.
    """
    if workers == 1:
        work = start()
        for task in tasks:
            work(task, on_progress)
            yield task
        return
    idle = [_Worker(start) for _ in range(workers)]
    pool, waiting = list(idle), deque(tasks)
    busy: dict[Any, _Worker] = {}
    try:
        while waiting or busy:
            while idle and waiting and (not busy or may_begin(waiting[0])):
                worker = idle.pop()
                worker.give(waiting.popleft())
                busy[worker.connection] = worker
            for connection in wait(list(busy)):
                worker = busy[connection]
                if (amount := worker.receive()) is not None:
                    on_progress(amount)
                    continue
                idle.append(busy.pop(worker.connection))
                yield worker.task
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    def __init__(self, start: Callable[[], Work]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, start), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Any = None

    def give(self, task: Any) -> None:
        self.task = task
        with suppress(OSError):  # the process is gone: `receive` will say so
            self.connection.send(task)

    def receive(self) -> int | None:
        """How much further the task is; None when it is done.

        Raises:
            Problem: it failed, or the process is gone.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(timeout=5)
            code = self.process.exitcode
            if code is not None and code > 0:
                cause = 'see its error above (a script of your own needs `if __name__ == "__main__":`)'
            else:
                cause = "perhaps it was killed because memory ran out; try fewer --workers"
            raise Problem(
                f"a worker process ended by itself (exit code {code}): {cause}. Run the same command again to resume."
            ) from None
        if isinstance(message, Problem):
            raise message
        return message if message is None else int(message)

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()
        self.process.close()


def _serve(connection: Connection, start: Callable[[], Work]) -> None:
    """A worker's life: one task after the other, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the command ends its workers
    watch_streams()
    try:
        work = start()
        while True:
            work(connection.recv(), connection.send)
            connection.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        with suppress(OSError):
            connection.send(_as_problem(error))


def _as_problem(error: Exception) -> Problem:
    """An error that can travel between processes."""
    if isinstance(error, Problem):
        return type(error)(str(error))
    if isinstance(error, MemoryError):
        return Problem("a worker ran out of memory; run the same command again with fewer --workers.")
    if isinstance(error, OSError):
        return Problem(describe_os_error(error))
    return Problem(f"a worker failed: {type(error).__name__}: {error}")
