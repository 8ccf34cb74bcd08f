"""Backend cuda's plans as TensorRT 8.6.1 has engines: with the names and signatures that `TensorRTEngine` uses of it.

What TensorRT refuses by returning False, this does: shapes outside the profile, addresses that are not aligned, a start
before all is set. On a GPU its steps can be captured, as TensorRT's can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pascalvl.engines.cuda.engine import CudaEngine
from pascalvl.engines.device.memory import ALIGNMENT
from pascalvl.engines.tensorrt.engine import TensorRTEngine
from pascalvl.engines.tensorrt.profiles import Limits, Shapes, profiles
from pascalvl.plugins import bindings


class PlanAsEngine:
    """In the place of ``ICudaEngine``."""

    def __init__(self, engine: CudaEngine, graph: str, ranges: list[Shapes]) -> None:
        self.engine, self.graph, self.ranges = engine, graph, ranges
        self.inputs = {binding.name: binding for binding in engine.inputs[graph]}
        self.outputs = [binding.name for binding in engine.outputs[graph]]
        somewhere = dict.fromkeys([*self.inputs, *self.outputs], ALIGNMENT)
        self.device_memory_size = max(
            engine.bound(
                graph, self.sizes({name: largest for name, (_, _, largest) in shapes.items()}), somewhere
            ).nbytes
            for shapes in ranges
        )

    def sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Of the dimensions that vary, from the shapes of the inputs."""
        found = {
            size: length
            for name, binding in self.inputs.items()
            for size, length in zip(binding.shape, shapes[name], strict=True)
            if isinstance(size, str)
        }
        if self.graph == bindings.VISION:
            found["tokens"] = found["patches"] // self.engine.manifest.model.vision.spatial_merge_size**2
        return found

    def create_execution_context_without_device_memory(self) -> PlanAsContext:
        return PlanAsContext(self)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return list(self.ranges[profile_index][name])


class PlanAsContext:
    """In the place of ``IExecutionContext``."""

    def __init__(self, plan: PlanAsEngine) -> None:
        self._plan = plan
        self._ranges: Shapes = plan.ranges[0]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._launches: list[Callable[[], None]] | None = None
        self.device_memory = 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self._plan.ranges):
            return False
        self._ranges = self._plan.ranges[profile_index]
        self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        smallest, _, largest = self._ranges[name]
        if not all(least <= size <= most for least, size, most in zip(smallest, shape, largest, strict=True)):
            return False
        self._shapes[name], self._launches = tuple(shape), None
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._plan.inputs and name not in self._plan.outputs:
            return False
        self._addresses[name], self._launches = memory, None
        return memory % ALIGNMENT == 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        plan = self._plan
        bound = self._addresses.keys() == {*plan.inputs, *plan.outputs}
        if self._shapes.keys() != plan.inputs.keys() or not bound or self.device_memory % ALIGNMENT:
            return False
        if stream_handle != plan.engine.device.stream:
            return False
        if self._launches is None:
            steps = plan.engine.bound(plan.graph, plan.sizes(self._shapes), self._addresses)
            if not self.device_memory or steps.nbytes > plan.device_memory_size:
                return False
            self._launches = steps.launches(self.device_memory)
        for launch in self._launches:
            launch()
        return True


def behind_tensorrt(engine: CudaEngine, directory: Path, limits: Limits) -> TensorRTEngine:
    """TensorRT's runtime, as it is, over an engine's plans."""
    manifest = engine.manifest
    plans = {
        graph: PlanAsEngine(engine, graph, profiles(graph, manifest.model, manifest.kv_cache, limits))
        for graph in (bindings.VISION, bindings.DECODER)
    }
    return TensorRTEngine(directory, manifest, plans, engine.device)
