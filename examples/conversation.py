"""A conversation about a picture: ``python examples/conversation.py ENGINE_BUNDLE PICTURE QUESTION...``.

Each turn repeats the ones before it, which are found in the KV cache: the picture is computed once.
"""

from __future__ import annotations

import sys

from pascalvl.runtime import VisionLanguageModel


def main(bundle: str, picture: str, *questions: str) -> None:
    """Print the answer to each question, and how much of its prompt had to be computed."""
    model = VisionLanguageModel.open(bundle)
    messages: list[dict[str, object]] = []
    for i, question in enumerate(questions):
        pictures = [{"type": "image", "image": picture}] if i == 0 else []
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        generation = model.generate(messages, max_new_tokens=200)
        answer = "".join(generation)
        messages.append({"role": "assistant", "content": answer})
        computed = generation.prompt_tokens - generation.reused_tokens
        print(f"{question}\n{answer}\n[{computed} of {generation.prompt_tokens} prompt tokens computed]\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
