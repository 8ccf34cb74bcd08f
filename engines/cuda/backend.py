"""Backend for every NVIDIA GPU from SM61 on: the exported graphs as launches of our kernels, through the driver alone.

No TensorRT, torch or ONNX at run time: a bundle holds a plan of launches, and the weights as they were exported.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pascalvl.engines.cuda.engine import CudaEngine, upload_files
from pascalvl.engines.cuda.plan import Plan
from pascalvl.engines.device.dry_run import DryRun
from pascalvl.engines.device.gpu import PASCAL, find_gpu
from pascalvl.engines.device.memory import CudaDevice, Device
from pascalvl.engines.device.tensors import shape_of
from pascalvl.engines.engine import DeviceMemory
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest, read_json
from pascalvl.plugins.errors import UserError, reading
from pascalvl.plugins.kernels.build import Target, cached
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.ops.flash_attention import op as flash_attention
from pascalvl.plugins.ops.quant_linear import op as quant_linear

NAME = "cuda"
_PLAN = "plan.json"
_GRAPHS = (bindings.VISION, bindings.DECODER)
_PICTURE = 1024
"""Side, in pixels, of the picture of which `memory` tells."""
_WEIGHTS = {graph: f"{graph}.onnx.data" for graph in _GRAPHS}
FILES = (_PLAN, *_WEIGHTS.values())
"""What an engine bundle holds beside `HOST_FILES`."""
CHECKED_WHEN_READ = tuple(_WEIGHTS.values())
"""Files whose hashes `open_engine` checks."""
LAYOUT = 1
"""Of the plan's file: one more whenever it changes."""
_VERSIONS = {
    "layout": str(LAYOUT),
    **{op.OP_NAME: f"{op.OP_VERSION}.{op.SERIALISED_LAYOUT}" for op in (flash_attention, quant_linear)},
}


def unavailable() -> str:
    """Why this machine cannot run it; empty: it can."""
    try:
        gpu = find_gpu()
    except UserError as error:
        return str(error).rstrip(".")
    if gpu.capability < PASCAL:
        return f"the kernels are for compute capability {_dotted(PASCAL)} and above; {gpu.name} has {gpu.sm}"
    return ""


def depends_on() -> dict[str, str]:
    """What a bundle's engines are for, besides the model."""
    return _VERSIONS


def build(model_bundle: Path, directory: Path, manifest: Manifest, cache: CacheConfig) -> dict[str, str]:
    """Write the graphs' plans and copy the weights into ``directory``; returns the manifest's description."""
    import onnx

    from pascalvl.engines import graphs
    from pascalvl.engines.cuda.lowering import lower

    model, plans = manifest.model, {}
    inputs = {
        bindings.VISION: bindings.vision_inputs(model),
        bindings.DECODER: bindings.decoder_inputs(model, cache),
    }
    outputs = {
        bindings.VISION: bindings.vision_outputs(model),
        bindings.DECODER: bindings.decoder_outputs(model, cache),
    }
    for graph, data in _WEIGHTS.items():
        path = model_bundle / f"{graph}.onnx"
        with graphs.reading(path, manifest.remedy):
            proto = onnx.load(path, load_external_data=False)
            if graph == bindings.DECODER:
                graphs.set_cache(proto, model, cache)
            plans[graph] = lower(proto, inputs[graph], outputs[graph]).to_json()
        shutil.copyfile(model_bundle / data, directory / data)
    content = {**_made_for(dataclasses.replace(manifest, kv_cache=cache)), "graphs": plans}
    (directory / _PLAN).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return {"name": NAME, **_VERSIONS}


def open_engine(
    directory: Path, manifest: Manifest, marked_layers: bool, progress: Callable[[int], None] = lambda _: None
) -> CudaEngine:
    """See `pascalvl.engines.open_engine`; ``progress`` is called with numbers of bytes of `CHECKED_WHEN_READ`."""
    plans, device = _read_plans(directory, manifest), open_device()
    paths = {graph: directory / data for graph, data in _WEIGHTS.items()}
    try:
        weights = upload_files(device, paths, manifest.check_piece, progress)
    except MemoryError:
        size = sum(path.stat().st_size for path in paths.values())
        raise UserError(
            f"the weights of {directory} take {size / 1e9:.1f} GB, more than is free of the GPU's memory: end what "
            "else uses the card, or export the checkpoint with smaller weights (--weights w4)."
        ) from None
    return CudaEngine(directory, manifest, plans, weights, device, marked_layers)


def memory(directory: Path, manifest: Manifest, capacities: Sequence[int]) -> list[DeviceMemory]:
    """See `pascalvl.engines.device_memory`."""
    plans, gpu = _read_plans(directory, manifest), open_device()
    sizes = {"patches": (_PICTURE // manifest.model.vision.patch_size) ** 2, "segments_plus_1": 2}
    inputs = bindings.vision_inputs(manifest.model)
    picture = {binding.name: np.zeros(shape_of(binding, sizes), binding.dtype) for binding in inputs}

    def of(capacity: int) -> DeviceMemory:
        device = DryRun(gpu)
        weights = {graph: device.allocate(manifest.files[data]["bytes"]) for graph, data in _WEIGHTS.items()}
        of_weights = device.nbytes
        engine = CudaEngine(directory, manifest, plans, weights, device)
        session = engine.open_session(capacity)
        opened = device.nbytes
        engine.encode([picture])
        return DeviceMemory(of_weights, session.nbytes, opened - of_weights - session.nbytes, device.peak - opened)

    return [of(capacity) for capacity in capacities]


def _read_plans(directory: Path, manifest: Manifest) -> dict[str, Plan]:
    if found := [f"{name} {manifest.backend.get(name)}" for name in _VERSIONS if not _matches(manifest, name)]:
        expected = ", ".join(f"{name} {version}" for name, version in _VERSIONS.items())
        raise UserError(
            f"{directory} was built by another version of PascalVL ({', '.join(found)}; this one has {expected}): "
            f"{manifest.remedy}."
        )
    with reading(directory / _PLAN, manifest.remedy):
        content = read_json(directory / _PLAN, manifest.remedy)
        plans = {graph: Plan.from_json(content["graphs"][graph]) for graph in _GRAPHS}
        if {name: content[name] for name in _made_for(manifest)} != _made_for(manifest):
            raise UserError(f"{directory / _PLAN} is for another model, or another KV cache: {manifest.remedy}.")
    return plans


def open_device() -> Device:
    """The GPU; raises `UserError` where there is none that can be used."""
    if reason := unavailable():
        raise UserError(f"backend cuda cannot run here: {reason}; --backend onnxruntime runs on the CPU.")
    return CudaDevice(cached(Target.CUDA))


def _made_for(manifest: Manifest) -> dict[str, Any]:
    """What a plan depends on, so that mixed-up files are found when they are opened."""
    return json.loads(json.dumps({"model": manifest.model.to_json(), "kv_cache": str(manifest.kv_cache)}))


def _matches(manifest: Manifest, name: str) -> bool:
    return manifest.backend.get(name) == _VERSIONS[name]


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)
