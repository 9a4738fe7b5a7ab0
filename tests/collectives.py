"""Print, as JSON, the collectives of compiled steps on 8 devices: a script, as a process fixes their number."""

import json
import math
import re

import jax
import jax.numpy as jnp
import optax

from mf_jax.draws import DrawScheme
from mf_jax.guidance import Guidance
from mf_jax.models import DiT, InContextDiT
from mf_jax.objectives.improved_meanflow import ImprovedMeanFlow
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.objectives.terminal_velocity import TerminalVelocity
from mf_jax.sharding import batch_sharding, make_mesh, state_sharding
from mf_jax.state import StepParts, initial_state, make_train_step
from mf_jax.times import LogitNormalTimes

SHAPE, BATCH = (8, 8, 4), 256
DIT = DiT(patch_size=4, depth=2, width=128, num_heads=2, num_classes=10)
GUIDED = MeanFlow(Guidance(omega=1.0, kappa=0.5))
FIXED = {"label_drop": "fixed_rows", "label_drop_share": 3 / 32}
CASES = {
    "guided": (DIT, GUIDED, FIXED),
    "loop": (DIT.clone(scan=True, remat="block"), GUIDED, {}),
    "improved": (
        InContextDiT(patch_size=4, depth=2, width=128, num_heads=2, head_depth=1, num_classes=10),
        ImprovedMeanFlow(),
        {"omega_max": 8.0},
    ),
    "terminal": (DIT, TerminalVelocity(target_ema=0.9), {}),
}
MESHES = {"data": (8, 1), "both": (4, 2), "fsdp": (1, 8)}
CHOSEN = [("data", "guided"), ("data", "improved"), ("both", "loop"), ("fsdp", "terminal")]
NAMES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"


def collectives(text):
    """Return the numbers (not bytes) in the results of each kind of collective of a compiled program."""
    found = {}
    for result, name in re.findall(rf" = (.*?) ({NAMES})(?:-start)?\(", text):
        sizes = (
            math.prod(map(int, filter(None, shape.split(","))))
            for shape in re.findall(r"\[([\d,]*)\]", result)
        )
        found[name] = found.get(name, 0) + sum(sizes)
    return found


def main():
    """Print {mesh/case: {"collectives": ..., "split": numbers of split parameters, "whole": of the others}}."""
    out = {}
    for mesh_name, name in CHOSEN:
        data, fsdp = MESHES[mesh_name]
        mesh, (network, objective, more) = make_mesh(data=data, fsdp=fsdp), CASES[name]
        parts = StepParts(
            network=network,
            shape=SHAPE,
            objective=objective,
            scheme=DrawScheme(LogitNormalTimes(), **more),
            optimizer=optax.adamw(1e-3),
            ema_names=("0.9",),
            seed=0,
            log_every_steps=1,
            batch_size=BATCH,
        )
        shapes = jax.eval_shape(lambda parts=parts: initial_state(parts))
        shardings = state_sharding(mesh, shapes)
        state = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
        )
        rows = batch_sharding(mesh)
        x = jax.ShapeDtypeStruct((BATCH, *SHAPE), jnp.float32, sharding=rows)
        labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=rows)
        step = jax.jit(make_train_step(parts, mesh), donate_argnums=0, out_shardings=shardings)
        text = step.lower(state, x, labels).compile().as_text()
        pairs = list(zip(jax.tree.leaves(shapes.params), jax.tree.leaves(shardings.params), strict=True))
        out[f"{mesh_name}/{name}"] = {
            "collectives": collectives(text),
            "split": sum(a.size for a, s in pairs if s.spec),
            "whole": sum(a.size for a, s in pairs if not s.spec),
        }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
