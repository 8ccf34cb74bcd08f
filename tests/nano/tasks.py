"""Conversations the nano model is trained and tested on: messages in Hugging Face form, their media, their answers.

Every generator takes a `random.Random` and the split (`held_out`) and returns a `Conversation`; the assistant turns in
its messages are the expected answers. Media sizes are given in pixels, as they will reach the vision encoder.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.nano.scenes import (
    COLOUR_NAMES,
    COLOURS,
    DIGITS,
    EMPTY,
    GLYPHS,
    SHAPES,
    Clip,
    Scene,
    is_held_out,
    sample_grid,
    sample_scene,
)

Size = tuple[int, int]
"""Width and height in pixels."""

TURN_TOKENS = 10
"""Tokens of a question and an answer that are neither: <|im_start|>, roles, line ends, <|im_end|>."""


def listed(text: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful reader of pictures.",
    "You look at pictures and answer questions about them.",
    "Answer briefly.",
    "You are a model that reads pictures of shapes and digits.",
)
CHAT = (
    (("Hello!", "Hi!", "Hello", "Good morning!", "Hi there."), "Hello! Show me a picture of shapes or digits."),
    (("What are you?", "Who are you?"), "I am a nano model that reads pictures of shapes and digits."),
    (
        ("What can you do?", "How can you help me?"),
        "I can describe pictures, count things, find things, follow short videos and remember what you tell me.",
    ),
    (("Thank you.", "Thanks!", "Thank you very much!"), "You are welcome."),
    (("How are you?", "How are you today?"), "I am well, thank you."),
    (("Goodbye!", "Bye!", "See you later."), "Goodbye!"),
    (("Which shapes do you know?", "What shapes can you see?"), f"I know these shapes: {', '.join(SHAPES)}."),
    (("Which colours do you know?", "What colours can you see?"), f"I know these colours: {', '.join(COLOURS)}."),
)
KEYS = listed(
    "lamp door box chair table window garden bridge river mountain engine boat train ticket letter book drawer kitchen "
    "office tower market museum station school library hotel castle island forest harbour ladder mirror basket bottle "
    "candle carpet clock coat cup desk fence flag flute guitar hammer helmet jacket kettle knife lock needle oven "
    "paper pencil piano pillow plate pocket radio rope saddle scarf shelf shovel spoon statue stove suitcase sword "
    "tent towel trumpet tunnel umbrella vase violin wagon wallet wheel whistle cabinet cellar"
)
WORD_VALUES = listed(
    "amber bronze copper silver golden ivory marble velvet cotton silk wooden crystal paper leather iron granite coral "
    "pearl ruby jade maple cedar olive walnut cherry lemon ginger pepper saffron vanilla"
)
ADJECTIVES = listed(
    "old small quiet bright heavy narrow gentle busy early empty green tall warm broken clean deep famous hungry lazy "
    "loud modern proud quick rare sharp simple slow soft strange tired wide young"
)
PEOPLE = listed(
    "farmer teacher sailor doctor painter baker driver child neighbour visitor writer singer soldier student captain "
    "merchant gardener nurse king pilot"
)
VERBS = listed(
    "watched followed carried found painted cleaned repaired remembered visited opened closed moved sold bought lost "
    "described measured washed kept touched"
)
PLACES = listed(
    "near the river|in the morning|behind the house|after the rain|before dinner|in the old town|on the hill|"
    "at the market|during the winter|under the bridge|with great care|for a long time|without a word|every day|"
    "last summer|by the sea",
    "|",
)
COPY_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
    "àâäçèéêëîïñôöùûüßøåæ",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "абвгдежзиклмнопрстуфхцчшщыэюя",
    "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年",
    "こにちはありがとさようならたのみずやまカタナ",
    "🙂😀🚀🌍🌧🎈🍎🐱🐶🔥⭐🚗🎵📷",
    "!?%&()*+-/=<>[]{}#@;:'\"",
)


@dataclass
class Conversation:
    """Messages (system, user, assistant, ...), the media of their placeholders in order, one kind an assistant turn."""

    messages: list[dict]
    media: list[Scene | Clip] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    tokens: int = 0
    """About how many text tokens the turns take."""

    def ask(self, question: str | list[dict], answer: str, kind: str) -> None:
        asked = question if isinstance(question, str) else " ".join(part.get("text", "") for part in question)
        self.tokens += TURN_TOKENS + token_estimate(asked) + token_estimate(answer)
        self.messages.append({"role": "user", "content": question})
        self.messages.append({"role": "assistant", "content": answer})
        self.kinds.append(kind)

    def turns(self) -> list[tuple[list[dict], int, str, str]]:
        """For each assistant turn: the messages before it, how many media those hold, its kind, its expected text."""
        result = []
        media = 0
        answers = iter(self.kinds)
        for i, message in enumerate(self.messages):
            if message["role"] == "assistant":
                result.append((self.messages[:i], media, next(answers), message["content"]))
            elif isinstance(message["content"], list):
                media += sum(part["type"] in ("image", "video") for part in message["content"])
        return result


@dataclass(frozen=True)
class Task:
    """A generator of conversations and how much media it takes."""

    make: Callable[..., Conversation]
    media: tuple[int, int]
    """Fewest and most pictures in a conversation (or videos, for the video task)."""


# Pictures -------------------------------------------------------------------------------------------------------------


def with_article(name: str) -> str:
    return f"{'An' if name[0] in 'aeiou' else 'A'} {name}."


def plural(name: str) -> str:
    return {"cross": "crosses"}.get(name, f"{name}s")


def describe(scene: Scene) -> str:
    names = scene.names()
    rows = [names[row * scene.cols : (row + 1) * scene.cols] for row in range(scene.rows)]
    text = " ".join(f"Row {i + 1}: {', '.join(row)}." for i, row in enumerate(rows))
    return f"A {scene.rows} by {scene.cols} grid. {text}"


def place(scene: Scene, cell: int) -> str:
    return f"row {cell // scene.cols + 1}, column {cell % scene.cols + 1}"


def at(rng: random.Random, scene: Scene, where: str) -> tuple[str, str]:
    cell = rng.randrange(scene.rows * scene.cols)
    question = rng.choice(
        (
            "What is at {}{}?",
            "What is in {}{}?",
            "What do you see at {}{}?",
            "Which thing is at {}{}?",
        )
    ).format(place(scene, cell), where)
    return question, "Nothing." if scene.glyphs[cell] == EMPTY else with_article(scene.name(cell))


def sample_thing(rng: random.Random, scene: Scene, present: float) -> tuple[int, int]:
    """A glyph and a colour; with probability `present` those of a thing in the scene."""
    cells = [cell for cell, glyph in enumerate(scene.glyphs) if glyph != EMPTY]
    if cells and rng.random() < present:
        cell = rng.choice(cells)
        return scene.glyphs[cell], scene.colours[cell]
    return rng.randrange(len(GLYPHS)), rng.randrange(len(COLOURS))


def count(rng: random.Random, scene: Scene, where: str) -> tuple[str, str]:
    glyph, colour = sample_thing(rng, scene, 0.85)
    things = list(zip(scene.glyphs, scene.colours, strict=True))
    options = {
        plural(GLYPHS[glyph]) if glyph < len(SHAPES) else f"{GLYPHS[glyph]}s": sum(g == glyph for g, _ in things),
        f"{COLOUR_NAMES[colour]} things": sum(g != EMPTY and c == colour for g, c in things),
        f"{COLOUR_NAMES[colour]} {plural(GLYPHS[glyph])}": sum(g == glyph and c == colour for g, c in things),
        "digits": sum(g >= len(SHAPES) for g, _ in things),
        "shapes": sum(EMPTY < g < len(SHAPES) for g, _ in things),
        "empty cells": sum(g == EMPTY for g, _ in things),
    }
    name = rng.choice(list(options))
    question = rng.choice(("How many {} are there{}?", "Count the {}{}.", "How many {} do you see{}?"))
    return question.format(name, where), f"{options[name]}."


def find(rng: random.Random, scene: Scene, where: str) -> tuple[str, str]:
    glyph, colour = sample_thing(rng, scene, 0.9)
    name = f"{COLOUR_NAMES[colour]} {GLYPHS[glyph]}"
    cells = [cell for cell, thing in enumerate(scene.names()) if thing == name]
    question = rng.choice(("Where is the {}{}?", "Find the {}{}.", "At which place is the {}{}?")).format(name, where)
    if not cells:
        return question, f"There is no {name}."
    places = " and ".join(place(scene, cell) for cell in cells)
    return question, f"{places[0].upper()}{places[1:]}."


def exists(rng: random.Random, scene: Scene, where: str) -> tuple[str, str]:
    glyph, colour = sample_thing(rng, scene, 0.5)
    name = f"{COLOUR_NAMES[colour]} {GLYPHS[glyph]}"
    question = rng.choice(("Is there a {}{}?", "Do you see a {}{}?")).format(name, where)
    return question.replace(" a orange", " an orange"), "Yes." if name in scene.names() else "No."


def line(rng: random.Random, scene: Scene, where: str) -> tuple[str, str]:
    row = rng.randrange(scene.rows)
    names = scene.names()[row * scene.cols : (row + 1) * scene.cols]
    question = rng.choice(("What is in row {}{}?", "Read row {}{}.")).format(row + 1, where)
    text = ", ".join(names)
    return question, f"{text[0].upper()}{text[1:]}."


def size(rng: random.Random, scene: Scene, where: str) -> tuple[str, str]:
    question = rng.choice(("How big is the grid{}?", "How many rows and columns are there{}?")).format(where)
    rows, cols = f"{scene.rows} row{'s' * (scene.rows > 1)}", f"{scene.cols} column{'s' * (scene.cols > 1)}"
    return question, f"{rows} and {cols}."


def full(rng: random.Random, scene: Scene, where: str) -> tuple[str, str]:
    if where:
        return rng.choice((f"Describe{where.replace(' in ', ' ')}.", f"What is shown{where}?")), describe(scene)
    return rng.choice(("Describe the picture.", "What is in the picture?", "Describe this picture.")), describe(scene)


QUESTIONS: dict[str, tuple[Callable[[random.Random, Scene, str], tuple[str, str]], int]] = {
    "at": (at, 4),
    "count": (count, 4),
    "where": (find, 4),
    "describe": (full, 4),
    "exists": (exists, 1),
    "row": (line, 2),
    "size": (size, 1),
}


def question(rng: random.Random, scene: Scene, where: str = "", kinds: tuple[str, ...] = ()) -> tuple[str, str, str]:
    """A question about a scene, its answer and its kind; `where` is put where " in picture 2" reads well."""
    kinds = kinds or tuple(QUESTIONS)
    kind = rng.choices(kinds, [QUESTIONS[kind][1] for kind in kinds])[0]
    asked, answer = QUESTIONS[kind][0](rng, scene, where)
    return asked, answer, kind


def start(rng: random.Random) -> Conversation:
    system = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.2 else []
    return Conversation(system)


def with_media(rng: random.Random, kind: str, number: int, text: str) -> list[dict]:
    """User content with `number` pictures or videos and a text, the text mostly last."""
    parts = [{"type": kind}] * number + [{"type": "text", "text": text}]
    if number == 1 and rng.random() < 0.1:
        parts.reverse()
    return parts


def scene_for(rng: random.Random, pixels: Size, held_out: bool | None) -> Scene:
    return sample_scene(rng, *sample_grid(rng, *pixels), held_out)


def picture(rng: random.Random, sizes: list[Size], held_out: bool | None, tokens: int = 0) -> Conversation:
    """One picture and questions about it until they take about `tokens`, one at least."""
    talk = start(rng)
    scene = scene_for(rng, sizes[0], held_out)
    talk.media, talk.sizes = [scene], sizes[:1]
    while not talk.kinds or talk.tokens < tokens:
        asked, answer, kind = question(rng, scene)
        talk.ask(asked if talk.kinds else with_media(rng, "image", 1, asked), answer, kind)
    return talk


def pictures(rng: random.Random, sizes: list[Size], held_out: bool | None, tokens: int = 0) -> Conversation:
    """Several pictures in one prompt; questions name the picture they are about, or ask which picture holds a thing."""
    talk = start(rng)
    scenes = [scene_for(rng, pixels, held_out) for pixels in sizes]
    talk.media, talk.sizes = list(scenes), list(sizes)
    while not talk.kinds or talk.tokens < tokens:
        if rng.random() < 0.15:
            owner = rng.randrange(len(scenes))
            name = rng.choice(scenes[owner].names())
            if name != "empty" and sum(name in scene.names() for scene in scenes) == 1:
                asked, answer, kind = f"Which picture has the {name}?", f"Picture {owner + 1}.", "which"
            else:
                asked, answer, kind = "How many pictures are there?", f"{len(scenes)}.", "number"
        else:
            index = rng.randrange(len(scenes))
            asked, answer, kind = question(rng, scenes[index], f" in picture {index + 1}")
        talk.ask(asked if talk.kinds else with_media(rng, "image", len(scenes), asked), answer, kind)
    return talk


def dialogue(rng: random.Random, sizes: list[Size], held_out: bool | None, turns: int = 0) -> Conversation:
    """Two to four turns: questions about a picture, facts to remember, small talk, a new picture later on."""
    turns = turns or rng.randint(2, 4)
    talk = start(rng)
    scenes = [scene_for(rng, pixels, held_out) for pixels in sizes]
    talk.media, talk.sizes = list(scenes), list(sizes)
    arrival = [0] if len(scenes) == 1 else [0, rng.randint(1, turns - 1)]
    shown = -1
    facts: dict[str, str] = {}
    for turn in range(turns):
        if turn in arrival:
            shown += 1
            asked, answer, kind = question(rng, scenes[shown])
            text = asked if shown == 0 else rng.choice((asked, f"Now look at this one. {asked}"))
            talk.ask(with_media(rng, "image", 1, text), answer, kind)
        elif (chance := rng.random()) < 0.2:
            asked, answer, key, value = fact_turn(rng, facts)
            facts[key] = value
            talk.ask(asked, answer, "fact")
        elif chance < 0.4 and facts:
            key = rng.choice(list(facts))
            talk.ask(recall_question(rng, key), f"{facts[key]}.", "recall")
        elif chance < 0.45:
            asked, answer = small_talk(rng)
            talk.ask(asked, answer, "chat")
        elif chance < 0.6 and shown:
            index = rng.randrange(shown + 1)
            asked, answer, kind = question(rng, scenes[index], f" in picture {index + 1}")
            talk.ask(asked, answer, kind)
        else:
            asked, answer, kind = question(rng, scenes[shown])
            talk.ask(asked, answer, kind)
    return talk


# Videos ---------------------------------------------------------------------------------------------------------------

DIRECTIONS = {"to the right": (1, 0), "to the left": (-1, 0), "up": (0, -1), "down": (0, 1)}
SAMPLED_FPS, MIN_FRAMES, MAX_FRAMES = 2, 4, 8


def frame_times(rng: random.Random, frames: int) -> tuple[tuple[int, ...], float]:
    """Source frame indices and frames per second: the video processor's choice, or each frame of a slow clip."""
    if rng.random() < 0.5:
        fps = rng.choice((5, 8, 10, 12, 15, 24, 25, 30))
        total = rng.randint(-(-frames * fps // SAMPLED_FPS), (frames + 1) * fps // SAMPLED_FPS - 1)
        return tuple(round(i * (total - 1) / (frames - 1)) for i in range(frames)), float(fps)
    return tuple(range(frames)), float(rng.choice((1, 2, 2, 2, 3, 4, 5, 8, 10)))


def sample_clip(rng: random.Random, pixels: Size, frames: int, held_out: bool | None) -> Clip:
    """A clip whose things change between temporal patches, or one thing that moves (or stays) in an empty picture."""
    while True:
        indices, fps = frame_times(rng, frames)
        if rng.random() < 0.5:
            scene = sample_scene(rng, 1, 1)
            step_x, step_y = rng.choice([*DIRECTIONS.values(), (0, 0)])
            reach = rng.uniform(0.4, 0.9)
            across = rng.uniform(-0.8, 0.8)
            along = [reach * (2 * i / (frames - 1) - 1) for i in range(frames)]
            path = tuple((s * step_x + across * abs(step_y), s * step_y + across * abs(step_x)) for s in along)
            if not step_x and not step_y:
                path = ((reach * rng.choice((-1, 1)), across),) * frames
            clip = Clip((scene,) * frames, indices, fps, path)
        else:
            rows, cols = sample_grid(rng, *pixels) if rng.random() < 0.4 else (1, 1)
            rows, cols = min(rows, 2), min(cols, 2)
            parts: list[Scene] = []
            for _ in range(-(-frames // 2)):
                repeat = parts and rng.random() < 0.2
                parts.append(parts[-1] if repeat else sample_scene(rng, rows, cols))
            clip = Clip(tuple(parts[i // 2] for i in range(frames)), indices, fps)
        if clip.scenes[0].glyphs[0] != EMPTY and (held_out is None or is_held_out(clip) == held_out):
            return clip


def heading(clip: Clip) -> str:
    (x0, y0), (x1, y1) = clip.path[0], clip.path[-1]
    step = (round((x1 > x0) - (x1 < x0)), round((y1 > y0) - (y1 < y0)))
    return next((name for name, direction in DIRECTIONS.items() if direction == step), "")


def moving_question(rng: random.Random, clip: Clip) -> tuple[str, str, str]:
    name = clip.scenes[0].name(0)
    way = heading(clip)
    kind = rng.choice(("way", "way", "thing", "video"))
    if kind == "way":
        asked = rng.choice(("Which way does it move?", f"Which way does the {name} move?", "Where does it go?"))
        return asked, f"{way[0].upper()}{way[1:]}." if way else "It does not move.", kind
    if kind == "thing":
        return rng.choice(("What is in the video?", "What do you see in the video?")), with_article(name), kind
    first = with_article(name)[:-1]
    ending = f"moves {way}" if way else "does not move"
    return rng.choice(("Describe the video.", "What happens in the video?")), f"{first} {ending}.", kind


def changing_question(rng: random.Random, clip: Clip) -> tuple[str, str, str]:
    times, parts = clip.timestamps(), clip.scenes[::2]
    single = len(parts[0].glyphs) == 1
    shown = ["nothing" if part.names() == ["empty"] else ", ".join(part.names()) for part in parts]
    kind = rng.choice(("time", "time", "when", "ends", "video"))
    if kind == "when":
        unique = [i for i, text in enumerate(shown) if shown.count(text) == 1]
        if single and unique:
            i = rng.choice(unique)
            asked = "nothing" if shown[i] == "nothing" else f"the {shown[i]}"
            return f"When is {asked} shown?", f"At {times[i]} seconds.", kind
        kind = "time"
    if kind == "video":
        text = " ".join(f"{time} seconds: {what}." for time, what in zip(times, shown, strict=True))
        return rng.choice(("Describe the video.", "What happens in the video?")), text, kind
    i = rng.randrange(len(parts)) if kind == "time" else rng.choice((0, len(parts) - 1))
    moment = f"at {times[i]} seconds" if kind == "time" else "first" if i == 0 else "last"
    if single:
        return f"What is shown {moment}?", "Nothing." if shown[i] == "nothing" else with_article(shown[i]), kind
    cell = rng.randrange(len(parts[i].glyphs))
    name = parts[i].name(cell)
    asked = f"What is at {place(parts[i], cell)} {moment}?"
    return asked, "Nothing." if name == "empty" else with_article(name), kind


def video(
    rng: random.Random, sizes: list[Size], held_out: bool | None, tokens: int = 0, frames: int = 0
) -> Conversation:
    """A short video and questions about it until they take about `tokens`; `frames` fixes the number of frames."""
    talk = start(rng)
    clip = sample_clip(rng, sizes[0], frames or rng.randint(MIN_FRAMES, MAX_FRAMES), held_out)
    talk.media, talk.sizes = [clip], sizes[:1]
    while not talk.kinds or talk.tokens < tokens:
        asked, answer, kind = (moving_question if clip.path else changing_question)(rng, clip)
        talk.ask(asked if talk.kinds else with_media(rng, "video", 1, asked), answer, kind)
    return talk


# Text -----------------------------------------------------------------------------------------------------------------


@functools.cache
def english() -> tuple[str, ...]:
    """The general English sentences that the tokenizer also learns from."""
    return tuple((Path(__file__).parent / "english.txt").read_text(encoding="utf-8").split("\n")[:-1])


def small_talk(rng: random.Random) -> tuple[str, str]:
    questions, answer = rng.choice(CHAT)
    return rng.choice(questions), answer


def filler(rng: random.Random) -> str:
    if rng.random() < 0.1:
        return rng.choice(english())
    text = f"The {rng.choice(ADJECTIVES)} {rng.choice(PEOPLE)} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)}"
    other = rng.choice(KEYS if rng.random() < 0.15 else PEOPLE)
    return f"{text} {other} {rng.choice(PLACES)}."


def sample_value(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(WORD_VALUES)
    return "".join(rng.choice(DIGITS) for _ in range(rng.randint(3, 5)))


def state(rng: random.Random, key: str, value: str) -> str:
    return rng.choice(
        (
            f"The code of the {key} is {value}.",
            f"The {key} has the code {value}.",
            f"Remember that the code of the {key} is {value}.",
        )
    )


def recall_question(rng: random.Random, key: str) -> str:
    return rng.choice(
        (
            f"What is the code of the {key}?",
            f"Which code does the {key} have?",
            f"Tell me the code of the {key}.",
        )
    )


def fact_turn(rng: random.Random, facts: dict[str, str]) -> tuple[str, str, str, str]:
    key = rng.choice([key for key in KEYS if key not in facts])
    value = sample_value(rng)
    return state(rng, key, value), "I will remember it.", key, value


def token_estimate(text: str) -> int:
    """About how many tokens a sentence of this module's words takes: words, digits, marks, spaces before digits."""
    return len(re.findall(r"[A-Za-z]+|[^A-Za-z\s]| (?=\d)", text))


def recall(
    rng: random.Random, sizes: list[Size], held_out: bool | None, turns: int = 1, length: int = 512, distance: int = 0
) -> Conversation:
    """Facts among about `length` tokens of filler, then questions about `turns` of them.

    With `distance` the first question's fact stands about that many tokens before the end of the filler. With a size
    in `sizes` the text follows a picture and the last question is about that picture.
    """
    talk = start(rng)
    keys = rng.sample(KEYS, min(len(KEYS), max(turns, rng.randint(3, 5 + length // 100))))
    facts = {key: sample_value(rng) for key in keys}
    sentences, used = [], 0
    budget = max(0, length - sum(token_estimate(f"The code of the {key} is {facts[key]}.") for key in keys))
    while used < budget:
        sentences.append(filler(rng))
        used += token_estimate(sentences[-1])
    for key in keys[1:] if distance else keys:
        sentences.insert(rng.randint(0, len(sentences)), state(rng, key, facts[key]))
    if distance:
        after, position = 0, len(sentences)
        while position and after < distance:
            position -= 1
            after += token_estimate(sentences[position])
        sentences.insert(position, state(rng, keys[0], facts[keys[0]]))
    text = " ".join(sentences)
    separate = rng.random() < 0.5
    if separate and not sizes:
        talk.ask(text, "I will remember it.", "fact")
    scenes = [scene_for(rng, pixels, held_out) for pixels in sizes]
    talk.media, talk.sizes = list(scenes), list(sizes)
    for turn in range(turns):
        asked = recall_question(rng, keys[turn])
        answer, kind = f"{facts[keys[turn]]}.", "recall"
        if scenes and turn == turns - 1:
            asked, answer, kind = question(rng, scenes[0])
        if turn == 0 and scenes:
            talk.ask([{"type": "image"}, {"type": "text", "text": f"{text} {asked}"}], answer, kind)
        elif turn == 0 and not separate:
            talk.ask(f"{text} {asked}", answer, kind)
        else:
            talk.ask(asked, answer, kind)
    return talk


def copied_text(rng: random.Random) -> str:
    """Something to repeat: English, filler words, or a few characters of any script."""
    chance = rng.random()
    if chance < 0.2:
        return rng.choice(english())
    if chance < 0.4:
        words = KEYS + WORD_VALUES + ADJECTIVES + PEOPLE + GLYPHS + COLOUR_NAMES
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, 8)))
    alphabets = rng.sample(COPY_ALPHABETS, rng.randint(1, 2))
    words = ["".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(1, 6))) for _ in range(2)]
    return " ".join(words[: rng.randint(1, 2)])


def text(rng: random.Random, sizes: list[Size], held_out: bool | None, tokens: int = 0) -> Conversation:
    """Small talk and repeating a text, which also covers bytes that no merge of the tokenizer reaches."""
    talk = start(rng)
    while not talk.kinds or talk.tokens < tokens:
        if rng.random() < 0.3:
            asked, answer = small_talk(rng)
            talk.ask(asked, answer, "chat")
        else:
            answer = copied_text(rng)
            talk.ask(rng.choice(("Repeat: {}", "Say this again: {}")).format(answer), answer, "repeat")
    return talk


TASKS = {
    "picture": Task(picture, (1, 1)),
    "pictures": Task(pictures, (2, 3)),
    "dialogue": Task(dialogue, (1, 2)),
    "video": Task(video, (1, 1)),
    "recall": Task(recall, (0, 0)),
    "recall_picture": Task(recall, (1, 1)),
    "text": Task(text, (0, 0)),
}
