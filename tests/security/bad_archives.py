"""Zip archives that are not as `torch.save` makes them, old kinds of files, odd things in place of a file."""

import io
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import torch
from bad_pickles import FILE, bare, code, name, program, read_as_the_child, saved
from cases import ODD_THINGS, Case, Content, archive, sparse

from regpt2.model.files.load import load_model

CONFIG = b'{"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": 4, "vocab_size": 4}'
EMPTY_DICT = program(b"}")


def archive_cases(canary: Path) -> list[Case]:
    """All of them; some by the real door, `load_model`, with a child of its own."""
    files = {f"archive: {what}": content for what, content in archives().items()}
    by_the_door: dict[str, Content] = {f"load_model: {FILE}, {what}": content for what, content in ODD_THINGS.items()}
    by_the_door |= {
        "load_model: code": bare(code(canary)["os.system"]),
        "load_model: code in an old file": code(canary)["eval"],
        "load_model: 1e11 elements by expand": saved({"wte.weight": torch.ones(1).expand(10**11)}),
        "load_model: a bomb": bomb(),
        "load_model: no model": saved({"wte.weight": torch.ones(4, 4)}),
    }
    return [
        *(Case(what, read_as_the_child, {FILE: content}) for what, content in files.items()),
        *(Case(what, load_model, {FILE: content, "config.json": CONFIG}) for what, content in by_the_door.items()),
    ]


def archives() -> dict[str, Content]:
    """Archives by what is wrong with them."""
    whole = saved({"wte.weight": torch.ones(64)})
    members = {"model/data.pkl": EMPTY_DICT, "model/version": b"3\n"}
    old = saved({"wte.weight": torch.ones(4)}, _use_new_zipfile_serialization=False)
    flipped = bytearray(whole)
    flipped[whole.index(torch.ones(64).numpy().tobytes()) + 9] ^= 4
    return {
        "compressed": bare_deflated(whole),
        "a bomb": bomb(),
        "a bit flipped in a tensor": bytes(flipped),
        "cut in half": whole[: len(whole) // 2],
        "without its end": whole[:-30],
        "without its beginning": whole[100:],
        "a script before it": b"#!/bin/sh\ntouch canary\n" + whole,
        "bytes after it": whole + b"x" * 100_000,
        "saved by old torch": old,
        "a tar archive": tar(),
        "a bare pickle": program(name("os", "getpid") + b")R"),
        "without a pickle": archive({"model/version": b"3\n"}),
        "empty": archive({}),
        "of TorchScript": archive(members | {"model/constants.pkl": EMPTY_DICT, "model/code/a.py": b"import os"}),
        "a name that climbs": archive(members | {"../../climbed": b"x"}),
        "a name that climbs from within": archive(members | {"model/../../climbed": b"x"}),
        "an absolute name": archive(members | {"/tmp/climbed": b"x"}),
        "a name of Windows": archive(members | {"..\\climbed": b"x"}),
        "a name of 60,000": archive(members | {"model/" + "a" * 60_000 + "\x01": b"x"}),
        "a name of escapes": archive(members | {"model/\x1b]0;x\x07": b"x"}),
        "20,000 members": archive(members | {f"model/data/{n}": b"" for n in range(20_000)}),
        "a member twice": twice(members),
        "sizes that lie": whole.replace((256).to_bytes(4, "little") * 2, (2**31).to_bytes(4, "little") * 2),
        "a size of 0xFFFFFFFF": whole.replace((256).to_bytes(4, "little") * 2, b"\xff" * 8),
        "members over each other": overlapping(),
        "an encrypted member": encrypted(members),
        "the end of an archive alone": zip_end(),
        "the end of an archive of 65,535": b"PK\x05\x06\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0",
        "8 GB before the end": sparse(8 << 30, whole),
    }


def bare_deflated(whole: bytes) -> bytes:
    """An honest file, compressed."""
    with zipfile.ZipFile(io.BytesIO(whole)) as made:
        return archive({member: made.read(member) for member in made.namelist()}, zipfile.ZIP_DEFLATED)


@cache
def bomb() -> bytes:
    """250 KB that become 256 MB: torch itself loads them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        made.writestr("model/data.pkl", EMPTY_DICT)
        with made.open("model/data/0", "w") as member:
            for _ in range(256):
                member.write(bytes(1 << 20))
    return file.getvalue()


def twice(members: dict[str, bytes]) -> bytes:
    """An archive with two members of one name: readers differ in which they take."""
    return archive(members | {"model/versioo": b"4\n"}).replace(b"versioo", b"version")


def overlapping() -> bytes:
    """Two names whose bytes are the same: a small file of much content."""
    big = archive({"model/data.pkl": EMPTY_DICT, "model/data/0": b"\0" * 9000, "model/data/1": b"\0" * 9000})
    first = big.index(b"PK\x03\x04", 10)
    second = big.index(b"PK\x03\x04", first + 4)
    return big[:second] + big[second + 9000 :].replace(second.to_bytes(4, "little"), first.to_bytes(4, "little"))


def encrypted(members: dict[str, bytes]) -> bytes:
    """An archive whose members say that they are encrypted."""
    data = bytearray(archive(members))
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1
    data[6] |= 1
    return bytes(data)


def zip_end() -> bytes:
    """What an archive ends with, alone: 22 bytes."""
    return archive({})


def tar() -> bytes:
    """As torch saved before it knew of zip, with a member that climbs."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        for member in ("storages", "tensors", "pickle", "../../climbed"):
            info = tarfile.TarInfo(member)
            info.size = len(EMPTY_DICT)
            made.addfile(info, io.BytesIO(EMPTY_DICT))
    return file.getvalue()
