"""Backend for machines without a Pascal card: the exported graphs themselves.

The decoder's attention is the op's ONNX body. The vision encoder's body would materialise the scores, patches x patches
for each head: gigabytes for a photograph. It becomes ONNX Runtime's own attention, which on the CPU is blocked as
FlashAttention is where it has neither mask nor bias: hence one call for each of the packed sequences. Linear layers in
codes become ONNX Runtime's own MatMulNBits, which rounds inputs to int8 by group too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from pascalvl.engines.device.gpu import find_gpu
from pascalvl.engines.engine import Engine
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import ONNX_FILES, Manifest
from pascalvl.plugins.errors import UserError, library_reason, shown
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.ops.flash_attention.onnx_body import PACKED_ATTRIBUTES, PACKED_INPUTS, PACKED_PROLOGUE
from pascalvl.plugins.ops.flash_attention.op import ATTR_NUM_HEADS, ATTR_SOFTMAX_SCALE, OP_DOMAIN, OP_NAME
from pascalvl.plugins.ops.onnx_text import INT64, OPSET

if TYPE_CHECKING:
    import onnx

NAME = "onnxruntime"
FILES = ONNX_FILES
"""What an engine bundle holds beside `HOST_FILES`."""
_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
_ERRORS_ONLY = 3
_FAILURES = (
    ort_errors.Fail,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.InvalidArgument,
    ort_errors.NoSuchFile,
    ort_errors.RuntimeException,
    ort_errors.NotImplemented,
    UnicodeDecodeError,  # a message that is no text
)
_PACKED_ATTENTION = f"""
<opset_import: ["" : {OPSET}, "com.microsoft" : 1], domain: "{OP_DOMAIN}">
{OP_NAME} <{", ".join(PACKED_ATTRIBUTES)}> ({", ".join(PACKED_INPUTS)}) => (output) {{
  {" ".join(PACKED_PROLOGUE)}
  axis = Constant <value_ints = [1]> ()
  next_of = Constant <value = int64 {{1}}> ()
  true = Constant <value = bool {{1}}> ()
  tokens = Shape <start = 0, end = 1> (qkv)
  flat_of = Concat <axis = 0> (one, tokens, minus_one)
  qk = Reshape (roped, flat_of)
  queries, keys = Split <axis = 2> (qk)
  values = Unsqueeze (v_flat, zero)
  bounds = Cast <to = {INT64}> (cu_seqlens)
  num_bounds = Size (bounds)
  segments = Sub (num_bounds, next_of)
  nothing = Slice (queries, zero, zero, axis)
  packed = Loop (segments, true, nothing) <body = segment (int64 i, bool go_on, float[b, t, h] done)
                                                => (bool going_on, float[b, u, h] further) {{
    going_on = Identity (go_on)
    next = Add (i, next_of)
    first_token = Gather <axis = 0> (bounds, i)
    last_token = Gather <axis = 0> (bounds, next)
    start = Unsqueeze (first_token, zero)
    stop = Unsqueeze (last_token, zero)
    own_queries = Slice (queries, start, stop, axis)
    own_keys = Slice (keys, start, stop, axis)
    own_values = Slice (values, start, stop, axis)
    attended = com.microsoft.MultiHeadAttention
      <num_heads : int = @{ATTR_NUM_HEADS}, scale : float = @{ATTR_SOFTMAX_SCALE}> (own_queries, own_keys, own_values)
    further = Concat <axis = 1> (done, attended)
  }}>
  output = Squeeze (packed, zero)
}}
"""
"""The op where not causal."""


class OnnxRuntimeEngine(Engine):
    """Both graphs as ONNX Runtime sessions, on CUDA where this build of ONNX Runtime has it, else on the CPU."""

    def __init__(self, directory: Path, manifest: Manifest, marked_layers: bool) -> None:
        super().__init__(directory, manifest)
        model = manifest.model
        decoder = _with_marked_layers(directory, manifest) if marked_layers else _path(directory, bindings.DECODER)
        self._sessions = {
            graph: _session(directory, path, f"the engine in {directory}", manifest.remedy)
            for graph, path in ((bindings.VISION, _path(directory, bindings.VISION)), (bindings.DECODER, decoder))
        }
        if _PROVIDERS[0] in self._sessions[bindings.DECODER].get_providers():
            self.gpu = find_gpu().name
        self._check(bindings.VISION, bindings.vision_inputs(model))
        self._check(bindings.DECODER, bindings.decoder_inputs(model, manifest.kv_cache))
        self._output_names = {
            graph: [output.name for output in session.get_outputs()] for graph, session in self._sessions.items()
        }

    def run(self, graph: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = self._output_names[graph]
        try:
            return dict(zip(names, self._sessions[graph].run(names, feeds), strict=True))
        except _FAILURES as error:
            if "allocate memory" in str(error) or "bad_alloc" in str(error):
                raise MemoryError(f"the {graph} engine") from error
            raise UserError(
                f"ONNX Runtime {ort.__version__} cannot run the {graph} engine of {self.directory} "
                f"({library_reason(error)}): {self.manifest.remedy}."
            ) from error

    def _check(self, graph: str, expected: list[bindings.Binding]) -> None:
        """Compare a session's inputs with the manifest's model, so that mixed-up files fail here and not in a run."""
        found = {value.name: value for value in self._sessions[graph].get_inputs()}
        for binding in expected:
            value = found.pop(binding.name, None)
            kind = {"float32": "tensor(float)", "float16": "tensor(float16)", "int32": "tensor(int32)"}
            if value is None or value.type != kind[binding.dtype.name] or tuple(value.shape) != binding.shape:
                what = f"{value.type} {value.shape}" if value else "none"
                raise UserError(
                    f"the {graph} engine of {self.directory} is for another model: expected input {binding.name} "
                    f"{binding.dtype.name} {list(binding.shape)}, found {what}; {self.manifest.remedy}."
                )
        if found:
            raise UserError(
                f"the {graph} engine of {self.directory} is for another model: it has the further inputs "
                f"{shown(', '.join(found))}; {self.manifest.remedy}."
            )


def uses_gpu() -> bool:
    """Whether the ONNX Runtime that is installed may run on one."""
    return _PROVIDERS[0] in ort.get_available_providers()


def build(model_bundle: Path, directory: Path, manifest: Manifest, cache: CacheConfig) -> dict[str, str]:
    """Write the graphs for ``cache`` into ``directory``, load them once, and return the manifest's description."""
    import onnx

    from pascalvl.engines import graphs
    from pascalvl.engines.onnxruntime import matmul_nbits

    for graph in (bindings.VISION, bindings.DECODER):
        with graphs.reading(_path(model_bundle, graph), manifest.remedy):
            proto = onnx.load(_path(model_bundle, graph), load_external_data=False)
            if graph == bindings.DECODER:
                graphs.set_cache(proto, manifest.model, cache)
            else:
                _use_blocked_attention(proto)
            matmul_nbits.lower(proto, model_bundle / f"{graph}.onnx.data", directory / f"{graph}.onnx.data")
            onnx.save(proto, _path(directory, graph))
        _session(directory, _path(directory, graph), f"what was made of {model_bundle}", manifest.remedy)
    return {"name": NAME, "version": ort.__version__}


def open_engine(directory: Path, manifest: Manifest, marked_layers: bool) -> OnnxRuntimeEngine:
    """See `pascalvl.engines.open_engine`."""
    return OnnxRuntimeEngine(directory, manifest, marked_layers)


def _path(directory: Path, graph: str) -> Path:
    return directory / f"{graph}.onnx"


def _session(directory: Path, model: Path | bytes, what: str, remedy: str) -> ort.InferenceSession:
    """Load a graph, whose weights are in ``directory``; the rest is for errors: what is loaded, and what to do."""
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    providers = [name for name in _PROVIDERS if name in ort.get_available_providers()]
    try:
        # Trying again on the CPU would be told on stdout.
        source = model if isinstance(model, bytes) else str(model)
        return ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except _FAILURES as error:
        # It reads weights through no link that leads out of the folder.
        if any(path.is_symlink() for path in directory.iterdir()):
            remedy = "copy the files that its links point to into it (cp -rL)"
        raise UserError(
            f"ONNX Runtime {ort.__version__} cannot load {what} ({library_reason(error)}): {remedy}."
        ) from error


def _use_blocked_attention(proto: onnx.ModelProto) -> None:
    """Give a vision graph's attention a body whose memory grows with the patches and not with their square."""
    from onnx import helper, parser

    others = [function for function in proto.functions if function.name != OP_NAME]
    del proto.functions[:]
    proto.functions.extend(others)
    proto.functions.append(parser.parse_function(_PACKED_ATTENTION))
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _with_marked_layers(directory: Path, manifest: Manifest) -> bytes:
    import onnx

    from pascalvl.engines import graphs

    with graphs.reading(_path(directory, bindings.DECODER), manifest.remedy):
        proto = onnx.load(_path(directory, bindings.DECODER), load_external_data=False)
        graphs.mark_layers(proto, manifest.model)
        return proto.SerializeToString()
