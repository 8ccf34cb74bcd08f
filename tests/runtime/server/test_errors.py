"""Requests that cannot be answered: each is told what is wrong, in OpenAI's form, and stops nobody."""

import contextlib
import json
import socket
import threading
import time

import openai
import pytest

from tests.engines.torch_reference import scene
from tests.runtime.server.served import configured, data_url, picture_part, serving, text_part


@pytest.fixture(scope="module")
def served(nano_engine_bundle):
    with serving(nano_engine_bundle, "--sequences", 2, "--max-body", 1) as server:
        yield server


def refused(found, status=400):
    """The error of a response that is one."""
    assert found[0] == status, found
    error = found[1]["error"]
    assert set(found[1]) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    return error


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("colour", "red", "colour"),
        ("max_pixels", 10, "max_pixels"),
        ("fps", 2, "fps"),
        ("mm_processor_kwargs", {"fps": 2}, "mm_processor_kwargs"),
        ("chat_template", "{{ messages }}", "chat_template"),
        ("chat_template_kwargs", {"x": 1}, "chat_template_kwargs"),
        ("store", True, "store"),
        ("service_tier", "priority", "service_tier"),
        ("modalities", ["audio"], "modalities"),
        ("temperature", -1, "temperature"),
        ("temperature", True, "temperature"),
        ("temperature", "hot", "temperature"),
        ("temperature", 1e30, "temperature"),
        ("top_p", 1.5, "top_p"),
        ("top_p", -0.1, "top_p"),
        ("top_k", -1, "top_k"),
        ("top_k", 1.5, "top_k"),
        ("min_p", 2, "min_p"),
        ("seed", -5, "seed"),
        ("seed", 1 << 64, "seed"),
        ("n", 0, "n"),
        ("n", 10**30, "n"),
        ("n", 100, "n"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", -(10**30), "max_tokens"),
        ("presence_penalty", 3, "presence_penalty"),
        ("frequency_penalty", -3, "frequency_penalty"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("logit_bias", {"x": 1}, "logit_bias"),
        ("logit_bias", {"5": 101}, "logit_bias"),
        ("logit_bias", {"999999": 1}, "logit_bias"),
        ("logit_bias", [1], "logit_bias"),
        ("stop", [""], "stop"),
        ("stop", 5, "stop"),
        ("stop", ["x"] * 17, "stop"),
        ("logprobs", 3, "logprobs"),
        ("top_logprobs", 21, "top_logprobs"),
        ("top_logprobs", 3, "top_logprobs"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("response_format", [], "response_format"),
        ("tools", {}, "tools"),
        ("messages", [], "messages"),
        ("messages", "Hello", "messages"),
        ("messages", [5], "messages[0]"),
        ("messages", [{"role": "king", "content": "x"}], "messages[0].role"),
        ("messages", [{"role": "user"}], "messages[0].content"),
        ("messages", [{"role": "user", "content": "x", "name": "me"}], "messages[0].name"),
        ("messages", [{"role": "user", "content": [{"type": "audio"}]}], "messages[0].content[0].type"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,", "max_pixels": 9}}]}],
            "messages[0].content[0].image_url.max_pixels",
        ),
        (
            "messages",
            [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,", "fps": 99}}]}],
            "messages[0].content[0].video_url.fps",
        ),
        (
            "messages",
            [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,"}, "num_frames": 9}]}],
            "messages[0].content[0].num_frames",
        ),
    ],
)
def test_a_field_that_is_of_no_use_is_named(served, field, value, named):
    error = refused(served.chat(**{field: value}))
    assert error["param"] == named
    assert named in error["message"]


def test_fields_that_change_nothing_are_taken(served):
    harmless = {
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "n": None,
        "max_tokens": 10**30,
    }
    assert served.chat(**harmless | {"stop": ["."]})[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"temperature": Infinity}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"[]",
        b'"text"',
    ],
)
def test_bodies_that_are_no_request(served, body):
    refused(served.ask("/v1/chat/completions", body))


def test_text_that_is_none(served):
    assert (
        "Unicode"
        in refused(served.ask("/v1/chat/completions", b'{"messages":[{"role":"user","content":"\\ud800"}]}'))["message"]
    )


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ([[]], "prompt"),
        ([1, -1], "prompt"),
        ([1, 10**30], "prompt"),
        (["x", 5], "prompt[1]"),
        ("", "prompt"),
    ],
)
def test_prompts_of_no_use(served, prompt, param):
    assert refused(served.ask("/v1/completions", {"prompt": prompt}))["param"] == param


def test_paths_and_methods(served):
    refused(served.ask("/v1/nothing"), 404)
    refused(served.ask("/v1/chat/completions"), 405)
    refused(served.ask("/health", {}), 405)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    refused(served.ask("/v1/chat/completions", b"{}", form), 415)


def test_a_prompt_that_is_too_long(served):
    error = refused(served.chat("word " * 2000))
    assert error["code"] == "context_length_exceeded"


def test_no_valid_http(served):
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["message"] == "the request is no valid HTTP."


def test_oversize_bodies(served):
    too_large = b'{"messages": "' + b"x" * (2 << 20) + b'"}'
    assert refused(served.ask("/v1/chat/completions", too_large), 413)["code"] == "body_too_large"
    pieces = (b"x" * 65536 for _ in range(64))  # without a length that could be refused
    with contextlib.closing(served.connection()) as connection:
        connection.request(
            "POST", "/v1/chat/completions", pieces, {"Content-Type": "application/json"}, encode_chunked=True
        )
        response = connection.getresponse()
        assert refused((response.status, json.loads(response.read())), 413)


def test_long_texts_are_refused_at_once(served):
    """Before they are made tokens, which would hold up everybody."""
    text = "word " * 180_000
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", {"prompt": text}),
        ("/tokenize", {"prompt": text}),
    ):
        begun = time.monotonic()
        error = refused(served.ask(path, body))
        assert "characters, more than the context's" in error["message"]
        assert time.monotonic() - begun < 5


def test_wrong_pictures_stop_nobody(served):
    """One after the other, and beside those that are right."""
    found = []

    def ask(url):
        found.append(served.chat([picture_part(url), text_part("Describe the picture.")])[0])

    right = data_url(scene(1, 64, 64))
    urls = [right, "data:image/png;base64,AAAA", right, "data:text/plain,x", right, "data:image/png;base64,_"]
    threads = [threading.Thread(target=ask, args=[url]) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [200, 200, 200, 400, 400, 422]


def test_errors_as_the_client_has_them(served):
    client = served.client()
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "x"}], top_p=2)
    assert raised.value.param == "top_p"
    with pytest.raises(openai.UnprocessableEntityError, match=r"not a picture|cannot be read"):
        client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": [picture_part("data:image/png;base64,AAAA")]}]
        )


ENDLESS = """
import dataclasses
model.generation_config = dataclasses.replace(model.generation_config, eos_token_ids=frozenset())
"""
MESSAGES = [{"role": "user", "content": "Hello!"}]


def test_a_full_queue_asks_to_come_again(nano_engine_bundle):
    """Which the client does, as often as it is told to."""
    change = (
        ENDLESS + "import time; step = model.scheduler.step; model.scheduler.step = lambda: (time.sleep(0.02), step())"
    )
    with configured(nano_engine_bundle, "queue=0", change) as served:
        client = served.client()
        running = [
            client.chat.completions.create(model="nano", messages=MESSAGES, max_tokens=40, stream=True)
            for _ in range(8)
        ]
        with pytest.raises(openai.RateLimitError) as raised:
            client.chat.completions.create(model="nano", messages=MESSAGES, max_tokens=2)
        assert 1 <= int(raised.value.response.headers["Retry-After"]) <= 30
        assert raised.value.code == "queue_full"
        assert served.chat(n=8)[0] == 429
        patient = served.client(max_retries=5)
        assert patient.chat.completions.create(model="nano", messages=MESSAGES, max_tokens=2).choices[0].message.content
        for stream in running:
            assert list(stream)[-1].choices[0].finish_reason == "length"
        served.wait_until("pascalvl_places_taken", 0)


def failing_after(steps):
    """The change of an engine that stops after so many steps."""
    return (
        ENDLESS
        + f"""
steps, step = 0, model.scheduler.step
def fail():
    global steps
    steps += 1
    if steps > {steps}:
        raise RuntimeError("of this test")
    step()
model.scheduler.step = fail
"""
    )


def test_an_engine_that_dies(nano_engine_bundle):
    """All are told, in the middle of a stream too, and /health says so."""
    with configured(nano_engine_bundle, "", failing_after(20)) as served:
        assert served.ask("/health")[:2] == (200, {"status": "ok"})
        client = served.client()
        stream = client.chat.completions.create(model="nano", messages=MESSAGES, max_tokens=500, stream=True)
        with pytest.raises(openai.APIError, match="engine has stopped"):
            list(stream)
        error = refused(served.chat(), 500)
        assert (error["code"], error["type"]) == ("engine_stopped", "server_error")
        assert served.ask("/health")[:2] == (503, {"status": "engine_stopped"})
        assert served.end() == 0


def test_an_error_in_a_stream_is_an_event_of_its_own(nano_engine_bundle):
    with configured(nano_engine_bundle, "", failing_after(5)) as served:
        body = {"messages": MESSAGES, "stream": True, "max_tokens": 500}
        status, text, _ = served.ask("/v1/chat/completions", body)
        assert status == 200
        last = text.strip().split("\n\n")[-1]
        assert last.startswith("event: error\ndata: ")
        assert json.loads(last.split("data: ")[1])["error"]["code"] == "engine_stopped"
