"""Configs of earlier versions: keys that were renamed, and keys that were added since."""

from typing import Any

RENAMED = {"guidance.t_start": "guidance.t_min", "guidance.t_end": "guidance.t_max"}
RENAMED |= {"init.from": "init.path", "log.every_steps": "train.log_every_steps"}
"""Keys of a config.json that an earlier version has written."""
ADDED: dict[str, dict[str, Any]] = {
    "model": {"prediction": "velocity", "t_clip": 0.05, "second_head": True, "rank": 8}
    | {"attention": "xla", "remat": "none", "scan": False, "r_blocks": 0, "dropout": 0.0}
    | {"head_depth": 0, "bottleneck": 0, "positions": "", "channels": 128, "num_blocks": 4}
    | {"channel_multipliers": (2, 2, 2), "attention_resolutions": (16,)}
    | {"norm": "layer", "logit_power": -0.5, "told_guidance": False},
    "objective": {"alpha_start": 1.0, "alpha_end": 0.0, "anneal_from": 0, "anneal_to": 10_000}
    | {"annealing": "sigmoid", "sharpness": 25.0, "derivative_below": 5e-3, "target_clip": 4.0}
    | {"velocity": "head", "split": "uniform", "target_ema": 0.0}
    | {"derivative": "jvp", "derivative_delta": 0.0, "min_gap": 0.0, "interval_factor": 1.0}
    | {"error_of": "velocity", "ramp_steps": 0, "to_data_steps": 0},
    "guidance": {"of_dropped": False, "fade": False},
    "weight": {"of": "sum", "of_interval": 0.0},
    "controls": {"lipschitz": 0.0, "lipschitz_bound": 1.0, "monotone": 0.0, "non_expansive": 0.0},
    "velocity": {"source": "sample", "target": 0.0, "tangent": 0.0, "of_rows": False, "ema": 0.0},
    "perceptual": {"lpips": 0.0, "convnext": 0.0, "max_t": 1.0, "crop_size": 224}
    | {"rows_at_once": 32, "lpips_weights": "", "convnext_weights": ""},
    "times": {"levels": 7, "order": "swap", "min_gap": 0.0, "uniform_share": 0.0},
    "instant_times": {"name": "", "t_mean": -0.4, "t_std": 1.0, "uniform_share": 0.0},
    "coupling": {"name": "independent", "rows": 0},
    "draws": {"omega_max": 1.0, "omega_power": 1.0, "label_drop_window": (0.0, 1.0)}
    | {"omega_min": 1.0, "instant_of_every_row": False, "noise_scale": 1.0},
    "train": {"microbatch": 0},
    "init": {"path": "", "kind": "run", "which": ""},
    "data": {"autoencoder": "sd-vae-ft-mse", "latent_mean": (0.0,), "latent_std": (1 / 0.18215,)}
    | {"copy_to": "", "class_order": "name", "channels": 3, "background": "white"}
    | {"augment": "none"},
    "optim": {"name": "adamw", "momentum": 0.95},
    "ema": {"halflives_kimg": (), "rampup": 0.0, "every_steps": 1},
}
"""What was done before a key was there: the value of a key that a stored config lacks."""
HABITS = ("data.class_order", "data.channels", "ema.rampup")
"""Keys of these whose default does not do what was done before."""
