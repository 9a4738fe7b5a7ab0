"""--mode=train: from a config to a trained model in a workdir.

1. Everything wrong with the config is reported before anything is written.
2. The newest undamaged checkpoint is restored; without one, the state starts from the seed or from `init`.
3. Each step's batch and random numbers are pure functions of (seed, step). A continued run repeats the run that was
   never stopped bit for bit, its metrics included.
4. One compiled step runs, with the state donated, until the last step or SIGTERM. The host waits for the device only
   to log, to draw sample grids and to save.
5. A metric that is not finite stops the run before anything is saved.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
import numpy as np
from clu import parameter_overview
from etils.epath import Path
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mf_jax.config import (
    averages,
    from_section,
    make_network,
    make_objective,
    make_schedule,
    make_scheme,
    sample_plan,
    validate,
)
from mf_jax.data import Source, make_batches, read
from mf_jax.errors import BadInput
from mf_jax.generator import Generator, load_decoder
from mf_jax.loading import load_weights
from mf_jax.models import parameter_shapes
from mf_jax.optim import make_optimizer
from mf_jax.published.fetch import find_weights
from mf_jax.reporting.page import write_report
from mf_jax.reporting.plots import save_scatter
from mf_jax.reporting.run_log import RunLog
from mf_jax.reporting.sample_grid import few_classes, save_sample_grid
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.checkpoint import Checkpoints
from mf_jax.runtime.sharding import make_mesh, placed, put_batch, state_sharding
from mf_jax.step import NEVER, StepParts, TrainState, initial_state, make_train_step

_GRID_SAMPLES = 100
_SCATTER_SAMPLES = 5000
_RESULTS = {"metrics": "metrics.jsonl", "tensorboard": "tensorboard", "checkpoints": "checkpoints"}
_RESULTS |= {"pictures": "samples", "report": "report.html"}


class TrainingDiverged(FloatingPointError):
    """A metric is not finite any more."""


def run(config: ConfigDict, workdir: Path) -> int:
    """Train, or continue, the run of a workdir; return 0, or `job.stopped_exit_code` after a signal to stop."""
    with processes.together():
        source = validate(config, num_devices=jax.device_count())
        mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
        can_draw = _can_draw(config, source)
    can_draw = all(processes.from_all(can_draw))  # drawing takes every process
    parts = step_parts(config, source)
    if config.init.path and not run_folder.exists(workdir):
        # says what is wrong before anything is written
        load_weights(config, parameter_shapes(parts.network, parts.shape))
    with run_folder.own(workdir, config, source.spec, len(source)), _stop_signal() as stop:
        with contextlib.closing(Checkpoints(workdir, keep=config.checkpoint.keep)) as checkpoints:
            state = _first_state(config, parts, mesh, checkpoints)
            _describe(workdir, source, state)
            done = _loop(config, workdir, source, parts, mesh, state, checkpoints, stop, can_draw)
        if processes.is_first():
            write_report(workdir)
    is_complete = done == config.train.num_steps
    stopped = f"stopped at step {done}; the same command continues"
    print(f"trained {done} steps" if is_complete else stopped)
    run_folder.tell(workdir, **_RESULTS)
    return 0 if is_complete else config.job.stopped_exit_code


def step_parts(config: ConfigDict, source: Source) -> StepParts:
    """Return the parts of the training step of a config on a data source."""
    return StepParts(
        network=make_network(config, source.spec),
        shape=source.spec.shape,
        objective=make_objective(config),
        scheme=make_scheme(config),
        optimizer=from_section(make_optimizer, config.optim, rate=make_schedule(config)),
        ema_names=averages(config),
        seed=config.seed,
        log_every_steps=config.train.log_every_steps,
        batch_size=config.train.batch_size,
        stored=source.stored,
        gather=config.mesh.gather,
    )


def _first_state(
    config: ConfigDict, parts: StepParts, mesh: Mesh, checkpoints: Checkpoints
) -> TrainState:
    """Return the newest undamaged state, or one from the weights of `init`, or the seed's."""
    shapes = jax.eval_shape(lambda: initial_state(parts))
    shardings = state_sharding(mesh, shapes)
    restored = checkpoints.restore_state(placed(shapes, shardings))
    if restored is not None:
        return restored
    if config.init.path:
        params = jax.device_put(load_weights(config, shapes.params), shardings.params)
        return jax.jit(lambda params: initial_state(parts, params), out_shardings=shardings)(params)
    return jax.jit(lambda: initial_state(parts), out_shardings=shardings)()


def _describe(workdir: Path, source: Source, state: TrainState) -> None:
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    if processes.is_first():
        (workdir / "parameters.txt").write_text(overview + "\n")
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    device = jax.devices()[0]
    print(
        f"{count:,} parameters, {len(source):,} training examples of shape {source.spec.shape}, "
        f"{jax.device_count()} {device.platform} device{'s' * (jax.device_count() > 1)}"
        + (f" in {jax.process_count()} processes" if processes.are_several() else "")
        + (f"; continuing at step {int(state.step)}" if int(state.step) else "")
    )


def _loop(
    config: ConfigDict,
    workdir: Path,
    source: Source,
    parts: StepParts,
    mesh: Mesh,
    state: TrainState,
    checkpoints: Checkpoints,
    stop: Callable[[int], bool],
    can_draw: bool,
) -> int:
    """Train to the last step or a signal to stop; return the number of steps done."""
    train, start, num_steps = config.train, int(state.step), config.train.num_steps
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    train_step = jax.jit(make_train_step(parts, mesh), donate_argnums=0, out_shardings=shardings)
    schedule = make_schedule(config)
    batches = make_batches(
        source,
        batch_size=train.batch_size,
        seed=config.seed,
        start_step=start,
        flip=config.data.flip,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with contextlib.ExitStack() as stack:
        log = None
        if processes.is_first():
            log = RunLog(
                workdir,
                num_steps=num_steps,
                start_step=start,
                batch_size=train.batch_size,
                show_progress=config.log.progress,
            )
            stack.enter_context(log)
        done = start
        for done in range(start + 1, num_steps + 1):
            state = train_step(state, *put_batch(mesh, tuple(next(batches))))
            is_last, is_stopped = done == num_steps, stop(done)
            if log:
                log.advance(done)
            if is_last or done % train.log_every_steps == 0:
                metrics = _read_metrics(state, checkpoints)
                if log:
                    log.write(done, metrics | {"learning_rate": float(schedule(done - 1))})
            every = config.log.sample_every_steps
            if can_draw and (is_last or (every and done % every == 0)):
                picture = _draw(config, workdir, source, parts, state)
                if log:
                    log.picture("samples", done, picture)
            if is_last or is_stopped or done % config.checkpoint.every_steps == 0:
                _check_finite(state, checkpoints)
                checkpoints.save(state)
            if is_stopped and not is_last:
                print(f"told to stop: saving step {done}")
                break
    return done


def _check_finite(state: TrainState, checkpoints: Checkpoints) -> None:
    step = int(state.first_bad_step)
    if step == NEVER:
        return
    metrics = jax.device_get(state.metrics)
    names = ", ".join(name for name, metric in metrics.items() if not np.isfinite(metric.total))
    intact = "no checkpoint yet"
    if checkpoints.steps:
        intact = f"the checkpoint of step {checkpoints.steps[-1]} is intact"
    raise TrainingDiverged(
        f"step {step}: {names} not finite; {intact}; try a lower optim.lr, a longer optim.warmup_steps or "
        "optim.clip_norm=1 in another workdir"
    )


def _read_metrics(state: TrainState, checkpoints: Checkpoints) -> dict[str, float]:
    """Return the metrics since the last log; bins that no row fell into are left out."""
    _check_finite(state, checkpoints)
    metrics = jax.device_get(state.metrics)
    return {name: float(metric.compute()) for name, metric in metrics.items() if metric.count}


def _can_draw(config: ConfigDict, source: Source) -> bool:
    """Return whether samples can be shown: latents need their autoencoder, without which training goes on."""
    if source.stored:
        try:
            find_weights(config.data.autoencoder, config.weights_dir, key="data.autoencoder")
        except BadInput as problem:
            print(f"no pictures of samples while training: {problem}")
            return False
        load_decoder(config, origin=source.spec.origin)  # raises for another autoencoder
    return True


def _draw(
    config: ConfigDict, workdir: Path, source: Source, parts: StepParts, state: TrainState
) -> Path:
    """Write the picture of this step's samples, of the first moving average if there is one."""
    done = int(state.step)
    ema = parts.ema_names[0] if parts.ema_names else "none"
    params = state.ema[ema] if parts.ema_names else state.params
    generator = Generator(config, parts.network, params, source.spec, step=done, ema=ema)
    path = workdir / "samples" / f"step_{done:08d}.png"
    path.parent.mkdir(exist_ok=True)
    plan = sample_plan(config)
    if generator.spec.is_picture:
        labels = few_classes(_GRID_SAMPLES, source.spec.num_classes)
        samples = generator.sample(labels, plan=plan)
        if processes.is_first():
            save_sample_grid(path, samples, labels, source.spec.class_names)
    else:
        points = generator.sample(num=_SCATTER_SAMPLES, plan=plan)
        if processes.is_first():
            data = read(source, _SCATTER_SAMPLES).x
            save_scatter(path, points, data, title=f"samples at step {done}")
    return path


@contextlib.contextmanager
def _stop_signal() -> Iterator[Callable[[int], bool]]:
    """Turn SIGTERM, and the first Ctrl-C, into the wish to end after the step at hand and to save.

    Yields a function that says after each step, given the steps done, whether to stop; the same on all processes.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # it alone may catch signals
        yield lambda done: stop.is_set()
        return

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[number])  # a second one acts as it always does
        stop.set()

    def ask_all(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[number])
        os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells to all processes

    if processes.are_several():
        caught, asked = {signal.SIGINT: ask_all}, multihost_utils.reached_preemption_sync_point
    else:
        caught = dict.fromkeys((signal.SIGTERM, signal.SIGINT), ask_to_stop)
        asked = lambda done: stop.is_set()  # noqa: E731
    before = {number: signal.signal(number, handler) for number, handler in caught.items()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
