"""--mode=eval with `eval.references`: samples against reference statistics, in the features of Inception-v3.

Each cell of the grid (checkpoint, moving average, steps, guidance) is sampled once, batch by batch, and compared with
each reference. Every comparison is a row of eval.jsonl that carries its whole protocol. A row that is there is not
computed again, so that a job which was stopped goes on, and one that watches a training run scores what is new.
"""

import dataclasses
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mf_jax.data.pixels import QUANTISATION
from mf_jax.errors import BadInput
from mf_jax.generator import Generator, load_decoder
from mf_jax.loading import labels_of, load_cell
from mf_jax.metrics.inception import load_inception
from mf_jax.metrics.reference_file import count_pictures, read_pictures
from mf_jax.published.fetch import find_weights, verify
from mf_jax.reporting.sample_grid import save_sample_grid
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.checkpoint import UnreadableCheckpoint, fingerprint, saved_steps
from mf_jax.runtime.sharding import batch_sharding, make_mesh
from mf_jax.scoring.grid import NEWEST, Cell, cells
from mf_jax.scoring.rows import COLUMNS, Row, append, as_table, key_of, read_rows
from mf_jax.scoring.scorers import Batches, Judge, load_reference

PICTURES = "eval_samples"
_NUM_SHOWN = 64
_POLL_SECONDS = 30
_DECIDE_SAMPLES = ("model", "objective")
"""Sections of the config that decide what given parameters generate, with how latents were scaled."""


def run(config: ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """Score what `eval` asks for and append it to eval.jsonl.

    Args:
      config: of the command.
      workdir: of the run; for `eval.samples` any folder.

    Returns:
      The table of the rows that were asked for, whether scored now or before: columns, rows, protocol, diagnostics.

    Raises:
      BadInput: for whatever is missing or does not fit; what was scored before stays.
    """
    section = config.eval
    steps = _steps(workdir)
    with processes.together():
        _check(config)
        if section.samples:
            run_folder.make(workdir)
        elif not section.watch:
            _with_steps(config, workdir, steps)  # says what is wrong before anything is read
        judge = _judge(config)
    if section.samples:
        return as_table(_score_file(config, workdir, judge))
    if section.watch:
        return as_table(_watch(config, workdir, judge))
    return as_table(_score_grid(config, workdir, judge, steps))


def _check(config: ConfigDict) -> None:
    section = config.eval
    if not section.references:
        raise BadInput(
            "eval.references=(): samples are compared with reference statistics; name at least one .npz"
        )
    if section.watch and (section.samples or section.checkpoints):
        raise BadInput(
            "eval.watch=True: scores every new checkpoint of a run; leave eval.samples and eval.checkpoints out"
        )


def _judge(config: ConfigDict) -> Judge:
    section = config.eval
    inception = load_inception(
        find_weights(section.inception, config.weights_dir, key="eval.inception")
    )
    verify(section.inception, inception.sha256)
    references = [load_reference(path, inception) for path in section.references]
    return Judge(references, inception, section.least_samples, config.log.progress)


def _watch(config: ConfigDict, workdir: epath.Path, judge: Judge) -> list[Row]:
    """Score every checkpoint that can be had, the newest first, until the run's last step is scored."""
    listed, tried, doubtful = [], set(), set()
    if not run_folder.exists(workdir):
        print(f"waiting for a run in {workdir}", flush=True)
    while True:
        with processes.together():
            if run_folder.exists(workdir):
                run_folder.check(workdir, config)
                run_folder.check_writable(workdir)
        listed, before = _steps(workdir), listed
        for step in sorted(set(before) - set(listed) - tried):
            print(f"checkpoint {step} is left out: the run has dropped it", flush=True)
        tried, doubtful = tried & set(listed), doubtful & set(listed)
        for step in reversed(listed):
            if step in tried:
                continue
            try:
                _score_grid(config, workdir, judge, [step])
                tried.add(step)
            except (
                UnreadableCheckpoint
            ) as problem:  # dropped meanwhile, damaged, or not all here yet
                if step in doubtful:
                    print(f"checkpoint {step} is left out: {problem}", flush=True)
                    tried.add(step)
                doubtful.add(step)
            if _steps(workdir) != listed:
                break  # to what is newest now
        else:
            if (
                listed
                and set(listed) == tried
                and listed[-1] >= run_folder.stored_config(workdir).train.num_steps
            ):
                return read_rows(workdir)
            time.sleep(_POLL_SECONDS)


def _steps(workdir: epath.Path) -> list[int]:
    """Return the steps of a run's checkpoints, oldest first, the same on all processes of a job."""
    return processes.from_first(saved_steps(workdir) if run_folder.exists(workdir) else [])


def _score_grid(
    config: ConfigDict, workdir: epath.Path, judge: Judge, steps: list[int]
) -> list[Row]:
    """Score the cells that have no rows yet; return the rows of all."""
    # cells of one model are neighbours
    load = functools.lru_cache(1)(functools.partial(load_cell, config, workdir))
    cells = _with_steps(config, workdir, steps)
    return [row for cell in cells for row in _score_cell(config, workdir, judge, cell, load)]


def _with_steps(config: ConfigDict, workdir: epath.Path, steps: list[int]) -> list[Cell]:
    """Return the grid, the newest of these checkpoints by its step."""
    if config.init.path and not run_folder.exists(workdir):
        if config.eval.checkpoints or tuple(config.eval.emas) != ("",):
            raise BadInput(
                "eval.checkpoints, eval.emas: the weights of init.path are one model; leave both out, or name another "
                "with --config.init.which"
            )
        return [dataclasses.replace(cell, checkpoint=0, ema="init") for cell in cells(config)]
    run_folder.check(workdir, config)
    run_folder.check_writable(workdir)
    if not steps:
        raise BadInput(
            f"--workdir={workdir}: holds no checkpoint; train first: --mode=train with this --workdir"
        )
    return [
        dataclasses.replace(cell, checkpoint=steps[-1]) if cell.checkpoint == NEWEST else cell
        for cell in cells(config)
    ]


def _name(cell: Cell) -> str:
    """Return what a cell is called, in full."""
    ema = {"init": "init.path", "none": "raw parameters"}.get(cell.ema, f"EMA {cell.ema}")
    guided = (
        f", omega {cell.omega:g} in [{cell.t_min:g}, {cell.t_max:g}]" if cell.omega != 1 else ""
    )
    return f"checkpoint {cell.checkpoint}, {ema}, {cell.steps} step{'s' * (cell.steps > 1)}{guided}"


def _score_cell(
    config: ConfigDict,
    workdir: epath.Path,
    judge: Judge,
    cell: Cell,
    load: Callable[[int, str], Generator],
) -> list[Row]:
    section = config.eval

    def score() -> list[dict[str, float]]:
        generator = load(cell.checkpoint, cell.ema)
        if not generator.spec.is_picture:
            raise BadInput(
                f"eval.references: are of pictures, and the run generates vectors of shape {generator.spec.shape}; "
                "leave eval.references out"
            )
        labels = labels_of(config, generator)
        plan = cell.plan(seed=section.seed, batch_size=section.batch_size)
        batches = generator.batches(labels, plan)
        first: list[np.ndarray] = []

        def pictures() -> Batches:
            for x, index in batches:
                pixels = generator.pixels(x)
                if not first:
                    first.append(processes.on_host(pixels)[:_NUM_SHOWN])
                yield pixels, index

        scores = judge(pictures(), len(labels), batch_size=section.batch_size, what=_name(cell))
        if processes.is_first():
            (shown,) = first
            path = (
                workdir / PICTURES / f"{re.sub('[^a-zA-Z0-9.]+', '_', _name(cell)).strip('_')}.png"
            )
            path.parent.mkdir(exist_ok=True)
            save_sample_grid(
                path, shown[: len(labels)], labels[: len(shown)], generator.spec.class_names
            )
        return scores

    return _rows(workdir, judge, _name(cell), _protocol(config, workdir, cell, load), score)


def _protocol(
    config: ConfigDict, workdir: epath.Path, cell: Cell, load: Callable[[int, str], Generator]
) -> Row:
    """Return whatever decides the samples of a cell."""
    is_run = run_folder.exists(workdir)
    with processes.together():
        decoder = load_decoder(
            config, origin=run_folder.stored_data(workdir).origin if is_run else ""
        )
    if is_run:
        weights = fingerprint(workdir, cell.checkpoint)
    else:
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(load(cell.checkpoint, cell.ema).params):
            digest.update(np.asarray(leaf).tobytes())
        weights = digest.hexdigest()
    about = {section: config[section].to_dict() for section in _DECIDE_SAMPLES}
    if decoder:
        about |= {
            "latent_mean": list(config.data.latent_mean),
            "latent_std": list(config.data.latent_std),
        }
    return dataclasses.asdict(cell) | {
        "weights": weights,
        "config": hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest(),
        "num_samples": config.eval.num_samples,
        "labels": config.eval.labels,
        "seed": config.eval.seed,
        "network_dtype": config.model.dtype,
        "autoencoder": decoder.autoencoder.sha256 if decoder else "none",
        "quantisation": QUANTISATION,
    }


def _score_file(config: ConfigDict, workdir: epath.Path, judge: Judge) -> list[Row]:
    """Score the pictures of a file, all of them."""
    path, size = epath.Path(config.eval.samples).expanduser(), config.eval.batch_size
    num = count_pictures(path)
    mesh = make_mesh(data=0, fsdp=1)
    size = -(-min(size, num) // mesh.size) * mesh.size

    def batches() -> Batches:
        for first, block in enumerate(read_pictures(path, size)):
            padded = np.concatenate([block, np.repeat(block[-1:], size - len(block), axis=0)])
            index = np.arange(first * size, (first + 1) * size, dtype=np.int32)
            yield jax.device_put(padded, batch_sharding(mesh)), index

    with path.open("rb") as file:
        about = {"samples_sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    about |= {"samples": path.name, "num_samples": num}
    return _rows(
        workdir,
        judge,
        path.name,
        about,
        lambda: judge(batches(), num, batch_size=size, what=path.name),
    )


def _rows(
    workdir: epath.Path,
    judge: Judge,
    name: str,
    about: Row,
    score: Callable[[], list[dict[str, float]]],
) -> list[Row]:
    """Return the rows of some samples, one a reference; those that eval.jsonl lacks are computed and appended."""
    about |= {"inception": judge.inception.sha256, "matmul_precision": "highest"}
    protocols = [
        about | {"reference": epath.Path(reference.path).name, "reference_sha256": reference.sha256}
        for reference in judge.references
    ]
    # another job may add rows meanwhile: all processes go by what the first has read
    known = {key_of(row["protocol"]): row for row in processes.from_first(read_rows(workdir))}
    keys = [key_of(protocol) for protocol in protocols]
    if set(keys) <= set(known):
        return [known[key] for key in keys]
    new = {
        key: {"name": name, **scores, "protocol": protocol}
        for key, scores, protocol in zip(keys, score(), protocols, strict=True)
    }
    if processes.is_first():
        for row in new.values():
            scores = "  ".join(f"{column} {row[column]:.4g}" for column in COLUMNS if column in row)
            print(f"{row['name']}: {scores}", flush=True)
        append(workdir, new)
    return list(new.values())
