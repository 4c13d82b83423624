"""The fields of a request's body. In: bytes of JSON; out: values, each of its type and within its range."""

import json
import math
from collections.abc import Collection, Mapping
from typing import NoReturn

from regpt2.base.errors import did_you_mean
from regpt2.serving.api.errors import ApiError

MOST_DEPTH = 8  # objects and lists within each other; a chat message with parts has 5


def read_body(data: bytes) -> dict[str, object]:
    """The object that a body holds.

    Raises:
        ApiError: it is no JSON object, holds NaN, a name twice, or is too deep.
    """
    try:
        body = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not UTF-8 (byte {error.start:,}).") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"The body is {_kind(body)}, expected an object.")
    level: list[object] = [body]
    for _ in range(MOST_DEPTH):
        level = [inner for one in level if isinstance(one, dict | list) for inner in _inside(one)]
    if any(isinstance(one, dict | list) for one in level):
        raise _too_deep()
    return body


def _too_deep() -> ApiError:
    return ApiError(400, f"The body has more than {MOST_DEPTH} objects and lists within each other.")


def _inside(one: dict[str, object] | list[object]) -> Collection[object]:
    return one.values() if isinstance(one, dict) else one


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(400, f"The body has {twice!r:.80} twice.", param=f"{twice:.80}")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"The body holds {name}, which is not JSON.", code="invalid_json")


def _kind(value: object) -> str:
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), "null")


class Fields:
    """Reads the fields of an object. One that is null counts as absent, as at OpenAI.

    Raises:
        ApiError: each method, with the name of the field. The constructor for one that is not `known`.
    """

    def __init__(self, body: Mapping[str, object], known: Collection[str], within: str = "") -> None:
        self.body, self.within = body, within
        for name in body:
            if name not in known:
                message = f"There is no field {within}{name!r:.80}{did_you_mean(name[:80], known)}"
                raise ApiError(400, message, param=f"{within}{name:.80}", code="unknown_parameter")

    def refuse(self, name: str, expected: str) -> NoReturn:
        """The value is not what is expected."""
        value = self.body[name]
        shown = (
            f"{value!r:.80}" if isinstance(value, str | int | float) and not isinstance(value, bool) else _kind(value)
        )
        raise ApiError(400, f"{self.within}{name} is {shown}; expected {expected}.", param=f"{self.within}{name}")

    def get(self, name: str) -> object:
        """The value, unchecked."""
        return self.body.get(name)

    def text(self, name: str) -> str | None:
        """A text."""
        value = self.body.get(name)
        if value is not None and not isinstance(value, str):
            self.refuse(name, "a text")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false if absent."""
        value = self.body.get(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "true or false")
        return bool(value)

    def whole(self, name: str, low: int, high: int, why: str = "") -> int | None:
        """A whole number from `low` to `high`."""
        value = self.body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(name, f"a whole number from {low:,} to {high:,}{why}")
        return value

    def number(self, name: str, low: float, high: float = math.inf, *, above: bool = False) -> float | None:
        """A finite number from `low` to `high`; with `above`, not `low` itself."""
        value = self.body.get(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        try:
            number = float(value) if isinstance(value, int | float) and is_number else math.nan
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and low <= number <= high and (number > low or not above)):
            at_most = "" if high == math.inf else f", at most {high:g}"
            self.refuse(name, f"a number {'above' if above else 'of at least'} {low:g}{at_most}")
        return number

    def only(self, name: str, *neutral: object, why: str) -> None:
        """A field that is accepted where it changes nothing."""
        value = self.body.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
            raise ApiError(400, f"{self.within}{name} is not supported: {why}.", param=f"{self.within}{name}")

    def inner(self, name: str, known: Collection[str]) -> "Fields":
        """The fields of an object within this one; empty if absent."""
        value = self.body.get(name)
        if value is not None and not isinstance(value, dict):
            self.refuse(name, "an object")
        return Fields(value or {}, known, f"{self.within}{name}.")
