"""The signals of signals_nnx.py with an equinox module: what differs is `partition` and `combine`.

    python docs/examples/signals_equinox.py

No figures are recorded yet.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import signals_nnx


class Network(eqx.Module):
    layers: eqx.nn.MLP

    def __init__(self, key):
        self.layers = eqx.nn.MLP(
            2 * signals_nnx.LENGTH + 7, 2 * signals_nnx.LENGTH, 256, 3, key=key
        )

    def __call__(self, z, r, t, label):  # one signal; label -1 is a row of zeros
        told = jnp.concatenate([z.ravel(), jnp.stack([t, t - r, t * t]), jax.nn.one_hot(label, 4)])
        return self.layers(told).reshape(z.shape)


def main(steps=1000, seed=0):
    params, static = eqx.partition(Network(jax.random.key(seed)), eqx.is_array)

    def field(params, z, *, r, t, condition):
        return jax.vmap(eqx.combine(params, static))(z, r, t, condition)

    return signals_nnx.train(field, params, steps, seed)


if __name__ == "__main__":
    main()
