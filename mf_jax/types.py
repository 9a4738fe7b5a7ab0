"""The records that a source, network or objective of your own needs."""

from mf_jax.flow.records import NO_LABEL, Condition, DataSpec, Draws, Field, Prediction, Rows

__all__ = ["NO_LABEL", "Condition", "DataSpec", "Draws", "Field", "Prediction", "Rows"]
