"""Messages to everything the model takes: token ids with their placeholders expanded, patches, positions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pascalvl.plugins.bundle import CHAT_TEMPLATE, IMAGE_PROCESSOR, TOKENIZER, VIDEO_PROCESSOR
from pascalvl.plugins.errors import UserError, shown
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.plugins.prompt import Patches, Prompt
from pascalvl.runtime.chat_template import ChatTemplate
from pascalvl.runtime.image import ImageProcessor, load_image
from pascalvl.runtime.literal_text import LiteralText
from pascalvl.runtime.messages import Message, normalised, visual_parts
from pascalvl.runtime.tokenizer import Tokenizer
from pascalvl.runtime.video import VideoProcessor, load_video


class PromptBuilder:
    """Turns messages into prompts with the tokenizer, template and processors of a bundle.

    What users and tools say is text alone: what reads there as one of the tokenizer's added tokens (``<|im_end|>``,
    ``<|image_pad|>``, ``<think>``) is encoded in pieces. ``control_tokens_in_text`` encodes it as that token, which is
    the templates' way; prompts without such text are the same.
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        max_pixels: int | None = None,
        control_tokens_in_text: bool = False,
        most_tokens: int | None = None,
    ) -> None:
        self.tokenizer = Tokenizer(directory / TOKENIZER)
        self._config = config
        self._control_tokens_in_text = control_tokens_in_text
        self._most_tokens = most_tokens
        self._template = ChatTemplate(directory / CHAT_TEMPLATE)
        self._image_processor = ImageProcessor.from_file(directory / IMAGE_PROCESSOR, max_pixels)
        self._video_processor = VideoProcessor.from_file(directory / VIDEO_PROCESSOR, max_pixels)
        vision = config.vision
        expected = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        for name, processor in ((IMAGE_PROCESSOR, self._image_processor), (VIDEO_PROCESSOR, self._video_processor)):
            p = processor.parameters
            if (found := (p.patch_size, p.temporal_patch_size, p.merge_size)) != expected:
                raise UserError(
                    f"{directory / name} makes patches (size, frames, merged) of {found}, the model takes {expected}: "
                    "the files belong to different models."
                )
        self._image_token = self.tokenizer.token(config.image_token_id)
        self._video_token = self.tokenizer.token(config.video_token_id)
        self._vision_start = self.tokenizer.token(config.vision_start_token_id)
        self._vision_end = self.tokenizer.token(config.vision_end_token_id)

    def build(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Render (see `ChatTemplate.render` for the arguments), load, preprocess and tokenise.

        Raises:
            UserError: messages, pictures or videos that cannot be used.
        """
        messages = normalised(messages)
        literal = LiteralText(self.tokenizer)
        hidden = None if self._control_tokens_in_text else literal
        text = self._template.render(messages, tools, template_variables, hidden)
        self.check_length(text)
        visuals = [
            self._image_processor(load_image(part["image"]))
            if part["type"] == "image"
            else self._video_processor(load_video(part["video"]))
            for part in visual_parts(messages)
        ]
        token_ids = literal.encode(self._expand(text, visuals))
        highest, vocab_size = int(token_ids.max(initial=-1)), self.vocab_size
        if not 0 <= highest < vocab_size:
            raise UserError(
                f"the template and tokenizer make {len(token_ids)} tokens of a prompt, up to number {highest}: "
                f"expected some below {vocab_size}, as the model has; download the model again and export it."
            )
        return Prompt.of(token_ids, visuals, (self._config.image_token_id, self._config.video_token_id))

    @property
    def vocab_size(self) -> int:
        """Tokens that the model has."""
        return self._config.text.vocab_size

    def check_length(self, text: str) -> None:
        """Raise `UserError` for a text that has more than the most tokens, however long these are, before it is
        encoded, which would take long."""
        most = self._most_tokens
        # Only of a text that is long is it looked at how long tokens are, among all of them.
        if most is not None and len(text) > most and len(text) > most * self.tokenizer.longest_token:
            raise UserError(
                f"the prompt has {len(text)} characters, more than the context's {most} tokens can be: "
                "shorten it, or set a longer context."
            )

    def of_tokens(self, token_ids: Sequence[int] | np.ndarray) -> Prompt:
        """A prompt of these tokens and of no pictures; raises `UserError` for none, and for some out of range."""
        if not len(token_ids):
            raise UserError("the prompt has no tokens: expected at least one.")
        if not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            found = next(token for token in token_ids if not 0 <= token < self.vocab_size)
            raise UserError(f"token {shown(found)} of the prompt is out of range: expected 0 to {self.vocab_size - 1}.")
        return Prompt(np.array(token_ids, np.int64))

    def _expand(self, text: str, visuals: list[Patches]) -> str:
        """Give each placeholder as many tokens as its visual has; a video's frames come each with their time.

        As in Hugging Face's processor, the marks that the template sets around a video stay around all of its frames.
        """
        placeholder = re.compile(f"{re.escape(self._image_token)}|{re.escape(self._video_token)}")
        waiting = iter(visuals)

        def tokens(match: re.Match[str]) -> str:
            patches = next(waiting, None)
            if patches is None or patches.is_video == (match.group() == self._image_token):
                raise UserError(
                    f"the messages' text holds the placeholder {match.group()!r} where no such picture or video is "
                    "given: give it as a part of the message."
                )
            if not patches.is_video:
                return self._image_token * patches.tokens_per_frame
            frame = self._vision_start + self._video_token * patches.tokens_per_frame + self._vision_end
            return "".join(f"<{seconds:.1f} seconds>{frame}" for seconds in patches.timestamps)

        expanded = placeholder.sub(tokens, text)
        if next(waiting, None) is not None:
            raise UserError("the chat template has no place for one of the pictures or videos: put them in user turns.")
        return expanded
