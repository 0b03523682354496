"""Alignment of text embeddings with behavior (OneMall §3.1): related items get similar embeddings.

An aligned embedding is `normalise(project(text) + residual[item])`. The projection is initialised with the principal
components of the texts, which keeps their geometry. The residual is a free vector per item, initialised to zero and
decayed towards zero: pairs can separate items with equal texts, and an item without pairs stays at its text. The loss
is symmetric in-batch InfoNCE over item pairs.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrec.config import UserError
from jaxrec.console import track
from jaxrec.losses.contrastive import pair_loss
from jaxrec.nn.geometry import principal_axes, unit

STEPS_PER_CALL = 50
# Scores computed at once when embeddings are evaluated: 256 MB.
SCORES = 2**26


@dataclass(frozen=True)
class AlignConfig:
    """Contrastive alignment of item embeddings on item pairs."""

    kind: str = "swing"
    """The kind of pairs in pairs.parquet that the alignment is trained on."""
    width: int = 64
    """Width of the aligned embeddings."""
    hidden: int = 256
    """Width of the projection's hidden layer."""
    item_residual: bool = True
    """Give each item a free vector besides its text, so that items with equal texts can differ."""
    residual_decay: float = 6.0
    """Weight decay of the free vectors towards zero: higher keeps items closer to their texts."""
    temperature: float = 0.1
    """Temperature of the contrastive softmax."""
    batch_size: int = 512
    """Pairs in a step."""
    epochs: float = 3.0
    """Passes over the pairs; 0 leaves the principal components of the texts."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam, falling to zero along a cosine."""
    held_out: float = 0.05
    """Share of the pairs held out for evaluation."""


class Alignment(NamedTuple):
    """A fitted alignment: parameters for `apply`, and metrics before and after."""

    params: dict
    metrics: dict[str, float]


def init(key: jax.Array, text: np.ndarray, config: AlignConfig) -> dict:
    """Parameters of `apply`: principal components, a hidden layer with zero output, zero residuals."""
    rows, text_width = text.shape
    width = min(config.width, text_width)
    mean = text.mean(0)
    sample = (text - mean)[np.linspace(0, rows - 1, min(rows, 20_000)).astype(int)]
    _, components = principal_axes(sample)
    scale = jax.nn.initializers.lecun_normal()
    params = {
        "mean": jnp.asarray(mean),
        "linear": jnp.asarray(components[:, :width].astype(np.float32)),
        "up": {"kernel": scale(key, (text_width, config.hidden), jnp.float32), "bias": jnp.zeros(config.hidden)},
        "down": {"kernel": jnp.zeros((config.hidden, width))},
    }
    return params | ({"residual": jnp.zeros((rows, width))} if config.item_residual else {})


def apply(params: dict, text: jax.Array, items: jax.Array | None = None) -> jax.Array:
    """Aligned unit vectors of items, f32 [..., width], from their text embeddings f32 [..., D].

    items: int32 [...], the items whose residuals are added; None for new items: the text alone.
    """
    centred = text - params["mean"]
    hidden = jax.nn.gelu(centred @ params["up"]["kernel"] + params["up"]["bias"])
    vectors = centred @ params["linear"] + hidden @ params["down"]["kernel"]
    if items is not None and "residual" in params:
        vectors = vectors + params["residual"][items]
    return unit(vectors)


def honest_negatives(left, right, known):
    """Mask of the true negatives, bool [B, B]: columns that are neither the row's item nor a known partner of it.

    left, right: int [B]; known: bool [B, B], whether left (row) and right (column) are a known pair. NumPy or JAX
    arrays.
    """
    same = (left[:, None] == right) | (right[:, None] == right) | (left[:, None] == left)
    return ~(known | same)


def align(
    key: jax.Array,
    text: np.ndarray,
    pairs: np.ndarray,
    config: AlignConfig = AlignConfig(),
    categories: np.ndarray | None = None,
) -> Alignment:
    """Fit an alignment on item pairs.

    Args:
      text: f32 [I, D], the text embedding of each item.
      pairs: int [n, 2], related items, in either order; repeats count once.
      categories: [I], only for the metric `same_category@10`.
    Returns:
      An `Alignment`; `apply(alignment.params, text, np.arange(I))` gives the embeddings.
    Raises:
      UserError: an embedding is not finite, or a pair names an item that does not exist.
    """
    if len(bad := np.flatnonzero(~np.isfinite(text).all(axis=1))):
        raise UserError(f"the text embedding of item {bad[0]} holds NaN or infinity: fix that row's embedding")
    if len(pairs) and not 0 <= pairs.min() <= pairs.max() < len(text):
        raise UserError(f"pairs name item {pairs.max()}, but there are {len(text)} items: prepare the tables again")
    init_key, split_key, order_key = jax.random.split(key, 3)
    params = init(init_key, text, config)
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]].astype(np.int32)
    held_out = np.asarray(jax.random.uniform(split_key, (len(pairs),))) < config.held_out
    train, test = pairs[~held_out], pairs[held_out]
    metrics = {f"{name}_before": value for name, value in measure(params, text, train, test, categories).items()}
    if len(train) and config.epochs:
        params = fit(order_key, params, text, train, config)
    metrics |= {f"{name}_after": value for name, value in measure(params, text, train, test, categories).items()}
    return Alignment(params, metrics | {"pairs": len(train), "held_out_pairs": len(test)})


def fit(key: jax.Array, params: dict, text: np.ndarray, pairs: np.ndarray, config: AlignConfig) -> dict:
    """Adam on `pair_loss` over shuffled pairs; the direction of each pair is drawn again in each epoch."""
    partners = partner_table(pairs, len(text))
    share = np.bincount(pairs.ravel(), minlength=len(text)) / pairs.size
    log_q = jnp.asarray(np.log(np.maximum(share, 1e-12)), jnp.float32)
    batch = min(config.batch_size, len(pairs))
    steps = max(1, round(config.epochs * len(pairs) / batch))
    optimiser = pair_optimiser(config, steps)
    state, text = (params, optimiser.init(params)), jnp.asarray(text)
    batches = _shuffled(key, pairs, batch, steps)
    for start in track(range(0, steps, STEPS_PER_CALL), "Aligning embeddings"):
        some = batches[start : start + STEPS_PER_CALL]
        state = _train(config, steps, state, text, partners, log_q, some)
    return state[0]


def pair_optimiser(config: AlignConfig, steps: int) -> optax.GradientTransformation:
    """Adam with a cosine schedule; weight decay on the item residuals only."""
    schedule = optax.cosine_decay_schedule(config.learning_rate, max(steps, 1))

    def labels(params):
        return {name: name if name in ("residual", "mean") else "projection" for name in params}

    return optax.multi_transform(
        {
            "projection": optax.adam(schedule),
            "residual": optax.adamw(schedule, weight_decay=config.residual_decay),
            "mean": optax.set_to_zero(),
        },
        labels,
    )


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _train(config, steps, state, text, partners, log_q, batches):
    optimiser = pair_optimiser(config, steps)

    def loss_of(params, left, right):
        vectors = apply(params, text[jnp.stack([left, right])], jnp.stack([left, right]))
        where = honest_negatives(left, right, (partners[left][:, None, :] == right[None, :, None]).any(-1))
        return pair_loss(vectors[0] @ vectors[1].T / config.temperature, log_q[jnp.stack([left, right])], where).mean()

    def step(state, batch):
        params, moments = state
        updates, moments = optimiser.update(jax.grad(loss_of)(params, *batch.T), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, state, batches)[0]


def _shuffled(key: jax.Array, pairs: np.ndarray, batch: int, steps: int) -> np.ndarray:
    """int32 [steps, batch, 2]: whole epochs over the pairs, each with its own order and directions."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    passes = -(-steps * batch // len(pairs))
    order = np.concatenate([rng.permutation(len(pairs)) for _ in range(passes)])[: steps * batch]
    chosen = pairs[order]
    return np.where(rng.random(len(chosen))[:, None] < 0.5, chosen, chosen[:, ::-1]).reshape(steps, batch, 2)


def partner_table(pairs: np.ndarray, items: int) -> np.ndarray:
    """The partners of each item, int32 [I, P], padded with -1; P is the largest number of partners."""
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[np.argsort(both[:, 0], kind="stable")]
    counts = np.bincount(both[:, 0], minlength=items)
    table = np.full((items, max(1, counts.max(initial=0))), -1, np.int32)
    table[both[:, 0], np.arange(len(both)) - np.repeat(np.cumsum(counts) - counts, counts)] = both[:, 1]
    return table


def measure(
    params: dict,
    text: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    categories: np.ndarray | None = None,
    k: int = 50,
    most: int = 2000,
) -> dict[str, float]:
    """Retrieval metrics of the embeddings.

    `pair_recall@k`: share of held-out pairs (both ways, at most `most`) whose other item is among the k nearest of the
    first, its training partners left out. `same_category@10`: share of the 10 nearest (of all others, if there are
    fewer) in the item's own category, over `most` items.
    """
    vectors = apply_all(params, text)
    figures = {}
    if len(test):
        both_ways = [np.concatenate([pairs, pairs[:, ::-1]]) for pairs in (test, train)]
        figures[f"pair_recall@{k}"] = pair_recall(vectors, *both_ways, k=k, most=most)
    if categories is not None and len(text) > 1:
        sample = evenly(np.arange(len(text)), most)
        near = np.concatenate([_nearest(vectors, part, min(10, len(text) - 1)) for part in _parts(sample, len(text))])
        figures["same_category@10"] = float((categories[near] == categories[sample][:, None]).mean())
    return figures


def evenly(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the rows, evenly spaced."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def _parts(rows: np.ndarray, columns: int) -> list[np.ndarray]:
    """The rows in chunks whose scores of all columns fit into memory."""
    return np.array_split(rows, max(1, -(-len(rows) * columns // SCORES)))


def _nearest(vectors: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """The k nearest others of some rows, in any order, int [n, k]."""
    distance = -vectors[rows] @ vectors.T
    distance[np.arange(len(rows)), rows] = np.inf
    return np.argpartition(distance, k - 1, axis=1)[:, :k]


def pair_recall(
    vectors: np.ndarray,
    test: np.ndarray,
    known: np.ndarray,
    *,
    k: int,
    most: int = 2000,
    candidates: np.ndarray | None = None,
) -> float:
    """Share of pairs whose right end is among the k nearest neighbours of the left end.

    Args:
      vectors: f32 [I, D].
      test: int [n, 2], (left, right); of more than `most` an evenly spaced part is evaluated.
      known: int [m, 2], (left, right): other right ends of a left end, which are not ranked.
      candidates: bool [I], mask of the ranked vectors; None: all.
    """
    test = evenly(test, most)
    if candidates is not None:
        rows = np.unique(np.append(test, np.flatnonzero(candidates)))
        known = known[np.isin(known, rows).all(1)]
        test, known = np.searchsorted(rows, test), np.searchsorted(rows, known)
        vectors, candidates = vectors[rows], candidates[rows]
    known = known[np.argsort(known[:, 0], kind="stable")]
    nearer = [_nearer(vectors, part, known, candidates) for part in _parts(test, len(vectors))]
    return float((np.concatenate(nearer) < k).mean())


def _nearer(vectors: np.ndarray, test: np.ndarray, known: np.ndarray, candidates: np.ndarray | None) -> np.ndarray:
    """The number of vectors nearer to the left end of each pair than its right end, int [n]; known: sorted by left."""
    each = np.arange(len(test))
    scores = vectors[test[:, 0]] @ vectors.T
    target = scores[each, test[:, 1]][:, None].copy()
    begin, end = (np.searchsorted(known[:, 0], test[:, 0], side) for side in ("left", "right"))
    rows = np.repeat(each, end - begin)
    # The positions of each row's partners in `known`: a range from `begin` on.
    place = np.arange(len(rows)) - np.repeat(np.cumsum(end - begin) - end, end - begin)
    scores[rows, known[place, 1]] = -np.inf
    scores[each, test[:, 0]] = -np.inf
    if candidates is not None:
        scores[:, ~candidates] = -np.inf
    return (scores > target).sum(1)


def apply_all(params: dict, text: np.ndarray) -> np.ndarray:
    """The aligned embeddings of all items, f32 [I, width]."""
    return np.asarray(jax.jit(apply)(params, text, jnp.arange(len(text))))
