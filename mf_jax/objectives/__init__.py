"""One small file per method behind one interface: `loss(field, params, draws, step) -> (loss, metrics)`.

An objective is a frozen record, deterministic given the draws: it sees no module, no key and no mesh.
`learns_average` says whether its network knows u(z, r, t) for r < t, or the velocity u(z, t, t) alone. `target_ema` is
the decay of the moving average of the parameters that its targets use, handed over as `target_params`; 0 = none.
"""

from mf_jax.objectives.alpha_flow import AlphaFlow
from mf_jax.objectives.controls import Controlled, Controls
from mf_jax.objectives.flow_matching import FlowMatching
from mf_jax.objectives.improved_meanflow import ImprovedMeanFlow
from mf_jax.objectives.interface import Objective
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.objectives.pixel_meanflow import PixelMeanFlow
from mf_jax.objectives.split_meanflow import SplitMeanFlow
from mf_jax.objectives.terminal_velocity import TerminalVelocity

__all__ = ["OBJECTIVES", "Controlled", "Controls", "Objective"]

OBJECTIVES = {
    "flow_matching": FlowMatching,
    "meanflow": MeanFlow,
    "improved_meanflow": ImprovedMeanFlow,
    "pixel_meanflow": PixelMeanFlow,
    "alpha_flow": AlphaFlow,
    "split_meanflow": SplitMeanFlow,
    "terminal_velocity": TerminalVelocity,
}
