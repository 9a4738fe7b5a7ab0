"""Fréchet distance of two Gaussians, its standard error, and moments of feature rows, in float64.

The distance is |m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2). Rows come in batches: a
batch has a count, a mean and a scatter, and two of these add up without loss to those of all rows.

The standard error is the delta method. To first order, the distance of N samples minus the distance
of their model is the mean over samples of the influence function

    psi(x) = 2 (m_a - m_b)·y + y^T M y - tr(M A),  y = x - m_a,  M = I - B^1/2 (B^1/2 A
    B^1/2)^(-1/2) B^1/2,

with A and m_a of the samples, B and m_b of the reference. M is the derivative by A; I - M carries
N(0, A) onto N(0, B).

Source: Heusel et al. 2017 (arXiv:1706.08500), equation 6; Dowson and Landau 1982; Chan et al. 1983,
"Algorithms for computing the sample variance"; van der Vaart 1998, "Asymptotic statistics", section
20.1.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float, Float64

from mf_jax.flow.errors import BadInput

_SINGULAR = 1e-6
"""Share of the largest singular value of A^1/2 B^1/2, below which no variance counts."""
_BLOCK = 4096


class Gaussian(NamedTuple):
    """A mean, and a covariance that may be singular."""

    mean: Float[np.ndarray, "d"]
    covariance: Float[np.ndarray, "d d"]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of feature rows; the scatter sums (x - mean)(x - mean)^T."""

    count: int
    mean: Float64[np.ndarray, "d"]
    scatter: Float64[np.ndarray, "d d"]

    @classmethod
    def none(cls, width: int) -> "Moments":
        """Return the moments of no rows."""
        return cls(0, np.zeros(width), np.zeros((width, width)))

    @classmethod
    def of(cls, rows: Float[np.ndarray, "n d"]) -> "Moments":
        """Return the moments of rows, which may be none."""
        moments = cls.none(rows.shape[1])
        for start in range(0, len(rows), _BLOCK):  # float64 copies of few rows at once
            block = np.asarray(rows[start : start + _BLOCK], np.float64)
            mean = block.mean(axis=0)
            centred = block - mean
            moments += cls(len(block), mean, centred.T @ centred)
        return moments

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of the rows of both."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        shift = other.mean - self.mean
        between = np.outer(shift, shift * (self.count * other.count / count))
        between += self.scatter
        between += other.scatter
        return Moments(count, self.mean + shift * (other.count / count), between)

    @property
    def gaussian(self) -> Gaussian:
        """Return the mean and the unbiased covariance."""
        if self.count < 2:
            raise BadInput(f"features has {self.count} rows; it must have at least 2")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return the Fréchet distance (squared, as FID is)."""
    return _distance(a, b, _root(a.covariance).T @ _root(b.covariance))


def frechet_with_error(
    samples: Gaussian, reference: Gaussian, rows: Float[np.ndarray, "n d"]
) -> tuple[float, float]:
    """Return `frechet_distance` and its standard error over draws of the samples, of these rows.

    The reference counts as exact. The error leaves out the bias, which falls with the number of
    samples.
    """
    root = _root(reference.covariance)
    cross = _root(samples.covariance).T @ root
    # (F^T G)^T (F^T G) = W diag(s^2) W^T for A = F F^T, B = G G^T: G W s^(-1/2) is a root of I - M
    squares, vectors = scipy.linalg.eigh(cross.T @ cross, overwrite_a=True, driver="evr")
    distance = _distance(samples, reference, cross)
    kept = squares > max(_SINGULAR**2 * squares[-1], 0)
    # in float32 from here on: it is the size of the noise, not of the distance
    carrier = (root @ (vectors[:, kept] / squares[kept] ** 0.25)).astype(np.float32)
    influence = []
    for start in range(0, len(rows), _BLOCK):
        y = (rows[start : start + _BLOCK] - samples.mean).astype(np.float32)
        carried = np.square(y @ carrier).sum(axis=1)
        shifted = y @ (2 * (samples.mean - reference.mean)).astype(np.float32)
        influence.append(shifted + np.square(y).sum(axis=1) - carried)
    deviation = np.concatenate(influence).std(ddof=1, dtype=np.float64)
    return distance, float(deviation / np.sqrt(len(rows)))


def noise_line(num_samples: int, standard_error: float) -> str:
    """Say how large a difference of two Fréchet distances must be to mean something, at 95 %."""
    least = 1.96 * np.sqrt(2) * standard_error
    return f"at {num_samples} samples two FIDs that differ by less than {least:.2g} do not differ"


def _distance(a: Gaussian, b: Gaussian, cross: Float64[np.ndarray, "d d"]) -> float:
    """Return the distance, given F^T G for the covariances F F^T of a and G G^T of b."""
    # tr((A^1/2 B A^1/2)^1/2) is the sum of the singular values of F^T G. Rounding errors enter
    # once; under the eigenvalues of A^1/2 B A^1/2 they would enter through a square root, 1e-16
    # becoming 1e-8.
    nuclear = scipy.linalg.svdvals(cross).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance)
    return max(float(distance - 2 * nuclear), 0.0)


def _root(covariance: Float[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    """Return F with F F^T = covariance, its columns along the eigenvectors."""
    values, vectors = scipy.linalg.eigh(np.asarray(covariance, np.float64), driver="evr")
    return vectors * np.sqrt(values.clip(min=0))
