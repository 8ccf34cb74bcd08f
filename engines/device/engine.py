"""Engines whose graphs run on a device: on its memory and its stream, which a backend's graphs are started on."""

from __future__ import annotations

import abc
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pascalvl.engines.device.memory import Device
from pascalvl.engines.device.tensors import Buffers, DeviceArray, shape_of
from pascalvl.engines.engine import Engine, Features
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest


class DeviceEngine(Engine):
    """Both graphs on a device.

    Args:
        device: where they and the cache are.
        marked_layers: whether the decoder returns `bindings.hidden_states` of every layer as well.
    """

    max_prefill: int
    lengths: Sequence[int] = ()
    """Tokens to which steps are padded, and recorded, that have more of them than sequences."""

    def __init__(self, directory: Path, manifest: Manifest, device: Device, marked_layers: bool) -> None:
        super().__init__(directory, manifest)
        self.device = device
        self.gpu = device.gpu.name if device.gpu else None
        model = manifest.model
        self.inputs = {
            bindings.VISION: bindings.vision_inputs(model),
            bindings.DECODER: bindings.decoder_inputs(model, manifest.kv_cache),
        }
        self.outputs = {
            bindings.VISION: bindings.vision_outputs(model),
            bindings.DECODER: bindings.decoder_outputs(model, manifest.kv_cache),
        }
        if marked_layers:
            self.outputs[bindings.DECODER] += bindings.decoder_hidden_states(model)
        self.buffers = Buffers(device)
        """For calls that are not recorded."""
        self._positions: np.ndarray | None = None
        """The last call's `bindings.POSITION_EMBEDS`, which are still on the device."""

    @abc.abstractmethod
    def program(
        self, graph: str, sizes: Mapping[str, int], pointers: Mapping[str, int], kept: bool
    ) -> Callable[[], None]:
        """What starts a graph, on inputs and outputs at these addresses, without waiting for it.

        Args:
            graph: `bindings.DECODER` or `bindings.VISION`.
            sizes: of the dimensions that vary.
            pointers: by name. Without `bindings.DEEPSTACK_EMBEDS`, no token of the decoder's is a visual's.
            kept: whether it is started again later; else only before the next call of this method.

        Raises:
            MemoryError: there is no room for intermediate results.
            UserError: the sizes are not what the engine was built for.
        """

    def prepare(self, sizes_of: Callable[[int, int], Mapping[str, int]]) -> None:
        """Get ready for a session's steps, whose sizes are those of so many tokens and sequences."""

    def close(self) -> None:
        gc.collect()  # sessions' steps refer back to them
        self.device.close()

    def run(self, graph: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._start(graph, feeds)
        arrays = {}
        for name, (pointer, shape, dtype) in outputs.items():
            arrays[name] = np.empty(shape, dtype)
            self.device.download(arrays[name], pointer)
        self.device.synchronize()
        return arrays

    def encode(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> Features:
        """As the base class; features stay on the device."""
        model = self.manifest.model
        merged = model.vision.spatial_merge_size**2
        tokens = sum(len(feed[bindings.PIXEL_VALUES]) for feed in feeds) // merged
        embeds = DeviceArray(self.device, (tokens, model.text.hidden_size))
        levels = DeviceArray(self.device, (model.num_deepstack, *embeds.shape))
        done = 0
        for feed in feeds:
            outputs = self._start(bindings.VISION, feed)
            pointer, shape, _ = outputs[bindings.IMAGE_EMBEDS]
            nbytes = embeds.nbytes_of(shape)
            self.device.copy(embeds.at(done), pointer, nbytes)
            of_levels, _, _ = outputs[bindings.DEEPSTACK_EMBEDS]
            for level in range(model.num_deepstack):
                self.device.copy(levels.at(level, done), of_levels + level * nbytes, nbytes)
            done += shape[0]
        self.device.synchronize()
        return Features(embeds, levels)

    def on_host(self, features: Features) -> Features:
        return Features(features.embeds.numpy(), features.levels.numpy())

    def _start(self, graph: str, feeds: Mapping[str, np.ndarray]) -> dict[str, tuple[int, tuple[int, ...], np.dtype]]:
        """Start a graph on feeds; returns where its outputs come to be, their shapes and types."""
        sizes = self._sizes(graph, feeds)
        pointers = {}
        # Pictures are often of one size, and a video's patches in time are.
        are_there, self._positions = self._positions, None
        for binding in self.inputs[graph]:
            array = feeds[binding.name]
            pointers[binding.name] = self.buffers.get(f"{graph} {binding.name}", array.nbytes)
            if binding.name != bindings.POSITION_EMBEDS or array is not are_there:
                self.device.upload(pointers[binding.name], np.ascontiguousarray(array, binding.dtype))
        self._positions = feeds.get(bindings.POSITION_EMBEDS, are_there)
        outputs = {}
        for binding in self.outputs[graph]:
            shape = shape_of(binding, sizes)
            nbytes = int(np.prod(shape)) * binding.dtype.itemsize
            pointer = self.buffers.get(f"new {binding.name}", nbytes)  # deepstack_embeds go in and come out
            outputs[binding.name] = pointer, shape, binding.dtype
            pointers[binding.name] = pointer
        self.program(graph, sizes, pointers, kept=False)()
        return outputs

    def _sizes(self, graph: str, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The dimensions that vary, by name."""
        sizes = {
            name: size
            for binding in self.inputs[graph]
            for name, size in zip(binding.shape, feeds[binding.name].shape, strict=True)
            if isinstance(name, str)
        }
        if graph == bindings.VISION:
            sizes["tokens"] = sizes["patches"] // self.manifest.model.vision.spatial_merge_size**2
        return sizes
