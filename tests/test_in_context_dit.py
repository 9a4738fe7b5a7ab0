"""InContextDiT: the sizes of the published networks, and its second head."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from networks import CASES, ORDER, answers, draw, inputs, make_z
from recorded import FOLDER

from mf_jax.flow.records import Condition, Prediction
from mf_jax.models import (
    SIZES,
    DataPrediction,
    InContextDiT,
    as_field,
    initial_params,
    parameter_shapes,
)
from mf_jax.models.in_context_dit import rotary_angles

COUNTS = json.loads((FOLDER / "parameter_counts.json").read_text())


def test_parameter_counts_of_every_size():
    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    sizes = set()
    for name in {name.split(":")[0] for name in COUNTS if not name.startswith("DiT")}:
        kind, row, patch = name.split("_")
        pixel = kind == "pmfDiT"
        sizes.add(row := "pixel_" * pixel + row)
        network = InContextDiT(
            patch_size=int(patch), num_classes=1000, scan=True, **SIZES["in_context_dit"][row]
        )
        side = 16 * int(patch)
        params = parameter_shapes(network, (side, side, 3 if pixel else 4))
        assert size(params) == COUNTS[f"{name}:training"]
        head = params.pop("v_head")
        # Published imf networks keep a dead output layer of the second head in sampling.
        dead = 0 if pixel else size([head["norm"], head["final"]])
        assert size(params) + dead == COUNTS[f"{name}:sampling"]
    assert set(SIZES["in_context_dit"]) - {"digits"} == sizes


def test_sampling_builds_no_second_head_and_predicts_the_same_u_without_guidance():
    network, shape = CASES["in_context_dit"]
    sampling = network.clone(second_head=False)
    params, exact = draw(network, shape), answers("in_context_dit").exact
    assert parameter_shapes(sampling, shape).keys() == params.keys() - {"v_head"}
    (r, t, condition), i = inputs(), ORDER["no guidance"]
    condition = Condition(condition.labels)
    alone = jax.jit(as_field(sampling))(params, make_z(shape), r=r, t=t, condition=condition)
    assert alone.v is None
    np.testing.assert_allclose(alone.u[i], exact.u[i], rtol=1e-4, atol=1e-5)


def test_fresh_gates_close_the_blocks_and_weights_have_the_published_scale():
    params = flatten_dict(answers("in_context_dit").fresh_params, sep="/")
    assert not any(np.any(leaf) for name, leaf in params.items() if name.endswith("_gate"))
    width = 32
    for name, std in (
        ("block_0/attention/query/kernel", 0.32 * width**-0.5),
        ("block_0/contract/kernel", 0.32 * int(width * 8 / 3) ** -0.5),
        ("class_tokens/tokens", width**-0.5),
        ("h_tokens/tokens", width**-0.5),
        ("class_tokens/embedding/embedding", width**-0.5),
    ):
        assert abs(params[name].std() / std - 1) < 4 / params[name].size ** 0.5, name


def test_only_the_embeddings_multiply_matrices_in_float32():
    network, shape = CASES["in_context_dit"]
    inputs = {"r": jnp.zeros(1), "t": jnp.ones(1), "condition": Condition(jnp.zeros(1, int))}
    field = as_field(network.clone(dtype="bfloat16"))
    trace = jax.make_jaxpr(lambda params: field(params, jnp.zeros((1, *shape)), **inputs))
    program = str(trace(parameter_shapes(network, shape)))
    assert "bf16[1,28,32] = dot_general" in program, "20 tokens before 8 patches"
    two_layers_of_4_numbers = program.count("f32[1,32] = dot_general")
    assert two_layers_of_4_numbers == 2 * 4


def test_rotary_angles_tell_the_difference_of_positions():
    more = {"num_prefix": 3, "rows": 2, "columns": 5, "head_width": 8}
    line, grid = (rotary_angles(positions, **more) for positions in ("sequence", "grid"))
    assert line.shape == grid.shape == (13, 4)
    np.testing.assert_allclose(line[12] - line[7], line[5])
    assert np.all(grid[:3] == 0), "what is told has no place on the grid"
    np.testing.assert_allclose(grid[3:].reshape(2, 5, 4)[1, 4], [1, 1e-2, 4, 4e-2])
    np.testing.assert_allclose(line[4], [4, 4e-1, 4e-2, 4e-3])


class _Both(nn.Module):
    """Predict 2 z, and 3 z by a second head."""

    @nn.compact
    def __call__(self, z, *, r, t, condition):
        return Prediction(self.param("factor", nn.initializers.constant(2.0), ()) * z, 3 * z)


def test_data_prediction_is_the_network_read_as_velocity():
    wrapped = DataPrediction(_Both(), t_clip=0.25)
    z, t = jnp.ones((2, 3)), jnp.array([0.5, 0.1])
    row = {"r": 0 * t, "t": t, "condition": Condition(jnp.zeros(2, int))}
    params = initial_params(wrapped, (3,), jax.random.key(0))
    assert params == {"factor": 2.0}, "the names are the network's own"
    prediction = as_field(wrapped)(params, z, **row)
    np.testing.assert_allclose(prediction.u[:, 0], [-1 / 0.5, -1 / 0.25])
    np.testing.assert_allclose(prediction.v[:, 0], [-2 / 0.5, -2 / 0.25])
