"""Metrics of samples, as functions of features: Fréchet and kernel distance, Inception Score, precision and recall.

They are computed in float64 NumPy, from features of any Extractor. A value is only comparable for the same Extractor:
FID, KID and so on of the literature are these functions of Inception-v3's features.

Every function raises a ValueError of one line for too few images, features of different lengths, and features that
are not finite.

Time and peak memory on one core of an AMD EPYC server with other jobs, for normal float32 features of length 2,048.
The memory includes the features of both sets, which are 0.76 GiB for 50,000 and 50,000:

    moments of 50,000; then frechet_distance    9 s; 10 s    1.09 GiB
    kid of 50,000 and 50,000                    36 s         0.85 GiB
    prdc of 10,000 and 10,000                   53 s         0.42 GiB; time is quadratic in the number of images
    prdc of 10,000 and 10,000, length 64        9 s          0.23 GiB

For 2,000 and 1,500 features of length 64, torch-fidelity 0.4.0 in float64 computes the same Fréchet distance, Inception
Score (without shuffling) and kernel distance (over all images) to 12 digits, and the same precision and recall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ddpm_jax import data

KID_SUBSET = 1000  # images in each subset of the kernel distance
BLOCK = (
    2048  # rows computed at a time: 32 MiB of float64 for features of length 2,048, or distances
)


class Extractor(NamedTuple):
    """A network that extracts features of images for metrics.

    A module named in `--features=MODULE:PATH` has a function `load(path) -> Extractor`, which raises a ValueError or
    RunError of one line for a file that it cannot use.
    """

    name: str  # such as "fashion_mnist_classifier", saved with every result
    sha256: str  # of the weights
    resize: (
        str  # how images are resized to the network's input, in one line; "none" if they are not
    )
    features: Callable  # uint8 [B, H, W, C] -> features float32 [B, D], logits float32 [B, K]


class Features(NamedTuple):
    """The outputs of an Extractor for N images."""

    features: np.ndarray  # float32 [N, D]
    logits: np.ndarray  # float32 [N, K]
    images_sha256: str


# ---- Fréchet distance ------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Mean and scatter matrix of `count` feature vectors of length D; float64."""

    count: int
    mean: np.ndarray  # [D]
    scatter: np.ndarray  # [D, D] Σ (x − mean)(x − mean)ᵀ

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance [D, D]. Raises ValueError for a single image."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


def moments(features: np.ndarray) -> Moments:
    """Computes the moments of features [N, D], N ≥ 1."""
    _check("a mean", 1, features)
    total = None
    for rows in _blocks(len(features)):
        block = np.asarray(features[rows], np.float64)
        mean = np.mean(block, axis=0)
        block = block - mean  # [B, D]
        part = Moments(len(block), mean, block.T @ block)
        total = part if total is None else merge(total, part)
    return total


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the union of two sets; Chan et al. 1979. The order changes only rounding.

    Those of many batches are `functools.reduce(merge, map(moments, batches))`, in the memory of two.
    """
    _check_same_length(a.mean, b.mean)
    count = a.count + b.count
    difference = b.mean - a.mean
    mean = a.mean + difference * (b.count / count)
    between = np.outer(difference, difference * (a.count * b.count / count))
    return Moments(count, mean, a.scatter + b.scatter + between)


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2) -> float:
    """‖μ_1 − μ_2‖² + tr(C_1 + C_2 − 2 (C_1 C_2)^½), the squared 2-Wasserstein distance of two Gaussians.

    With Inception's features it is FID, Heusel et al. 2017 (6).

    With C = A Aᵀ from an eigendecomposition, tr (C_1 C_2)^½ is the sum of the singular values of A_1ᵀ A_2. It is real
    also for fewer images than features, and singular values that should be 0 are at most 1e-16 of the largest; square
    roots of eigenvalues of C_1 C_2 would be up to 1e-8 of it.

    Args:
      mean_1, mean_2: [D].
      covariance_1, covariance_2: [D, D], symmetric.

    Returns:
      the distance; of equal moments 0 up to rounding, which may be below.

    Raises:
      ValueError: shapes that do not belong together, or values that are not finite.
    """
    means, covariances = (
        [np.asarray(array, np.float64) for array in pair]
        for pair in ((mean_1, mean_2), (covariance_1, covariance_2))
    )
    for mean, covariance in zip(means, covariances, strict=True):
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
            raise ValueError(
                f"a mean [D] and a covariance [D, D] make a Gaussian, got {list(mean.shape)} and"
                f" {list(covariance.shape)}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("moments that are not finite have no Fréchet distance")
    _check_same_length(*means)
    first, second = (_factor(covariance) for covariance in covariances)
    cross = np.sum(np.linalg.svd(first.T @ second, compute_uv=False))
    traces = sum(np.trace(covariance) for covariance in covariances)
    return float(np.sum((means[0] - means[1]) ** 2) + traces - 2 * cross)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A [D, rank] with A Aᵀ = covariance [D, D]."""
    values, vectors = np.linalg.eigh(covariance)
    # Smaller eigenvalues are rounding errors of 0, but their roots are not negligible: for 100 and 60 images
    # and 2,048 features they change the distance by 3e-9 of itself.
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


def warning(num_images: int, num_features: int) -> str | None:
    """A warning of one line if there are too few images for a Fréchet distance; otherwise None."""
    if num_images > num_features:
        return None
    return (
        f"{num_images} images for {num_features} features: their covariance is singular, and the Fréchet"
        " distance far above that of many images; compare it only with others of as many"
    )


def short_name(metric: str, num_images: int) -> str:
    """The name of a Fréchet distance: "fid" for 10,000 images or more, "fid_2k" or "fid_500" for fewer.

    Its bias is positive and falls as 1/N, so distances of different N are not comparable.
    """
    if num_images >= 10_000:
        return metric
    thousands, rest = divmod(num_images, 1000)
    return f"{metric}_{num_images}" if rest or not thousands else f"{metric}_{thousands}k"


# ---- Inception Score -------------------------------------------------------------------------------


def inception_score(logits: np.ndarray, *, splits: int = 10) -> tuple[float, float]:
    """exp E_x KL(p(y|x) ‖ p(y)), Salimans et al. 2016: mean and standard deviation over splits.

    Args:
      logits: [N, K] of a classifier.
      splits: number of parts, each with its own p(y). The images are first permuted (always in the same way), since
        neighbours in a folder are often of one class.
    """
    _check_at_least(1, splits=splits)
    _check(f"an Inception Score of {splits} splits", 2 * splits, logits, less="splits")
    logits = np.asarray(logits, np.float64)
    logits = logits[data.choose(len(logits))]
    scores = []
    for i in range(splits):
        part = logits[i * len(logits) // splits : (i + 1) * len(logits) // splits]
        log_p = part - np.logaddexp.reduce(part, axis=1, keepdims=True)  # [B, K]
        log_marginal = np.logaddexp.reduce(log_p, axis=0) - np.log(len(part))  # [K]
        divergence = np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1)
        scores.append(np.exp(np.mean(divergence)))
    return float(np.mean(scores)), float(np.std(scores))


# ---- kernel distance -------------------------------------------------------------------------------


def kid(
    features_1: np.ndarray,
    features_2: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Kernel distance, Bińkowski et al. 2018: mean and standard deviation of `mmd2` over random subsets.

    It is unbiased, so values of different N are comparable, and it may be negative.

    Args:
      features_1, features_2: [N, D] and [M, D].
      subsets: number of subsets.
      subset_size: number of images of each set in a subset, without repetition.
      seed: of the choice.
    """
    _check_at_least(1, subsets=subsets)
    _check_at_least(2, subset_size=subset_size)
    asked = f"a kernel distance of subset_size {subset_size}"
    _check(asked, subset_size, features_1, features_2, less="subset_size")
    values = []
    for subset in range(subsets):
        # Sorted raw bits, whose stream NumPy guarantees in all versions, as in `data.batching.permutation`.
        bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(subset,)))
        chosen = (
            np.asarray(
                features[np.argsort(bits.random_raw(len(features)))[:subset_size]], np.float64
            )
            for features in (features_1, features_2)
        )
        values.append(mmd2(*chosen))
    return float(np.mean(values)), float(np.std(values))


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of x [N, D] and y [M, D] with the kernel (xᵀy/D + 1)³."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    def within(a):  # pairs of different images
        k = kernel(a, a)
        return (np.sum(k) - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * np.mean(kernel(x, y)))


# ---- neighbours ------------------------------------------------------------------------------------


def prdc(
    real: np.ndarray, generated: np.ndarray, *, k: int = 3, k_density: int = 5
) -> dict[str, float]:
    """Precision and recall, Kynkäänniemi et al. 2019; density and coverage, Naeem et al. 2020.

    The ball of an image extends to its k-th nearest neighbour in its own set.

        precision   share of generated images in the ball of a real one
        recall      share of real images in the ball of a generated one
        density     mean number of balls of real images that contain a generated image, divided by k
        coverage    share of real images with a generated one in their ball

    As in the authors' code, the surface belongs to the ball for precision and recall, not for density and coverage.
    Distances that differ by less than 1e-7 of themselves are equal, since features are float32.

    Args:
      real, generated: [N, D] and [M, D].
      k: for precision and recall.
      k_density: for density and coverage.
    """
    _check_at_least(1, k=k, k_density=k_density)
    largest = max(k, k_density)
    _check(f"neighbour {largest} of an image", largest + 1, real, generated, less="k")
    centre = np.mean(
        real, axis=0, dtype=np.float64
    )  # subtracted, so that distances lose fewer digits
    real_radius, dense_radius = _squared_radii(real, (k, k_density), centre)
    (generated_radius,) = _squared_radii(generated, (k,), centre)

    precise, dense = np.zeros(len(generated), bool), np.zeros(len(generated), np.int64)
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows in _blocks(len(real)):
        for columns in _blocks(len(generated)):
            squared = _squared_distances(real[rows], generated[columns], centre)
            precise[columns] |= np.any(squared <= real_radius[rows, None] * (1 + 1e-7), axis=0)
            recalled[rows] |= np.any(squared <= generated_radius[columns] * (1 + 1e-7), axis=1)
            inside = squared < dense_radius[rows, None] * (1 - 1e-7)
            dense[columns] += np.sum(inside, axis=0)
            covered[rows] |= np.any(inside, axis=1)
    return {
        "precision": float(np.mean(precise)),
        "recall": float(np.mean(recalled)),
        "density": float(np.mean(dense)) / k_density,
        "coverage": float(np.mean(covered)),
    }


def _squared_radii(features, ks: tuple[int, ...], centre) -> list[np.ndarray]:
    """Squared distance of each image to its k-th nearest neighbour in the set: [N] for each k."""
    radii = np.empty((len(ks), len(features)))
    for rows in _blocks(len(features)):
        nearest = np.empty((rows.stop - rows.start, 0))  # [B, max k] of the columns seen so far
        for columns in _blocks(len(features)):
            squared = _squared_distances(features[rows], features[columns], centre)
            if rows == columns:
                np.fill_diagonal(squared, np.inf)  # an image is not its own neighbour
            nearest = np.concatenate([nearest, squared], axis=1)
            last = min(max(ks), nearest.shape[1]) - 1
            nearest = np.partition(nearest, last, axis=1)[:, : last + 1]
        nearest.sort(axis=1)
        for radius, k in zip(radii, ks, strict=True):
            radius[rows] = nearest[:, k - 1]
    return list(radii)


def _squared_distances(x, y, centre) -> np.ndarray:
    """[B, C] from x [B, D] and y [C, D]; exactly 0 between equal images."""
    x, y = (np.asarray(features, np.float64) - centre for features in (x, y))
    norms = np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1)
    squared = norms - 2.0 * (x @ y.T)
    squared[squared < 1e-12 * norms] = 0.0  # the rounding of the difference
    return squared


# ---- checks ----------------------------------------------------------------------------------------


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK))


def _check(asked: str, least: int, *sets: np.ndarray, less: str | None = None) -> None:
    """Raises ValueError unless all sets are finite [N, D] with N ≥ least and the same D."""
    for features in sets:
        if np.ndim(features) != 2:
            raise ValueError(f"{asked}: features are [N, D], got {list(np.shape(features))}")
    _check_same_length(*sets)
    for features in sets:
        if len(features) < least:
            images = "image" if least == 1 else "images"
            advice = f"; draw more, or lower {less}" if less else ""
            raise ValueError(
                f"{asked} needs at least {least} {images}, got {len(features)}{advice}"
            )
        finite = np.concatenate(
            [np.isfinite(features[rows]).all(axis=1) for rows in _blocks(len(features))]
        )
        if not finite.all():
            raise ValueError(
                f"{np.sum(~finite)} of {len(features)} images have features that are not finite; look at"
                " the images and at the weights of the Extractor"
            )


def _check_same_length(*vectors: np.ndarray) -> None:
    lengths = [np.shape(vector)[-1] for vector in vectors]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"features of {lengths[0]} numbers do not compare with features of {lengths[1]}; take both from"
            " the same Extractor"
        )


def _check_at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


# ---- by name ---------------------------------------------------------------------------------------


def fid_of(generated: Features, reference: Features) -> dict[str, float]:
    """fid, or fid_2k and so on for fewer than 10,000 images."""
    first, second = moments(generated.features), moments(reference.features)
    distance = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    return {short_name("fid", len(generated.features)): distance}


def inception_score_of(generated: Features, reference: Features | None) -> dict[str, float]:
    """is and is_std_of_splits; needs no reference."""
    del reference
    mean, spread = inception_score(generated.logits)
    return {"is": mean, "is_std_of_splits": spread}


def kid_of(generated: Features, reference: Features) -> dict[str, float]:
    """kid and kid_std_of_subsets, of subsets of at most `KID_SUBSET` images."""
    size = min(KID_SUBSET, len(generated.features), len(reference.features))
    mean, spread = kid(generated.features, reference.features, subset_size=size)
    return {"kid": mean, "kid_std_of_subsets": spread}


def prdc_of(generated: Features, reference: Features) -> dict[str, float]:
    """precision, recall, density and coverage."""
    return prdc(reference.features, generated.features)


# A metric of your own, named module:NAME, has the same signature: (generated, reference) -> {name: number}.
METRICS = {"fid": fid_of, "is": inception_score_of, "kid": kid_of, "prdc": prdc_of}
