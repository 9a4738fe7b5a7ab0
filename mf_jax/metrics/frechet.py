"""Fréchet distance between two Gaussians, and the Gaussian of a set of feature rows.

|m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2), all in float64.
"""

import numpy as np
import scipy.linalg
from jaxtyping import Float, Float64

from mf_jax.errors import BadInput

_ROUNDING = 1e-6  # asymmetry and negative eigenvalues up to this share of the largest are rounding


def checked_features(
    features: np.ndarray, name: str, *, at_least: int, width: int | None = None
) -> Float64[np.ndarray, "n d"]:
    """Return feature rows as float64 after checking what every metric here relies on.

    Args:
        features: feature rows `[n, d]`.
        name: what the caller calls them, for the message.
        at_least: the fewest rows that the metric is defined for.
        width: the d they must have, that of the other set; None allows any.

    Returns:
        The rows in float64, `[n, d]`.

    Raises:
        BadInput: not a matrix, another d, too few rows, or a value that is not finite.
    """
    shape = np.shape(features)
    if len(shape) != 2 or shape[1] == 0:
        raise BadInput(
            f"{name} has shape {shape}; it must be [rows, features]: flatten each sample to one row"
        )
    if width is not None and shape[1] != width:
        raise BadInput(
            f"{name} has {shape[1]} features a row; it must have {width}, like the other set: "
            "use one feature extractor for both"
        )
    if shape[0] < at_least:
        raise BadInput(
            f"{name} has {shape[0]} rows; it must have at least {at_least}: use more samples"
        )
    rows = np.asarray(features, np.float64)
    _require_finite(rows, name)
    return rows


def gaussian_statistics(
    features: Float[np.ndarray, "n d"],
) -> tuple[Float64[np.ndarray, "d"], Float64[np.ndarray, "d d"]]:
    """Return the mean and the unbiased covariance of feature rows, in float64.

    Args:
        features: feature rows `[n, d]`, n >= 2, finite.

    Returns:
        The mean `[d]` and the covariance `[d, d]` (divided by n - 1).

    Raises:
        BadInput: fewer than 2 rows, not a matrix, or values that are not finite.
    """
    rows = checked_features(features, "features", at_least=2)
    return rows.mean(axis=0), np.cov(rows, rowvar=False).reshape(rows.shape[1], -1)


def frechet_distance(
    mean_a: Float[np.ndarray, "d"],
    cov_a: Float[np.ndarray, "d d"],
    mean_b: Float[np.ndarray, "d"],
    cov_b: Float[np.ndarray, "d d"],
) -> float:
    """Return the Fréchet distance between N(mean_a, cov_a) and N(mean_b, cov_b), as FID defines it (squared).

    Covariances may be singular (fewer samples than features).

    Args:
        mean_a: mean `[d]`.
        cov_a: covariance `[d, d]`, symmetric, no negative eigenvalue.
        mean_b: mean `[d]`.
        cov_b: covariance `[d, d]`, like cov_a.

    Returns:
        The distance, >= 0.

    Raises:
        BadInput: shapes that do not fit, values that are not finite, or a matrix that is no covariance.

    Source:
        Heusel et al. 2017 (arXiv:1706.08500), equation 6; Dowson and Landau 1982.
    """
    mean_a, cov_a = _checked_gaussian(mean_a, cov_a, "a")
    mean_b, cov_b = _checked_gaussian(mean_b, cov_b, "b")
    if mean_a.shape != mean_b.shape:
        raise BadInput(
            f"mean_b has {mean_b.size} features; it must have {mean_a.size}, like mean_a: "
            "use statistics of one feature extractor"
        )
    cross = factor(cov_a, "cov_a").T @ factor(cov_b, "cov_b")
    return distance_from_cross(mean_a, cov_a, mean_b, cov_b, cross)


def distance_from_cross(
    mean_a: Float64[np.ndarray, "d"],
    cov_a: Float64[np.ndarray, "d d"],
    mean_b: Float64[np.ndarray, "d"],
    cov_b: Float64[np.ndarray, "d d"],
    cross: Float64[np.ndarray, "d d"],
) -> float:
    """Return `frechet_distance`, given F^T G for cov_a = F F^T and cov_b = G G^T, which is overwritten.

    Args:
        mean_a, cov_a, mean_b, cov_b: of the Gaussians.
        cross: `[d, d]`.
    """
    # tr((A^1/2 B A^1/2)^1/2) is the sum of the singular values of F^T G. Taken so, rounding errors enter once; under
    # the eigenvalues of A^1/2 B A^1/2 they would enter through a square root, 1e-16 becoming 1e-8.
    # The transpose is laid out as LAPACK wants it: else it would work on a copy.
    nuclear = scipy.linalg.svd(
        cross.T, compute_uv=False, overwrite_a=True, check_finite=False
    ).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * nuclear
    return max(float(distance), 0.0)


def factor(covariance: Float64[np.ndarray, "d d"], name: str) -> Float64[np.ndarray, "d d"]:
    """Return F with F F^T = covariance, its columns along the eigenvectors.

    Args:
        covariance: `[d, d]`, symmetric, may be singular.
        name: what the caller calls it, for the message.

    Raises:
        BadInput: an eigenvalue below 0.
    """
    values, vectors = scipy.linalg.eigh(
        np.array(covariance, order="F"), overwrite_a=True, check_finite=False, driver="evr"
    )
    if values[0] < -_ROUNDING * np.abs(values).max():
        raise BadInput(
            f"{name} has the eigenvalue {values[0]:.3g}; a covariance has none below 0: "
            "take it from gaussian_statistics"
        )
    vectors *= np.sqrt(values.clip(min=0))
    return vectors


def asymmetry(matrix: Float64[np.ndarray, "d d"]) -> float:
    """Return the largest difference between a matrix and its transpose."""
    return float(
        max((np.abs(row - matrix[:, i]).max() for i, row in enumerate(matrix)), default=0.0)
    )


def _checked_gaussian(
    mean: np.ndarray, covariance: np.ndarray, side: str
) -> tuple[np.ndarray, np.ndarray]:
    if np.ndim(mean) != 1 or np.shape(covariance) != (np.size(mean), np.size(mean)):
        raise BadInput(
            f"mean_{side} and cov_{side} have shapes {np.shape(mean)} and {np.shape(covariance)}; they must be "
            "[d] and [d, d]: take both from gaussian_statistics"
        )
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    _require_finite(mean, f"mean_{side}")
    _require_finite(covariance, f"cov_{side}")
    difference = asymmetry(covariance)
    if difference > _ROUNDING * max(covariance.max(), -covariance.min()):
        raise BadInput(
            f"cov_{side} differs from its transpose by {difference:.3g}; a covariance is symmetric: "
            "take it from gaussian_statistics"
        )
    return mean, covariance


def _require_finite(values: np.ndarray, name: str) -> None:
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise BadInput(
            f"{name} has {bad} values that are NaN or infinite; all must be finite: "
            "look for a diverged network or a division by zero before the metric"
        )
