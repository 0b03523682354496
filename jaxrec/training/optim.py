"""The optimiser: AdamW with warm-up, a schedule, clipping, and a smaller learning rate for some parameters."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxrec.config import UserError, check_least, check_shares


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-3
    """Peak learning rate, reached at the end of the warm-up."""
    warmup: int = 100
    """Warm-up steps, over which the learning rate rises from zero."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: a cosine decay to `final_fraction` at the last step, or constant."""
    final_fraction: float = 0.1
    """Final learning rate of the cosine decay, as a share of the peak."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; none for biases, norms and other vectors."""
    clip_norm: float = 1.0
    """Gradient clipping by global norm; 0 for none."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.98
    """Decay of the second moment."""
    slow_prefixes: tuple[str, ...] = ()
    """Path prefixes of parameters with a smaller learning rate, e.g. "encoder/"."""
    slow_fraction: float = 0.1
    """Learning rate of those parameters, as a share of the others'."""

    def __post_init__(self):
        least = ("learning_rate", "warmup", "final_fraction", "weight_decay", "clip_norm", "slow_fraction")
        check_least(self, "optim", **dict.fromkeys(least, 0))
        check_shares(self, "optim", "b1", "b2")

    def check_steps(self, steps: int, place: str = "optim") -> None:
        """Checks that the warm-up is shorter than the training; `place` is the prefix of the key in messages.

        Raises:
          UserError: it is not.
        """
        if self.warmup >= steps:
            raise UserError(
                f"configuration key '{place}.warmup' is {self.warmup}, as long as the training of {steps}; "
                "make it shorter"
            )


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step, for a training of `steps` steps.

    Raises:
      UserError: the warm-up is longer than the training.
    """
    config.check_steps(steps)
    rise = optax.linear_schedule(0.0, config.learning_rate, config.warmup)
    if config.schedule == "constant":
        rest = optax.constant_schedule(config.learning_rate)
    else:
        rest = optax.cosine_decay_schedule(config.learning_rate, steps - config.warmup, config.final_fraction)
    # The step plus 1: a first step at rate zero would be wasted.
    return lambda step: optax.join_schedules([rise, rest], [config.warmup])(step + 1)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optax transformation of a configuration."""
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts += [
        optax.scale_by_adam(b1=config.b1, b2=config.b2, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    ]
    if config.slow_prefixes:
        slow = optax.masked(optax.scale(config.slow_fraction), lambda tree: has_prefix(tree, config.slow_prefixes))
        parts.append(slow)
    return optax.chain(*parts)


def is_matrix(params: Any) -> Any:
    """True for the leaves with weight decay: those with two or more axes, except biases."""

    def decayed(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        # Biases and norms of stacked layers or split heads have two axes too, so shapes are not enough.
        return leaf.ndim > 1 and path_name(path).rsplit("/", 1)[-1] not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decayed, params)


def has_prefix(params: Any, prefixes: Sequence[str]) -> Any:
    """True for the leaves whose path, as "encoder/layer_0/kernel", begins with one of the prefixes.

    Raises:
      UserError: a prefix matches no parameter.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            some = ", ".join(names[:5])
            raise UserError(f"slow_prefixes: no parameter's path begins with {prefix!r}; there are {some}, ...")
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).startswith(tuple(prefixes)), params)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as "encoder/layer_0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
