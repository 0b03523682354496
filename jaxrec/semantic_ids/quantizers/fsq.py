"""Finite scalar quantization: a code is a cell of a small fixed grid, so that codes are used evenly (OneMall §3.1.3).

A vector is projected to n coordinates; each is squashed to (-1, 1) and cut into `levels[i]` equal steps, and the n
digits make one code (12 binary coordinates: 4096 codes). The projection is linear plus a hidden layer. It starts as the
principal components cut at their medians, and is then trained, straight through the rounding, to reconstruct the vector
while its digits stay evenly used and uncorrelated.
"""

import math
from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrec.config import UserError
from jaxrec.console import track
from jaxrec.nn.geometry import principal_axes
from jaxrec.semantic_ids.quantizers.rows import check_rows, check_width

STEPS_PER_CALL = 100


@dataclass(frozen=True)
class FsqConfig:
    """The grid of a finite scalar quantizer and how it is fitted."""

    levels: tuple[int, ...] = (2,) * 8
    """Steps in each coordinate; eight binary ones make 256 codes (OneMall: twelve, 4096)."""
    hidden: int = 64
    """Width of the hidden layers of the encoder and of the decoder."""
    steps: int = 1000
    """Training steps; 0 leaves the principal components."""
    batch_size: int = 1024
    """Rows in a step."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam, falling to zero along a cosine."""
    balance: float = 0.1
    """Weight of the term that keeps the digits evenly used and uncorrelated."""


@flax.struct.dataclass
class Fsq:
    """A fitted quantizer: its parameters, and the number of steps in each coordinate."""

    params: dict
    levels: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def sizes(self) -> tuple[int]:
        """The number of codes: one level."""
        return (math.prod(self.levels),)

    @property
    def width(self) -> int:
        """Width of the rows that it encodes."""
        return self.params["linear"]["kernel"].shape[0]


def fit(key: jax.Array, x: np.ndarray | jax.Array, config: FsqConfig = FsqConfig()) -> Fsq:
    """Fit a quantizer with prod(config.levels) codes to x f32 [I, D].

    Raises:
      UserError: no coordinate or one with fewer than two steps, more codes than int32 holds, no rows, or a row with NaN
        or infinity.
    """
    x = jnp.asarray(check_rows(x, 1))
    check(config, x.shape)
    levels = config.levels
    init_key, order_key = jax.random.split(key)
    # In units of the data, so that `learning_rate` and `balance` mean the same whatever its scale.
    scale, variance = scale_and_variance(x)
    x = x / scale
    params = init(init_key, np.asarray(x), config)
    optimiser = optax.adam(optax.cosine_decay_schedule(config.learning_rate, max(config.steps, 1)))
    state = params, optimiser.init(params)
    for start in track(range(0, config.steps, STEPS_PER_CALL), "Fitting the FSQ level"):
        steps = jnp.arange(start, min(start + STEPS_PER_CALL, config.steps))
        state = _train(config, state, x, variance, jax.vmap(partial(jax.random.fold_in, order_key))(steps))
    return Fsq(rescaled(state[0], scale), levels)


def scale_and_variance(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The root mean squared distance s of rows x f32 [I, D] to their mean, f32 [], and the same squared for x / s.

    The second is 1 up to rounding. For rows that are equal up to rounding: their largest number (1 for zeros), and 1.
    """
    # As in `rqvae.centre_and_scale`: squares of large numbers overflow, those of small ones vanish.
    largest = jnp.abs(x).max()
    largest = jnp.where(largest > 0, largest, 1.0)
    spread = jnp.sqrt(jnp.var(x / largest, axis=0).sum())
    scale = jnp.where(spread > 1e-6, spread * largest, largest)
    variance = jnp.var(x / scale, axis=0).sum()
    return scale, jnp.where(spread > 1e-6, variance, 1.0)


def rescaled(params: dict, scale: jax.Array) -> dict:
    """Parameters for rows that are `scale` times as large."""
    back = params["back_linear"]
    return params | {
        "unit": params["unit"] * scale,
        "linear": params["linear"] | {"kernel": params["linear"]["kernel"] / scale},
        "back_linear": {"kernel": back["kernel"] * scale, "bias": back["bias"] * scale},
    }


def check(config: FsqConfig, shape: tuple[int, ...]) -> None:
    """UserError when the configuration is invalid; rows [I, D] may have any shape."""
    levels = config.levels
    if not levels or min(levels) < 2 or math.prod(levels) >= 2**31:
        raise UserError(f"FSQ levels={levels}: give at least one coordinate, each of 2 steps or more, below 2^31 codes")


def encode(fsq: Fsq, x: np.ndarray | jax.Array) -> jax.Array:
    """The codes of x f32 [I, D], int32 [I, 1] in [0, prod(levels)); the first coordinate is the leading digit."""
    x = check_rows(x, 0)
    check_width(x, fsq.width)
    return digits_to_codes(to_digits(project(fsq.params, jnp.asarray(x)), fsq.levels), fsq.levels)[:, None]


def decode(fsq: Fsq, codes: np.ndarray | jax.Array) -> jax.Array:
    """The rows f32 [I, D] that codes int32 [I, 1] decode to."""
    return reconstruct(fsq.params, centres(codes_to_digits(jnp.asarray(codes)[:, 0], fsq.levels), fsq.levels))


def init(key: jax.Array, x: np.ndarray, config: FsqConfig) -> dict:
    """Parameters that cut the principal components at their medians."""
    up_key, back_key = jax.random.split(key)
    levels = config.levels
    width, n = x.shape[1], len(levels)
    # The middle digit of a normal coordinate is as likely as the others at about this slope of the sigmoid.
    slope = 1.7
    directions = principal_directions(x, n)
    projected = x @ directions
    spread = projected.std(0)
    # A direction whose spread is only rounding is dropped: scaled up, it would give equal rows different codes.
    largest = np.abs(x).max()
    told_apart = spread > 1e-6 * largest
    scale = np.where(told_apart, slope / np.maximum(spread, 1e-30), 0)
    unit = 1 / scale[told_apart].mean() if told_apart.any() else max(largest, 1e-12)
    quantized = np.asarray(centres(to_digits((projected - np.median(projected, 0)) * scale, levels), levels))
    # Centred, so that constant coordinates do not contribute to the reconstruction.
    mean, middle = x.mean(0, dtype=np.float64), quantized.mean(0, dtype=np.float64)
    back = np.linalg.lstsq(quantized - middle, x - mean, rcond=None)[0]
    dense = jax.nn.initializers.lecun_normal()
    return jax.tree.map(
        jnp.asarray,
        {
            "unit": np.float32(unit),
            "linear": {
                "kernel": (directions * scale).astype(np.float32),
                "bias": (-np.median(projected, 0) * scale).astype(np.float32),
            },
            "up": {"kernel": dense(up_key, (width, config.hidden)), "bias": np.zeros(config.hidden, np.float32)},
            "down": {"kernel": np.zeros((config.hidden, n), np.float32)},
            "back_linear": {
                "kernel": back.astype(np.float32),
                "bias": (mean - middle @ back).astype(np.float32),
            },
            "back_up": {"kernel": dense(back_key, (n, config.hidden)), "bias": np.zeros(config.hidden, np.float32)},
            "back_down": {"kernel": np.zeros((config.hidden, width), np.float32)},
        },
    )


def principal_directions(x: np.ndarray, n: int) -> np.ndarray:
    """The n first principal directions of x [I, D], f64 [D, n]; beyond D they repeat."""
    _, axes = principal_axes((x - x.mean(0)).astype(np.float64))
    return axes[:, np.arange(n) % x.shape[1]]


def project(params: dict, x: jax.Array) -> jax.Array:
    """The unbounded coordinates of x f32 [I, D], f32 [I, n]."""
    hidden = jax.nn.gelu(x / params["unit"] @ params["up"]["kernel"] + params["up"]["bias"])
    return x @ params["linear"]["kernel"] + params["linear"]["bias"] + hidden @ params["down"]["kernel"]


def reconstruct(params: dict, values: jax.Array) -> jax.Array:
    """Vectors f32 [I, D] from bounded coordinates f32 [I, n]."""
    hidden = jax.nn.gelu(values @ params["back_up"]["kernel"] + params["back_up"]["bias"])
    linear = values @ params["back_linear"]["kernel"] + params["back_linear"]["bias"]
    return linear + hidden @ params["back_down"]["kernel"] * params["unit"]


def to_digits(coordinates: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """The step that each unbounded coordinate falls into, int32 [I, n]."""
    steps = jnp.asarray(levels)
    return jnp.clip(jnp.floor(jax.nn.sigmoid(coordinates) * steps), 0, steps - 1).astype(jnp.int32)


def centres(digits: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """The middle of each step in (-1, 1), f32 [I, n]."""
    return (2 * digits + 1) / jnp.asarray(levels, jnp.float32) - 1


def digits_to_codes(digits: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """Mixed-radix digits int32 [I, n] as one code int32 [I]."""
    weights = np.cumprod([1, *levels[:0:-1]])[::-1].astype(np.int32)
    return digits @ weights


def codes_to_digits(codes: np.ndarray | jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """The digits int32 [I, n] of codes int32 [I]."""
    weights = np.cumprod([1, *levels[:0:-1]])[::-1].astype(np.int32)
    return jnp.asarray(codes)[:, None] // weights % np.asarray(levels, np.int32)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _train(config, state, x, variance, keys):
    levels = config.levels
    optimiser = optax.adam(optax.cosine_decay_schedule(config.learning_rate, max(config.steps, 1)))

    def loss_of(params, rows):
        coordinates = project(params, rows)
        soft = 2 * jax.nn.sigmoid(coordinates) - 1
        hard = centres(to_digits(coordinates, levels), levels)
        values = soft + jax.lax.stop_gradient(hard - soft)
        error = jnp.mean(jnp.sum((rows - reconstruct(params, values)) ** 2, axis=-1)) / variance
        return error + config.balance * imbalance(values, levels)

    def step(state, key):
        params, moments = state
        rows = x[jax.random.randint(key, (min(config.batch_size, len(x)),), 0, len(x))]
        updates, moments = optimiser.update(jax.grad(loss_of)(params, rows), moments)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, state, keys)[0]


def imbalance(values: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """How far coordinates f32 [B, n] are from even and independent use of their steps, by their first two moments.

    In units where an evenly used coordinate has mean 0 and variance 1: mean squared means, and mean squared differences
    between the covariance matrix and the identity, a row at a time.
    """
    steps = np.asarray(levels, np.float32)
    unit = values / np.sqrt((1 - steps**-2) / 3)
    mean = unit.mean(0)
    covariance = (unit - mean).T @ (unit - mean) / len(unit)
    return jnp.mean(mean**2) + jnp.sum((covariance - jnp.eye(len(mean))) ** 2) / len(mean)
