"""The optimiser against AdamW written out, its schedule, and the groups of parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrec.config import UserError
from jaxrec.training.optim import OptimConfig, has_prefix, is_matrix, learning_rate, make_optimizer

PARAMS = {
    "encoder": {"kernel": jnp.full((2, 3), 0.5), "bias": jnp.full((2, 3), 0.5)},
    "head": {"kernel": jnp.full((3, 2), -0.5), "scale": jnp.full((3,), 2.0)},
}


def apply(config: OptimConfig, gradients: list) -> dict:
    optimizer = make_optimizer(config, steps=10)
    params, state = PARAMS, optimizer.init(PARAMS)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_schedules():
    rate = learning_rate(OptimConfig(learning_rate=1.0, warmup=4, final_fraction=0.2), steps=12)
    np.testing.assert_allclose([rate(step) for step in (0, 1, 3, 7, 11)], [0.25, 0.5, 1.0, 0.6, 0.2], rtol=1e-6)
    rate = learning_rate(OptimConfig(learning_rate=1.0, warmup=0, schedule="constant"), steps=5)
    np.testing.assert_allclose([rate(step) for step in range(5)], np.ones(5))
    with pytest.raises(UserError, match=r"'optim.warmup' is 5, as long as the training of 5"):
        learning_rate(OptimConfig(warmup=5), steps=5)


def test_two_steps_are_adamw_by_hand():
    config = OptimConfig(learning_rate=0.1, warmup=0, schedule="constant", weight_decay=0.2, clip_norm=0.0)
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS) for _ in range(2)]
    result = apply(config, gradients)
    for group, name, decay in [("encoder", "kernel", 0.2), ("encoder", "bias", 0.0), ("head", "scale", 0.0)]:
        value, mean, square = np.asarray(PARAMS[group][name], np.float64), 0.0, 0.0
        for step, gradient in enumerate(gradients, 1):
            g = np.asarray(gradient[group][name], np.float64)
            mean, square = 0.9 * mean + 0.1 * g, 0.98 * square + 0.02 * g**2
            update = (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.98**step)) + 1e-8)
            value = value - 0.1 * (update + decay * value)
        np.testing.assert_allclose(result[group][name], value, rtol=1e-5)


def test_the_gradient_is_clipped_by_its_global_norm():
    # Adam hides the scale of a gradient, its first moment does not.
    optimizer = make_optimizer(OptimConfig(clip_norm=1.0, b1=0.5), steps=200)
    gradient = jax.tree.map(lambda p: jnp.full_like(p, 100.0), PARAMS)
    _, state = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    moments = optax.tree.get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(moments), 0.5, rtol=1e-5)


def test_weight_decay_is_for_matrices():
    assert is_matrix(PARAMS) == {"encoder": {"kernel": True, "bias": False}, "head": {"kernel": True, "scale": False}}


def test_slow_parameters_move_by_their_share():
    config = OptimConfig(learning_rate=0.1, warmup=0, schedule="constant")
    slow = dataclasses.replace(config, slow_prefixes=("encoder/",), slow_fraction=0.25)
    gradients = [jax.tree.map(jnp.ones_like, PARAMS)]
    moved = [jax.tree.map(lambda a, b: jnp.abs(a - b).max(), apply(c, gradients), PARAMS) for c in (config, slow)]
    np.testing.assert_allclose(moved[1]["encoder"]["kernel"], 0.25 * moved[0]["encoder"]["kernel"], rtol=1e-4)
    np.testing.assert_allclose(moved[1]["head"]["kernel"], moved[0]["head"]["kernel"], rtol=1e-6)


def test_a_prefix_that_fits_nothing():
    with pytest.raises(UserError, match=r"no parameter's path begins with 'encodr/'; there are encoder/bias"):
        has_prefix(PARAMS, ("encodr/",))
