"""Small cases of the kernels, for sanitizer builds: ``python -m tests.plugins.kernels.sweep LIBRARY EVERY``.

Of the formats of the cache and of the bits of weights, each EVERY-th is tried.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from pascalvl.engines.choice import Choice, LogitState, choose
from pascalvl.plugins.kernels.library import CHOICE, KernelLibrary
from pascalvl.plugins.ops.quant_linear.op import Activation, Norm
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import linear, quantise_weight
from tests.plugins.kernels.reference import (
    PAIRS,
    HostRows,
    Prologue,
    Shape,
    aligned,
    append,
    causal_attention,
    expected_attention,
    packed_attention,
    pointer,
    quantised_linear,
    random_norm,
    relative_error,
)
from tests.plugins.kernels.sequences import make_case


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    array = aligned(shape)
    array[:] = rng.standard_normal(shape)
    return array


def main() -> None:
    library = KernelLibrary(Path(sys.argv[1]))
    rng = np.random.default_rng(0)
    for formats in PAIRS[:: int(sys.argv[2])]:
        for group, seq, past, with_mask in (
            (1, 1, 5, False),
            (2, 1, 5, False),
            (4, 1, 70, False),
            (8, 1, 5, False),
            (2, 3, 70, False),
            (2, 3, 270, True),
            (4, 1, 70, True),
        ):
            shape = Shape(num_heads=group, num_kv_heads=1, value_dim=96 if seq > 1 else 128, capacity=past)
            cache = HostRows(library, shape, formats, rotated=formats[0].is_quantised)
            cache.fill(normal(rng, 1, 1, 1, past, 128), normal(rng, 1, 1, 1, past, shape.value_dim))
            q, k = normal(rng, 1, group, seq, 128), normal(rng, 1, 1, seq, 128)
            v = normal(rng, 1, 1, seq, shape.value_dim)
            visible = None
            if with_mask:
                visible = rng.integers(0, seq + 2, (1, past)).astype(np.int32)
                visible[:, 128:] = 0
            angle = np.tile(rng.uniform(0, 6, (1, seq, 64)), 2).astype(np.float32)
            prologue = Prologue(normal(rng, 128), normal(rng, 128), np.cos(angle), np.sin(angle))
            lengths = np.array([past], np.int32)
            found, new = causal_attention(library, cache, q, k, v, lengths, 0.1, visible, prologue)
            queries = prologue.of(q, prologue.q_norm).astype(np.float32)
            assert relative_error(found, expected_attention(cache, new, queries, lengths, 0.1, visible)) < 1e-3
            append(library, cache, new, np.arange(seq)[None])
        for new, with_mask in (([1, 0, 1], False), ([1, 4, 2], False), ([2, 0, 9], True)):
            case = make_case(library, formats, new, [130, 5, 256], 2, 1, with_mask, num_heads=2, num_kv_heads=1)
            found, rows = case.run(library)
            assert relative_error(found, case.expected(rows)) < 1e-3
    for dim in (64, 72):
        q, k, v = (normal(rng, 1, 70, dim) for _ in range(3))
        packed_attention(library, q, k, v, np.array([0, 66, 70], np.int32), 0.1)
    for bits in (32, 16, 8, 4)[:: int(sys.argv[2])]:
        for rows, inputs, outputs, activation, with_more, kind, size in (
            (1, 260, 5, Activation.NONE, False, Norm.LAYER, 260),
            (3, 1030, 4, Activation.GELU_TANH, True, Norm.NONE, 0),
            (2, 1030, 128, Activation.SILU_GATED, True, Norm.RMS, 1030),
            (1, 2500, 4, Activation.GELU_ERF, False, Norm.RMS, 2500),
            (1, 8201, 4, Activation.NONE, True, Norm.LAYER, 8201),  # more than threads hold
            (9, 260, 5, Activation.NONE, True, Norm.NONE, 0),  # the inputs are split
            (9, 256, 128, Activation.SILU_GATED, True, Norm.LAYER, 128),
            (33, 70, 9, Activation.GELU_TANH, False, Norm.NONE, 0),
            (33, 30, 128, Activation.SILU_GATED, True, Norm.NONE, 0),
        ):
            form = WeightFormat(bits, 32)
            weight = np.pad(normal(rng, outputs, inputs), ((0, 0), (0, form.padded(inputs) - inputs)))
            if form.is_quantised:
                weight = quantise_weight(weight[:, :inputs], form)
                zero = rng.integers(-8, 8, weight.scale.shape).astype(np.float16)
                weight = dataclasses.replace(weight, zero=zero if with_more else None)
            else:
                weight = weight.astype(np.float16 if bits == 16 else np.float32)
            x, bias = normal(rng, rows, inputs) / 16, normal(rng, outputs)
            norm = random_norm(rng, kind, size) if size else None
            width = outputs // 2 if activation is Activation.SILU_GATED else outputs
            case = x, weight, bias, normal(rng, rows, width) if with_more else None, activation, norm
            # Once normed, an input half way between two codes may get either; test_linear.py takes care that none is.
            assert relative_error(quantised_linear(library, *case), linear(*case)) < (1e-3 if norm else 2e-6)
    logits, token, logit = normal(rng, 2, 700), aligned((2,), np.int32), aligned((2,))
    library.choose(pointer(logits), 2, 700, 0, pointer(token), pointer(logit))
    assert token.tolist() == logits.argmax(1).tolist()
    counts, mask = aligned((700,), np.uint32), aligned((22,), np.uint32)
    counts[::3], mask[:] = 1 << 31, 0xFFFF00FF
    choices = aligned((2,), CHOICE)
    for temperature, top_k, top_p in ((0.7, 20, 0.8), (1.0, 0, 0.9), (0.0, 0, 1.0)):
        fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "random": 1 << 63}
        for name, value in {**fields, "counts": pointer(counts), "repetition_penalty": 1.2}.items():
            choices[name] = value
        choices["mask"][1] = pointer(mask)
        library.choose(pointer(logits), 2, 700, pointer(choices), pointer(token), pointer(logit))
        state = LogitState(counts)
        fields |= {"state": state, "repetition_penalty": 1.2}
        assert token.tolist() == [
            choose(row, Choice(**fields, mask=m)) for row, m in zip(logits, (None, mask), strict=True)
        ]
    matrix, more, picked, out = normal(rng, 5, 2100), normal(rng, 3, 2100), aligned((3,), np.int32), aligned((3, 2100))
    picked[:] = 4, 0, 4
    library.gather_rows(pointer(matrix), 5, 2100, pointer(picked), 3, pointer(out))
    library.add_to(pointer(out), pointer(more), 3, 2100)
    assert (out == matrix[picked] + more).all()


if __name__ == "__main__":
    main()
