"""A training step of a loss and an optimiser, and its initial state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial

from jaxrec.training.loop import Metrics, TrainState, as_partial
from jaxrec.training.sharding import like_params, use_mesh

Loss = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, tuple[Metrics, Any]]]
"""loss(params, extra, batch, key) -> (the minimised value, (metrics as (sum, count), `extra` after the step))

Arrays of the whole catalogue are bound to a loss with `jax.tree_util.Partial`, which makes them arguments of the
compiled step. With `functools.partial` they would be constants in it, of gigabytes for a large catalogue.
"""


def bind(loss: Callable[..., Any], *arrays: Any) -> Partial:
    """A loss with its next arguments bound; these too are arguments of the compiled step.

    In a `Partial` of a `Partial` the arrays of the inner one would become constants.
    """
    known = as_partial(loss)
    return Partial(known.func, *known.args, *arrays, **known.keywords)


def make_state(variables: dict, optimizer: optax.GradientTransformation, mesh: Mesh | None = None) -> TrainState:
    """The state before the first step; `variables` other than "params" are updated without a gradient."""
    params, extra = variables["params"], {name: value for name, value in variables.items() if name != "params"}
    if mesh is None:
        return TrainState(jnp.int32(0), params, optimizer.init(params), extra)
    with use_mesh(mesh):
        shapes = jax.eval_shape(optimizer.init, params)
        opt_state = jax.jit(optimizer.init, out_shardings=like_params(shapes, params, mesh))(params)
    return TrainState(jnp.int32(0), params, opt_state, extra)


def make_step(loss: Loss, optimizer: optax.GradientTransformation, seed: int) -> Partial:
    """step(state, batch) -> (state, metrics), for `jaxrec.training.loop.fit`; every step has its own key."""

    def step(loss: Loss, key: jax.Array, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        gradients, (metrics, extra) = jax.grad(loss, has_aux=True)(state.params, state.extra, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, extra), metrics

    # The key is an argument too, so all seeds share one program.
    return Partial(step, as_partial(loss), jax.random.key(seed))
