"""Lets transformers import torchvision, which its video processor needs, beside a CPU-only torch; import this first.

torchvision's default wheel registers shapes for operators that its compiled part, unusable here, would define.
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / ".venv" / "torchvision"))
for _op in ("nms", "qnms"):
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, _op):
        torch.library.define(f"torchvision::{_op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
