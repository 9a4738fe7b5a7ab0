"""ImageNet: one row for each published result, with the figures that its paper gives.

Command: python -m mf_jax.main --config=configs/imagenet.py:ROW
Hardware: GPUs or TPUs; hours of an H100, reckoned from the FLOPs at 40 % of the bfloat16 peak.
Evaluation: --mode=eval. Table of docs/imagenet.md: python -m configs.imagenet --write
"""

import sys
from pathlib import Path
from typing import NamedTuple

from configs.default import get_config as defaults
from configs.rows import Settings, join, shortcut, soflow_as_published, table

IMAGES = 1_281_167
"""Training pictures of ImageNet: an epoch."""
SCALE = dict(
    latent_mean=(0.86488, -0.27787, 0.21617, 0.37384),
    latent_std=(4.85504, 5.31922, 3.93725, 3.98700),
)


class Row(NamedTuple):
    """A published result.

    Args:
      network: kind-size/patch; DiT and iMF are on latents, pMF is on pixels.
      guidance: (scale, t_min, t_max), in a DiT's target, chosen when sampling for the others.
      one, two: published FID at one step and at two; "" = none.
      millions: of parameters in sampling.
      hours: of an H100.
      kimg: half-life of the moving average that is scored; 0 = the only average.
    """

    network: str
    pixels: int
    epochs: int
    batch: int
    objective: str
    guidance: tuple[float, ...]
    one: str
    two: str
    millions: int
    hours: int
    kimg: int = 0


MF, IMF, PMF = "meanflow", "improved_meanflow", "pixel_meanflow"
WHOLE, LARGE, XLARGE = (2.0, 0.0, 1.0), (2.5, 0.0, 0.8), (2.5, 0.0, 0.75)
FADING, HALVES = (3.0, 0.0, 0.8), (1.5, 0.0, 1.0)
ROWS = {
    # MeanFlow, arXiv 2505.13447; the guidance of M/2 is not known for certain
    "b4": Row("DiT-B/4", 256, 240, 256, MF, WHOLE, "11.4", "", 131, 11),
    "b2": Row("DiT-B/2", 256, 240, 256, MF, WHOLE, "6.17", "", 131, 45),
    "m2": Row("DiT-M/2", 256, 240, 256, MF, WHOLE, "5.01", "", 308, 105),
    "l2": Row("DiT-L/2", 256, 240, 256, MF, LARGE, "3.84", "", 459, 155),
    "xl2": Row("DiT-XL/2", 256, 240, 256, MF, XLARGE, "3.43", "2.93", 676, 255),
    "xl2_512": Row("DiT-XL/2", 512, 240, 256, MF, XLARGE, "", "", 676, 1020),
    "fm_b2": Row("DiT-B/2", 256, 240, 256, "flow_matching", (), "", "", 131, 30),
    # SoFlow, arXiv 2512.15657; as in its published code, which the paper does not tell whole
    "soflow_b2": Row("DiT-B/2", 256, 240, 256, "soflow", FADING, "4.85", "4.24", 131, 45),
    "soflow_m2": Row("DiT-M/2", 256, 240, 256, "soflow", FADING, "3.73", "3.42", 308, 105),
    "soflow_l2": Row("DiT-L/2", 256, 240, 256, "soflow", FADING, "3.20", "2.90", 459, 155),
    "soflow_xl2": Row("DiT-XL/2", 256, 240, 256, "soflow", FADING, "2.96", "2.66", 676, 255),
    # alpha-Flow, arXiv 2510.20771
    "alphaflow_xl2": Row("DiT-XL/2", 256, 240, 256, "alpha_flow", XLARGE, "2.95", "2.34", 676, 255),
    # Shortcut models, arXiv 2410.12557, and terminal velocity matching, arXiv 2511.19797
    "shortcut_xl2": Row("DiT-XL/2", 256, 162, 256, "shortcut", HALVES, "10.60", "", 676, 135),
    "tvm_xl2": Row(
        "DiT-XL/2", 256, 240, 2048, "terminal_velocity", WHOLE, "3.29", "2.80", 678, 625
    ),
    # improved MeanFlow, arXiv 2512.02012
    "imf_b2": Row("iMF-B/2", 256, 640, 1024, IMF, (8.0, 0.4, 0.65), "3.39", "", 89, 200),
    "imf_m2": Row("iMF-M/2", 256, 640, 1024, IMF, (10.5, 0.4, 0.6), "2.27", "", 174, 345),
    "imf_l2": Row("iMF-L/2", 256, 640, 1024, IMF, (10.5, 0.4, 0.6), "1.86", "", 409, 765),
    "imf_xl2": Row("iMF-XL/2", 256, 640, 1024, IMF, (8.0, 0.42, 0.62), "1.72", "1.54", 610, 1100),
    "imf_xl2_512": Row("iMF-XL/2", 512, 640, 1024, IMF, (8.0, 0.42, 0.62), "", "", 610, 4700),
    # pixel MeanFlow, arXiv 2601.22158
    "pmf_b16": Row("pMF-B/16", 256, 320, 1024, PMF, (8.5, 0.1, 0.7), "3.12", "", 118, 175, 2000),
    "pmf_l16": Row("pMF-L/16", 256, 320, 1024, PMF, (7.0, 0.2, 0.7), "2.52", "", 410, 450, 1000),
    "pmf_h16": Row("pMF-H/16", 256, 320, 1024, PMF, (7.0, 0.2, 0.6), "2.22", "", 955, 940, 1000),
    "pmf_b32": Row("pMF-B/32", 512, 320, 1024, PMF, (6.5, 0.1, 0.7), "3.70", "", 120, 175, 2000),
    "pmf_l32": Row("pMF-L/32", 512, 320, 1024, PMF, (7.5, 0.2, 0.6), "2.75", "", 413, 445, 2000),
    "pmf_h32": Row("pMF-H/32", 512, 320, 1024, PMF, (5.5, 0.1, 0.6), "2.48", "", 958, 940, 500),
}
PIXELS = {
    "B/16": (1.0, 0.8, 0.8, 1.0, 0.0),
    "L/16": (1.0, 0.8, 0.8, 2.0, 0.0),
    "H/16": (2.0, 0.0, 0.6, 1.0, 0.1),
    "B/32": (2.0, 0.8, 0.8, 1.0, 0.0),
    "L/32": (4.0, 0.0, 0.6, 1.0, 0.0),
    "H/32": (4.0, 0.0, 0.6, 1.0, 0.1),
}
"""Of a pMF: scale of the noise, mean of logit t, limit of t for the perceptual terms, power of the
density of omega, and share of the rows with uniform times."""
OTHER_LATENTS = dict(autoencoder="sd-vae-ft-ema", path="data/imagenet256_latents_ema")
METHODS = {
    "flow_matching": dict(
        draws=dict(instant_share=1.0),
        sample=dict(steps=64),
        eval=dict(steps=(1, 4, 16, 64, 250)),
    ),
    "soflow": join(
        soflow_as_published(240 * IMAGES // 256),
        dict(
            guidance=dict(fade=True),
            draws=dict(label_drop="any_row"),
            times=dict(t_mean=0.2, t_std=0.8, r_mean=-1.0, r_std=0.8),
            instant_times=dict(name="logit_normal", t_mean=-0.2),
            optim=dict(b2=0.99),
        ),
    ),
    # as the published code does, as in the next two
    "alpha_flow": dict(
        data=OTHER_LATENTS,
        model=dict(time_conditioning="t,r"),
        objective=dict(anneal_from=600_000, anneal_to=1_000_000, error_of="step"),
        weight=dict(of="mean", c=1e-3),
        guidance=dict(of_dropped=True),
        instant_times=dict(name="logit_normal"),
        draws=dict(instant_share=0.5, label_drop="any_row", label_drop_window=XLARGE[1:]),
        optim=dict(clip_norm=16.0),
        sample=dict(renoise=True),
        eval=dict(labels="random", renoise=True),
    ),
    "shortcut": join(
        shortcut(levels=7),
        dict(
            model=dict(logit_power=-1.0),
            objective=dict(target_ema=0.999),
            draws=dict(label_drop_share=0.1 * 0.875),  # of the rows that have labels to drop
            train=dict(num_steps=810_000),
            optim=dict(b2=0.999, weight_decay=0.1),
            ema=dict(decays=(0.999,)),
            eval=dict(steps=(1, 4, 128)),
        ),
    ),
    "terminal_velocity": dict(
        data=OTHER_LATENTS | SCALE | dict(flip=False),
        model=dict(norm="rms", told_guidance=True, num_heads=18),
        objective=dict(target_ema=0.99),
        weight=dict(p=0.0, of="mean"),
        times=dict(name="gap", t_mean=-0.8),
        instant_times=dict(name="logit_normal"),
        # guidance is told, so drawn, and always this
        draws=dict(instant_of_every_row=True, label_drop="any_row", omega_min=2.0, omega_max=2.0),
        guidance=dict(omega=1.0, kappa=0.0),
        sample=dict(guidance=WHOLE),
        eval=dict(omegas=WHOLE[:1]),
    ),
}
"""Of the objectives, or of a method that sets one."""


def _common(row: Row, size: str) -> Settings:
    name = f"data/imagenet{row.pixels}"
    remat = {"B": "none", "M": "dots", "L": "dots"}.get(size, "block")
    return dict(
        data=dict(name="latents", path=f"{name}_latents", image_size=row.pixels, flip=True),
        model=dict(size=size, patch_size=int(row.network.split("/")[1]), remat=remat)
        | dict(dtype="bfloat16", scan=size != "B"),
        train=dict(num_steps=row.epochs * IMAGES // row.batch, batch_size=row.batch),
        optim=dict(lr=1e-4),
        ema=dict(rampup=0.0),
        log=dict(sample_every_steps=10_000),
        checkpoint=dict(every_steps=10_000),
        eval=dict(num_samples=50_000, steps=(1, 2), batch_size=500 * 256 // row.pixels)
        | dict(references=(f"{name}_reference.npz",)),
    )


def _dit(row: Row, size: str) -> Settings:
    if not row.guidance:
        return {}
    scale, _, t_max = row.guidance  # in the target: scale = omega / (1 - kappa)
    shares = {1.5: (1.5, 0.0), 2.0: (1.0, 0.5), 2.5: (0.2, 0.92), 3.0: (0.75, 0.75)}
    omega, kappa = shares[scale]
    return dict(guidance=dict(omega=omega, kappa=kappa, t_max=t_max))


def _told(row: Row) -> Settings:
    """Return what networks need that are told guidance, which training draws."""
    omega, *interval = row.guidance
    return dict(
        model=dict(name="in_context_dit"),
        draws=dict(instant_share=0.5, omega_max=8.0),
        log=dict(sample_every_steps=5_000),
        checkpoint=dict(every_steps=5_000),
        sample=dict(guidance=row.guidance),
        eval=dict(steps=(1,), omegas=(omega,), intervals=(tuple(interval),)),
    )


def _imf(row: Row, size: str) -> Settings:
    more = dict(model=dict(remat="block")) if size == "L" else {}
    warmup = dict(optim=dict(warmup_steps=10 * IMAGES // row.batch))
    return join(_told(row), dict(data=SCALE), warmup, more)


def _pmf(row: Row, size: str) -> Settings:
    noise_scale, mean, max_t, power, uniform = PIXELS[row.network.split("-")[1]]
    times = dict(t_mean=mean, t_std=0.8, uniform_share=uniform)
    own = dict(
        # a picture of each class is held out: evaluation has its reference
        data=dict(name="image_folder", path="data/imagenet/train", held_out_share=1e-6),
        model=dict(size=f"pixel_{size}", prediction="data"),
        perceptual=dict(lpips=0.4, convnext=0.1, max_t=max_t),
        draws=dict(noise_scale=noise_scale, omega_power=power),
        times=dict(r_mean=mean, r_std=0.8, **times),
        instant_times=dict(name="logit_normal", **times),
        optim=dict(name="muon", lr=1e-3),
        ema=dict(decays=(), halflives_kimg=(500.0, 1000.0, 2000.0), rampup=0.05),  # as published
        sample=dict(ema=f"{row.kimg}kimg"),
        eval=dict(emas=(f"{row.kimg}kimg",), batch_size=500),
    )
    return join(_told(row), own)


def _settings(row: Row) -> Settings:
    kind, size = row.network.split("/")[0].split("-")
    own = {"DiT": _dit, "iMF": _imf, "pMF": _pmf}[kind](row, size)
    objective = dict(objective=dict(name=row.objective.replace("soflow", "alpha_flow")))
    return join(_common(row, size), own, objective, METHODS.get(row.objective, {}))


_ROWS = {name: _settings(row) for name, row in ROWS.items()}
get_config = table("configs/imagenet.py", defaults, {}, _ROWS)


def page(text: str) -> str:
    """Return the text of docs/imagenet.md with the table between its two marks written anew."""
    heads = ("row", "network", "pixels", "parameters", "epochs", "batch")
    lines = [[*heads, "FID at 1 step", "at 2", "guidance", "H100 hours"], ["---"] * 10]
    for name, row in ROWS.items():
        origin = "trained" if row.network.startswith("DiT") else "chosen"
        guidance = "{:g} in [{:g}, {:g}], {}".format(*row.guidance, origin) if row.guidance else ""
        run = row.network, row.pixels, f"{row.millions}M", row.epochs, row.batch
        lines.append([f"`{name}`", *run, row.one, row.two, guidance, f"{row.hours:,}"])
    before, start, rest = text.partition("<!-- python -m configs.imagenet --write -->\n")
    rows = "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
    return before + start + rows + "".join(rest.partition("<!-- end -->")[1:])


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    docs = Path(__file__).parent.parent / "docs" / "imagenet.md"
    docs.write_text(page(docs.read_text()))
