"""A step of OneMall's training on a mesh of eight devices (data x expert x model) is the step on one."""

from pathlib import Path

ON_EIGHT = (
    f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
"""
    + """
import dataclasses, functools
import jax, numpy as np, optax
from jax.sharding import PartitionSpec as P
from compilations import constant_shapes
from onemall_parts import MODEL, ITEMS, make_arrays, make_assembly, make_history
from jaxrec.data.sources import SyntheticMall
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.systems.generative import bound_loss
from jaxrec.systems.onemall.training import mean_loss
from jaxrec.training.sharding import MeshConfig, make_mesh, place, shard_batch, use_mesh
from jaxrec.training.step import make_state, make_step

config = OneMallConfig(data=SyntheticMall(), model=dataclasses.replace(MODEL, layers=1, queries=0))
assembly = make_assembly(config.model)
optimizer = optax.sgd(0.1)  # Adam would make a whole step of a rounding error
rng = np.random.default_rng(0)
batch = make_arrays([make_history(seed, 3 + seed) for seed in range(8)], assembly) | {
    "target": rng.integers(0, ITEMS, (8, 4)).astype(np.int32),
    "target_where": np.arange(4) < rng.integers(1, 5, (8, 1)),
    "where": np.arange(8) < 7,
}
step = make_step(bound_loss(mean_loss, assembly, config), optimizer, config.seed)

def constraints(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sharding_constraint":
            yield equation.params["sharding"].spec
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "eqns"):
                yield from constraints(getattr(value, "jaxpr", value))

mesh = make_mesh(MeshConfig(data=2, expert=2, model=2))
with use_mesh(mesh):
    state, sharded = place(make_state(assembly.init(0, mesh), optimizer, mesh), mesh), shard_batch(batch, mesh)
    assert not [shape for shape in constant_shapes(step, state, sharded) if ITEMS in shape]
    traced = jax.jit(step).trace(state, sharded)
    many, metrics_many = traced.lower().compile()(state, sharded)
start = jax.device_get(state)
one, metrics_one = jax.jit(step)(start, batch)

# The same step, and it did something.
assert len(one.params["bos"].devices()) == 1
for name in ("loss", "next_token", "contrastive"):
    (a, n), (b, m) = metrics_one[name], metrics_many[name]
    assert n == m == batch["target_where"][:7].sum()
    np.testing.assert_allclose(a, b, rtol=1e-5)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, many)
assert max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (start.params, one.params)))) > 1e-3
assert any(bias.any() for bias in jax.tree.leaves(many.extra))

# Weights lie where the rules put them; a table of odd size lies everywhere.
assert len(mesh.devices.ravel()) == 8
leaves = jax.tree.leaves_with_path(state.params)
where = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding for path, leaf in leaves}
for name, wanted in {
    "decoder_0/moe/up": P("expert", None, "model"),
    "decoder_0/moe/down": P("expert", "model", None),
    "decoder_0/cross/key/weight": P(None, "model", None),
    "item/table": P("model", None),
    "levels/table": P(None, None),
}.items():
    assert where[name].is_equivalent_to(jax.NamedSharding(mesh, wanted), len(wanted)), (name, where[name])
assert sharded["target"].sharding.spec == P(("data", "expert"))

# Activations are told where to lie.
rows = ("data", "expert")
found = {tuple(spec) for spec in constraints(traced.jaxpr)}
expected = {
    (rows, None, None),  # memory
    (rows, None, None, None),  # targets
    (rows, None, "model", None),  # keys and values
    ("expert", None, None),  # tokens of the experts
    ("expert", None, "model"),  # and what is inside them
}
assert expected <= found, found
print("equal")
"""
)


def test_a_step_on_eight_devices_is_the_step_on_one(on_devices):
    assert on_devices(8, ON_EIGHT) == "equal\n"
