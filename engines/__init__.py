"""ONNX model bundle to engine bundle, and engine bundle to something that runs; one module a backend."""

from pascalvl.engines.backend import Engine, build, open_engine
from pascalvl.engines.build_options import BuildOptions
from pascalvl.engines.session import Session

__all__ = ["BuildOptions", "Engine", "Session", "build", "open_engine"]
