"""Chat templates render as in Hugging Face, and do nothing else."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.chat_template import ChatTemplate
from pascalvl.runtime.template_worker import MOST_SECONDS


def text(content):
    return {"type": "text", "text": content}


PICTURE = {"type": "image", "image": Image.new("RGB", (32, 32))}
VIDEO = {"type": "video", "video": Path("clip.gif")}
HI = [{"role": "user", "content": "hi"}]
CONVERSATIONS = {
    "text": HI,
    "system": [{"role": "system", "content": "Answer <briefly> & 'well'."}, *HI],
    "parts": [{"role": "user", "content": [text("naïve\n"), text(" 你好")]}],
    "picture": [{"role": "user", "content": [PICTURE, text("What is it?")]}],
    "pictures": [{"role": "user", "content": [PICTURE, text("and"), PICTURE, text("differ?")]}],
    "video": [{"role": "user", "content": [VIDEO, text("What moves?"), PICTURE]}],
    "multi-turn": [
        {"role": "user", "content": [PICTURE, text("Where?")]},
        {"role": "assistant", "content": "Row 1."},
        {"role": "user", "content": [text("And"), VIDEO]},
        {"role": "assistant", "content": [text("Row 2.")]},
        {"role": "user", "content": "Sure?"},
    ],
}
FEATURES = {
    "line ends and indentation of blocks go": "a\n  {% if messages %}\n  b\n  {% endif %}\nc\n",
    "break and continue": "{% for c in 'abcd' %}{% if c == 'b' %}{% continue %}{% endif %}{% if c == 'd' %}{% break %}"
    "{% endif %}{{ c }}{% endfor %}",
    "tojson": "{{ messages | tojson }} {{ {'b': 1, 'a': '<é&>'} | tojson(indent=2, sort_keys=true) }}",
    "tojson with separators": "{{ [1, {'a': 2}] | tojson(separators=(',', ':'), ensure_ascii=true) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "date": "{{ strftime_now('%Y') }}",
    "absent arguments are none": "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}",
    "undefined names are empty": "[{{ nothing }}]{% if nothing %}x{% endif %}{{ nothing is defined }}",
    "generation": "a{% generation %}{% set b = 'b' %}{{ b }}{% endgeneration %}{{ b }}",
    "message fields": "{{ messages[0].note }} {{ messages[0]['role'] }} {{ messages[-1].content[::-1] }}",
}


@pytest.fixture
def template(tmp_path):
    def make(source):
        (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
        return ChatTemplate(tmp_path / "chat_template.jinja")

    return make


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_equal_the_reference(nano_checkpoint, name):
    processor = AutoProcessor.from_pretrained(nano_checkpoint)
    expected = processor.apply_chat_template(CONVERSATIONS[name], tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(nano_checkpoint / "chat_template.jinja").render(CONVERSATIONS[name]) == expected


@pytest.mark.parametrize("name", FEATURES)
def test_features_equal_the_reference(nano_checkpoint, template, name):
    tokenizer = AutoTokenizer.from_pretrained(nano_checkpoint)
    messages = [{"role": "user", "content": "hi <é>", "note": {"n": [1, None, 2.5, True]}}]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=FEATURES[name], tokenize=False, add_generation_prompt=True
    )
    assert template(FEATURES[name]).render(messages) == expected


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages[0].content[0].image.save(target) }}",
        "{{ messages[0].content[1].video.with_name('written').write_text('x') }}",
    ],
)
def test_a_template_cannot_write_files(template, tmp_path, attack):
    target = tmp_path / "written"
    content = [PICTURE, {"type": "video", "video": tmp_path / "clip.gif"}]
    with pytest.raises(UserError, match="refuses the messages"):
        template(attack.replace("target", f"'{target}', 'PNG'")).render([{"role": "user", "content": content}])
    assert not target.exists()


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ("{% for %}", "cannot be used"),
        ("{{ messages | no_such_filter }}", "cannot be used .*no_such_filter"),
        ("{% no_such_tag %}", "cannot be used .*no_such_tag"),
        ("{% break %}", r"cannot be used \('break' outside loop"),
        ("{% if messages %}{% continue %}{% endif %}", r"cannot be used \('continue' not properly in loop"),
        ("{{ 10 ** 5000 }}", r"cannot be used \(Exceeds the limit \(4300 digits\)"),
        ("{{ " + "9" * 5000 + " }}", r"cannot be used \(Exceeds the limit \(4300 digits\)"),
        ("{% for a in 'x' %}" * 25 + "{% endfor %}" * 25, r"cannot be used \(too many statically nested blocks"),
        ("{{ " + "(" * 50_000 + ")" * 50_000 + " }}", r"cannot be used \(maximum recursion depth exceeded"),
        ("{{ " + "not " * 50_000 + "x }}", r"cannot be used \(maximum recursion depth exceeded"),
        ("x" * (1 << 20) + "y", r"cannot be used \(it has more than 1048576 bytes\)"),
    ],
)
def test_templates_that_cannot_be_used(template, source, phrase):
    with pytest.raises(UserError, match=phrase) as error:
        template(source)
    assert re.fullmatch(r"[^\n]+: download the model again and export it\.", str(error.value))


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ("{{ raise_exception('only one system message') }}", r"refuses the messages: only one system message\."),
        ("{{ no_such_function() }}", "'no_such_function' is undefined"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ messages.__class__.__mro__ }}", "refuses the messages: access to attribute '__class__'"),
        ("{{ messages[0].content + 1 }}", "refuses the messages: can only concatenate"),
        ("{{ 1 / 0 }}", "refuses the messages: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the messages: maximum recursion"),
        ("{{ (10 * messages | length) ** 5000 }}", r"refuses the messages: Exceeds the limit \(4300 digits\)"),
        ("{{ raise_exception('x' * 10 ** 7) }}", r"refuses the messages: x{300}\.$"),
        ("{{ raise_exception('One\\n two.') }}", r"refuses the messages: One two\.$"),
        ("{% include 'other' %}", "refuses the messages: no loader"),
    ],
)
def test_templates_that_refuse_the_messages(template, source, phrase):
    with pytest.raises(UserError, match=phrase):
        template(source).render(HI)


# Bounds ---------------------------------------------------------------------------------------------------------------

ENDLESS = {
    "a constant": ("{{ 9 ** (9 ** 9) }}", "cannot be used"),
    "a power": ("{% set n = 9 %}{{ n ** (n ** n) }}", "refuses the messages"),
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "refuses the messages"),
    "calls": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "refuses the messages",
    ),
    "lipsum": ("{{ lipsum(n=10 ** 7) }}", "refuses the messages"),
}
GROWING = "{% set ns = namespace(a='x') %}{% for i in range(60) %}{% set ns.a = CHANGED %}{% endfor %}{{ ns.a }}"
LARGE = {
    "a constant": "{{ 'x' * 10 ** 10 }}",
    "a text": "{{ messages[0].content * 10 ** 10 }}",
    "a list": "{{ messages * 10 ** 10 }}",
    "doubled": GROWING.replace("CHANGED", "ns.a ~ ns.a"),
    "joined": GROWING.replace("CHANGED", "[ns.a, ns.a] | join"),
    "method": "{{ 'x'.ljust(10 ** 10) }}",
    "filter": "{{ 'x' | center(10 ** 10) }}",
    "batch": "{{ [1] | batch(10 ** 10, 0) | list }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "bytes": "{{ (5).to_bytes(10 ** 10, 'big') }}",
}


def refused_soon(phrase, refusing):
    """Also where the machine has other things to do."""
    start = time.monotonic()
    with pytest.raises(UserError, match=phrase):
        refusing()
    assert time.monotonic() - start < 5 * MOST_SECONDS


def check_works(template):
    assert template("{{ messages[0].content }}").render(HI) == "hi"


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_that_do_not_end(template, name):
    source, what = ENDLESS[name]
    refused_soon(rf"{what}.*it takes more than {MOST_SECONDS} seconds", lambda: template(source).render(HI))
    check_works(template)


@pytest.mark.parametrize("name", LARGE)
def test_templates_that_take_much_memory(template, name):
    refused_soon("refuses the messages: it needs more than 1 GB of memory", lambda: template(LARGE[name]).render(HI))
    check_works(template)


def test_the_longest_text(template):
    """Characters count, not the bytes in which they are sent."""
    made = template("{{ '🙂' * 10 ** 7 }}").render(HI)
    assert made == "🙂" * 10**7
    refused_soon(
        "a prompt of 10000001 characters, more than 10000000", lambda: template("{{ '🙂' * (10 ** 7 + 1) }}").render(HI)
    )
    long = [{"role": "user", "content": "x" * 9_000_000}]
    assert template("{{ messages[0].content }}").render(long) == long[0]["content"]
    longer = [{"role": "user", "content": "x" * (1 << 26)}]
    refused_soon("refuses the messages: they have more than 64 MB of text", lambda: template("").render(longer))


def test_powers_that_are_no_bomb(template):
    """In Jinja the first operator binds first: this is 9 to the 81st."""
    assert template("{{ 9 ** 9 ** 9 }}").render(HI) == str(9**81)


def test_a_usual_template_costs_nothing(nano_checkpoint):
    template = ChatTemplate(nano_checkpoint / "chat_template.jinja")
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        template.render(CONVERSATIONS["multi-turn"])
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01


def test_messages_that_are_no_json(template):
    cyclic = {"role": "user", "content": "hi"}
    cyclic["again"] = cyclic
    for message in (cyclic, HI[0] | {"number": 10**5000}):
        with pytest.raises(UserError, match=r"refuses the messages: (maximum recursion|Exceeds the limit)"):
            template("hi").render([message])
    odd = [HI[0] | {"a": float("inf"), "b": "\ud800\n", 3: (1, True, None)}]
    made = template("{{ messages[0].a }} {{ messages[0].b }} {{ messages[0]['3'] | join(' ') }}").render(odd)
    assert made == "inf \ud800\n 1 True None"


def test_an_interrupt_leaves_no_answer_behind(template):
    """The next text is of the next template, not of the one that was given up."""

    def interrupt(*_):
        raise KeyboardInterrupt

    endless = template(ENDLESS["loops"][0])
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            endless.render(HI)
    finally:
        signal.signal(signal.SIGALRM, previous)
    check_works(template)


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_process_is_left(nano_checkpoint, end):
    """However the one that renders ends."""
    script = f"""
import os, signal, subprocess, sys
from pathlib import Path
from pascalvl.runtime.chat_template import ChatTemplate
ChatTemplate(Path(sys.argv[1])).render([{{"role": "user", "content": "hi"}}])
print(Path(f"/proc/self/task/{{os.getpid()}}/children").read_text(), flush=True)
{end}
"""
    command = [sys.executable, "-c", script, nano_checkpoint / "chat_template.jinja"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    (child,) = result.stdout.split()
    assert result.stderr == ""
    deadline = time.monotonic() + 10
    while Path("/proc", child).exists() and "\nState:\tZ" not in Path("/proc", child, "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_missing_and_unreadable_templates(tmp_path):
    with pytest.raises(UserError, match="cannot be used"):
        ChatTemplate(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be used"):
        ChatTemplate(tmp_path / "binary")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match=r"cannot be used \(it is no regular file\)"):
            ChatTemplate(path)


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ({"tools": "look"}, "expected tools as a list of JSON schemas, found 'look'"),
        ({"tools": [print]}, "expected tools as a list of JSON schemas, found [<built-in"),
        ({"tools": ["x" * 10**6]}, "expected tools as a list of JSON schemas, found ['xxx"),
        ({"variables": ["x"]}, "expected a template's variables by their names, found ['x']"),
        ({"variables": {3: "x" * 10**6}}, "expected a template's variables by their names, found {3: 'xxx"),
        ({"variables": {"tools": []}}, "found tools: give it as the argument tools"),
        ({"variables": {"messages": []}}, "found messages: give it as the argument messages"),
    ],
)
def test_bad_arguments(template, arguments, phrase):
    with pytest.raises(UserError) as error:
        template("{{ messages }}").render(HI, **arguments)
    assert phrase in str(error.value)
    assert len(str(error.value)) < 300


def test_variables(template):
    """They may also be those that have a value else; all are of JSON's types."""
    source = "{{ add_generation_prompt }} {{ documents }} {{ path }} {{ tools[0].f.x }} {{ enable_thinking is false }}"
    variables = {"add_generation_prompt": False, "documents": [{"a": 1}], "path": Path("x"), "enable_thinking": False}
    made = template(source).render(HI, [{"f": {"x": 2}}], variables)
    assert made == "False [{'a': 1}] <PosixPath> 2 True"
