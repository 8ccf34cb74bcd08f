"""How sure is the answer: ``python examples/sort_pictures.py ENGINE_BUNDLE QUESTION PICTURE...``.

Asks the same question about each picture, and lists them by the probability of the first token of ``Yes``.
"""

from __future__ import annotations

import math
import sys

from pascalvl.runtime import SamplingParams, VisionLanguageModel


def main(bundle: str, question: str, *pictures: str) -> None:
    """Print a line a picture: the probability of yes, and its name."""
    model = VisionLanguageModel.open(bundle)
    found = []
    for picture in pictures:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": f"{question} Answer with Yes or No."}]
        generation = model.generate(
            [{"role": "user", "content": content}], SamplingParams(temperature=0), max_new_tokens=1, logprobs=20
        )
        answer = "".join(generation)
        chosen = math.exp(generation.logprobs[0].logprob)
        found.append((chosen if answer.strip().lower().startswith("y") else 1 - chosen, picture))
    for probability, picture in sorted(found, reverse=True):
        print(f"{probability:.2f}  {picture}")


if __name__ == "__main__":
    main(*sys.argv[1:])
