"""What a compressed KV cache does to a model's answers, format by format, against the float32 cache of the same model.

Conversations are run through Hugging Face's model in one pass each, every token's true continuation given (teacher
forcing), with an attention that reads what a cache would hold instead of the exact keys and values: a token sees every
earlier one, and itself, as the cache gives it back, whatever the chunks that a prompt comes in. An answer is right
where each of its tokens is the likeliest one, which is where greedy decoding would give exactly that answer.

Queries meet quantised keys as in the kernels, quantised to int8 after the same rotation; llama.cpp's formats are met by
exact queries, which is kinder than its kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AttentionInterface, Qwen3VLForConditionalGeneration
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from pascalvl.export import kv_times
from pascalvl.export.calibration import quiet
from pascalvl.export.checkpoint import Checkpoint, load_model, model_inputs
from pascalvl.export.evaluation import EvaluationPrompt, Figures, Summary, compare, summary
from pascalvl.export.quantised_weights import stored_config, stored_values
from pascalvl.export.transforms import LayerStatistics, LayerTransform, plan_transforms
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig, KVFormat, LayerLayout, RowFormat
from pascalvl.plugins.kv_rows import compress, expand, hadamard
from pascalvl.plugins.model_config import TextConfig
from pascalvl.plugins.prompt import Prompt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_ATTN_IMPLEMENTATION = "pascalvl_kv_evaluation"
_QUERY_TILE = 512
_BLOCK = 32
"""Elements that share a scale in llama.cpp's formats."""
_MARKERS = {"llama.cpp": ("s", "llama.cpp"), "int": ("x", "parts of PascalVL"), "": ("o", "PascalVL")}
"""Of a plot's points, and what the legend says of them, by what a name begins with."""
DEFAULT_FORMATS = ("f16", "k8v8", "k8v4", "k4v4", "k4v4,rv=96")


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What queries meet, float32 ``[heads, n, dim]``: scores are ``q @ k``, outputs weighted sums of ``v``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


Compression = Callable[[int, Seen], Seen]
"""Of a layer's number and its exact states: what comes back from the cache, and the queries that meet it."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A way to keep keys and values."""

    name: str
    row_bytes: float
    """Of a token's key and value of one head."""
    compression: Compression | None
    """None: float32."""
    layouts: Sequence[LayerLayout] = ()
    """Of the layers, where the kernels have it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(Summary):
    """One scheme's figures."""

    name: str
    bytes_per_token: float
    """Of a KV head."""
    model_bytes_per_token: float
    """Of all layers and KV heads."""
    append_us: float | None = None
    """To store a token in all layers; None: no kernel, or no GPU."""
    decode_us: float | None = None
    """Of a decode step's attention in all layers over `kv_times.LENGTH` tokens; None as above."""


def evaluate(
    checkpoint: Path,
    prompts: Sequence[EvaluationPrompt],
    formats: Sequence[CacheConfig],
    statistics: Sequence[LayerStatistics] | None = None,
    baselines: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Measure cache formats on conversations, one after the other, float32 first.

    Args:
        checkpoint: folder of the Hugging Face model; it is run in float32 on the CPU.
        prompts: the conversations.
        formats: what to measure, without ``window``.
        statistics: of a calibration, for the formats' transforms; None: what the weights tell.
        baselines: measure llama.cpp's formats too, and ours without balance or rotation.
        progress: called after each pass, of which each format has one for each conversation.

    Yields:
        Each format's figures.

    Raises:
        UserError: no conversations, or formats that the model cannot have.
    """
    if not prompts:
        raise UserError("there is nothing to evaluate: give a folder of prompts.")
    for cache in formats:
        if cache.window:
            raise UserError(
                f"the KV cache {cache} cannot be evaluated: every token is seen here. Leave window and pin out."
            )
    with Checkpoint(checkpoint) as opened:
        text = opened.model_config().text
        kept_values = stored_values(opened, stored_config(opened, text), text)
        schemes = [Scheme("exact", 8 * text.head_dim, None, CacheConfig(KVFormat.F32).layers(text))]
        for cache in dict.fromkeys(formats):
            schemes.append(
                _scheme(str(cache), cache, text, plan_transforms(opened, text, cache, statistics, kept_values))
            )
        if baselines:
            plain = plan_transforms(opened, text, CacheConfig(), statistics)
            schemes += _baselines(text, plain)
    model = load(checkpoint)
    exact = [_run(model, prompt, None) for prompt in prompts]
    heads = text.num_hidden_layers * text.num_key_value_heads
    for scheme in schemes:
        append_us = decode_us = None
        if scheme.layouts and torch.cuda.is_available():
            append_us, decode_us = kv_times.measure(scheme.layouts, text.num_attention_heads)
        found: list[Figures] = []
        for prompt, states in zip(prompts, exact, strict=True):
            hidden = _run(model, prompt, scheme.compression) if scheme.compression else states
            logits = (lambda at, of=of: model.lm_head(of[at]) for of in (states, hidden))
            found.append(compare(prompt, prompt.positions(model.config), *logits))
            progress()
        yield Result(
            name=scheme.name,
            bytes_per_token=scheme.row_bytes,
            model_bytes_per_token=scheme.row_bytes * heads,
            append_us=append_us,
            decode_us=decode_us,
            **summary(prompts, found, model.config),
        )


def count_schemes(formats: Sequence[CacheConfig], baselines: bool) -> int:
    """How many `evaluate` measures, in a pass for each conversation."""
    return 1 + len(set(formats)) + (len(_ABLATION) + len(_LLAMA_CPP) if baselines else 0)


def load(checkpoint: Path) -> Qwen3VLForConditionalGeneration:
    """Hugging Face's model with this module's attention in its text layers."""
    with quiet():
        model = load_model(checkpoint)
    model.model.language_model.config._attn_implementation = _ATTN_IMPLEMENTATION
    _set(model, None)
    return model


def greedy_answer(
    model: Qwen3VLForConditionalGeneration, prompt: Prompt, eos_token_ids: frozenset[int], longest: int
) -> np.ndarray:
    """What the model itself answers, with a float32 cache: int64 ``[n]``, up to ``longest`` tokens."""
    _set(model, None)
    tokens = list(prompt.token_ids)
    inputs = model_inputs(model, prompt)
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < longest and (not answer or answer[-1] not in eos_token_ids):
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
            answer.append(int(model.lm_head(hidden[0, -1]).argmax()))
            extended = dataclasses.replace(prompt, token_ids=np.array([*tokens, *answer]))
            inputs = model_inputs(model, extended)
    return np.array(answer)


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw mean KL divergence against bytes a token, ``path`` a PNG; formats without divergence have no place there."""
    drawing(results).savefig(path, format="png", bbox_inches="tight")


def drawing(results: Sequence[Result]) -> Figure:
    """What `plot` draws; names cover neither points nor each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [r for r in results if r.kl > 0]
    kinds = [next(kind for kind in _MARKERS if r.name.startswith(kind)) for r in points]
    for kind, (marker, label) in _MARKERS.items():
        if of_kind := [r for r, found in zip(points, kinds, strict=True) if found == kind]:
            axes.plot([r.bytes_per_token for r in of_kind], [r.kl for r in of_kind], marker, label=label)
    axes.set_title(f"KV caches: divergence by size, over {results[0].positions:,} positions of text")
    axes.set(xlabel="bytes a token and KV head", ylabel="mean KL divergence from float32, nats", yscale="log")
    axes.grid(which="both", alpha=0.3)
    axes.margins(0.12)
    if points:
        legend = axes.legend(loc="upper right")
        figure.draw_without_rendering()
        _write_names(axes, points, legend.get_window_extent())
    return figure


def _write_names(axes: Axes, points: Sequence[Result], legend: Bbox) -> None:
    """Write each name as near to its point as it covers nothing."""
    from matplotlib.transforms import Bbox

    scale = axes.figure.dpi / 72  # pixels of a typographic point
    centres = [axes.transData.transform((r.bytes_per_token, r.kl)) for r in points]
    taken = [legend, *(Bbox([centre - 5 * scale, centre + 5 * scale]) for centre in centres)]
    for centre, r in zip(centres, points, strict=True):
        measured = axes.text(0, 0, r.name, fontsize=9)
        size = np.array(measured.get_window_extent().size)
        measured.remove()
        # The name's side, or corner, is so far from the point.
        corners = (
            np.array(direction) * distance * scale + (np.array(direction) - 1) / 2 * size
            for distance in range(7, 300, 4)
            for direction in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
        )
        for corner in corners:
            box = Bbox([centre + corner, centre + corner + size])
            is_inside = np.all(box.min >= axes.bbox.min) and np.all(box.max <= axes.bbox.max)
            if is_inside and not box.count_overlaps(taken):
                break
        taken.append(box)
        line = {"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.5, "shrinkA": 0, "shrinkB": 3}
        place = {"xytext": corner / scale, "textcoords": "offset points", "arrowprops": line}
        axes.annotate(r.name, (r.bytes_per_token, r.kl), fontsize=9, **place)


# Passes ---------------------------------------------------------------------------------------------------------------


def _run(
    model: Qwen3VLForConditionalGeneration, prompt: EvaluationPrompt, compression: Compression | None
) -> torch.Tensor:
    """The last hidden states of a conversation, ``[n, hidden_size]``."""
    _set(model, compression)
    with torch.no_grad():
        return model.model(**model_inputs(model, prompt.whole), use_cache=False).last_hidden_state[0]


def _set(model: Qwen3VLForConditionalGeneration, compression: Compression | None) -> None:
    for layer in model.model.language_model.layers:
        layer.self_attn.kv_evaluation = compression


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one conversation over what the cache gives back."""
    seen = Seen(query[0] * scaling, key[0], value[0])
    if module.kv_evaluation:
        seen = module.kv_evaluation(module.layer_idx, seen)
    tokens = query.shape[2]
    tiles = [slice(start, min(start + _QUERY_TILE, tokens)) for start in range(0, tokens, _QUERY_TILE)]
    return torch.cat([_attend(seen, rows) for rows in tiles], 1).transpose(0, 1)[None], None


def _attend(seen: Seen, rows: slice) -> torch.Tensor:
    """``[heads, rows, dim]``: some tokens over all up to themselves."""
    group = len(seen.q) // len(seen.k)
    k, v = (x[:, : rows.stop] for x in (seen.k, seen.v))
    scores = seen.q[:, rows].unflatten(0, (-1, group)).flatten(1, 2) @ k.mT
    scores = scores.unflatten(1, (group, -1))
    scores.masked_fill_(torch.arange(rows.stop) > torch.arange(rows.start, rows.stop)[:, None], -torch.inf)
    return (scores.softmax(-1).flatten(1, 2) @ v).unflatten(1, (group, -1)).flatten(0, 1)


AttentionInterface.register(_ATTN_IMPLEMENTATION, _attention)
AttentionMaskInterface.register(_ATTN_IMPLEMENTATION, flash_attention_mask)


# Schemes --------------------------------------------------------------------------------------------------------------


def _scheme(name: str, cache: CacheConfig, text: TextConfig, transforms: Sequence[LayerTransform]) -> Scheme:
    """Ours, as `LayerTransform` and the kernels do it."""
    layouts = cache.layers(dataclasses.replace(text, value_dims=tuple(t.value_dim for t in transforms)))

    def compression(layer: int, exact: Seen) -> Seen:
        layout, transform = layouts[layer], transforms[layer]
        key_row, value_row = layout.kv_format.rows
        balance = torch.from_numpy(transform.balance).float()
        q, k = exact.q * balance, exact.k / balance
        met = _int8_queries(q, layout.is_rotated) if key_row.is_quantised else q
        stored = _stored(k, key_row, layout.is_rotated)
        if transform.value_down is None:
            return Seen(met, stored, _stored(exact.v, value_row))
        down, up = (torch.from_numpy(x).float() for x in (transform.value_down, transform.value_up))
        return Seen(met, stored, _stored(exact.v @ down.mT, value_row) @ up.mT)

    row_bytes = sum(layout.bytes_per_token for layout in layouts) / len(layouts) / text.num_key_value_heads
    return Scheme(name, row_bytes, compression, layouts)


def _stored(x: torch.Tensor, row_format: RowFormat, is_rotated: bool = False) -> torch.Tensor:
    """Rows there and back; rotated ones stay so."""
    rows, scale = compress(x.numpy(), row_format, is_rotated)
    return torch.from_numpy(expand(rows, scale, row_format, x.shape[-1]))


def _int8_queries(q: torch.Tensor, is_rotated: bool) -> torch.Tensor:
    """As the kernels quantise them: one scale a row."""
    turned = torch.from_numpy(hadamard(q.numpy())) if is_rotated else q
    step = turned.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (turned / step).round() * step


_ABLATION = [(bits, balanced, rotated) for bits in (8, 4) for balanced in (False, True) for rotated in (False, True)]
_LLAMA_CPP = [(bits, rotated) for bits in (8, 4) for rotated in (False, True)]


def _baselines(text: TextConfig, transforms: Sequence[LayerTransform]) -> Iterator[Scheme]:
    """Keys and values of as many bits: one scale a row, with and without balance and rotation; llama.cpp's formats."""
    for bits, balanced, rotated in _ABLATION:
        row = RowFormat.INT8 if bits == 8 else RowFormat.INT4
        means = " + ".join(["balance"] * balanced + ["Hadamard"] * rotated) or "plain"
        size = 2 * (row.row_bytes(text.head_dim) + 2)
        yield Scheme(f"int{bits} {means}", size, _ablation(row, transforms if balanced else None, rotated))
    for bits, rotated in _LLAMA_CPP:
        size = 2 * text.head_dim // _BLOCK * (_BLOCK * bits // 8 + 2)
        name = f"llama.cpp q{bits}_0{', rotated' if rotated else ''}"
        yield Scheme(name, size, _llama_cpp(q8_0 if bits == 8 else q4_0, rotated))


def _ablation(row: RowFormat, transforms: Sequence[LayerTransform] | None, rotated: bool) -> Compression:
    def compression(layer: int, exact: Seen) -> Seen:
        balance = torch.from_numpy(transforms[layer].balance).float() if transforms else 1.0
        q, k = exact.q * balance, exact.k / balance
        v = _stored(exact.v, row, rotated)
        return Seen(_int8_queries(q, rotated), _stored(k, row, rotated), _turned(v) if rotated else v)

    return compression


def _llama_cpp(there_and_back: Callable[[np.ndarray], np.ndarray], rotated: bool) -> Compression:
    def compression(_: int, exact: Seen) -> Seen:
        q, k, v = (_turned(x) if rotated else x for x in (exact.q, exact.k, exact.v))
        k, v = (torch.from_numpy(there_and_back(x.numpy())) for x in (k, v))
        return Seen(q, k, _turned(v) if rotated else v)

    return compression


def _turned(x: torch.Tensor) -> torch.Tensor:
    """Rotated, or rotated back: Hadamard's matrix is its own inverse."""
    return torch.from_numpy(hadamard(x.numpy()))


def q8_0(x: np.ndarray) -> np.ndarray:
    """llama.cpp's q8_0 there and back: blocks of 32, scale amax / 127 in float16, rounded half away from zero."""
    blocks = x.reshape(*x.shape[:-1], -1, _BLOCK).astype(np.float32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    return (codes * scale.astype(np.float16).astype(np.float32)).reshape(x.shape)


def q4_0(x: np.ndarray) -> np.ndarray:
    """llama.cpp's q4_0 there and back: blocks of 32, the element of largest magnitude is -8 times the float16 scale."""
    blocks = x.reshape(*x.shape[:-1], -1, _BLOCK).astype(np.float32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scale = largest / np.float32(-8)
    codes = np.minimum(np.trunc(blocks * _inverse(scale) + np.float32(8.5)), 15)
    return ((codes - 8) * scale.astype(np.float16).astype(np.float32)).reshape(x.shape)


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.where(scale != 0, np.float32(1) / np.where(scale != 0, scale, 1), 0).astype(np.float32)
