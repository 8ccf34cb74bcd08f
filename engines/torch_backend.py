"""The reference backend: the very PyTorch modules that are exported, with the external cache and the CUDA kernels.

On a CUDA device for real, with the decode step as one CUDA graph; without one on the CPU, where the emulator runs the
kernels: right, and slow. Weights are mapped from the bundle, which holds them as the model bundle does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import Qwen3VLConfig

from pascalvl.engines.backend import REFERENCE, Engine
from pascalvl.engines.session import Session
from pascalvl.export import torch_kernels
from pascalvl.export.checkpoint import TOKEN_EMBEDDINGS, meta_model
from pascalvl.export.modules import Decoder, VisionEncoder
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import CHECKPOINT_CONFIG, TRANSPOSED, Manifest, read_json
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import KVFormat

log = logging.getLogger(__name__)

NAME = REFERENCE
_GRAPHS = (bindings.VISION, bindings.DECODER)
_DATA = {graph: f"{graph}.onnx.data" for graph in _GRAPHS}
_WEIGHTS = "weights.json"
"""By graph and name (as `TRANSPOSED` says): where in the graph's data a weight starts, and its shape there."""
FILES = (CHECKPOINT_CONFIG, _WEIGHTS, *_DATA.values())
_REMEDY = "build the bundle again"


class TorchEngine(Engine):
    """Both modules, on the device that there is."""

    def __init__(self, directory: Path, manifest: Manifest, marked_layers: bool) -> None:
        super().__init__(directory, manifest)
        self.device = _device()
        self.kernels = torch_kernels.library(self.device)
        torch.set_float32_matmul_precision("highest")  # no TF32: the reference is exact
        try:
            with evaluation("the model's weights"):
                self._modules = _load(directory, manifest, self.device)
                self.kernels.load()
        except MemoryError as error:
            size = sum(manifest.files[name]["bytes"] for name in _DATA.values())
            raise UserError(
                f"the weights of {directory} take {size / 1e9:.1f} GB, more than is free on {self.device}: free some, "
                "or choose another --backend."
            ) from error
        layers = range(manifest.model.text.num_hidden_layers)
        self._past_names = [name(layer) for layer in layers for name in (bindings.past_key, bindings.past_value)]
        self._output_names = {
            bindings.VISION: [binding.name for binding in bindings.vision_outputs(manifest.model)],
            bindings.DECODER: [
                *(binding.name for binding in bindings.decoder_outputs(manifest.model)),
                *(bindings.hidden_states(layer) for layer in layers if marked_layers),
            ],
        }

    def forward(self, graph: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`run` on tensors, where they are."""
        inputs = dict(inputs)
        if graph == bindings.DECODER:
            inputs["past"] = [inputs.pop(name) for name in self._past_names]
        outputs = self._modules[graph](**inputs)
        return dict(zip(self._output_names[graph], outputs, strict=False))  # the last, if any, are not asked for

    def tensors(self, feeds: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Inputs on the device."""
        return {name: torch.from_numpy(array).to(self.device) for name, array in feeds.items()}

    def run(self, graph: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with evaluation(f"the {graph} engine"):
            outputs = self.forward(graph, self.tensors(feeds))
            return {name: output.numpy(force=True) for name, output in outputs.items()}

    def _new_session(self, capacity: int) -> Session:
        return TorchSession(self, capacity)


class TorchSession(Session):
    """The storage as a tensor on the engine's device.

    What varies between decode steps is written to one array in pinned memory, which the step itself copies to the
    device, the number of past tokens with it: the host's word counts, also after an interrupt.
    """

    def __init__(self, engine: TorchEngine, capacity: int) -> None:
        super().__init__(capacity)
        self._engine = engine
        model, kv_format, device = engine.manifest.model, engine.manifest.kv_format, engine.device
        text, on_cuda = model.text, device.type == "cuda"
        with evaluation("the KV cache"):
            shape, dtype = kv_format.storage_shape(text, capacity), getattr(torch, kv_format.dtype.name)
            self._rows = torch.zeros(shape, dtype=dtype, device=device)
            self._past = {}
            for layer, (keys, values) in enumerate(self._rows):
                self._past |= {bindings.past_key(layer): keys, bindings.past_value(layer): values}

            sizes = {
                bindings.INPUTS_EMBEDS: text.hidden_size,
                bindings.ROPE_COS: text.head_dim,
                bindings.ROPE_SIN: text.head_dim,
                bindings.PAST_LENGTH: 1,
            }
            self._staged = torch.zeros(sum(sizes.values()), pin_memory=on_cuda)
            self._inputs = self._staged.to(device)
            staged, self._step_inputs = (
                {name: part.view(1, 1, -1) for name, part in zip(sizes, whole.split([*sizes.values()]), strict=True)}
                for whole in (self._staged, self._inputs)
            )
            for inputs in (staged, self._step_inputs):
                inputs[bindings.PAST_LENGTH] = inputs[bindings.PAST_LENGTH].view(torch.int32).flatten()
            self._staged_inputs = {name: part.numpy() for name, part in staged.items()}
            # DeepStack adds nothing to text: it has no levels here.
            self._step_inputs[bindings.DEEPSTACK_EMBEDS] = self._inputs.new_empty(0, 1, 1, text.hidden_size)
            self._likeliest = torch.zeros(2, dtype=torch.float64, pin_memory=on_cuda)
            self.graph = self._capture() if on_cuda else None
            """The decode step as a CUDA graph, where there is CUDA and it could be captured."""

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def prefill(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with evaluation("the decoder engine"):
            inputs = self._engine.tensors({**feeds, bindings.PAST_LENGTH: np.array([self.length], np.int32)})
            outputs = self._run(inputs)
            found = {name: output.numpy(force=True) for name, output in outputs.items()}
        # Last, so that an interrupt anywhere above leaves the cache as it was.
        self.length += feeds[bindings.INPUTS_EMBEDS].shape[1]
        return found

    def decode(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        self._decode(feeds)
        return self._logits.numpy(force=True)

    def decode_greedy(self, feeds: Mapping[str, np.ndarray]) -> tuple[int, float]:
        self._decode(feeds)
        token, logit = self._likeliest.tolist()
        return int(token), logit

    def _decode(self, feeds: Mapping[str, np.ndarray]) -> None:
        for name, array in feeds.items():
            self._staged_inputs[name][:] = array
        self._staged_inputs[bindings.PAST_LENGTH][0] = self.length
        with evaluation("the decoder engine"):
            if self.graph:
                self.graph.replay()
            else:
                self._step()
            if self._engine.device.type == "cuda":
                torch.cuda.current_stream(self._engine.device).synchronize()
        self.length += 1

    def _step(self) -> None:
        """From `_staged` to `_logits` on the device and `_likeliest` on the host, without waiting for the device."""
        self._inputs.copy_(self._staged, non_blocking=True)
        self._logits = self._run(self._step_inputs)[bindings.LOGITS]
        logit, token = self._logits[0].max(0)  # the first of equal ones, or of NaNs
        self._likeliest.copy_(torch.stack((token.double(), logit.double())), non_blocking=True)

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the decoder and append; returns its other outputs."""
        outputs = self._engine.forward(bindings.DECODER, {**inputs, **self._past})
        new_key, new_value = (
            torch.stack([outputs.pop(name(layer)) for layer in range(len(self._rows))])
            for name in (bindings.new_key, bindings.new_value)
        )
        past_length = inputs[bindings.PAST_LENGTH]
        torch_kernels.kv_append(
            self._engine.kernels, new_key, new_value, self._rows[:, 0], self._rows[:, 1], past_length
        )
        return outputs

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """Record the decode step; where that cannot be done, say why."""
        device = self._engine.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # which a capture that fails would leave the current one
            self._step()  # what libraries set up on first use cannot be captured
            try:
                with torch.cuda.graph(graph, stream=stream):
                    self._step()
            except (RuntimeError, ValueError, UserError) as error:
                cause = error.__context__ or error  # ending a capture that failed is an error of its own
                log.warning("the decode step is no CUDA graph, and slower: it cannot be captured (%s)", cause)
                graph = None
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph


def build(model_bundle: Path, directory: Path, manifest: Manifest, kv_format: KVFormat) -> dict[str, str]:
    """Copy the weights into ``directory`` and note where they are, load them once; returns the manifest's description.

    The modules take any cache format: the manifest's.
    """
    import onnx

    weights = {}
    for graph, data in _DATA.items():
        proto = onnx.load(model_bundle / f"{graph}.onnx", load_external_data=False)
        weights[graph] = {
            tensor.doc_string: {
                "offset": next(int(entry.value) for entry in tensor.external_data if entry.key == "offset"),
                "shape": list(tensor.dims),
            }
            for tensor in proto.graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        }
        shutil.copyfile(model_bundle / data, directory / data)
    shutil.copyfile(model_bundle / CHECKPOINT_CONFIG, directory / CHECKPOINT_CONFIG)
    (directory / _WEIGHTS).write_text(json.dumps(weights, indent=1) + "\n", encoding="utf-8")
    _load(directory, manifest, torch.device("cpu"))
    return {"name": NAME, "version": torch.__version__}


def open_engine(directory: Path, manifest: Manifest, marked_layers: bool) -> TorchEngine:
    """See `pascalvl.engines.open_engine`."""
    return TorchEngine(directory, manifest, marked_layers)


@contextlib.contextmanager
def evaluation(what: str) -> Iterator[None]:
    """Inside, modules run without autograd and with the kernels; `MemoryError` says ``what`` found no room."""
    try:
        with torch.inference_mode(), torch_kernels.emulated():
            yield
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise MemoryError(what) from error
        raise


def _device() -> torch.device:
    """CUDA's current device if there is one, else the CPU."""
    if not torch.cuda.is_available():
        log.info("device cpu, the kernels in their emulator: PyTorch %s finds no CUDA device", torch.__version__)
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:  # made for other cards, or another program has all of its memory
        raise UserError(
            f"PyTorch {torch.__version__} cannot use {name} ({str(error).splitlines()[0]}): install one made for "
            "it, end what else uses it, or hide it with CUDA_VISIBLE_DEVICES= to use the CPU."
        ) from error
    log.info("device %s: %s", device, name)
    return device


def _load(directory: Path, manifest: Manifest, device: torch.device) -> dict[str, nn.Module]:
    """The modules by graph, their weights mapped from the bundle and, one by one, copied to a GPU."""
    config = Qwen3VLConfig.from_dict(read_json(directory / CHECKPOINT_CONFIG, _REMEDY))
    _check(directory, manifest, config)
    model = meta_model(config)
    weights = {}
    for graph, places in read_json(directory / _WEIGHTS, _REMEDY).items():
        for note, place in places.items():
            # Copy on write: PyTorch knows no tensors that cannot be written. None is.
            array = np.memmap(directory / _DATA[graph], np.float32, "c", place["offset"], tuple(place["shape"]))
            tensor = torch.from_numpy(array)
            name = note.removesuffix(TRANSPOSED)
            tensor = (tensor.T if note != name else tensor).reshape(model.get_parameter(name).shape)
            weights[name] = tensor.to(device)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if missing := [n for n, p in model.named_parameters() if p.is_meta and n != TOKEN_EMBEDDINGS]:
        raise UserError(f"{directory} lacks the weight {missing[0]}: {_REMEDY}.")
    return {bindings.VISION: VisionEncoder(model).eval(), bindings.DECODER: Decoder(model).eval()}


def _check(directory: Path, manifest: Manifest, config: Qwen3VLConfig) -> None:
    """Compare the config with the manifest's model, so that mixed-up files fail here and not in a run."""
    for found, expected in (
        (config.text_config, manifest.model.text),
        (config.vision_config, manifest.model.vision),
    ):
        for field in dataclasses.fields(expected):
            value = getattr(found, field.name, getattr(expected, field.name))  # what is derived is not in the config
            value = tuple(value) if isinstance(value, list) else value
            if value != getattr(expected, field.name):
                raise UserError(
                    f"{directory / CHECKPOINT_CONFIG} is for another model: expected {field.name} "
                    f"{getattr(expected, field.name)}, found {value}; {_REMEDY}."
                )
