"""Flow matching on the digits: the multi-step baseline of configs/digits.py, same network, same number of steps.

Hardware: 2 CPU cores, about 4 minutes. It knows the velocity alone, so one step is poor and many steps are good.
Command: bash launch/local.sh --config=configs/digits_flow_matching.py
"""

from ml_collections import ConfigDict

from configs.digits import get_config as digits


def get_config() -> ConfigDict:
    """Return the config."""
    config = digits()
    config.objective.name = "flow_matching"
    config.draws.instant_share = 1.0
    config.sample.steps = 16
    config.eval.steps = (1, 2, 4, 8, 16)
    return config
