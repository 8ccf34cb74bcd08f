"""Many clients at once, for a while: each is answered or told to come again, and nothing is left behind."""

import os
import random
import threading
import time

import openai
import pytest

from tests.engines.torch_reference import scene
from tests.runtime.server.served import data_url, picture_part, serving, text_part

CLIENTS = 64


def descriptors(served):
    return len(os.listdir(f"/proc/{served.process.pid}/fd"))


def at_rest(served):
    """Bytes of memory but for pages that were moved there, tasks and descriptors, when nobody asks."""
    for name in ("places_taken", "requests_running", "requests_waiting", "request_memory_bytes"):
        served.wait_until(f"pascalvl_{name}", 0)
    time.sleep(6)  # connections that are kept alive end
    assert served.figure("pascalvl_kv_pages_used") == served.figure("pascalvl_kv_pages_kept")
    memory = served.figure("process_resident_memory_bytes") - served.figure("pascalvl_kv_host_bytes")
    tasks = served.figure("pascalvl_tasks")
    time.sleep(0.5)  # the connection by which that was asked ends
    return memory, tasks, descriptors(served)


def load(served, seconds):
    """Ask from many threads; returns how many were answered and sent away, and whatever else came."""
    urls = [data_url(scene(number, 64, 64)) for number in range(12)]
    end = time.monotonic() + seconds
    answered, sent_away, others = [], [], []

    def ask(number):
        rng = random.Random(number)
        client = served.client(timeout=120)
        while time.monotonic() < end:
            content = [text_part(f"word {rng.randint(0, 9)} " * rng.randint(1, 60))]
            if rng.random() < 0.3:
                content.insert(0, picture_part(rng.choice(urls)))
            fields = {"max_tokens": rng.randint(1, 24), "temperature": rng.choice([0, 0.8]), "n": rng.choice([1, 1, 2])}
            messages = [{"role": "user", "content": content}]
            try:
                if rng.random() < 0.5:
                    stream = client.chat.completions.create(model="nano", messages=messages, stream=True, **fields)
                    if rng.random() < 0.3:
                        next(iter(stream))
                        stream.close()  # in the middle
                    else:
                        answered.append([chunk.choices[0].finish_reason for chunk in stream][-1])
                else:
                    completion = client.chat.completions.create(model="nano", messages=messages, **fields)
                    answered.append(completion.choices[0].finish_reason)
            except openai.RateLimitError as error:
                sent_away.append(int(error.response.headers["Retry-After"]))
                time.sleep(rng.uniform(0.1, 0.5))
            except Exception as error:
                others.append(error)
        client.close()

    threads = [threading.Thread(target=ask, args=[number]) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answered, sent_away, others


@pytest.mark.parametrize("seconds", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_many_clients(nano_engine_bundle, seconds):
    with serving(nano_engine_bundle, "--sequences", 2, "--queue", 40) as served:
        load(served, seconds / 4)  # after which caches and pools have their sizes
        memory, tasks, files = at_rest(served)
        answered, sent_away, others = load(served, seconds * 3 / 4)
        assert others == []
        assert len(answered) > seconds
        assert set(answered) <= {"stop", "length"}
        assert sent_away
        assert all(1 <= after <= 30 for after in sent_away)
        later, tasks_later, files_later = at_rest(served)
        assert (tasks_later, files_later) == (tasks, files)
        assert later - memory < 48 << 20
        assert served.end() == 0
