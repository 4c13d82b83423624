"""Changes to a file that keep most of its form, and so come past a reader's first checks. In: bytes; out: others."""

import json
import math
import re
import struct
import tomllib
from collections.abc import Callable
from random import Random
from typing import Any

POWERS = [7, 8, 15, 16, 31, 32, 53, 63, 64, 80, 1030, 14300, 20000]
NUMBERS = [0, 1, -1, 2, 3, 10**10, 10**400, 10**4299, *(2**n + d for n in POWERS for d in (-1, 0))]
FLOATS = [0.0, -0.0, 0.5, 1.0, 1e-320, 1e300, math.nan, math.inf, -math.inf]
TEXTS = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a\\b",
    "\0",
    "\n",
    '"',
    "\x1b[2J",
    "\u202e",
    "é👍",
    "\udc80",
    "x" * 3000,
]
WORDS = ["gpt2", "regpt2", "F32", "BF16", "I64", "BOOL", "train", "val", "bytes", "__metadata__", "version", "note"]
MOST_PARTS = 20


def mutate(target: str, data: bytes, random: Random) -> bytes:
    """A file like `data`: some of its bytes, numbers or values are others."""
    for _ in range(random.choice((1, 1, 2, 4))):
        edit = random.choice((_bytes, _digits, *[_FORMS.get(target, _bytes)] * 3))
        data = edit(data, random)
    return data


def odd(random: Random, depth: int = 2) -> Any:
    """A value of JSON, rather an unlikely one."""
    kinds: list[Callable[[], Any]] = [
        lambda: random.choice(NUMBERS),
        lambda: random.choice(FLOATS),
        lambda: random.choice(TEXTS + WORDS),
        lambda: random.choice((True, False, None)),
    ]
    if depth:
        kinds.append(lambda: [odd(random, depth - 1) for _ in range(random.randrange(4))])
        kinds.append(lambda: {random.choice(TEXTS + WORDS): odd(random, depth - 1) for _ in range(random.randrange(3))})
    return random.choice(kinds)()


def toml(table: dict[str, Any]) -> str:
    """A table as TOML, its tables inline."""
    return "".join(f"{_toml_value(key)} = {_toml_value(value)}\n" for key, value in table.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if type(value) is int:
        return hex(value) if value > 2**63 else str(value)
    if isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False)
    return "1979-05-27" if value is None else str(value)  # a float; a date


def _bytes(data: bytes, random: Random) -> bytes:
    """Flip a bit, or remove, repeat, insert, overwrite a part."""
    a, b = sorted((random.randint(0, len(data)), random.randint(0, len(data))))
    new = random.randbytes(random.choice((1, 2, 4, 8)))
    number = struct.pack("<q", random.choice([n for n in NUMBERS if -(2**63) <= n < 2**63]))
    at = min(a, random.choice((a, 8, 64))) // 4 * 4
    changed = [
        data[:a] + bytes(byte ^ (1 << random.randrange(8)) for byte in data[a : a + 1]) + data[a + 1 :],
        data[:a],
        data[:a] + data[b:],
        data[:b] + data[a:],
        data[:a] + new + data[a:],
        data[:a] + new + data[a + len(new) :],
        data[:at] + number[: random.choice((4, 8))] + data[at + 8 :],
    ]
    return random.choice(changed)


def _digits(data: bytes, random: Random) -> bytes:
    """Another number in a text."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not found:
        return data
    at, number = random.choice(found), random.choice(NUMBERS)
    text = str(number) if abs(number) < 2**1030 else hex(number)
    return data[: at.start()] + text.encode() + data[at.end() :]


def _tree(tree: Any, random: Random) -> Any:
    """The tree with one value in it replaced, removed, added or repeated."""
    places: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(places) < 1000:
        node = waiting.pop()
        inner = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
        places += [(node, key) for key, _ in inner]
        waiting += [value for _, value in inner]
    if not places or random.random() < 0.02:
        return odd(random)
    node, key = random.choice(places)
    value, what = node[key], random.randrange(8)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node[random.choice(TEXTS + WORDS)] = value
    elif what == 2 and isinstance(node, list):
        node.append(value)
    elif what == 3 and type(value) is int:
        node[key] = value + random.choice((-1, 1, 2**32, 2**64))
    else:
        node[key] = odd(random)
    return tree


def _json(data: bytes, random: Random) -> bytes:
    try:
        tree = _tree(json.loads(data), random)
        return json.dumps(tree, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return _bytes(data, random)


def _json_lines(data: bytes, random: Random) -> bytes:
    lines = data.splitlines(keepends=True)[:MOST_PARTS] or [b"{}\n"]
    at = random.randrange(len(lines))
    lines[at] = _json(lines[at], random) + random.choice((b"\n", b"\n", b"\n", b"", b"\r\n", b"\n\n"))
    return b"".join(lines)


def _safetensors(data: bytes, random: Random) -> bytes:
    n_bytes = int.from_bytes(data[:8], "little")
    header = _json(data[8 : 8 + n_bytes], random)
    return struct.pack("<Q", len(header)) + header + data[8 + n_bytes :]


def _toml(data: bytes, random: Random) -> bytes:
    try:
        tree = _tree(tomllib.loads(data.decode()), random)
        return toml(tree).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, AttributeError):
        return _bytes(data, random)


_FORMS: dict[str, Callable[[bytes, Random], bytes]] = {
    "manifest": _json,
    "weights": _safetensors,
    "model_config": _json,
    "recipe": _toml,
    "record": _json_lines,
    "checkpoint": _json,
}
