"""Features without weights: means over squares of pixels; `--features=tests.faults.pixels:2`."""

import numpy as np

from ddpm_jax.metrics import Extractor


def load(path: str) -> Extractor:
    size = int(path)

    def features(images):
        batch, height, width, channels = images.shape
        parts = images.reshape(batch, height // size, size, width // size, size, channels)
        means = parts.mean((2, 4)).reshape(batch, -1).astype(np.float32)
        return means, means[:, :2]

    return Extractor(f"pixels{size}", "0" * 64, f"{size}", features)
