"""Pickles that run code, break the reader or grow: opcodes by hand, in the archive that `torch.save` makes."""

import io
import struct
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Case, archive
from torch import nn

from regpt2.base.errors import CheckpointError
from regpt2.model.files import safe_pickle

FILE = "pytorch_model.bin"


def read_as_the_child(folder: Path, kind: str = safe_pickle.STATE) -> object:
    """What the child of `read_pickled` does, in this forked process: starting one for each file would take minutes."""
    said, sys.stderr = sys.stderr, io.StringIO()
    sys.argv = ["pickled", str(folder / FILE), str(folder.parent / "copy"), kind]
    try:
        code = safe_pickle.main()
        message = sys.stderr.getvalue()
    finally:
        sys.stderr = said
    if code:
        raise CheckpointError(message.strip().split("\n")[-1])
    (folder.parent / "copy").unlink()
    return "read"


def bare(pickle_bytes: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A `.bin` with this pickle in it."""
    data = {f"model/data/{key}": value for key, value in (storages or {}).items()}
    return archive({"model/data.pkl": pickle_bytes, "model/byteorder": b"little", "model/version": b"3\n"} | data)


def saved(state: object, **options: Any) -> bytes:
    """A `.bin` as torch.save writes it."""
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


def text(value: str) -> bytes:
    """A string as opcodes."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, attribute: str) -> bytes:
    """GLOBAL: push what a module has by that name."""
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    """REDUCE: call it."""
    return function + b"(" + b"".join(arguments) + b"tR"


def program(body: bytes, protocol: int = 2) -> bytes:
    """A whole pickle."""
    return b"\x80" + bytes([protocol]) + body + b"."


def integer(value: int) -> bytes:
    """LONG1: a whole number of any size."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def integers(*values: int) -> bytes:
    """A tuple of them."""
    return b"(" + b"".join(map(integer, values)) + b"t"


def code(canary: Path) -> dict[str, bytes]:
    """Pickles that make the file `canary` when `pickle.load` reads them."""
    shell, python = text(f"touch '{canary}'"), text(f"open({str(canary)!r}, 'w').close()")
    touch, words = text(str(canary)), b"(" + text("touch") + text(str(canary)) + b"l"
    system, getattr_ = name("os", "system"), name("builtins", "getattr")
    run, shells = call(system, shell), b"(" + shell + b"l"
    os_module = call(name("importlib", "import_module"), text("os"))
    interpreter = call(name("code", "InteractiveInterpreter"))
    inner = program(run)
    within = b"B" + struct.pack("<I", len(inner)) + inner
    bodies = {
        "os.system": run,
        "posix.system": call(name("posix", "system"), shell),
        "eval": call(name("builtins", "eval"), python),
        "exec": call(name("builtins", "exec"), python),
        "open": call(name("builtins", "open"), touch, text("w")),
        "getattr of an import": call(call(getattr_, os_module, text("system")), shell),
        "__import__": call(call(getattr_, call(name("builtins", "__import__"), text("os")), text("system")), shell),
        "methodcaller": call(call(name("operator", "methodcaller"), text("system"), shell), os_module),
        "partial": call(call(name("functools", "partial"), system, shell)),
        "map": call(name("builtins", "list"), call(name("builtins", "map"), system, shells)),
        "filter": call(name("builtins", "set"), call(name("builtins", "filter"), system, shells)),
        "subprocess.getoutput": call(name("subprocess", "getoutput"), shell),
        "subprocess.call": call(name("subprocess", "call"), words),
        "os.spawnlp": call(name("os", "spawnlp"), integer(0), text("touch"), text("touch"), touch),
        "runpy": call(name("runpy", "_run_code"), python, b"}"),
        "timeit": call(name("timeit", "timeit"), python),
        "cProfile": call(name("cProfile", "run"), python, text("/dev/null")),
        "an interpreter": call(call(getattr_, interpreter, text("runsource")), python),
        "a log file": call(name("logging", "FileHandler"), touch),
        "numpy": call(name("numpy", "savetxt"), touch, b"(K\x01l"),
        "torch.save": call(name("torch", "save"), b"K\x01", touch),
        "os within torch": call(name("torch.hub", "os.system"), shell),
        "a pickle within": call(name("pickle", "loads"), within),
        "a pickle within, by its C name": call(name("_pickle", "loads"), within),
        "INST": b"(" + shell + b"ios\nsystem\n",
        "OBJ": b"(" + system + shell + b"o",
        "NEWOBJ": name("logging", "FileHandler") + b"(" + touch + b"t\x81" + b"0" + run,
        "NEWOBJ_EX": name("builtins", "dict") + b")}\x92" + b"0" + run,
        "STACK_GLOBAL": b"\x8c\x02os\x8c\x06system\x93(" + shell + b"tR",
        "STACK_GLOBAL from the memo": b"\x8c\x06system\x940\x8c\x02os\x940h\x01h\x00\x93(" + shell + b"tR",
        "STACK_GLOBAL of a dotted name": b"\x8c\x05torch\x8c\x0dhub.os.system\x93(" + shell + b"tR",
        "STACK_GLOBAL of 64-bit strings": b"\x8d%bos\x8d%bsystem\x93(" % (struct.pack("<Q", 2), struct.pack("<Q", 6))
        + shell
        + b"tR",
        "a frame around": b"\x95" + struct.pack("<Q", len(run)) + run,
        "code before an honest dict": run + b"0}",
        "code as a value": b"}" + text("wte.weight") + run + b"s",
        "code as a key": b"}" + run + b"Ns",
        "code thrown away": b"(" + run + b"t0}",
        "code remembered": system + b"q\x000h\x00(" + shell + b"tR",
        "code within a number of NumPy's": call(name("numpy._core.multiarray", "scalar"), run, run),
        "code within the state of an array of NumPy's": call(name("numpy", "ndarray"), integers(1)) + run + b"b",
        "BUILD with code": name("collections", "OrderedDict") + b")R}" + text("x") + run + b"sb",
    }
    dotted = ("os within torch", "STACK_GLOBAL of a dotted name")  # only protocol 4 follows the dots
    return {what: program(body, 4 if what in dotted else 2) for what, body in bodies.items()}


def stored(key: str = "0", n: int = 4, kind: bytes = name("torch", "FloatStorage"), device: str = "cpu") -> bytes:
    """The persistent id of a storage of n elements."""
    return b"(" + text("storage") + kind + text(key) + text(device) + integer(n) + b"tQ"


def tensor(sizes: bytes, strides: bytes = integers(1), offset: int = 0, storage: bytes | None = None) -> bytes:
    """A state dict of one tensor, as torch.save calls for it, with numbers of our choice."""
    arguments = (
        storage or stored(),
        integer(offset),
        sizes,
        strides,
        b"\x89",
        name("collections", "OrderedDict") + b")R",
    )
    made = call(name("torch._utils", "_rebuild_tensor_v2"), *arguments)
    return program(b"}" + text("wte.weight") + made + b"s")


def broken() -> dict[str, bytes]:
    """Pickles without code: against the grain of the reader, or growing out of little."""
    dots = b"]" + b"q\x00" + b"0" + b"h\x00(" + b"h\x00" * 10
    doubling = b"(K\x01t" + b"".join(b"q%c0(h%ch%ct" % (n, n, n) for n in range(60))
    sized = {
        "more elements than stored": tensor(integers(10**11)),
        "elements by a stride of 0": tensor(integers(10**11), integers(0)),
        "sizes that overflow": tensor(integers(2**31, 2**31, 2**31), integers(1, 1, 1)),
        "a size beyond 64 bits": tensor(integers(2**70)),
        "a negative size": tensor(integers(-4)),
        "a negative stride": tensor(integers(4), integers(-1)),
        "a stride beyond the storage": tensor(integers(4), integers(2**40)),
        "an offset beyond the storage": tensor(integers(4), integers(1), 2**50),
        "a negative offset": tensor(integers(4), integers(1), -8),
        "more sizes than strides": tensor(integers(2, 2), integers(1)),
        "sizes that are text": tensor(text("4")),
        "a storage of more elements than its file": tensor(integers(4), storage=stored(n=10**9)),
        "a storage of fewer elements than its file": tensor(integers(4), storage=stored(n=1)),
        "a storage of a negative number": tensor(integers(4), storage=stored(n=-1)),
        "a storage that is not there": tensor(integers(4), storage=stored("7")),
        "a storage outside": tensor(integers(4), storage=stored("../../../etc/passwd")),
        "a storage of no kind": tensor(integers(4), storage=stored(kind=name("collections", "OrderedDict"))),
        "a storage on a device that nobody has": tensor(integers(4), storage=stored(device="cuda:7"), offset=2**40),
        "a storage with code for a kind": tensor(integers(4), storage=stored(kind=name("os", "system"))),
        "a storage by a bare name": tensor(integers(4), storage=text("storage") + b"Q"),
        "a storage by a short tuple": tensor(integers(4), storage=b"(" + text("storage") + b"tQ"),
        "a code call for an offset": tensor(integers(4), storage=call(name("os", "getpid"))),
    }
    opcodes = {
        "SETITEM on a list": program(b"]" + text("a") + b"K\x01s"),
        "SETITEM on a number": program(b"K\x07" + text("a") + b"K\x01s"),
        "SETITEMS on a string": program(text("abc") + b"(K\x00K\x01u"),
        "SETITEMS of an odd number": program(b"}(" + text("a") + b"u"),
        "APPEND on a dict": program(b"}K\x01a"),
        "APPENDS on a number": program(b"K\x07(K\x01e"),
        "BUILD on a dict": program(b"}}b"),
        "BUILD on a class": program(name("torch", "Tensor") + b"}b"),
        "REDUCE of a number": program(b"K\x07)R"),
        "REDUCE of a tensor's maker without arguments": program(name("torch._utils", "_rebuild_tensor_v2") + b")R"),
        "a list within itself": program(b"]q\x00h\x00a"),
        "a dict within itself": program(b"}q\x00" + text("a") + b"h\x00s"),
        "ten references to one list": program(dots + b"t"),
        "2**60 leaves by sharing": program(doubling),
        "100,000 tuples deep": program(b")" + b"\x85" * 100_000),
        "100,000 lists deep": program(b"]" * 100_000 + b"a" * 99_999),
        "POP of nothing": program(b"0" * 1000),
        "a mark that is not there": program(b"t"),
        "the memo of nobody": program(b"h\x63"),
        "the memo at 2**31": program(b"Nr" + struct.pack("<I", 2**31)),
        "a string of 2**63": program(b"\x8d" + struct.pack("<Q", 2**63)),
        "bytes of 2 GB": program(b"B" + struct.pack("<I", 2**31 - 1)),
        "a number of 2 GB": program(b"\x8b" + struct.pack("<i", 2**31 - 1)),
        "a number of -1 bytes": program(b"\x8b" + struct.pack("<i", -1)),
        "a frame of 2**62": program(b"\x95" + struct.pack("<Q", 2**62), 4),
        "no end": b"\x80\x02}",
        "nothing": b"",
        "an extension": program(b"\x82\x01"),
        "an unknown opcode": program(b"\xff"),
        "text in place of a pickle": b"import os; os.system('id')",
        "200,000 keys": program(b"}(" + b"".join(integer(n) + b"N" for n in range(200_000)) + b"u"),
    }
    return sized | opcodes


def odd_states() -> dict[str, object]:
    """What torch itself saves, and no state dict is."""
    ones, few = torch.ones(4), torch.ones(64)
    return {
        "a tensor alone": ones,
        "a list of tensors": [ones],
        "a dict in a dict": {"model": {"wte.weight": ones}},
        "numbers for names": {1: ones},
        "a name with NUL": {"wte\0.weight": ones},
        "a name of escapes": {"\x1b]52;c;aGk=\x07": ones},
        "a name that climbs": {"a" * 300: ones},
        "a number for a tensor": {"wte.weight": 1.0},
        "None for a tensor": {"wte.weight": None},
        "1e11 elements by expand": {"wte.weight": torch.ones(1).expand(10**11)},
        "1e6 elements by expand": {"wte.weight": torch.ones(1).expand(10**6)},
        "overlapping windows": {"wte.weight": torch.ones(4000).as_strided((2000, 2000), (1, 1))},
        "a thousand views of one": {f"h.{n}": few for n in range(1000)},
        "sparse": {"wte.weight": torch.ones(4).to_sparse()},
        "sparse of 1e12 rows": {"wte.weight": torch.ones(1).to_sparse().sparse_resize_((10**12,), 1, 0)},
        "complex": {"wte.weight": torch.ones(4, dtype=torch.complex64)},
        "on the device meta": {"wte.weight": torch.ones(10**11, device="meta")},
        "of 8-bit floats": {"wte.weight": torch.ones(4).to(torch.float8_e4m3fn)},
        "with an attribute": {"wte.weight": torch.ones(1), "h": OrderedDict(a=ones)},
    }


def good_states() -> dict[str, object]:
    """What is read: strange to see, harmless."""
    ones = torch.ones(4, 4)
    return {
        "a parameter": {"wte.weight": nn.Parameter(ones)},
        "tied weights": {"wte.weight": ones, "lm_head.weight": ones},
        "a transposed view": {"wte.weight": torch.arange(6.0).view(2, 3).T},
        "a part of a larger storage": {"wte.weight": torch.arange(100.0)[10:20]},
        "an empty tensor": {"wte.weight": torch.ones(0, 5)},
        "no tensors": OrderedDict(),
    }


def pickle_cases(canary: Path) -> list[Case]:
    """All of them."""
    four = {"0": b"\0" * 16}
    files = {f"code: {what}": bare(body, four) for what, body in code(canary).items()}
    files |= {f"pickle: {what}": bare(body, four) for what, body in broken().items()}
    files |= {f"state: {what}": saved(state) for what, state in odd_states().items()}
    good = {f"state: {what}": saved(state) for what, state in good_states().items()}
    as_checkpoint = partial(read_as_the_child, kind=safe_pickle.CHECKPOINT)
    return [
        *(Case(f"checkpoint: {what}", as_checkpoint, {FILE: bare(body, four)}) for what, body in code(canary).items()),
        *(Case(what, read_as_the_child, {FILE: data}) for what, data in files.items()),
        *(Case(what, read_as_the_child, {FILE: data}, fine=True) for what, data in good.items()),
    ]
