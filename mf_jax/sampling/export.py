"""--mode=export: the generator as a page that draws in a browser, and as a program.

The program is StableHLO with its weights, which JAX runs without this project: a serialised
`jax.export.Exported` for CPU, GPU and TPU. Its inputs go by name:

    e       noise `[b, ...]`, float32, of deviation `draws.noise_scale`, for any b
    steps   network evaluations, int32, at least 1
    labels  of a model with classes: int32 `[b]`; -1 is none where the model was trained so
    more    `condition` and `mask`, of a model that was trained with them
"""

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from jax import export
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from mf_jax.config import ends_at_data, learns_average, sample_plan
from mf_jax.flow.errors import BadInput
from mf_jax.flow.records import NO_LABEL
from mf_jax.flow.sampler import SamplePlan
from mf_jax.generator import Generator, sample_rows
from mf_jax.loading import load_for
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.runtime.files import replace_file
from mf_jax.sampling.web_page import write_page

_PROGRAM, _PAGE = "generator.stablehlo", "generator.html"
PLATFORMS = ("cpu", "cuda", "tpu")
_MOST_BYTES = 2**31 - 2**24  # of the format, less what is no weight


def run(config: ConfigDict, workdir: Path) -> None:
    """Write the generator as a program, and as a page if a page can run it."""
    plan = sample_plan(config)
    if plan.renoise:
        raise BadInput("sample.renoise=True: a program is given its noise once; use False")
    if plan.times:
        raise BadInput(f"sample.times={plan.times}: a program takes a number of steps; use ()")
    jax.config.update("jax_traceback_in_locations_limit", 0)  # files of this machine stay unnamed
    config.model.attention = "plain"  # kernels and loops are of one kind of device
    generator = load_for(workdir, config)
    if not processes.is_first():
        return
    write_program(workdir / _PROGRAM, generator, plan)
    try:
        write_page(workdir / _PAGE, generator, plan)
    except BadInput as problem:
        (workdir / _PAGE).unlink(missing_ok=True)  # one of before is of another model
        print(problem)
    print(f"step {generator.step}, ema {generator.ema}:")
    run_folder.tell(workdir, program=_PROGRAM, page=_PAGE)


def write_program(path: Path, generator: Generator, plan: SamplePlan) -> None:
    """Write a program that returns samples, by the guidance of a plan.

    Pictures and decoded latents are about in [-1, 1].
    """
    spec, decoder = generator.spec, generator.decoder
    fixed = (generator.network, learns_average(generator.config), False, spec.shape)
    params, guidance = jax.device_get(generator.params), np.float32(plan.guidance)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, decoder)))
    if size > _MOST_BYTES:
        fix = "a program holds 2; use mf_jax.load and Generator.export"
        raise BadInput(f"--mode=export: there are {size / 1e9:.3g} GB of parameters, {fix}")

    def sample(
        *, e: Float[Array, "b ..."], steps: Int[Array, ""], **given: Array
    ) -> Float[Array, "b ..."]:
        index = jnp.zeros(e.shape[:1], jnp.int32)
        labels = given.pop("labels", index + NO_LABEL)

        def step(i: Int[Array, ""], z: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
            grid = 1 - jnp.stack([i, i + 1]) / steps, 1, 1.0
            rows = (guidance, index, labels, given | {"e": z})
            return sample_rows(*fixed, params, 0, grid, *rows)[0]

        if ends_at_data(generator.config):  # whose steps are not composed
            steps = jnp.minimum(steps, 1)
        x = jax.lax.fori_loop(0, steps, step, e)
        return x if decoder is None else jax.lax.map(lambda row: decoder(row[None])[0], x)

    (b,) = export.symbolic_shape("b")
    shapes = {"e": (spec.shape, "float32"), **spec.more}
    shapes |= {"labels": ((), "int32")} if spec.num_classes else {}
    inputs = {
        name: jax.ShapeDtypeStruct((b, *shape), kind) for name, (shape, kind) in shapes.items()
    }
    inputs["steps"] = jax.ShapeDtypeStruct((), jnp.int32)
    exported = export.export(jax.jit(sample), platforms=PLATFORMS)(**inputs)
    replace_file(path, bytes(exported.serialize()))
