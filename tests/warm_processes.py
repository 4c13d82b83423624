"""Fresh processes without the wait. In: a Python command line; out: a process that runs it and can be killed.

An interpreter needs more than a second of CPU to import torch, and one more for what ddp and fsdp need. Here one
process imports it all and computes nothing, and every process under test is a fork of it, by multiprocessing's fork
server, which takes some milliseconds. Use it where a kill, a signal, an exit code or the operating system is the point
of a test. Start a real interpreter where imports, its options, or variables that torch reads at its start are.
"""

import multiprocessing
import multiprocessing.context
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

WARM = [
    *("pytest", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "safetensors.torch"),
    *("matplotlib.figure", "regpt2.commands.train", "regpt2.run.loop", "regpt2.evals.val_loss"),
    *("regpt2.training.optim.adamw", "regpt2.training.optim.muon", "transformers.models.gpt2.modeling_gpt2"),
]


def warm_context(_: str = "forkserver") -> multiprocessing.context.BaseContext:
    """As `multiprocessing.get_context`; whatever is asked for, its processes are forks of the warm one."""
    multiprocessing.set_forkserver_preload(WARM)
    return multiprocessing.get_context("forkserver")


class Python:
    """As `subprocess.Popen([sys.executable, *arguments])` with text pipes, as far as tests use it.

    `arguments` begin with a script, `-m MODULE` or `-c CODE`; `env` takes the place of this process's environment.
    """

    def __init__(self, *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        self.args = [str(argument) for argument in arguments]
        self._output = Path(tempfile.mkdtemp(prefix="warm-"))
        for name in ("out", "err"):
            (self._output / name).touch()
        work = (self.args, str(cwd or Path.cwd()), dict(os.environ if env is None else env), str(self._output))
        self._process = warm_context().Process(target=_run, args=work)  # type: ignore[attr-defined]
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, -n after signal n; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until it ends; what it wrote to standard output and standard error."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0, *self.written())
        written = self.written()
        shutil.rmtree(self._output)
        return written

    def written(self) -> tuple[str, str]:
        """What it wrote so far."""
        out, err = ((self._output / name).read_text(errors="replace") for name in ("out", "err"))
        return out, err


def run_python(
    *arguments: object, timeout: float = 120, cwd: Path | None = None, env: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`."""
    process = Python(*arguments, cwd=cwd, env=env)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _run(arguments: list[str], cwd: str, environment: dict[str, str], output: str) -> None:
    """In the fork: become the interpreter with these arguments."""
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(Path(output) / name, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    first, *rest = arguments
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
