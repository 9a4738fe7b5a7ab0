"""Sampling a tiny finished run, from Python and from the command line, and decoding latents."""

import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, refuses
from etils import epath
from jobs import assert_refused, here, keys, tiny_config, works
from networks import untrained
from PIL import Image
from recorded import FOLDER

import mf_jax
from configs.digits import get_config
from configs.toy2d import get_config as toy2d
from mf_jax import generator as module
from mf_jax import sampling
from mf_jax.config import has_null
from mf_jax.data import Batch
from mf_jax.data.pixels import to_pixels
from mf_jax.flow.draws import key_of
from mf_jax.flow.records import Condition, DataSpec, GuidanceScale
from mf_jax.flow.sampler import SamplePlan
from mf_jax.generator import load_decoder
from mf_jax.models import as_field
from mf_jax.models.autoencoder import load_autoencoder

VAE = FOLDER / "vae"
LATENT = DataSpec((4, 4, 4), 10, tuple("0123456789"))


@pytest.fixture(scope="module")
def generator(trained):
    return mf_jax.load(trained, ema="none")


def test_exactly_n_and_the_same_n_at_any_batch_size_with_fresh_noise_too(generator):
    for more in ({}, {"steps": 3, "renoise": True}):
        whole = generator.sample_raw(num=23, **more)
        assert whole.shape == (23, 8, 8, 1)
        assert np.abs(whole[0] - whole[10]).max() > 0.1, "of one class, from other noise"
        for num, batch_size in ((23, 7), (23, 100), (9, 512)):
            part = generator.sample_raw(num=num, batch_size=batch_size, **more)
            np.testing.assert_allclose(part, whole[:num], atol=1e-5)
        with jax.default_prng_impl("rbg"):  # whatever JAX calls its default
            assert jax.random.key_impl(key_of(3)) == "threefry2x32"
            part = generator.sample_raw(num=9, batch_size=4, **more)
        np.testing.assert_allclose(part, whole[:9], atol=1e-5)
    assert np.abs(whole[:9] - generator.sample_raw(num=9, steps=3)).max() > 1e-2
    once = [generator.sample_raw(num=9, renoise=renoise) for renoise in (True, False)]
    np.testing.assert_allclose(*once, atol=1e-5)


def test_two_steps_are_not_one_step_and_a_plan_is_its_keywords(generator):
    one, two, four = (generator.sample_raw(num=4, steps=steps) for steps in (1, 2, 4))
    for other in (one, four, generator.sample_raw(num=4, times=(1.0, 0.2, 0.0))):
        assert np.abs(other - two).max() > 1e-4
    for same in ({"plan": SamplePlan(steps=2)}, {"times": (1.0, 0.5, 0.0)}):
        np.testing.assert_array_equal(generator.sample_raw(num=4, **same), two)


def test_one_program_draws_few_or_many_samples_in_any_number_of_steps(generator):
    e = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key_of(0), i), (8, 8, 1)))
    scale = GuidanceScale(jnp.ones(64), jnp.zeros(64), jnp.ones(64))
    condition = Condition(jnp.arange(64) % 10, guidance=scale)
    noise, field = e(jnp.arange(64)), as_field(generator.network)
    module.sample_rows.clear_cache()
    for num, steps in ((1, 1), (3, 8), (64, 2), (13, 63)):
        walk = jax.jit(functools.partial(mf_jax.sample, field, steps=steps))
        plain = walk(generator.params, noise, condition)[:num]
        np.testing.assert_array_equal(generator.sample_raw(num=num, steps=steps), plain)
    assert module.sample_rows._cache_size() == 1


def test_seed_label_and_average_matter(generator, trained):
    base = generator.sample_raw(labels=[1, 2])
    assert np.abs(base - generator.sample_raw(labels=[1, 2], seed=1)).max() > 0.1
    same, other = np.abs(base - generator.sample_raw(labels=[1, 5])).max(axis=(1, 2, 3))
    assert same == 0 < 1e-5 < other
    assert np.abs(base - mf_jax.load(trained).sample_raw(labels=[1, 2])).max() > 1e-4


def test_labels(generator):
    none = dataclasses.replace(generator, spec=DataSpec((2,)))
    named = dataclasses.replace(generator, spec=DataSpec((2,), 3, ("10", "cat", "dog")))
    for of, asked, expected in (
        (generator, ([4, 2], 5), [4, 2, 4, 2, 4]),
        (generator, (None, 12), [*range(10), 0, 1]),
        (generator, (None,), range(10)),
        (none, (None,), [-1]),
        (none, (None, 2), [-1, -1]),
        (named, (["cat", 0, "10", 2],), [1, 0, 0, 2]),
        (named, ("dog", 2), [2, 2]),
    ):
        np.testing.assert_array_equal(of.labels_for(*asked), expected)
    refuses("draws.label_drop=any_row", generator.labels_for, [-1])
    refuses("no classes", none.labels_for, [0])
    refuses(r"'cart' is no .*10, cat, dog \(did you mean cat", named.labels_for, ["cart"])
    for labels, knows_null in ([10], True), ([-2], True), ([-1], False):
        refuses("not a class", LATENT.check_labels, labels, has_null=knows_null)
    LATENT.check_labels([-1, 9, "3"], has_null=True)
    drops = "objective.name", "draws.label_drop_share", "draws.label_drop"
    for values, known in {
        ("meanflow", 0.1, "any_row"): True,
        ("meanflow", 0.1, "instant_rows"): False,
        ("flow_matching", 0.1, "instant_rows"): True,
        ("meanflow", 0.0, "any_row"): False,
    }.items():
        assert has_null(tiny_config(**dict(zip(drops, values, strict=True)))) == known
    assert re.fullmatch(r"Generator\(dit of .{,100}", repr(generator))
    spec = DataSpec((2,), 4, ("1", "2", "3", "10"))
    spec.check_asked(["3", "10", 0])
    for label in (1, 3, 10):  # a number that names another class
        refuses(f"{label} is a name, not that class's.*'{label}'", spec.check_asked, [label])
    DataSpec((2,), 3, ("0", "1", "2")).check_asked([0, 1, 2, -1])


def test_what_cannot_be_drawn_is_refused(generator):
    params = jax.tree.map(lambda x: x * jnp.nan, generator.params)
    broken = dataclasses.replace(generator, params=params)
    for sample in (broken.sample, broken.sample_raw):
        refuses("3 of 3 samples are not finite", sample, num=3)
    for argument in ({"num": 0}, {"batch_size": 0}, {"seed": -1}):
        ((name, value),) = argument.items()
        refuses(f"{name}={value}", generator.sample, **{"num": 3} | argument)
    for text, guidance in {
        "1 <= omega": (0.5, 0.0, 1.0),
        "t_min <= t_max": (2.0, 0.6, 0.5),
        "guidance=": (2.0, 0.0),
        r"guidance=\(\)": (),
        "told no guidance": (2.0, 0.0, 1.0),
    }.items():
        refuses(text, generator.sample, num=3, guidance=guidance)


def test_sample_mode_writes_the_fields_convention(copy_of_trained):
    digits = ("--config=configs/digits.py", "--mode=sample", f"--workdir={copy_of_trained}", *TINY)
    output = works(*digits, *keys("sample.num=21 sample.labels=(3,7) sample.batch_size=8"))
    arrays = np.load(copy_of_trained / "samples.npz")
    assert arrays["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["arr_1"], np.resize([3, 7], 21))
    expected = mf_jax.load(str(copy_of_trained)).sample(labels=[3, 7], num=21)
    np.testing.assert_array_equal(arrays["arr_0"], expected)
    assert (copy_of_trained / "samples.png").exists()
    assert "samples.npz" in output
    for key, words in (
        ("sample.views=step", "views='step': must be one of steps, walk"),
        ("sample.guidance=(2.0,0.0,1.0)", "mf_jax: sample.guidance=("),
    ):
        assert_refused(here(*digits, *keys(key)), words)
    views = "sample.views=('steps','walk','nearest','training')"
    output = works(*digits, *keys(f"sample.renoise=True {views}"))
    assert "left out" not in output
    page = (copy_of_trained / "report.html").read_text()
    assert [word for word in ("data:image/webp", "From noise to noise") if word not in page] == []
    with Image.open(copy_of_trained / "training.webp") as animation:
        assert animation.n_frames == len(list((copy_of_trained / "samples").glob("step_*.png")))
    with Image.open(copy_of_trained / "steps.png") as picture:
        top, bottom = np.asarray(picture)[19 : 19 + 56], np.asarray(picture)[-60:-4]
        assert (top != bottom).any(), "eight steps are not one"
    asked = mf_jax.load(copy_of_trained)
    asked.config.sample.labels = (3, 7)
    assert sampling._labels_shown(asked).tolist() == [3, 7] * 5
    assert "walk.png" not in works(*digits), "which an earlier command has drawn"


def test_the_field_and_its_transport_are_plotted_in_the_plane_alone(tmp_path):
    for size, names in ((2, ("field", "scatter", "transport")), (3, ("scatter",))):
        config, workdir = toy2d(), epath.Path(tmp_path / str(size))
        config.model.update(depth=1, width=16)
        workdir.mkdir()
        batch = Batch(np.eye(3, size, dtype=np.float32), np.zeros(3, np.int32))
        with mock.patch.object(sampling, "read", return_value=batch):
            sampling._plot_vectors(workdir, untrained(DataSpec((size,)), config), batch.x)
        assert sorted(path.stem for path in workdir.iterdir()) == [*names]


def test_sampling_computes_in_full_precision_whatever_the_platform_calls_its_default(generator):
    times, guidance = (np.float32([1, 0]), 1, 1.0), np.float32([1, 0, 1])
    rows = np.arange(4, dtype=np.int32), np.zeros(4, np.int32)
    fixed = (generator.network, True, False, generator.spec.shape)
    text = str(module.sample_rows.trace(*fixed, generator.params, 0, times, guidance, *rows).jaxpr)
    assert (text.count("precision=") > 3, text.count("precision=None")) == (True, 0)


@pytest.fixture(scope="module")
def of_latents():
    """Return an untrained generator of latents, which are decoded by a small autoencoder."""
    config = tiny_config(**{"model.num_heads": 2, "model.patch_size": 2, "data.name": "latents"})
    config.data.latent_mean, config.data.latent_std = (0.5, -0.25, 0.0, 1.0), (2.0, 3.0, 4.0, 5.0)
    config.data.autoencoder = str(VAE)
    return untrained(LATENT, config)


def test_pictures_are_the_decoded_latents_at_any_batch_size(of_latents):
    data, labels = of_latents.config.data, np.arange(11) % 10
    latents = of_latents.sample_raw(labels)
    assert latents.shape == (11, *LATENT.shape)
    unscaled = latents * np.asarray(data.latent_std) + np.asarray(data.latent_mean)
    decoded = load_autoencoder(VAE).decode(jnp.asarray(unscaled, jnp.float32))
    pictures = of_latents.sample(labels, batch_size=6)
    assert pictures.dtype == np.uint8
    for others in (np.asarray(to_pixels(decoded)), of_latents.sample(labels)):
        off = np.abs(pictures.astype(int) - others)
        assert off.max() <= 1, "rounded the other way at a half"
        assert off.mean() < 0.01


def test_an_autoencoder_that_is_missing_or_another_or_bad_scales_are_refused(of_latents):
    """Latents themselves need none."""
    config, sha256 = of_latents.config, load_autoencoder(VAE).sha256
    assert load_decoder(config, origin=sha256).autoencoder.sha256 == sha256
    refuses(f"data.autoencoder=.*{sha256}.*0123abc", load_decoder, config, origin="0123abc")
    assert load_decoder(get_config(), origin="") is None
    for key, value, problem in (
        ("autoencoder", "sd-vae-ft-mse", "sd-vae-ft-mse"),
        ("latent_std", (np.inf, 1.0, 1.0, 1.0), "decoded sample is not finite"),
    ):
        config = of_latents.config.copy_and_resolve_references()
        config.data[key] = value
        broken = dataclasses.replace(of_latents, config=config)
        assert np.isfinite(broken.sample_raw(num=2)).all()
        refuses(problem, broken.sample, num=2)
