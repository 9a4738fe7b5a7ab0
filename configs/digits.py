"""MeanFlow on the 1,797 real 8x8 digits of scikit-learn, by class, unguided: the main job.

Hardware: 2 CPU cores; training takes under 3 minutes. Expected at one step: 97 % of the samples in
their class. Times lean towards long intervals, which a single step needs most. Optimal transport
deals the noise of a class, and the network predicts the picture: docs/recipes.md has what was
tried.
Command: bash launch/local.sh
Another method on the same data, minutes: bash launch/local.sh --config=configs/digits.py:shortcut
"""

from ml_collections import ConfigDict

from configs.default import get_config as defaults
from configs.rows import choose, shortcut, soflow

STEPS = 1800
ROWS = {
    "": {},
    # the multi-step baseline: it knows the velocity alone, so one step is poor and many are good
    "flow_matching": {
        "objective.name": "flow_matching",
        "draws.instant_share": 1.0,
        "sample.steps": 16,
        "eval.steps": (1, 2, 4, 8, 16),
    },
    # arXiv 2303.01469: MeanFlow whose intervals all end at the data; one step is all that it learns
    "consistency": {"times.name": "consistency", "eval.steps": (1,)},
    # arXiv 2512.02012: a second head for the velocity, guidance chosen when sampling.
    # A quarter of an hour: 20 tokens of class, guidance and time stand before the 4 patches.
    "improved_meanflow": {
        "model.name": "in_context_dit",
        "train.num_steps": 1500,
        "optim.lr": 2e-3,
        "objective.name": "improved_meanflow",
        "draws.label_drop_share": 0.1,
        "draws.omega_max": 4.0,
    },
    # arXiv 2601.22158: the network predicts the picture; times lean to noise, as published
    "pixel_meanflow": {
        "model.name": "in_context_dit",
        "train.num_steps": 1500,
        "optim.lr": 2e-3,
        "objective.name": "pixel_meanflow",
        "times.t_mean": 0.8,
        "times.t_std": 0.8,
        "times.r_mean": 0.8,
        "times.r_std": 0.8,
    },
    # arXiv 2512.11831 (ESC): a fifth of the rows take the batch's velocity at z. du/dt comes in
    # slowly, and at first all intervals end at the data.
    "esc": {
        "coupling.name": "independent",
        "velocity.source": "batch",
        "velocity.target": 0.2,
        "velocity.tangent": 0.2,
        "velocity.of_rows": True,
        "objective.ramp_steps": STEPS // 4,
        "objective.to_data_steps": STEPS,
    },
    # arXiv 2605.09235: du/dt mostly along the velocity of the batch, which varies less
    "variance_reduced": {
        "coupling.name": "independent",
        "velocity.source": "batch",
        "velocity.tangent": 0.94,
    },
    # arXiv 2506.14603 (AYF): the velocity of a flow-matching run, which --config.init.path names
    "ayf": {
        "velocity.source": "average",
        "velocity.ema": 1.0,
        "velocity.target": 1.0,
        "velocity.tangent": 1.0,
        "draws.instant_share": 0.0,
        "weight.p": 0.0,
        "weight.of_interval": 1.0,
    },
    # arXiv 2602.02571 (EMF): no JVP, but one more forward of the rows with r < t
    "emf": {"objective.derivative": "backward"},
    # MF-RAE and TiM: no JVP, but two more forwards of the rows with r < t
    "mf_rae": {"objective.derivative": "central"},
    # arXiv 2510.20771: from flow matching to MeanFlow; until half of the run alpha is near 1
    "alpha_flow": {"objective.name": "alpha_flow", "objective.anneal_to": STEPS},
    # arXiv 2512.15657: no JVP is computed
    "soflow": soflow(STEPS),
    # arXiv 2507.16884: an interval is the sum of its two parts, split anywhere. An adaptive weight
    # (p > 0) favours rows of small error: here the rows that look at no data.
    "split_meanflow": {"objective.name": "split_meanflow", "weight.p": 0.0},
    # arXiv 2410.12557: a step is two of half its size, down to 1/32 of the way, which is the flow's
    "shortcut": shortcut(levels=5) | {"objective.target_ema": 0.99},
    # arXiv 2511.19797: the end of a step moves with the flow. A step takes 1.4 times MeanFlow's
    # FLOPs. Times are uniform: the identity in r must hold all the way from t down.
    "terminal_velocity": {
        "objective.name": "terminal_velocity",
        "objective.target_ema": 0.99,
        "times.name": "uniform",
        "weight.p": 0.0,
    },
}


def get_config(row: str = "") -> ConfigDict:
    """Return the config of a row, by default of the main job."""
    config = defaults()
    config.times.t_mean, config.times.t_std = 0.4, 1.2
    config.times.r_mean, config.times.r_std = -2.0, 1.4
    config.draws.instant_share, config.draws.label_drop_share = 0.5, 0.0
    config.weight.p, config.ema.decays = 0.5, (0.995,)
    config.model.prediction, config.coupling.name = "data", "optimal_transport"
    config.train.num_steps, config.log.sample_every_steps = STEPS, 500
    config.optim.lr, config.optim.warmup_steps, config.optim.schedule = 4e-3, 100, "cosine"
    config.eval.labels = "balanced"  # as the digits are, but for a few
    config.update_from_flattened_dict(choose("configs/digits.py", row, ROWS))
    return config
