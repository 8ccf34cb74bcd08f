"""A model against Hugging Face's, conversation by conversation, by `pascalvl.engines.validation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pascalvl.engines import validation
from pascalvl.engines.tolerance import tolerance, vision_tolerance
from pascalvl.plugins import bindings
from pascalvl.runtime.messages import Message
from pascalvl.runtime.model import VisionLanguageModel


def validate(
    model: VisionLanguageModel, checkpoint: Path, conversations: Mapping[str, Sequence[Message]], new_tokens: int = 16
) -> list[validation.Row]:
    """Compare a model with the checkpoint that it was made from; returns one row an output and conversation.

    Each conversation is followed by ``new_tokens`` tokens of the checkpoint's own answer.

    Raises:
        UserError: as `trace`, or the model does not return an output that the checkpoint has.
    """
    return validation.validate(
        checkpoint,
        lambda name, forced: trace(model, conversations[name], forced),
        {name: model.prompt(messages) for name, messages in conversations.items()},
        tolerance(model.cache_config, model.config, model.manifest.weights),
        new_tokens,
        vision_tolerance(model.manifest.weights),
        model.manifest.backend["name"],
    )


def trace(
    model: VisionLanguageModel, messages: Sequence[Message], forced_tokens: Sequence[int]
) -> dict[str, np.ndarray]:
    """Run messages and then the given tokens, whatever the model would have answered.

    Returns:
        Outputs by the names of `pascalvl.engines.validation`: features of the visuals, the prompt's last logits and
        those after each forced token, ``[1, vocab_size]``; with marked layers also the prompt's hidden states.

    Raises:
        UserError: messages that cannot be used, or more tokens than the context holds or there are free pages for.
    """
    model.load()
    prompt = model.prompt(messages)
    model.room(prompt, len(forced_tokens))
    sequence = model.sequence_of(prompt)
    features = [model.steps.encode(model.engine, visual.patches) for visual in prompt.visuals]
    traced = {}
    if features:
        on_host = [model.engine.on_host(feature) for feature in features]
        traced[validation.VISION_EMBEDS] = np.concatenate([feature.embeds for feature in on_host])
        deepstack = np.concatenate([feature.levels for feature in on_host], axis=1)
        traced.update((validation.vision_deepstack(i), level) for i, level in enumerate(deepstack))
    seen = list(zip(prompt.visuals, features, strict=True))
    session, pinned = model.scheduler.session, sequence.pinned
    chunks, length = [], len(prompt.token_ids)
    with model.scheduler.borrowed(model.context_length, int(pinned.sum())) as cache:
        for start in range(0, length, model.prefill_chunk):
            chunk = slice(start, min(start + model.prefill_chunk, length))
            with cache.appending(sequence.identities[chunk], pinned[chunk]) as placement:
                chunks.append(session.step([model.steps.chunk(sequence, chunk, seen, placement)]))
        traced[validation.PREFILL_LOGITS] = chunks[-1][bindings.LOGITS]
        for layer in range(model.config.text.num_hidden_layers):
            if (name := bindings.hidden_states(layer)) in chunks[0]:
                hidden = np.concatenate([outputs[name] for outputs in chunks])
                traced[validation.prefill_hidden_states(layer)] = hidden
        for step, token in enumerate(forced_tokens):
            with cache.appending(np.array([token])) as placement:
                tokens = model.steps.next_tokens([token], [prompt.next_position + step], [placement])
                traced[validation.decode_logits(step)] = session.step(tokens)[bindings.LOGITS]
    return traced
