"""--mode=export: the generator of a run as a program, and as a page that draws in a browser."""

import jax
from etils.epath import Path
from ml_collections import ConfigDict

from mf_jax.config import sample_plan
from mf_jax.flow.errors import BadInput
from mf_jax.loading import load_for
from mf_jax.runtime import processes
from mf_jax.runtime import workdir as run_folder
from mf_jax.sampling.program import write_program
from mf_jax.sampling.web_page import write_page
from mf_jax.validation.ranges import check_values

_PROGRAM, _PAGE = "generator.stablehlo", "generator.html"


def run(config: ConfigDict, workdir: Path) -> None:
    """Write the generator as a program, and as a page if a page can run it."""
    check_values(config)
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
