"""Has torchvision import without its compiled operators, which its wheel has for torch with CUDA alone.

timm and others need of it what is written in Python. Its import describes two operators that have to be declared first.
"""

import torch

try:
    import torchvision
except RuntimeError:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
except ImportError:
    pass
