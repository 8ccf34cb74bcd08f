"""ONNX model bundle to engine bundle, and engine bundle to something that runs; one folder a backend."""

import os

from pascalvl.engines.backends import build, device_memory, open_engine, target
from pascalvl.engines.engine import Engine, Session
from pascalvl.engines.tensorrt.options import BuildOptions

__all__ = ["BuildOptions", "Engine", "Session", "build", "device_memory", "open_engine", "target"]

# ONNX Runtime tells its vendor how it is used, and keeps a device id and a queue of events in the user's cache folder,
# unless this is set before its first import. Whatever imports it here is a module below this package, or polygraphy,
# which these modules import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
