"""Which backends a machine runs, and how to put right what it lacks.

`diagnose` gathers the facts of this machine (`pascalvl.engines.doctor.facts`); ``check_*`` judge facts that they are
given, a `Row` each, and `judge` puts these together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pascalvl.engines.backends import AUTO, BACKENDS, automatic
from pascalvl.engines.device.gpu import install
from pascalvl.engines.doctor import bundle as of_bundle
from pascalvl.engines.doctor import frameworks, machine, tensorrt
from pascalvl.engines.doctor.facts import Bundle, Machine, find_machine, find_memory
from pascalvl.engines.doctor.rows import Row, Section, State
from pascalvl.engines.engine import DeviceMemory

__all__ = ["Bundle", "Diagnosis", "Machine", "Row", "Section", "State", "diagnose", "find_machine", "judge"]

MACHINE, BUNDLE = "this machine", "the bundle"
ON_GPU = ("cuda", "tensorrt", "torch")
"""Backends that run on a GPU, by how little they need."""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What runs here."""

    sections: tuple[Section, ...]
    runs: bool
    """Whether the bundle does, or without one some backend on the GPU."""
    backend: str | None
    """The bundle's; or without one the backend that runs on the GPU, of several the one that `AUTO` takes or else the
    first of `ON_GPU`."""
    auto: str | None
    """The backend that `AUTO` takes."""
    on_gpu: bool
    """Whether what runs does so on a GPU."""
    verdict: str
    """The answer in one line."""
    steps: tuple[str, ...] = ()
    """Sentences: the shortest way to make it run."""

    def to_json(self) -> dict[str, Any]:
        sections = [
            {
                "name": section.name,
                "about": section.about,
                "rows": [{**dataclasses.asdict(row), "state": row.state.value} for row in section.rows],
            }
            for section in self.sections
        ]
        facts = {name: getattr(self, name) for name in ("runs", "backend", "auto", "on_gpu", "verdict")}
        return {**facts, "steps": list(self.steps), "sections": sections}


def diagnose(bundle: Bundle | None = None) -> Diagnosis:
    """Check this machine, and whether it runs an engine bundle if that is given."""
    found = find_machine(bundle.backend if bundle else None)
    needs, problem = None, ""
    if bundle and bundle.backend == "cuda" and not found.unavailable["cuda"]:
        needs, problem = find_memory(bundle)
    return judge(found, bundle, needs, problem)


def judge(
    found: Machine, bundle: Bundle | None = None, needs: DeviceMemory | None = None, problem: str = ""
) -> Diagnosis:
    """What a machine runs.

    Args:
        found: the machine.
        bundle: an engine bundle that is to run there.
        needs: what that takes of the GPU, if its backend says so.
        problem: why its backend does not take it, if so.
    """
    shared = Section(MACHINE, tuple(_of_machine(found)))
    backends = {
        name: Section(f"backend {name}", tuple(rows), about) for name, (about, rows) in _of_backends(found).items()
    }
    lacking = {name: _lacking(name, shared, backends) for name in backends}
    for name, section in backends.items():
        if not lacking[name] and (unexplained := _of_backend(found, name)):
            backends[name] = dataclasses.replace(section, rows=(*section.rows, *unexplained))
            lacking[name] = unexplained
    auto, _ = automatic(lambda name: found.unavailable.get(name, ""))
    sections = (shared, *backends.values())
    if bundle is None:
        return _without_bundle(sections, lacking, auto)
    section = Section(BUNDLE, tuple(_of_bundle(found, bundle, needs, problem)))
    on_gpu, missing = _on_gpu(found, bundle.backend), section.missing
    if bundle.backend == "reference" and on_gpu:
        missing = (*backends["cuda"].missing, *missing)  # the plugin has the kernels in it
    elif bundle.backend in lacking and (on_gpu or bundle.backend != "torch"):
        missing = (*lacking[bundle.backend], *missing)
    runs = "does not run here" if missing else f"runs here, on the {'GPU' if on_gpu else 'CPU'}"
    verdict = f"the bundle, for backend {bundle.backend}, {runs}"
    return Diagnosis((*sections, section), not missing, bundle.backend, auto, on_gpu, verdict, _steps(missing))


def _without_bundle(sections: tuple[Section, ...], lacking: Mapping[str, Sequence[Row]], auto: str | None) -> Diagnosis:
    running = [name for name in ON_GPU if not lacking[name]]
    taken = f"{AUTO} takes {auto}" if auto else f"{AUTO} finds none"
    if auto and lacking[auto]:
        taken += f", which lacks {_and([row.name for row in lacking[auto]])}"
    if running:
        backend = auto if auto in running else running[0]
        many = len(running) > 1
        which = f"backend{'s' * many} {_and(running)} run{'s' * (not many)} on the GPU here"
        return Diagnosis(sections, True, backend, auto, True, f"{which}; {taken}")
    nearest = ON_GPU[0]
    verdict = f"no backend runs on a GPU here; {taken}; the shortest way to one is backend {nearest}"
    return Diagnosis(sections, False, None, auto, False, verdict, _steps(lacking[nearest]))


def _of_machine(found: Machine) -> list[Row]:
    rows = [machine.check_driver(found.driver, found.gpu), machine.check_gpu(found.gpu, found.gpu_problem)]
    if found.gpu:
        rows.append(machine.check_memory(found.gpu))
    both = frameworks.check_environment(found.tensorrt, found.torch, found.packages.get("onnxruntime-gpu", ""))
    return [*rows, both] if both else rows


def _of_backends(found: Machine) -> dict[str, tuple[str, list[Row]]]:
    """By backend what its section is about, and the rows."""
    packages, gpu = found.packages, found.gpu
    onnxruntime = [frameworks.check_onnxruntime(packages)]
    if version := packages.get("onnxruntime-gpu"):
        onnxruntime.append(frameworks.check_onnxruntime_gpu(version, found.python, gpu))
        onnxruntime.append(frameworks.check_cudnn(found.cudnn, version, gpu))
    of_tensorrt = [
        tensorrt.check_python(found.python, found.tensorrt, gpu),
        tensorrt.check_tensorrt(found.tensorrt, gpu),
    ]
    if found.tensorrt.version:  # else one command installs all of it
        of_tensorrt += [
            tensorrt.check_numpy(packages.get("numpy", ""), found.tensorrt, gpu),
            *tensorrt.check_libraries(found.libraries, packages, found.tensorrt, gpu),
            tensorrt.check_plugin(found.plugin, found.tensorrt),
        ]
    of_cuda = [
        machine.check_kernels(found.kernels),
        machine.check_compiler(found.compiler, found.kernels),
        machine.check_nvrtc(packages.get("nvidia-cuda-nvrtc-cu12", ""), found.kernels),
    ]
    return {
        "cuda": ("", of_cuda),
        "onnxruntime": ("", onnxruntime),
        "torch": ("", [frameworks.check_torch(found.torch, gpu)]),
        "tensorrt": (tensorrt.environment(found.tensorrt, gpu), of_tensorrt),
    }


def _of_backend(found: Machine, name: str) -> tuple[Row, ...]:
    """Why a backend cannot be used, where no other row tells."""
    reason = found.unavailable.get(name)
    if not reason:
        return ()
    package = {"torch": "pascalvl[export,engines]", "reference": "pascalvl[engines]"}.get(name, "pascalvl")
    if reason.startswith("needs the package"):
        remedy = f"It {reason}: {install(package)}."
    else:
        remedy = f"It cannot be used here: {reason.rstrip('.')}."
    return (Row("the backend", "cannot be used", State.MISSING, remedy),)


def _of_bundle(found: Machine, bundle: Bundle, needs: DeviceMemory | None, problem: str) -> list[Row]:
    backend = bundle.backend
    if backend not in BACKENDS:
        return [of_bundle.check_opens(backend, f"there is no such backend: {bundle.manifest.remedy}.")]
    rows = [of_bundle.check_opens(backend, problem)]
    if backend == "tensorrt":
        given = bundle.manifest.backend, found.tensorrt, found.gpu, found.driver, found.plugin
        rows += tensorrt.check_engine(*given)
    if backend in ("torch", "reference"):
        rows += _of_backend(found, backend)
        if not _on_gpu(found, backend):
            return [*rows, frameworks.check_emulator(found.emulator, found.compiler)]
    if backend != "onnxruntime":
        rows.append(of_bundle.check_memory_for(bundle, needs, found.gpu))
    return rows


def _on_gpu(found: Machine, backend: str) -> bool:
    """Whether a backend, if it runs, does so on a GPU."""
    if backend == "torch":
        return bool(found.torch.gpu)
    return backend in ("tensorrt", "cuda") or (backend == "reference" and found.gpu is not None)


def _lacking(name: str, shared: Section, backends: Mapping[str, Section]) -> tuple[Row, ...]:
    """What keeps a backend from running, on the GPU if it is one of `ON_GPU`."""
    needed = {
        "cuda": (shared, backends["cuda"]),
        "onnxruntime": (backends["onnxruntime"],),
        "torch": (shared, backends["torch"], backends["cuda"]),
        "tensorrt": (shared, backends["tensorrt"]),
    }
    return tuple(row for section in needed[name] for row in section.missing)


def _steps(missing: Sequence[Row]) -> tuple[str, ...]:
    """What to do about rows; a GPU is only to be seen once there is a driver."""
    names = {row.name for row in missing}
    rows = [row for row in missing if not (row.name == "GPU" and "NVIDIA driver" in names)]
    return tuple(dict.fromkeys(row.remedy for row in rows))


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
