"""--mode=train: from a config to a trained model in a workdir.

1. Everything wrong with the config is reported before anything is written.
2. The state is the newest undamaged checkpoint, else the weights of `init`, else the seed's.
3. Batch and random numbers of a step are pure functions of (seed, step). A continued run repeats
   the run that was never stopped bit for bit, its metrics included.
4. One compiled step runs, its state donated, until the last step or a signal to stop.
5. A metric that is not finite stops the run before anything is saved.
6. Saving comes first. Nothing that draws, writes the report or feeds TensorBoard can end a run.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils.epath import Path
from jax.sharding import Mesh
from jaxtyping import Array, PyTree
from ml_collections import ConfigDict

from mf_jax import config as build
from mf_jax.data import Batch, Source, make_batches
from mf_jax.data.augment import AUGMENTATIONS
from mf_jax.flow.errors import BadInput, left_out
from mf_jax.generator import Generator
from mf_jax.loading import load_frozen, load_weights, weights_sha256
from mf_jax.models import parameter_shapes
from mf_jax.optim import average_name, choose_ema, forgetful, make_optimizer
from mf_jax.reporting.page import write_report
from mf_jax.reporting.run_log import RunLog, hardware
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.checkpoint import FOLDER, Checkpoints, saved_steps
from mf_jax.runtime.sharding import make_mesh, placed, put_batch, state_sharding
from mf_jax.sampling import can_draw, draw_progress
from mf_jax.step import NEVER, StepParts, TrainState, initial_state, make_train_step
from mf_jax.validation import own_parts, validate

_RESULTS = {"metrics": "metrics.jsonl", "tensorboard": "tensorboard", "checkpoints": "checkpoints"}
_RESULTS |= {"pictures": "samples", "report": "report.html"}


@dataclasses.dataclass(frozen=True)
class _Run:
    """What stays the same from the first step of a run to the last."""

    config: ConfigDict
    workdir: Path
    source: Source
    parts: StepParts
    mesh: Mesh
    checkpoints: Checkpoints
    can_draw: bool

    def is_due(self, done: int, every: int) -> bool:
        """Return whether to do what happens every so many steps (0 = never) and after the last."""
        return done == self.config.train.num_steps or (every > 0 and done % every == 0)


def run(config: ConfigDict, workdir: Path) -> int:
    """Train, or continue, the run of a workdir; return the exit code."""
    with processes.together():
        source = validate(config, num_devices=jax.device_count())
        mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
        draws = can_draw(config, source)
    draws = all(processes.from_all(draws))  # drawing takes every process
    parts, weights = step_parts(config, source), None
    with processes.together():
        _ = parts.metric_names  # traces a loss, and refuses what does not fit
    frozen, digests = load_frozen(config, parts.objective.frozen)
    if config.init.path and not processes.from_first(saved_steps(workdir)):
        weights = load_weights(config, parameter_shapes(parts.network, parts.shape))
        if sha256 := weights_sha256(config):
            digests["init_sha256"] = sha256
    if parts.objective.target_ema == 1 and not config.init.path:
        raise BadInput("velocity.ema=1.0: a frozen teacher that has learnt nothing; use init.path")
    with processes.together():
        if run_folder.exists(workdir):  # a later command may leave the override out
            kept, asked = run_folder.stored_config(workdir).checkpoint.keep, config.checkpoint.keep
            config.checkpoint.keep = max(kept, asked)
            if kept > asked:
                print(f"checkpoint.keep={asked}: the run keeps {kept}, as it began")
    stop_signal = processes.stop_signal(workdir / FOLDER, config.train.num_steps)
    owned = run_folder.own(workdir, config, source, own_parts(config), **digests)
    with owned, stop_signal as stop:
        with contextlib.closing(Checkpoints(workdir, keep=config.checkpoint.keep)) as checkpoints:
            state = first_state(parts, mesh, checkpoints, weights, frozen)
            del weights, frozen  # which lie on the devices
            _describe(workdir, source, state)
            names = () if parts.ema_rampup else parts.ema_names
            sizes = {"num_steps": config.train.num_steps, "batch_size": parts.batch_size}
            fixed = average_name(parts.objective.target_ema)
            if warning := forgetful(names, **sizes, fixed=fixed):
                print(warning)
            this = _Run(config, workdir, source, parts, mesh, checkpoints, draws)
            done = _loop(this, state, stop)
            checkpoints.verify()
        if processes.is_first():
            write_report(workdir)
    is_complete = done == config.train.num_steps
    stopped = f"stopped at step {done}; the same command continues"
    print(f"trained {done} steps" if is_complete else stopped)
    run_folder.tell(workdir, **_RESULTS)
    return 0 if is_complete else config.job.stopped_exit_code


def step_parts(config: ConfigDict, source: Source) -> StepParts:
    """Return the parts of the training step of a config on a data source."""
    rate = build.make_schedule(config)
    return StepParts(
        network=build.make_network(config, source.spec),
        shape=source.spec.shape,
        objective=build.make_objective(config, source),
        scheme=build.make_scheme(config),
        optimizer=build.from_section(make_optimizer, config.optim, rate=rate),
        ema_names=build.averages(config),
        seed=config.seed,
        log_every_steps=config.train.log_every_steps,
        batch_size=config.train.batch_size,
        stored=source.stored,
        more=source.spec.more,
        gather=config.mesh.gather,
        ema_rampup=config.ema.rampup,
        ema_every_steps=config.ema.every_steps,
        augment=AUGMENTATIONS[config.data.augment].draw,
        microbatch=config.train.microbatch,
    )


def batches_of(config: ConfigDict, source: Source, start_step: int = 0) -> Iterator[Batch]:
    """Yield this process's rows of the batches of a run, from a step on."""
    settings = {"seed": config.seed, "flip": config.data.flip, "start_step": start_step}
    settings |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return make_batches(source, batch_size=config.train.batch_size, **settings)


def first_state(
    parts: StepParts,
    mesh: Mesh,
    checkpoints: Checkpoints,
    weights: PyTree = None,
    frozen: PyTree = None,
) -> TrainState:
    """Return the newest undamaged state, else one of weights, else the seed's."""
    make = jax.jit(functools.partial(initial_state, parts), inline=True)
    shapes = jax.eval_shape(make, None)
    shardings = state_sharding(mesh, shapes)
    if (state := checkpoints.restore_state(placed(shapes, shardings))) is None:
        params = None if weights is None else jax.device_put(weights, shardings.params)
        state = jax.jit(make, out_shardings=shardings)(params)
    return state.replace(frozen=jax.device_put(frozen, shardings.frozen))


def _describe(workdir: Path, source: Source, state: TrainState) -> None:
    if processes.is_first():
        overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        (workdir / "parameters.txt").write_text(overview + "\n")
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    data = f"{len(source):,} training examples of shape {source.spec.shape}"
    step = int(state.step)
    done = f"; continuing at step {step}" if step else ""
    print(f"{count:,} parameters, {data}, {hardware()}{done}")


def _loop(run: _Run, state: TrainState, stop: Callable[[int], bool]) -> int:
    """Train to the last step or a signal to stop; return the number of steps done."""
    config, start = run.config, int(state.step)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(run.parts, run.mesh)

    def marked(state: TrainState, *batch: PyTree) -> tuple[TrainState, Array]:
        state = step(state, *batch)
        return state, state.step  # the next step takes the state, and leaves this

    train_step = jax.jit(marked, donate_argnums=0, out_shardings=(shardings, shardings.step))

    def advance(state: TrainState, mark: Any, batch: tuple) -> tuple[TrainState, Array]:
        after = train_step(state, *batch)
        jax.block_until_ready(mark)  # so that the host knows how far the device is
        return after

    batches, schedule = batches_of(config, run.source, start), build.make_schedule(config)
    sizes = {"num_steps": config.train.num_steps, "batch_size": config.train.batch_size}
    sizes |= {"start_step": start, "is_shown": config.log.progress}
    log = RunLog(run.workdir, **sizes) if processes.is_first() else contextlib.nullcontext()
    with log as log, ThreadPoolExecutor(1) as pool:
        done, mark = start, None
        for done in range(start + 1, config.train.num_steps + 1):
            batch = put_batch(run.mesh, tuple(next(batches)))
            ahead = pool.submit(advance, state, mark, batch)
            while wait([ahead], timeout=1.0).not_done:  # so that signals reach this thread
                if log:
                    log.remind()
            state, mark = ahead.result()
            if log and done - 1 > start:
                log.advance(done - 1)
            is_stopped = stop(done)
            if run.is_due(done, config.train.log_every_steps):
                metrics = _read_metrics(state, run.checkpoints)
                if log:
                    log.write(done, metrics | {"learning_rate": float(schedule(done - 1))})
            if is_stopped or run.is_due(done, config.checkpoint.every_steps):
                _read_metrics(state, run.checkpoints)  # all finite
                run.checkpoints.save(state)
            if run.is_due(done, config.log.sample_every_steps):
                _draw(run, state, log)
            if is_stopped:
                break
    return done


def _draw(run: _Run, state: TrainState, log: RunLog | None) -> None:
    """Draw this step's samples, of the average that sampling takes, and the report."""
    done, ema = int(state.step), choose_ema("", "", run.parts.ema_names)
    if run.can_draw:
        params, spec = state.ema.get(ema, state.params), run.source.spec
        generator = Generator(run.config, run.parts.network, params, spec, step=done, ema=ema)
        with left_out(f"the picture of step {done}"):
            picture = draw_progress(run.workdir, generator, run.source)
            if log:
                log.picture("samples", done, picture)
    if log and done < run.config.train.num_steps:
        write_report(run.workdir)


def _read_metrics(state: TrainState, checkpoints: Checkpoints) -> dict[str, float]:
    """Return the metrics since the last log, which are finite, without bins that no row hit."""
    metrics = jax.device_get(state.metrics)
    if (step := int(state.first_bad_step)) == NEVER:
        return {name: float(metric.compute()) for name, metric in metrics.items() if metric.count}
    names = ", ".join(name for name, metric in metrics.items() if not np.isfinite(metric.total))
    saved = checkpoints.steps
    intact = f"the checkpoint of step {saved[-1]} is intact" if saved else "no checkpoint yet"
    fix = "in another workdir try a lower optim.lr, longer optim.warmup_steps or optim.clip_norm=1"
    raise FloatingPointError(f"step {step}: {names} not finite; {intact}; {fix}")
