"""Checks of an engine bundle beside what is here."""

from __future__ import annotations

from pascalvl.engines.device.gpu import Gpu
from pascalvl.engines.doctor.facts import Bundle
from pascalvl.engines.doctor.rows import Row, State
from pascalvl.engines.engine import DeviceMemory


def check_opens(backend: str, problem: str) -> Row:
    """``problem``: why the backend does not take the bundle as it is; empty: it does, or was not asked."""
    if problem:
        return Row("engine", f"for {backend}", State.MISSING, f"It cannot be opened: {problem}")
    return Row("engine", f"for {backend}")


def check_memory_for(bundle: Bundle, needs: DeviceMemory | None, gpu: Gpu | None) -> Row:
    """What a bundle takes of a card beside what is free there.

    Args:
        bundle: for a backend that runs on a GPU.
        needs: what its backend says; None: it does not, and weights and cache are known alone.
        gpu: the card, if there is one.
    """
    manifest = bundle.manifest
    if needs is None:
        nbytes = manifest.kv_cache.nbytes(manifest.model.text, bundle.context, bundle.pinned)
        needs, least = DeviceMemory(manifest.weight_bytes(*manifest.graphs), nbytes, 0, 0), "at least "
    else:
        least = ""
    name = "memory it needs"
    cache = f"{needs.cache / 1e9:.2f} of a cache of {bundle.context:,} tokens"
    found = f"{least}{needs.total / 1e9:.2f} GB: {needs.weights / 1e9:.2f} of weights, {cache}"
    if rest := needs.steps + needs.picture:
        found += f", {rest / 1e9:.2f} for steps and a picture"
    if gpu is None:
        return Row(name, found)
    free, total = f"{gpu.free_memory / 1e9:.2f} GB", f"{gpu.total_memory / 1e9:.2f} GB"
    found += f"; {free} of {total} are free"
    if needs.total <= gpu.free_memory:
        return Row(name, found)
    if needs.total <= gpu.total_memory:
        remedy = "End what else uses the card (nvidia-smi lists it), or give a smaller --context."
        return Row(name, found, State.WARNING, remedy)
    if needs.total - needs.cache < gpu.total_memory:
        remedy = "It is more than the card has: give a smaller --context, or build it with a smaller --kv."
        return Row(name, found, State.WARNING, remedy)
    remedy = "The card does not hold it: export the checkpoint with smaller weights (--weights w4), or a smaller model."
    return Row(name, found, State.MISSING, remedy)
