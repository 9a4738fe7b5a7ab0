"""One small file per method behind one interface: `terms.Objective`."""

from mf_jax.objectives.alpha_flow import AlphaFlow
from mf_jax.objectives.average_divergence import AverageDivergence
from mf_jax.objectives.flow_matching import FlowMatching
from mf_jax.objectives.improved_meanflow import ImprovedMeanFlow
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.objectives.pixel_meanflow import PixelMeanFlow
from mf_jax.objectives.shortcut import Shortcut
from mf_jax.objectives.split_meanflow import SplitMeanFlow
from mf_jax.objectives.terminal_velocity import TerminalVelocity
from mf_jax.objectives.terms import Objective
from mf_jax.objectives.wrappers import Controlled, Controls, Estimated

__all__ = ["OBJECTIVES", "AverageDivergence", "Controlled", "Controls", "Estimated", "Objective"]

OBJECTIVES = {
    "flow_matching": FlowMatching,
    "meanflow": MeanFlow,
    "improved_meanflow": ImprovedMeanFlow,
    "pixel_meanflow": PixelMeanFlow,
    "alpha_flow": AlphaFlow,
    "split_meanflow": SplitMeanFlow,
    "shortcut": Shortcut,
    "terminal_velocity": TerminalVelocity,
}
