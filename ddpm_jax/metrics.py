"""Metrics of samples, as pure functions of features."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Extractor(NamedTuple):
    """A network whose features metrics are made of: what `load(path)` of a `--features=MODULE:PATH` gives."""

    name: str  # such as "fashion_mnist_classifier"; no result goes without it
    sha256: str  # of the weights
    resize: str  # how images are brought to the network's size, in one line; "none" if they are not
    features: Callable  # uint8 [B, H, W, C] -> features float32 [B, D], logits float32 [B, K]
