"""What is there: `inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.cli.argument_types import STANDARD_OUTPUT
from pascalvl.runtime.cli.common import check_json, write_json
from pascalvl.runtime.cli.tables import Facts, figures_table, print_tables

if TYPE_CHECKING:
    from rich.table import Table

    from pascalvl.engines.engine import DeviceMemory

_CARDS = (6.0, 8.0, 11.0, 24.0)
"""Gigabytes of the Pascal cards that there are."""


def inspect(args: argparse.Namespace) -> int:
    """Run `pascalvl inspect`; returns the exit code."""
    from pascalvl.plugins.bundle import Manifest
    from pascalvl.plugins.kv_format import CacheConfig, KVFormat
    from pascalvl.runtime.model import pinned_slots

    check_json(args.json)
    manifest = Manifest.read(args.bundle, "model", "engine")
    text = manifest.model.text
    caches = [CacheConfig(f) for f in KVFormat] if manifest.kind == "model" else [manifest.kv_cache]
    caches = [cache.with_rank_of(manifest.kv_cache) for cache in ([args.kv] if args.kv else caches)]
    weights = manifest.weight_bytes(*manifest.graphs)
    lengths = _context_lengths(text.max_position_embeddings)
    on_gpu, why_unknown = _memory_of_gpu(args.bundle, manifest, caches[0], lengths)
    rest = max((found.steps + found.picture for found in on_gpu), default=0)
    sizes = args.memory or _CARDS
    sizes_of_caches: list[dict[str, Any]] = [
        {
            "format": str(cache),
            "bytes_per_token": cache.bytes_per_token(text),
            "bytes": {length: cache.nbytes(text, length, pinned_slots(cache)) for length in lengths},
            "longest_context": {
                f"{size:g}": _longest_context(cache, text, pinned_slots(cache), int(size * 1e9) - weights - rest)
                for size in sizes
            },
        }
        for cache in caches
    ]
    if args.json:
        found = {
            **{name: value for name, value in manifest.to_json().items() if name not in ("files", "kv_cache")},
            "weight_bytes": weights,
            "kv_caches": sizes_of_caches,
            "gpu_memory": {length: vars(of) for length, of in zip(lengths, on_gpu, strict=False)},
        }
        write_json(args.json, found)
    if args.json != STANDARD_OUTPUT:
        memory = figures_table(
            "KV cache in GB, by tokens of context", ("KV cache", "bytes a token", *map(str, lengths))
        )
        beside = f"{weights / 1e9:.3f} GB of weights"
        if rest:
            beside += f" and {rest / 1e9:.3f} GB of what else is allocated"
        title = f"longest context beside {beside}, by the card's GB"
        fitting = figures_table(title, ("KV cache", *sizes_of_caches[0]["longest_context"]))
        for cache in sizes_of_caches:
            gigabytes = [f"{nbytes / 1e9:.3f}" for nbytes in cache["bytes"].values()]
            memory.add_row(cache["format"], str(cache["bytes_per_token"]), *gigabytes)
            contexts = [
                f"{tokens} (all)" if tokens == text.max_position_embeddings else str(tokens or "none")
                for tokens in cache["longest_context"].values()
            ]
            fitting.add_row(cache["format"], *contexts)
        gpu = [_gpu_table(on_gpu, lengths)] if on_gpu else [why_unknown] * (why_unknown is not None)
        print_tables(_facts(manifest, weights), memory, *gpu, fitting)
    return 0


def _facts(manifest: Any, weights: int) -> Facts:
    """What there is to say of a bundle."""
    text, vision = manifest.model.text, manifest.model.vision
    facts = [
        ("bundle", f"{manifest.kind}, version {manifest.version}"),
        ("source", f"{manifest.source['name']} (SHA-256 {manifest.source['sha256'][:12]}…)"),
    ]
    if manifest.backend:
        facts.append(("backend", ", ".join(f"{key} {value}" for key, value in manifest.backend.items())))
    decoder = (
        f"{text.num_hidden_layers} layers, hidden size {text.hidden_size}, {text.num_attention_heads} heads on "
        f"{text.num_key_value_heads} KV heads of {text.head_dim}, vocabulary {text.vocab_size}"
    )
    encoder = (
        f"{vision.depth} layers, hidden size {vision.hidden_size}, {vision.num_heads} heads of {vision.head_dim}, "
        f"DeepStack after layers {', '.join(map(str, vision.deepstack_visual_indexes))}"
    )
    facts += [
        ("decoder", decoder),
        ("vision", encoder),
        ("weights", f"{manifest.weights}, {weights / 1e9:.3f} GB"),
    ]
    for file, table in manifest.tables.items():
        name = Path(file).stem.replace("_", " ")
        facts.append((name, f"{table['dtype']} {table['shape']}, mapped from their file"))
    for name, graph in manifest.graphs.items():
        ops, layer = (", ".join(f"{count} {op}" for op, count in graph[of].items()) for of in ("ops", "layer_ops"))
        about = f"opset {graph['opset']}, IR {graph['ir_version']}, {graph['plugin']}; {ops}"
        facts += [(f"{name} graph", about), ("", f"a layer: {layer}")]
    return facts


def _memory_of_gpu(
    bundle: Path, manifest: Any, cache: Any, lengths: Sequence[int]
) -> tuple[list[DeviceMemory], str | None]:
    """What an engine bundle takes of this machine's GPU, by tokens of context, or why that is not told."""
    from pascalvl.engines import device_memory
    from pascalvl.runtime.model import pinned_slots

    try:
        slots = [cache.slots(length, pinned_slots(cache)) for length in lengths]
        return device_memory(bundle, manifest, slots), None
    except UserError as error:
        return [], f"what else is allocated is told where it can run: {error}"


def _gpu_table(found: Sequence[DeviceMemory], lengths: Sequence[int]) -> Table:
    title = "a GPU's memory in GB by tokens of context, beside the CUDA context with the kernels in it"
    table = figures_table(title, ("", *map(str, lengths)))
    for name, field in (
        ("weights", "weights"),
        ("KV cache", "cache"),
        ("steps", "steps"),
        ("a picture of 1024x1024", "picture"),
        ("together", "total"),
    ):
        table.add_row(name, *(f"{getattr(of, field) / 1e9:.3f}" for of in found))
    return table


def _longest_context(cache: Any, text: Any, pinned: int, room: int) -> int:
    """Tokens whose cache fits in ``room`` bytes, up to what the model was made for."""
    longest = text.max_position_embeddings
    if cache.nbytes(text, longest, pinned) <= room:
        return longest
    low, high = 0, longest  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cache.nbytes(text, middle, pinned) <= room else (low, middle)
    return low


def _context_lengths(longest: int) -> list[int]:
    """1024, doubled as often as fits, and the longest."""
    return [*(1 << bits for bits in range(10, longest.bit_length()) if 1 << bits < longest), longest]
