"""What an answer must be: JSON of a schema, or text of a regular expression or of a grammar."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pascalvl.plugins.errors import UserError, library_reason, panics, shown
from pascalvl.runtime.json_schema import SchemaCheck, loads
from pascalvl.runtime.sampling import one_token
from pascalvl.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_MOST_CHARACTERS = 256 << 10
_MOST_REGEX_CHARACTERS, _MOST_LARK_CHARACTERS = 8192, 16384
"""The latter without schemas."""
_MOST_KEPT = 16
"""Grammars that stay compiled."""
_SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as `json.dumps` and chat templates write it: models have seen it so, and there is no space without end."""
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "max_items_in_row": 500,
    "max_lexer_states": 50_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}
"""Of llguidance: a grammar at these limits takes some 300 ms and 100 MB."""
_LARK_DIRECTIVES = frozenset({"%declare", "%ignore", "%import", "%json"})
_LARK_TOKEN = re.compile(
    r'(?P<string>"(?:\\.|[^"\\\n])*")|(?P<comment>//[^\n]*|\#[^\n]*)|(?P<regex>/(?:\\.|[^/\\])+/)|(?P<special><[^<>\s]+>)'
    r"|(?P<directive>%\w+)|(?P<option>\btemperature\s*=)|(?P<refused>[&~@]|::)|\w+|.",
    re.DOTALL,
)
"""As llguidance's lexer has them, what is refused apart."""


class _Kind(enum.Enum):
    JSON_SCHEMA = "JSON schema"
    REGEX = "regular expression"
    LARK = "grammar"


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer must be; make one with the functions below, which raise `UserError` for what cannot be used.

    Two that say the same are equal. What needs a tokenizer to be known is raised when a request is made.
    """

    kind: _Kind
    text: str

    @classmethod
    def json_schema(cls, schema: object) -> Grammar:
        """JSON of a schema of draft 2020-12, or an older one, as `json.loads` gives it.

        Spaces are where `json.dumps` has them, properties in the schema's order. A keyword that would not be enforced
        is refused, and so is a schema that is too large.
        """
        return cls(_Kind.JSON_SCHEMA, schema_text(SchemaCheck().checked(schema)))

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, text: str) -> Grammar:
        """All of the answer matches a regular expression, in the syntax of Rust's crate ``regex``, without looking
        around."""
        return cls(_Kind.REGEX, _checked_text(text, "regular expression", _MOST_REGEX_CHARACTERS))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A context-free grammar in llguidance's dialect of Lark, with ``%json`` schemas in it.

        Refused are its operators ``&`` and ``~``, parameters, other grammars and ``%regex``, whose compilation is not
        bounded, and ``temperature``.
        """
        return cls(_Kind.LARK, _checked_lark(_checked_text(text, "grammar", _MOST_CHARACTERS)))

    @classmethod
    def own(cls, text: str) -> Grammar:
        """A grammar of llguidance's dialect that this program has made, of schemas by `schema_text`: all is taken."""
        return cls(_Kind.LARK, text)

    @property
    def _llguidance(self) -> str:
        if self.kind is _Kind.LARK:
            own: dict[str, Any] = {"lark_grammar": self.text}
        elif self.kind is _Kind.REGEX:
            from llguidance import LLMatcher

            return LLMatcher.grammar_from_regex(self.text)
        else:
            own = {"json_schema": json.loads(self.text)}
        return json.dumps({"grammars": [own]})


def _checked_text(text: object, what: str, most: int) -> str:
    if not isinstance(text, str):
        raise UserError(f"expected a {what} as a text, found {shown(text)}.")
    if len(text) > most:
        raise UserError(f"the {what} has {len(text)} characters: expected at most {most}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"expected a {what} in Unicode, found {shown(text)}: correct it.") from None
    return text


def schema_text(schema: Mapping[str, Any]) -> str:
    """A schema that `SchemaCheck` has let pass, for llguidance, with what that is told beside."""
    return json.dumps({**schema, "x-guidance": _SEPARATORS})


def _checked_lark(text: str) -> str:
    """A grammar whose schemas are told how JSON is written; raises `UserError` for what is refused in one, outside its
    strings, regular expressions and comments."""
    schemas, checked, at, own, regexes = SchemaCheck(), [], 0, 0, 0
    while found := _LARK_TOKEN.match(text, at):
        at = found.end()
        if found["refused"] or found["option"] or (found["directive"] or "%json") not in _LARK_DIRECTIVES:
            raise UserError(f"the grammar cannot be used: {shown(found[0])} in it is not supported: leave it out.")
        own += len(found[0])
        regexes += len(found["regex"] or "")
        checked.append(found[0])
        if found["directive"] == "%json":
            while at < len(text) and text[at].isspace():
                at += 1
            schema, at = loads(text, at)
            checked.append(f" {schema_text(schemas.checked(schema))}")
    for what, length, most in (
        ("grammar has", own, _MOST_LARK_CHARACTERS),
        ("grammar's regular expressions have", regexes, _MOST_REGEX_CHARACTERS),
    ):
        if length > most:
            raise UserError(f"the {what} {length} characters, schemas not counted: expected at most {most}.")
    return "".join(checked)


class Matcher:
    """Where one answer is in its grammar.

    Args:
        matcher: of llguidance, which has seen nothing yet.
        allowed: which tokens may ever be taken, uint32 ``[ceil(vocab_size / 32)]``.
        forget: is called if the grammar takes more than its limits, since all answers to it share these.

    Raises:
        UserError: no answer can be what is asked for, or that takes too long to find out.
    """

    def __init__(self, matcher: LLMatcher, allowed: np.ndarray, forget: Callable[[], object] = lambda: None) -> None:
        self._matcher, self._allowed, self._forget = matcher, allowed, forget
        self.is_complete = False
        """Whether nothing may follow."""
        self.forced: deque[int] = deque()
        """Tokens that have to follow, whatever the logits are, as the tokenizer writes the text that has to."""
        self._mask = np.zeros_like(allowed)
        self._look()

    def mask(self) -> np.ndarray:
        """Which tokens may come next, as `pascalvl.engines.choice.Choice` has it."""
        if not self.forced:
            return self._mask
        return one_token(self.forced[0], len(self._allowed))

    def accept(self, token: int) -> None:
        """Take the next token, one that the mask allows; raises `UserError` as the class does."""
        self._matcher.consume_token(token)
        if self.forced:
            self.forced.popleft()
        if not self.forced:
            self._look()

    def _look(self) -> None:
        """What may follow."""
        self._check()
        self.is_complete = self._matcher.is_stopped()
        if self.is_complete:
            return
        self.forced.extend(self._matcher.compute_ff_tokens())
        if not self.forced:
            found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(self._allowed)]
            self._mask = np.zeros_like(self._allowed)
            self._mask[: len(found)] = found
            self._mask &= self._allowed
        self._check()

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        self._forget()
        found = _reason(self._matcher)
        if "NoExtension" in found:
            raise UserError("no answer can be what is asked for: the grammar, or JSON schema, allows none.")
        raise UserError(f"the grammar takes too much to follow ({found}): give a simpler one.")


class GrammarCompiler:
    """Makes the matchers of a model's answers, and keeps grammars compiled; several threads may use it.

    Args:
        tokenizer: the model's.
        vocab_size: length of its logits, of which the tokenizer may have fewer.
        end_tokens: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: Collection[int]) -> None:
        self._of_model, self._vocab_size, self._end_tokens = tokenizer, vocab_size, end_tokens
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar) -> Matcher:
        """Of a new answer.

        Raises:
            UserError: the grammar cannot be compiled, no answer can be what it says, or llguidance is not installed.
        """
        with self._lock:
            compiled = self._kept.get(grammar) or self._compiled(grammar)
            self._kept[grammar] = compiled
            self._kept.move_to_end(grammar)
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return Matcher(compiled.deep_copy(), self._allowed, functools.partial(self._forget, grammar))

    def _forget(self, grammar: Grammar) -> None:
        with self._lock:
            self._kept.pop(grammar, None)

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        tokenizer, limits = self._tokenizer
        from llguidance import LLMatcher

        with panics():
            matcher = LLMatcher(tokenizer, grammar._llguidance, log_level=0, limits=limits)
        if matcher.is_error():
            raise UserError(f"the {grammar.kind.value} cannot be used ({_reason(matcher)}): correct or simplify it.")
        return matcher

    @functools.cached_property
    def _tokenizer(self) -> tuple[LLTokenizer, LLParserLimits]:
        try:
            import llguidance
        except ModuleNotFoundError:
            raise UserError(
                "answers of a given form need the package llguidance: pip install 'pascalvl[serve]'."
            ) from None
        for token in self._end_tokens:
            self._of_model.token(token)
        try:
            with panics():
                tokenizer = llguidance.LLTokenizer(self._of_model.to_json(), eos_token=sorted(self._end_tokens) or None)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"llguidance cannot use this model's tokenizer ({library_reason(error)}): ask without a given form."
            ) from error
        return tokenizer, llguidance.LLParserLimits(**_LIMITS)

    @functools.cached_property
    def _allowed(self) -> np.ndarray:
        """The tokenizer's tokens, without those that llguidance takes for an answer's end and the model does not."""
        tokenizer, _ = self._tokenizer
        allowed = np.zeros((self._vocab_size + 31) // 32 * 32, bool)
        allowed[: min(self._vocab_size, tokenizer.vocab_size)] = True
        allowed[[token for token in tokenizer.eos_tokens if token not in self._end_tokens]] = False
        return np.packbits(allowed, bitorder="little").view(np.uint32)


def _reason(matcher: LLMatcher) -> str:
    """Why there is no more, without what is for programmers."""
    found = matcher.get_error().replace("<non-verbose/>", "")
    return library_reason(ValueError(found.split(". Enable 'coerce_one_of'")[0].strip().rstrip("."))).strip("'\"")
