"""Replicas behind the router: where requests go, what becomes of them when a replica ends, and that none is left."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pascalvl.engines.device import gpu
from pascalvl.plugins.errors import UserError
from pascalvl.runtime.cli import main
from pascalvl.runtime.server import replicas as replicas_module
from pascalvl.runtime.server.replicas import Replica, Replicas, visible_cards
from pascalvl.runtime.server.router import beginning, chosen, in_order
from pascalvl.runtime.server.upstream import Upstream
from tests.engines.torch_reference import scene
from tests.runtime.server.served import data_url, picture_part, serving, text_part

KEY = {"Authorization": "Bearer key"}
ORIGIN = "https://page.test"


def children(parent: int) -> list[int]:
    """In the order in which they were begun."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()))
    return []


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(found, what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def wait_until_ready(served, count: int = 2) -> None:
    wait_for(lambda: served.ask("/health")[1]["replicas"] == ["ok"] * count, "not all are ready")


def metric(served, name: str, **labels: str) -> dict[str, float]:
    """A figure of each replica, by its number."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    figures = {}
    for line in served.ask("/metrics", headers=KEY)[1].splitlines():
        if line.startswith(f"{name}{{") and all(each in line for each in wanted):
            number = line.partition('replica="')[2].partition('"')[0]
            figures[number] = figures.get(number, 0) + float(line.split()[-1])
    return figures


@pytest.fixture(scope="module")
def served(endless_bundle):
    """Two of a model whose answers only the context, or a request, ends."""
    options = "--replicas", 2, "--sequences", 4, "--max-body", 1, "--allow-origin", ORIGIN
    with serving(endless_bundle, *options, environment={"PASCALVL_API_KEY": "key"}) as served:
        wait_until_ready(served)
        yield served


# Where requests go ----------------------------------------------------------------------------------------------------


def test_follow_ups_find_what_their_conversation_left(served):
    """Pictures too, however many others come between."""

    def ask(messages):
        body = {"messages": messages, "max_tokens": 8, "temperature": 0}
        status, answer, _ = served.ask("/v1/chat/completions", body, KEY)
        assert status == 200, answer
        return answer["choices"][0]["message"]["content"], answer["usage"]

    conversations = []
    for number in range(4):
        picture = picture_part(data_url(scene(number, 64, 48)))
        conversations.append([{"role": "user", "content": [picture, text_part("Describe the picture.")]}])
    prompts = {}
    for turn in range(3):
        for number, messages in enumerate(conversations):
            answer, usage = ask(messages)
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert cached >= prompts.get(number, 0), (turn, number)
            prompts[number] = usage["prompt_tokens"]
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "What else?"}]
            ask([{"role": "user", "content": f"{turn} {number}: something else"}])
    misses = metric(served, "pascalvl_picture_cache_misses_total")
    assert sum(misses.values()) == len(conversations)
    answers = metric(served, "pascalvl_answers_total")
    assert set(answers) == {"0", "1"}
    assert sum(answers.values()) == 2 * 3 * len(conversations)
    assert min(answers.values()) > 0


def replicas(count: int) -> list[Replica]:
    return [Replica(number, [], "", {}) for number in range(count)]


def test_the_order_is_the_same_and_without_one_the_others_stay():
    three = replicas(3)
    keys = [b"%d" % number for number in range(3000)]
    orders = {key: in_order(key, three) for key in keys}
    first = [sum(order[0] is replica for order in orders.values()) for replica in three]
    assert min(first) > 900
    for key, order in orders.items():
        assert in_order(key, reversed(three)) == order
        left = [replica for replica in three if replica is not order[0]]
        assert in_order(key, left) == order[1:]


def test_one_with_far_more_to_do_is_passed_over():
    three = replicas(3)
    given = []
    for _ in range(24):
        replica = chosen(three)
        replica.requests += 1
        given.append(replica.number)
    assert given[:2] == [0, 0]
    assert [replica.requests for replica in three] == [10, 10, 4]


def test_what_requests_begin_with():
    def key(**body):
        return beginning(json.dumps(body).encode())

    system = {"role": "system", "content": "Be brief."}
    first = {"role": "user", "content": [picture_part("data:a"), text_part("What is it?")]}
    other = {"role": "user", "content": [picture_part("data:b"), text_part("What is it?")]}
    later = [{"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Which?"}]
    begun = key(model="m", messages=[system, first])
    assert key(model="m", messages=[system, first, *later], stream=True) == begun
    different = (
        key(model="m", messages=[system, other]),
        key(model="m", messages=[first]),
        key(model="n", messages=[system, first]),
    )
    assert len({begun, *different}) == 4
    text = "a" * 300
    assert key(prompt=text) == key(prompt=text + "more") == key(prompt=[text, "second"]) != key(prompt="b" + text)
    tokens = list(range(100))
    assert key(prompt=tokens) == key(prompt=[*tokens, 5]) == key(prompt=[tokens]) != key(prompt=tokens[1:])
    for wrong in (b"", b"{", b"[]", b'{"messages": 3}', b'{"messages": [3]}', b'{"prompt": [null]}', b'{"prompt": []}'):
        beginning(wrong)


# What the router says itself ------------------------------------------------------------------------------------------


def test_who_may_ask_and_how_much(served):
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}
    status, answer, _ = served.ask("/v1/chat/completions", body)
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    status, answer, headers = served.ask("/v1/chat/completions", body, {**KEY, "Origin": ORIGIN})
    assert status == 200
    assert headers.get_all("Access-Control-Allow-Origin") == [ORIGIN]
    assert served.ask("/v1/chat/completions", body, {**KEY, "Origin": "https://other.test"})[0] == 403
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    assert served.ask("/v1/chat/completions", None, preflight, "OPTIONS")[0] == 200
    assert served.ask("/v1/chat/completions", b" " * (1 << 20) + b"{}", KEY)[0] == 413
    assert served.ask("/v1/chat/completions", b"{}", {**KEY, "Content-Type": "text/plain"})[0] == 415


def test_what_replicas_say_is_passed_on(served):
    status, answer, _ = served.ask("/v1/chat/completions", {"messages": [], "colour": 3}, KEY)
    assert (status, answer["error"]["param"]) == (400, "colour")
    assert served.ask("/v1/models", headers=KEY)[1]["data"][0]["id"] == "nano"
    assert served.ask("/v1/models/nano", headers=KEY)[1]["id"] == "nano"
    assert served.ask("/v1/nothing", headers=KEY)[0] == 404
    assert served.ask("/v1/models", {}, KEY)[0] == 405
    assert served.ask("/tokenize", {"prompt": "Hello!"}, KEY)[1]["count"] > 0
    status, page, headers = served.ask("/")
    assert (status, page[:15]) == (200, "<!DOCTYPE html>")
    assert len(headers.get_all("Content-Length")) == len(headers.get_all("Date")) == 1
    assert metric(served, "pascalvl_replica_ready") == {"0": 1, "1": 1}


@pytest.mark.parametrize("body", [b"{}", bytes(4 << 20)])
def test_an_answer_that_comes_before_the_request_was_read(body, tmp_path):
    """And then the connection is closed: it is an answer still."""
    refused = b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"

    def answer(listening):
        connection, _ = listening.accept()
        connection.recv(1)  # the rest stays unread
        connection.sendall(refused)
        connection.close()

    async def ask():
        async with Upstream(str(tmp_path / "socket")) as upstream:
            response = await upstream.ask("POST", b"/v1/models", [(b"host", b"localhost")], body)
            return response.status_code, await upstream.whole()

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        thread = threading.Thread(target=answer, args=[listening])
        thread.start()
        assert asyncio.run(asyncio.wait_for(ask(), 20)) == (405, b"no")
        thread.join()


def test_a_client_that_goes_away_ends_its_answer(served):
    before = sum(metric(served, "pascalvl_answers_total", finish_reason="left").values())
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 600, "stream": True}
    with contextlib.closing(served.connection()) as connection:
        headers = {**KEY, "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        assert connection.getresponse().readline().startswith(b"data: ")
    wait_for(lambda: sum(metric(served, "pascalvl_places_taken").values()) == 0, "its place is not free", 5)
    assert sum(metric(served, "pascalvl_answers_total", finish_reason="left").values()) == before + 1


# How replicas end -----------------------------------------------------------------------------------------------------


def streamed(served, number: int, tokens: int, outcomes: dict, begun: threading.Barrier | None = None) -> None:
    """An outcome: why the answer ended, or an error's code."""
    content = f"{number}: tell me all about it"
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "stream": True}
    with contextlib.closing(served.connection()) as connection:
        headers = {**KEY, "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            outcomes[number] = json.loads(response.read())["error"]["code"]
            return
        kind, reason, ended = "", None, None
        for line in response:
            if begun:
                begun.wait(30)
                begun = None
            if line.startswith(b"event: "):
                kind = line[7:].strip().decode()
            elif line.strip() == b"data: [DONE]":
                ended = reason
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if kind == "error":
                    ended = event["error"]["code"]
                    assert set(event["error"]) == {"message", "type", "param", "code"}
                else:
                    assert ended is None
                    reason = event["choices"][0]["finish_reason"]
        outcomes[number] = ended


def test_one_is_killed_under_load(served):
    clients = 16
    outcomes, whole, begun = {}, {}, threading.Barrier(clients + 1)

    def asked(number: int) -> None:
        messages = [{"role": "user", "content": f"{number}: and all at once"}]
        body = {"messages": messages, "max_tokens": 60}
        whole[number] = served.ask("/v1/chat/completions", body, KEY)[0]

    threads = [
        threading.Thread(target=streamed, args=(served, number, 300, outcomes, begun)) for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    begun.wait(30)
    threads += [threading.Thread(target=asked, args=(number,)) for number in range(6)]
    for thread in threads[clients:]:
        thread.start()
    wait_for(lambda: sum(metric(served, "pascalvl_replica_requests").values()) >= clients + 6, "not all are at work")
    at_work = metric(served, "pascalvl_replica_requests")
    killed = children(served.process.pid)[0]
    os.kill(killed, signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    lost = [number for number, outcome in outcomes.items() if outcome == "replica_lost"]
    done = [number for number, outcome in outcomes.items() if outcome == "length"]
    assert 0 < len(lost) <= at_work["0"]
    assert len(done) == clients - len(lost) > 0
    assert list(whole.values()) == [200] * 6
    wait_until_ready(served)
    assert killed not in children(served.process.pid)
    assert metric(served, "pascalvl_replica_restarts_total") == {"0": 1, "1": 0}
    again = {}
    for number in lost:
        streamed(served, number, 5, again)
    assert set(again.values()) == {"length"}


def test_sigterm_drains_all(served):
    """The last test of this server."""
    pids, outcomes, begun = children(served.process.pid), {}, threading.Barrier(2)
    client = threading.Thread(target=streamed, args=(served, 1, 400, outcomes, begun))
    client.start()
    begun.wait(30)
    served.process.send_signal(signal.SIGTERM)
    wait_for(lambda: served.ask("/health")[1]["status"] == "shutting_down", "it goes on")
    assert served.ask("/v1/chat/completions", {"messages": []}, KEY)[1]["error"]["code"] == "shutting_down"
    client.join(60)
    assert outcomes == {1: "length"}
    assert served.process.wait(30) == 0
    assert not any(map(is_alive, pids))


def test_none_is_left_when_the_parent_is_killed(nano_engine_bundle):
    with (
        tempfile.TemporaryDirectory() as sockets,  # which stay, with nobody behind them
        serving(nano_engine_bundle, "--replicas", 2, environment={"TMPDIR": sockets}) as served,
    ):
        wait_for(lambda: len(children(served.process.pid)) == 2, "there are not two")
        pids = children(served.process.pid)
        served.process.kill()
        wait_for(lambda: not any(map(is_alive, pids)), "children are left", 10)


def test_each_has_a_card_and_one_that_hangs_is_begun_again(nano_engine_bundle, monkeypatch):
    monkeypatch.setattr(replicas_module, "_MOST_SILENT_CHECKS", 1)
    given = ["serve", str(nano_engine_bundle), "--context", "256"]

    async def live() -> None:
        both = Replicas(given, 2, ["3", "GPU-5"])
        async with both.running():
            while len(both.ready) < 2:
                await asyncio.sleep(0.05)
            pids = [replica._process.pid for replica in both.all]
            variables = [Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in pids]
            assert "CUDA_VISIBLE_DEVICES=3" in variables[0]
            assert "CUDA_VISIBLE_DEVICES=GPU-5" in variables[1]
            os.kill(pids[1], signal.SIGSTOP)
            while not both.all[1].restarts:
                await asyncio.sleep(0.05)
            assert not is_alive(pids[1])
            assert both.all[0].restarts == 0
        assert not is_alive(pids[0])

    asyncio.run(asyncio.wait_for(live(), 30))


# What is refused ------------------------------------------------------------------------------------------------------


def test_cards(monkeypatch):
    monkeypatch.setattr(gpu, "count_gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_cards() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-5,9")
    assert visible_cards() == ["4", "GPU-5"]
    with pytest.raises(UserError, match="--replicas 3 are more than the 2 GPUs here"):
        Replicas([], 3, visible_cards())
    with pytest.raises(UserError, match="expected at least 1"):
        Replicas([], 0, [])


def test_what_the_first_cannot_do_is_told_once(nano_engine_bundle, capfd):
    assert main(["serve", str(nano_engine_bundle), "--replicas", "2", "--port", "0", "--context", "999999999"]) == 2
    told = capfd.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert "error: " in told.err
