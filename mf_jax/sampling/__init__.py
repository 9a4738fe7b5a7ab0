"""--mode=sample: samples.npz in the convention of the field's evaluators, and pictures.

Training draws its samples here too.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from mf_jax.config import has_null, learns_average, sample_plan
from mf_jax.data import Source, in_turn, make_source, read
from mf_jax.data.pixels import to_pixels
from mf_jax.flow.errors import BadInput, check_known, in_section, left_out
from mf_jax.flow.sampler import SamplePlan
from mf_jax.generator import Generator, load_decoder
from mf_jax.loading import load_for
from mf_jax.published.fetch import find_weights
from mf_jax.reporting.page import write_report
from mf_jax.reporting.plots import save_field, save_scatter, save_signals, save_transport
from mf_jax.reporting.sample_grid import (
    REAL_FILE,
    class_name,
    few_classes,
    save_animation,
    save_rows,
    save_sample_grid,
)
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.archives import write_npz

_GRID_SAMPLES, _SCATTER_POINTS, _REAL_ROWS = 100, 5000, 400
_INTERVALS = ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0))
_INSTANTS = ((1.0, 1.0), (0.5, 0.5), (0.1, 0.1))
"""Where (r, t) a velocity is plotted; of a network that never saw r < t at instants alone."""
_PLACES = {"samples": "samples.npz", "picture": "samples.png"}
_OTHERS = "scatter signals field transport steps walk nearest"
_PLACES |= {name: f"{name}.png" for name in _OTHERS.split()}
_PLACES |= {"training": "training.webp", "report": "report.html"}
_SHOWN, _MOST_NUMBERS = 10, 2**28
_Named = list[tuple[str, UInt8[np.ndarray, "n h w c"]]]


def run(config: ConfigDict, workdir: Path) -> None:
    """Write `samples.npz` and a picture of the samples.

    `arr_0` holds the samples (uint8 `[N, H, W, C]`, or float32 for vectors and signals), `arr_1`
    their int32 labels where the model has classes. `condition`, `e` and `mask` are what else the
    samples were told, where the model was trained with it.
    """
    section = config.sample
    generator = load_for(workdir, config)
    spec = generator.spec
    for name in section.views:
        check_known("sample.views", name, _VIEWS)
    with in_section("sample"):
        if section.views and (not spec.is_picture or spec.more):
            raise BadInput("views: are of pictures that bring nothing but a class; use ()")
        spec.check_asked(section.labels)
    labels = generator.labels_for(section.labels or None, section.num)
    given = {"condition": np.float32([section.condition])} if section.condition else {}
    if spec.more.keys() - given:
        rows = in_turn(_source(config, workdir, "held_out"), len(labels))
        labels, given = labels if section.labels else rows.labels, rows.more | given
    plan = sample_plan(config)
    with in_section("sample"):
        samples = generator.sample(labels, plan=plan, **given)
    if processes.is_first():
        arrays = {"arr_0": samples} | ({"arr_1": labels} if spec.num_classes else {})
        arrays |= {key: each[np.arange(len(labels)) % len(each)] for key, each in given.items()}
        write_npz(workdir / _PLACES["samples"], arrays)
        with left_out("the picture of the samples"):
            if spec.is_picture:
                _show(workdir / _PLACES["picture"], generator, samples, labels)
            else:
                _plot_vectors(workdir, generator, samples)
    for name in section.views:
        path, (draw, save) = workdir / _PLACES[name], _VIEWS[name]
        with left_out(path.name):
            content = draw(workdir, generator, plan)  # all processes draw samples
            if processes.is_first():
                save(path, *content)
    if processes.is_first():
        write_report(workdir)
        source = f"step {generator.step}, ema {generator.ema}, seed {section.seed}"
        print(f"{len(samples)} samples from {source}:")
        made = {k: v for k, v in _PLACES.items() if k not in _VIEWS or k in section.views}
        run_folder.tell(workdir, **made)


def _source(config: ConfigDict, workdir: Path, split: str) -> Source:
    """Open a split of a run's data; BadInput if they are not its own."""
    train = make_source(config.data, split="train")
    if run_folder.exists(workdir):
        run_folder.check_data(workdir, train)
    return train if split == "train" else make_source(config.data, split=split)


def _labels_shown(generator: Generator) -> Int[np.ndarray, "n"]:
    """Return the labels of a view's pictures: of `sample.labels`, or of some classes."""
    if chosen := generator.config.sample.labels:
        return generator.labels_for(chosen, _SHOWN)
    return few_classes(_SHOWN, generator.spec.num_classes)


def _of_steps(_: Path, generator: Generator, plan: SamplePlan) -> tuple[_Named, str]:
    """Return samples of the same noise in 1, 2, 4 and 8 steps."""
    labels = _labels_shown(generator)
    rows = [
        (f"{k} step{'s' * (k > 1)}", generator.sample(labels, plan=plan.replace(steps=k, times=())))
        for k in (1, 2, 4, 8)
    ]
    return rows, f"the same noise in each column · step {generator.step:,}"


def _of_walk(_: Path, generator: Generator, plan: SamplePlan) -> tuple[_Named, str]:
    """Return, in a row for each class, samples of cos(a) e0 + sin(a) e1, normal like e0."""
    spec, labels = generator.spec, _labels_shown(generator)
    shape = len(labels) + 1, 1, *spec.shape
    e = np.random.default_rng(plan.seed).standard_normal(shape, "f")
    e = generator.config.draws.noise_scale * e
    angle = np.linspace(0, math.pi / 2, _SHOWN, dtype=np.float32)[:, None, None, None]
    walks = (np.cos(angle) * e[:-1] + np.sin(angle) * e[1:]).reshape(-1, *spec.shape)
    samples = generator.sample(np.repeat(labels, _SHOWN), plan=plan, e=walks)
    names = [class_name(k, spec.class_names) * bool(spec.num_classes) for k in labels.tolist()]
    rows = zip(names, np.split(samples, len(labels)), strict=True)
    return list(rows), f"from noise to noise · {generator.caption(plan)}"


def _of_nearest(workdir: Path, generator: Generator, plan: SamplePlan) -> tuple[_Named, str]:
    """Return samples above the training pictures at the least squared distance in pixels."""
    from sklearn.metrics import pairwise_distances_argmin

    samples = generator.sample(_labels_shown(generator), plan=plan)
    source = _source(generator.config, workdir, "train")
    if source.stored:
        raise BadInput("views: nearest needs pictures, and the data are latents")
    if not processes.is_first():
        return [], ""
    num = min(len(source), _MOST_NUMBERS // math.prod(source.spec.shape))
    data = to_pixels(source.gather(np.linspace(0, len(source) - 1, num).astype(int)).x)
    flat, flat_data = (x.reshape(len(x), -1).astype(np.float32) for x in (samples, data))
    nearest = data[pairwise_distances_argmin(flat, flat_data)]
    looked = f" · of {num:,} of {len(source):,} training pictures" * (num < len(source))
    return [("samples", samples), ("training data", nearest)], generator.caption(plan) + looked


def _of_training(workdir: Path, _: Generator, __: SamplePlan) -> tuple[list[Path]]:
    """Return the pictures that training has left."""
    if pictures := sorted((workdir / "samples").glob("step_*.png")):
        return (pictures,)
    raise BadInput(f"{workdir / 'samples'}: holds no pictures; see log.sample_every_steps")


_VIEWS = {"steps": (_of_steps, save_rows), "walk": (_of_walk, save_rows)}
_VIEWS |= {"nearest": (_of_nearest, save_rows), "training": (_of_training, save_animation)}


def _show(path: Path, generator: Generator, samples: Any, labels: Any, data: Any = None) -> None:
    """Save samples as a grid of pictures, or plotted beside data."""
    caption = generator.caption(sample_plan(generator.config))
    if data is None:
        save_sample_grid(path, samples, labels, generator.spec.class_names, caption=caption)
    else:
        plot = save_scatter if data.ndim == 2 else save_signals
        plot(path, samples[:_SCATTER_POINTS], data, title=caption)


def _plot_vectors(workdir: Path, generator: Generator, samples: Float[np.ndarray, "n ..."]) -> None:
    """Plot samples beside the data; in the plane the learned field and one-step transport too."""
    held_out = _source(generator.config, workdir, "held_out")
    data = read(held_out, min(_SCATTER_POINTS, len(held_out))).x
    kind = "scatter" if data.ndim == 2 else "signals"
    _show(workdir / _PLACES[kind], generator, samples, None, data)
    if samples.shape[1:] != (2,) or generator.spec.more:
        return
    if generator.spec.num_classes and not has_null(generator.config):
        print("field and transport are left out: they are of no class, which was not trained")
        return
    reach = 1.25 * float(np.abs(data).max())
    velocity, is_map = generator.average_velocity, learns_average(generator.config)
    times = _INTERVALS * is_map + _INSTANTS
    save_field(workdir / _PLACES["field"], velocity, reach=reach, times=times)
    if is_map:
        save_transport(workdir / _PLACES["transport"], velocity, data, reach=reach)


def can_draw(config: ConfigDict, source: Source) -> bool:
    """Return whether samples can be shown; a missing decoder of latents does not stop a run."""
    if source.stored:
        try:
            find_weights(config.data.autoencoder, config.weights_dir, key="data.autoencoder")
        except BadInput as problem:
            print(f"no pictures of samples while training: {problem}")
            return False
        load_decoder(config, origin=source.spec.origin)  # raises for another autoencoder
    return True


def draw_progress(workdir: Path, generator: Generator, source: Source) -> Path:
    """Return the picture of some samples of a run in training, beside real data; all must call."""
    path = workdir / "samples" / f"step_{generator.step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    spec, labels, given = generator.spec, None, {}
    num = _GRID_SAMPLES if spec.is_picture else _SCATTER_POINTS
    if spec.more:
        rows = in_turn(source, num)
        labels, given = rows.labels, rows.more
    elif spec.is_picture:
        labels = few_classes(num, spec.num_classes)
    samples = generator.sample(labels, num=num, plan=sample_plan(generator.config), **given)
    if processes.is_first():
        data = None if spec.is_picture else read(source, min(num, len(source))).x
        _show(path, generator, samples, labels, data)
        if spec.is_picture and not (real := workdir / REAL_FILE).exists():
            with left_out(REAL_FILE):
                _draw_real(real, generator, source, labels)
    return path


def _draw_real(
    path: Path, generator: Generator, source: Source, labels: Int[np.ndarray, "n"]
) -> None:
    """Save real pictures, of the classes of these labels where some are found."""
    spread = np.linspace(0, len(source) - 1, min(len(source), _REAL_ROWS)).astype(int)
    rows = source.gather(spread)
    found = np.flatnonzero(np.isin(rows.labels, labels))
    x, kept = (values[found if len(found) else ...] for values in (rows.x, rows.labels))
    if source.stored:
        x, kept = jnp.asarray(x[:_GRID_SAMPLES]), kept[:_GRID_SAMPLES]
        z = source.stored.draw(jax.random.key(0), x)
        # one by one: this device alone may not hold many at once
        one_by_one = jax.jit(lambda decode, z: jax.lax.map(lambda row: decode(row[None])[0], z))
        x = one_by_one(generator.decoder, z)
    pixels, names = np.asarray(to_pixels(x)), generator.spec.class_names
    save_sample_grid(path, pixels, kept, names, caption="real pictures")
