"""Ways in which bytes, JSON and text come to harm, drawn from a `random.Random`."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

ODD_NUMBERS = [0, -1, 1, 2, 3, 2**15, 2**31 - 1, 2**31, 2**32, 2**63, 10**9, 10**30, -(2**31), 0.5, 16.0, -0.0, 1e308]
ODD_VALUES = [
    *(None, True, False, float("nan"), float("inf"), "", "0", "16", "x", "\0", "\ud800", "\u202e", "a" * 5000, "../x"),
    *("/dev/zero", "<|im_end|>", [], {}, [[]], [None], [0] * 300, {"": None}, {"a": {"b": []}}, *ODD_NUMBERS),
]
_WORDS = [struct.pack(form, number) for form in ("<I", ">I") for number in (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1)]


def damaged_bytes(draw: random.Random, whole: bytes) -> bytes:
    """The bytes with up to three parts flipped, cut off, put in, repeated, zeroed or made a number of note."""
    for _ in range(draw.randint(1, 3)):
        first = draw.randrange(len(whole) + 1)
        some = draw.randbytes(draw.choice([1, 1, 2, 50, 1000]))
        last = first + len(some)
        word = draw.choice(_WORDS)
        flipped = bytes(byte ^ 1 << draw.randrange(8) for byte in whole[first : first + 1])
        whole = draw.choice(
            [
                whole[:first],
                whole[:first] + whole[last:],
                whole[:first] + some + whole[first:],
                whole[:first] + some + whole[last:],
                whole[:first] + flipped + whole[first + 1 :],
                whole[:first] + flipped + whole[first + 1 :],
                whole[:first] + bytes(len(some)) + whole[last:],
                whole[:first] + word + whole[first + len(word) :],
                whole[:first] + whole[first:last] + whole[first:],
            ]
        )
    return whole


def damaged_json(draw: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which up to two things are removed, renamed, exchanged or of a kind of their own."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 2)):
        if not (places := list(_places(value))):
            return draw.choice(ODD_VALUES)
        container, key = draw.choice(places)
        event = draw.choice(["odd", "odd", "odd", "number", "removed", "another", "twice", "wrapped"])
        if event == "odd":
            container[key] = copy.deepcopy(draw.choice(ODD_VALUES))
        elif event == "number":
            old = container[key]
            steps = [1, -1, 0.5] if type(old) in (int, float) else [0]
            container[key] = draw.choice([old + step for step in steps] if steps != [0] else ODD_NUMBERS)
        elif event == "removed":
            del container[key]
        elif event == "another":
            other, from_key = draw.choice(places)
            if from_key in other if isinstance(other, dict) else from_key < len(other):
                container[key] = copy.deepcopy(other[from_key])
        elif event == "twice":
            if isinstance(container, list):
                container.insert(key, copy.deepcopy(container[key]))
            else:
                container[key + draw.choice(["_", " ", "\0", "2"])] = copy.deepcopy(container[key])
        else:
            container[key] = draw.choice([[container[key]], {"value": container[key]}, str(container[key])])
    return value


def damaged_file(draw: random.Random, whole: bytes) -> bytes:
    """A JSON file whose bytes come to harm, or whose values do."""
    if draw.random() < 0.3:
        return damaged_bytes(draw, whole)
    return json.dumps(damaged_json(draw, json.loads(whole))).encode()


def damaged_text(draw: random.Random, text: str, parts: list[str]) -> str:
    """The text with up to four places removed, repeated, or given one of ``parts``."""
    for _ in range(draw.randint(1, 4)):
        first = draw.randrange(len(text) + 1)
        last = min(first + draw.choice([1, 1, 2, 5, 20]), len(text))
        text = draw.choice(
            [
                text[:first] + text[last:],
                text[:first] + text[first:last] * 2 + text[last:],
                text[:first] + draw.choice(parts) + text[first:],
                text[:first] + draw.choice(parts) + text[last:],
            ]
        )
    return text


def _places(value: Any) -> Any:
    """Where a JSON value holds others: containers, and keys in them."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if type(value) is list else ()
    for key, item in items:
        yield value, key
        yield from _places(item)
