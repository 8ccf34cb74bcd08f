"""One Markdown file of what a bug report, or a measurement on a card, needs; nothing in it is personal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pascalvl.engines.doctor import Diagnosis
from pascalvl.engines.doctor.anonymous import anonymous
from pascalvl.engines.doctor.computer import find_cards, find_computer
from pascalvl.engines.doctor.facts import find_packages
from pascalvl.plugins.bundle import Manifest


def report(diagnosis: Diagnosis, manifest: Manifest | None = None, figures: str = "") -> str:
    """The file's text.

    Args:
        diagnosis: what runs here.
        manifest: of the bundle that it is about, if there is one.
        figures: of that bundle: lines of text, or why there are none.
    """
    packages = find_packages()
    version = packages.pop("pascalvl", "of a folder that is not installed")
    parts = ["# PascalVL report", f"{diagnosis.verdict[0].upper()}{diagnosis.verdict[1:]}."]
    parts += [_cell(step) for step in diagnosis.steps]
    parts += ["## Versions", _table(("what", "found"), {"pascalvl": version, **find_computer(), **packages}.items())]
    cards, problem = find_cards()
    parts.append("## Cards")
    parts += [_table(("nvidia-smi", "found"), card.items()) for card in cards] or [problem or "nvidia-smi lists none."]
    parts.append("## Doctor")
    for section in diagnosis.sections:
        rows = [(row.name, row.found, row.state.value, row.remedy) for row in section.rows]
        parts += [f"### {section.name}", _table(("what", "found", "state", "what to do"), rows)]
    if manifest:
        parts += ["## Bundle", _table(("what", "found"), _essentials(manifest))]
        parts += ["## Figures", f"```\n{figures.rstrip()}\n```"]
    return anonymous("\n\n".join(parts) + "\n")


def _essentials(manifest: Manifest) -> Iterable[tuple[str, str]]:
    text, vision = manifest.model.text, manifest.model.vision
    yield "checkpoint", f"{manifest.source['name']} (SHA-256 {manifest.source['sha256'][:12]}…)"
    yield (
        "decoder",
        f"{text.num_hidden_layers} layers, hidden size {text.hidden_size}, {text.num_attention_heads} heads on "
        f"{text.num_key_value_heads} KV heads of {text.head_dim}, vocabulary {text.vocab_size}",
    )
    yield "vision", f"{vision.depth} layers, hidden size {vision.hidden_size}, {vision.num_heads} heads"
    yield "weights", f"{manifest.weights}, {manifest.weight_bytes(*manifest.graphs) / 1e9:.3f} GB"
    yield "KV cache", str(manifest.kv_cache)
    for key, value in manifest.backend.items():
        yield f"backend's {key}", str(value)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text as it is, whatever it has of what Markdown would take for its own."""
    for sign in ("|", "<", "*", "`"):
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
