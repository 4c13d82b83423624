"""The command. In: arguments; out: an exit code. Imports only the verb; shows a problem as one message.

0 = done, 1 = failed, 2 = wrong usage, 128 + signal = stopped by it.
"""

import importlib
import sys
from types import ModuleType

from regpt2 import __version__
from regpt2.base.console import safe_text, set_least_width, wrapped
from regpt2.base.errors import FailedElsewhere, Problem, UsageError, did_you_mean
from regpt2.base.files import describe_os_error
from regpt2.base.ranks.signals import leave_if_one_of_many
from regpt2.base.screen import STREAMS, open_closed_streams, require_output, watch_streams
from regpt2.base.shelves import use_plugins
from regpt2.base.threads import spin_briefly

VERBS = {
    "doctor": "check this machine: is it ready, correct and fast (device, kernels, disks, data)",
    "plan": "estimate a run before it starts: hours, money, memory, disk, best micro-batch",
    "tokenizer": "make a tokenizer of your own from text, for prepare",
    "prepare": "turn text into shards of tokens: parallel, resumable, verified",
    "inspect": "look inside a data folder: counts, lengths, text; or compare two",
    "reshard": "convert tokens from and to llm.c, nanoGPT, Megatron, datatrove; verified",
    "train": "train a model from a recipe, or resume a run",
    "watch": "follow runs while they train: charts in the terminal, or a table of all",
    "ladder": "measure the lecture's speed-ups on this machine, one by one, then ours",
    "compare": "compare recipes over several seeds: is one better, and is it significant; grids, power laws",
    "evaluate": "score a model: loss, HellaSwag, LAMBADA, the GPT-2 paper's table",
    "harness": "score a model on tasks of EleutherAI's lm-evaluation-harness",
    "sample": "continue a prompt",
    "chat": "talk to a chat model, in the terminal or through a pipe",
    "serve": "models over HTTP: OpenAI's API, a page to write with, runs to watch",
    "explore": "look inside a model: tensors, nearest tokens, attention, pictures",
    "convert": "convert weights from and to other formats; verified",
    "report": "write a page, a picture and Markdown about one run or several",
    "verify": "check runs, checkpoints and data folders by their hashes and shapes",
}
HELP, VERSION = ("-h", "--help", "help"), ("-V", "--version")
MODULES = {"inspect": "inspect_data"}  # where a file of the verb's own name would hide the standard library's
# These write their results to standard output only, unless one of FILE_OPTIONS is given; the others write files.
SHOWING = ("chat", "doctor", "evaluate", "explore", "harness", "inspect", "plan", "sample", "verify", "watch")
FILE_OPTIONS = ("--out", "--json")
PATIENT = ("evaluate", "harness")  # they run for hours: a disk that is full now may have room for the next results


def usage() -> str:
    verbs = wrapped(f"  {verb:<10} {line}" for verb, line in VERBS.items())
    return f"""regpt2 {__version__}: GPT-2, reproduced.

usage: regpt2 VERB [arguments] [--plugin FILE.py] [--debug]
       regpt2 VERB --help

{verbs}

{wrapped(["--plugin FILE.py adds an optimizer, evaluation, data set, format or architecture of your own."])}
{wrapped(["Put an argument that begins with a dash but is not an option last, after --."])}

First steps:
  regpt2 prepare python_library --tokenizer bytes \\
      --out data/python_library_bytes
  regpt2 train demo
  regpt2 sample runs/demo "def "
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code; one of several ranks exits its process instead.

    An expected problem is shown as one message on standard error; `--debug` shows the traceback.
    """
    open_closed_streams()  # before anything opens a file
    spin_briefly()
    arguments = list(sys.argv[1:] if argv is None else argv)
    at = arguments.index("--") if "--" in arguments else len(arguments)  # what follows is not an option
    debug = "--debug" in arguments[:at]
    options = [one for one in arguments[:at] if one != "--debug"]
    set_least_width()
    try:
        options = _take_plugins(options)
        code = _run(options + arguments[at:] or ["--help"], options)
    except FailedElsewhere as problem:  # that rank has reported it
        code = problem.exit_code
    except Problem as problem:
        code = _fail(str(problem), problem.exit_code, debug)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and error.filename == STREAMS["stdout"]:
            code = 1  # the reader of our output exited, as `| head` does
        else:
            code = _fail(describe_os_error(error), 1, debug)
    except KeyboardInterrupt:
        code = _fail("interrupted.", 130, debug)
    finally:
        watch_streams()  # else the interpreter tries to write lost output again at exit
    leave_if_one_of_many(code)
    return code


def _take_plugins(options: list[str]) -> list[str]:
    """Load each `--plugin FILE.py`; return the other options."""
    others, files = [], []
    words = iter(options)
    for word in words:
        name, equals, file = word.partition("=")
        if name == "--plugin":
            files.append(file if equals else next(words, ""))
        else:
            others.append(word)
    if "" in files:
        raise UsageError("--plugin needs a file: --plugin FILE.py.")
    use_plugins(files)
    return others


def _run(arguments: list[str], options: list[str]) -> int:
    """Run the verb. A failure of standard output fails it only if the results are nowhere else."""
    verb, names = arguments[0], {option.split("=")[0] for option in options}
    shows = bool(names & {"-h", "--help"}) or verb in (*HELP, *VERSION)
    shows |= verb in SHOWING and not names & set(FILE_OPTIONS)
    watch_streams(strict=shows and verb not in PATIENT)
    if shows:
        require_output()
    try:
        if verb in (*HELP, *VERSION):
            sys.stdout.write(usage() if verb in HELP else f"regpt2 {__version__}\n")
            code = 0
        else:
            code = _module_of(verb).main(arguments[1:])
    except SystemExit:  # the parser has shown its help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    if shows:
        require_output()
    return code


def _module_of(verb: str) -> ModuleType:
    if verb not in VERBS:
        raise UsageError(f"there is no verb {verb!r}{did_you_mean(verb, VERBS)} Available: {', '.join(VERBS)}.")
    return importlib.import_module(f"regpt2.commands.{MODULES.get(verb, verb)}")


def _fail(message: str, exit_code: int, debug: bool) -> int:
    if debug:
        raise
    sys.stderr.write(safe_text(f"regpt2: {message}\n"))
    return exit_code
