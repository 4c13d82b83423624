"""Tasks over processes: tasks in, each handed to a free worker; out: the tasks as they are finished.

Workers are spawned, never forked, so Linux, macOS and Windows behave alike. A worker holds one end of a pipe and
nothing else: when this process ends, however it ends, the worker reads the end of the pipe and leaves.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from regpt2.base.errors import Problem
from regpt2.base.files import describe_os_error

Task = TypeVar("Task")


def run_tasks(tasks: Iterable[Task], start: Callable[[], Callable[[Task], None]], workers: int) -> Iterator[Task]:
    """Do every task, in order of beginning; yield each when it is done. With one worker, in this process.

    `start()` is called once in each process and returns what does a task; it and the tasks must be picklable.

    Raises:
        Problem: a task failed, or a worker was killed. The other workers are ended then, and also when the
            caller stops early.
    """
    if workers == 1:
        work = start()
        for task in tasks:
            work(task)
            yield task
        return
    pool = [_Worker(start) for _ in range(workers)]
    try:
        waiting = iter(tasks)
        busy = {worker.connection: worker for worker in pool if worker.give(next(waiting, None))}
        while busy:
            for connection in wait(list(busy)):
                worker = busy.pop(connection)  # type: ignore[call-overload]
                yield worker.finished()
                if worker.give(next(waiting, None)):
                    busy[worker.connection] = worker
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    def __init__(self, start: Callable[[], Callable[[Any], None]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, start), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Any = None

    def give(self, task: Any) -> bool:
        """Begin a task; False if there is none."""
        self.task = task
        if task is not None:
            with suppress(OSError):  # the process is gone: `finished` will say so
                self.connection.send(task)
        return task is not None

    def finished(self) -> Any:
        """The task that has just ended.

        Raises:
            Problem: it failed, or the process is gone.
        """
        try:
            error = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(timeout=5)
            code = self.process.exitcode
            if code is not None and code > 0:
                cause = 'its error stands above (a script of your own needs `if __name__ == "__main__":`)'
            else:
                cause = "perhaps killed for want of memory; try fewer --workers"
            raise Problem(
                f"a worker process ended by itself (exit code {code}): {cause}. Run the same command again to go on."
            ) from None
        if error is not None:
            raise error
        return self.task

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()
        self.process.close()


def _serve(connection: Connection, start: Callable[[], Callable[[Any], None]]) -> None:
    """A worker's life: one task after the other, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the command ends its workers
    try:
        work = start()
        while True:
            work(connection.recv())
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
