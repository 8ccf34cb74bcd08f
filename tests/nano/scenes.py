"""Scenes: a grid of coloured shapes and digits, its hash split, and the one renderer that draws it.

The renderer is plain PyTorch and works on a batch: training draws thousands of pictures a second with it on a GPU,
evaluation and tests draw single PNGs with it on a CPU.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from PIL import Image

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
DIGITS = tuple("0123456789")
GLYPHS = SHAPES + DIGITS
COLOURS = {
    "red": (218, 38, 38),
    "orange": (245, 138, 20),
    "yellow": (236, 206, 32),
    "green": (38, 160, 62),
    "cyan": (58, 200, 215),
    "blue": (40, 78, 222),
    "purple": (138, 58, 190),
    "pink": (245, 130, 192),
}
COLOUR_NAMES = tuple(COLOURS)
BACKGROUNDS = (
    (252, 252, 252),
    (232, 234, 236),
    (214, 214, 210),
    (12, 12, 14),
    (40, 42, 46),
    (18, 24, 42),
)
MAX_ROWS, MAX_COLS = 3, 4
MAX_CELLS = MAX_ROWS * MAX_COLS
EMPTY = -1
MIN_CELL = 32
"""Smallest cell side, in pixels, that a scene is drawn with."""
HELD_OUT_ONE_IN = 8
ATLAS_SIZE = 64
ATLAS_EXTENT = 1.15
"""The atlas covers [-1.15, 1.15] in glyph units (a glyph fits [-1, 1]), so edges are not cut."""


@dataclass(frozen=True)
class Scene:
    """A grid of things: row-major indices into GLYPHS (or EMPTY, with colour 0) and COLOUR_NAMES."""

    rows: int
    cols: int
    glyphs: tuple[int, ...]
    colours: tuple[int, ...]

    def name(self, cell: int) -> str:
        """The thing in a cell by name: "red circle", "blue 7" or "empty"."""
        glyph = self.glyphs[cell]
        return "empty" if glyph == EMPTY else f"{COLOUR_NAMES[self.colours[cell]]} {GLYPHS[glyph]}"

    def names(self) -> list[str]:
        return [self.name(cell) for cell in range(self.rows * self.cols)]

    def key(self) -> bytes:
        return bytes([self.rows, self.cols, *(glyph + 1 for glyph in self.glyphs), *self.colours])


@dataclass(frozen=True)
class Clip:
    """A short video: one scene a frame, the frames' indices in the source, the source's frames per second.

    `path` is set for a moving thing: its centre in each frame, x and y in [-1, 1] of the room it has.
    """

    scenes: tuple[Scene, ...]
    indices: tuple[int, ...]
    fps: float
    path: tuple[tuple[float, float], ...] | None = None

    def timestamps(self) -> list[str]:
        """One text a temporal patch (a pair of frames), as the Hugging Face processor writes it: "1.2"."""
        padded = self.indices + self.indices[-1:] * (len(self.indices) % 2)
        seconds = [index / self.fps for index in padded]
        return [f"{(seconds[i] + seconds[i + 1]) / 2:.1f}" for i in range(0, len(seconds), 2)]

    def key(self) -> bytes:
        return b"".join(scene.key() for scene in self.scenes)


def is_held_out(item: Scene | Clip) -> bool:
    """Whether an item belongs to the held-out eighth of all layouts. Training never draws one of these."""
    return zlib.crc32(item.key()) % HELD_OUT_ONE_IN == 0


def sample_scene(rng: random.Random, rows: int, cols: int, held_out: bool | None = None) -> Scene:
    """Draws a scene of the given grid; `held_out` picks the side of the split, None takes any."""
    while True:
        empty = rng.choice((0.0, 0.15, 0.4))
        glyphs = rng.sample(range(len(GLYPHS)), 2) if rng.random() < 0.4 else range(len(GLYPHS))
        colours = rng.sample(range(len(COLOURS)), 2) if rng.random() < 0.4 else range(len(COLOURS))
        cells = [
            (EMPTY, 0) if rng.random() < empty else (rng.choice(glyphs), rng.choice(colours))
            for _ in range(rows * cols)
        ]
        scene = Scene(rows, cols, tuple(glyph for glyph, _ in cells), tuple(colour for _, colour in cells))
        if held_out is None or is_held_out(scene) == held_out:
            return scene


def sample_grid(rng: random.Random, width: int, height: int, min_cell: int = MIN_CELL) -> tuple[int, int]:
    """Rows and columns whose cells are at least `min_cell` pixels at this picture size."""
    rows = rng.randint(1, max(1, min(MAX_ROWS, height // min_cell)))
    cols = rng.randint(1, max(1, min(MAX_COLS, width // min_cell)))
    return rows, cols


@dataclass(frozen=True)
class Drawing:
    """What the renderer needs for n pictures, as arrays whose first axis is n."""

    grid: np.ndarray  # [n, 2] rows, columns
    glyph: np.ndarray  # [n, MAX_CELLS] index into GLYPHS, EMPTY where nothing is drawn
    colour: np.ndarray  # [n, MAX_CELLS] index into COLOUR_NAMES
    rgb: np.ndarray  # [n, MAX_CELLS, 3] 0..255, about that colour
    shift: np.ndarray  # [n, MAX_CELLS, 2] x, y in [-1, 1] of the free room in the cell
    scale: np.ndarray  # [n, MAX_CELLS] glyph size, fraction of the cell's shorter side
    background: np.ndarray  # [n, 3]
    line: np.ndarray  # [n, 3] grid line colour
    line_width: np.ndarray  # [n] pixels, 0 for none
    noise: np.ndarray  # [n] standard deviation of pixel noise, 0..255 units

    def take(self, index: np.ndarray) -> Drawing:
        return Drawing(*(getattr(self, field.name)[index] for field in fields(self)))


def draw(scenes: list[Scene], rng: np.random.Generator) -> Drawing:
    """Picks everything about the pictures that the scene leaves open: background, jitter, exact colours, noise."""
    n = len(scenes)
    glyph = np.full((n, MAX_CELLS), EMPTY, np.int64)
    colour = np.zeros((n, MAX_CELLS), np.int64)
    for i, scene in enumerate(scenes):
        glyph[i, : len(scene.glyphs)] = scene.glyphs
        colour[i, : len(scene.colours)] = scene.colours
    palette = np.array(list(COLOURS.values()), np.float32)
    background = np.array(BACKGROUNDS, np.float32)[rng.integers(len(BACKGROUNDS), size=n)]
    dark = background.mean(1, keepdims=True) < 128
    contrast = rng.uniform(50, 110, (n, 1))
    return Drawing(
        grid=np.array([(scene.rows, scene.cols) for scene in scenes], np.int64),
        glyph=glyph,
        colour=colour,
        rgb=(palette[colour] + rng.uniform(-10, 10, (n, MAX_CELLS, 3))).clip(0, 255).astype(np.float32),
        shift=rng.uniform(-0.8, 0.8, (n, MAX_CELLS, 2)).astype(np.float32),
        scale=rng.uniform(0.62, 0.9, (n, MAX_CELLS)).astype(np.float32),
        background=(background + rng.uniform(-5, 5, (n, 3))).clip(0, 255).astype(np.float32),
        line=(background + np.where(dark, contrast, -contrast)).clip(0, 255).astype(np.float32),
        line_width=rng.uniform(1.0, 2.5, n).astype(np.float32),
        noise=(rng.uniform(0, 5, n) * (rng.random(n) < 0.5)).astype(np.float32),
    )


def draw_clips(clips: list[Clip], rng: np.random.Generator) -> Drawing:
    """Draws every frame of every clip, frames of a clip adjacent and alike in all but what the clip changes."""
    frames = [draw([clip.scenes[i] for clip in clips], rng) for i in range(len(clips[0].scenes))]
    base = frames[0]
    shift = np.stack([base.shift] * len(frames), 1)
    scale, line_width = base.scale.copy(), base.line_width.copy()
    for i, clip in enumerate(clips):
        if clip.path is not None:
            shift[i, :, 0] = np.array(clip.path, np.float32)
            scale[i] *= 0.5
            line_width[i] = 0
    flat = replace(base, scale=scale, line_width=line_width).take(np.repeat(np.arange(len(clips)), len(frames)))
    changing = {
        name: np.stack([getattr(frame, name) for frame in frames], 1).reshape(-1, *getattr(base, name).shape[1:])
        for name in ("glyph", "colour", "rgb")
    }
    return replace(flat, **changing, shift=shift.reshape(-1, MAX_CELLS, 2))


def put(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Copies an array to a device. Not through pinned memory: pinning costs more than the wait for a GPU that idles."""
    return torch.from_numpy(array).to(device)


def rasterise(
    drawing: Drawing, width: int, height: int, device: torch.device | str = "cpu", painter: Callable | None = None
) -> torch.Tensor:
    """Renders to [n, 3, height, width], float32 in 0..255, edges antialiased. Pixel noise is left to the caller.

    `painter` is `paint` or a compiled version of it.
    """
    rows, cols = put(drawing.grid, device).float()[:, :, None].unbind(1)  # [n, 1]
    y = (torch.arange(height, device=device) + 0.5) / height * rows  # [n, height], in cells
    x = (torch.arange(width, device=device) + 0.5) / width * cols
    cell_h, cell_w = height / rows, width / cols  # [n, 1], pixels
    half = put(drawing.scale, device) * torch.minimum(cell_h, cell_w) / 2  # [n, MAX_CELLS], pixels
    shift = put(drawing.shift, device)
    centre_x = cell_w / 2 + shift[..., 0] * (cell_w / 2 - half)
    centre_y = cell_h / 2 + shift[..., 1] * (cell_h / 2 - half)
    glyph = put(drawing.glyph, device)
    columns = [centre_x, centre_y, half, glyph.clamp(min=0).float(), (glyph != EMPTY).float()]
    cells = torch.cat([torch.stack(columns, -1), put(drawing.rgb, device)], -1)
    line_width = put(drawing.line_width, device)[:, None]
    pictures = torch.cat([cell_h, cell_w, line_width, put(drawing.background, device), put(drawing.line, device)], -1)
    return (painter or paint)(x, y, cols.long(), cells, pictures, atlas_on(torch.device(device)))


def paint(
    x: torch.Tensor,
    y: torch.Tensor,
    cols: torch.Tensor,
    cells: torch.Tensor,
    pictures: torch.Tensor,
    atlas: torch.Tensor,
) -> torch.Tensor:
    """The renderer's inner part, one value a pixel, so that a compiler can make one kernel of it.

    x [n, width], y [n, height]: pixel centres in cells; cols [n, 1]; cells [n, MAX_CELLS, 8]: centre x, centre y and
    half size in pixels, glyph, seen, red, green, blue; pictures [n, 9]: cell height and width in pixels, line width,
    background, line colour; atlas: glyph_atlas, flat. Returns [n, 3, height, width].
    """
    n = len(x)
    cell_h, cell_w, line_width = pictures[:, :3, None, None].unbind(1)  # [n, 1, 1]
    first = torch.arange(0, n * MAX_CELLS, MAX_CELLS, device=x.device)[:, None, None]
    cell = first + y.long()[:, :, None] * cols[:, :, None] + x.long()[:, None, :]  # [n, height, width]
    table = cells.flatten(0, 1)
    half, glyph = table[:, 2][cell], table[:, 3][cell].long()

    in_x = (x - x.floor())[:, None, :] * cell_w  # pixels from the cell's left edge
    in_y = (y - y.floor())[:, :, None] * cell_h
    u = (in_x - table[:, 0][cell]) / half / ATLAS_EXTENT
    v = (in_y - table[:, 1][cell]) / half / ATLAS_EXTENT
    s = ((u + 1) / 2 * (ATLAS_SIZE - 1)).clamp(0, ATLAS_SIZE - 1.001)
    t = ((v + 1) / 2 * (ATLAS_SIZE - 1)).clamp(0, ATLAS_SIZE - 1.001)
    corner = glyph * ATLAS_SIZE**2 + t.long() * ATLAS_SIZE + s.long()
    s, t = s - s.floor(), t - t.floor()
    upper = torch.lerp(atlas[corner], atlas[corner + 1], s)
    lower = torch.lerp(atlas[corner + ATLAS_SIZE], atlas[corner + ATLAS_SIZE + 1], s)
    distance = torch.lerp(upper, lower, t) * half  # pixels
    alpha = (0.5 - distance).clamp(0, 1) * table[:, 4][cell] * ((u.abs() < 1) & (v.abs() < 1))

    edge = torch.minimum(torch.minimum(in_x, cell_w - in_x), torch.minimum(in_y, cell_h - in_y))
    line = (line_width / 2 - edge + 0.5).clamp(0, 1) * (line_width > 0)
    channels = []
    for i in range(3):
        background, ink = pictures[:, 3 + i, None, None], pictures[:, 6 + i, None, None]
        channel = torch.lerp(background, ink, line)
        channels.append(torch.lerp(channel, table[:, 5 + i][cell], alpha))
    return torch.stack(channels, 1)


def to_pil(images: torch.Tensor, noise: np.ndarray, rng: np.random.Generator) -> list[Image.Image]:
    """Adds each picture's pixel noise and rounds to 8 bits: [n, 3, height, width] to n PIL pictures."""
    array = images.cpu().numpy()
    array = array + rng.standard_normal(array.shape, np.float32) * noise[:, None, None, None]
    array = array.round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]


def render(scene: Scene, width: int, height: int, seed: int = 0) -> Image.Image:
    """Renders one scene to an RGB picture; `seed` fixes background, jitter, colours and noise."""
    rng = np.random.default_rng(seed)
    drawing = draw([scene], rng)
    return to_pil(rasterise(drawing, width, height), drawing.noise, rng)[0]


def render_clip(clip: Clip, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Renders a clip to uint8 frames [num_frames, height, width, 3]."""
    rng = np.random.default_rng(seed)
    drawing = draw_clips([clip], rng)
    return np.stack([np.asarray(frame) for frame in to_pil(rasterise(drawing, width, height), drawing.noise, rng)])


@functools.cache
def atlas_on(device: torch.device) -> torch.Tensor:
    """The glyph atlas on a device, flat."""
    return torch.from_numpy(glyph_atlas()).to(device).flatten()


@functools.cache
def glyph_atlas() -> np.ndarray:
    """Signed distances [len(GLYPHS), ATLAS_SIZE, ATLAS_SIZE] in glyph units, negative inside; y points down."""
    axis = np.linspace(-ATLAS_EXTENT, ATLAS_EXTENT, ATLAS_SIZE)
    x, y = np.meshgrid(axis, axis)
    points = np.stack([x, y], -1)
    radius = np.hypot(x, y)
    corners = [(math.sin(math.tau * i / 10), -math.cos(math.tau * i / 10)) for i in range(10)]
    star = [(a * r, b * r) for (a, b), r in zip(corners, (1.0, 0.42) * 5, strict=True)]
    cross = [(-0.3, -0.9), (0.3, -0.9), (0.3, -0.3), (0.9, -0.3), (0.9, 0.3), (0.3, 0.3)]
    turns = np.linspace(0, math.tau, 48, endpoint=False)
    heart_x = 0.9 * np.sin(turns) ** 3
    heart_y = -(13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)) / 16.5
    shapes = {
        "circle": radius - 0.88,
        "square": polygon_distance(points, [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]),
        "triangle": polygon_distance(points, [(0, -0.92), (0.95, 0.8), (-0.95, 0.8)]),
        "diamond": polygon_distance(points, [(0, -0.98), (0.7, 0), (0, 0.98), (-0.7, 0)]),
        "star": polygon_distance(points, star),
        "cross": polygon_distance(points, cross + [(-a, -b) for a, b in cross]),
        "ring": np.abs(radius - 0.68) - 0.2,
        "heart": polygon_distance(points, list(zip(heart_x, heart_y, strict=True))),
    }
    digits = [stroke_distance(points, strokes) for strokes in digit_strokes()]
    return np.stack([shapes[name] for name in SHAPES] + digits).astype(np.float32)


def segment_distance(points: np.ndarray, start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    """Distance of points [..., 2] to a line segment."""
    a, b = np.array(start), np.array(end)
    along = ((points - a) @ (b - a) / max(float((b - a) @ (b - a)), 1e-9)).clip(0, 1)
    return np.linalg.norm(points - a - along[..., None] * (b - a), axis=-1)


def polygon_distance(points: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """Signed distance of points [..., 2] to a closed polygon, negative inside (even-odd rule)."""
    distance = np.full(points.shape[:-1], np.inf)
    inside = np.zeros(points.shape[:-1], bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        distance = np.minimum(distance, segment_distance(points, (ax, ay), (bx, by)))
        x, y = points[..., 0], points[..., 1]
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return np.where(inside, -distance, distance)


def stroke_distance(points: np.ndarray, strokes: list[list[tuple[float, float]]], radius: float = 0.16) -> np.ndarray:
    """Signed distance of points [..., 2] to pen strokes, each a chain of points."""
    segments = [pair for stroke in strokes for pair in itertools.pairwise(stroke)]
    return np.min([segment_distance(points, start, end) for start, end in segments], axis=0) - radius


def arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float) -> list[tuple[float, float]]:
    """Points of an elliptic arc; degrees, clockwise from the right because y points down."""
    angles = np.radians(np.linspace(start, end, 17))
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def digit_strokes() -> list[list[list[tuple[float, float]]]]:
    """Pen strokes of the digits 0 to 9."""
    six = [arc(0, 0.32, 0.46, 0.48, 0, 360), [(0.34, -0.8), (-0.1, -0.5), (-0.36, -0.1), (-0.46, 0.32)]]
    return [
        [arc(0, 0, 0.48, 0.8, 0, 360)],
        [[(-0.32, -0.5), (0.06, -0.8), (0.06, 0.8)], [(-0.32, 0.8), (0.44, 0.8)]],
        [[*arc(0, -0.36, 0.45, 0.44, -170, 35), (-0.46, 0.8), (0.48, 0.8)]],
        [arc(-0.04, -0.4, 0.42, 0.4, -150, 90), arc(-0.04, 0.4, 0.5, 0.4, -90, 150)],
        [[(0.22, 0.8), (0.22, -0.8), (-0.5, 0.35), (0.52, 0.35)]],
        [[(0.42, -0.8), (-0.36, -0.8), (-0.4, -0.1), *arc(-0.02, 0.3, 0.48, 0.5, -125, 140)]],
        six,
        [[(-0.48, -0.8), (0.48, -0.8), (-0.08, 0.8)]],
        [arc(0, -0.41, 0.38, 0.39, 0, 360), arc(0, 0.4, 0.47, 0.4, 0, 360)],
        [[(-a, -b) for a, b in stroke] for stroke in six],
    ]
