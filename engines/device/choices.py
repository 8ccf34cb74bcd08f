"""How tokens are chosen, as the kernels read it on a device."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar, cast

import numpy as np

from pascalvl.engines.choice import Choice, LogitState
from pascalvl.plugins.bindings import Binding
from pascalvl.plugins.kernels.library import CHOICE

CHOICES = Binding("choices", CHOICE, ("batch",))
"""Of each sequence the record that `ChoiceRecords` fills in."""


_GREEDY = np.zeros((), CHOICE)
_GIVEN = operator.attrgetter(*itertools.takewhile(lambda name: name != "unused", CHOICE.names or ()))
"""A choice's fields that a record begins with."""


class Copy(Protocol):
    """An array on the device."""

    pointer: int


_Copy = TypeVar("_Copy", bound=Copy)


class ChoiceRecords(Generic[_Copy]):
    """Fills in records, and keeps copies on the device of what they point to.

    Args:
        copy: makes a copy of an array on the device.
        put: writes an array into a copy, from a byte on.
    """

    def __init__(self, copy: Callable[[np.ndarray], _Copy], put: Callable[[_Copy, int, np.ndarray], None]) -> None:
        self._copy, self._put = copy, put
        self._states: weakref.WeakKeyDictionary[LogitState, dict[str, _Copy]] = weakref.WeakKeyDictionary()
        self._masks: dict[int, _Copy] = {}
        self._on_the_way: list[np.ndarray] = []
        """What the device may still be reading."""

    def fill(self, records: np.ndarray, choices: Sequence[Choice]) -> None:
        """Write how each of some sequences' tokens is chosen, `CHOICE` ``[batch]``; of more of them the likeliest is.

        No record may point to what is no more.

        What was given before must have run.
        """
        self._on_the_way.clear()
        records[:] = _GREEDY
        for number, choice in enumerate(choices):
            if choice.is_greedy:
                continue
            state = self._state(choice.state)
            counts, bias = (state[name].pointer if name in state else 0 for name in ("counts", "bias"))
            mask = 0 if choice.mask is None else self._mask(number, choice.mask)
            records[number] = (*_GIVEN(choice), 0, choice.random, counts, bias, mask)

    def _state(self, state: LogitState | None) -> dict[str, _Copy]:
        """Copies of a sequence's counts and bias."""
        if state is None:
            return {}
        if state not in self._states:
            arrays = {"counts": state.counts, "bias": state.bias}
            self._states[state] = {name: self._copy(array) for name, array in arrays.items() if array is not None}
        else:
            counts = cast(np.ndarray, state.counts)  # where there are none, none changes
            for token in state.changed:
                self._write(self._states[state]["counts"], 4 * token, counts[token : token + 1].copy())
        state.changed.clear()
        return self._states[state]

    def _mask(self, number: int, mask: np.ndarray) -> int:
        """Address of a copy of a mask: its row's."""
        if number in self._masks:
            self._write(self._masks[number], 0, mask.copy())
        else:
            self._masks[number] = self._copy(mask)
        return self._masks[number].pointer

    def _write(self, copy: _Copy, start: int, array: np.ndarray) -> None:
        self._on_the_way.append(array)
        self._put(copy, start, array)
