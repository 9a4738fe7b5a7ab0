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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mf_jax import workdir as run_folder
from mf_jax.checkpoint import saved_steps
from mf_jax.decoding import QUANTISATION, load_decoder
from mf_jax.generator import Generator
from mf_jax.grid import NEWEST, Cell, cells, names
from mf_jax.judge import Batches, Judge, load_reference
from mf_jax.loading import labels_of, load_cell
from mf_jax.metrics.frechet_noise import noise_line
from mf_jax.metrics.inception import load_inception
from mf_jax.metrics.reference_file import count_pictures, read_pictures
from mf_jax.pictures import save_sample_grid
from mf_jax.report import replace_file
from mf_jax.sharding import batch_sharding, make_mesh
from mf_jax.types import BadInput
from mf_jax.weights import find_weights, verify

ROWS_FILE = "eval.jsonl"
PICTURES = "eval_samples"
_NUM_SHOWN = 64
_SHOWN_DIGITS = 12  # of a checksum
_COLUMNS = ("fid", "fid_standard_error", "sfid", "inception_score", "precision", "recall", "kid")
_POLL_SECONDS = 30
Row = dict[str, Any]


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
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
    if not section.references:
        raise BadInput(
            "eval.references=(): samples are compared with reference statistics; name at least one .npz file"
        )
    if section.watch and (section.samples or section.checkpoints):
        raise BadInput(
            "eval.watch=True: scores every new checkpoint of a run; leave eval.samples and eval.checkpoints out"
        )
    inception = load_inception(find_weights(section.inception, config.weights_dir, key="eval.inception"))
    verify(section.inception, inception.sha256)
    references = [load_reference(path, inception) for path in section.references]
    judge = Judge(references, inception, section.least_samples, config.log.progress)
    if section.samples:
        workdir.mkdir(parents=True, exist_ok=True)
        return _table(_score_file(config, workdir, judge))
    rows = _score_grid(config, workdir, judge)
    while section.watch and not _is_complete(workdir):
        time.sleep(_POLL_SECONDS)
        _score_grid(config, workdir, judge)
    return _table(read_rows(workdir) if section.watch else rows)


def _table(rows: Sequence[Row]) -> dict[str, Any]:
    """Return rows of eval.jsonl as a table, with what they have in common below it."""
    columns = [name for name in _COLUMNS if any(name in row for row in rows)]
    protocols = [row["protocol"] for row in rows]
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    shared = [key for key in keys if len({str(protocol.get(key)) for protocol in protocols}) == 1]
    said = [f"{key.replace('_', ' ')} {_shortened(protocols[0][key])}" for key in shared]
    if rows and "fid_standard_error" in rows[0]:
        said.append(noise_line(protocols[0]["num_samples"], rows[0]["fid_standard_error"]))
    return {"columns": columns, "rows": list(rows), "protocol": ", ".join(said), "diagnostics": {}}


def _shortened(value: Any) -> str:
    """Return a value of a protocol as people read it: of a checksum the first digits."""
    text = str(value)
    return text[:_SHOWN_DIGITS] if re.fullmatch("[0-9a-f]{64}", text) else text


def _score_grid(config: ConfigDict, workdir: Path, judge: Judge) -> list[Row]:
    """Score the cells that have no rows yet; return the rows of all."""
    grid = _with_steps(config, workdir)
    load = functools.lru_cache(1)(
        functools.partial(load_cell, config, workdir)
    )  # cells of a model are neighbours
    return [
        row
        for cell, name in zip(grid, names(grid), strict=True)
        if not config.eval.watch
        or cell.checkpoint in saved_steps(workdir)  # the run may have dropped it meanwhile
        for row in _score_cell(config, workdir, judge, cell, name, load)
    ]


def _with_steps(config: ConfigDict, workdir: Path) -> list[Cell]:
    """Return the grid, the checkpoints by their steps."""
    if config.init.path and not run_folder.exists(workdir):
        return cells(config)
    run_folder.check(workdir, config)
    run_folder.check_writable(workdir)
    steps = saved_steps(workdir)
    if not steps and not config.eval.watch:
        raise BadInput(
            f"--workdir={workdir}: holds no checkpoint; train first: --mode=train with this --workdir"
        )
    chosen = steps if config.eval.watch else steps[-1:]
    return [
        dataclasses.replace(cell, checkpoint=step)
        for cell in cells(config)
        for step in (chosen if cell.checkpoint == NEWEST else [cell.checkpoint])
    ]


def _is_complete(workdir: Path) -> bool:
    last = run_folder.stored_config(workdir).train.num_steps
    return max(saved_steps(workdir), default=0) >= last


def _score_cell(
    config: ConfigDict,
    workdir: Path,
    judge: Judge,
    cell: Cell,
    name: str,
    load: Callable[[int, str], Generator],
) -> list[Row]:
    section = config.eval

    def score() -> list[dict[str, float]]:
        generator = load(cell.checkpoint, cell.ema)
        labels = labels_of(config, generator)
        settings = {"seed": section.seed, "batch_size": section.batch_size}
        batches = generator.batches(labels, steps=cell.steps, guidance=cell.guidance, **settings)
        first: list[np.ndarray] = []

        def pictures() -> Batches:
            for x, index in batches:
                pixels = generator.pixels(x)
                if not first and pixels.is_fully_addressable:
                    first.append(np.asarray(pixels[:_NUM_SHOWN]))
                yield pixels, index

        scores = judge(pictures(), len(labels), batch_size=section.batch_size, what=name)
        for shown in first:
            path = workdir / PICTURES / f"step_{generator.step:08d}_{name.replace(' ', '_')}.png"
            path.parent.mkdir(exist_ok=True)
            save_sample_grid(path, shown[: len(labels)], labels[: len(shown)], generator.class_names)
        return scores

    return _rows(workdir, judge, name, _protocol(config, workdir, cell), score)


def _protocol(config: ConfigDict, workdir: Path, cell: Cell) -> Row:
    """Return whatever decides the samples of a cell, but the run itself."""
    is_run = run_folder.exists(workdir)
    decoder = load_decoder(config, origin=run_folder.stored_origin(workdir) if is_run else "")
    return dataclasses.asdict(cell) | {
        "weights": "run" if is_run else config.init.path,
        "num_samples": config.eval.num_samples,
        "labels": config.eval.labels,
        "seed": config.eval.seed,
        "network_dtype": config.model.dtype,
        "autoencoder": decoder.autoencoder.sha256 if decoder else "none",
        "quantisation": QUANTISATION,
    }


def _score_file(config: ConfigDict, workdir: Path, judge: Judge) -> list[Row]:
    """Score the pictures of a file, all of them."""
    path, size = epath.Path(config.eval.samples), config.eval.batch_size
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
    workdir: Path, judge: Judge, name: str, about: Row, score: Callable[[], list[dict[str, float]]]
) -> list[Row]:
    """Return the rows of some samples, one a reference; those that eval.jsonl lacks are computed and appended."""
    about |= {"inception": judge.inception.sha256, "matmul_precision": "highest"}
    protocols = [
        about | {"reference": Path(reference.path).name, "reference_sha256": reference.sha256}
        for reference in judge.references
    ]
    known = {json.dumps(row["protocol"], sort_keys=True): row for row in read_rows(workdir)}
    keys = [json.dumps(protocol, sort_keys=True) for protocol in protocols]
    if set(keys) <= set(known):
        return [known[key] for key in keys]
    new = {
        key: {"name": _with_reference(name, protocol, judge), **scores, "protocol": protocol}
        for key, scores, protocol in zip(keys, score(), protocols, strict=True)
    }
    if jax.process_index() == 0:
        for row in new.values():
            scores = "  ".join(f"{column} {row[column]:.4g}" for column in _COLUMNS if column in row)
            print(f"{row['name']}: {scores}", flush=True)
        lines = [json.dumps(row) + "\n" for row in {**known, **new}.values()]
        replace_file(workdir / ROWS_FILE, "".join(lines).encode())
    return list(new.values())


def _with_reference(name: str, protocol: Row, judge: Judge) -> str:
    return f"{name}, {protocol['reference']}" if len(judge.references) > 1 else name


def read_rows(workdir: Path) -> list[Row]:
    """Return the rows of eval.jsonl, oldest first.

    Raises:
      BadInput: if a line is no row.
    """
    path = workdir / ROWS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return [{"protocol": {}} | json.loads(line) for line in lines]
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path}: has a line that is no row ({error}); remove the line") from error
