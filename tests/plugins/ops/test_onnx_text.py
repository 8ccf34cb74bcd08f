"""Halves in words of ONNX bodies, read and written, against NumPy's."""

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from pascalvl.export.onnx_op import IR_VERSION
from pascalvl.plugins.ops.onnx_text import OPSET, half_bits, half_table, halves

HEADER = f'<ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}]> graph '


def runs(signature: str, lines: list[str]):
    """The graph in ONNX Runtime, and in onnx's evaluator."""
    model = onnx.parser.parse_model("\n".join([HEADER + signature, "{", *half_table(), *lines, "}"]))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    yield lambda feeds: session.run(None, feeds)
    yield lambda feeds: ReferenceEvaluator(model).run(None, feeds)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_halves_are_read_from_words_exactly():
    """All 65,536 of them: signs, subnormal numbers, infinities, and what is no number."""
    words = np.arange(1 << 16, dtype=np.uint16).view(np.int32).reshape(4, -1)
    expected = words.view(np.float16)
    for run in runs("(int32[n, m] words) => (float[n, k] floats)", halves("words", "floats")):
        (found,) = run({"words": words})
        np.testing.assert_array_equal(found, expected.astype(np.float32))
        np.testing.assert_array_equal(np.signbit(found[expected == 0]), np.signbit(expected[expected == 0]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_halves_are_written_to_words_exactly():
    """All halves, what lies half-way to the next one and beside that, and what is too large or too small for one."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    numbers = every[~np.isnan(every)].astype(np.float32)
    finite = np.sort(numbers[np.isfinite(numbers)])
    middle = (finite[1:] + finite[:-1]) / 2
    beside = [np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf)]
    others = np.array([65519.996, 65520, 1e30, 3e38, 1e-9, 1e-45, 2.0**-25, 2.0**-24], np.float32)
    floats = np.concatenate([numbers, middle, *beside, others, -others])
    floats = np.append(floats, floats[: -len(floats) % 4]).reshape(2, -1)
    expected = floats.astype(np.float16)
    lines = half_bits("floats", "words")
    for run in runs("(float[n, m] floats) => (int32[n, k] words, float[n, m] words_floats)", lines):
        words, rounded = run({"floats": floats})
        np.testing.assert_array_equal(words, expected.view(np.int32))
        np.testing.assert_array_equal(rounded.view(np.int32), expected.astype(np.float32).view(np.int32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_number_is_written_as_one_that_is_none():
    floats = np.array([[np.nan, 1.5, -2.0, np.nan]], np.float32)
    for run in runs("(float[n, m] floats) => (int32[n, k] words)", half_bits("floats", "words")):
        (words,) = run({"floats": floats})
        np.testing.assert_array_equal(words.view(np.float16), floats.astype(np.float16))
