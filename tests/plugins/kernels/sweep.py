"""Small cases of the kernels, for sanitizer builds: ``python -m tests.plugins.kernels.sweep LIBRARY EVERY``.

Of the formats of the cache, each EVERY-th is tried.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from pascalvl.plugins.kernels.library import AttentionArgs, KernelLibrary
from pascalvl.plugins.kv_rows import compress
from pascalvl.plugins.ops.quant_linear.op import Activation
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import linear, quantise_weight
from tests.plugins.kernels.reference import (
    PAIRS,
    HostCache,
    Shape,
    aligned,
    append,
    causal_attention,
    expected_attention,
    pointer,
    quantised_linear,
    relative_error,
)

FEW_TOKENS = 9


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    array = aligned(shape)
    array[:] = rng.standard_normal(shape)
    return array


def fill(library: KernelLibrary, cache: HostCache, key: np.ndarray, value: np.ndarray) -> None:
    """Put tokens into a cache: a few by the kernel, more, which would take it long here, by NumPy."""
    if key.shape[-2] <= FEW_TOKENS:
        return append(library, cache, key, value, np.zeros(1, np.int32))
    for which, (x, form) in enumerate(zip((key, value), cache.formats, strict=True)):
        rows, scale = compress(x, form, cache.rotated and which == 0)
        cache.rows[which][:] = rows.view(np.uint8)
        if form.is_quantised:
            cache.scales[which][:] = scale


def main() -> None:
    library = KernelLibrary(Path(sys.argv[1]))
    rng = np.random.default_rng(0)
    for formats in PAIRS[:: int(sys.argv[2])]:
        rotated = formats[0].is_quantised
        for group, seq, past, more in (
            (1, 1, 5, None),
            (2, 1, 5, "recent"),
            (4, 1, 70, "recent"),
            (8, 1, 5, None),
            (2, 3, 70, None),
            (2, 3, 270, "mask"),
            (4, 1, 70, "mask"),
        ):
            shape = Shape(num_heads=group, num_kv_heads=1, value_dim=96 if seq > 1 else 128, capacity=past)
            cache = HostCache(library, shape, formats, rotated)
            old_k, old_v = normal(rng, 1, 1, 1, past, 128), normal(rng, 1, 1, 1, past, shape.value_dim)
            fill(library, cache, old_k, old_v)
            q, k = normal(rng, 1, group, seq, 128), normal(rng, 1, 1, seq, 128)
            v = normal(rng, 1, 1, seq, shape.value_dim)
            visible = recent = None
            if more == "mask":
                visible = rng.integers(0, seq + 2, (1, past)).astype(np.int32)
                visible[:, 128:] = 0
            elif more and rotated:
                rows = HostCache(library, dataclasses.replace(shape, capacity=9), PAIRS[1], False)
                new_k, new_v = normal(rng, 1, 1, 1, 9, 128), normal(rng, 1, 1, 1, 9, shape.value_dim)
                append(library, rows, new_k, new_v, np.zeros(1, np.int32))
                recent = rows, np.array([7], np.int32)
            case = (cache, q, k, v, np.array([past], np.int32), 0.1, visible, recent)
            assert relative_error(causal_attention(library, *case), expected_attention(*case)) < 1e-3
    for dim in (64, 72):
        q, k, v, out = (normal(rng, 1, 70, dim) for _ in range(4))
        cu_seqlens = np.array([0, 66, 70], np.int32)
        args = AttentionArgs(
            **dict(zip(("q", "k", "v", "out", "cu_seqlens"), map(pointer, (q, k, v, out, cu_seqlens)), strict=True)),
            **dict.fromkeys(("batch", "num_heads", "num_kv_heads"), 1),
            **dict.fromkeys(("key_dim", "value_dim"), dim),
            seq=70,
            softmax_scale=0.1,
            num_sequences=2,
        )
        library.attention(args)
    for bits in (16, 8, 4):
        for rows, inputs, outputs, activation, with_more in (
            (1, 260, 5, Activation.NONE, False),
            (3, 1030, 4, Activation.GELU_TANH, True),
            (2, 1030, 128, Activation.SILU_GATED, True),
            (9, 260, 5, Activation.NONE, True),  # the inputs are split
            (9, 260, 128, Activation.SILU_GATED, True),
            (33, 70, 9, Activation.GELU_TANH, False),
            (33, 30, 128, Activation.SILU_GATED, True),
        ):
            form = WeightFormat(bits, 32)
            weight = np.pad(normal(rng, outputs, inputs), ((0, 0), (0, form.padded(inputs) - inputs)))
            if form.is_quantised:
                weight = quantise_weight(weight[:, :inputs], form)
                zero = rng.integers(-8, 8, weight.scale.shape).astype(np.float16)
                weight = dataclasses.replace(weight, zero=zero if with_more else None)
            else:
                weight = weight.astype(np.float16)
            x, bias = normal(rng, rows, inputs) / 16, normal(rng, outputs)
            width = outputs // 2 if activation is Activation.SILU_GATED else outputs
            case = x, weight, bias, normal(rng, rows, width) if with_more else None, activation
            assert relative_error(quantised_linear(library, *case), linear(*case)) < 2e-6
    logits, token, logit = normal(rng, 2, 700), aligned((2,), np.int32), aligned((2,))
    library.greedy(pointer(logits), 2, 700, pointer(token), pointer(logit))
    assert token.tolist() == logits.argmax(1).tolist()


if __name__ == "__main__":
    main()
