"""Perceptual terms: how far a predicted picture is from the data for networks that see pictures.

1. The prediction is x_hat = z - t u, with u of the loss's own forward pass.
2. Both pictures are cropped alike, with one box for each row, drawn before.
3. A distance d of a row adds factor * w(d) d, with the objective's adaptive weight w, if t < max_t.

Rows beyond max_t are sorted to the end, and batches of nothing else are not computed. A batch's
distances come with their gradient, so that no activation outlives the batch.

FLOPs: 3 evaluations of each network for a row below max_t: both pictures, and the gradient. LPIPS
takes 30 GFLOP for a picture of 224 x 224, ConvNeXt V2 Base 32; both take 184 GFLOP a row.

Source: pixel MeanFlow, arXiv 2601.22158.
"""

import dataclasses
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from mf_jax.flow.errors import BadInput, check_fields, check_within
from mf_jax.flow.paths import Scalars, per_row
from mf_jax.flow.records import Draws
from mf_jax.flow.rows import join_rows, point_of
from mf_jax.objectives import terms

Image = Float[Array, "b h w c"]


@flax.struct.dataclass
class Distance:
    """A distance of pairs of pictures: `between(params, a, b)`, with a gradient in a."""

    params: PyTree
    name: str = flax.struct.field(pytree_node=False)
    factor: float = flax.struct.field(pytree_node=False)
    between: Callable[..., Scalars] = flax.struct.field(pytree_node=False)

    def __post_init__(self) -> None:
        check_within(f"perceptual.{self.name}", self.factor, "(0, inf)", "0 = off")


@flax.struct.dataclass
class Perceptual:
    """Perceptual terms of a loss, for rows with t < max_t; none by default.

    The networks see crops of crop_size pixels. How many rows_at_once does not change the numbers.
    """

    distances: tuple[Distance, ...] = ()
    max_t: float = flax.struct.field(pytree_node=False, default=1.0)
    crop_size: int = flax.struct.field(pytree_node=False, default=224)
    rows_at_once: int = flax.struct.field(pytree_node=False, default=32)

    def __post_init__(self) -> None:
        allowed = {"max_t": "[0, 1]", "crop_size": "[32, inf)", "rows_at_once": "[1, inf)"}
        check_fields("perceptual", self, **allowed)

    def loss(
        self, draws: Draws, u: Sequence[Float[Array, "_ ..."]], weight: terms.AdaptiveWeight
    ) -> terms.Loss:
        """Return the mean of the weighted terms over all rows, and the distances as metrics."""
        if draws.instant.box is None:
            raise BadInput("perceptual: the draws have no boxes; use DrawScheme(crops=True)")
        parts = [draws.instant, draws.interval]
        pairs = zip(u, parts, strict=True)
        x_hat = join_rows([point_of(rows) - per_row(rows.t, u) * u for u, rows in pairs])
        rows = join_rows(parts)
        distances = self._apart(x_hat, rows.x, rows.box, rows.t)
        loss, metrics = jnp.zeros(()), {}
        weight = dataclasses.replace(weight, of="sum", of_interval=0.0)
        for distance, d in zip(self.distances, distances, strict=True):
            loss += distance.factor * jnp.mean(weight(d, draws.instant))
            metrics[distance.name] = terms.average(d)
        return loss, metrics

    def _apart(self, x_hat: Image, x: Image, box: Int[Array, "b 4"], t: Scalars) -> list[Scalars]:
        """Return each distance of each row, 0 beyond max_t, with a gradient in x_hat."""
        still = jax.lax.stop_gradient(x_hat)
        counts = t < self.max_t
        order = jnp.argsort(~counts)  # stable
        size = min(self.rows_at_once, len(t))
        batches = jnp.pad(order, (0, -len(t) % size), mode="edge").reshape(-1, size)

        def compute(rows: Int[Array, "k"]) -> list[tuple[Scalars, Image]]:
            seen, to_x_hat = jax.vjp(lambda a: crop(a, box[rows], self.crop_size), still[rows])
            real, found = crop(x[rows], box[rows], self.crop_size), []
            for distance in self.distances:
                d, to_seen = jax.vjp(lambda a, by=distance: by.between(by.params, a, real), seen)
                (slope,) = to_x_hat(*to_seen(jnp.ones_like(d)))
                shown = per_row(counts[rows], slope)
                found.append((jnp.where(counts[rows], d, 0), jnp.where(shown, slope, 0)))
            return found

        def none(rows: Int[Array, "k"]) -> list[tuple[Scalars, Image]]:
            return jax.tree.map(jnp.zeros_like, jax.eval_shape(compute, rows))

        def one(rows: Int[Array, "k"]) -> list[tuple[Scalars, Image]]:
            return jax.lax.cond(counts[rows].any(), compute, none, rows)

        found = jax.lax.map(one, batches) if len(batches) > 1 else compute(batches[0])
        back = jnp.argsort(order)
        rows = [(d.reshape(-1)[back], slope.reshape(-1, *x.shape[1:])[back]) for d, slope in found]
        moved = jnp.where(per_row(counts, x), x_hat - still, 0)  # 0, but for its gradient
        return [d + jnp.sum(slope * moved, axis=(1, 2, 3)) for d, slope in rows]


def crop(
    images: Float[Array, "b h w c"], boxes: Int[Array, "b 4"], side: int
) -> Float[Array, "b side side c"]:
    """Resize the box of each picture to a square, cubic (Keys 1981) and antialiased.

    The kernel reads beyond the box. At the edge of the picture its weights are made to sum to 1.
    """

    def one(image: Float[Array, "h w c"], box: Int[Array, "4"]) -> Float[Array, "side side c"]:
        scale = side / box[2:]
        shape = (side, side, image.shape[-1])
        return jax.image.scale_and_translate(
            image, shape, (0, 1), scale, -box[:2] * scale, method="cubic", antialias=True
        )

    return jax.vmap(one)(images, boxes)
