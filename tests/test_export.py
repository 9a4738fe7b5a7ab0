"""--mode=export: the program and the page draw what the run draws, without this project."""

import json
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, refuses
from etils.epath import Path
from jax import export
from jobs import assert_refused, here, keys, tiny_config, works
from networks import untrained
from recorded import FOLDER

import mf_jax
from mf_jax.flow.records import DataSpec
from mf_jax.flow.sampler import SamplePlan
from mf_jax.sampling import web_page
from mf_jax.sampling.export import write_program

COLOUR = DataSpec((4, 8, 3), 3, ("</script>", "b", "c"))
SMALL = {"model.depth": 2, "model.width": 32, "model.num_heads": 2, "model.patch_size": 2}
SMALL |= {"draws.label_drop_share": 0.1, "draws.label_drop": "any_row"}
UNET = {"model.name": "unet", "model.channels": 8, "model.channel_multipliers": (1, 2)}
UNET |= {"model.num_blocks": 1, "model.attention_resolutions": ()}
IN_CONTEXT = {"model.name": "in_context_dit", "model.head_depth": 1, "draws.omega_max": 4.0}
LATENTS = {"data.name": "latents", "data.autoencoder": str(FOLDER / "vae")}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def _untrained(spec=COLOUR, **settings):
    return untrained(spec, tiny_config(**SMALL | settings))


def _noise(generator, num):
    return np.random.default_rng(0).standard_normal((num, *generator.spec.shape), np.float32)


def test_the_documented_loader_draws_where_the_project_is_missing(copy_of_trained):
    assert "generator.html" in works("--mode=export", f"--workdir={copy_of_trained}")
    loader = (ROOT / "docs" / "runs.md").read_text().split("### As a program")[1]
    (loader,) = re.findall(r"```python\n(.*?)```", loader, re.DOTALL)
    more = "y = program.call(e=e, labels=labels, steps=np.int32(3)); np.savez('x', e=e, x=x, y=y)"
    code = f"import sys; sys.modules['mf_jax'] = None\n{loader}\n{more}"
    subprocess.run([sys.executable, "-c", code], cwd=copy_of_trained, check=True)
    drawn, generator = np.load(copy_of_trained / "x.npz"), mf_jax.load(copy_of_trained)
    for key, steps in {"x": 1, "y": 3}.items():
        ours = generator.sample_raw(range(10), e=drawn["e"], steps=steps)
        np.testing.assert_allclose(drawn[key], ours, atol=1e-5, rtol=0)
    assert (copy_of_trained / "samples.png").exists()
    path = copy_of_trained / "generator.stablehlo"
    assert set(_load(path).platforms) == {"cpu", "cuda", "tpu"}
    assert str(ROOT).encode() not in path.read_bytes(), "whose folders are nobody's business"
    page = path.with_suffix(".html")
    assert page.exists()
    output = works("--mode=export", f"--workdir={copy_of_trained}", "--config.sample.steps=65")
    assert ("no page" in output, page.exists()) == (True, False)


def _load(path):
    return export.deserialize(bytearray(path.read_bytes()))


def test_every_network_becomes_a_program_of_any_batch_size_and_a_page_of_a_dit_alone(tmp_path):
    path = Path(tmp_path / "program")
    vectors, latent = DataSpec((2,), condition_size=3), DataSpec((4, 4, 4), 3, ("a", "b", "c"))
    for plan, generator in (
        ({"guidance": (2.0, 0.1, 0.9)}, _untrained(**IN_CONTEXT)),
        ({}, _untrained(**UNET)),
        ({}, _untrained(vectors, **{"model.name": "mlp"})),
        ({}, _untrained(latent, **LATENTS)),
    ):
        plan, e = SamplePlan(steps=2).replace(**plan), _noise(generator, 3)
        write_program(path, generator, plan)
        given = {"condition": np.ones((3, 3), np.float32)} if generator.spec.more else {}
        told = {"labels": np.int32([2, 0, -1])} if generator.spec.num_classes else {}
        drawn = _load(path).call(e=e, steps=np.int32(plan.steps), **told, **given)
        ours = generator.sample_raw(*told.values(), e=e, plan=plan, **given)
        ours = generator.decoder(jnp.asarray(ours)) if generator.decoder else ours
        np.testing.assert_allclose(drawn, ours, atol=1e-5 * np.abs(ours).max(), rtol=0)
        refuses(r"no page.*(model|data)\.name=", web_page.write_page, path, generator, plan)
    generator = _untrained(**{"times.name": "consistency"})
    write_program(path, generator, SamplePlan())
    told = {"e": _noise(generator, 3), "labels": np.int32([2, 0, 1])}
    one, many = (_load(path).call(steps=np.int32(n), **told) for n in (1, 9))
    np.testing.assert_array_equal(one, many)  # steps are not composed


def _drawn_by_page(path, asked):
    """Return what a page draws of each (e, label, steps), in Chromium or else in node."""
    answer = (
        f"const answer = JSON.stringify({json.dumps(asked)}.map((each) => {{ let part;"
        "const run = drawing(...each); do part = run.next(); while (!part.done);"
        "return [...part.value]; }));"
    )
    if browser := next(filter(None, map(shutil.which, BROWSERS)), None):
        probe = f"<script>{answer}document.body.textContent = answer</script></body>"
        page = path.with_name("probe.html")
        page.write_text(path.read_text().replace("</body>", probe))
        flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent}/c")
        command, given = (browser, *flags, "--dump-dom", f"file://{page}"), ""
    elif node := shutil.which("node"):
        scripts = re.findall(r'<script id="[mn]\w+">(.*?)</script>', path.read_text(), re.DOTALL)
        command, given = (node, "-"), "".join((*scripts, answer, "console.log(answer)"))
    else:
        pytest.skip("neither Chromium nor node is here")
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    found = re.search(r"\[\[.*\]\]", done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return np.float32(json.loads(found[0]))


def test_a_page_draws_what_jax_draws(trained, tmp_path):
    other = {"model.time_conditioning": "t|r", "model.prediction": "data", "model.scan": True}
    other |= {"model.logit_power": -1.0, "model.depth": 3, "objective.name": "flow_matching"}
    for generator, labels in (mf_jax.load(trained), (0, 9, 1)), (_untrained(**other), (0, 2, -1)):
        path, e, counts = Path(tmp_path / "page.html"), _noise(generator, 3), (1, 3, 3)
        web_page.write_page(path, generator, SamplePlan(steps=3))
        rows = list(zip(e, labels, counts, strict=True))
        last = generator.spec.num_classes  # of the table of classes, for none
        asked = [[row.ravel().tolist(), last if k < 0 else k, n] for row, k, n in rows]
        ours = [generator.sample_raw([k], e=row, steps=n)[0].ravel() for row, k, n in rows]
        np.testing.assert_allclose(_drawn_by_page(path, asked), ours, atol=1e-4, rtol=0)


def test_what_page_and_program_cannot_follow_is_told(trained, tmp_path, monkeypatch):
    plan, path = SamplePlan(steps=65), Path(tmp_path / "page.html")
    monkeypatch.setattr(web_page, "_MOST_BYTES", 10**6)
    for generator, *told in (
        (_untrained(**{"model.norm": "rms", "model.told_guidance": True}), "rms", "told_guidance"),
        (_untrained(DataSpec((4, 8, 2), has_mask=True)), r"\(4, 8, 2\)", "data with mask"),
        (_untrained(**{"times.name": "consistency"}), "consistency, of one step"),
        (_untrained(**{"model.width": 128}), "sample.steps=65 ", "3 MB of weights"),
    ):
        refuses(f"no page.*{'.*'.join(told)}", web_page.write_page, path, generator, plan)
    predicts = _untrained(**{"model.prediction": "data"})
    refuses("networks of sit predict velocity", predicts.export, tmp_path / "x.npz", kind="sit")
    no_dit = _untrained(**UNET)
    refuses("unknown to published sit", no_dit.export, tmp_path / "x.npz", kind="sit")
    assert not path.exists()
    before = set(trained.iterdir())
    for key in ("sample.renoise=True", "sample.times=(1.0,0.3,0.0)"):
        ended = here("--mode=export", f"--workdir={trained}", *keys(key))
        assert_refused(ended, key.partition("=")[0])
    assert set(trained.iterdir()) == before
