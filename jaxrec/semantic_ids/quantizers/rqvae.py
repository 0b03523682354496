"""RQ-VAE: an autoencoder whose latent is quantized level by level, each level on the residual of those before it.

OneSug Eq. 3 (§3.2.2), and TIGER's recipe: encoder and decoder of three blocks are trained together with the codebooks,
with a straight-through gradient.

The known failure is collapse: few codes are chosen, only these learn, and the others are never chosen again. Three
things prevent it. The autoencoder is initialised with the principal components and warmed up without quantization.
k-means on its latents then initialises the codebooks; random codes would lie far from all latents. And a code that no
row has chosen for some steps moves to a random residual of the batch; this alone revives collapsed codebooks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrec.config import UserError
from jaxrec.console import track
from jaxrec.nn.geometry import principal_axes
from jaxrec.semantic_ids.quantizers import residual
from jaxrec.semantic_ids.quantizers.kmeans import KMeansConfig, assign, by_chunk, drawn
from jaxrec.semantic_ids.quantizers.residual import ResidualConfig
from jaxrec.semantic_ids.quantizers.rows import check_enough, check_rows, check_width

STEPS_PER_CALL = 50
CHUNK_ROWS = 4096
"""Rows in one pass of the encoder or the decoder; bounds the memory of their hidden layers."""

Books = tuple[jax.Array, ...]
"""One array a level."""


@dataclass(frozen=True)
class RqVaeConfig:
    """How an RQ-VAE is built and trained."""

    sizes: tuple[int, ...] = (512, 512, 512, 512)
    """Codes in each level (OneSug §4.1.4; TIGER: 256, 256, 256)."""
    hidden: tuple[int, ...] = (512, 256, 128)
    """Width of each block of the encoder, three in both papers; the decoder has them in reverse."""
    latent_width: int = 32
    """Width of the latent and of the codes."""
    linear: bool = True
    """Add a linear path, initialised with the principal components, to the blocks: a lower error after as many steps,
    with a few more shared IDs. False: the blocks alone, as in the papers."""
    beta: float = 0.25
    """Weight of the term that commits the encoder to the chosen codes."""
    ema_decay: float = 0.0
    """0: codes are trained by the gradient of the loss. Above 0, e.g. 0.99: codes are moving averages, with this decay,
    of the residuals assigned to them."""
    warm_steps: int = 500
    """Warm-up steps without quantization."""
    steps: int = 2000
    """Steps with quantization."""
    batch_size: int = 512
    """Rows in a step."""
    learning_rate: float = 2e-3
    """Learning rate of Adam; with quantization it falls to zero along a cosine."""
    revive_after: int = 20
    """Steps without a row after which a code moves to a random residual of the batch. Where a level has more codes than
    a batch has rows, the number is multiplied by their ratio."""
    start_rows: int = 256
    """Sampled rows, a code of the largest level, whose principal components and latents initialise the training."""
    start: KMeansConfig = field(default_factory=partial(KMeansConfig, iterations=20))
    """The k-means that initialises the codebooks."""


@flax.struct.dataclass
class RqVae:
    """A trained RQ-VAE.

    params: {"encoder", "decoder"}, each {"layer_0": {"kernel", "bias"}, ..., "linear": {"kernel"}}.
    codebooks: f32 [K, latent width], one a level.
    mean: f32 [D] and scale: f32 [], of the embeddings that it was trained on.
    """

    params: dict
    codebooks: Books
    mean: jax.Array
    scale: jax.Array

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes in each level."""
        return tuple(len(codebook) for codebook in self.codebooks)

    @property
    def width(self) -> int:
        """Width of the embeddings that it encodes."""
        return len(self.mean)


@flax.struct.dataclass
class Training:
    """The training state.

    counts: f32 [K] a level, the moving average of the rows of a batch assigned to a code. idle: int32 [K] a level, the
    steps since a row was assigned.
    """

    params: dict
    codebooks: Books
    moments: optax.OptState
    counts: Books
    idle: Books


def fit(key: jax.Array, x: np.ndarray | jax.Array, config: RqVaeConfig = RqVaeConfig()) -> RqVae:
    """Train on embeddings x f32 [I, D] of any scale; the same key gives the same bits.

    Raises:
      UserError: no level, a level with fewer than two codes, fewer rows than codes, or a row with NaN or infinity.
    """
    x = jnp.asarray(check_rows(x, 0))
    check(config, x.shape)
    init_key, warm_key, sample_key, start_key, train_key = jax.random.split(key, 5)
    mean, scale = centre_and_scale(x)
    x = (x - mean) / scale
    sample = x[drawn(sample_key, len(x), min(len(x), config.start_rows * max(config.sizes)))]
    params = init(init_key, sample, config)
    warm = params, optax.adam(config.learning_rate).init(params)
    for keys in _step_keys(warm_key, config.warm_steps, "Warming up the autoencoder"):
        warm = _warm(config, warm, x, keys)
    params, _ = warm
    state = begin(params, start_codebooks(start_key, _latents(params, sample), config), len(x), config)
    for keys in _step_keys(train_key, config.steps, "Training the RQ-VAE"):
        state = train(config, state, x, keys)
    return RqVae(state.params, state.codebooks, mean, scale)


def check(config: RqVaeConfig, shape: tuple[int, ...]) -> None:
    """UserError when the configuration is invalid, or does not fit rows of a shape [I, D]."""
    if not config.sizes or min(config.sizes) < 2:
        raise UserError(f"RQ-VAE sizes={config.sizes}: give at least one level, each of 2 codes or more")
    if min((config.latent_width, config.batch_size, *config.hidden)) < 1:
        raise UserError(
            f"RQ-VAE hidden={config.hidden}, latent_width={config.latent_width}, batch_size={config.batch_size}: "
            "give each 1 or more"
        )
    check_enough(shape[0], max(config.sizes))


def encode(rqvae: RqVae, x: np.ndarray | jax.Array) -> jax.Array:
    """The codes of x f32 [I, D], int32 [I, levels].

    Raises:
      UserError: another width than the fitted one, or a row with NaN or infinity.
    """
    x = jnp.asarray(check_rows(x, 0))
    check_width(x, rqvae.width)
    return _encode(rqvae, x)


@jax.jit
def decode(rqvae: RqVae, codes: np.ndarray | jax.Array) -> jax.Array:
    """The embeddings f32 [I, D] that codes int32 [I, m] of the first m levels decode to."""
    codes = jnp.asarray(codes)
    books = rqvae.codebooks[: codes.shape[1]]
    latent = sum((book[codes[:, m]] for m, book in enumerate(books)), jnp.zeros(rqvae.codebooks[0].shape[1]))
    return by_chunk(partial(blocks, rqvae.params["decoder"]), latent, CHUNK_ROWS) * rqvae.scale + rqvae.mean


def loss(
    x: jax.Array,
    reconstruction: jax.Array,
    residuals: jax.Array,
    chosen: jax.Array,
    beta: float,
    where: jax.Array | None = None,
) -> jax.Array:
    """L_recon + L_rqvae of each row, f32 [B] (OneSug Eq. 3, its bracket closed behind both terms of a level).

    Args:
      x: f32 [B, D], and its reconstruction.
      residuals: f32 [B, levels, latent width], the input of each level; chosen: the vectors of the chosen codes.
      where: bool [B], mask of the rows; masked rows give 0.
    """
    fixed = jax.lax.stop_gradient
    reconstructed = jnp.sum((x - reconstruction) ** 2, axis=-1)
    codes_follow = jnp.sum((fixed(residuals) - chosen) ** 2, axis=(-2, -1))
    encoder_commits = jnp.sum((residuals - fixed(chosen)) ** 2, axis=(-2, -1))
    total = reconstructed + codes_follow + beta * encoder_commits
    return total if where is None else jnp.where(where, total, 0)


def quantize(codebooks: Books, latents: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes int32 [B, levels] of latents f32 [B, latent width]; also the residuals and the chosen codes' vectors.

    Both f32 [B, levels, latent width]. A residual's gradient reaches the latent, not the codes of earlier levels.
    """
    residual, levels = latents, []
    for codebook in codebooks:
        codes, _ = assign(jax.lax.stop_gradient(residual), codebook)
        levels.append((codes, residual, codebook[codes]))
        residual = residual - jax.lax.stop_gradient(codebook[codes])
    codes, residuals, chosen = (jnp.stack(each, axis=1) for each in zip(*levels, strict=True))
    return codes, residuals, chosen


def straight_through(latents: jax.Array, chosen: jax.Array) -> jax.Array:
    """The sum of chosen f32 [B, levels, latent width], with the gradient of latents, f32 [B, latent width]."""
    return latents + jax.lax.stop_gradient(chosen.sum(1) - latents)


def blocks(layers: dict, x: jax.Array) -> jax.Array:
    """Dense layers, with a ReLU after each but the last, plus the linear path if any: f32 [B, in] to [B, out]."""
    hidden = x
    count = sum(name.startswith("layer_") for name in layers)
    for i in range(count):
        hidden = hidden @ layers[f"layer_{i}"]["kernel"] + layers[f"layer_{i}"]["bias"]
        hidden = jax.nn.relu(hidden) if i + 1 < count else hidden
    return hidden + x @ layers["linear"]["kernel"] if "linear" in layers else hidden


def init(key: jax.Array, x: jax.Array, config: RqVaeConfig) -> dict:
    """Initial weights of the encoder and the decoder, for centred embeddings x f32 [I, D].

    Blocks are random. With a linear path, their output is zero and the path has the principal components.
    """
    widths = (x.shape[1], *config.hidden, config.latent_width)
    dense = jax.nn.initializers.he_normal()

    def layers(key, widths):
        kernels = [dense(jax.random.fold_in(key, i), shape) for i, shape in enumerate(pairwise(widths))]
        if config.linear:
            kernels[-1] = jnp.zeros_like(kernels[-1])
        return {f"layer_{i}": {"kernel": each, "bias": jnp.zeros(each.shape[1])} for i, each in enumerate(kernels)}

    encoder_key, decoder_key = jax.random.split(key)
    params = {"encoder": layers(encoder_key, widths), "decoder": layers(decoder_key, widths[::-1])}
    if config.linear:
        directions = principal_directions(np.asarray(x), config.latent_width)
        params["encoder"]["linear"] = {"kernel": jnp.asarray(directions)}
        params["decoder"]["linear"] = {"kernel": jnp.asarray(directions.T)}
    return params


def principal_directions(x: np.ndarray, count: int) -> np.ndarray:
    """The first principal directions of centred x [I, D], f32 [D, count]; zeros beyond D."""
    found = principal_axes(x)[1][:, :count]
    return np.pad(found, ((0, 0), (0, count - found.shape[1]))).astype(np.float32)


def centre_and_scale(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean f32 [D] of x f32 [I, D], and its standard deviation about it over all coordinates, f32 [].

    1 when all rows are the same up to rounding.
    """
    # In units of the largest number: squares of large numbers overflow and those of small ones underflow.
    largest = jnp.maximum(jnp.abs(x).max(), 1e-30)
    mean = (x / largest).mean(0)
    spread = jnp.sqrt(jnp.mean((x / largest - mean) ** 2))
    return mean * largest, jnp.where(spread > 1e-6, spread * largest, 1.0)


def start_codebooks(key: jax.Array, latents: jax.Array, config: RqVaeConfig) -> Books:
    """Residual k-means on latents f32 [I, latent width]: one codebook f32 [K, latent width] a level."""
    return residual.fit(key, latents, ResidualConfig(config.sizes, kmeans=config.start)).centroids


def begin(params: dict, codebooks: Books, rows: int, config: RqVaeConfig) -> Training:
    """The state before the first step with quantized latents."""
    even = [min(config.batch_size, rows) / k for k in config.sizes]
    return Training(
        params,
        codebooks,
        optimiser(config).init(trained(params, codebooks, config)),
        tuple(jnp.full(k, each) for k, each in zip(config.sizes, even, strict=True)),
        tuple(jnp.zeros(k, jnp.int32) for k in config.sizes),
    )


def follow(
    codebook: jax.Array, counts: jax.Array, residuals: jax.Array, codes: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array]:
    """Move codes f32 [K, d] towards their residuals f32 [B, d] (of codes int32 [B]); also returns the new counts.

    A code is the average of its residuals over the steps; each step has `decay` times the weight of the next.
    """
    used = jax.ops.segment_sum(jnp.ones(len(codes)), codes, len(codebook))
    sums = jax.ops.segment_sum(residuals, codes, len(codebook))
    counts = decay * counts + (1 - decay) * used
    step = (1 - decay) * (sums - used[:, None] * codebook)
    return codebook + step / jnp.maximum(counts, 1e-12)[:, None], counts


def revive(
    key: jax.Array, codebook: jax.Array, counts: jax.Array, idle: jax.Array, residuals: jax.Array, after: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Move codes idle (int32 [K] steps) for `after` steps to random residuals f32 [B, d]; their counts are reset."""
    dead = idle >= after
    picked = residuals[jax.random.randint(key, (len(codebook),), 0, len(residuals))]
    even = len(residuals) / len(codebook)
    return jnp.where(dead[:, None], picked, codebook), jnp.where(dead, even, counts), jnp.where(dead, 0, idle)


def optimiser(config: RqVaeConfig) -> optax.GradientTransformation:
    """Adam for the steps with quantized latents."""
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, max(config.steps, 1)))


def trained(params: dict, codebooks: Books, config: RqVaeConfig) -> tuple[dict, Books]:
    """The parameters trained by gradient: the weights, and the codebooks unless they are moving averages."""
    return params, () if config.ema_decay else codebooks


def _step_keys(key: jax.Array, steps: int, description: str) -> Iterator[jax.Array]:
    """The keys of the steps, some steps at a time, under a progress bar."""
    for start in track(range(0, steps, STEPS_PER_CALL), description):
        numbers = jnp.arange(start, min(start + STEPS_PER_CALL, steps))
        yield jax.vmap(partial(jax.random.fold_in, key))(numbers)


def _batch(key, x, config):
    return x[jax.random.randint(key, (min(config.batch_size, len(x)),), 0, len(x))]


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _warm(config, state, x, keys):
    def loss_of(params, rows):
        reconstruction = blocks(params["decoder"], blocks(params["encoder"], rows))
        return jnp.mean(jnp.sum((rows - reconstruction) ** 2, axis=-1))

    def step(state, key):
        params, moments = state
        gradients = jax.grad(loss_of)(params, _batch(key, x, config))
        updates, moments = optax.adam(config.learning_rate).update(gradients, moments)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, state, keys)[0]


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def train(config: RqVaeConfig, state: Training, x: jax.Array, keys: jax.Array) -> Training:
    """One step for each key, on random batches of scaled embeddings x f32 [I, D]."""

    def loss_of(parts, codebooks, rows):
        params, own = parts
        latents = blocks(params["encoder"], rows)
        codes, residuals, chosen = quantize(own or codebooks, latents)
        reconstruction = blocks(params["decoder"], straight_through(latents, chosen))
        return loss(rows, reconstruction, residuals, chosen, config.beta).mean(), (codes, residuals)

    def step(state, key):
        batch_key, revive_key = jax.random.split(key)
        rows = _batch(batch_key, x, config)
        parts = trained(state.params, state.codebooks, config)
        gradients, (codes, residuals) = jax.grad(loss_of, has_aux=True)(parts, state.codebooks, rows)
        updates, moments = optimiser(config).update(gradients, state.moments)
        params, own = optax.apply_updates(parts, updates)
        levels = []
        for m, (book, counts, idle) in enumerate(zip(own or state.codebooks, state.counts, state.idle, strict=True)):
            if config.ema_decay:
                book, counts = follow(book, counts, residuals[:, m], codes[:, m], config.ema_decay)
            idle = (idle + 1).at[codes[:, m]].set(0)
            level_key = jax.random.fold_in(revive_key, m)
            # In a batch with fewer rows than codes most codes are idle, dead or not.
            after = config.revive_after * max(1, -(-len(book) // len(residuals)))
            levels.append(revive(level_key, book, counts, idle, residuals[:, m], after))
        codebooks, counts, idle = zip(*levels, strict=True)
        return Training(params, codebooks, moments, counts, idle), None

    return jax.lax.scan(step, state, keys)[0]


@jax.jit
def _latents(params, x):
    return by_chunk(partial(blocks, params["encoder"]), x, CHUNK_ROWS)


@jax.jit
def _encode(rqvae, x):
    def of_rows(rows):
        return quantize(rqvae.codebooks, blocks(rqvae.params["encoder"], (rows - rqvae.mean) / rqvae.scale))[0]

    return by_chunk(of_rows, x, CHUNK_ROWS)
