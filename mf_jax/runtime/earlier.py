"""Configs of earlier versions: keys that were renamed, and keys that they lack."""

RENAMED = {"guidance.t_start": "guidance.t_min", "guidance.t_end": "guidance.t_max"}
RENAMED |= {"init.from": "init.path", "log.every_steps": "train.log_every_steps"}
"""Keys of a config.json that an earlier version has written."""
_ALWAYS = (
    "seed data.name data.path data.dataset data.split_train data.split_held_out data.toy data.flip "
    "data.image_size data.held_out_share model.name model.size model.patch_size model.depth "
    "model.width model.num_heads model.time_conditioning model.dtype objective.name "
    "objective.tangent guidance.omega guidance.kappa guidance.t_min guidance.t_max weight.p "
    "weight.c times.name times.t_mean times.t_std times.r_mean times.r_std draws.label_drop "
    "draws.label_drop_share draws.instant_share train.num_steps train.batch_size "
    "train.log_every_steps optim.lr optim.schedule optim.warmup_steps optim.b1 optim.b2 "
    "optim.weight_decay optim.clip_norm ema.decays"
)
ALWAYS = frozenset(_ALWAYS.split())
"""Keys that every version has stored."""
BEFORE = {"data.class_order": "name", "data.channels": 3, "ema.rampup": 0.0, "init.kind": "run"}
BEFORE |= {"perceptual.lpips_weights": "", "perceptual.convnext_weights": ""}
"""What was done before a key was there, where its default does something else."""
