"""How far the Fréchet distance of N samples lies from that of others of the same model, told from the samples alone.

The distance is a functional F of the samples' distribution. To first order, F of the samples minus F of the model is
the mean over samples of the influence function

    psi(x) = 2 (m_a - m_b)·y + y^T M y - tr(M A),  y = x - m_a,  M = I - B^1/2 (B^1/2 A B^1/2)^(-1/2) B^1/2,

with A and m_a of the samples, B and m_b of the reference: M is the derivative of F with respect to A, and I - M
carries N(0, A) onto N(0, B). Its mean is 0, so that the standard error of the distance is the deviation of psi over the
root of N.

Source: the delta method (van der Vaart 1998, "Asymptotic statistics", section 20.1); derivative: I - M is the optimal
transport between Gaussians (Dowson and Landau 1982).
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float32, Float64

from mf_jax.metrics.frechet import distance_from_cross, factor
from mf_jax.metrics.row_store import RowSource

_BLOCK = 1024
_SINGULAR = 1e-6
"""Of the largest singular value of A^1/2 B^1/2: directions below it hold no variance that counts."""


def frechet_with_error(
    mean_a: Float64[np.ndarray, "d"],
    cov_a: Float64[np.ndarray, "d d"],
    mean_b: Float64[np.ndarray, "d"],
    cov_b: Float64[np.ndarray, "d d"],
    rows: RowSource,
) -> tuple[float, float]:
    """Return `frechet_distance` and its standard error as far as it comes from the choice of the samples.

    The reference counts as exact. The bias of the distance, which is larger for fewer samples and the same for equal
    numbers of samples, is no part of it.

    Args:
      mean_a, cov_a: of the samples, `[d]` and `[d, d]`.
      mean_b, cov_b: of the reference.
      rows: feature rows of the samples.

    Source: the head of this file.
    """
    of_b = factor(cov_b, "cov_b")
    cross = factor(cov_a, "cov_a").T @ of_b
    squared = cross.T @ cross
    distance = distance_from_cross(mean_a, cov_a, mean_b, cov_b, cross)
    del cross  # 34 MB, as each of the others
    # in float32 from here on: it is the size of the noise, not of the distance
    of_b = of_b.astype(np.float32)
    carrier = jnp.asarray(of_b @ _directions(squared))
    del of_b, squared
    influence = np.empty(len(rows))
    mean, difference = jnp.asarray(mean_a, jnp.float32), jnp.asarray(mean_a - mean_b, jnp.float32)
    for start in range(0, len(rows), _BLOCK):
        block = rows.read(start, start + _BLOCK)
        filled = np.pad(block, ((0, _BLOCK - len(block)), (0, 0)))
        influence[start : start + _BLOCK] = _influence(filled, mean, difference, carrier)[
            : len(block)
        ]
    return distance, float(influence.std(ddof=1) / np.sqrt(len(rows)))


def noise_line(num_samples: int, standard_error: float) -> str:
    """Say how large a difference of two Fréchet distances must be to mean something, at 95 %."""
    least = 1.96 * np.sqrt(2) * standard_error
    return f"at {num_samples} samples two FIDs that differ by less than {least:.2g} do not differ"


def _directions(squared: Float64[np.ndarray, "d d"]) -> Float32[np.ndarray, "d r"]:
    """Return W s^(-1/2): times G it is a root of I - M, for A = F F^T, B = G G^T, (F^T G)^T (F^T G) = W diag(s^2) W^T.

    Args:
      squared: (F^T G)^T (F^T G), which is overwritten.
    """
    squares, vectors = scipy.linalg.eigh(
        squared.T, overwrite_a=True, check_finite=False, driver="evr"
    )
    first = np.searchsorted(squares, _SINGULAR**2 * squares[-1])  # ascending
    vectors /= squares.clip(min=squares[first]) ** 0.25
    return vectors[:, first:].astype(np.float32)


@jax.jit
def _influence(
    rows: Float32[Array, "block d"],
    mean: Float32[Array, "d"],
    difference: Float32[Array, "d"],
    carrier: Float32[Array, "d r"],
) -> Float32[Array, "block"]:
    """Return psi up to a constant."""
    y = rows - mean
    carried = jnp.matmul(y, carrier, precision="highest")
    return (
        2 * jnp.matmul(y, difference, precision="highest")
        + jnp.sum(y * y, 1)
        - jnp.sum(carried * carried, 1)
    )
