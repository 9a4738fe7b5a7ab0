"""Sample quality, arrays in and numbers out: nothing here knows of a model, a data set or a training run.

`frechet`, `neighbours` and `two_sample` compare two sets of feature rows `[n, d]`; 2-D points are their own features.
`classifier` turns small images into such rows, with a network trained on the real data themselves.

`suite` scores 50,000 samples from the features of `inception`, which come batch by batch: sums on the device for FID,
sFID (`moments`) and Inception Score (`inception_score`), rows in a file (`row_store`) for precision, recall and KID
(`row_pairs`) and for the noise of FID (`frechet_noise`), against a file of statistics (`reference_file`).
"""

from mf_jax.metrics.classifier import Classifier, Recipe, cached_classifier, train_classifier
from mf_jax.metrics.frechet import frechet_distance, gaussian_statistics
from mf_jax.metrics.frechet_noise import noise_line
from mf_jax.metrics.neighbours import precision_recall
from mf_jax.metrics.reference_file import (
    Reference,
    Statistics,
    read_pictures,
    read_reference,
    write_reference,
)
from mf_jax.metrics.suite import SampleScores
from mf_jax.metrics.two_sample import energy_distance, kernel_distance, sliced_wasserstein

__all__ = [
    "Classifier",
    "Recipe",
    "Reference",
    "SampleScores",
    "Statistics",
    "cached_classifier",
    "energy_distance",
    "frechet_distance",
    "gaussian_statistics",
    "kernel_distance",
    "noise_line",
    "precision_recall",
    "read_pictures",
    "read_reference",
    "sliced_wasserstein",
    "train_classifier",
    "write_reference",
]
