"""Answers are what a grammar says, and the same whether its tokens are run one by one or as a chunk."""

import asyncio
import contextlib
import functools
import json
import re
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from pascalvl.plugins.errors import UserError
from pascalvl.runtime import FinishReason, Grammar, Request, SamplingParams, VisionLanguageModel
from pascalvl.runtime.async_model import AsyncModel
from pascalvl.runtime.grammar import GrammarCompiler
from pascalvl.runtime.tokenizer import Tokenizer
from tests.engines.torch_reference import user

GREEDY = SamplingParams(temperature=0)
SEEDED = SamplingParams(temperature=1.2, top_p=0.9, frequency_penalty=0.5, seed=7)
QUESTION = [user("Name a shape and its colour.")]
NANO_TOKENIZER = Path(__file__).parents[1] / "nano" / "checkpoint" / "tokenizer.json"
SHAPE = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "number_of_corners": {"type": "integer", "minimum": 0, "maximum": 12},
        "name": {"type": "string", "maxLength": 10},
    },
    "required": ["colour", "number_of_corners", "name"],
    "additionalProperties": False,
}
LARK = """
start: shape (", " shape)* "."
shape: COLOUR " " ("square" | "circle")
COLOUR: "red" | "green" | "blue"
"""
GRAMMARS = {
    "schema": Grammar.json_schema(SHAPE),
    "object": Grammar.json_object(),
    "regex": Grammar.regex(r"(red|green) (square|circle) number [0-9]{3}"),
    "lark": Grammar.lark(LARK),
}


@pytest.fixture(scope="module")
def model(nano_engine_bundle):
    return VisionLanguageModel.open(nano_engine_bundle, context_length=512, sequences=2)


def answered(model, grammar, sampling=GREEDY, limit=60, **options):
    generation = model.generate(QUESTION, sampling, limit, grammar=grammar, **options)
    for _ in generation:
        pass
    return generation


def check(name, generation):
    """That an answer is what its grammar says, or its beginning."""
    if generation.finish_reason is FinishReason.LENGTH:
        return
    if name == "schema":
        jsonschema.validate(json.loads(generation.text), SHAPE)
    elif name == "object":
        assert isinstance(json.loads(generation.text), dict)
    elif name == "regex":
        assert re.fullmatch(r"(red|green) (square|circle) number [0-9]{3}", generation.text)
    else:
        shape = "(red|green|blue) (square|circle)"
        assert re.fullmatch(rf"{shape}(, {shape})*\.", generation.text)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("name", GRAMMARS)
def test_forced_tokens_are_those_that_come_one_by_one(name, sampling, model):
    """Logits are wanted of each token where log probabilities are."""
    at_once, one_by_one = (answered(model, GRAMMARS[name], sampling, logprobs=logprobs) for logprobs in (None, 0))
    assert at_once.token_ids == one_by_one.token_ids
    assert (at_once.text, at_once.finish_reason) == (one_by_one.text, one_by_one.finish_reason)
    assert len(one_by_one.logprobs) == len(one_by_one.token_ids)
    check(name, at_once)
    assert name == "object" or at_once.finish_reason is FinishReason.STOP


def test_forced_tokens_take_no_steps_of_their_own(model, monkeypatch):
    steps, step = [], model.scheduler.step
    monkeypatch.setattr(model.scheduler, "step", lambda: (steps.append(1), step()))
    generation = answered(model, GRAMMARS["schema"])
    assert len(steps) < len(generation.token_ids) / 2


def test_the_end_is_where_nothing_may_follow(model):
    """And not an end token after it."""
    generation = answered(model, Grammar.regex("abc"))
    assert (generation.text, generation.finish_reason) == ("abc", FinishReason.STOP)
    assert not set(generation.token_ids) & model.generation_config.eos_token_ids
    assert answered(model, Grammar.regex("")).text == ""


def test_limits_and_stop_strings_within_forced_tokens(model):
    whole = answered(model, Grammar.regex("one two three four five"))
    assert whole.text == "one two three four five"
    for limit in range(1, len(whole.token_ids)):
        cut = answered(model, Grammar.regex("one two three four five"), limit=limit)
        assert cut.token_ids == whole.token_ids[:limit]
        assert cut.finish_reason is FinishReason.LENGTH
        assert whole.text.startswith(cut.text)
    stopped = answered(model, Grammar.regex("one two three four five"), stop=" three")
    assert (stopped.text, stopped.finish_reason) == ("one two", FinishReason.STOP)


def test_many_at_once_are_answered_as_each_alone(model):
    wanted = [
        Request(QUESTION, sampling, 10 + 7 * number, grammar=GRAMMARS.get(name))
        for number, name in enumerate([*GRAMMARS, None])
        for sampling in (GREEDY, SEEDED)
    ]
    alone = [dict(model.generate_many([request]))[0].token_ids for request in wanted]
    found = dict(model.generate_many(wanted))
    assert [found[at].token_ids for at in range(len(wanted))] == alone


def test_many_coroutines_with_one_grammar(nano_engine_bundle, model):
    """Prompts and matchers are made in other threads than the one that follows them."""
    expected = answered(model, GRAMMARS["schema"], SEEDED).text

    async def ask():
        own = VisionLanguageModel.open(nano_engine_bundle, context_length=512, sequences=2)
        async with AsyncModel(own) as asked:
            request = Request(QUESTION, SEEDED, 60, grammar=GRAMMARS["schema"])
            return await asyncio.gather(*(text(asked, request) for _ in range(8)))

    async def text(asked, request):
        return "".join([piece async for piece in await asked.submit(request)])

    assert asyncio.run(ask()) == [expected] * 8


def test_a_grammar_that_takes_too_much_ends_its_own_answer_alone(model):
    heavy = Grammar.regex(r"(\p{L}{1,100}){1,100}!")
    found = dict(model.generate_many([Request(QUESTION, SEEDED, 60, grammar=g) for g in (heavy, GRAMMARS["regex"])]))
    assert isinstance(found[0].error, UserError)
    assert "give a simpler one" in str(found[0].error)
    check("regex", found[1])
    assert found[1].error is None


def test_without_end_tokens_only_a_whole_answer_or_a_limit_ends(endless_bundle):
    model = VisionLanguageModel.open(endless_bundle, context_length=256)
    assert answered(model, Grammar.regex("abc")).finish_reason is FinishReason.STOP
    endless = answered(model, Grammar.regex("(ab)+"), limit=20)
    assert endless.finish_reason is FinishReason.LENGTH
    assert re.fullmatch("(ab)+a?", endless.text)


def test_tokens_that_the_tokenizer_has_not_are_never_allowed():
    tokenizer = Tokenizer(NANO_TOKENIZER)
    matcher = GrammarCompiler(tokenizer, 3001, frozenset({2002})).matcher(Grammar.regex(r"(.|\n)*"))
    allowed = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))
    assert len(matcher.mask()) == 94
    assert 2002 in allowed
    assert not set(allowed) & {2000, 2001, *range(2003, 2014), *range(2016, 3008)}
    assert len(allowed) > 1900


def test_equal_grammars_are_compiled_once(monkeypatch):
    import llguidance

    compiled = []
    original = llguidance.LLMatcher
    monkeypatch.setattr(
        llguidance,
        "LLMatcher",
        type("", (), {"__new__": lambda _, *args, **kw: compiled.append(args) or original(*args, **kw)}),
    )
    compiler = GrammarCompiler(Tokenizer(NANO_TOKENIZER), 2048, frozenset({2002}))
    for number in (1, 2):
        for _ in range(3):
            compiler.matcher(Grammar.json_schema({"const": number}))
    assert len(compiled) == 2


def test_without_the_package(monkeypatch, nano_engine_bundle):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    model = VisionLanguageModel.open(nano_engine_bundle, context_length=256)
    with pytest.raises(UserError, match=r"need the package llguidance: pip install 'pascalvl\[serve\]'\.$"):
        model.generate(QUESTION, grammar=Grammar.json_object())


def test_nothing_of_torch_is_imported(nano_engine_bundle):
    import subprocess

    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers')))\n"
        "from pascalvl.runtime import Grammar, VisionLanguageModel\n"
        f"model = VisionLanguageModel.open({str(nano_engine_bundle)!r}, context_length=256)\n"
        "print(*model.generate([{'role': 'user', 'content': 'Hello!'}], grammar=Grammar.regex('a(b|c)d')), sep='')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() in ("abd", "acd"), result.stderr


# JSON schemas --------------------------------------------------------------------------------------------------------


def closed(required=(), **properties):
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


def schemas():
    """Of every keyword, 200."""
    yield from ({}, True, {"type": "null"}, {"type": "boolean"})
    texts = {"type": "string"}
    yield from ({**texts, "minLength": least, "maxLength": least + more} for least in (0, 1, 5) for more in (0, 1, 4))
    patterns = r"^a+$", r"b{2,3}c", r"^\d{4}$", r"^[A-Z]\w{0,3}$", r"^(yes|no)$", r"^\s?x", r"^[^abc]{2}$", r"^.{3}$"
    yield from ({**texts, "pattern": pattern, "maxLength": 8} for pattern in patterns)
    yield from ({**texts, "pattern": r"^\d+$", "minLength": least, "maxLength": least + 2} for least in (1, 2, 3))
    formats = "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"
    yield from ({**texts, "format": name} for name in formats)
    yield from (
        {"type": "integer", "minimum": low, "maximum": low + span} for low in (-5, 0, 98) for span in (0, 3, 99)
    )
    yield from ({"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 5} for low in (-3, 0, 95))
    yield from ({"type": "integer", "multipleOf": step, "minimum": 0, "maximum": 999} for step in (2, 7, 10, 25, 100))
    yield from ({"type": "number", "minimum": low, "maximum": low + 1} for low in (-1.5, 0, 0.25, 10))
    yield from ({"type": "number", "multipleOf": step, "minimum": 0, "maximum": 4} for step in (0.5, 0.25))
    yield from ({"type": "number", "exclusiveMinimum": 1, "maximum": 9}, {"minimum": 3, "maximum": 4})
    yield from (
        {"const": value} for value in (1, -2.5, "x", 'a "quoted" \\ text\n', None, True, [1, [2]], {"a": {"b": 1}})
    )
    yield from (
        {"enum": values} for values in ([1, 2], ["a", "ab", "abc"], [None, 0, "0"], [[1], {"a": 1}], ["é", "😀"])
    )
    yield from ({"type": [one, other], "maxLength": 4} for one, other in (("null", "string"), ("boolean", "null")))
    yield {"type": ["integer", "null"], "minimum": 1, "maximum": 5}
    small = {"type": "integer", "minimum": 0, "maximum": 9}
    word = {"type": "string", "maxLength": 5}
    for items in (small, word, {"type": "boolean"}, {"enum": ["x", 1]}):
        yield from (
            {"type": "array", "items": items, "minItems": n, "maxItems": n + more} for n in (0, 2) for more in (0, 2)
        )
    yield from ({"type": "array", "prefixItems": [small, word], **rest} for rest in ({"items": False}, {"maxItems": 2}))
    yield {"type": "array", "prefixItems": [word], "items": small, "minItems": 2, "maxItems": 3}
    draft_7 = {"$schema": "http://json-schema.org/draft-07/schema#"}
    yield {**draft_7, "type": "array", "items": [small, word], "additionalItems": False, "minItems": 2}
    yield {**draft_7, "type": "array", "items": [word], "additionalItems": small, "minItems": 1, "maxItems": 3}
    yield {**draft_7, "definitions": {"n": small}, "type": "array", "items": {"$ref": "#/definitions/n"}, "maxItems": 2}
    for required in ((), ("a",), ("b",), ("a", "b")):
        yield from (closed(required, a=first, b=small) for first in (small, word, {"type": "boolean"}, {"const": "x"}))
        yield {**closed(required, a=small, b=word), "additionalProperties": small}
        yield {"type": "object", "properties": {"a": small}, "required": [*required]}
    yield from (
        {"type": "object", "additionalProperties": each, "maxProperties": n}
        for each in (small, word)
        for n in (0, 1, 2)
    )
    yield from (
        {"type": "object", "additionalProperties": small, "minProperties": 1, "maxProperties": n} for n in (1, 3)
    )
    yield {**closed(("a",), a=small), "additionalProperties": small, "minProperties": 2, "maxProperties": 3}
    for name in ("^x_[a-z]{1,3}$", "^[0-9]{2}$"):
        named = {"type": "object", "patternProperties": {name: small}, "additionalProperties": False}
        yield from (named, {**named, "minProperties": 1, "maxProperties": 1}, {**named, "properties": {"a": word}})
    pairs = (small, word), ({"const": "p"}, {"const": "q"}), (closed(("a",), a=small), closed(("b",), b=word))
    for keyword in ("anyOf", "oneOf"):
        yield from ({keyword: [*pair]} for pair in pairs)
        yield from (closed(("v",), v={keyword: [*pair]}) for pair in pairs)
        yield {"type": "array", "items": {keyword: [*pairs[0]]}, "minItems": 1, "maxItems": 3}
    tagged = [closed(("kind", "v"), kind={"const": kind}, v=value) for kind, value in (("n", small), ("w", word))]
    yield from ({"oneOf": tagged}, {"oneOf": tagged, "discriminator": {"propertyName": "kind"}})
    yield {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}
    yield {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 3}, {"pattern": "^[a-c]+$"}]}
    yield {"allOf": [{"type": "object", "properties": {"a": small}, "required": ["a"]}, closed(a=small, b=word)]}
    yield {"type": "integer", "minimum": 1, "anyOf": [{"maximum": 3}, {"maximum": 5}]}
    defs = {"$defs": {"n": small, "w/~%": word, "tree": closed(("v",), v=small, next={"$ref": "#/$defs/tree"})}}
    yield {**defs, "$ref": "#/$defs/n"}
    yield {**defs, **closed(("a",), a={"$ref": "#/$defs/w~1~0%25"})}
    yield {**defs, "type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1, "maxItems": 2}
    yield {**defs, "$ref": "#/$defs/tree"}
    yield {**defs, "anyOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/tree"}]}
    yield {**defs, **closed(("a",), a={"$ref": "#/$defs/n", "maximum": 4, "description": "a few"})}
    yield {"type": "object", "properties": {"a": small, "b": {"$ref": "#/properties/a"}}, "required": ["b"]}
    yield closed(("list",), list={"type": "array", "items": {"anyOf": [small, {"$ref": "#"}]}, "maxItems": 2})
    for depth in range(1, 8):
        yield functools.reduce(lambda inner, _: closed(("in",), **{"in": inner}), range(depth), small)
        yield functools.reduce(
            lambda inner, _: {"type": "array", "items": inner, "minItems": 1, "maxItems": 1}, range(depth), word
        )
    for count in range(1, 13):
        yield closed([f"field_{i}" for i in range(count)], **{f"field_{i}": {"type": "boolean"} for i in range(count)})
        yield closed([f"f{i}" for i in range(0, count, 2)], **{f"f{i}": small for i in range(count)})
    yield {
        "$id": "https://example.com/s",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "t",
        **small,
    }
    yield {"description": "d", "default": 1, "examples": [1], "readOnly": True, "x-mine": 1, "$comment": "c", **small}
    yield {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png", "maxLength": 3}


def test_answers_are_valid_by_200_schemas(model):
    wanted = list(schemas())
    assert len(wanted) >= 200
    requests = (
        Request(QUESTION, SamplingParams(temperature=1.0, seed=number), 60, grammar=Grammar.json_schema(schema))
        for number, schema in enumerate(wanted)
    )
    whole = 0
    for number, generation in model.generate_many(requests):
        schema = wanted[number]
        assert generation.error is None, (schema, generation.error)
        if generation.finish_reason is FinishReason.LENGTH:
            continue
        whole += 1
        validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        answer = json.loads(generation.text)
        validator(schema, format_checker=validator.FORMAT_CHECKER).validate(answer)
        if "const" not in str(schema) and "enum" not in str(schema):
            assert json.dumps(answer, ensure_ascii=False) == generation.text or "." in generation.text
    assert whole > 180


NOT_ENFORCED = [
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"maxLength": 3}},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": {"const": 1}},
    {"type": "object", "propertyNames": {"maxLength": 3}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "object", "dependencies": {"a": ["b"]}},
    {"type": "object", "unevaluatedProperties": False},
    {"$dynamicRef": "#node"},
    {"minimun": 3},
    {"nullable": True, "type": "string"},
    {"x-guidance": {"lenient": True}, "not": {}},
    {"properties": {"a": {"x-guidance": {"lenient": True}, "not": {}}}},
    {"$schema": "http://json-schema.org/draft-07/schema#", "properties": {"a": {"unevaluatedProperties": False}}},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"type": "string", "format": "credit-card"},
    {"type": "string", "pattern": "(?=a)b"},
    {"type": "string", "pattern": r"(a)\1"},
    {"type": "string", "pattern": r"\bword\b"},
    {"type": "string", "pattern": "["},
    {"type": "object", "minProperties": 3, "additionalProperties": {"type": "null"}},
    {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1},
    {"type": "object", "patternProperties": {"^a": {}, "b$": {}}},
    {"$ref": "https://example.com/schema.json"},
    {"$ref": "file:///etc/passwd"},
    {"$ref": "other.json#/$defs/a"},
    {"$ref": "#anchor"},
    {"$ref": "#/$defs/nowhere"},
    {"$ref": "#/enum/0", "enum": [{"type": "string"}]},
    {"properties": {"a": {"$id": "https://example.com/a", "$ref": "#"}}},
    {"type": "array", "prefixItems": [{}], "additionalItems": False},
    {"type": "array", "items": {}, "additionalItems": False},
    {"const": 2**53 + 1},
    {"enum": [[1, {"a": 2**70}]]},
    {"type": "integer", "minimum": 10**30},
    {"type": "number", "maximum": float("nan")},
    {"const": {1, 2}},
    {"type": "integer", "multipleOf": 0},
    {"type": "text"},
    {"type": 3},
    {"type": "string", "minLength": -1},
    {"type": "string", "maxLength": 2.5},
    {"required": "a"},
    {"enum": 3},
    {"enum": []},
    {"properties": [1]},
    {"properties": {"a": 3}},
    {"anyOf": {}},
    {"type": "integer", "minimum": 3, "maximum": 2},
    False,
    [],
    "string",
    None,
]


@pytest.mark.parametrize("schema", NOT_ENFORCED, ids=str)
def test_what_would_not_be_enforced_is_refused(schema):
    compiler = GrammarCompiler(Tokenizer(NANO_TOKENIZER), 2048, frozenset({2002}))
    with pytest.raises(UserError, match=r"JSON schema.*\.$"):
        compiler.matcher(Grammar.json_schema(schema))


def deep(levels, wrap):
    return functools.reduce(lambda inner, _: wrap(inner), range(levels), {"type": "string"})


def circle():
    schema = {"type": "array"}
    schema["items"] = schema
    return schema


def multiples(count):
    return {"allOf": [{"type": "integer", "multipleOf": 1000 + 3 * i} for i in range(count)]}


def choices(factors, each):
    return {
        "allOf": [
            {"anyOf": [closed((f"p{i}_{j}",), **{f"p{i}_{j}": {"type": "integer"}}) for j in range(each)]}
            for i in range(factors)
        ]
    }


def doubling(keyword, levels, **own):
    defs = {
        f"d{i + 1}": {keyword: [{"$ref": f"#/$defs/d{i}"}, {"$ref": f"#/$defs/d{i}", **own}]} for i in range(levels)
    }
    return {"$defs": {"d0": {"type": "object"}, **defs}, "$ref": f"#/$defs/d{levels}"}


def named(count, **rest):
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}, **rest}


BOMBS = {
    "a loop of one": {"$ref": "#"},
    "a loop of two": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "a loop by allOf": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "a loop of Python's": circle(),
    "deep objects": deep(5000, lambda inner: {"properties": {"a": inner}}),
    "deep arrays": deep(300, lambda inner: {"type": "array", "items": inner}),
    "deep choices": deep(100, lambda inner: {"anyOf": [inner, {"type": "null"}]}),
    "doubling": doubling("anyOf", 20, minProperties=1),
    "a product": choices(8, 8),
    "a smaller product": choices(4, 8),
    "a huge enum": {"enum": [f"value number {i}" for i in range(100_000)]},
    "an enum of objects": {"enum": [{"a": i, "b": [i], "c": {"d": str(i)}} for i in range(5000)]},
    "long values": {"enum": ["x" * 100_000 + str(i) for i in range(10)]},
    "many properties": named(5000, additionalProperties=False),
    "many required names": {"type": "object", "required": [f"p{i}" for i in range(5000)]},
    "a multiple": {"type": "integer", "multipleOf": 1_000_003},
    "multiples": multiples(3),
    "patterns of names": {"patternProperties": {f"^a{i}(a+)+$": {} for i in range(300)}, "type": "object"},
    "patterns that all hold": {
        "allOf": [{"pattern": f"{'abcdef'[i % 6]}.{{{i}}}$"} for i in range(200)],
        "type": "string",
    },
    "some that all hold": {"allOf": [{"pattern": f"{'abcdef'[i % 6]}.{{{i}}}$"} for i in range(60)], "type": "string"},
    "a pattern without end": {"type": "string", "pattern": "^" + "a?" * 3000 + "a" * 3000 + "$"},
    "nested groups": Grammar.regex("(" * 4000 + "a" + ")" * 4000),
    "a long expression": ("regex", "a|" * 50_000),
    "lark: nested groups": Grammar.lark("start: " + "(" * 4000 + '"x"' + ")" * 4000),
    "lark: terminals that double": Grammar.lark(
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)) + '\nA40: "x"'
    ),
    "lark: no end": Grammar.lark("start: start"),
    "lark: a schema in it": ("lark", f"start: %json {json.dumps(multiples(3))}"),
    "lark: lenient": ("lark", 'start: %json {"x-guidance": {"lenient": true}, "not": {}}'),
    "lark: no schema in it": ("lark", "start: %json {"),
    "lark: both": ("lark", "start: A\nA: " + " & ".join(f"/(.|\\n)*a(.|\\n){{{i}}}/" for i in range(300))),
    "lark: neither": ("lark", "start: A\nA: ~/a/"),
    "lark: parameters": ("lark", 'start: p::0x0\np::_: "a" p::set_bit(1) %if bit_clear(1) | ""'),
    "lark: a grammar of its own": ("lark", "start: @other"),
    "lark: a file": Grammar.lark("%import .secret.WORD\nstart: WORD"),
    "lark: a sampling parameter": ("lark", "start: a\na[temperature=0.5]: /x+/"),
    "lark: too long": ("lark", "start: " + '"x" ' * 5000),
    "lark: no text": ("lark", 3),
    "lark: no Unicode": ("lark", 'start: "\ud800"'),
    "lark: JSON in its place": Grammar.lark(
        '{"grammars": [{"json_schema": {"x-guidance": {"lenient": true}, "not": {}}}]}'
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once(name):
    compiler = GrammarCompiler(Tokenizer(NANO_TOKENIZER), 2048, frozenset({2002}))
    compiler.matcher(Grammar.json_object())
    bomb = BOMBS[name]
    if isinstance(bomb, tuple):
        make = functools.partial(getattr(Grammar, bomb[0]), bomb[1])
    else:
        make = functools.partial(Grammar.json_schema, bomb) if isinstance(bomb, dict) else lambda: bomb
    start = time.process_time()
    with pytest.raises(UserError) as raised:
        compiler.matcher(make())
    assert time.process_time() - start < 2  # some 0.3 s where nothing else runs
    assert str(raised.value).endswith(".")


LARGE = {
    "much that is optional": Grammar.regex("a?" * 2700 + "a" * 2700),
    "rules that double": Grammar.lark(
        "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40)) + '\na40: "x"'
    ),
    "repetitions": Grammar.regex("((a{1000}){1000}){1000}"),
    "more of them": Grammar.regex("[xy]a{1000000000}"),
    "nested quantifiers": Grammar.regex("(x+x+)+y"),
    "what must be remembered": Grammar.regex("(.*a.{12}b|.*c.{13}d|.*e.{14}f)"),
    "a long text": Grammar.json_schema({"type": "string", "minLength": 10**6}),
    "long lists": Grammar.json_schema(deep(4, lambda inner: {"type": "array", "items": inner, "maxItems": 10**6})),
    "many optional properties": Grammar.json_schema(named(900)),
    "many names": Grammar.json_schema({"enum": [f"value number {i}" for i in range(9000)]}),
    "ambiguity": Grammar.lark('start: a\na: a a | "x" | '),
    "repeated rules": Grammar.lark('start: a{1000}\na: b{1000}\nb: "x"'),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_and_allowed_is_followed_in_time(name):
    """Or given up."""
    compiler = GrammarCompiler(Tokenizer(NANO_TOKENIZER), 2048, frozenset({2002}))
    rng = np.random.default_rng(0)
    start = time.process_time()
    with contextlib.suppress(UserError):
        matcher = compiler.matcher(LARGE[name])
        for _ in range(50):
            allowed = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))
            matcher.accept(int(rng.choice(allowed)))
            if matcher.is_complete:
                break
    assert time.process_time() - start < 3


def test_schemas_in_a_grammar_are_written_as_alone(model):
    lark = f'start: "<call>" call "</call>"\ncall: %json {json.dumps(SHAPE)}'
    generation = answered(model, Grammar.lark(lark), SEEDED)
    found = re.fullmatch("<call>(.*)</call>", generation.text)
    jsonschema.validate(json.loads(found[1]), SHAPE)
    assert found[1] == json.dumps(json.loads(found[1]))


def test_lark_strings_may_hold_what_is_refused_outside():
    compiler = GrammarCompiler(Tokenizer(NANO_TOKENIZER), 2048, frozenset({2002}))
    text = 'start: "a & b ~ @c :: %regex temperature=" /[&~@]:: \\/x/ %json {"const": "& ~"} // & ~\n'
    matcher = compiler.matcher(Grammar.lark(text))
    assert Tokenizer(NANO_TOKENIZER).decode(list(matcher.forced)).startswith("a & b ~ @c :: %regex temperature")
