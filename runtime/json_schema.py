"""Which JSON schemas an answer can be held to: all that they say is enforced, and none takes long to compile."""

from __future__ import annotations

import json
import math
import urllib.parse
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, cast

from pascalvl.plugins.errors import UserError, shown

_ONE = frozenset({"additionalItems", "additionalProperties", "items"})
"""Keywords with a schema ..."""
_SEVERAL = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
"""... with a list of them ..."""
_NAMED = frozenset({"$defs", "definitions", "patternProperties", "properties"})
"""... and with some by name."""
_NUMBERS = frozenset({"exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"})
_COUNTS = frozenset({"maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties"})
_OTHERS = frozenset({"$ref", "const", "enum", "format", "pattern", "required", "type"})
_KEYWORDS = _ONE | _SEVERAL | _NAMED | _NUMBERS | _COUNTS | _OTHERS
_NOTES = frozenset(
    {"$comment", "contentEncoding", "contentMediaType", "default", "deprecated", "description", "discriminator"}
    | {"example", "examples", "externalDocs", "readOnly", "title", "writeOnly", "xml"}
)
"""Keywords that ask for nothing; names that begin with ``x-`` do neither."""
_OF_THE_ROOT = frozenset({"$id", "$schema", "id"})

_MOST_BYTES = 256 << 10
_MOST_DEPTH = 64
_MOST_VALUES = 10_000
_MOST_NAMES = 1_000
_MOST_PATTERNS, _MOST_PATTERN_CHARACTERS = 100, 8192
_MOST_MULTIPLE = 10_000
_MOST_WHOLE = 1 << 53
"""Up to here all whole numbers are doubles."""


class SchemaCheck:
    """Refuses what would not be enforced, and what would take long to compile; of several schemas in one grammar, the
    sizes together count."""

    def __init__(self) -> None:
        self._bytes = self._values = self._patterns = self._pattern_characters = 0
        self._multiple = 1

    def checked(self, schema: object) -> dict[str, Any]:
        """A schema without what is for its readers alone.

        Raises:
            UserError: it is none, has a keyword that is unknown or not supported, refers to what is not in it, or is
                too large.
        """
        if schema is True:
            return {}
        if not isinstance(schema, Mapping):
            raise UserError(f"expected a JSON schema as an object, found {shown(schema)}.")
        self._count(schema)
        found, references = {}, []
        waiting: list[tuple[tuple[str, ...], object]] = [((), schema)]
        while waiting:
            path, node = waiting.pop()
            found[path] = node
            if isinstance(node, Mapping):
                self._check(path, node)
                references += [(path, node["$ref"])] if "$ref" in node else []
                waiting += ((path + below, each) for below, each in _below(node))
        for path, reference in references:
            if _pointer(reference) not in found:
                raise _refused(
                    path, f"$ref is {shown(reference)}", "refer to a schema in the same one, such as #/$defs/NAME"
                )
        return {keyword: value for keyword, value in schema.items() if keyword not in _OF_THE_ROOT}

    def _count(self, schema: Mapping[str, Any]) -> None:
        """Raise `UserError` for what is too large, or is no JSON."""
        waiting: list[tuple[object, int]] = [(schema, 1)]
        while waiting:
            value, depth = waiting.pop()
            if depth > _MOST_DEPTH:
                raise UserError(f"the JSON schema is nested too deeply: expected at most {_MOST_DEPTH} levels.")
            if isinstance(value, Mapping):
                self._values += len(value)
                if len(value) > _MOST_NAMES:
                    raise UserError(
                        f"the JSON schema has {len(value)} names in one object: expected at most {_MOST_NAMES}."
                    )
                waiting += ((each, depth + 1) for each in value.values())
            elif isinstance(value, list | tuple):
                self._values += 1
                waiting += ((each, depth + 1) for each in value if not isinstance(each, str | float | int))
            if self._values > _MOST_VALUES:
                raise UserError(f"the JSON schema has more than {_MOST_VALUES} parts: give a smaller one.")
        try:
            self._bytes += len(json.dumps(schema, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"the JSON schema is no JSON ({error}): correct it.") from None
        if self._bytes > _MOST_BYTES:
            raise UserError(f"the JSON schema has {self._bytes} bytes: expected at most {_MOST_BYTES}.")

    def _check(self, path: tuple[str, ...], node: Mapping[str, Any]) -> None:
        """Raise `UserError` for what a schema says itself."""
        for keyword in node:
            is_note = keyword in _NOTES or str(keyword).startswith("x-") or (not path and keyword in _OF_THE_ROOT)
            if keyword not in _KEYWORDS and not is_note:
                raise _refused(path, f"the keyword {shown(keyword)} is unknown or not supported", "leave it out")
        for keyword in _NUMBERS & node.keys():
            _check_exact(path, node[keyword])
        for keyword in {"const", "enum"} & node.keys():
            _check_exact(path, node[keyword])
        for keyword in _COUNTS & node.keys():
            if type(node[keyword]) is not int or not 0 <= node[keyword] <= _MOST_WHOLE:
                raise _refused(path, f"{keyword} is {shown(node[keyword])}", "expected a whole number from 0")
        required = node.get("required", ())
        if len(required) > _MOST_NAMES if isinstance(required, list | tuple) else True:
            raise _refused(path, "required is of no use", f"expected a list of up to {_MOST_NAMES} names")
        if node.get("minProperties", 0) > len(required) + 1:
            raise _refused(
                path,
                "minProperties asks for more than one name that is not in required",
                "none can be kept from coming twice, so name all but one",
            )
        if "prefixItems" in node and ("additionalItems" in node or isinstance(node.get("items"), list | tuple)):
            raise _refused(path, "prefixItems stands beside items of older drafts", "use one of them")
        if "additionalItems" in node and not isinstance(node.get("items"), list | tuple):
            raise _refused(path, "additionalItems has no effect without a list of items", "leave it out")
        self._count_patterns(path, node)
        if "multipleOf" in node:
            # Their least common multiple is what a deterministic automaton may have to count to.
            digits = int("".join(map(str, Decimal(str(node["multipleOf"])).normalize().as_tuple().digits)))
            self._multiple = math.lcm(self._multiple, max(1, digits))
            if self._multiple > _MOST_MULTIPLE:
                raise _refused(
                    path,
                    "the least common multiple of all multipleOf is too large",
                    f"expected at most {_MOST_MULTIPLE}, zeros at its end not counted",
                )

    def _count_patterns(self, path: tuple[str, ...], node: Mapping[str, Any]) -> None:
        named = node.get("patternProperties")
        patterns = [*([node["pattern"]] if "pattern" in node else []), *(named if isinstance(named, Mapping) else ())]
        self._patterns += len(patterns)
        self._pattern_characters += sum(len(str(pattern)) for pattern in patterns)
        if self._patterns > _MOST_PATTERNS or self._pattern_characters > _MOST_PATTERN_CHARACTERS:
            raise _refused(
                path,
                "there are too many patterns, or too long ones",
                f"expected at most {_MOST_PATTERNS} with {_MOST_PATTERN_CHARACTERS} characters together",
            )


def _below(node: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], object]]:
    """The schemas in a schema, and where they are."""
    for keyword, value in node.items():
        if keyword in _NAMED and isinstance(value, Mapping):
            yield from (((keyword, str(name)), each) for name, each in value.items())
        elif keyword in _SEVERAL and isinstance(value, list | tuple):
            yield from (((keyword, str(number)), each) for number, each in enumerate(value))
        elif keyword in _ONE:
            yield (keyword,), value


def _pointer(reference: object) -> tuple[str, ...] | None:
    """Where a reference points to in its own schema; None: somewhere else."""
    if reference == "#":
        return ()
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    parts = urllib.parse.unquote(reference[2:]).split("/")
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in parts)


def _check_exact(path: tuple[str, ...], value: object) -> None:
    """Raise `UserError` for whole numbers, anywhere in a value, that are taken as doubles and then are others."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
        elif isinstance(each, int) and abs(each) > _MOST_WHOLE:
            raise _refused(path, f"{shown(each)} is out of range", f"expected whole numbers up to {_MOST_WHOLE}")


def _refused(path: tuple[str, ...], what: str, remedy: str) -> UserError:
    place = "/".join(("#", *(part.replace("~", "~0").replace("/", "~1") for part in path)))
    return UserError(f"the JSON schema cannot be used: at {shown(place)}, {what}: {remedy}.")


def loads(text: str, start: int) -> tuple[object, int]:
    """JSON that begins at a character of a text, and the character after it; raises `UserError` if there is none."""
    try:
        return cast("tuple[object, int]", json.JSONDecoder().raw_decode(text, start))
    except (ValueError, RecursionError) as error:
        raise UserError(f"the JSON schema is no JSON ({error}): correct it.") from None
