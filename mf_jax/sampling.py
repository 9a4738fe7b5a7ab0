"""--mode=sample: samples.npz in the convention of the field's evaluators, and pictures."""

import io

import numpy as np
from etils.epath import Path
from jaxtyping import Float
from ml_collections import ConfigDict

from mf_jax.config import averages, make_objective, sample_plan
from mf_jax.data import make_source, read
from mf_jax.generator import Generator
from mf_jax.loading import load_for
from mf_jax.optim import choose_ema
from mf_jax.ranges import check_values
from mf_jax.reporting.page import write_report
from mf_jax.reporting.plots import save_field, save_scatter, save_transport
from mf_jax.reporting.sample_grid import save_sample_grid
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.files import replace_file

_SCATTER_POINTS = 5000
_INSTANTS = ((1.0, 1.0), (0.5, 0.5), (0.1, 0.1))
"""Where (r, t) the velocity of a network that never saw r < t is plotted."""
_PLACES = {
    "samples": "samples.npz",
    "picture": "samples.png",
    "scatter": "scatter.png",
    "field": "field.png",
    "transport": "transport.png",
    "report": "report.html",
}


def run(config: ConfigDict, workdir: Path) -> None:
    """Write `samples.npz` and a picture of the samples.

    `arr_0` holds the samples (uint8 `[N, H, W, C]`, or float32 `[N, D]` for vectors), `arr_1` their
    int32 labels where the model has classes.
    """
    check_values(config)
    section = config.sample
    ema = choose_ema("sample.ema", section.ema, averages(config))
    generator = load_for(workdir, config, ema=ema)
    labels = generator.labels_for(section.labels or None, section.num)
    samples = generator.sample(labels, plan=sample_plan(config))
    if not processes.is_first():
        return
    arrays = {"arr_0": samples} | ({"arr_1": labels} if generator.spec.num_classes else {})
    content = io.BytesIO()
    np.savez(content, **arrays)
    replace_file(workdir / _PLACES["samples"], content.getvalue())
    if generator.spec.is_picture:
        names = generator.spec.class_names
        save_sample_grid(workdir / _PLACES["picture"], samples, labels, names)
    else:
        _plot_vectors(config, workdir, generator, samples)
    write_report(workdir)
    source = f"step {generator.step}, ema {generator.ema}, seed {section.seed}"
    print(f"{len(samples)} samples from {source}:")
    run_folder.tell(workdir, **_PLACES)


def _plot_vectors(
    config: ConfigDict, workdir: Path, generator: Generator, samples: Float[np.ndarray, "n d"]
) -> None:
    """Plot samples beside the data; in the plane the learned field and one-step transport too."""
    held_out = make_source(config.data, split="held_out")
    data = read(held_out, min(_SCATTER_POINTS, len(held_out))).x
    steps = len(sample_plan(config).grid) - 1
    title = f"{steps}-step samples after {generator.step:,} training steps"
    save_scatter(workdir / _PLACES["scatter"], samples[:_SCATTER_POINTS], data, title=title)
    if samples.shape[1] != 2:
        return
    reach = 1.25 * float(np.abs(data).max())
    velocity, limits = generator.average_velocity, (-reach, reach)
    if make_objective(config).learns_average:
        save_field(workdir / _PLACES["field"], velocity, limits=limits)
        save_transport(workdir / _PLACES["transport"], velocity, data, limits=limits)
    else:
        save_field(workdir / _PLACES["field"], velocity, limits=limits, times=_INSTANTS)
