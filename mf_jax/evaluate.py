"""--mode=eval: for each cell of the grid load the model, sample, score, and write a row.

With `eval.references` pictures are compared with reference statistics, in the features of
Inception-v3. Without, samples are compared with the data, and the first row scores real data. Each
row of eval.jsonl carries its whole protocol; eval.json is a table of such rows. A stored row is not
computed again, so that a stopped job goes on and one that watches a run scores new checkpoints.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mf_jax.data import Source, in_turn, make_source, read
from mf_jax.data.pixels import QUANTISATION
from mf_jax.flow.errors import BadInput, left_out
from mf_jax.generator import Generator, load_decoder
from mf_jax.loading import holds_run, load_initial, load_run, weights_sha256
from mf_jax.reporting.page import write_report
from mf_jax.reporting.sample_grid import save_sample_grid
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.checkpoint import UnreadableCheckpoint, fingerprint, saved_steps
from mf_jax.runtime.files import sha256_of
from mf_jax.runtime.json_files import write_json
from mf_jax.scoring import rows as score_rows
from mf_jax.scoring import scorers
from mf_jax.scoring.diagnose import diagnose
from mf_jax.scoring.rows import NEWEST, Cell, Row, cells, in_shares
from mf_jax.scoring.scorers import Samples, Scorer
from mf_jax.validation import own_parts, validate

PICTURES = "eval_samples"
_NUM_SHOWN = 64
_POLL_SECONDS = 30


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Append to eval.jsonl what `eval` asks for, write the table `eval.json`, and print it."""
    section, data = config.eval, None
    with processes.together():
        _check(config)
        if section.samples:
            run_folder.make(workdir)
        elif not section.watch:
            _check_workdir(config, workdir)
        scorer = scorers.scorer_of_references(config)
        if scorer is None:
            data = validate(config, num_devices=1)
            if run_folder.exists(workdir):
                run_folder.check_data(workdir, data)
            held_out = make_source(config.data, split="held_out")
            scorer, real = scorers.scorer_of_data(config, workdir, data, held_out)
        elif section.labels == "data":  # which are not there
            section.labels = "balanced"
    evaluation = Evaluation(config, workdir, scorer, data)
    if section.samples:
        rows = evaluation.score(*scorers.samples_of_file(config))
    elif section.watch:
        rows = evaluation.watch()
    else:
        rows = evaluation.score_grid(evaluation.steps())  # first: a model may be refused
        rows = [*(evaluation.score(*real) if data else ()), *rows]
    if not processes.is_first():  # which alone has all scores
        return
    table = score_rows.as_table(rows)
    write_json(workdir / "eval.json", table, indent=1)
    write_report(workdir)
    score_rows.show(table)
    places = {"table": "eval.json", "rows": score_rows.ROWS_FILE, "pictures": PICTURES}
    run_folder.tell(workdir, **places, report="report.html")


def _check(config: ConfigDict) -> None:
    cells(config)
    section = config.eval
    if section.watch and (section.samples or section.checkpoints):
        raise BadInput("eval.watch=True: is of a run; leave eval.samples and eval.checkpoints out")
    needs_references = section.samples or section.watch or config.data.name == "latents"
    if needs_references and not section.references:
        what = "eval.samples, eval.watch and latents are compared with statistics"
        raise BadInput(f"eval.references=(): {what}; name at least one .npz")


def _check_workdir(config: ConfigDict, workdir: epath.Path) -> None:
    """Raise BadInput unless a workdir holds the run of a config, or `init` names weights."""
    if not holds_run(workdir, config):
        if config.eval.checkpoints:
            raise BadInput("eval.checkpoints: init.path names one model; use (), or init.which")
        if tuple(config.eval.emas) != ("",):  # as a row has them for its own runs
            print(f"eval.emas={config.eval.emas}: of a run; init.path names one model")
            config.eval.emas = ("",)
    run_folder.make(workdir)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One command's evaluation.

    data: the training split, for diagnostics; None where models are compared with references.
    """

    config: ConfigDict
    workdir: epath.Path
    scorer: Scorer
    data: Source | None

    @property
    def is_run(self) -> bool:
        """Whether the workdir holds a run; else `init` names the model."""
        return run_folder.exists(self.workdir)

    def steps(self) -> list[int]:
        """Return the steps of the run's checkpoints, oldest first, as process 0 sees them."""
        return processes.from_first(saved_steps(self.workdir) if self.is_run else [])

    def score(
        self, subject: Row, draw: Callable[[], Samples], diagnose: Callable[[], Row] = dict
    ) -> list[Row]:
        """Return the rows of some samples; those that eval.jsonl lacks are computed and appended.

        The subject is the part of the protocol that decides the samples; diagnose adds entries.
        """
        protocols = [subject | own for own in self.scorer.protocols]
        # another job may add rows meanwhile: all processes go by what the first has read
        stored = processes.from_first(score_rows.read_rows(self.workdir))
        known = {score_rows.key_of(row["protocol"]): row for row in stored}
        keys = [score_rows.key_of(protocol) for protocol in protocols]
        if set(keys) <= set(known):
            return [known[key] for key in keys]
        compare, more, rows = self.scorer.gather(draw()), diagnose(), []
        with processes.together():
            if processes.is_first():
                named = {"name": score_rows.name_of(subject)}
                for scores, protocol in zip(compare(), protocols, strict=True):
                    rows.append(named | scores | more | {"protocol": protocol})
                score_rows.append(self.workdir, rows)
                for row in rows:
                    print(f"{row['name']}: {score_rows.words_of(row)}", flush=True)
        return rows

    def score_grid(self, steps: list[int]) -> list[Row]:
        """Return the rows of all cells, the newest of these checkpoints by its step."""
        if self.is_run and not steps:
            raise BadInput(f"--workdir={self.workdir}: holds no checkpoint; train first")
        newest = {"checkpoint": steps[-1]} if self.is_run else {"checkpoint": 0, "ema": "init"}
        # cells of one model are neighbours
        load = functools.lru_cache(1)(self._load)
        diagnose = functools.lru_cache(1)(lambda *model: self._diagnose(load(*model)))
        rows = []
        for cell in cells(self.config):
            cell = dataclasses.replace(cell, **newest) if cell.checkpoint == NEWEST else cell
            model = functools.partial(load, cell.checkpoint, cell.ema)
            rows += self.score(
                self._protocol(cell, model),
                functools.partial(self._draw, cell, model),
                functools.partial(diagnose, *model.args),
            )
        return rows

    def watch(self) -> list[Row]:
        """Score all checkpoints, the newest first, until the run's last step is scored."""
        if not self.is_run:
            print(f"waiting for a run in {self.workdir}", flush=True)
        while not processes.from_first(self.is_run):
            time.sleep(_POLL_SECONDS)
        with processes.together():
            _check_workdir(self.config, self.workdir)
        tries: dict[int, int] = {}  # of each checkpoint seen: after two it is done with
        while True:
            steps = self.steps()
            for step in sorted(step for step in set(tries) - set(steps) if tries[step] < 2):
                print(f"checkpoint {step} is left out: the run has dropped it", flush=True)
            tries = {step: num for step, num in tries.items() if step in steps}  # it may come back
            left = [step for step in steps if tries.setdefault(step, 0) < 2]
            last = run_folder.stored_config(self.workdir).train.num_steps  # which may be raised
            last = processes.from_first(last)
            if not left and steps and steps[-1] >= last:
                return score_rows.read_rows(self.workdir)
            # one that cannot be read is tried again, last: it may be damaged, or not all here yet
            step = max(left, key=lambda step: (-tries[step], step), default=None)
            if step is None or tries[step]:
                time.sleep(_POLL_SECONDS)
            if step is None:
                continue
            tries[step] += 1
            try:
                self.score_grid([step])
                tries[step] = 2
            except UnreadableCheckpoint as problem:
                if tries[step] == 2:
                    print(f"checkpoint {step} is left out: {problem}", flush=True)

    def _load(self, checkpoint: int, ema: str) -> Generator:
        if ema == "init":
            generator = load_initial(self.config)
        else:
            generator = load_run(self.workdir, self.config, ema, checkpoint)
        spec, data = generator.spec, self.data and self.data.spec
        ours = spec.shape, spec.num_classes
        if data and ours != (data.shape, data.num_classes):
            problem = f"its shape and classes are {ours}, not {data.shape, data.num_classes}"
            raise BadInput(f"init.path={generator.ema}: {problem}: use its own config")
        return generator

    def _protocol(self, cell: Cell, model: Callable[[], Generator]) -> Row:
        """Return whatever decides the samples of a cell."""
        config = self.config
        with processes.together():
            spec = run_folder.stored_data(self.workdir) if self.is_run else model().spec
            decoder = load_decoder(config, origin=spec.origin if self.is_run else "")
        if self.is_run:
            weights = fingerprint(self.workdir, cell.checkpoint)
        else:
            weights = score_rows.digest(*map(np.asarray, jax.tree.leaves(model().params)))
        deciding = {section: config[section].to_dict() for section in ("model", "objective")}
        if not self.is_run:  # which keeps them
            deciding |= {key: config[key].to_dict() for key in ("times", "draws", "coupling")}
            deciding |= {"shape": list(spec.shape)}
        deciding |= {key: sha256_of(epath.Path(file)) for key, file in own_parts(config).items()}
        if decoder:
            deciding |= {key: list(config.data[key]) for key in ("latent_mean", "latent_std")}
        return cell.protocol | {
            "weights": weights,
            "config": score_rows.digest(score_rows.key_of(deciding).encode()),
            "num_samples": config.eval.num_samples,
            "labels": "of rows" if spec.more else config.eval.labels,
            "network_dtype": config.model.dtype,
            "autoencoder": decoder.autoencoder.sha256 if decoder else "none",
            "quantisation": QUANTISATION,
        }

    def _draw(self, cell: Cell, model: Callable[[], Generator]) -> Samples:
        section, generator, name = self.config.eval, model(), score_rows.name_of(cell.protocol)
        spec, num, given, targets = generator.spec, section.num_samples, {}, None
        labels = generator.labels_for(None, num)  # exactly balanced
        if spec.more:
            rows = in_turn(make_source(self.config.data, split="held_out"), num)
            labels, given = rows.labels, generator.given_for(rows.more)
            targets = rows.x if spec.has_pairs else None
        elif spec.num_classes and section.labels == "random":
            draws = np.random.default_rng(section.seed)
            labels = draws.integers(spec.num_classes, size=num, dtype=np.int32)
        elif spec.num_classes and section.labels == "data":
            held_out = read(make_source(self.config.data, split="held_out"))
            labels = in_shares(held_out.labels, num, section.seed)
        batches = generator.batches(labels, cell.plan, given)
        if spec.is_picture:
            file = re.sub("[^a-zA-Z0-9.]+", "_", name).strip("_")
            path = self.workdir / PICTURES / f"{file}.png"
            batches = _pictures(batches, labels, generator, path, generator.caption(cell.plan))
        return Samples(name, batches, labels, cell.plan.batch_size, targets)

    def _diagnose(self, generator: Generator) -> Row:
        row = {} if self.is_run else {"init_sha256": weights_sha256(self.config)}
        if self.data is None:
            return row
        model = generator.network, generator.params
        return row | {"diagnostics": diagnose(self.config, *model, self.data)}


def _pictures(
    batches: Iterator, labels: np.ndarray, generator: Generator, path: epath.Path, caption: str
) -> Iterator:
    """Yield samples as bytes, and draw the first ones."""
    for x, index in batches:
        pixels = generator.pixels(x)
        if index[0] == 0:
            shown = processes.on_host(pixels)[: min(_NUM_SHOWN, len(labels))]
            with left_out(f"{PICTURES}/{path.name}"):
                if processes.is_first():
                    path.parent.mkdir(exist_ok=True)
                    names = generator.spec.class_names
                    save_sample_grid(path, shown, labels[: len(shown)], names, caption=caption)
        yield pixels, index
