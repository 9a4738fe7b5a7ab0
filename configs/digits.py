"""MeanFlow on the 1,797 real 8x8 digits of scikit-learn, by class, unguided: the main job.

Hardware: 2 CPU cores; training takes under 3 minutes. Expected at one step: 97 % of the samples in
their class. Times lean towards long intervals, which a single step needs most. Optimal transport
deals the noise of a class, and the network predicts the picture: docs/recipes.md has what was
tried.
Command: bash launch/local.sh
Another method on the same data, minutes: bash launch/local.sh --config=configs/digits.py:shortcut
"""

from configs.default import get_config as defaults
from configs.rows import join, shortcut, soflow, table

STEPS = 1800
SHARED = dict(
    model=dict(prediction="data"),
    coupling=dict(name="optimal_transport"),
    times=dict(t_mean=0.4, t_std=1.2, r_mean=-2.0, r_std=1.4),
    draws=dict(instant_share=0.5, label_drop_share=0.0),
    weight=dict(p=0.5),
    train=dict(num_steps=STEPS),
    optim=dict(lr=4e-3, warmup_steps=100, schedule="cosine"),
    ema=dict(decays=(0.995,)),
    log=dict(sample_every_steps=500),
    eval=dict(labels="balanced"),  # as the digits are, but for a few
)
# A quarter of an hour: 20 tokens of class, guidance and time stand before the 4 patches.
IN_CONTEXT = dict(
    model=dict(name="in_context_dit"), train=dict(num_steps=1500), optim=dict(lr=2e-3)
)
ROWS = {
    "": {},
    # the multi-step baseline: it knows the velocity alone, so one step is poor and many are good
    "flow_matching": dict(
        objective=dict(name="flow_matching"),
        draws=dict(instant_share=1.0),
        sample=dict(steps=16),
        eval=dict(steps=(1, 2, 4, 8, 16)),
    ),
    # arXiv 2303.01469: MeanFlow whose intervals all end at the data; one step is all that it learns
    "consistency": dict(times=dict(name="consistency"), eval=dict(steps=(1,))),
    # arXiv 2512.02012: a second head for the velocity, guidance chosen when sampling
    "improved_meanflow": IN_CONTEXT
    | dict(
        objective=dict(name="improved_meanflow"),
        draws=dict(label_drop_share=0.1, omega_max=4.0),
    ),
    # arXiv 2601.22158: the network predicts the picture; times lean to noise, as published
    "pixel_meanflow": IN_CONTEXT
    | dict(
        objective=dict(name="pixel_meanflow"),
        times=dict(t_mean=0.8, t_std=0.8, r_mean=0.8, r_std=0.8),
    ),
    # arXiv 2512.11831 (ESC): a fifth of the rows take the batch's velocity at z. du/dt comes in
    # slowly, and at first all intervals end at the data.
    "esc": dict(
        coupling=dict(name="independent"),
        velocity=dict(source="batch", target=0.2, tangent=0.2, of_rows=True),
        objective=dict(ramp_steps=STEPS // 4, to_data_steps=STEPS),
    ),
    # arXiv 2605.09235: du/dt mostly along the velocity of the batch, which varies less
    "variance_reduced": dict(
        coupling=dict(name="independent"), velocity=dict(source="batch", tangent=0.94)
    ),
    # arXiv 2506.14603 (AYF): the velocity of a flow-matching run, which --config.init.path names
    "ayf": dict(
        velocity=dict(source="average", ema=1.0, target=1.0, tangent=1.0),
        draws=dict(instant_share=0.0),
        weight=dict(p=0.0, of_interval=1.0),
    ),
    # arXiv 2602.02571 (EMF): no JVP, but one more forward of the rows with r < t
    "emf": dict(objective=dict(derivative="backward")),
    # MF-RAE and TiM: no JVP, but two more forwards of the rows with r < t
    "mf_rae": dict(objective=dict(derivative="central")),
    # arXiv 2510.20771: from flow matching to MeanFlow; until half of the run alpha is near 1
    "alpha_flow": dict(objective=dict(name="alpha_flow", anneal_to=STEPS)),
    # arXiv 2512.15657: no JVP is computed
    "soflow": soflow(STEPS),
    # arXiv 2507.16884: an interval is the sum of its two parts, split anywhere. An adaptive weight
    # (p > 0) favours rows of small error: here the rows that look at no data.
    "split_meanflow": dict(objective=dict(name="split_meanflow"), weight=dict(p=0.0)),
    # arXiv 2410.12557: a step is two of half its size, down to 1/32 of the way, which is the flow's
    "shortcut": join(shortcut(levels=5), dict(objective=dict(target_ema=0.99))),
    # arXiv 2511.19797: the end of a step moves with the flow. A step takes 1.4 times MeanFlow's
    # FLOPs. Times are uniform: the identity in r must hold all the way from t down.
    "terminal_velocity": dict(
        objective=dict(name="terminal_velocity", target_ema=0.99),
        times=dict(name="uniform"),
        weight=dict(p=0.0),
    ),
}
get_config = table("configs/digits.py", defaults, SHARED, ROWS)
