"""What quantised weights do to a model's answers, format by format, against the same model in float32.

Conversations are run in one pass each, every token's true continuation given (teacher forcing), through the very
modules that are exported, with the inputs of linear layers rounded as the kernels do. Every position of text counts; an
answer is right where each of its tokens is the likeliest one, which is where greedy decoding would give exactly that
answer. Token and position embeddings are as in the checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from pascalvl.export.calibration import make_runnable
from pascalvl.export.checkpoint import HOST_TABLES, Checkpoint, model_inputs
from pascalvl.export.evaluation import EvaluationPrompt, Figures, Summary, compare, summary
from pascalvl.export.fitting import Fit, fit
from pascalvl.export.kv_evaluation import load, q4_0, q8_0
from pascalvl.export.modules import Decoder, VisionEncoder
from pascalvl.export.quantised_weights import QuantisedWeights, quant_layers
from pascalvl.export.quantiser import ALL, Method
from pascalvl.export.transforms import plan_transforms
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.plugins.ops.quant_linear.torch_op import QuantLinear, compute, dense, norm_operands, rounded
from pascalvl.plugins.prompt import Prompt
from pascalvl.plugins.weight_format import WeightConfig

DEFAULT_FORMATS = ("f16", "w8", "w4", "w4,group=64", "w4,group=32")
_LLAMA_CPP_BLOCK = 32
_STEPS = {
    "nearest": Method(clip=False, scale=False, compensate=False),
    "searched scales": Method(clip=True, scale=False, compensate=False),
    "searched, scaled inputs": Method(clip=True, scale=True, compensate=False),
    "searched, compensated": Method(clip=True, scale=False, compensate=True),
}
"""What each part of the quantiser is worth, beside all of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(Summary):
    """One scheme's figures."""

    name: str
    nbytes: int
    """Of the weights of all layers."""


def evaluate(
    checkpoint: Path,
    prompts: Sequence[EvaluationPrompt],
    formats: Sequence[WeightConfig],
    calibration: Sequence[Prompt] | None = None,
    baselines: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Measure formats on conversations, one after the other, float32 first.

    Args:
        checkpoint: folder of the Hugging Face model; it is run in float32 on the CPU.
        prompts: the conversations.
        formats: what to measure.
        calibration: prompts to fit 4-bit weights by; None: they are rounded to nearest, with searched scales.
        baselines: measure llama.cpp's formats too, and 4 bits without parts of the quantiser.
        progress: called after each pass, of which each format has one for each conversation.

    Yields:
        Each format's figures.

    Raises:
        UserError: no conversations, formats that the model cannot have, or a checkpoint without its original weights.
    """
    if not prompts:
        raise UserError("there is nothing to evaluate: give a folder of prompts.")
    with Checkpoint(checkpoint) as opened:
        if opened.codes:
            raise UserError(
                f"{checkpoint} holds weights in codes of 4 bits, and nothing to compare them with: give the checkpoint "
                "with the original weights."
            )
        config = opened.model_config()
        for weights in formats:
            weights.layers(config.text.num_hidden_layers)
        exact_model = load(checkpoint)
        exact = [_run(exact_model, prompt) for prompt in prompts]

        def measured(name: str, model: Qwen3VLForConditionalGeneration, nbytes: int) -> Result:
            found: list[Figures] = []
            for prompt, hidden in zip(prompts, exact, strict=True):
                states = hidden if model is exact_model else _run(model, prompt)
                found.append(
                    compare(
                        prompt,
                        prompt.positions(model.config),
                        functools.partial(_logits, exact_model, hidden),
                        functools.partial(_logits, model, states),
                    )
                )
                progress()
            return Result(name=name, nbytes=nbytes, **summary(prompts, found, model.config))

        floats = sum(4 * p.numel() for n, p in exact_model.named_parameters() if n not in HOST_TABLES)
        if exact_model.config.tie_word_embeddings:
            floats += 4 * config.text.vocab_size * config.text.hidden_size
        yield measured("float32", exact_model, floats)
        for name, weights, method in _schemes(formats, calibration is not None and baselines):
            yield measured(name, *quantised_model(opened, config, weights, calibration, method))
        for bits in (8, 4) if baselines else ():
            yield measured(f"llama.cpp q{bits}_0", *_llama_cpp(checkpoint, bits))


def count_schemes(formats: Sequence[WeightConfig], calibrated: bool, baselines: bool) -> int:
    """How many `evaluate` measures, in a pass for each conversation."""
    return 1 + len(_schemes(formats, calibrated and baselines)) + 2 * baselines


def _schemes(formats: Sequence[WeightConfig], with_steps: bool) -> list[tuple[str, WeightConfig, Method]]:
    steps = [] if not with_steps else [(f"w4, {name}", WeightConfig.parse("w4"), m) for name, m in _STEPS.items()]
    return [*steps, *((str(weights), weights, ALL) for weights in formats)]


def quantised_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    weights: WeightConfig,
    calibration: Sequence[Prompt] | None,
    method: Method = ALL,
) -> tuple[Qwen3VLForConditionalGeneration, int]:
    """Hugging Face's model with the modules that are exported in it; and the bytes of its weights."""
    if calibration is None or all(form.bits != 4 for form in weights.layers(config.text.num_hidden_layers)):
        found = Fit(plan_transforms(checkpoint, config.text, CacheConfig()))
    else:
        found = fit(checkpoint, config, calibration, CacheConfig(), weights, method)
    model = checkpoint.meta_model()
    VisionEncoder(model, weights.vision)
    Decoder(model, config.text, weights)
    make_runnable(model, checkpoint)
    layers = quant_layers(model)
    source = QuantisedWeights(found.weights(checkpoint), layers, found.codes)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = source.tensor(name).to(parameter.dtype)
    model.load_state_dict(tensors, assign=True)
    found.discard()
    for layer in layers.values():
        layer.forward = _unpacked(layer)  # type: ignore[method-assign]
    return model, sum(tensor.nbytes for name, tensor in tensors.items() if name not in HOST_TABLES)


def _unpacked(layer: QuantLinear) -> Callable[..., torch.Tensor]:
    """The layer's function, its weight unpacked once for all calls."""
    weight = dense(layer.weight, layer.scale, layer.zero, layer.in_features, layer.form)

    def forward(x: torch.Tensor, residual: torch.Tensor | None = None, norm: nn.Module | None = None) -> torch.Tensor:
        return compute(x, weight, layer.bias, residual, norm_operands(norm), layer.form, layer.activation)

    return forward


def _run(model: Qwen3VLForConditionalGeneration, prompt: EvaluationPrompt) -> torch.Tensor:
    """The last hidden states of a conversation, ``[n, hidden_size]``."""
    with torch.no_grad():
        return model.model(**model_inputs(model, prompt.whole), use_cache=False).last_hidden_state[0]


def _logits(model: Qwen3VLForConditionalGeneration, states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return model.lm_head(states[at])


def _llama_cpp(checkpoint: Path, bits: int) -> tuple[Qwen3VLForConditionalGeneration, int]:
    """llama.cpp's q8_0 or q4_0 for the decoder's layers, q8_0 for the lm_head; the vision encoder in float16.

    Inputs are rounded to int8 in blocks of 32, as its kernels for these cards do.
    """
    model = load(checkpoint)
    there_and_back = {8: q8_0, 4: q4_0}
    nbytes = 2 * sum(p.numel() for p in model.model.visual.parameters())
    model.lm_head.weight = nn.Parameter(
        model.lm_head.weight.detach().clone(), requires_grad=False
    )  # not the embeddings
    linears = [(m, bits) for m in model.model.language_model.layers.modules() if isinstance(m, nn.Linear)]
    for linear, own_bits in [*linears, (model.lm_head, 8)]:
        linear.weight.data = torch.from_numpy(there_and_back[own_bits](linear.weight.detach().numpy()))
        linear.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], _LLAMA_CPP_BLOCK),))
        nbytes += linear.weight.numel() * (_LLAMA_CPP_BLOCK * own_bits // 8 + 2) // _LLAMA_CPP_BLOCK
    return model, nbytes
