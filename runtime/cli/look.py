"""What is there: `inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.cli.common import TABLE_WIDTH, new_console

if TYPE_CHECKING:
    from rich.table import Table

_CARDS = (6.0, 8.0, 11.0, 24.0)
"""Gigabytes of the Pascal cards that there are."""


def inspect(args: argparse.Namespace) -> int:
    """Run `pascalvl inspect`; returns the exit code."""
    from rich.table import Table

    from pascalvl.plugins.bundle import Manifest
    from pascalvl.plugins.kv_format import CacheConfig, KVFormat
    from pascalvl.runtime.model import pinned_slots

    manifest = Manifest.read(args.bundle, "model", "engine")
    text, vision = manifest.model.text, manifest.model.vision
    caches = [CacheConfig(f) for f in KVFormat] if manifest.kind == "model" else [manifest.kv_cache]
    caches = [cache.with_rank_of(manifest.kv_cache) for cache in ([args.kv] if args.kv else caches)]
    weights = manifest.weight_bytes(*manifest.graphs)

    facts = Table.grid(padding=(0, 2))
    facts.add_row("bundle", f"{manifest.kind}, version {manifest.version}")
    facts.add_row("source", f"{manifest.source['name']} (SHA-256 {manifest.source['sha256'][:12]}…)")
    if manifest.backend:
        facts.add_row("backend", ", ".join(f"{key} {value}" for key, value in manifest.backend.items()))
    facts.add_row(
        "decoder",
        f"{text.num_hidden_layers} layers, hidden size {text.hidden_size}, {text.num_attention_heads} heads on "
        f"{text.num_key_value_heads} KV heads of {text.head_dim}, vocabulary {text.vocab_size}",
    )
    facts.add_row(
        "vision",
        f"{vision.depth} layers, hidden size {vision.hidden_size}, {vision.num_heads} heads of {vision.head_dim}, "
        f"DeepStack after layers {', '.join(map(str, vision.deepstack_visual_indexes))}",
    )
    facts.add_row("weights", f"{manifest.weights}, {weights / 1e9:.3f} GB")
    for file, table in manifest.tables.items():
        name = Path(file).stem.replace("_", " ")
        facts.add_row(name, f"{table['dtype']} {table['shape']}, mapped from their file")
    for name, graph in manifest.graphs.items():
        ops, layer = (", ".join(f"{count} {op}" for op, count in graph[of].items()) for of in ("ops", "layer_ops"))
        facts.add_row(f"{name} graph", f"opset {graph['opset']}, IR {graph['ir_version']}, {graph['plugin']}; {ops}")
        facts.add_row("", f"a layer: {layer}")
    lengths = _context_lengths(text.max_position_embeddings)
    memory = Table("KV cache", "bytes a token", title="KV cache in GB, by tokens of context")
    for length in lengths:
        memory.add_column(str(length), justify="right")
    on_gpu, rest = _memory_of_gpu(args.bundle, manifest, caches[0], lengths)
    beside = f"{weights / 1e9:.3f} GB of weights"
    if rest:
        beside += f" and {rest / 1e9:.3f} GB of what else is allocated"
    fitting = Table("KV cache", title=f"longest context beside {beside}, by the card's GB")
    for size in args.memory or _CARDS:
        fitting.add_column(f"{size:g}", justify="right")
    for cache in caches:
        gigabytes = [f"{cache.nbytes(text, length, pinned_slots(cache)) / 1e9:.3f}" for length in lengths]
        memory.add_row(str(cache), str(cache.bytes_per_token(text)), *gigabytes)
        rooms = [int(size * 1e9) - weights - rest for size in args.memory or _CARDS]
        fitting.add_row(str(cache), *(_longest_context(cache, text, pinned_slots(cache), room) for room in rooms))
    console = new_console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(facts, memory, *on_gpu, fitting)
    return 0


def _memory_of_gpu(bundle: Path, manifest: Any, cache: Any, lengths: Sequence[int]) -> tuple[list[Table | str], int]:
    """Of an engine bundle: what it takes of this machine's GPU, by tokens of context; and the most beside weights and
    cache. Nothing and 0 where that is not told."""
    from rich.table import Table

    from pascalvl.engines import device_memory
    from pascalvl.runtime.model import pinned_slots

    try:
        columns = device_memory(bundle, manifest, [cache.slots(length, pinned_slots(cache)) for length in lengths])
    except UserError as error:
        return [f"what else is allocated is told where it can run: {error}"], 0
    if not columns:
        return [], 0
    table = Table("tokens of context", title="a GPU's memory in GB, beside the CUDA context with the kernels in it")
    for length in lengths:
        table.add_column(str(length), justify="right")
    for name, field in (
        ("weights", "weights"),
        ("KV cache", "cache"),
        ("steps", "steps"),
        ("a picture of 1024x1024", "picture"),
        ("together", "total"),
    ):
        table.add_row(name, *(f"{getattr(found, field) / 1e9:.3f}" for found in columns))
    return [table], max(found.steps + found.picture for found in columns)


def _longest_context(cache: Any, text: Any, pinned: int, room: int) -> str:
    """Tokens whose cache fits in ``room`` bytes, up to what the model was made for."""
    longest = text.max_position_embeddings
    if cache.nbytes(text, longest, pinned) <= room:
        return f"{longest} (all)"
    low, high = 0, longest  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cache.nbytes(text, middle, pinned) <= room else (low, middle)
    return str(low) if low else "none"


def _context_lengths(longest: int) -> list[int]:
    """1024, doubled as often as fits, and the longest."""
    return [*(1 << bits for bits in range(10, longest.bit_length()) if 1 << bits < longest), longest]
