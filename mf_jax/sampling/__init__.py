"""--mode=sample: samples.npz in the convention of the field's evaluators, and pictures.

Training draws its samples here too.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mf_jax.config import has_null, learns_average, sample_plan
from mf_jax.data import Source, in_turn, make_source, read
from mf_jax.data.pixels import to_pixels
from mf_jax.flow.errors import BadInput, check_known, in_section, left_out
from mf_jax.flow.sampler import SamplePlan
from mf_jax.generator import Generator, load_decoder
from mf_jax.loading import load_for
from mf_jax.models.autoencoder import Decoder
from mf_jax.published.fetch import find_weights
from mf_jax.reporting.page import write_report
from mf_jax.reporting.plots import save_field, save_scatter, save_signals, save_transport
from mf_jax.reporting.sample_grid import (
    REAL_FILE,
    class_name,
    describe,
    few_classes,
    save_animation,
    save_rows,
    save_sample_grid,
)
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.archives import write_npz
from mf_jax.validation.ranges import check_values

_GRID_SAMPLES, _SCATTER_POINTS, _REAL_ROWS = 100, 5000, 400
_INTERVALS = ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0))
_INSTANTS = ((1.0, 1.0), (0.5, 0.5), (0.1, 0.1))
"""Where (r, t) a velocity is plotted; of a network that never saw r < t at instants alone."""
_PLOTS = {2: ("scatter", save_scatter), 3: ("signals", save_signals)}
"""Of samples beside the data, by the rank of both."""
_PLACES = {"samples": "samples.npz", "picture": "samples.png"}
_PLACES |= {name: f"{name}.png" for name in ("scatter", "signals", "field", "transport")}
_PLACES |= {name: f"{name}.png" for name in ("steps", "walk", "nearest")}
_PLACES |= {"training": "training.webp", "report": "report.html"}
_SHOWN, _MOST_NUMBERS = 10, 2**28


def run(config: ConfigDict, workdir: Path) -> None:
    """Write `samples.npz` and a picture of the samples.

    `arr_0` holds the samples (uint8 `[N, H, W, C]`, or float32 for vectors and signals), `arr_1`
    their int32 labels where the model has classes. `condition`, `e` and `mask` are what else the
    samples were told, where the model was trained with it.
    """
    check_values(config)
    section = config.sample
    generator = load_for(workdir, config)
    spec = generator.spec
    with in_section("sample"):
        for name in section.views:
            check_known("views", name, _VIEWS)
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
                path, caption = workdir / _PLACES["picture"], _caption(generator)
                save_sample_grid(path, samples, labels, spec.class_names, caption=caption)
            else:
                _plot_vectors(workdir, generator, samples)
    for name in section.views:  # all processes draw samples
        with left_out(_PLACES[name]):
            _VIEWS[name](workdir / _PLACES[name], generator, plan)
    if processes.is_first():
        with left_out(_PLACES["report"]):
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


def _save_steps(path: Path, generator: Generator, plan: SamplePlan) -> None:
    """Save samples of the same noise in 1, 2, 4 and 8 steps."""
    labels, counts = _labels_shown(generator), (1, 2, 4, 8)
    plans = [plan.replace(steps=steps, times=()) for steps in counts]
    rows = [generator.sample(labels, plan=each) for each in plans]
    if processes.is_first():
        names = [f"{steps} step{'s' * (steps > 1)}" for steps in counts]
        caption = f"the same noise in each column · step {generator.step:,}"
        save_rows(path, list(zip(names, rows, strict=True)), caption=caption)


def _save_walk(path: Path, generator: Generator, plan: SamplePlan) -> None:
    """Save, in a row for each class, samples of cos(a) e0 + sin(a) e1, which is normal like e0."""
    spec, config = generator.spec, generator.config
    labels = _labels_shown(generator)
    shape = len(labels) + 1, 1, *spec.shape
    e = config.draws.noise_scale * np.random.default_rng(plan.seed).standard_normal(shape, "f")
    angle = np.linspace(0, math.pi / 2, _SHOWN, dtype=np.float32)[:, None, None, None]
    walks = (np.cos(angle) * e[:-1] + np.sin(angle) * e[1:]).reshape(-1, *spec.shape)
    samples = generator.sample(np.repeat(labels, _SHOWN), plan=plan, e=walks)
    if processes.is_first():
        names = [class_name(k, spec.class_names) * bool(spec.num_classes) for k in labels.tolist()]
        rows = samples.reshape(len(labels), _SHOWN, *samples.shape[1:])
        caption = f"from noise to noise · {_caption(generator)}"
        save_rows(path, list(zip(names, rows, strict=True)), caption=caption)


def _save_nearest(path: Path, generator: Generator, plan: SamplePlan) -> None:
    """Save samples above the training pictures at the least squared distance in pixels."""
    from sklearn.metrics import pairwise_distances_argmin

    labels = _labels_shown(generator)
    samples = generator.sample(labels, plan=plan)
    source = _source(generator.config, path.parent, "train")
    if source.stored:
        raise BadInput("views: nearest needs pictures, and the data are latents")
    if not processes.is_first():
        return
    num = min(len(source), _MOST_NUMBERS // math.prod(source.spec.shape))
    data = to_pixels(source.gather(np.linspace(0, len(source) - 1, num).astype(int)).x)
    flat, flat_data = (x.reshape(len(x), -1).astype(np.float32) for x in (samples, data))
    nearest = data[pairwise_distances_argmin(flat, flat_data)]
    rows = [("samples", samples), ("training data", nearest)]
    looked = f" · of {num:,} of {len(source):,} training pictures" * (num < len(source))
    save_rows(path, rows, caption=_caption(generator) + looked)


def _save_training(path: Path, generator: Generator, plan: SamplePlan) -> None:
    """Save an animation of the pictures that training has left."""
    pictures = sorted((path.parent / "samples").glob("step_*.png"))
    if not pictures:
        raise BadInput(f"{path.parent / 'samples'}: holds no pictures; see log.sample_every_steps")
    if processes.is_first():
        save_animation(path, pictures)


_VIEWS = {"steps": _save_steps, "walk": _save_walk}
_VIEWS |= {"nearest": _save_nearest, "training": _save_training}


def _plot_vectors(workdir: Path, generator: Generator, samples: Float[np.ndarray, "n ..."]) -> None:
    """Plot samples beside the data; in the plane the learned field and one-step transport too."""
    held_out = _source(generator.config, workdir, "held_out")
    data = read(held_out, min(_SCATTER_POINTS, len(held_out))).x
    kind, save = _PLOTS[data.ndim]
    save(workdir / _PLACES[kind], samples[:_SCATTER_POINTS], data, title=_caption(generator))
    if samples.shape[1:] != (2,) or generator.spec.more:
        return
    if generator.spec.num_classes and not has_null(generator.config):
        print("field and transport are left out: they are of no class, which was not trained")
        return
    reach = 1.25 * float(np.abs(data).max())
    velocity, limits = generator.average_velocity, (-reach, reach)
    is_map = learns_average(generator.config)
    times = _INTERVALS * is_map + _INSTANTS
    save_field(workdir / _PLACES["field"], velocity, limits=limits, times=times)
    if is_map:
        save_transport(workdir / _PLACES["transport"], velocity, data, limits=limits)


def _caption(generator: Generator) -> str:
    evaluations = len(sample_plan(generator.config).grid) - 1
    return describe(step=generator.step, evaluations=evaluations, ema=generator.ema)


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
    spec, plan, caption = generator.spec, sample_plan(generator.config), _caption(generator)
    num = _GRID_SAMPLES if spec.is_picture else _SCATTER_POINTS
    labels, given = few_classes(num, spec.num_classes) if spec.is_picture else None, {}
    if spec.more:
        rows = in_turn(source, num)
        labels, given = rows.labels, rows.more
    samples = generator.sample(labels, num=num, plan=plan, **given)
    if not processes.is_first():
        return path
    if not spec.is_picture:
        data = read(source, min(num, len(source))).x
        _PLOTS[data.ndim][1](path, samples, data, title=caption)
        return path
    save_sample_grid(path, samples, labels, spec.class_names, caption=caption)
    if not (real := workdir / REAL_FILE).exists():
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
        x = _decoded(generator.decoder, source.stored.draw(jax.random.key(0), x))
    pixels, names = np.asarray(to_pixels(x)), generator.spec.class_names
    save_sample_grid(path, pixels, kept, names, caption="real pictures")


@jax.jit
def _decoded(decoder: Decoder, z: Float[Array, "n ..."]) -> Float[Array, "n h w 3"]:
    """Return pictures one by one: this device alone may not hold many at once."""
    return jax.lax.map(lambda row: decoder(row[None])[0], z)
