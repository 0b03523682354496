"""A training step, from a loss and an optimiser, and the state that it begins with."""

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
"""loss(params, extra, batch, key) -> (what is minimised, (metrics as (sum, count), what `extra` is after the step))

What a loss reads of a whole catalogue it is bound to with `jax.tree_util.Partial`: those arrays are arguments of the
compiled step. With `functools.partial` they would be constants in it, gigabytes where a catalogue is large.
"""


def bind(loss: Callable[..., Any], *arrays: Any) -> Partial:
    """A loss with its next arguments bound: those too are arguments of the compiled step.

    A `Partial` of a `Partial` would hide the arrays of the inner one inside a function, as constants.
    """
    known = as_partial(loss)
    return Partial(known.func, *known.args, *arrays, **known.keywords)


def make_state(variables: dict, optimizer: optax.GradientTransformation, mesh: Mesh | None = None) -> TrainState:
    """The state before the first step; of `variables`, what is not "params" is updated without a gradient."""
    params, extra = variables["params"], {name: value for name, value in variables.items() if name != "params"}
    if mesh is None:
        return TrainState(jnp.int32(0), params, optimizer.init(params), extra)
    with use_mesh(mesh):
        shapes = jax.eval_shape(optimizer.init, params)
        opt_state = jax.jit(optimizer.init, out_shardings=like_params(shapes, params, mesh))(params)
    return TrainState(jnp.int32(0), params, opt_state, extra)


def make_step(loss: Loss, optimizer: optax.GradientTransformation, seed: int) -> Partial:
    """step(state, batch) -> (state, metrics), as `jaxrec.training.loop.fit` takes it; every step has its own key."""

    def step(loss: Loss, key: jax.Array, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        gradients, (metrics, extra) = jax.grad(loss, has_aux=True)(state.params, state.extra, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, extra), metrics

    # The key is an argument too: another seed is the same program.
    return Partial(step, as_partial(loss), jax.random.key(seed))
