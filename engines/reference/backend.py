"""Backend ``reference``: the graphs without TensorRT, the nodes of the two ops run by the real plugin library.

`ReferencePlan` stands in for TensorRT's engine under the runtime that TensorRT has (`pascalvl.engines.tensorrt.engine`:
profiles, addresses, external cache, decode loop). It evaluates the graph that a build would give TensorRT, node by node
in NumPy (onnx's reference evaluator); nodes of FlashAttention2 and QuantLinear go through TensorRT's plugin interface
to the plugins' library, which reads cache and weights where they lie: on a GPU where there is one, in the emulator
otherwise. Right, and slow.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from pascalvl.engines import graphs
from pascalvl.engines.device.memory import ALIGNMENT, Buffer, Device, available_target, open_device
from pascalvl.engines.device.tensors import Buffers
from pascalvl.engines.tensorrt.engine import TensorRTEngine
from pascalvl.engines.tensorrt.profiles import Limits, Shapes, profiles
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import ONNX_FILES, Manifest
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.tensorrt.host import HostedPlugin, PluginHost, plugin_host

NAME = "reference"
FILES = ONNX_FILES
"""What an engine bundle holds beside `HOST_FILES`."""
MAJOR = 8
"""Whose plugin interface is spoken: that of TensorRT 8.6 and 9.x, which serve Pascal cards."""
_LIMITS = Limits(prefill_chunk=512, max_patches=65536, max_context=262144)
_GRAPHS = (bindings.VISION, bindings.DECODER)
_CACHES = ("past_key.", "past_value.", "past_scale.")


class OnDevice(np.ndarray):
    """A tensor that lies on the device, at `pointer`: type and shape are right, what it holds here is nothing."""

    pointer: int

    @classmethod
    def at(cls, pointer: int, dtype: np.dtype, shape: Sequence[int]) -> OnDevice:
        array = np.broadcast_to(np.zeros((), dtype), shape).view(cls)
        array.pointer = pointer
        return array


class _Plugins:
    """Runs the ops' nodes in the plugins."""

    def __init__(self, host: PluginHost, device: Device) -> None:
        self._host, self._device = host, device
        self._buffers = Buffers(device)
        self._constants: dict[str, Buffer] = {}
        self._plugins: dict[int, HostedPlugin] = {}

    def operators(self, proto: onnx.ModelProto) -> list[type[OpRun]]:
        """A graph's ops, each of its domains, for onnx's evaluator."""
        ops = {(node.domain, node.op_type) for node in proto.graph.node if node.op_type in graphs.OP_VERSIONS}
        return [self._operator(domain, name) for domain, name in sorted(ops)]

    def _operator(self, domain: str, name: str) -> type[OpRun]:
        run = self._run

        class Op(OpRun):
            op_domain = domain

            def _run(self, *inputs: np.ndarray, **_: Any) -> tuple[np.ndarray, ...]:
                return run(id(self), self.onnx_node, inputs)

        Op.__name__ = name
        return Op

    def upload_constants(self, proto: onnx.ModelProto) -> dict[str, OnDevice]:
        """Put what only plugins read of a graph's weights on the device; returns that, by name."""
        readers = Counter(
            name for node in proto.graph.node if node.op_type not in graphs.OP_VERSIONS for name in node.input
        )
        names = {name for node in proto.graph.node if node.op_type in graphs.OP_VERSIONS for name in node.input}
        constants = {}
        for tensor in proto.graph.initializer:
            if tensor.name in names and not readers[tensor.name]:
                array = onnx.numpy_helper.to_array(tensor)
                buffer = self._constants[tensor.name] = self._device.allocate(array.nbytes)
                self._device.upload(buffer.pointer, np.ascontiguousarray(array))
                self._device.synchronize()
                constants[tensor.name] = OnDevice.at(buffer.pointer, array.dtype, array.shape)
        return constants

    def _run(self, key: int, node: onnx.NodeProto, inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        if key not in self._plugins:
            attributes = _attributes(node)
            version = str(attributes.pop(graphs.PLUGIN_VERSION))
            self._plugins[key] = self._host.create(attributes, node.op_type, version)
        shapes = [(array.dtype, array.shape) for array in inputs]
        results, workspace = self._plugins[key].prepare(shapes)
        pointers = [self._pointer(i, array) for i, array in enumerate(inputs)]
        outputs = tuple(np.empty(shape, dtype) for dtype, shape in results)
        to = [self._buffers.get(f"output {i}", array.nbytes) for i, array in enumerate(outputs)]
        working = self._buffers.get("workspace", workspace)
        self._plugins[key].enqueue(shapes, pointers, results, to, working, self._device.stream)
        for array, pointer in zip(outputs, to, strict=True):
            self._device.download(array, pointer)
        self._device.synchronize()
        return outputs

    def _pointer(self, number: int, array: np.ndarray) -> int:
        if isinstance(array, OnDevice):
            return array.pointer
        pointer = self._buffers.get(f"input {number}", array.nbytes)
        self._device.upload(pointer, np.ascontiguousarray(array))
        return pointer


class ReferencePlan:
    """In the place of TensorRT's ``ICudaEngine``: a graph, without the ops' bodies, and its profiles."""

    def __init__(self, proto: onnx.ModelProto, ranges: list[Shapes], plugins: _Plugins, device: Device):
        graphs.leave_ops_to_plugins(proto)
        self.evaluator = ReferenceEvaluator(proto, new_ops=plugins.operators(proto))
        self.evaluator.rt_inits_.update(plugins.upload_constants(proto))
        self.ranges = ranges
        self.device = device
        self.inputs = {value.name: _dtype(value) for value in proto.graph.input}
        self.outputs = {value.name: _dtype(value) for value in proto.graph.output}

    device_memory_size = 1 << 16
    """Bytes that a context wants; it needs none, but leaves nothing there as it was."""

    def create_execution_context_without_device_memory(self) -> ReferenceContext:
        return ReferenceContext(self)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return list(self.ranges[profile_index][name])


class ReferenceContext:
    """In the place of TensorRT's ``IExecutionContext``; what that refuses by returning False, this does."""

    def __init__(self, plan: ReferencePlan) -> None:
        self._plan = plan
        self._ranges: Shapes = plan.ranges[0]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.device_memory = 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self._plan.ranges):
            return False
        self._ranges = self._plan.ranges[profile_index]
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        smallest, _, largest = map(np.array, self._ranges[name])
        if len(shape) != len(smallest) or (shape < smallest).any() or (shape > largest).any():
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._plan.inputs and name not in self._plan.outputs:
            return False
        self._addresses[name] = memory
        return memory % ALIGNMENT == 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        plan, device = self._plan, self._plan.device
        if device.is_capturing():  # NumPy is nothing that a CUDA graph records
            return False
        bound = self._addresses.keys() == plan.inputs.keys() | plan.outputs.keys()
        has_memory = self.device_memory and self.device_memory % ALIGNMENT == 0
        if self._shapes.keys() != plan.inputs.keys() or not bound or not has_memory:
            return False
        device.upload(self.device_memory, np.full(plan.device_memory_size, 0xFF, np.uint8))
        feeds: dict[str, np.ndarray] = {}
        for name, dtype in plan.inputs.items():
            shape, pointer = self._shapes[name], self._addresses[name]
            if name.startswith(_CACHES):
                feeds[name] = OnDevice.at(pointer, dtype, shape)
            else:
                feeds[name] = np.empty(shape, dtype)
                device.download(feeds[name], pointer)
        device.synchronize()
        for name, value in zip(plan.outputs, plan.evaluator.run(list(plan.outputs), feeds), strict=True):
            device.upload(self._addresses[name], np.ascontiguousarray(value, plan.outputs[name]))
        device.synchronize()
        return True


def _attributes(node: onnx.NodeProto) -> dict[str, int | float | str]:
    """What the node says itself, which is what TensorRT's parser tells a plugin: no defaults of a schema."""
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def _dtype(value: onnx.ValueInfoProto) -> np.dtype:
    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def build(model_bundle: Path, directory: Path, manifest: Manifest, cache: CacheConfig) -> dict[str, str]:
    """Write the graphs for ``cache`` and copy their weights into ``directory``; returns the manifest's description."""
    for graph in _GRAPHS:
        path = model_bundle / f"{graph}.onnx"
        with graphs.reading(path, manifest.remedy):
            proto = onnx.load(path, load_external_data=False)
            if graph == bindings.DECODER:
                graphs.set_cache(proto, manifest.model, cache)
            onnx.save(proto, directory / path.name)
        shutil.copyfile(f"{path}.data", directory / f"{path.name}.data")
    return {"name": NAME, "version": onnx.__version__}


def open_engine(directory: Path, manifest: Manifest, marked_layers: bool) -> TensorRTEngine:
    """See `pascalvl.engines.open_engine`."""
    target = available_target()
    host = plugin_host(target)  # before anything else loads the plugin's library: it registers itself then
    device = open_device(target, host.plugin)
    plugins = _Plugins(host, device)
    plans = {}
    for graph in _GRAPHS:
        ranges = profiles(graph, manifest.model, manifest.kv_cache, _LIMITS)
        with graphs.reading(directory / f"{graph}.onnx", manifest.remedy):
            proto = onnx.load(directory / f"{graph}.onnx")
            if marked_layers and graph == bindings.DECODER:
                graphs.mark_layers(proto, manifest.model)
            plans[graph] = ReferencePlan(proto, ranges, plugins, device)
    return TensorRTEngine(directory, manifest, plans, device, marked_layers)
