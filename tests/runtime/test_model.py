"""The model: what it streams and when it stops, with scripted tokens; that its cache changes nothing, with engines."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from pascalvl.engines import Engine, open_engine
from pascalvl.engines.validation import PREFILL_LOGITS, VISION_EMBEDS, decode_logits, vision_deepstack
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import GENERATION_CONFIG, POSITIONS, Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig, pages_of
from pascalvl.runtime import FinishReason, SamplingParams, VisionLanguageModel
from pascalvl.runtime.cli import main
from pascalvl.runtime.embeddings import EmbeddingTable
from pascalvl.runtime.model import PINNED_SLOTS, pinned_slots, token_identities
from pascalvl.runtime.positions import VisionPositions, vision_cu_seqlens, vision_rope_tables
from pascalvl.runtime.tokenizer import Tokenizer
from pascalvl.runtime.validation import trace
from pascalvl.runtime.video import Video
from tests.engines.torch_reference import scene

GREEDY = SamplingParams()
HELLO = [{"role": "user", "content": "Hello!"}]


class ScriptedEngine(Engine):
    """Answers every prompt with the tokens it was given, and counts how often the decoder runs.

    The second likeliest token is always the one with the next higher id.
    """

    def __init__(self, directory, token_ids):
        super().__init__(directory, Manifest.read(directory, "engine"))
        self.token_ids = list(token_ids)
        self.decoder_runs = 0

    def run(self, graph, feeds):
        assert graph == bindings.DECODER
        shapes = {"tokens": len(feeds[bindings.INPUTS_EMBEDS]), "rows": len(feeds[bindings.LOGIT_ROWS])}
        outputs = {
            binding.name: np.zeros([shapes.get(d, d) for d in binding.shape], binding.dtype)
            for binding in bindings.decoder_outputs(self.manifest.model, self.manifest.kv_cache)
        }
        token = self.token_ids[self.decoder_runs]
        outputs[bindings.LOGITS][0, token : token + 2] = [1.0, 0.5]
        self.decoder_runs += 1
        return outputs


def scripted(bundle, text, then=(), **options):
    """A model that will say ``text``, then the tokens ``then``."""
    ids = Tokenizer(bundle / "tokenizer.json").encode(text) if isinstance(text, str) else text
    engine = ScriptedEngine(bundle, [*ids, *then])
    return VisionLanguageModel(engine, options.get("context_length"), options.get("prefill_chunk", 512)), engine


# What is streamed, and when it ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Plain words.", "naïve 日本語 🙂🚀🌍 end", "a\n\n  b\t🐱", "👩‍👩‍👧 é́"])
def test_text_comes_in_whole_characters(nano_engine_bundle, text):
    model, engine = scripted(nano_engine_bundle, text)
    generation = model.generate(HELLO, GREEDY, max_new_tokens=len(engine.token_ids))
    pieces = list(generation)
    assert "".join(pieces) == generation.text == text
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    assert generation.finish_reason is FinishReason.LENGTH
    if not text.isascii():
        assert len(pieces) < len(engine.token_ids)


def test_half_a_character_at_the_end_is_left_out(nano_engine_bundle):
    ids = Tokenizer(nano_engine_bundle / "tokenizer.json").encode("ok ‱")
    model, _ = scripted(nano_engine_bundle, ids)
    assert "".join(model.generate(HELLO, GREEDY, max_new_tokens=len(ids) - 1)) in ("ok", "ok ")


def test_every_eos_token_ends_the_answer(nano_engine_bundle):
    config = json.loads((nano_engine_bundle / GENERATION_CONFIG).read_text())
    assert len(config["eos_token_id"]) > 1
    for eos in config["eos_token_id"]:
        model, engine = scripted(nano_engine_bundle, "Yes.", then=[eos, 5, 5, 5])
        generation = model.generate(HELLO, GREEDY)
        assert "".join(generation) == "Yes."
        assert generation.finish_reason is FinishReason.STOP
        assert generation.token_ids == engine.token_ids[:-3]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three four", ["three"], "one two "),
        ("one two three four", ["absent", "o t"], "one tw"),
        ("lamp lamp door", ["p d", "door"], "lamp lam"),
        ("🙂🚀🌍 end", ["🚀🌍"], "🙂"),
        ("one two", ["two and more"], "one two"),
    ],
)
def test_stop_strings_across_tokens(nano_engine_bundle, text, stop, expected):
    model, engine = scripted(nano_engine_bundle, text)
    generation = model.generate(HELLO, GREEDY, max_new_tokens=len(engine.token_ids), stop=stop)
    assert "".join(generation) == generation.text == expected
    assert generation.finish_reason is (FinishReason.LENGTH if expected == text else FinishReason.STOP)


def test_the_decoder_runs_once_a_token(nano_engine_bundle):
    model, engine = scripted(nano_engine_bundle, "one two three four five six")
    generation = model.generate(HELLO, GREEDY, max_new_tokens=4)
    list(generation)
    assert len(generation.token_ids) == engine.decoder_runs == 4


def test_generation_ends_where_the_context_does(nano_engine_bundle):
    model, _ = scripted(nano_engine_bundle, [7] * 40, context_length=30)
    generation = model.generate(HELLO, GREEDY)
    list(generation)
    assert generation.finish_reason is FinishReason.LENGTH
    assert generation.prompt_tokens + len(generation.token_ids) == 30


def test_settings_of_the_generation_config(nano_engine_bundle, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(nano_engine_bundle, bundle)
    config = json.loads((bundle / GENERATION_CONFIG).read_text())
    config |= {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 3.0, "max_new_tokens": 2}
    (bundle / GENERATION_CONFIG).write_text(json.dumps(config))
    model, _ = scripted(bundle, [700] * 3)
    assert not set(model.prompt(HELLO).token_ids) & {700, 701}
    generation = model.generate(HELLO)
    list(generation)
    assert generation.token_ids == [700, 701]  # once it was said, 700 is worth a third
    assert generation.finish_reason is FinishReason.LENGTH
    overruled = model.generate(HELLO, GREEDY, max_new_tokens=1)
    list(overruled)
    assert overruled.token_ids == [700]


def test_prompt_longer_than_the_context(nano_engine_bundle):
    model, engine = scripted(nano_engine_bundle, [7] * 9, context_length=8)
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, but the context holds 8 .* \(up to 8192\)"):
        model.generate(HELLO)
    assert engine.decoder_runs == 0


@pytest.mark.parametrize("context_length", [-1, 0, 1, 10**6])
def test_context_out_of_range(nano_engine_bundle, context_length):
    with pytest.raises(UserError, match=f"a context of {context_length} tokens is out of range: expected 2 to 8192"):
        scripted(nano_engine_bundle, [7], context_length=context_length)


def test_limits_out_of_range(nano_engine_bundle):
    model, _ = scripted(nano_engine_bundle, [7])
    with pytest.raises(UserError, match="max_new_tokens is out of range: expected at least 1, found 0"):
        model.generate(HELLO, max_new_tokens=0)
    for logprobs in (-1, 21, True, 1.0):
        with pytest.raises(UserError, match="logprobs is out of range: expected 0 to 20, found"):
            model.generate(HELLO, logprobs=logprobs)
    with pytest.raises(UserError, match="stop string is empty"):
        model.generate(HELLO, stop=[""])
    with pytest.raises(UserError, match="prefill chunk of 0 tokens"):
        scripted(nano_engine_bundle, [7], prefill_chunk=0)


def test_tools_and_variables_reach_the_template(nano_engine_bundle):
    model, _ = scripted(nano_engine_bundle, [7])
    whole = model.generate(HELLO).prompt_tokens
    given = {"template_variables": {"add_generation_prompt": False}}
    assert model.generate(HELLO, **given).prompt_tokens == len(model.prompt(HELLO, **given).token_ids) < whole
    for take in (model.generate, model.prompt, model.keep_prefix):
        with pytest.raises(UserError, match="expected tools as a list of JSON schemas, found 'look'"):
            take(HELLO, tools="look")
        with pytest.raises(UserError, match="expected a template's variables by their names, found 3"):
            take(HELLO, template_variables=3)


# What the cache may not change ----------------------------------------------------------------------------------------


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def user(*content):
    kinds = {str: "text", Video: "video", Image.Image: "image"}
    return {"role": "user", "content": [{"type": kinds[type(c)], kinds[type(c)]: c} for c in content]}


def assistant(text):
    return {"role": "assistant", "content": text}


CLIP = Video([picture(96, 64, seed) for seed in range(6)], 3.0)
FIRST = [user(picture(200, 100), "Describe the picture.")]
CONVERSATIONS = {
    "text": [user(" ".join(f"The code of lamp {i} is {7 * i}." for i in range(40)) + " What is the code of lamp 3?")],
    "picture": FIRST,
    "pictures": [user(picture(64, 256), "and", picture(200, 100), "and", picture(77, 80, 1), "Which is larger?")],
    "video": [user(CLIP, "What happens?")],
    "mixed turns": [*FIRST, assistant("A red star 🙂."), user(CLIP, picture(90, 90, 2), "And here?")],
}


def fresh(bundle, **options):
    return VisionLanguageModel.open(bundle, **options)


def answer(model, messages, tokens=12):
    generation = model.generate(messages, GREEDY, tokens)
    text = "".join(generation)
    assert text == generation.text
    return generation


@pytest.fixture(scope="module")
def expected(nano_engine_bundle):
    """Answers of a model that has seen nothing before."""
    return {name: answer(fresh(nano_engine_bundle), messages) for name, messages in CONVERSATIONS.items()}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("prefill_chunk", [1, 7, 64])
def test_chunked_prefill_equals_one_shot(nano_engine_bundle, expected, name, prefill_chunk):
    one_shot, chunked = fresh(nano_engine_bundle), fresh(nano_engine_bundle, prefill_chunk=prefill_chunk)
    messages = CONVERSATIONS[name]
    assert answer(chunked, messages).token_ids == expected[name].token_ids
    logits = [trace(model, messages, [])[PREFILL_LOGITS] for model in (one_shot, chunked)]
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-4 * np.abs(logits[0]).max())


def test_order_of_prompts_changes_nothing(nano_engine_bundle, expected):
    model = fresh(nano_engine_bundle)
    for name in [*CONVERSATIONS, *reversed(CONVERSATIONS)]:
        assert answer(model, CONVERSATIONS[name]).token_ids == expected[name].token_ids


def _count_runs(monkeypatch, model):
    counts = {bindings.VISION: 0, bindings.DECODER: 0}
    run = model.engine.run

    def counting(graph, feeds):
        counts[graph] += 1
        return run(graph, feeds)

    monkeypatch.setattr(model.engine, "run", counting)
    return counts


def test_a_conversation_is_continued_from_the_cache(nano_engine_bundle, monkeypatch):
    model = fresh(nano_engine_bundle)
    counts = _count_runs(monkeypatch, model)
    messages = list(FIRST)
    before = 0
    for question in ("Where is it?", "How many are there?", "Thank you."):
        generation = answer(model, messages)
        assert generation.token_ids == answer(fresh(nano_engine_bundle), messages).token_ids
        assert generation.reused_tokens >= before
        before = generation.prompt_tokens
        messages += [assistant(generation.text), user(question)]
    assert counts[bindings.VISION] == 1
    assert generation.reused_tokens > 0


def test_the_same_prompt_again_runs_one_token(nano_engine_bundle, expected, monkeypatch):
    model = fresh(nano_engine_bundle, prefill_chunk=1)
    answer(model, CONVERSATIONS["pictures"])
    counts = _count_runs(monkeypatch, model)
    generation = answer(model, CONVERSATIONS["pictures"], tokens=1)
    assert generation.reused_tokens == generation.prompt_tokens - 1
    assert counts == {bindings.VISION: 0, bindings.DECODER: 1}
    assert generation.token_ids == expected["pictures"].token_ids[:1]


@pytest.mark.parametrize("kv", ["f32", "k8v8", "k8v4"])
def test_a_second_question_skips_the_picture(kv, nano_engine, monkeypatch):
    """Vision and the shared prefix, whatever was asked between.

    The picture is one that the checkpoint is sure of: a new prompt meets itself exactly, a reused one as it was kept.
    """
    bundle = nano_engine(kv)
    grid = scene(3, 200, 133)
    first, second = ([user(grid, text)] for text in ("Describe the picture.", "How many squares are there?"))
    expected = answer(fresh(bundle), second)
    model = fresh(bundle)
    model.keep_prefix(first)
    between = answer(model, CONVERSATIONS["pictures"])
    counts = _count_runs(monkeypatch, model)
    generation = answer(model, second)
    visual = model.prompt(second).visuals[0].token_indices
    assert generation.reused_tokens > visual[-1]
    assert counts[bindings.VISION] == 0
    assert generation.vision_seconds < expected.vision_seconds
    assert generation.token_ids == expected.token_ids
    assert answer(model, CONVERSATIONS["pictures"]).token_ids == between.token_ids


@pytest.mark.parametrize("kv", ["f32", "k8v4", "k8v4,window=64+600"])
def test_a_cache_outlives_the_process(kv, nano_engine, tmp_path, monkeypatch):
    """A prefix that ends in a picture is found again by other questions about it."""
    cache, options = CacheConfig.parse(kv), {"cache_folder": tmp_path / "cache"}
    bundle = nano_engine(kv.partition(",")[0])
    model = fresh(bundle, cache=cache, **options)
    first = answer(model, FIRST)
    model.save_cache()
    more = [*FIRST, assistant(first.text), user("Which shapes are red?")]
    other = [user(*(part[part["type"]] for part in FIRST[0]["content"][:-1]), "How many shapes are there?")]
    expected = [answer(fresh(bundle, cache=cache), messages).token_ids for messages in (more, other)]
    model = fresh(bundle, cache=cache, **options)
    counts = _count_runs(monkeypatch, model)
    generations = [answer(model, messages) for messages in (more, other)]
    assert generations[0].reused_tokens >= first.prompt_tokens
    assert generations[1].reused_tokens > model.prompt(FIRST).visuals[-1].token_indices[-1]
    assert counts[bindings.VISION] == 0
    assert [generation.token_ids for generation in generations] == expected
    assert answer(fresh(nano_engine("f16"), **options), more).reused_tokens == 0


def test_what_a_window_has_dropped_cannot_be_kept(nano_engine_bundle, tmp_path):
    model = fresh(nano_engine_bundle, cache=CacheConfig.parse("f32,window=4+16"), cache_folder=tmp_path)
    answer(model, FIRST)
    model.save_cache()
    with pytest.raises(UserError, match="longer than the KV cache's window: shorten them"):
        model.keep_prefix(FIRST)
    assert not list(tmp_path.iterdir())


def test_bytes_are_those_foretold(nano_engine):
    for kv in ("f32", "k8v4", "k4v4", "k8v4,window=64+512,pin=image"):
        engine = open_engine(nano_engine(kv))
        for context_length in (2, PAGE_SLOTS, PAGE_SLOTS + 1, 2000):
            model = VisionLanguageModel(engine, context_length, 512)
            pinned = PINNED_SLOTS if model.cache_config.pin_images else 0
            slots = model.cache_config.slots(context_length, pinned)
            per_page = PAGE_SLOTS * model.cache_config.bytes_per_token(model.config.text)
            assert model._session.nbytes == model.cache_config.nbytes(model.config.text, context_length, pinned)
            assert 0 <= model._session.nbytes - slots * per_page // PAGE_SLOTS < per_page


def _inspected(capsys, *options):
    """Cells of the last row of both of `pascalvl inspect`'s tables: gigabytes and longest contexts, by the headings."""
    assert main(["inspect", *options]) == 0
    rows = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("│", "┃"))
    ]
    memory, first, fitting, second = rows
    return dict(zip(memory[2:], first[2:], strict=True)), dict(zip(fitting[1:], second[1:], strict=True))


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
@pytest.mark.parametrize("kv", ["f32", "k8v4", "k8v4,window=64+512", "k8v4,window=64+512,pin=image"])
def test_memory_is_as_inspect_tells(kv, backend, nano_engine, capsys):
    """Of the contexts that it names, and up to the longest one that fits in a card's memory: of whole pages."""
    bundle = nano_engine(kv, backend)
    manifest = Manifest.read(bundle, "engine")
    text, weights = manifest.model.text, manifest.weight_bytes(*manifest.graphs)
    page = PAGE_SLOTS * manifest.kv_cache.bytes_per_token(text)
    pages = pages_of(manifest.kv_cache.slots(text.max_position_embeddings, pinned_slots(manifest.kv_cache)))
    rooms = {page - 1: "none", page: str(PAGE_SLOTS), 3 * page - 1: str(2 * PAGE_SLOTS)}
    if manifest.kv_cache.window:
        rooms = {page - 1: "none", page: str(PAGE_SLOTS), pages * page - 1: str((pages - 1) * PAGE_SLOTS)}
    rooms[pages * page] = f"{text.max_position_embeddings} (all)"
    engine = open_engine(bundle)

    def nbytes(context_length):
        return VisionLanguageModel(engine, context_length, 512)._session.nbytes

    gigabytes, _ = _inspected(capsys, str(bundle))
    for length, told in gigabytes.items():
        assert f"{nbytes(int(length)) / 1e9:.3f}" == told
    for room, longest in rooms.items():
        _, fitting = _inspected(capsys, str(bundle), "--memory", f"{(weights + room) / 1e9:.12f}")
        assert list(fitting.values()) == [longest]
        if longest[0].isdigit():
            assert nbytes(int(longest.split()[0])) <= room
        if longest.isdigit():
            assert nbytes(int(longest) + 1) > room


def test_more_pictures_than_can_be_pinned(nano_engine_bundle, monkeypatch):
    """What is told is the room that there is, of whole pages."""
    monkeypatch.setattr("pascalvl.runtime.model.PINNED_SLOTS", 40)
    model = fresh(nano_engine_bundle, cache=CacheConfig.parse("f32,window=4+16,pin=image"))
    room = PAGE_SLOTS - (4 + 15)
    fits, does_not = (
        [user(picture(32 * 9, 32 * 6), picture(32 * width, 32 * height), "What is it?")]
        for width, height in ((11, 5), (8, 7))
    )
    tokens = [sum(len(visual.token_indices) for visual in model.prompt(m).visuals) for m in (fits, does_not)]
    assert tokens == [room, room + 1]
    assert answer(model, fits).token_ids
    with pytest.raises(
        UserError, match=rf"pictures have 110 tokens, more than the KV cache has room for .* \({room}\)"
    ):
        answer(model, does_not)


@pytest.mark.parametrize("kv", ["f16", "f32,layer.0=f16", "f32,rv=64"])
def test_another_cache_than_the_engines_are_for(kv, nano_engine_bundle):
    with pytest.raises(UserError, match="is not what these engines were built for"):
        fresh(nano_engine_bundle, cache=CacheConfig.parse(kv))


def test_another_picture_of_the_same_size_is_not_reused(nano_engine_bundle):
    model = fresh(nano_engine_bundle)
    answer(model, FIRST)
    other = [user(picture(200, 100, seed=9), "Describe the picture.")]
    generation = answer(model, other)
    first_visual = model.prompt(other).visuals[0].token_indices[0]
    assert generation.reused_tokens == first_visual
    assert generation.token_ids == answer(fresh(nano_engine_bundle), other).token_ids


def test_an_unfinished_answer_leaves_nothing_behind(nano_engine_bundle, expected):
    model = fresh(nano_engine_bundle)
    abandoned = model.generate(CONVERSATIONS["video"], GREEDY)
    next(iter(abandoned))
    never_started = model.generate(CONVERSATIONS["text"], GREEDY)
    abandoned.pieces.close()
    never_started.pieces.close()
    assert list(abandoned) == list(never_started) == []
    assert answer(model, CONVERSATIONS["picture"]).token_ids == expected["picture"].token_ids
    assert abandoned.finish_reason is never_started.finish_reason is None


def test_answers_in_turn(nano_engine_bundle, expected):
    """Whichever is asked for its next piece, all go on; what is asked between them too."""
    model = fresh(nano_engine_bundle)
    names = "video", "text", "pictures"
    generations = {name: model.generate(CONVERSATIONS[name], GREEDY, 12) for name in names}
    for _ in range(3):
        for generation in generations.values():
            next(generation.pieces, None)
    assert answer(model, CONVERSATIONS["mixed turns"]).token_ids == expected["mixed turns"].token_ids
    for name, generation in generations.items():
        for _ in generation:
            pass
        assert generation.token_ids == expected[name].token_ids


@pytest.mark.parametrize("runs", [0, 1, 3, 4, 5, 6, 7, 14])
def test_an_interrupted_answer_leaves_nothing_behind(nano_engine_bundle, expected, monkeypatch, runs):
    """Wherever in vision, prefill (in the middle of a picture too) or decode Ctrl-C comes."""
    model = fresh(nano_engine_bundle, prefill_chunk=16)
    endless = dataclasses.replace(model.generation_config, eos_token_ids=frozenset())
    run, left = model.engine.run, runs

    def interrupted(graph, feeds):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return run(graph, feeds)

    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "run", interrupted)
        patch.setattr(model, "generation_config", endless)
        with pytest.raises(KeyboardInterrupt):
            list(model.generate(CONVERSATIONS["pictures"], GREEDY, 40))
    for name in ("pictures", "text"):
        assert answer(model, CONVERSATIONS[name]).token_ids == expected[name].token_ids


def test_a_refused_prompt_leaves_the_cache_alone(nano_engine_bundle):
    model = fresh(nano_engine_bundle)
    generation = answer(model, FIRST)
    with pytest.raises(UserError):
        model.generate([user("word " * 20_000)])
    assert answer(model, FIRST).reused_tokens == generation.prompt_tokens - 1


def test_float16_cache_is_near_float32(nano_engine):
    full, half = (
        trace(fresh(bundle, prefill_chunk=16), CONVERSATIONS["mixed turns"], [5, 6, 7])
        for bundle in (nano_engine("f32"), nano_engine("f16"))
    )
    for name in (PREFILL_LOGITS, decode_logits(0), decode_logits(2)):
        error = np.abs(full[name] - half[name]).max() / np.abs(full[name]).max()
        assert 0 < error < 5e-3  # rounding by 2^-11 in every layer


# Sampling, tracing, inputs --------------------------------------------------------------------------------------------


def test_sampled_answers_depend_on_the_seed_alone(nano_engine_bundle):
    model = fresh(nano_engine_bundle)

    def sample(seed):
        generation = model.generate(FIRST, SamplingParams(temperature=3.0, seed=seed), 20)
        list(generation)
        return generation.token_ids

    first = sample(1)
    assert sample(2) != first
    assert sample(1) == first


def test_trace_follows_the_greedy_answer(nano_engine_bundle, expected):
    model = fresh(nano_engine_bundle)
    forced = expected["mixed turns"].token_ids
    traced = trace(model, CONVERSATIONS["mixed turns"], forced)
    logits = [traced[PREFILL_LOGITS], *(traced[decode_logits(step)] for step in range(len(forced)))]
    assert [int(step.argmax()) for step in logits[:-1]] == forced
    tokens = sum(len(visual.token_indices) for visual in model.prompt(CONVERSATIONS["mixed turns"]).visuals)
    hidden_size = model.config.text.hidden_size
    assert traced[VISION_EMBEDS].shape == traced[vision_deepstack(2)].shape == (tokens, hidden_size)


def test_trace_of_marked_layers(nano_engine_bundle):
    model = fresh(nano_engine_bundle, marked_layers=True, prefill_chunk=16)
    traced = trace(model, FIRST, [])
    hidden = [value for name, value in traced.items() if name.startswith("prefill.hidden_states")]
    assert len(hidden) == model.config.text.num_hidden_layers
    length = len(model.prompt(FIRST).token_ids)
    assert all(value.shape == (length, model.config.text.hidden_size) for value in hidden)


def test_frames_of_a_video_are_encoded_alone(nano_engine_bundle):
    """One temporal patch a call gives what all of them packed into one call give."""
    model = fresh(nano_engine_bundle)
    patches = model.prompt(CONVERSATIONS["video"]).visuals[0].patches
    assert patches.grid[0] > 1
    features = model.steps.encode(model.engine, patches)
    table = EmbeddingTable(nano_engine_bundle / POSITIONS, **model.manifest.position_embeddings)
    cos, sin = vision_rope_tables(patches.grid, model.config.vision)
    packed = open_engine(nano_engine_bundle).run(
        bindings.VISION,
        {
            bindings.PIXEL_VALUES: patches.pixel_values,
            bindings.POSITION_EMBEDS: VisionPositions(table, model.config.vision)(patches.grid),
            bindings.ROPE_COS: cos,
            bindings.ROPE_SIN: sin,
            bindings.CU_SEQLENS: vision_cu_seqlens(patches.grid),
        },
    )
    np.testing.assert_allclose(features.embeds, packed[bindings.IMAGE_EMBEDS], rtol=0, atol=1e-4)
    np.testing.assert_allclose(features.levels, packed[bindings.DEEPSTACK_EMBEDS], rtol=0, atol=1e-4)


def test_identities(nano_engine_bundle):
    model = fresh(nano_engine_bundle)
    prompt = model.prompt(CONVERSATIONS["pictures"])
    identities = token_identities(prompt)
    of_visual = np.concatenate([visual.token_indices for visual in prompt.visuals])
    is_text = np.ones(len(identities), bool)
    is_text[of_visual] = False
    np.testing.assert_array_equal(identities[is_text], prompt.token_ids[is_text])
    assert (identities[of_visual] < 0).all()
    assert len(set(identities[of_visual].tolist())) == len(of_visual)
