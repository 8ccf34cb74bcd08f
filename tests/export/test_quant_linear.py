"""QuantLinear: its torch op, its ONNX body and ONNX Runtime's own layer against float64 products of the same codes."""

import contextlib
import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from pascalvl.engines.onnxruntime import matmul_nbits
from pascalvl.export.onnx_op import IR_VERSION
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.ops.onnx_text import OPSET
from pascalvl.plugins.ops.quant_linear.onnx_body import LinearBody
from pascalvl.plugins.ops.quant_linear.op import OP_NAME, OP_VERSION, Activation, LinearOptions, Norm
from pascalvl.plugins.ops.quant_linear.torch_op import quant_linear
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import InputNorm, QuantisedWeight, linear, quantise_weight
from tests.plugins.kernels.reference import away_from_ties

TOLERANCE = 2e-6
"""FP32 sums of up to some hundreds of terms."""
OPERANDS = "x", "weight", "scale", "zero", "bias", "residual", "norm_weight", "norm_bias"
EPSILON = 1e-3
"""Large enough to show."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, with inputs of two dimensions before the features."""

    form: WeightFormat
    in_features: int = 200
    out_features: int = 20
    has_zero: bool = False
    has_bias: bool = False
    has_residual: bool = False
    activation: Activation = Activation.NONE
    norm: Norm = Norm.NONE
    norm_size: int = 0

    @property
    def options(self) -> LinearOptions:
        return LinearOptions(self.form, self.activation, self.norm, EPSILON if self.norm else 0.0)

    def operands(self) -> dict[str, np.ndarray]:
        """In the op's order."""
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2, 3, self.in_features)).astype(np.float32)
        if self.norm:
            x = x * rng.uniform(0.02, 0.2, (2, 3, 1)).astype(np.float32) + np.float32(0.1)
        dense = rng.standard_normal((self.out_features, self.in_features)).astype(np.float32) / 10
        named = {"x": x}
        if not self.form.is_quantised:
            padded = np.pad(dense, ((0, 0), (0, self.form.padded(self.in_features) - self.in_features)))
            named["weight"] = padded.astype(np.float16).view(np.int32) if self.form.bits == 16 else padded
        else:
            weight = quantise_weight(dense, self.form)
            if self.has_zero:
                zero = rng.integers(-8, 8, weight.scale.shape).astype(np.float16)
                weight = dataclasses.replace(weight, zero=zero)
            named |= weight.packed()
        if self.has_bias:
            named["bias"] = rng.standard_normal(self.out_features).astype(np.float32)
        if self.has_residual:
            results = self.out_features // (2 if self.activation is Activation.SILU_GATED else 1)
            named["residual"] = rng.standard_normal((2, 3, results)).astype(np.float32)
        if self.norm:
            named["norm_weight"] = rng.uniform(0.5, 1.5, self.norm_size).astype(np.float32)
        if self.norm is Norm.LAYER:
            named["norm_bias"] = rng.standard_normal(self.norm_size).astype(np.float32)
        if self.norm and self.form.is_quantised:
            named["x"] = away_from_ties(x.reshape(6, -1), self.input_norm(named), self.form).reshape(x.shape)
        return named

    def input_norm(self, named: dict[str, np.ndarray]) -> InputNorm | None:
        return InputNorm(self.norm, named["norm_weight"], EPSILON, named.get("norm_bias")) if self.norm else None

    def expected(self, named: dict[str, np.ndarray]) -> np.ndarray:
        """Float64."""
        weight = named["weight"].view(np.float16) if self.form.bits == 16 else named["weight"]
        if self.form.is_quantised:
            weight = QuantisedWeight.unpacked(named, self.in_features, self.form)
        rows = {name: x if x is None else x.reshape(6, -1) for name, x in (("x", named["x"]), ("residual", None))}
        residual = named["residual"].reshape(6, -1) if self.has_residual else None
        options = self.activation, self.input_norm(named)
        return linear(rows["x"], weight, named.get("bias"), residual, *options).reshape(2, 3, -1)

    @property
    def attributes(self) -> dict[str, int | float]:
        return {
            **{"in_features": self.in_features, "out_features": self.out_features, "bits": self.form.bits},
            **{"group": self.form.group, "activation": int(self.activation), "has_zero": int(self.has_zero)},
            **{"has_bias": int(self.has_bias), "has_residual": int(self.has_residual)},
            **{"norm": int(self.norm), "norm_size": self.norm_size, "epsilon": self.options.epsilon},
        }


CASES = [
    *(Case(WeightFormat(bits, group)) for bits in (8, 4) for group in (32, 64, 128)),
    *(Case(WeightFormat(bits), 256, 24, bits == 4, True, True) for bits in (16, 8, 4)),
    Case(WeightFormat(8), 96, 40, has_bias=True, activation=Activation.GELU_TANH),
    Case(WeightFormat(4, 64), 128, 256, has_residual=True, activation=Activation.SILU_GATED),
    Case(WeightFormat(8, 32), 100, 33, has_zero=True),
    Case(WeightFormat(4, 32), 160, 16, has_zero=True),  # an odd number of groups
    Case(WeightFormat(16), 30, 128, activation=Activation.SILU_GATED),
    Case(WeightFormat(32), 201, 24, False, True, True),
    Case(WeightFormat(32), 96, 256, activation=Activation.SILU_GATED),
    *(Case(WeightFormat(bits), 128, 36, has_bias=True, activation=Activation.GELU_ERF) for bits in (32, 16, 8)),
    # Whole rows, and segments of them, which are whole groups of codes; with all that there may be.
    *(
        Case(WeightFormat(bits, 32), 160, 20, norm=norm, norm_size=160)
        for bits in (32, 16, 8, 4)
        for norm in Norm
        if norm
    ),
    *(Case(WeightFormat(bits), 200, 24, norm=Norm.LAYER, norm_size=50) for bits in (32, 16)),
    *(Case(WeightFormat(bits, 64), 256, 24, False, True, True, norm=Norm.LAYER, norm_size=64) for bits in (32, 16, 8)),
    Case(WeightFormat(4, 32), 192, 128, True, False, True, Activation.SILU_GATED, Norm.RMS, 192),
    Case(WeightFormat(8, 32), 192, 33, activation=Activation.GELU_TANH, norm=Norm.RMS, norm_size=96),
]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(params=CASES, ids=str)
def case(request) -> Case:
    return request.param


@pytest.mark.parametrize("kernels", [False, True])
def test_torch_op(case, kernels):
    named = case.operands()
    tensors = {name: torch.from_numpy(array) for name, array in named.items()}
    operands = [tensors.get(name) for name in OPERANDS]
    with torch_calls.emulated() if kernels else contextlib.nullcontext():
        found = quant_linear(*operands, *case.options.flat)
    assert relative(found.numpy(), case.expected(named)) < TOLERANCE


def test_the_op_can_be_traced(case):
    tensors = {name: torch.from_numpy(array) for name, array in case.operands().items()}
    operands = [tensors.get(name) for name in OPERANDS]
    torch.library.opcheck(quant_linear, (*operands, *case.options.flat), test_utils=("test_schema", "test_faketensor"))


def model_of(case: Case, named: dict[str, np.ndarray], folder) -> onnx.ModelProto:
    """A model that is the one node, its weights in a file beside it."""
    body = LinearBody.of(case.attributes)
    assert list(named) == body.inputs
    inputs = [name for name in named if name in ("x", "residual")]
    initializers, data = [], bytearray()
    for name in named:
        if name in inputs:
            continue
        tensor = numpy_helper.from_array(named[name], name)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": "node.onnx.data", "offset": len(data), "length": named[name].nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        data += named[name].tobytes()
        initializers.append(tensor)
    graph = helper.make_graph(
        [helper.make_node(OP_NAME, list(named), ["output"], domain=body.domain, **case.attributes)],
        "node",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 3) for name in inputs],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [None] * 3)],
        initializers,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(body.domain, int(OP_VERSION))]
    functions = [onnx.parser.parse_function(body.text)]
    folder.mkdir()
    (folder / "node.onnx.data").write_bytes(data)
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=IR_VERSION)


def run(model: onnx.ModelProto, folder, named: dict[str, np.ndarray]) -> np.ndarray:
    onnx.save(model, folder / "node.onnx")
    onnx.checker.check_model(folder / "node.onnx")
    session = ort.InferenceSession(folder / "node.onnx", providers=["CPUExecutionProvider"])
    feeds = {value.name: named[value.name] for value in session.get_inputs()}
    return session.run(None, feeds)[0]


def test_body(case, tmp_path):
    named = case.operands()
    found = run(model_of(case, named, tmp_path / "body"), tmp_path / "body", named)
    assert relative(found, case.expected(named)) < TOLERANCE


def test_lowering_to_onnx_runtime(case, tmp_path):
    """ONNX Runtime may take other ties, or have no kernel for a layer's kind: then it is the op with exact inputs, from
    which rounding to 1/127 of a group's largest separates it."""
    named = case.operands()
    model = model_of(case, named, tmp_path / "model")
    lowered = tmp_path / "lowered"
    lowered.mkdir()
    matmul_nbits.lower(model, tmp_path / "model" / "node.onnx.data", lowered / "node.onnx.data")
    found = run(model, lowered, named)
    assert relative(found, case.expected(named)) < (1e-2 if case.form.is_quantised else TOLERANCE)


def test_the_kernels_refusals_come_through():
    x, weight = torch.zeros(1, 64), torch.zeros(4, 16, dtype=torch.int32)
    scale = torch.zeros(1, 4, dtype=torch.int32)
    with torch_calls.emulated():
        with pytest.raises(ValueError, match=r"take scales as torch.int32 \[2, 4\] on cpu; found torch.int32 \[1, 4\]"):
            quant_linear(x, weight, scale, *[None] * 5, *LinearOptions(WeightFormat(8, 32)).flat)
        gated = LinearOptions(WeightFormat(8, 64), Activation.SILU_GATED)
        with pytest.raises(ValueError, match="multiple of 128"):
            quant_linear(x, weight, scale, *[None] * 5, *gated.flat)
