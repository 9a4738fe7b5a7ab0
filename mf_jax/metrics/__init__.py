"""Sample quality, arrays in and numbers out: nothing here knows of a model, a data set or a training run.

`frechet`, `neighbours` and `two_sample` compare two sets of feature rows `[n, d]`; 2-D points are their own features.
`classifier` turns small images into such rows, with a network trained on the real data themselves.
"""

from mf_jax.metrics.classifier import Classifier, Recipe, cached_classifier, train_classifier
from mf_jax.metrics.frechet import frechet_distance, gaussian_statistics
from mf_jax.metrics.neighbours import precision_recall
from mf_jax.metrics.two_sample import energy_distance, kernel_distance, sliced_wasserstein

__all__ = [
    "Classifier",
    "Recipe",
    "cached_classifier",
    "energy_distance",
    "frechet_distance",
    "gaussian_statistics",
    "kernel_distance",
    "precision_recall",
    "sliced_wasserstein",
    "train_classifier",
]
