"""ImageNet: one row for each published result, with the figures that its paper gives.

Command: python -m mf_jax.main --config=configs/imagenet.py:ROW
Hardware: GPUs or TPUs; hours of an H100, reckoned from the FLOPs at 40 % of the bfloat16 peak.
Evaluation: --mode=eval. Table of docs/imagenet.md: python -m configs.imagenet --write
"""

import dataclasses
import sys
import textwrap
from pathlib import Path

from ml_collections import ConfigDict

from configs.default import get_config as defaults
from configs.rows import choose, shortcut, soflow_as_published

IMAGES = 1_281_167
"""Training pictures of ImageNet: an epoch."""
LATENT_MEAN = (0.86488, -0.27787, 0.21617, 0.37384)
LATENT_STD = (4.85504, 5.31922, 3.93725, 3.98700)


@dataclasses.dataclass(frozen=True)
class Row:
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
NOTES = {
    "b4": "80 epochs without guidance (train.num_steps=400365, guidance.kappa=0.0) give 61.06.",
    "xl2": "1000 epochs (train.num_steps=5004558) give 2.20 at two steps. With "
    "objective.name=improved_meanflow and objective.velocity=boundary it is 2.99.",
    "xl2_512": "No figure is published.",
    "fm_b2": "No figure is published. It knows the velocity alone: it needs many steps.",
    "alphaflow_xl2": "Two steps add noise in between, as published, here at t = 0.5.",
    "shortcut_xl2": "The published code adds a 100,000th of the noise to the data, not done here.",
    "tvm_xl2": "The length of the published run was not found. Its matrices start with norm 1, "
    "which is not done here.",
    "imf_b2": "240 epochs (train.num_steps=300273) give 3.82. The published run is in float32.",
    "imf_xl2": "Two steps want omega 4 in [0.36, 0.64] (eval.omegas, eval.intervals).",
    "imf_xl2_512": "No figure is published. Latents are taken to have the same mean and spread.",
    "pmf_b16": "All pMF rows have the published LPIPS and ConvNeXt-V2 terms. They take 184 GFLOP "
    "for each picture with t below perceptual.max_t; perceptual.lpips=0.0 and convnext=0.0 leave "
    "them out. Without them and a bottleneck the paper has 8.71, and 9.56 after 160 epochs.",
    "pmf_h16": "Of both H rows, the paper says 360 epochs, the published code 320. The limit of t "
    "is what the published file means: its code reads the limit under another name.",
}


def get_config(row: str = "") -> ConfigDict:
    """Return the config of a row."""
    chosen = choose("configs/imagenet.py", row, ROWS)
    kind, size = chosen.network.split("/")[0].split("-")
    config = defaults()
    _set_common(config, chosen, size)
    {"DiT": _set_dit, "iMF": _set_imf, "pMF": _set_pmf}[kind](config, chosen, size)
    config.objective.name = chosen.objective
    own = {
        "soflow": _set_soflow,
        "alpha_flow": _set_alpha_flow,
        "shortcut": _set_shortcut,
        "terminal_velocity": _set_terminal_velocity,
    }
    if chosen.objective in own:
        own[chosen.objective](config)
    if chosen.objective == "flow_matching":
        config.draws.instant_share, config.sample.steps = 1.0, 64
        config.eval.steps = (1, 4, 16, 64, 250)
    return config


def _set_common(config: ConfigDict, row: Row, size: str) -> None:
    config.data.image_size, config.data.flip = row.pixels, True
    config.data.name, config.data.path = "latents", f"data/imagenet{row.pixels}_latents"
    config.model.size, config.model.patch_size = size, int(row.network.split("/")[1])
    config.model.dtype, config.model.scan = "bfloat16", size != "B"
    config.model.remat = {"B": "none", "M": "dots", "L": "dots"}.get(size, "block")
    config.train.num_steps = row.epochs * IMAGES // row.batch
    config.train.batch_size, config.optim.lr = row.batch, 1e-4
    config.ema.rampup = 0.0
    config.log.sample_every_steps = config.checkpoint.every_steps = 10_000
    config.eval.num_samples, config.eval.steps = 50_000, (1, 2)
    config.eval.references = (f"data/imagenet{row.pixels}_reference.npz",)
    config.eval.batch_size = 500 * 256 // row.pixels


def _set_dit(config: ConfigDict, row: Row, size: str) -> None:
    if row.guidance:  # in the target: scale = omega / (1 - kappa)
        scale, _, config.guidance.t_max = row.guidance
        shares = {1.5: (1.5, 0.0), 2.0: (1.0, 0.5), 2.5: (0.2, 0.92), 3.0: (0.75, 0.75)}
        config.guidance.omega, config.guidance.kappa = shares[scale]


def _set_soflow(config: ConfigDict) -> None:
    config.update_from_flattened_dict(soflow_as_published(config.train.num_steps))
    config.guidance.fade, config.draws.label_drop = True, "any_row"
    config.times.t_mean, config.times.t_std = 0.2, 0.8
    config.times.r_mean, config.times.r_std = -1.0, 0.8
    config.instant_times.name, config.instant_times.t_mean = "logit_normal", -0.2
    config.optim.b2 = 0.99


def _set_alpha_flow(config: ConfigDict) -> None:
    """Set what alpha-Flow's published code does."""
    config.data.autoencoder, config.data.path = "sd-vae-ft-ema", "data/imagenet256_latents_ema"
    config.model.time_conditioning = "t,r"
    config.objective.anneal_from, config.objective.anneal_to = 600_000, 1_000_000
    config.objective.error_of, config.weight.of, config.weight.c = "step", "mean", 1e-3
    config.guidance.of_dropped, config.draws.label_drop = True, "any_row"
    config.draws.label_drop_window = config.guidance.t_min, config.guidance.t_max
    config.instant_times.name = "logit_normal"
    config.draws.instant_share, config.optim.clip_norm = 0.5, 16.0
    config.eval.labels, config.sample.renoise, config.eval.renoise = "random", True, True


def _set_shortcut(config: ConfigDict) -> None:
    """Set what the published code of Shortcut models does."""
    config.update_from_flattened_dict(shortcut(levels=7))
    config.model.logit_power, config.objective.target_ema = -1.0, 0.999
    config.draws.label_drop_share = 0.1 * config.draws.instant_share
    config.train.num_steps = 810_000
    config.optim.b2, config.optim.weight_decay = 0.999, 0.1
    config.ema.decays, config.eval.steps = (0.999,), (1, 4, 128)


def _set_terminal_velocity(config: ConfigDict) -> None:
    """Set what the published code of terminal velocity matching does."""
    config.data.autoencoder, config.data.path = "sd-vae-ft-ema", "data/imagenet256_latents_ema"
    config.data.latent_mean, config.data.latent_std = LATENT_MEAN, LATENT_STD
    config.data.flip = False
    config.model.norm, config.model.told_guidance, config.model.num_heads = "rms", True, 18
    config.objective.target_ema, config.weight.p, config.weight.of = 0.99, 0.0, "mean"
    config.times.name, config.instant_times.name = "gap", "logit_normal"
    config.times.t_mean = -0.8
    config.draws.instant_of_every_row, config.draws.label_drop = True, "any_row"
    scale = config.guidance.omega / (1 - config.guidance.kappa)  # told, so drawn, and always this
    config.draws.omega_min = config.draws.omega_max = scale
    config.guidance.omega, config.guidance.kappa = 1.0, 0.0
    config.sample.guidance, config.eval.omegas = (scale, 0.0, 1.0), (scale,)


def _set_told(config: ConfigDict, row: Row) -> None:
    """Set what networks need that are told guidance, which training draws."""
    omega, *interval = row.guidance
    config.model.name = "in_context_dit"
    config.draws.instant_share, config.draws.omega_max = 0.5, 8.0
    config.log.sample_every_steps = config.checkpoint.every_steps = 5_000
    config.sample.guidance, config.eval.steps = row.guidance, (1,)
    config.eval.omegas, config.eval.intervals = (omega,), (tuple(interval),)


def _set_imf(config: ConfigDict, row: Row, size: str) -> None:
    _set_told(config, row)
    config.data.latent_mean, config.data.latent_std = LATENT_MEAN, LATENT_STD
    config.optim.warmup_steps = 10 * IMAGES // row.batch
    if size == "L":
        config.model.remat = "block"


def _set_pmf(config: ConfigDict, row: Row, size: str) -> None:
    _set_told(config, row)
    config.data.name, config.data.path = "image_folder", "data/imagenet/train"
    config.data.held_out_share = 1e-6  # a picture of each class: evaluation has its reference
    config.model.size, config.model.prediction = f"pixel_{size}", "data"
    config.perceptual.lpips, config.perceptual.convnext = 0.4, 0.1
    config.draws.noise_scale, mean, max_t, power, uniform = PIXELS[row.network.split("-")[1]]
    config.perceptual.max_t, config.draws.omega_power = max_t, power
    config.times.r_mean, config.times.r_std = mean, 0.8
    config.instant_times.name = "logit_normal"
    for times in (config.times, config.instant_times):
        times.t_mean, times.t_std, times.uniform_share = mean, 0.8, uniform
    config.optim.name, config.optim.lr = "muon", 1e-3
    config.ema.decays, config.ema.halflives_kimg = (), (500.0, 1000.0, 2000.0)
    config.ema.rampup = 0.05  # as the published code does
    config.sample.ema, config.eval.emas = f"{row.kimg}kimg", (f"{row.kimg}kimg",)
    config.eval.batch_size = 500


def table() -> str:
    """Return the rows and their notes as Markdown."""
    heads = (
        "row, network, pixels, parameters, epochs, batch, FID at 1 step, at 2, guidance, H100 hours"
    )
    lines = [heads.split(", "), ["---"] * 10]
    for name, row in ROWS.items():
        origin = "trained" if row.network.startswith("DiT") else "chosen"
        guidance = "{:g} in [{:g}, {:g}], {}".format(*row.guidance, origin) if row.guidance else ""
        run = (f"{row.millions}M", row.epochs, row.batch)
        scores = (row.one, row.two, guidance, f"{row.hours:,}")
        lines.append([f"`{name}`", row.network, row.pixels, *run, *scores])
    notes = [
        textwrap.fill(f"- `{name}`: {NOTES[name]}", 100, subsequent_indent="  ") for name in NOTES
    ]
    return "\n".join([*(f"| {' | '.join(map(str, line))} |" for line in lines), "", *notes])


def page(text: str) -> str:
    """Return the text of docs/imagenet.md with the table between its two marks written anew."""
    before, start, rest = text.partition("<!-- python -m configs.imagenet --write -->\n")
    _, end, after = rest.partition("\n<!-- end -->")
    return before + start + table() + end + after


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    docs = Path(__file__).parent.parent / "docs" / "imagenet.md"
    docs.write_text(page(docs.read_text()))
