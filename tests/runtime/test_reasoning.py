"""Reasoning apart from the answer, and its budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.grammar import Grammar, GrammarCompiler
from pascalvl.runtime.reasoning import (
    END_OF_BUDGET,
    ReasoningBudget,
    ReasoningMatcher,
    ReasoningParser,
    opens_thinking,
)
from pascalvl.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(nano_checkpoint):
    return Tokenizer(nano_checkpoint / "tokenizer.json")


def parsed(pieces, is_open):
    parser = ReasoningParser(is_open)
    parts = [*map(parser.push, pieces), parser.finish()]
    return "".join(reasoning for reasoning, _ in parts), "".join(content for _, content in parts)


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("Hm.\n</think>\n\nYes.", True, ("Hm.", "Yes.")),
        ("<think>\nHm.\n</think>\n\nYes.", True, ("Hm.", "Yes.")),
        ("\n<think>\nHm.\n\nSo.\n</think>\n\nYes.\n", False, ("Hm.\n\nSo.", "Yes.\n")),
        ("\n</think>\n\nYes.", True, ("", "Yes.")),
        ("Hm, </thin", True, ("Hm, </thin", "")),
        ("Hm.\n", True, ("Hm.\n", "")),
        ("a < b </b> <think> </think>c", True, ("a < b </b> <think> ", "c")),
        ("Yes. <think>No.</think>", False, ("", "Yes. <think>No.</think>")),
        ("  Yes.</think>", False, ("", "  Yes.</think>")),
        ("<thin", False, ("", "<thin")),
        ("<think>", False, ("", "")),
        (" ", False, ("", " ")),
        ("", True, ("", "")),
        ("x</think>y</think>z", True, ("x", "y</think>z")),
    ],
)
def test_reasoning_and_content(text, is_open, expected):
    assert parsed([text], is_open) == expected
    assert parsed(list(text), is_open) == expected


@given(st.data(), st.booleans())
def test_any_pieces(data, is_open):
    text = "".join(data.draw(st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "<", "/", "a", "th"]))))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(pieces, is_open) == parsed([text], is_open)


def test_text_is_let_out_at_once():
    parser = ReasoningParser(True)
    assert [parser.push(piece) for piece in ("Well", ", <", "b>\n", "so", "\n</thi", "nk>", "\n\nYes")] == [
        ("Well", ""),
        (", ", ""),
        ("<b>", ""),
        ("\nso", ""),
        ("", ""),
        ("", ""),
        ("", "Yes"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>", True),
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>system\n<think><|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\nSo", False),
        ("", False),
    ],
)
def test_prompts_that_open_thinking(tokenizer, text, expected):
    assert opens_thinking(tokenizer.encode(text), tokenizer) is expected
    assert not opens_thinking(np.array([], np.int64), tokenizer)


def answered(budget, tokens, most=200):
    """Tokens of an answer of a model that would choose some, one after the other, then words without end."""
    choices = iter(tokens)
    answer, forced = [], list(budget.forced())
    while len(answer) < most:
        token = forced.pop(0) if forced else next(choices, None)
        if token is None:
            return answer
        answer.append(token)
        forced += budget.forced(token)
    return answer


def test_budget(tokenizer):
    """A model as it is: what is beyond the budget is never chosen, what comes in time is left alone."""
    encode = lambda text: tokenizer.encode(text).tolist()  # noqa: E731
    ending = encode(END_OF_BUDGET)
    think, content = encode(" a" * 50), encode("Yes.")
    short = encode(" a</think>\n\nYes.")
    opened = encode("<think>")
    assert answered(ReasoningBudget(5, True, tokenizer), think) == think[:5] + ending + think[5:]
    assert answered(ReasoningBudget(5, True, tokenizer), short) == short
    assert answered(ReasoningBudget(5, False, tokenizer), content) == content
    assert answered(ReasoningBudget(0, False, tokenizer), content) == content
    assert answered(ReasoningBudget(2, False, tokenizer), opened + think) == opened + think[:2] + ending + think[2:]
    assert answered(ReasoningBudget(0, True, tokenizer), content) == encode("\n</think>\n\n") + content
    assert answered(ReasoningBudget(0, False, tokenizer), content + opened + think) == content + opened + think
    text = tokenizer.decode(answered(ReasoningBudget(3, True, tokenizer), think[:3] + content))
    reasoning, answer = parsed([text], True)
    assert reasoning.startswith(" a a a\n\nConsidering the limited time")
    assert answer == "Yes."


def test_budgets_that_cannot_be(tokenizer):
    for wrong in (-1, 1.5, True, "3", None):
        with pytest.raises(UserError, match="expected a budget of tokens for reasoning"):
            ReasoningBudget(wrong, True, tokenizer)


def test_a_tokenizer_without_tags(nano_checkpoint, tmp_path):
    text = (nano_checkpoint / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace("think>", "thunk>"), encoding="utf-8")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert not opens_thinking(tokenizer.encode("<think>"), tokenizer)
    with pytest.raises(UserError, match="the model does not think"):
        ReasoningBudget(5, False, tokenizer)


# With a grammar -------------------------------------------------------------------------------------------------------


def followed(matcher, tokens, tokenizer, most=200):
    """What an answer is whose free tokens are these, one after the other; forced ones come in between."""
    written, free = [], iter(tokens)
    while len(written) < most and not matcher.is_complete:
        token = matcher.forced[0] if matcher.forced else next(free, None)
        if token is None:
            break
        mask = matcher.mask()
        assert mask is None or mask[token // 32] >> (token % 32) & 1
        if matcher.forced:
            assert np.unpackbits(mask.view(np.uint8)).sum() == 1
        matcher.accept(token)
        written.append(token)
    return tokenizer.decode(written)


END = 1


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, 2048, [tokenizer.find_added("<|im_end|>")[0][2]])


def test_a_grammar_begins_behind_thinking(tokenizer, compiler):
    thinking = tokenizer.encode("Well.\n</think>").tolist()
    matcher = ReasoningMatcher(True, tokenizer, 2048, [END], None, compiler.matcher(Grammar.regex("yes|no")))
    assert not np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[END]
    assert followed(matcher, [*thinking, *tokenizer.encode("yes")], tokenizer) == "Well.\n</think>\n\nyes"
    assert matcher.is_complete


def test_a_budget_and_a_grammar(tokenizer, compiler):
    """The budget's end is forced, and then the grammar counts."""
    thinking = tokenizer.encode("Well, let me see.").tolist()
    for budget, own in ((3, thinking[:3]), (0, [])):
        matcher = ReasoningMatcher(True, tokenizer, 2048, [END], budget, compiler.matcher(Grammar.regex("yes|no")))
        answer = tokenizer.encode("no").tolist()
        ending = END_OF_BUDGET if budget else "\n</think>\n\n"
        assert followed(matcher, [*own, *answer], tokenizer) == tokenizer.decode(own) + ending + "no"
        assert matcher.is_complete


def test_a_budget_alone(tokenizer):
    """Afterwards anything may come; an answer that opens its thinking itself has the same budget."""
    own = tokenizer.encode("Well, let me see.").tolist()
    matcher = ReasoningMatcher(True, tokenizer, 2048, [END], 2, None)
    assert followed(matcher, [*own[:2], *own], tokenizer) == tokenizer.decode(
        own[:2]
    ) + END_OF_BUDGET + tokenizer.decode(own)
    assert matcher.mask() is None
    assert not matcher.is_complete
    opening = tokenizer.encode("<think>").tolist()
    matcher = ReasoningMatcher(False, tokenizer, 2048, [END], 2, None)
    expected = "<think>" + tokenizer.decode(own[:2]) + END_OF_BUDGET + tokenizer.decode(own)
    assert followed(matcher, [*opening, *own[:2], *own], tokenizer) == expected
