"""The `openai` package against a server of nano: what people write works, and answers are those of the model alone."""

import asyncio
import json

import numpy as np
import openai
import pytest

from pascalvl.runtime import SamplingParams, VisionLanguageModel
from tests.engines.torch_reference import scene, user
from tests.runtime.server.served import data_url, picture_part, text_part
from tests.runtime.test_many import alone, requests

QUESTION = [{"role": "user", "content": "What is the code of lamp 3? The code of lamp 3 is 21."}]


@pytest.fixture(scope="module")
def model(nano_engine_bundle):
    return VisionLanguageModel.open(nano_engine_bundle, context_length=768)


def answer(model, messages, **options):
    generation = model.generate(messages, options.pop("sampling", SamplingParams(temperature=0)), **options)
    for _ in generation:
        pass
    return generation


def test_an_answer(client, model):
    expected = answer(model, QUESTION, max_new_tokens=30)
    completion = client.chat.completions.create(model="nano", messages=QUESTION, max_completion_tokens=30)
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason.value
    assert completion.usage.prompt_tokens == expected.prompt_tokens
    assert completion.usage.completion_tokens == len(expected.token_ids)
    assert completion.usage.total_tokens == expected.prompt_tokens + len(expected.token_ids)
    assert (completion.object, completion.model, completion.id[:9]) == ("chat.completion", "nano", "chatcmpl-")


def test_cached_tokens_are_told(client):
    messages = [{"role": "user", "content": "word " * 200}]
    first, second = (
        client.chat.completions.create(model="nano", messages=messages, max_tokens=2).usage for _ in range(2)
    )
    assert first.prompt_tokens_details.cached_tokens < 128 <= second.prompt_tokens_details.cached_tokens


def test_streaming(client, model):
    expected = answer(model, QUESTION, max_new_tokens=30)
    options = {"include_usage": True}
    with client.chat.completions.create(
        model="nano", messages=QUESTION, max_tokens=30, stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    *spoken, last = chunks
    assert spoken[0].choices[0].delta.role == "assistant"
    assert not any(chunk.choices[0].delta.role for chunk in spoken[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in spoken) == expected.text
    assert len(spoken) > 4
    assert [chunk.choices[0].finish_reason for chunk in spoken[:-1]] == [None] * (len(spoken) - 1)
    assert spoken[-1].choices[0].finish_reason == expected.finish_reason.value
    assert last.choices == []
    assert last.usage.completion_tokens == len(expected.token_ids)
    assert all(chunk.usage is None for chunk in spoken)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_ends_with_done(served):
    status, text, headers = served.ask(
        "/v1/chat/completions", {"model": "nano", "messages": QUESTION, "stream": True, "max_tokens": 3}
    )
    assert status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    events = text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert not any("usage" in json.loads(event.removeprefix("data: ")) for event in events[:-1])


def test_pictures(client, model):
    pictures = scene(1, 96, 64), scene(2, 64, 96)
    expected = answer(model, [user(*pictures, "Describe the last picture.")], max_new_tokens=30)
    content = [
        picture_part(data_url(pictures[0])),
        picture_part(data_url(pictures[1])),
        text_part("Describe the last picture."),
    ]
    completion = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": content}], max_tokens=30, temperature=0
    )
    assert completion.choices[0].message.content == expected.text
    assert completion.usage.prompt_tokens == expected.prompt_tokens


def test_choices_of_a_seed(client, model):
    """Each choice is what its own seed gives alone."""
    fields = {"temperature": 20.0, "top_p": 0.95}
    completion = client.chat.completions.create(
        model="nano", messages=QUESTION, max_tokens=12, n=3, seed=7, extra_body={"top_k": 50}, **fields
    )
    expected = [
        answer(model, QUESTION, sampling=SamplingParams(seed=seed, top_k=50, **fields), max_new_tokens=12).text
        for seed in (7, 8, 9)
    ]
    assert [choice.message.content for choice in completion.choices] == expected
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert len(set(expected)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="nano", messages=QUESTION, max_tokens=12, n=3, seed=7, extra_body={"top_k": 50}, stream=True, **fields
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == expected


def test_log_probabilities(client, model):
    expected = answer(model, QUESTION, max_new_tokens=4, logprobs=3)
    fields = {"model": "nano", "messages": QUESTION, "max_tokens": 4, "logprobs": True, "top_logprobs": 3}
    content = client.chat.completions.create(**fields).choices[0].logprobs.content
    tokens = [model.tokenizer.token_bytes(token) for token in expected.token_ids]
    assert [bytes(token.bytes) for token in content] == tokens
    np.testing.assert_allclose([token.logprob for token in content], [t.logprob for t in expected.logprobs], atol=1e-4)
    assert all(len(token.top_logprobs) == 3 for token in content)
    assert [token.top_logprobs[0].token for token in content] == [token.decode() for token in tokens]
    streamed = [
        token
        for chunk in client.chat.completions.create(**fields, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in content]


def test_an_end_token_is_no_part_of_the_text(client):
    completion = client.chat.completions.create(model="nano", messages=QUESTION, max_tokens=100, logprobs=True)
    (choice,) = completion.choices
    assert choice.finish_reason == "stop"
    assert b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode() == choice.message.content
    assert completion.usage.completion_tokens == len(choice.logprobs.content) + 1


def test_completions(client, model):
    tokens = model.tokenizer.encode_without_added("The code of lamp 1 is 7. The code of lamp")
    generation = model.answer(model.prompt_of_tokens(tokens), SamplingParams(temperature=0), 8)
    for _ in generation:
        pass
    for prompt in ("The code of lamp 1 is 7. The code of lamp", tokens):
        completion = client.completions.create(model="nano", prompt=prompt, max_tokens=8, logprobs=2)
        (choice,) = completion.choices
        assert choice.text == generation.text
        found = choice.logprobs
        assert "".join(found.tokens).startswith(choice.text)
        assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
        assert [
            choice.text[at : at + len(t)] for at, t in zip(found.text_offset, found.tokens, strict=True)
        ] == found.tokens
    several = client.completions.create(model="nano", prompt=["The code of lamp 1 is 7.", "Hello"], max_tokens=3, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text != several.choices[2].text == several.choices[3].text
    streamed = client.completions.create(model="nano", prompt=tokens, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == generation.text


def test_stop_and_bias(client, model):
    text = answer(model, QUESTION, max_new_tokens=30).text
    assert len(text) > 4
    stopped = client.chat.completions.create(model="nano", messages=QUESTION, max_tokens=30, stop=[text[3:5], "never"])
    assert stopped.choices[0].message.content == text[:3]
    assert stopped.choices[0].finish_reason == "stop"
    token = model.tokenizer.encode_without_added(" lamp")[0]
    biased = client.chat.completions.create(
        model="nano", messages=QUESTION, max_tokens=3, logit_bias={str(token): 100}, temperature=0
    )
    assert biased.choices[0].message.content.strip().split() == ["lamp"] * 3


def test_models(client):
    (model,) = client.models.list()
    assert model.id == "nano"
    assert client.models.retrieve("nano").id == "nano"
    with pytest.raises(openai.NotFoundError, match="model 'other' is not here"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="'other' is not here: expected nano"):
        client.chat.completions.create(model="other", messages=QUESTION)


def test_tokenize(served, model):
    status, found, _ = served.ask("/tokenize", {"prompt": "Hello <|im_end|>"})
    assert (status, found["tokens"]) == (200, model.tokenizer.encode_without_added("Hello <|im_end|>"))
    status, found, _ = served.ask("/tokenize", {"messages": QUESTION})
    assert found["tokens"] == model.prompt(QUESTION).token_ids.tolist()
    assert found["count"] == len(found["tokens"])
    assert served.ask("/tokenize", {})[0] == 400


def test_32_at_once_are_answered_as_each_alone(served, model, nano_engine_bundle):
    wanted = requests(32)
    expected = alone(nano_engine_bundle, wanted, context_length=768)

    def content(part):
        return text_part(part["text"]) if part["type"] == "text" else picture_part(data_url(part["image"]))

    async def ask(client, request):
        sampling = request.sampling
        more = {"top_k": sampling.top_k, "repetition_penalty": sampling.repetition_penalty}
        completion = await client.chat.completions.create(
            model="nano",
            messages=[{"role": "user", "content": [content(part) for part in request.messages[0]["content"]]}],
            max_tokens=request.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            logprobs=True,
            extra_body=more,
        )
        return [bytes(token.bytes) for token in completion.choices[0].logprobs.content]

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, request) for request in wanted))

    ends = model.generation_config.eos_token_ids
    texts = [[model.tokenizer.token_bytes(token) for token in tokens if token not in ends] for tokens in expected]
    assert asyncio.run(all_of_them()) == texts
