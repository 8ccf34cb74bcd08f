"""The torch face of QuantLinear: the op `pascalvl::quant_linear`, and the module that calls it."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import nn

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.ops.quant_linear.op import GATED_BLOCK, Activation, LinearOptions, Norm
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import QuantisedWeight


@torch.library.custom_op("pascalvl::quant_linear", mutates_args=())
def quant_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    bits: int,
    group: int,
    activation: int,
    norm: int,
    epsilon: float,
) -> torch.Tensor:
    """A linear layer as `pascalvl.plugins.ops.quant_linear.op` defines it.

    Tensors on CUDA go to the kernels; others are computed by PyTorch, the weight unpacked for the time of the call.

    Args:
        x: float32 ``[..., in_features]``.
        weight: `WeightFormat.weight_shape`, int32 words of codes or halves, or float32.
        scale, zero: int32 `WeightFormat.scale_shape`, words of halves; zero None: zeros.
        bias: float32 ``[out_features]``, or None.
        residual: float32, of the result's shape, or None.
        norm_weight: float32 ``[norm_size]``, of which in_features is a multiple, where there is a norm.
        norm_bias: the same, of layer norm.
        bits to epsilon: `LinearOptions.flat`.

    Returns:
        float32 ``[..., out_features]``, half as many where gated.

    Raises:
        ValueError: the kernels do not support the arguments; says which they do.
    """
    if torch_calls.serves(x.device):
        try:
            kernels = torch_calls.library(x.device)
            tensors = weight, scale, zero, bias, residual, norm_weight, norm_bias
            return torch_calls.linear(kernels, x, *tensors, bits, group, activation, norm, epsilon)
        except UserError as error:
            raise ValueError(str(error)) from None
    options = LinearOptions.of(bits, group, activation, norm, epsilon)
    wide = dense(weight, scale, zero, x.shape[-1], options.form)
    of_norm = NormOperands(options.norm, norm_weight, norm_bias, epsilon)
    return compute(x, wide, bias, residual, of_norm, options.form, options.activation)


@quant_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    bits: int,
    group: int,
    activation: int,
    *_: float,
) -> torch.Tensor:
    outputs = weight.shape[0] // (2 if activation == Activation.SILU_GATED else 1)
    return x.new_empty(*x.shape[:-1], outputs)


def dense(
    weight: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, in_features: int, form: WeightFormat
) -> torch.Tensor:
    """A weight as the op has it in float32, ``[out_features, in_features]``."""
    if not form.is_quantised:
        return (weight if form.bits == 32 else weight.view(torch.float16))[:, :in_features].float()
    named = (("weight", weight), ("scale", scale), ("zero", zero))
    arrays = {name: tensor.numpy() for name, tensor in named if tensor is not None}
    return torch.from_numpy(QuantisedWeight.unpacked(arrays, in_features, form).dense())


def compute(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: NormOperands,
    form: WeightFormat,
    activation: Activation,
) -> torch.Tensor:
    """The op by PyTorch, its weight in float32."""
    x = normed(x, norm)
    sums = (rounded(x, form.group) if form.is_quantised else x) @ weight.T
    if bias is not None:
        sums = sums + bias
    if activation is Activation.GELU_TANH:
        sums = nn.functional.gelu(sums, approximate="tanh")
    elif activation is Activation.GELU_ERF:
        sums = nn.functional.gelu(sums)
    elif activation is Activation.SILU_GATED:
        gate, value = sums.unflatten(-1, (-1, 2, GATED_BLOCK)).unbind(-2)
        sums = (nn.functional.silu(gate) * value).flatten(-2)
    return sums if residual is None else sums + residual


def normed(x: torch.Tensor, norm: NormOperands) -> torch.Tensor:
    """Inputs ``[..., in_features]`` as the weight meets them: each segment of the norm's size by itself."""
    if norm.kind is Norm.NONE:
        return x
    weight = cast(torch.Tensor, norm.weight)
    segments = x.unflatten(-1, (-1, len(weight)))
    if norm.kind is Norm.LAYER:
        segments = segments - segments.mean(-1, keepdim=True)
    segments = segments * torch.rsqrt(segments.square().mean(-1, keepdim=True) + norm.epsilon) * weight
    return (segments if norm.bias is None else segments + norm.bias).flatten(-2)


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """Inputs ``[..., in_features]`` as codes meet them: to int8 and back, by group."""
    in_features = x.shape[-1]
    padded = nn.functional.pad(x, (0, -in_features % group)).unflatten(-1, (-1, group))
    most = padded.abs().amax(-1, keepdim=True)
    codes = (padded * torch.where(most > 0, 127 / most, 0)).round()
    return (codes * (most / 127)).flatten(-2)[..., :in_features]


class QuantLinear(nn.Module):
    """A linear layer in any weight format; its parameters are as the op takes them.

    Args:
        in_features, out_features: its size; where gated, ``out_features`` counts gates and values.
        form: of the weight.
        has_bias: whether there is one.
        activation: what becomes of the sums.
        device: of the parameters, which have no values yet.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: WeightFormat,
        has_bias: bool = False,
        activation: Activation = Activation.NONE,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form, self.activation = in_features, out_features, form, activation
        self._device = torch.device(device)
        self.weight = self._parameter(form.weight_shape(out_features, in_features), getattr(torch, form.dtype.name))
        self.scale: nn.Parameter | None = None
        self.zero: nn.Parameter | None = None
        if form.is_quantised:
            self.scale = self._parameter(form.scale_shape(out_features, in_features), torch.int32)
        self.bias = self._parameter((out_features,), torch.float32) if has_bias else None

    def add_zero(self) -> None:
        """Give the codes zeros of their own."""
        self.zero = self._parameter(self.form.scale_shape(self.out_features, self.in_features), torch.int32)

    def _parameter(self, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=self._device), requires_grad=False)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, norm: nn.Module | None = None
    ) -> torch.Tensor:
        """The op; ``norm`` is the module, of Hugging Face's, by which ``x`` is normed first, of whose sizes in_features
        is a multiple: each segment of so many inputs is normed by itself."""
        of_norm = norm_operands(norm)
        operands = self.weight, self.scale, self.zero, self.bias, residual, of_norm.weight, of_norm.bias
        return quant_linear(x, *operands, *self.options(of_norm).flat)

    def options(self, norm: NormOperands) -> LinearOptions:
        """Those of a call whose inputs are normed so."""
        return LinearOptions(self.form, self.activation, norm.kind, norm.epsilon)


class NormOperands(NamedTuple):
    """What the op takes of a norm."""

    kind: Norm = Norm.NONE
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    epsilon: float = 0.0


def norm_operands(norm: nn.Module | None) -> NormOperands:
    """Those of Hugging Face's RMS norm, or of a layer norm."""
    if norm is None:
        return NormOperands()
    if isinstance(norm, nn.LayerNorm):
        return NormOperands(Norm.LAYER, norm.weight, norm.bias, norm.eps)
    return NormOperands(Norm.RMS, cast(torch.Tensor, norm.weight), None, cast(float, norm.variance_epsilon))
