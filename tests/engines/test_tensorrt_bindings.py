"""Every call that is made of TensorRT is one that the Python bindings of 8.6.1 have, by their own account."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pascalvl import engines
from pascalvl.engines.reference import backend as plugin_host
from tests.engines.bindings_8_6 import MEMBERS

ROOT = Path(__file__).parents[2]
ENGINES = Path(engines.__file__).parent
SIGNATURES = """
Builder.__init__(logger: ILogger) -> None
Builder.create_builder_config() -> IBuilderConfig
Builder.create_network(flags: int = 0) -> INetworkDefinition
Builder.create_optimization_profile() -> IOptimizationProfile
IBuilderConfig.add_optimization_profile(profile: IOptimizationProfile) -> int
IBuilderConfig.clear_flag(flag: BuilderFlag) -> None
IBuilderConfig.create_timing_cache(serialized_timing_cache: buffer) -> ITimingCache
IBuilderConfig.get_timing_cache() -> ITimingCache
IBuilderConfig.max_aux_streams: writable
IBuilderConfig.profiling_verbosity: writable
IBuilderConfig.set_preview_feature(feature: PreviewFeature, enable: bool) -> None
IBuilderConfig.set_tactic_sources(tactic_sources: int) -> bool
IBuilderConfig.set_timing_cache(cache: ITimingCache, ignore_mismatch: bool) -> bool
ICudaEngine.create_execution_context_without_device_memory() -> IExecutionContext
ICudaEngine.device_memory_size: property
ICudaEngine.get_tensor_profile_shape(name: str, profile_index: int) -> List[Dims]
IExecutionContext.device_memory: writable
IExecutionContext.execute_async_v3(stream_handle: int) -> bool
IExecutionContext.set_input_shape(name: str, shape: Dims) -> bool
IExecutionContext.set_optimization_profile_async(profile_index: int, stream_handle: int) -> bool
IExecutionContext.set_tensor_address(name: str, memory: int) -> bool
ILogger.__init__() -> None
IOptimizationProfile.set_shape(input: str, min: Dims, opt: Dims, max: Dims) -> None
IPluginRegistry.get_plugin_creator(type: str, version: str, plugin_namespace: str = '') -> IPluginCreator
ITimingCache.combine(input_cache: ITimingCache, ignore_mismatch: bool) -> bool
ITimingCache.serialize() -> IHostMemory
OnnxParser.__init__(network: INetworkDefinition, logger: ILogger) -> None
OnnxParser.get_error(index: int) -> nvonnxparser::IParserError
OnnxParser.num_errors: property
OnnxParser.parse_from_file(model: str) -> bool
Runtime.__init__(logger: ILogger) -> None
Runtime.deserialize_cuda_engine(serialized_engine: buffer) -> ICudaEngine
"""
MODULE = {
    *("Builder", "ILogger", "NetworkDefinitionCreationFlag", "OnnxParser", "PreviewFeature", "Runtime", "TacticSource"),
    *("__version__", "get_plugin_registry"),
}
"""What is used of the module itself."""
NEWER = {"IProgressMonitor"}
"""Of it, what is used only where there is one."""
OBJECTS = {
    "builder": "Builder",
    "parser": "OnnxParser",
    "trt.Runtime(logger)": "Runtime",
    "trt.get_plugin_registry()": "IPluginRegistry",
    "tensorrt.get_plugin_registry()": "IPluginRegistry",
    "trt.ILogger": "ILogger",
    "self._context": "IExecutionContext",
    "plan": "ICudaEngine",
    "self.plans[graph]": "ICudaEngine",
    "engine.plans[graph]": "ICudaEngine",
}
"""Expressions in `engines` whose values are TensorRT's, and their classes."""


@pytest.fixture(scope="module")
def bindings(tmp_path_factory) -> dict:
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("the bindings of TensorRT 8.6.1 are for Python up to 3.11")
    command = [sys.executable, "-m", "tests.engines.bindings_8_6", tmp_path_factory.mktemp("linked")]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def used() -> set[tuple[str, str]]:
    """Class (or module) and member of what `engines` uses of TensorRT."""
    found = set()
    for name in ("tensorrt/backend", "tensorrt/engine", "doctor/probe"):
        for node in ast.walk(ast.parse((ENGINES / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                value = ast.unparse(node.value)
                if value in ("trt", "tensorrt") and not (name == "doctor/probe" and value == "trt"):
                    found.add(("module", node.attr))
                elif value in OBJECTS:
                    found.add((OBJECTS[value], node.attr))
    return found


def test_the_bindings_have_these_signatures(bindings):
    assert bindings["version"] == "8.6.1"
    found = []
    for owner, members in bindings["members"].items():
        for member, line in members.items():
            if member != "Severity":
                line = re.sub(rf"^{member}\(self: {owner}(, )?", f"{member}(", line)
                found.append(f"{owner}.{line}" if "(" in line else f"{owner}.{member}: {line}")
    assert sorted(found) == sorted(SIGNATURES.strip().splitlines())


def test_no_other_calls_are_made(bindings):
    found = used()
    assert {("IExecutionContext", "execute_async_v3"), ("ICudaEngine", "device_memory_size")} <= found
    of_module = {member for owner, member in found if owner == "module"}
    # Doctor's facts of TensorRT go by the name of the module, too.
    assert of_module - {"problem", "usable", "version"} <= MODULE | NEWER
    assert set(bindings["names"]) >= MODULE
    assert not set(bindings["names"]) & NEWER
    unlisted = {
        (owner, member) for owner, member in found if owner != "module" and member not in MEMBERS[owner]
    } - {("ILogger", "Severity")}  # fmt: skip
    assert not unlisted
    assert {"INTERNAL_ERROR", "ERROR", "WARNING", "INFO"} <= set(bindings["severities"])
    assert "EXPLICIT_BATCH" in bindings["flags"]


def test_what_runs_graphs_without_tensorrt_has_the_same_members():
    plan, context = plugin_host.ReferencePlan, plugin_host.ReferenceContext
    assert all(hasattr(plan, member) for member in MEMBERS["ICudaEngine"])
    assert all(hasattr(context, member) for member in MEMBERS["IExecutionContext"] if member != "device_memory")
    assert "device_memory" in context(type("Plan", (), {"ranges": [{}]})).__dict__


def test_what_the_backend_makes_of_8_6(bindings):
    """It is imported with these bindings in TensorRT's place."""
    assert bindings["logger"]
    assert not bindings["monitor"]
    assert set(bindings["default tactics"]) <= set(bindings["tactics"])
    assert bindings["default features"][0] == ["FASTER_DYNAMIC_SHAPES_0805", "PROFILE_SHARING_0806"]
