"""A model's layers fitted to its weights' and cache's formats by prompts, one layer after the other.

A layer is run three times on the prompts' hidden states: as it is, for the moments that its transform is planned by;
with transformed weights, for the moments of its linear layers' inputs, by which those are quantised; and as it then is,
for what the next layer is given. Memory holds that layer. What is done is kept in a folder, from where an interrupted
run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pascalvl.export.calibration import HiddenStates, assign
from pascalvl.export.checkpoint import Checkpoint
from pascalvl.export.modules import GATE_UP, QKV, DecoderLayer
from pascalvl.export.quantised_weights import QuantisedWeights, float_tensor, packed, quant_layers
from pascalvl.export.quantiser import ALL, Method, compensated, input_scale, round_to_nearest
from pascalvl.export.transforms import DECODER_LAYERS, LayerTransform, TransformedWeights, WeightSource, plan_layer
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.plugins.ops.quant_linear.torch_op import norm_operands, normed
from pascalvl.plugins.prompt import Prompt
from pascalvl.plugins.user_cache import open_cache_folder
from pascalvl.plugins.weight_format import F32, WeightConfig, WeightFormat

_DOWN = "down_proj"
_SCALED = (QKV, GATE_UP, _DOWN)
"""Layers whose inputs can be scaled by what comes before. Values are spread by their rotation as it is."""
_LAYOUT = 1
"""Of the folder's files."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        transforms: of each layer.
        scales: of each layer, by names of `_SCALED`: by what its input channels are divided.
        codes: given a layer's name, what it is packed to; None for those that are not in 4 bits.
        folder: where that is kept; `discard` removes it.
    """

    transforms: list[LayerTransform]
    scales: list[dict[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    codes: Callable[[str], Mapping[str, torch.Tensor] | None] = lambda _: None
    folder: Path | None = None

    def weights(self, checkpoint: WeightSource) -> WeightSource:
        """A checkpoint's weights, with transforms and scales folded in."""
        return ScaledWeights(TransformedWeights(checkpoint, self.transforms), self.scales)

    def discard(self) -> None:
        """Remove what was kept for an interrupted run, after which there are no codes."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def fit(
    checkpoint: Checkpoint,
    config: ModelConfig,
    prompts: Sequence[Prompt],
    cache: CacheConfig,
    weights: WeightConfig,
    method: Method = ALL,
    progress: Callable[[], None] = lambda: None,
) -> Fit:
    """Fit all layers; what a run with the same arguments that was interrupted has done of them is not done again.

    Args:
        checkpoint: the model's.
        config: the model, as the checkpoint has it.
        prompts: at least `LEAST_TOKENS` tokens together.
        cache: its `value_rank` counts.
        weights: formats of the layers' weights; those of 4 bits are fitted.
        method: how codes are found.
        progress: called after each layer.

    Raises:
        UserError: too few tokens, or the model computes what is not finite.
    """
    folder = _folder(checkpoint, prompts, cache.value_rank, weights, method)
    forms = weights.layers(config.text.num_hidden_layers)
    found = Fit([], [], functools.partial(_read_codes, folder), folder)
    hidden = HiddenStates(checkpoint, prompts)
    while _file(folder, hidden.layer).exists():
        transform, scales = _load(folder, hidden.layer)
        found.transforms.append(transform)
        found.scales.append(scales)
        hidden.layer += 1
        progress()
    if hidden.layer:
        states = load_file(_states_file(folder, hidden.layer))
        hidden.states = [states[str(number)] for number in range(len(states))]
    for layer in range(hidden.layer, len(forms)):
        statistics = hidden.statistics(checkpoint, keep=False)
        transform = plan_layer(checkpoint, config.text, cache, layer, statistics)
        found.transforms.append(transform)
        tensors, scales = _fit_layer(hidden, found, checkpoint, config, forms[layer], method)
        _save(folder, layer, transform, scales, tensors)
        save = {str(number): state for number, state in enumerate(hidden.states)}
        _save_file(save, _states_file(folder, layer + 1))
        _states_file(folder, layer).unlink(missing_ok=True)
        progress()
    return found


def _folder(checkpoint: Checkpoint, prompts: Sequence[Prompt], *options: object) -> Path:
    """Where the results of a run with these arguments are kept, in the user's cache folder."""
    digest = hashlib.sha256(repr((_LAYOUT, checkpoint.digest(), *map(str, options))).encode())
    for prompt in prompts:
        digest.update(prompt.token_ids.tobytes())
        for visual in prompt.visuals:
            digest.update(visual.patches.digest)
    return open_cache_folder(f"fit-{digest.hexdigest()[:16]}")


def _fit_layer(
    hidden: HiddenStates,
    found: Fit,
    checkpoint: Checkpoint,
    config: ModelConfig,
    form: WeightFormat,
    method: Method,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Run the next layer; returns its parameters in codes, by layer and part, and its scales."""
    index, transform = hidden.layer, found.transforms[-1]
    count = config.text.num_hidden_layers  # of which this one alone is of interest
    text = dataclasses.replace(config.text, value_dims=(transform.value_dim,) * count)
    prefix = f"{DECODER_LAYERS}{index}."
    source = TransformedWeights(checkpoint, found.transforms)
    layer = DecoderLayer(hidden.layer_module(), text, index, F32)
    floats = QuantisedWeights(source, {prefix + name: part for name, part in quant_layers(layer).items()})
    assign(layer, {name: floats.tensor(prefix + name) for name, _ in layer.named_parameters()})
    if form.bits != 4:
        hidden.run(layer, keep=True)
        found.scales.append({})
        return {}, {}
    with _moments(layer) as moments:
        hidden.run(layer, keep=False)
    module = DecoderLayer(hidden.layer_module(), text, index, form)
    layers = {name.rpartition(".")[2]: (prefix + name, part) for name, part in quant_layers(module).items()}
    scales = {}
    for name in _SCALED if method.scale else ():
        full, part = layers[name]
        weight = float_tensor(source, full, part, "weight")
        scales[name] = input_scale([weight], form, moments[name], method.clip)
        moments[name] = moments[name] / scales[name] / scales[name][:, None]
    found.scales.append(scales)
    scaled = ScaledWeights(source, found.scales)
    codes = {}
    for name, (full, part) in layers.items():
        weight = float_tensor(scaled, full, part, "weight")
        if method.compensate:
            quantised = compensated(weight, form, moments[name], method.clip)
        else:
            quantised = round_to_nearest(weight, form, moments[name].diagonal(), method.clip)
        codes[full] = packed(quantised)
    named = QuantisedWeights(scaled, dict(layers.values()), codes.get)
    module.load_state_dict({name: named.tensor(prefix + name) for name, _ in module.named_parameters()}, assign=True)
    hidden.run(module, keep=True)
    return {f"{name}.{kind}": tensor for name, parts in codes.items() for kind, tensor in parts.items()}, scales


@contextlib.contextmanager
def _moments(layer: DecoderLayer) -> Iterator[dict[str, torch.Tensor]]:
    """Collect E x x^T of what the weights of a layer's linear layers meet, float32, by the layers' own names."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], options: Mapping[str, nn.Module]) -> None:
            x = normed(inputs[0], norm_operands(options.get("norm"))).flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    linears = {path.rpartition(".")[2]: linear for path, linear in quant_layers(layer).items()}
    handles = [x.register_forward_pre_hook(add(name), with_kwargs=True) for name, x in linears.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for name in sums:
            sums[name] /= counts[name]


class ScaledWeights:
    """Weights whose layers' inputs are divided by what `Fit.scales` says, and their columns multiplied."""

    def __init__(self, weights: WeightSource, scales: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self._weights = weights
        self._factors: dict[str, list[torch.Tensor]] = {}
        for layer, of_layer in enumerate(scales):
            for name, scale in of_layer.items():
                before, readers = _AROUND[name]
                prefix = f"{DECODER_LAYERS}{layer}."
                rows = (1 / scale)[:, None] if name == _DOWN else 1 / scale
                self._factors.setdefault(f"{prefix}{before}.weight", []).append(rows)
                for reader in readers:
                    self._factors.setdefault(f"{prefix}{reader}.weight", []).append(scale)

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self._weights.tensor(name)
        for factor in self._factors.get(name, ()):
            # Of the hidden width of an MLP, scales have what it is padded to.
            axis = 0 if factor.ndim == 2 else -1
            tensor = tensor.float() * factor.narrow(axis, 0, tensor.shape[axis])
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._weights


_AROUND = {
    QKV: ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    GATE_UP: ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    _DOWN: ("mlp.up_proj", ("mlp.down_proj",)),
}
"""By layer: what its inputs' scales are folded into, and who reads those inputs."""


# Files ----------------------------------------------------------------------------------------------------------------


def _read_codes(folder: Path, name: str) -> dict[str, torch.Tensor] | None:
    """The parameters of a layer, of a decoder's that was fitted; None of others."""
    index = name.removeprefix(DECODER_LAYERS).partition(".")[0]
    if not index.isdigit() or not (path := _file(folder, int(index))).exists():
        return None
    with safe_open(path, framework="pt") as file:
        names = [key for key in file.keys() if key.startswith(f"{name}.")]  # noqa: SIM118
        return {key.rpartition(".")[2]: file.get_tensor(key) for key in names} or None


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer}.safetensors"


def _states_file(folder: Path, layer: int) -> Path:
    return folder / f"states-{layer}.safetensors"


def _save_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


def _save(
    folder: Path,
    layer: int,
    transform: LayerTransform,
    scales: Mapping[str, torch.Tensor],
    codes: Mapping[str, torch.Tensor],
) -> None:
    tensors = {f"scale.{name}": scale for name, scale in scales.items()}
    for field in dataclasses.fields(transform):
        if (array := getattr(transform, field.name)) is not None:
            tensors[f"transform.{field.name}"] = torch.from_numpy(np.ascontiguousarray(array))
    _save_file({**tensors, **codes}, _file(folder, layer))


def _load(folder: Path, layer: int) -> tuple[LayerTransform, dict[str, torch.Tensor]]:
    with safe_open(_file(folder, layer), framework="pt") as file:
        named = {key: file.get_tensor(key) for key in file.keys() if key.startswith(("transform.", "scale."))}  # noqa: SIM118
    parts: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in ("transform", "scale")}
    for name, tensor in named.items():
        kind, _, field = name.partition(".")
        parts[kind][field] = tensor
    transform = LayerTransform(**{name: tensor.numpy() for name, tensor in parts["transform"].items()})
    return transform, parts["scale"]
