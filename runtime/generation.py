"""What a model's authors set for generation, when an answer ends, and the answer as it streams."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pascalvl.plugins.bundle import read_json
from pascalvl.plugins.errors import UserError, shown
from pascalvl.runtime.sampling import SamplingParams

_DEFAULT_TEMPERATURE, _DEFAULT_TOP_K = 1.0, 50
"""What Hugging Face's `generate` takes where a config that samples does not say."""
_REMEDY = "download the model again and export it"


class FinishReason(enum.Enum):
    """Why an answer ended."""

    STOP = "stop"
    """An EOS token or a stop string."""
    LENGTH = "length"
    """As many tokens as were asked for, or as the context holds."""


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """`generation_config.json`: the tokens that end an answer, and how tokens are chosen unless the user says."""

    eos_token_ids: frozenset[int]
    sampling: SamplingParams
    max_new_tokens: int | None = None
    """Tokens in an answer at most; None: as many as the context holds."""

    @classmethod
    def from_file(cls, path: Path) -> GenerationConfig:
        """Read the file; raises `UserError` if that cannot be done, or for a value that is of no use."""
        data = read_json(path, _REMEDY)
        names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
        given = {name: data[name] for name in names if data.get(name) is not None}
        if data.get("do_sample"):
            given = {"temperature": _DEFAULT_TEMPERATURE, "top_k": _DEFAULT_TOP_K, **given}
        else:
            given = {name: given[name] for name in names[:1] if name in given}
        try:
            sampling = SamplingParams(**given)
        except UserError as error:
            raise UserError(f"{path} is of no use ({str(error).rstrip('.')}): {_REMEDY}.") from error
        eos = data.get("eos_token_id")
        eos = eos if isinstance(eos, list) else [eos]
        limit = data.get("max_new_tokens")
        for name, expected, valid in (
            ("eos_token_id", "token ids", all(type(token) is int and token >= 0 for token in eos)),
            ("max_new_tokens", "a whole number from 1", limit is None or (type(limit) is int and limit >= 1)),
        ):
            if not valid:
                raise UserError(
                    f"{path} is of no use ({name}: expected {expected}, found {data.get(name)!r}): {_REMEDY}."
                )
        return cls(frozenset(eos), sampling, limit)


class StopMatcher:
    """Finds where a stop string ends streamed text, however it is cut into pieces, and lets none of it through.

    As if the text came character by character: the first after which any stop string is complete ends it, and the
    longest that is complete there is cut off. Of ``baaa``, the stop strings ``baaa`` and ``aa`` leave ``b``.
    """

    def __init__(self, stop: str | Sequence[str]) -> None:
        stop = [stop] if isinstance(stop, str) else stop
        if not all(isinstance(text, str) for text in stop):
            raise UserError(f"expected stop strings as a text or a list of texts, found {shown(stop)}.")
        if not all(stop):
            raise UserError("a stop string is empty: expected at least one character in each.")
        self._stop = stop
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; nothing is let through from then on."""

    def push(self, piece: str) -> str:
        """Take the next piece; returns the text that no stop string can begin in any more."""
        if self.stopped:
            return ""
        self._held += piece
        found = [(index + len(stop), index) for stop in self._stop if (index := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found)[1])
        return self._take(min((self._possible_start(stop) for stop in self._stop), default=len(self._held)))

    def flush(self) -> str:
        """The text is complete; returns what was held back."""
        return self._take(0 if self.stopped else len(self._held))

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], "" if self.stopped else self._held[length:]
        return text

    def _possible_start(self, stop: str) -> int:
        """Where the end of the held text may be the beginning of ``stop``; its length if nowhere."""
        end = len(self._held)
        return next((i for i in range(max(0, end - len(stop) + 1), end) if stop.startswith(self._held[i:])), end)


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities where a token was chosen, before penalties, filters and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """Of the likeliest tokens, the likeliest first."""

    @classmethod
    def of(cls, logits: np.ndarray, token_id: int, top: int) -> TokenLogprobs:
        """Of logits ``[vocab_size]``."""
        logprobs = logits.astype(np.float64) - logits.max()
        logprobs -= np.log(np.exp(logprobs).sum())
        top = min(top, len(logprobs))
        least = np.partition(logprobs, -top)[-top] if top else np.inf
        among = np.flatnonzero(logprobs >= least)
        likeliest = among[np.argsort(-logprobs[among], kind="stable")][:top].tolist()
        return cls(token_id, float(logprobs[token_id]), tuple((token, float(logprobs[token])) for token in likeliest))


class Generation:
    """An answer being written: iterate over it for its text, piece by piece; the fields fill while that goes on.

    An answer that is not iterated to its end is left unfinished when it is closed or forgotten; until then it is
    computed beside others. Text holds whole characters; one that the last token leaves incomplete is dropped.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.load_seconds = 0.0
        """That it took to load the model again, which was unloaded."""
        self.reused_tokens = 0
        """Tokens of the prompt whose keys and values were still in the cache; known when the first piece comes."""
        self.token_ids: list[int] = []
        """The tokens chosen, with the one that ended the answer."""
        self.logprobs: list[TokenLogprobs] = []
        """Of each of them, where they were asked for."""
        self.finish_reason: FinishReason | None = None
        """None while the answer is not finished."""
        self.error: Exception | None = None
        """Why there is no answer, or no more of it, of one among many."""
        self.vision_seconds = 0.0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.pieces: Iterator[str] = iter(())
        """Set by the model: does the work."""
        self._written: list[str] = []

    @classmethod
    def failed(cls, error: Exception) -> Generation:
        """One that never began."""
        generation = cls(0)
        generation.error = error
        return generation

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding: of the tokens after the first, which comes with the prompt; None: there are none."""
        count = len(self.token_ids) - 1
        return count / self.decode_seconds if count > 0 else None

    def add(self, piece: str) -> str:
        """Note a piece of the text, and return it."""
        self._written.append(piece)
        return piece

    @property
    def text(self) -> str:
        """The answer so far, without the stop string that ended it."""
        return "".join(self._written)
