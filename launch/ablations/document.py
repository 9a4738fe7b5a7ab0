"""The document, sentences included, from the results alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

from launch.ablations.analysis import (
    Check,
    Noise,
    Results,
    agreement,
    as_text,
    checks,
    compared,
    disagreements,
    noise_of,
    ranking,
    real_data,
    score,
)
from launch.ablations.plots import save_plot
from launch.ablations.settings import (
    EQUAL_FLOPS,
    GROUPS,
    NUM_STEPS,
    Group,
    Run,
    all_runs,
    make_config,
)
from mf_jax.reporting.run_log import replace_file


def table(group: Group, results: Results) -> list[str]:
    """Return the lines of a group's table, the best of each column in bold."""
    header = (
        "published FID (1-NFE, XL/2)"
        if group.equal_flops
        else "published FID (1-NFE, B/4, 80 epochs)"
    )
    columns = [(header, [setting.published for setting in group.settings], "g", min)]
    if group.equal_flops:
        found = [results.get(setting.run, {}) for setting in group.settings]
        mega = [result["step_flops"] / 1e6 if "step_flops" in result else None for result in found]
        columns.append(("MFLOPs a step", mega, ",.0f", None))
        columns.append(("steps", [result.get("num_steps") for result in found], ",d", None))
    for steps in (1, 2, 8) if group.equal_flops else (1, 2):
        values = [score(results, setting.run, steps) for setting in group.settings]
        prefix = "Fréchet distance, " if steps == 1 else ""
        columns.append((f"{prefix}{steps} step{'s' * (steps > 1)}", values, ".2f", min))
    accuracy = [score(results, setting.run, 1, "class_accuracy") for setting in group.settings]
    columns.append(("class accuracy, 1 step", accuracy, ".1%", max))
    lines = [
        "| setting | " + " | ".join(name for name, *_ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for i, setting in enumerate(group.settings):
        cells = [_cell(values, i, form, best) for _, values, form, best in columns]
        missing = "" if setting.run in results else " (not run)"
        lines.append(f"| {setting.label}{missing} | " + " | ".join(cells) + " |")
    return lines


def _cell(values: Sequence[float | None], i: int, form: str, best: Callable | None) -> str:
    known = [value for value in values if value is not None]
    text = as_text(values[i], form)
    return f"**{text}**" if best and len(known) > 1 and values[i] == best(known) else text


def document(results: Results) -> str:
    """Return the whole document, in Markdown."""
    noise = noise_of(results)
    lines = _introduction(results, noise)
    for group in GROUPS:
        rows = compared(group, results)
        lines += [
            "",
            f"## {group.title}",
            "",
            *_note(group),
            *table(group, results),
            "",
            agreement(rows, noise),
        ]
        if group.equal_flops:
            lines += ["", ranking(group, results, noise)]
        lines += ["", f"![{group.title}](ablations/{group.name}.png)"]
    lines += [
        "",
        "## Where digits do not agree with the paper",
        "",
        *_contradictions(results, noise),
    ]
    return "\n".join(lines) + "\n"


def _introduction(results: Results, noise: Noise) -> list[str]:
    config = make_config(all_runs()[0])
    total = len(all_runs())
    minutes = sum(result["seconds"] for result in results.values()) / 60
    machines = sorted({result["machine"] for result in results.values()})
    diverged = [name for name, result in results.items() if result["diverged"]]
    model, optim, times = config.model, config.optim, config.times
    values = " / ".join(f"{value:.2f}" for value in noise.values)
    spread = (
        f"The baseline with {len(noise.values)} seeds gives {values}, a standard deviation of {noise.deviation:.1%}. "
        f"Two settings whose distances differ by less than a factor of {noise.ratio:.2f} (two standard deviations of "
        "a difference) are called too close to tell apart. With so few seeds this is a rough yardstick, and it is "
        "taken to be the same, in per cent, for every setting."
        if len(noise.values) > 1
        else "The baseline has not been run with several seeds, so nothing here says which differences mean something."
    )
    lines = [
        "# The paper's ablations in miniature",
        "",
        "Written by `bash launch/ablations.sh`, sentences included, from the runs in `runs/ablations`; do not edit. "
        "`bash launch/ablations.sh --document` writes it again without training.",
        "",
        f"- Runs: {len(results)} of {total} finished"
        + (f"; diverged: {', '.join(diverged)}" if diverged else "; none diverged")
        + f". Wall time: {minutes:.0f} minutes for all of them, one after another.",
        *(f"- Machine: {machine}." for machine in machines),
        f"- Data: the 1,797 real 8x8 digits. Network: DiT, {model.depth} blocks of width {model.width}, "
        f"{model.num_heads} heads, patches of {model.patch_size} pixels. Training: {config.train.num_steps:,} steps of "
        f"{config.train.batch_size} rows, adam {optim.lr:g} ({optim.schedule}, {optim.warmup_steps} steps of warm-up), "
        f"average {config.ema.decays[0]}.",
        f"- Baseline: the paper's settings: {1 - config.draws.instant_share:.0%} rows with r < t, tangent (v, 0, 1), "
        f"conditioning on {model.time_conditioning}, {times.name}({times.t_mean:g}, {times.t_std:g}), "
        f"p = {config.weight.p:g}, no guidance, {config.draws.label_drop_share:.0%} of the labels dropped. Each table "
        "but that of the objectives changes one of them.",
        "- Score: the Fréchet distance of 2,000 samples to the training images, in the features of a small classifier "
        f"(the smaller the better; held-out real images score {as_text(real_data(results))}), and the share of "
        "samples in their class, which the average picture of a class passes too, so that it counts only with a small "
        "distance. Best in bold.",
        "- Published: MeanFlow (arXiv 2505.13447), table 1: FID of one step, ImageNet 256x256, DiT-B/4, 80 epochs. "
        "The numbers themselves cannot be compared with ours; the order of settings can.",
        f"- Noise: every setting is one run with one seed. {spread}",
        "",
        "## What must fail",
        "",
        "Only the total derivative in t, tangent (v, 0, 1), makes the identity true, and without rows with r < t the "
        "network is never taught a long step. The other tangents and that share must fail visibly at one step:",
        "",
    ]
    found = checks(results)
    lines += [f"- {'passed' if check.passed else '**FAILED**'}: {check.text}" for check in found]
    return lines if found else [*lines, "Not checked: the baseline or these runs are not finished."]


def _note(group: Group) -> list[str]:
    """Return what a reader of a group's table has to know, and an empty line."""
    if not group.equal_flops:
        return []
    config = make_config(Run("", EQUAL_FLOPS))
    times, draws = config.times, config.draws
    return [
        f"Recipe of all rows: that of configs/digits.py, which leans towards long intervals: logit t ~ "
        f"N({times.t_mean:g}, {times.t_std:g}), logit r ~ N({times.r_mean:g}, {times.r_std:g}), "
        f"{draws.instant_share:.0%} of the rows with r = t, p = {config.weight.p:g}, no labels dropped. Flow matching "
        "has r = t in all rows, Shortcut takes dyadic times, consistency r = 0. alpha-Flow's and SoFlow's curricula "
        "last the whole run. SplitMeanFlow, Shortcut and terminal velocity are also run with p = 0: the target of "
        "their rows with r < t comes from the network alone, so that their error can be small while the network is "
        "wrong, and the adaptive weight raises the weight of a small error. Terminal velocity matching fixes dX/dr, "
        "and X by it only where r is drawn all the way from t down: it is also run with uniform times. The last two "
        "rows are on the in-context "
        "transformer of improved MeanFlow, of the same depth and width (a head of 1 block for each output), whose "
        "class and time tokens make the sequence several times as long as the 4 patches, and its steps as much dearer: "
        "read these two rows beside their number of steps. All others share the DiT.",
        "",
        f"FLOPs: the same for all rows, those of {NUM_STEPS:,} steps of MeanFlow, as XLA counts them in each compiled "
        "training step; the schedule of the learning rate shrinks with the number of steps. alpha-Flow's step holds "
        "both of its forms under a condition, of which XLA counts the dearer one, which is what a step executes at "
        "most.",
        "",
        "Published, where there is a figure: one step, ImageNet 256x256, guided, XL/2 networks, each with its "
        "authors' recipe; improved MeanFlow's is its objective alone on MeanFlow's network (with its own network and "
        "640 epochs it has 1.72). They are not at equal FLOPs.",
        "",
    ]


def _contradictions(results: Results, noise: Noise) -> list[str]:
    rows = {group.title: compared(group, results) for group in GROUPS}
    found = {title: disagreements(pairs, noise) for title, pairs in rows.items() if len(pairs) > 1}
    lines = [f"- **{title}**: {text}." for title, text in found.items() if text]
    rest = [title for title, text in found.items() if not text]
    if lines:
        lines = [
            "Pairs of settings in the opposite order, by more than the seed explains:",
            "",
            *lines,
            "",
        ]
    if rest:
        lines.append(
            "No pair of settings is in the opposite order by more than the seed explains in: "
        )
        lines[-1] += "; ".join(rest) + "."
    return lines or ["Too few settings are finished to compare."]


def write_document(results: Results, path: Path, pictures: Path) -> list[Check]:
    """Write the document and its pictures, and return the checks that failed."""
    pictures.mkdir(parents=True, exist_ok=True)
    for group in GROUPS:
        save_plot(pictures / f"{group.name}.png", group, results)
    replace_file(path, document(results).encode())
    return [check for check in checks(results) if not check.passed]
