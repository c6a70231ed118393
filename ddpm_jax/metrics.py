"""Measures of samples: what a feature extractor is."""

from collections.abc import Callable
from typing import NamedTuple


class Extractor(NamedTuple):
    """A network whose features of images are compared."""

    name: str
    sha256: str
    resize: str
    features: Callable  # uint8 [B, H, W, C] -> (features float32 [B, D], logits float32 [B, K])
