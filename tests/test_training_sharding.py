"""The mesh, the tables of rules, and that logical names really become constraints."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxrec.config import UserError
from jaxrec.training.sharding import MeshConfig, make_mesh, shard_batch, use_mesh

ON_EIGHT = """
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import PartitionSpec as P
from jaxrec.training.sharding import *

class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp"))
        hidden = nn.with_logical_constraint(x @ self.param("kernel", init, (8, 16)), ("act_batch", "act_mlp"))
        init = nn.with_logical_partitioning(nn.initializers.normal(), ("expert", None, None))
        experts = self.param("experts", init, (4, 16, 8))
        return jnp.einsum("bf,efd->bd", jax.nn.relu(hidden), experts)

layer, x = Layer(), np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
optimizer = optax.adam(1e-2)

def step(params, opt_state, x):
    loss, grads = jax.value_and_grad(lambda p: jnp.mean(layer.apply({"params": p}, x) ** 2))(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss

def train(config, devices):
    mesh = make_mesh(config, devices)
    with use_mesh(mesh):
        params = init_sharded(lambda: layer.init(jax.random.key(0), x)["params"], mesh)
        shapes = jax.eval_shape(optimizer.init, params)
        opt_state = jax.jit(optimizer.init, out_shardings=like_params(shapes, params, mesh))(params)
        jaxpr = str(jax.make_jaxpr(step)(params, opt_state, x))
        for _ in range(3):
            params, opt_state, loss = jax.jit(step)(params, opt_state, shard_batch(x, mesh))
    return params, opt_state, loss, jaxpr

one = train(MeshConfig(), jax.devices()[:1])
many = train(MeshConfig(data=2, expert=2, model=2), jax.devices())
params, opt_state, loss, jaxpr = many
assert jaxpr.count("sharding_constraint") >= 1, jaxpr
assert params["kernel"].sharding.spec == P(None, "model"), params["kernel"].sharding
assert params["experts"].sharding.spec[0] == "expert"
assert {s.data.shape for s in params["kernel"].addressable_shards} == {(8, 8)}
assert opt_state[0].mu["kernel"].sharding.is_equivalent_to(params["kernel"].sharding, 2)
assert shard_batch(x, make_mesh(MeshConfig(data=4, expert=2))).addressable_shards[0].data.shape == (2, 8)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one[:3], many[:3])
# The trap: under `with mesh` the constraints vanish.
assert make_mesh(MeshConfig(data=-1, model=4)).shape == {"data": 2, "expert": 1, "model": 4}
with jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2, 2), AXES), nn.logical_axis_rules(RULES):
    print(str(jax.make_jaxpr(step)(one[0], one[1], x)).count("sharding_constraint"))
"""


def test_a_step_on_eight_devices_is_the_step_on_one(on_devices):
    assert on_devices(8, ON_EIGHT).strip() == "0"


def test_a_constraint_does_nothing_without_a_mesh():
    jaxpr = str(jax.make_jaxpr(lambda x: nn.with_logical_constraint(x, ("act_batch", None)))(jnp.ones((4, 4))))
    assert "sharding_constraint" not in jaxpr


def test_a_constraint_with_a_mesh_is_in_the_jaxpr():
    with use_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        jaxpr = str(jax.make_jaxpr(lambda x: nn.with_logical_constraint(x, ("act_batch", None)))(jnp.ones((4, 4))))
    assert "sharding_constraint" in jaxpr


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 0}, {"expert": -1}, {"model": 2}])
def test_a_mesh_that_does_not_fit(sizes):
    with pytest.raises(UserError, match="doesn't fit 1 devices: the sizes must multiply to it"):
        make_mesh(MeshConfig(**sizes), jax.devices()[:1])


def test_a_batch_that_does_not_split(on_devices):
    source = """
import numpy as np
from jaxrec.training.sharding import *
try:
    shard_batch({"x": np.ones((3, 2))}, make_mesh(MeshConfig()))
except ValueError as error:
    print(error)
"""
    assert "a batch of 3 doesn't split over 2 devices" in on_devices(2, source)


def test_shard_batch_keeps_values():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = shard_batch({"x": jnp.arange(4), "scale": 2.0}, mesh)
    assert batch["x"].tolist() == [0, 1, 2, 3]
    assert float(batch["scale"]) == 2.0
