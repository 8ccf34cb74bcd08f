"""Feeds of the engines: a sequence's new tokens to the decoder's, pictures to the vision encoder's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from pascalvl.engines import Engine
from pascalvl.engines.engine import Features, NewTokens, Placement, VisualRows
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import EMBEDDINGS, POSITIONS
from pascalvl.plugins.prompt import Patches, Visual
from pascalvl.runtime.embeddings import EmbeddingRows, EmbeddingTable
from pascalvl.runtime.positions import TextRope, VisionPositions, rope_tables, vision_cu_seqlens, vision_rope_tables
from pascalvl.runtime.sequence import TokenSequence


class Steps:
    """What is computed on the host for a step, of one engine bundle.

    Args:
        engine: of the bundle; only its files and its model are looked at.
    """

    def __init__(self, engine: Engine) -> None:
        manifest, directory = engine.manifest, engine.directory
        self._config = manifest.model
        self._embeddings = EmbeddingTable(directory / EMBEDDINGS, **manifest.embeddings)
        self._text_rope = TextRope(self._config.text)
        positions = EmbeddingTable(directory / POSITIONS, **manifest.position_embeddings)
        self._vision_positions = VisionPositions(positions, self._config.vision)

    def next_tokens(
        self, token_ids: Sequence[int], positions: Sequence[int], placements: Sequence[Placement]
    ) -> list[NewTokens]:
        """One more token of text of each of some sequences."""
        return [
            NewTokens(EmbeddingRows(self._embeddings, (token,)), *self._text_rope.at(position), placement)
            for token, position, placement in zip(token_ids, positions, placements, strict=True)
        ]

    def new_tokens(
        self,
        token_ids: Sequence[int] | np.ndarray,
        position_ids: np.ndarray,
        placement: Placement,
        visuals: Sequence[VisualRows] = (),
    ) -> NewTokens:
        """Tokens ``[n]`` of one sequence at positions ``[3, n]``."""
        cos, sin = rope_tables(position_ids, self._config.text)
        return NewTokens(EmbeddingRows(self._embeddings, token_ids), cos, sin, placement, visuals)

    def chunk(
        self, sequence: TokenSequence, chunk: slice, seen: Sequence[tuple[Visual, Features]], placement: Placement
    ) -> NewTokens:
        """Some of a sequence's tokens, with what is ``seen`` of its pictures among them."""
        visuals = []
        for visual, features in seen:
            first, last = np.searchsorted(visual.token_indices, (chunk.start, chunk.stop))
            if first < last:
                tokens = visual.token_indices[first:last] - chunk.start
                visuals.append(VisualRows(features, slice(first, last), tokens))
        return self.new_tokens(sequence.token_ids(chunk), sequence.positions(chunk), placement, visuals)

    def encode(self, engine: Engine, patches: Patches) -> Features:
        """Run the vision encoder, for a video one temporal patch at a time: they do not see each other."""
        t, h, w = patches.grid
        cos, sin = vision_rope_tables((1, h, w), self._config.vision)
        feeds = {
            bindings.POSITION_EMBEDS: self._vision_positions((1, h, w)),
            bindings.ROPE_COS: cos,
            bindings.ROPE_SIN: sin,
            bindings.CU_SEQLENS: vision_cu_seqlens((1, h, w)),
        }
        pixels = patches.pixel_values.reshape(t, h * w, -1)
        return engine.encode([{**feeds, bindings.PIXEL_VALUES: pixel_values} for pixel_values in pixels])


class FeatureCache:
    """Features of the pictures that were looked at last, where the engine keeps them.

    Args:
        most_bytes: that they take together.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[tuple[int, bytes], tuple[Features, int]] = OrderedDict()
        self.hits = self.misses = 0
        """How often features were kept when they were asked for, and were not."""

    def __len__(self) -> int:
        """Pictures whose features are kept."""
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Of all that are kept."""
        return sum(size for _, size in list(self._kept.values()))

    def get(self, visual: Visual, salt: int = 0) -> Features | None:
        """Of a picture, if they are kept of a sequence of the same salt."""
        key = salt, visual.patches.digest
        if (kept := self._kept.get(key)) is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return kept[0]

    def put(self, visual: Visual, features: Features, nbytes: int, salt: int = 0) -> None:
        """Keep a picture's, and give up those that were not asked for the longest."""
        self._kept[salt, visual.patches.digest] = features, nbytes
        while len(self._kept) > 1 and self.nbytes > self._most_bytes:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Keep none."""
        self._kept.clear()
