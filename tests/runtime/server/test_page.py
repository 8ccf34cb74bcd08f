"""The page, used in a headless Chromium as a person does."""

import asyncio
import base64
import contextlib
import json
import re
import socket
import threading
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pascalvl.runtime.server.page import page
from tests.browser import CHROMIUM, Browser
from tests.runtime.server import served

PICTURES = Path(__file__).parents[2] / "nano" / "pictures"
SAMPLE = json.loads((PICTURES / "pictures.json").read_text())[0]
BUILD = Path(__file__).parents[3] / "build"
NAME = "nano"
LAST = "document.querySelector('article:last-of-type')"

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def shown_page(request):
    body, headers = page()
    return Response(body, headers=headers)


def models(request):
    return JSONResponse({"object": "list", "data": [{"id": NAME, "object": "model"}]})


def event(data):
    return f"data: {json.dumps(data)}\n\n"


def chunk(delta, reason=None):
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


def routes(complete):
    return [
        Route("/", shown_page),
        Route("/v1/models", models),
        Route("/v1/chat/completions", complete, methods=["POST"]),
    ]


@contextlib.contextmanager
def serving(app):
    """The address of an app."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path) as browser:
        yield browser
        assert browser.problems == []


@pytest.fixture(scope="module")
def nano(nano_engine_bundle):
    with served.serving(nano_engine_bundle, "--api-key", "secret") as server:
        yield server.url.removesuffix("v1")


@pytest.fixture
def scripted():
    """A server whose answers are said before: each is a function of the request that gives pieces, or a response."""
    asked, answers = [], []

    async def complete(request):
        asked.append((await request.json(), dict(request.headers)))
        answer = answers.pop(0)
        return answer if isinstance(answer, Response) else StreamingResponse(answer, media_type="text/event-stream")

    with serving(Starlette(routes=routes(complete))) as address:
        yield address, asked, answers


def ask(browser, text):
    browser.value("document.getElementById('prompt').focus()")
    browser.write(text)
    browser.press("Enter")


def answered(browser, number=1):
    """The text of an answer, when it has ended."""
    articles = "document.querySelectorAll('article.assistant[aria-busy=false]')"
    browser.wait(f"{articles}.length >= {number}")
    return browser.value(f"[...{articles}[{number - 1}].querySelectorAll('.text')].map(e => e.textContent).join('')")


def test_the_policy_is_that_of_what_the_page_has():
    body, headers = page()
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert len(re.findall("sha256-", policy)) == 2
    text = body.decode()
    assert not re.search(r'(src|href)=(?!"(data:,|#))|\bon\w+=|style=|innerHTML|@import|url\(', text)
    assert max(map(len, text.splitlines())) <= 120


@needs_chromium
def test_a_picture_is_dropped_and_asked_about(browser, nano):
    """A real picture, a real answer, its figures; then a follow-up that finds the picture in the cache."""
    browser("Emulation.setDeviceMetricsOverride", width=800, height=680, deviceScaleFactor=1, mobile=False)
    browser.open(nano)
    problem = browser.wait("document.getElementById('problem').textContent")
    assert "API key" in problem
    browser.problems.clear()
    browser.click("#open-settings")
    browser.value("document.getElementById('key').focus()")
    browser.write("secret")
    browser.click("#settings button")
    browser.wait(f"document.getElementById('model-name').textContent === '{NAME}'")
    browser.drop("main", PICTURES / SAMPLE["file"])
    browser.wait("document.querySelectorAll('#attached img').length === 1")
    first, *others = SAMPLE["questions"]
    ask(browser, first["question"])
    assert answered(browser) == first["answer"]
    assert re.match(
        r"\d+ tokens · [\d.]+ tokens/s · first", browser.value(f"{LAST}.querySelector('.figures').textContent")
    )
    ask(browser, others[0]["question"])
    assert answered(browser, 2) == others[0]["answer"]
    figures = browser.value(f"{LAST}.querySelector('.figures').textContent")
    pattern = r"\d+ tokens(?: · [\d.]+ tokens/s)? · first after [\d.]+ s · prompt of (\d+) tokens, (\d+) of them cached"
    prompt, cached = map(int, re.fullmatch(pattern, figures).groups())
    assert prompt > cached > 100
    assert browser.value("document.getElementById('status').textContent") == f"Answer: {others[0]['answer']}"
    assert browser.value("document.querySelector('article.user img').naturalWidth") == SAMPLE["width"]
    assert {url.split("/")[2] for url in browser.requested if url.startswith("http")} == {nano.split("/")[2]}
    browser.value("document.activeElement.blur()")
    picture = browser.screenshot()
    BUILD.mkdir(exist_ok=True)
    (BUILD / "page.png").write_bytes(picture)


@needs_chromium
def test_pictures_are_pasted_chosen_removed_and_sent_in_order(browser, scripted):
    address, asked, answers = scripted
    answers.append(iter([chunk({"content": "Two."}, "stop"), "data: [DONE]\n\n"]))
    browser.open(address)
    small = base64.b64encode((PICTURES / "small.png").read_bytes()).decode()
    browser.value(
        f"""(async () => {{ const bytes = Uint8Array.from(atob('{small}'), (c) => c.charCodeAt());
        const data = new DataTransfer(); data.items.add(new File([bytes], 'pasted.png', {{type: 'image/png'}}));
        document.getElementById('prompt').dispatchEvent(
            new ClipboardEvent('paste', {{clipboardData: data, bubbles: true, cancelable: true}})); }})()"""
    )
    browser.wait("document.querySelectorAll('#attached img').length === 1")
    root = browser("DOM.getDocument")["root"]["nodeId"]
    field = browser("DOM.querySelector", nodeId=root, selector="#files")["nodeId"]
    files = [str((PICTURES / name).resolve()) for name in ("tall.png", "wide.png")]
    browser("DOM.setFileInputFiles", files=files, nodeId=field)
    browser.wait("document.querySelectorAll('#attached img').length === 3")
    browser.click("#attached li:nth-child(2) button")
    assert browser.value("[...document.querySelectorAll('#attached img')].map(e => e.alt)") == [
        "pasted.png",
        "wide.png",
    ]
    browser.drop("main", Path(__file__))
    problem = browser.wait("document.getElementById('problem').textContent")
    assert problem == f"{Path(__file__).name} is no picture or video: attach one that is."
    ask(browser, "How many?")
    assert answered(browser) == "Two."
    (message,) = asked[0][0]["messages"]
    wide = base64.b64encode((PICTURES / "wide.png").read_bytes()).decode()
    assert message["role"] == "user"
    assert message["content"] == [
        *({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}} for data in (small, wide)),
        {"type": "text", "text": "How many?"},
    ]
    assert browser.value("document.getElementById('problem').hidden")


@needs_chromium
def test_a_question_waits_for_its_picture(browser, scripted, tmp_path):
    address, asked, answers = scripted
    answers.append(iter([chunk({"content": "Yes."}, "stop"), "data: [DONE]\n\n"]))
    (tmp_path / "large.png").write_bytes(bytes(20_000_000))
    browser.open(address)
    browser.value("document.getElementById('prompt').value = 'Large?'")
    browser.drop("main", tmp_path / "large.png")
    browser.press("Enter")
    assert answered(browser) == "Yes."
    picture, _ = asked[0][0]["messages"][0]["content"]
    assert len(picture["image_url"]["url"]) > 26_000_000


@needs_chromium
def test_a_video_is_sent(browser, scripted, tmp_path):
    address, asked, answers = scripted
    answers.append(iter([chunk({"content": "A video."}, "stop"), "data: [DONE]\n\n"]))
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    browser.open(address)
    browser.drop("main", tmp_path / "clip.mp4")
    browser.wait("document.querySelectorAll('#attached video').length === 1")
    ask(browser, "What?")
    answered(browser)
    url = asked[0][0]["messages"][0]["content"][0]["video_url"]["url"]
    assert url == "data:video/mp4;base64," + base64.b64encode(b"\0\0\0\x18ftypmp42").decode()


@needs_chromium
def test_reasoning_tools_code_and_settings(browser, scripted):
    """All of an answer is text: no part of it becomes HTML."""
    address, asked, answers = scripted
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}
    answers.append(
        iter(
            [
                chunk({"role": "assistant", "content": ""}),
                chunk({"reasoning_content": "<b>Hm"}),
                chunk({"reasoning_content": ".</b>"}),
                chunk({"content": "See <img src=x onerror=alert(1)>\n``"}),
                chunk({"content": "`html\n<script>x</script>\n```\nSo."}),
                chunk({"tool_calls": [call]}),
                chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"at": "<i>'}}]}),
                chunk({"tool_calls": [{"index": 0, "function": {"arguments": 'sky"}'}}]}, "tool_calls"),
                "data: [DONE]\n\n",
            ]
        )
    )
    answers.append(iter([chunk({"content": "Blue."}, "stop"), "data: [DONE]\n\n"]))
    tools = [{"type": "function", "function": {"name": "look"}}]
    browser.open(address)
    browser.wait("document.getElementById('model').value")
    browser.click("#open-settings")
    given = {
        "key": "secret",
        "system": "Be brief.",
        "temperature": "0.5",
        "top_p": "0.9",
        "max_tokens": "30",
        "seed": "7",
    }
    for name, text in {**given, "tools": json.dumps(tools)}.items():
        browser.value(f"document.getElementById('{name}').focus()")
        browser.write(text)
    browser.click("#settings button")
    browser.wait("!document.getElementById('settings').open")
    ask(browser, "Look!")
    assert answered(browser) == "See <img src=x onerror=alert(1)>\nSo."
    body, headers = asked[0]
    assert headers["authorization"] == "Bearer secret"
    assert body == {
        "model": NAME,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Look!"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 30,
        "seed": 7,
        "tools": tools,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    details = f"{LAST}.querySelector('details')"
    assert browser.value(f"[{details}.open, {details}.querySelector('pre').textContent]") == [False, "<b>Hm.</b>"]
    assert browser.value(f"{LAST}.querySelector('code').textContent") == "<script>x</script>\n"
    assert browser.value(f"{LAST}.querySelector('[role=group]').textContent.trim()") == 'look({"at": "<i>sky"})'
    assert browser.value(f"{LAST}.querySelectorAll('img, script, i, b').length") == 0
    browser.value(f"{LAST}.querySelector('input').focus()")
    browser.write("It is blue.")
    browser.value("document.getElementById('send').click()")
    assert answered(browser, 2) == "Blue."
    function = {"name": "look", "arguments": '{"at": "<i>sky"}'}
    assert asked[1][0]["messages"][2:] == [
        {
            "role": "assistant",
            "content": "See <img src=x onerror=alert(1)>\n```html\n<script>x</script>\n```\nSo.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "It is blue."},
    ]
    browser("Page.reload")
    browser.wait("document.readyState === 'complete' && document.getElementById('key')?.value === 'secret'")
    assert browser.value("[document.querySelectorAll('article').length, localStorage.length]") == [0, 0]


@needs_chromium
def test_stop_regenerate_edit_and_a_new_chat(browser, scripted):
    address, asked, answers = scripted
    gone = threading.Event()

    async def endless():
        try:
            while True:
                yield chunk({"content": "on "})
                await asyncio.sleep(0.02)
        finally:
            gone.set()

    answers += [endless(), iter([chunk({"content": "Done."}, "length"), "data: [DONE]\n\n"])]
    browser.open(address)
    ask(browser, "Go")
    browser.press("Enter", shift=True)  # while an answer comes, the next question can be written
    browser.write("and on")
    browser.press("Enter")
    browser.wait(f"{LAST}.textContent.includes('on on on')")
    assert browser.value("document.getElementById('prompt').value") == "\nand on"
    browser.press("Escape")
    assert answered(browser).startswith("on on on")
    assert gone.wait(10)
    figures = f"{LAST}.querySelector('.figures').textContent"
    assert re.fullmatch(
        r"about \d+ tokens · about [\d.]+ tokens/s · first after [\d.]+ s · stopped", browser.value(figures)
    )
    assert len(asked) == 1
    browser.click("article:last-of-type .row button:first-child")
    browser.wait(f"{LAST}.textContent.includes('Done.')")
    answered(browser)
    assert browser.value(figures).endswith("cut off: no more tokens were allowed")
    assert asked[1][0] == asked[0][0]
    assert browser.value("document.querySelectorAll('article').length") == 2
    browser.click("article:last-of-type .row button:last-child")
    browser.wait("document.querySelectorAll('article').length === 0")
    assert browser.value("document.getElementById('prompt').value") == "Go"
    answers.append(iter([chunk({"content": "Yes."}, "stop"), "data: [DONE]\n\n"]))
    browser.press("Enter")
    assert answered(browser) == "Yes."
    assert asked[2][0]["messages"] == asked[0][0]["messages"]
    browser.click("#new-chat")
    browser.wait("document.querySelectorAll('article').length === 0")
    answers.append(iter([chunk({"content": "Hello."}, "stop"), "data: [DONE]\n\n"]))
    ask(browser, "Hi")
    answered(browser)
    assert asked[3][0]["messages"] == [{"role": "user", "content": "Hi"}]


def refusal(status, message, **headers):
    return JSONResponse({"error": {"message": message}}, status, headers)


@needs_chromium
@pytest.mark.parametrize(
    ("answer", "expected", "text"),
    [
        (refusal(400, "The prompt is too long."), "The prompt is too long.", ""),
        (refusal(401, "No key."), "No key. Enter an API key in the settings.", ""),
        (refusal(429, "Too many.", **{"Retry-After": "7"}), "Too many. Try again in 7 s.", ""),
        (Response("<h1>Bad gateway</h1>", 502), "The server answered with status 502.", ""),
        ([chunk({"content": "So"}), event({"error": {"message": "No memory."}})], "No memory.", "So"),
        ([chunk({"content": "So"})], "The answer broke off: the connection to the server was lost.", "So"),
    ],
)
def test_errors_are_told_in_a_sentence(tmp_path, scripted, answer, expected, text):
    address, asked, answers = scripted
    answers += [answer if isinstance(answer, Response) else iter(answer)]
    answers += [iter([chunk({"content": "Well."}, "stop"), "data: [DONE]\n\n"])]
    with Browser(tmp_path) as browser:
        browser.open(address)
        ask(browser, "Hello?")
        assert answered(browser) == text
        error = f"{LAST}.querySelector('.error')"
        assert browser.value(f"[{error}.textContent, {error}.hidden, {error}.role]") == [expected, False, "alert"]
        ask(browser, "Again?")
        assert answered(browser, 2) == "Well."
        said = [message["role"] for message in asked[1][0]["messages"]]
        assert said == (["user", "assistant", "user"] if text else ["user", "user"])


@needs_chromium
def test_a_server_that_is_gone(tmp_path):
    with Browser(tmp_path) as browser:
        with serving(Starlette(routes=routes(models))) as address:
            browser.open(address)
            browser.wait("document.getElementById('model').value")
        ask(browser, "Hello?")
        answered(browser)
        error = browser.value(f"{LAST}.querySelector('.error').textContent")
        assert error == "The server does not answer: see whether it is still running."


@needs_chromium
def test_everything_has_a_name_and_the_keyboard_reaches_it(browser, scripted):
    address, _, answers = scripted
    answers.append(
        iter([chunk({"reasoning_content": "Hm"}), chunk({"content": "```\nx\n```"}, "stop"), "data: [DONE]\n\n"])
    )
    browser.open(address)
    browser.drop("main", PICTURES / "small.png")
    browser.wait("document.querySelectorAll('#attached img').length === 1")
    ask(browser, "Hello")
    answered(browser)
    browser.drop("main", PICTURES / "small.png")
    browser.wait("document.querySelectorAll('#attached img').length === 1")
    names = {}
    for node in browser("Accessibility.getFullAXTree")["nodes"]:
        if not node["ignored"]:
            names.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert sorted(names["button"]) == sorted(
        [
            "New chat",
            "Settings",
            "Regenerate",
            "Edit question",
            "Send",
            "Remove small.png",
            "Attach pictures or a video",
        ]
    ), names["button"]
    assert names["textbox"] == ["Question"]
    assert names["image"] == ["small.png", "small.png"]
    assert names["article"] == ["You", "Answer"]
    assert names["main"] == ["Conversation"]
    assert names["form"] == ["Question"]
    assert "status" in names
    reached = []
    browser.value("document.querySelector('.skip').focus()")
    assert browser.value("document.querySelector('.skip').getBoundingClientRect().width") > 50
    for _ in range(12):
        browser.press("Tab")
        reached.append(browser.value("document.activeElement.id || document.activeElement.textContent.trim()"))
        ring = browser.value(
            "getComputedStyle(document.activeElement.closest('.button') || document.activeElement).outline"
        )
        assert "3px" in ring, reached
        if reached[-1] == "send":
            break
    assert [name for name in reached if name in ("new-chat", "open-settings", "files", "prompt", "send")] == [
        "new-chat",
        "open-settings",
        "files",
        "prompt",
        "send",
    ]
    assert {"Reasoning", "x", "Regenerate", "Edit question"} <= set(reached)


CONTRAST = """(() => {
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const back = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!c.endsWith(', 0)')) return c; } return 'rgb(255, 255, 255)'; };
  return Math.min(...[...document.querySelectorAll('h1, h2, button, .text, .figures, .error, summary, pre, textarea')]
    .filter((e) => e.checkVisibility()).map((e) => { const [a, b] = [light(getComputedStyle(e).color), light(back(e))];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }));
})()"""
"""The least contrast of text that is seen, as WCAG measures it."""


WIDE = """[...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() &&
    e.getBoundingClientRect().right > innerWidth).map((e) => e.outerHTML.slice(0, 100))"""


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_dark_and_a_phones_width(tmp_path, scripted, scheme):
    address, _, answers = scripted
    answers += [iter([chunk({"content": "x" * 300 + "\n```\n" + "y" * 300}, "stop"), "data: [DONE]\n\n"])]
    answers += [refusal(400, "z" * 300)]
    with Browser(tmp_path) as browser:
        browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser("Emulation.setDeviceMetricsOverride", width=320, height=560, deviceScaleFactor=1, mobile=True)
        browser.open(address)
        ask(browser, "w" * 300)
        answered(browser)
        ask(browser, "Again")
        answered(browser, 2)
        assert browser.value(WIDE) == []
        assert browser.value("document.documentElement.scrollWidth") <= 320
        assert browser.value("document.getElementById('main').scrollWidth") <= 320
        assert browser.value("document.getElementById('send').getBoundingClientRect().bottom") <= 560
        back = browser.value("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") is (scheme == "light")
        assert browser.value(CONTRAST) >= 4.5
