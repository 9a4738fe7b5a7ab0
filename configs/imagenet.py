"""ImageNet: one row for each published result, with the figures that its paper gives.

Command: python -m mf_jax.main --config=configs/imagenet.py:ROW
Hardware: GPUs or TPUs; `hours` of an H100, reckoned from the FLOPs at 40 % of the bfloat16 peak.
Evaluation: --mode=eval, 50,000 samples.
Table of docs/imagenet.md: python -m configs.imagenet --write
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.default import get_config as defaults
from configs.rows import choose, soflow

IMAGES = 1_281_167
"""Training pictures of ImageNet: an epoch."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A published result.

    Args:
      network: DiT or iMF on latents, pMF on pixels.
      pixels: side of the pictures.
      guidance: (scale, t_min, t_max), in the target of a DiT, chosen when sampling for the others.
      fid: published, at one step and at two, of 50,000 samples; without those that are not.
      millions: of parameters in sampling.
      hours: of an H100.
      ema: the moving average that is scored; "" = the only one.
    """

    network: str
    size: str
    patch: int
    pixels: int
    epochs: int
    batch: int
    objective: str
    guidance: tuple[float, ...]
    fid: tuple[str, ...]
    millions: int
    hours: int
    ema: str = ""

    @property
    def num_steps(self) -> int:
        """Optimisation steps of the run."""
        return self.epochs * IMAGES // self.batch


MF, IMF, PMF, NONE = "meanflow", "improved_meanflow", "pixel_meanflow", ()
WHOLE, LARGE, XLARGE = (2.0, 0.0, 1.0), (2.5, 0.0, 0.8), (2.5, 0.0, 0.75)
ROWS = {
    # MeanFlow, arXiv 2505.13447; the guidance of M/2 is not known for certain
    "b4": Row("DiT", "B", 4, 256, 240, 256, MF, WHOLE, ("11.4",), 131, 11),
    "b2": Row("DiT", "B", 2, 256, 240, 256, MF, WHOLE, ("6.17",), 131, 45),
    "m2": Row("DiT", "M", 2, 256, 240, 256, MF, WHOLE, ("5.01",), 308, 105),
    "l2": Row("DiT", "L", 2, 256, 240, 256, MF, LARGE, ("3.84",), 459, 155),
    "xl2": Row("DiT", "XL", 2, 256, 240, 256, MF, XLARGE, ("3.43", "2.93"), 676, 255),
    "xl2_512": Row("DiT", "XL", 2, 512, 240, 256, MF, XLARGE, NONE, 676, 1020),
    # the multi-step baseline of b2
    "fm_b2": Row("DiT", "B", 2, 256, 240, 256, "flow_matching", NONE, NONE, 131, 30),
    # SoFlow, arXiv 2512.15657; its guidance and weight were not found, here they are MeanFlow's
    "soflow_b2": Row("DiT", "B", 2, 256, 240, 256, "soflow", WHOLE, ("4.85", "4.24"), 131, 45),
    "soflow_m2": Row("DiT", "M", 2, 256, 240, 256, "soflow", WHOLE, ("3.73", "3.42"), 308, 105),
    "soflow_l2": Row("DiT", "L", 2, 256, 240, 256, "soflow", LARGE, ("3.20", "2.90"), 459, 155),
    "soflow_xl2": Row("DiT", "XL", 2, 256, 240, 256, "soflow", XLARGE, ("2.96", "2.66"), 676, 255),
    # alpha-Flow, arXiv 2510.20771
    "alphaflow_xl2": Row(
        "DiT", "XL", 2, 256, 240, 256, "alpha_flow", XLARGE, ("2.95", "2.34"), 676, 255
    ),
    # improved MeanFlow, arXiv 2512.02012
    "imf_b2": Row("iMF", "B", 2, 256, 640, 1024, IMF, (8.0, 0.4, 0.65), ("3.39",), 89, 200),
    "imf_m2": Row("iMF", "M", 2, 256, 640, 1024, IMF, (10.5, 0.4, 0.6), ("2.27",), 174, 345),
    "imf_l2": Row("iMF", "L", 2, 256, 640, 1024, IMF, (10.5, 0.4, 0.6), ("1.86",), 409, 765),
    "imf_xl2": Row(
        "iMF", "XL", 2, 256, 640, 1024, IMF, (8.0, 0.42, 0.62), ("1.72", "1.54"), 610, 1100
    ),
    "imf_xl2_512": Row("iMF", "XL", 2, 512, 640, 1024, IMF, (8.0, 0.42, 0.62), NONE, 610, 4700),
    # pixel MeanFlow, arXiv 2601.22158, whose runs have perceptual terms in the loss
    "pmf_b16": Row(
        "pMF", "B", 16, 256, 320, 1024, PMF, (8.5, 0.1, 0.7), ("3.12",), 118, 140, "2000kimg"
    ),
    "pmf_l16": Row(
        "pMF", "L", 16, 256, 320, 1024, PMF, (7.0, 0.2, 0.7), ("2.52",), 410, 415, "1000kimg"
    ),
    "pmf_h16": Row(
        "pMF", "H", 16, 256, 360, 1024, PMF, (7.0, 0.33, 0.75), ("2.22",), 955, 1020, "1000kimg"
    ),
    "pmf_b32": Row(
        "pMF", "B", 32, 512, 320, 1024, PMF, (6.5, 0.18, 0.82), ("3.70",), 120, 140, "2000kimg"
    ),
    "pmf_l32": Row(
        "pMF", "L", 32, 512, 320, 1024, PMF, (7.5, 0.5, 0.86), ("2.75",), 413, 415, "2000kimg"
    ),
    "pmf_h32": Row(
        "pMF", "H", 32, 512, 360, 1024, PMF, (5.5, 0.31, 0.86), ("2.48",), 958, 1020, "500kimg"
    ),
}
NOTES = {
    "b4": "80 epochs without guidance (`train.num_steps=400365`, `guidance.kappa=0.0`) give 61.06.",
    "xl2": "1000 epochs (`train.num_steps=5004558`) give 2.20 at two steps. The objective of improved "
    "MeanFlow on this network (`objective.name=improved_meanflow`, `objective.velocity=boundary`) gives "
    "2.99.",
    "xl2_512": "No figure is published. 1,024 tokens need more than four times the FLOPs of 256.",
    "fm_b2": "No figure is published. It knows the velocity alone: one step is poor, many are good.",
    "alphaflow_xl2": "Its latents are made by `sd-vae-ft-ema`. The published two steps add noise in "
    "between, which is not done here.",
    "imf_b2": "240 epochs (`train.num_steps=300273`) give 3.82. The published run is in float32.",
    "imf_xl2": "Two steps want omega 4 in [0.36, 0.64]: `eval.steps=(2,)`, `eval.omegas=(4.0,)`, "
    "`eval.intervals=((0.36,0.64),)`.",
    "imf_xl2_512": "No figure is published. Latents are taken to have the same mean and spread.",
    "pmf_b16": "Published with LPIPS and ConvNeXt-V2 terms in the loss, as all pMF rows. Without "
    "them, and without a bottleneck, the paper has 8.71, and 9.56 after 160 epochs. The published run is in "
    "float32, and its averages ramp up.",
    "pmf_h16": "The published run draws noise twice as strong, at times that lean less to noise, and a "
    "tenth of its times uniformly. The distribution of signal to noise is nearly the same.",
}


def get_config(row: str = "") -> ConfigDict:
    """Return the config of a row."""
    chosen = choose("configs/imagenet.py", row, ROWS)
    config = defaults()
    for settings in (_common(chosen), NETWORKS[chosen.network](chosen), _method(chosen)):
        config.update_from_flattened_dict(settings)
    return config


def _common(row: Row) -> dict[str, Any]:
    remat = {"B": "none", "M": "dots", "L": "dots", "XL": "block", "H": "block"}
    return {
        "data.image_size": row.pixels,
        "data.flip": True,
        "model.size": row.size,
        "model.patch_size": row.patch,
        "model.dtype": "bfloat16",
        "model.remat": remat[row.size],
        "model.scan": row.size != "B",
        "train.num_steps": row.num_steps,
        "train.batch_size": row.batch,
        "optim.lr": 1e-4,
        "log.sample_every_steps": 10_000,
        "checkpoint.every_steps": 10_000,
        "eval.num_samples": 50_000,
        "eval.steps": (1, 2),
        "eval.references": (f"data/imagenet{row.pixels}_reference.npz",),
    }


def _on_latents(row: Row) -> dict[str, Any]:
    return {
        "data.name": "latents",
        "data.path": f"data/imagenet{row.pixels}_latents",
        "eval.batch_size": 500 * 256 // row.pixels,
    }


def _dit(row: Row) -> dict[str, Any]:
    """Return settings of the network of MeanFlow, whose target is guided: scale = omega / (1 - kappa)."""
    omega, kappa = {2.0: (1.0, 0.5), 2.5: (0.2, 0.92)}[row.guidance[0]] if row.guidance else (1.0, 0.0)
    t_end = row.guidance[2] if row.guidance else 1.0
    return _on_latents(row) | {
        "guidance.omega": omega,
        "guidance.kappa": kappa,
        "guidance.t_end": t_end,
    }


def _told_guidance(row: Row) -> dict[str, Any]:
    """Return settings of networks that are told guidance, which is drawn in training."""
    omega, *interval = row.guidance
    return {
        "model.name": "in_context_dit",
        "draws.instant_share": 0.5,
        "draws.omega_max": 8.0,
        "log.sample_every_steps": 5_000,
        "checkpoint.every_steps": 5_000,
        "sample.guidance": row.guidance,
        "eval.steps": (1,),
        "eval.omegas": (omega,),
        "eval.intervals": (tuple(interval),),
    }


def _imf(row: Row) -> dict[str, Any]:
    return _on_latents(row) | _told_guidance(row) | {
        "data.latent_mean": (0.86488, -0.27787, 0.21617, 0.37384),
        "data.latent_std": (4.85504, 5.31922, 3.93725, 3.98700),
        "model.remat": {"B": "none", "M": "dots"}.get(row.size, "block"),
        "optim.warmup_steps": 10 * IMAGES // row.batch,
    }


def _pmf(row: Row) -> dict[str, Any]:
    # the paper doubles the noise at 512 pixels: logits of times log 2 higher have the same signal to noise
    mean = 0.8 if row.pixels == 256 else 1.49
    return _told_guidance(row) | {
        "data.name": "image_folder",
        "data.path": "data/imagenet/train",
        "data.held_out_share": 1e-6,  # a picture of each class: evaluation has its reference
        "model.size": f"pixel_{row.size}",
        "model.prediction": "data",
        "draws.omega_power": 1.0 if row.size == "B" else 2.0,
        "times.t_mean": mean,
        "times.t_std": 0.8,
        "times.r_mean": mean,
        "times.r_std": 0.8,
        "optim.name": "muon",
        "optim.lr": 1e-3,
        "ema.decays": (),
        "ema.halflives_kimg": (500.0, 1000.0, 2000.0),
        "sample.ema": row.ema,
        "eval.emas": (row.ema,),
    }


NETWORKS = {"DiT": _dit, "iMF": _imf, "pMF": _pmf}


def _method(row: Row) -> dict[str, Any]:
    special = {
        "soflow": soflow(row.num_steps),
        "flow_matching": {
            "draws.instant_share": 1.0,
            "sample.steps": 64,
            "eval.steps": (1, 4, 16, 64, 250),
        },
        "alpha_flow": {
            "data.autoencoder": "sd-vae-ft-ema",
            "data.path": "data/imagenet256_latents_ema",
            "objective.anneal_from": 600_000,
            "objective.anneal_to": 1_000_000,
            "draws.instant_share": 0.5,
            "optim.clip_norm": 16.0,
            "eval.labels": "random",
        },
    }
    return {"objective.name": row.objective} | special.get(row.objective, {})


def table() -> str:
    """Return the rows and their notes as Markdown."""
    heads = "row|network|pixels|parameters|epochs|batch|FID, 1 step|2 steps|guidance|H100 hours"
    lines = [f"| {heads.replace('|', ' | ')} |", "|---" * 10 + "|"]
    for name, row in ROWS.items():
        one, two = (*row.fid, "", "")[:2]
        how = "trained" if row.network == "DiT" else "chosen"
        guidance = "{:g} in [{:g}, {:g}], {}".format(*row.guidance, how) if row.guidance else ""
        network = f"{row.network}-{row.size}/{row.patch}"
        cells = (f"`{name}`", network, row.pixels, f"{row.millions}M", row.epochs, row.batch)
        lines.append("| {} |".format(" | ".join(map(str, (*cells, one, two, guidance, f"{row.hours:,}")))))
    return "\n".join([*lines, "", *(f"- `{name}`: {note}" for name, note in NOTES.items())])


def page(text: str) -> str:
    """Return the text of docs/imagenet.md with the table of today between its two marks."""
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}"


MARKS = ("<!-- written by python -m configs.imagenet --write -->", "<!-- end of the table -->")

if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        path = Path(__file__).parent.parent / "docs" / "imagenet.md"
        path.write_text(page(path.read_text()))
    else:
        print(table())
