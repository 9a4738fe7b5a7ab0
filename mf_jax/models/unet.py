"""The U-Net of the one-step CIFAR-10 results: DDPM++, 55,929,347 parameters as it comes.

With labels of EDM's augmentation it has 3,072 more. Its blocks have the places of the published
code in their names, e.g. `encoder_16x16_block0`; in0 and in1 are the middle.

Source: score SDE, arXiv 2011.13456, appendix H (DDPM++), in the form of EDM, arXiv 2206.00364,
table 7; as used by MeanFlow, arXiv 2505.13447, appendix A.
"""

import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from mf_jax.flow.draws import key_of
from mf_jax.flow.errors import BadInput, check_known
from mf_jax.flow.paths import Points
from mf_jax.flow.records import Condition, Prediction
from mf_jax.models import layers
from mf_jax.models.attention import attend
from mf_jax.models.layers import LONGEST_PERIOD, TIME_CONDITIONINGS, Image, Network, Time, Vectors

_XAVIER = nn.initializers.xavier_uniform()
_conv = functools.partial(nn.Conv, kernel_init=_XAVIER)
Seeds = UInt32[Array, "b"]
_RESIDUAL_SCALE = 0.5**0.5
"""Multiplies the sum of a block's input and output, which so keeps its variance."""


def _norm(x: Image, name: str) -> Image:
    """Apply GroupNorm in float32: 32 groups, or fewer so that each has 4 channels or more."""
    channels = x.shape[-1]
    most = max(1, min(32, channels // 4))
    num_groups = max(groups for groups in range(1, most + 1) if channels % groups == 0)
    norm = nn.GroupNorm(num_groups, epsilon=1e-6, use_fast_variance=False, name=name)
    return norm(layers.at_least_float32(x))


def _shifted(x: Image, axis: int, count: int, *, stride: int = 1) -> list[Array]:
    """Return every stride-th number of x from places -1, 0, 1, ... on, zeros beyond its ends."""
    padded = jnp.pad(x, [(int(i == axis),) * 2 for i in range(x.ndim)])
    length = x.shape[axis] - stride + 1
    return [jax.lax.slice_in_dim(padded, k, k + length, stride, axis) for k in range(count)]


def halve(x: Image) -> Float[Array, "b h2 w2 c"]:
    """Filter with [1, 3, 3, 1] in both directions and keep every other pixel."""
    for axis in (1, 2):
        first, second, third, last = _shifted(x, axis, 4, stride=2)
        x = (first + 3 * (second + third) + last) / 8
    return x


def double(x: Image) -> Float[Array, "b h2 w2 c"]:
    """Put zeros between the pixels and filter with [1, 3, 3, 1] in both directions."""
    for axis in (1, 2):
        before, own, after = _shifted(x, axis, 3)
        pairs = jnp.stack([before + 3 * own, 3 * own + after], axis=axis + 1) / 4
        x = pairs.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    return x


def drop_out(x: Points, seeds: Seeds | None, *, layer: int, rate: float) -> Points:
    """Set a share of the numbers to zero and divide the others by the remaining share.

    The mask depends on a row's seed and the layer's number alone. Within a training step the
    network thus stays one function of (z, r, t).
    """
    if seeds is None or rate == 0:
        return x

    def keep(seed: Array) -> Array:
        key = jax.random.fold_in(key_of(seed), layer)
        return jax.random.bernoulli(key, 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep)(seeds), x / (1 - rate), 0)


class Block(nn.Module):
    """One residual block that may resample its input (`halve`, `double`) and attend to pixels."""

    features: int
    layer: int  # its number, for its dropout mask
    dropout: float
    dtype: str
    resample: Callable | None = None
    attention: bool = False

    @nn.compact
    def __call__(self, x: Image, c: Vectors, seeds: Seeds | None) -> Float[Array, "b h2 w2 f"]:
        conv = functools.partial(_conv, self.features, dtype=self.dtype)
        resample = self.resample or (lambda x: x)
        hidden = conv((3, 3), name="conv_1")(resample(nn.silu(_norm(x, "norm_1"))))
        shift = layers.xavier_dense(self.features, dtype=self.dtype, name="condition")(c)
        hidden = nn.silu(_norm(hidden + shift[:, None, None], "norm_2"))
        hidden = drop_out(hidden, seeds, layer=self.layer, rate=self.dropout)
        hidden = conv((3, 3), name="conv_2", kernel_init=nn.initializers.zeros)(hidden)
        if self.resample or x.shape[-1] != self.features:
            x = conv((1, 1), name="shortcut")(resample(x))
        x = _RESIDUAL_SCALE * (x + hidden)
        if self.attention:
            pixels = _norm(x, "norm_3").reshape(x.shape[0], -1, self.features)
            plain, out = functools.partial(attend, kind="plain"), layers.zero_dense
            attention = layers.Attention(1, self.dtype, plain, out=out, name="attention")
            x = _RESIDUAL_SCALE * (x + attention(pixels).reshape(x.shape))
        return x


class _Embedding(nn.Module):
    """Embed times side by side, and labels of augmentation and class in the same features."""

    channels: int
    time_conditioning: str
    num_classes: int
    augment_labels: int

    @nn.compact
    def __call__(self, *, r: Time, t: Time, condition: Condition) -> Vectors:
        check_known("model.time_conditioning", self.time_conditioning, TIME_CONDITIONINGS)
        times = {"t": t, "r": r, "t-r": t - r}
        told = [times[name] for name in self.time_conditioning.split(",")]
        frequencies = LONGEST_PERIOD ** -np.linspace(0, 1, self.channels, dtype=np.float32)
        angles = [layers.at_least_float32(time)[:, None] * frequencies for time in told]
        waves = [wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)]
        features = jnp.concatenate(waves, axis=-1)
        width = features.shape[-1]
        if self.augment_labels:
            labels = condition.augment
            labels = jnp.zeros((*t.shape, self.augment_labels)) if labels is None else labels
            features += nn.Dense(width, use_bias=False, kernel_init=_XAVIER, name="augment")(labels)
        if self.num_classes:
            made = {"init": nn.initializers.normal(0.2), "name": "label_embedding"}
            features += layers.embed_class(condition.labels, self.num_classes, width, **made)
        for name in ("hidden", "out"):
            dense = nn.Dense(4 * self.channels, kernel_init=_XAVIER, name=name)
            features = nn.silu(dense(features))
        return features


class UNet(Network, kw_only=True):
    """Predict u(z, r, t) of images."""

    channels: int = 128  # of the first convolution; the unit of a level's channels
    channel_multipliers: tuple[int, ...] = (2, 2, 2)  # every level after the first halves the image
    num_blocks: int = 4  # residual ones of a level on the way down; one more on the way up
    attention_resolutions: tuple[int, ...] = (16,)  # heights of levels with it; the middle has it
    dropout: float = 0.0  # rate, in [0, 1), where the condition has seeds for it
    augment_labels: int = 0  # numbers that tell a row's augmentation; 0 = told none
    time_conditioning: str = "t,t-r"

    @nn.compact
    def __call__(self, z: Image, *, r: Time, t: Time, condition: Condition) -> Prediction:
        factor = 2 ** (len(self.channel_multipliers) - 1)
        if not self.channel_multipliers or any(side % factor for side in z.shape[1:3]):
            told = f"model.channel_multipliers={tuple(self.channel_multipliers)}"
            needed = f"need 1 level or more, and a size divisible by {factor}"
            raise BadInput(f"{told}: {needed}, not {z.shape[1]}x{z.shape[2]}; use fewer")
        sizes = self.channels, self.time_conditioning, self.num_classes, self.augment_labels
        c = _Embedding(*sizes, name="condition")(r=r, t=t, condition=condition)
        numbers = itertools.count()

        def block(x: Array, features: int, name: str, **more) -> Array:
            made = Block(features, next(numbers), self.dropout, self.dtype, name=name, **more)
            return made(x, c, condition.dropout)

        def place(side: str, level: int) -> str:
            return f"{side}_{z.shape[1] >> level}x{z.shape[2] >> level}"

        x = _conv(self.channels, (3, 3), dtype=self.dtype, name=f"{place('encoder', 0)}_conv")(z)
        skipped = [x]
        levels = [(i, self.channels * each) for i, each in enumerate(self.channel_multipliers)]
        for level, features in levels:
            here = place("encoder", level)
            if level > 0:
                x = block(x, x.shape[-1], f"{here}_down", resample=halve)
                skipped.append(x)
            attends = x.shape[1] in self.attention_resolutions
            for i in range(self.num_blocks):
                x = block(x, features, f"{here}_block{i}", attention=attends)
                skipped.append(x)
        for level, features in reversed(levels):
            here = place("decoder", level)
            if level == len(levels) - 1:
                x = block(x, x.shape[-1], f"{here}_in0", attention=True)
                x = block(x, x.shape[-1], f"{here}_in1")
            else:
                x = block(x, x.shape[-1], f"{here}_up", resample=double)
            attends = x.shape[1] in self.attention_resolutions
            for i in range(self.num_blocks + 1):
                x = jnp.concatenate([x, skipped.pop()], axis=-1)
                is_last = i == self.num_blocks
                x = block(x, features, f"{here}_block{i}", attention=attends and is_last)
        zeros, end = nn.initializers.zeros, f"{place('decoder', 0)}_aux"
        last = _conv(z.shape[-1], (3, 3), dtype=self.dtype, name=f"{end}_conv", kernel_init=zeros)
        u = last(nn.silu(_norm(x, f"{end}_norm")))
        return Prediction(u=layers.at_least_float32(u))
