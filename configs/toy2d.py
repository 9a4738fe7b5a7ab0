"""MeanFlow on 2-D points: two moons; data.toy names four more, the checkerboard is the hardest.

Hardware: 2 CPU cores, under 2 minutes. Expected: one-step samples on both moons, see scatter.png.
Command: bash launch/local.sh --config=configs/toy2d.py
"""

from configs.default import get_config as defaults
from configs.rows import table

SETTINGS = dict(
    data=dict(name="toy2d", toy="two_moons"),
    model=dict(name="mlp", depth=3, width=128),
    weight=dict(p=0.25),
    times=dict(name="uniform"),
    draws=dict(instant_share=0.5, label_drop_share=0.0),
    train=dict(num_steps=2500, batch_size=512),
    optim=dict(lr=3e-3, schedule="cosine"),
    ema=dict(decays=(0.995,)),
    log=dict(sample_every_steps=500),
    sample=dict(num=5000),
    eval=dict(num_samples=5000),
)
get_config = table("configs/toy2d.py", defaults, SETTINGS, {"": {}})
