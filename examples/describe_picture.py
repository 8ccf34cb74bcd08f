"""Ask about a picture: ``python examples/describe_picture.py ENGINE_BUNDLE PICTURE [QUESTION]``."""

from __future__ import annotations

import sys

from pascalvl.runtime import SamplingParams, VisionLanguageModel


def main(bundle: str, picture: str, question: str = "Describe the picture.") -> None:
    """Print the likeliest answer as it comes."""
    model = VisionLanguageModel.open(bundle, max_pixels=1_000_000)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    for piece in model.generate([{"role": "user", "content": content}], SamplingParams(temperature=0)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
