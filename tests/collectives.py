"""Print, as JSON, the collectives of compiled steps on 8 devices: a script, as a process fixes their number."""

import json

import jax
from steps import lowered_step, parts_of

from mf_jax.bench.collectives import exchanges
from mf_jax.guidance import Guidance
from mf_jax.models import DiT, InContextDiT, parameter_shapes
from mf_jax.objectives.improved_meanflow import ImprovedMeanFlow
from mf_jax.objectives.meanflow import MeanFlow
from mf_jax.objectives.terminal_velocity import TerminalVelocity
from mf_jax.sharding import make_mesh, state_sharding

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


def main():
    """Print {mesh/case: {"collectives": ..., "split": numbers of split parameters, "whole": of the others}}."""
    out = {}
    for mesh_name, name in CHOSEN:
        data, fsdp = MESHES[mesh_name]
        mesh, (network, objective, more) = make_mesh(data=data, fsdp=fsdp), CASES[name]
        parts = parts_of(network, objective, shape=SHAPE, batch=BATCH, **more)
        shapes = parameter_shapes(network, SHAPE)
        shardings = state_sharding(mesh, shapes)
        text = lowered_step(parts, mesh).compile().as_text()
        found = exchanges(text, dict(mesh.shape))
        kinds = {each.kind for each in found}
        pairs = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True))
        out[f"{mesh_name}/{name}"] = {
            "collectives": {kind: sum(each.numbers for each in found if each.kind == kind) for kind in kinds},
            "split": sum(a.size for a, s in pairs if s.spec),
            "whole": sum(a.size for a, s in pairs if not s.spec),
        }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
