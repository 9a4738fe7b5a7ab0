"""What the tables of configs share: how a row becomes a config, and the settings of methods."""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from mf_jax.flow.errors import check_known

Settings = Mapping[str, Mapping[str, Any]]


def join(*many: Settings) -> Settings:
    """Return settings, by section, in which later ones replace earlier ones."""
    joined: dict[str, Any] = {}
    for settings in many:
        joined |= {name: {**joined.get(name, {}), **keys} for name, keys in settings.items()}
    return joined


def table(
    file: str, base: Callable[[], ConfigDict], shared: Settings, rows: Mapping[str, Settings]
) -> Callable[..., ConfigDict]:
    """Return a file's `get_config`: a base, with the settings that its rows share and a row's."""

    def get_config(row: str = "") -> ConfigDict:
        if row not in rows:
            check_known(f"--config={file}:ROW, ROW", row, filter(None, rows))
        config = base()
        config.update(join(shared, rows[row]))
        return config

    return get_config


def soflow(num_steps: int) -> Settings:
    """Return the settings of SoFlow: alpha-Flow from 0.1 to 0.002, without derivative.

    Source: SoFlow, arXiv 2512.15657.
    """
    alpha = dict(annealing="exponential", alpha_start=0.1, alpha_end=0.002, anneal_to=num_steps)
    return dict(objective=dict(name="alpha_flow", derivative_below=0.0, **alpha))


def soflow_as_published(num_steps: int) -> Settings:
    """Return `soflow` with what all recipes of its published code share, and its paper leaves out.

    Errors are means over a row's numbers, the times of a pair never change places, and the gradient
    of rows with r < t counts half.
    """
    own = dict(
        objective=dict(target_clip=float("inf"), interval_factor=0.5, min_gap=1e-4),
        weight=dict(of="mean"),
        times=dict(order="clip", min_gap=1e-4),
        sample=dict(renoise=True),
        eval=dict(renoise=True),
    )
    return join(soflow(num_steps), own)


def shortcut(levels: int) -> Settings:
    """Return the settings of Shortcut models whose smallest step is 2^-levels.

    One row in eight learns from the averaged network, all others from the data at that step.

    Source: Shortcut models, arXiv 2410.12557, and their published code.
    """
    return dict(
        model=dict(time_conditioning="t,log2"),
        objective=dict(name="shortcut"),
        times=dict(name="dyadic", levels=levels),
        instant_times=dict(name="grid"),
        draws=dict(instant_share=0.875),
        weight=dict(p=0.0, of="mean"),
    )
