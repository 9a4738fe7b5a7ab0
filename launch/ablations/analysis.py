"""What the finished runs say: scores, what the seed alone explains, agreement with the paper, what must fail.

A score is a number, infinite where the run diverged; runs that are not finished have no result, and their settings no
score.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from launch.ablations.runs import finished
from launch.ablations.settings import BASELINE, SEEDS, Group, all_runs
from mf_jax.errors import BadInput

Results = Mapping[str, Mapping[str, Any]]
"""Name of a run -> its `result.json`."""


def read_results(folder: Path) -> Results:
    """Return the results of all finished runs.

    Raises:
      BadInput: if a result is of another config than the table's, or no run is finished.
    """
    found = {run.name: finished(run, folder) for run in all_runs()}
    results = {name: result for name, result in found.items() if result is not None}
    if not results:
        raise BadInput(
            f"{folder} holds no finished run; run launch/ablations.sh without --document first"
        )
    return results


def score(
    results: Results, run: str, steps: int = 1, column: str = "frechet_distance"
) -> float | None:
    """Return a score of a run's samples; None where the run is not finished or the score was not computed."""
    result = results.get(run)
    if result is None:
        return None
    if result["diverged"]:
        return math.inf if column == "frechet_distance" else None
    return next((row[column] for row in result["rows"] if row.get("steps") == steps), None)


def real_data(results: Results) -> float | None:
    """Return the Fréchet distance of held-out real data, or None where no run has been evaluated."""
    rows = (row for result in results.values() for row in result["rows"] if "steps" not in row)
    return next((row["frechet_distance"] for row in rows), None)


@dataclasses.dataclass(frozen=True)
class Noise:
    """How much the Fréchet distance at one step moves with the seed alone.

    values: of runs that differ in their seed, finite.
    """

    values: tuple[float, ...]

    @property
    def deviation(self) -> float:
        """The standard deviation of the logarithm of a distance, i.e. the relative one of a distance."""
        return float(np.std(np.log(self.values), ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def ratio(self) -> float:
        """Two distances closer than by this factor are not told apart: two deviations of their difference."""
        return math.exp(2 * math.sqrt(2) * self.deviation)

    def tells_apart(self, a: float, b: float) -> bool:
        """Return whether two distances, perhaps infinite, differ by more than the seed explains."""
        return a != b and (math.isinf(a) or math.isinf(b) or max(a, b) > self.ratio * min(a, b))


def noise_of(results: Results) -> Noise:
    """Return the noise that the repeated baseline shows."""
    values = (score(results, run) for run in SEEDS)
    return Noise(tuple(value for value in values if value is not None and math.isfinite(value)))


Compared = Sequence[tuple[str, float, float]]
"""Settings with both figures: (label, published, ours)."""


def compared(group: Group, results: Results) -> Compared:
    """Return the settings of a group that have a published figure and one of ours."""
    pairs = (
        (setting.label, setting.published, score(results, setting.run))
        for setting in group.settings
    )
    return [
        (label, theirs, ours)
        for label, theirs, ours in pairs
        if theirs is not None and ours is not None
    ]


def _best(rows: Compared, column: int) -> str:
    return min(rows, key=lambda row: row[column])[0]


def as_text(value: float | None, form: str = ".2f") -> str:
    if value is None:
        return "–"
    return format(value, form) if math.isfinite(value) else "diverged"


def pairs_of(rows: Compared, noise: Noise) -> tuple[int, list[tuple], int]:
    """Compare the order of every two settings with the published one.

    Returns:
      (number of pairs in the published order, pairs (better here, worse here) in the other order, number of pairs that
      the noise does not tell apart).
    """
    same, reversed_pairs, unclear = 0, [], 0
    for a, b in itertools.combinations(rows, 2):
        better, worse = sorted((a, b), key=lambda row: row[2])
        if not noise.tells_apart(a[2], b[2]):
            unclear += 1
        elif better[1] > worse[1]:
            reversed_pairs.append((better, worse))
        else:
            same += 1
    return same, reversed_pairs, unclear


def agreement(rows: Compared, noise: Noise) -> str:
    """Return sentences about how a group's order agrees with the published one."""
    if len(rows) < 2:
        return "Too few settings are finished to compare."
    here, published = _best(rows, 2), _best(rows, 1)
    value = {label: ours for label, _, ours in rows}
    if here == published:
        first = f"The best setting is the published one, {here}."
    else:
        clear = noise.tells_apart(value[here], value[published])
        how = "by more than the seed explains" if clear else "by no more than the seed explains"
        first = (
            f"The best setting here is {here} ({as_text(value[here])}), the published best is {published} "
            f"({as_text(value[published])} here): they differ {how}."
        )
    same, reversed_pairs, unclear = pairs_of(rows, noise)
    second = (
        f"Pairs of settings: {same} in the published order, {len(reversed_pairs)} in the opposite one, {unclear} too "
        "close to tell apart here."
    )
    theirs, ours = ([row[column] for row in rows] for column in (1, 2))
    if len(rows) < 3 or len(set(theirs)) == 1 or len(set(ours)) == 1:
        return f"{first} {second}"
    correlation = spearmanr(theirs, ours).statistic
    return (
        f"{first} {second} Rank correlation (Spearman) {correlation:.2f} over {len(rows)} settings."
    )


def disagreements(rows: Compared, noise: Noise) -> str:
    """Return what in a group contradicts the published order by more than the noise; "" if nothing does."""
    _, reversed_pairs, _ = pairs_of(rows, noise)
    return "; ".join(
        f"{better[0]} beats {worse[0]} ({as_text(better[2])} to {as_text(worse[2])}; published {better[1]:g} to "
        f"{worse[1]:g})"
        for better, worse in reversed_pairs
    )


def ranking(group: Group, results: Results, noise: Noise) -> str:
    """Return a group's settings in the order of their distance at one step, and which may share the first place."""
    known = [(score(results, setting.run), setting.label) for setting in group.settings]
    order = sorted(pair for pair in known if pair[0] is not None)
    if not order:
        return "No setting is finished."
    text = ", ".join(f"{label} ({as_text(value)})" for value, label in order)
    close = [label for value, label in order[1:] if not noise.tells_apart(order[0][0], value)]
    last = f" Too close to the first to tell apart: {', '.join(close)}." if close else ""
    return f"Order here, at one step: {text}.{last}"


VISIBLY = 2.0
"""A setting that must fail has at least this many times the baseline's distance at one step."""
MUST_FAIL = {
    "tangent_v00": "tangent (v, 0, 0)",
    "tangent_v10": "tangent (v, 1, 0)",
    "tangent_v11": "tangent (v, 1, 1)",
    "share_0": "no rows with r < t",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """What was expected of a run, in words, and whether it holds."""

    text: str
    passed: bool


def checks(results: Results) -> list[Check]:
    """Return the checks of the runs that are finished: what must fail fails visibly at one step."""
    baseline = score(results, BASELINE)
    if baseline is None:
        return []
    found = []
    for run, what in MUST_FAIL.items():
        value = score(results, run)
        if value is not None:
            passed = math.isfinite(baseline) and value >= VISIBLY * baseline
            text = (
                f"{what}: {as_text(value)} at one step is {'' if passed else 'not '}at least {VISIBLY:g} times "
                f"the baseline's {as_text(baseline)}"
            )
            found.append(Check(text, passed))
    return found
