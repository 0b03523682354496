"""Embeddings of product cards, short videos and live streams (OneMall §3.1.3), all of one width and one geometry.

An embedding has two halves: what is sold, and what is shown.

    product card   [card, card]                    it shows itself
    short video    [its product, its own]          [own, own] where no product is known
    live stream    item tower([its current products, its own])

Both halves have unit length, and the whole is divided by sqrt(2). Then the inner product of two cards is unchanged, a
video lies half-way between its product and its content, and no scenario differs by its norm or by a block of zeros,
which would make the first k-means codebook separate scenarios.

A live stream's products change, so its embedding cannot be kept: the item tower of a two-tower retrieval model computes
a new one whenever they change. The user tower reads recent items. Both towers are initialised as the identity (the user
tower: the mean of the items) and trained on the users' next items. The item tower has a lower learning rate, so that
the semantic IDs of its embeddings change slowly.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.compute as pc

from jaxrec.config import UserError
from jaxrec.console import track
from jaxrec.losses.contrastive import in_batch_softmax
from jaxrec.nn.geometry import unit
from jaxrec.training.optim import OptimConfig, make_optimizer

LIVE_STREAM = "live_stream"
STEPS_PER_CALL = 50


@dataclass(frozen=True)
class TowersConfig:
    """The two-tower model that computes the embeddings of live streams."""

    history: int = 10
    """Recent items that the user tower reads."""
    behaviors: tuple[str, ...] = ("click", "cart", "purchase")
    """Behaviors of the events that the towers are trained on."""
    hidden: int = 256
    """Width of the hidden layer of each tower."""
    temperature: float = 0.1
    """Temperature of the in-batch softmax."""
    batch_size: int = 256
    """Examples in a step."""
    steps: int = 1000
    """Training steps."""
    learning_rate: float = 1e-3
    """Peak learning rate of the user tower."""
    item_learning_rate: float = 1e-4
    """Peak learning rate of the item tower: lower, so that embeddings and their semantic IDs change slowly."""


class ScenarioChanges(NamedTuple):
    """Times at which the products of live streams changed, by (item, time); change c is row I + c of the inputs."""

    item: np.ndarray
    """int64 [c]"""
    time: np.ndarray
    """int64 [c], seconds."""


class TowerData(NamedTuple):
    """The towers' training data. A row is a state of an item; a live stream has one for every change of its
    products."""

    inputs: np.ndarray
    """f32 [R, 2 D], from `compose`; the first I rows are the items, live streams without products."""
    item: np.ndarray
    """int32 [R], the item of each row."""
    current: np.ndarray
    """int32 [I], the newest row of each item."""
    history: np.ndarray
    """int32 [n, S], rows of the user's earlier items, the newest last, padded with -1 on the left."""
    target: np.ndarray
    """int32 [n], the row of the user's next item."""
    held_out: np.ndarray
    """bool [n], examples of other splits than train."""


def compose(own: np.ndarray, products: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """[what is sold, what is shown] as unit vectors f32 [n, 2 D].

    Args:
      own: f32 [n, D], the embeddings of the items themselves.
      products: int [n, P], rows of `vectors` of an item's products, padded with -1. Items without known products, such
        as product cards, have their own embedding in both halves.
      vectors: f32 [I, D], the embeddings of the products.
    """
    own, vectors = _unit(own), _unit(vectors)
    # Column by column: all products of all items at once would take P times the memory of the result.
    total = sum(vectors[np.maximum(column, 0)] * (column >= 0)[:, None] for column in products.T)
    sold = np.where((products >= 0).any(1)[:, None], _unit(total), own)
    return (np.concatenate([sold, own], axis=1) / np.sqrt(2)).astype(np.float32)


def scenario_embeddings(
    own: np.ndarray, items: pa.Table, live_streams: pa.Table | None = None, item_tower: dict | None = None
) -> np.ndarray:
    """Embeddings of a catalogue of all scenarios, unit f32 [I, 2 D].

    Args:
      own: f32 [I, D], the embedding of each item's own text.
      items: item_id str; scenario str and product_ids list of str where there are any.
      live_streams: item_id, timestamp, product_ids: the products of a live stream from then on; the newest row counts.
      item_tower: parameters from `train_towers`, applied to live streams; without them a live stream is composed like
        a video, of its products and its own embedding.

    Raises:
      UserError: the tables and the embeddings don't fit.
    """
    inputs, _, current = _rows(own, items, live_streams)
    vectors = inputs[current]
    live = _scenarios(items) == LIVE_STREAM
    if item_tower is not None and live.any():
        vectors[live] = encode_items(item_tower, vectors[live])
    return vectors


def encode_items(item_tower: dict, inputs: np.ndarray) -> np.ndarray:
    """The item tower's unit vectors f32 [n, 2 D] of inputs from `compose`; one forward pass for a changed stream."""
    if inputs.shape[1] != (width := item_tower["down"]["kernel"].shape[1]):
        raise UserError(
            f"the item tower was trained on inputs {width} wide, these are {inputs.shape[1]} wide: train it again"
        )
    return np.asarray(jax.jit(item_vectors)(item_tower, inputs))


def tower_data(
    own: np.ndarray, items: pa.Table, events: pa.Table, live_streams: pa.Table | None, config: TowersConfig
) -> TowerData:
    """Examples from a log: a user's history and the next item.

    An item counts once in a session, at its first event: a purchase of an item just clicked carries no information. A
    live stream has the products that it sold at that time.

    Args:
      own, items, live_streams: as for `scenario_embeddings`.
      events: user, session, item int; timestamp int; behavior, split str, in order, as in events.parquet.

    Raises:
      UserError: the tables don't fit, or no user has two events of the wanted behaviors.
    """
    inputs, changes, current = _rows(own, items, live_streams)
    events = events.filter(pc.is_in(events["behavior"], pa.array(config.behaviors, pa.string())))
    user, session, item, time = (
        events[name].to_numpy().astype(np.int64) for name in ("user", "session", "item", "timestamp")
    )
    _, first = np.unique(np.stack([user, session, item]), axis=1, return_index=True)
    first = np.sort(first)
    user, item, time = user[first], item[first], time[first]
    row = _row_at(item, time, changes, len(own))
    # The preceding events of the same user.
    back = np.arange(len(row))[:, None] + np.arange(-config.history, 0)
    history = np.where((back >= 0) & (user[np.maximum(back, 0)] == user[:, None]), row[np.maximum(back, 0)], -1)
    known = (history >= 0).any(1)
    if not known.any():
        raise UserError(
            f"no user has two events of {', '.join(config.behaviors)}, so the towers have nothing to learn from: "
            "set towers.behaviors"
        )
    held_out = pc.not_equal(events["split"], "train").to_numpy(zero_copy_only=False)[first]
    of_row = np.concatenate([np.arange(len(own)), changes.item]).astype(np.int32)
    return TowerData(
        inputs, of_row, current, history[known].astype(np.int32), row[known].astype(np.int32), held_out[known]
    )


def init_towers(key: jax.Array, width: int, config: TowersConfig) -> dict:
    """Parameters of both towers, initialised as the identity: the output layers are zero."""
    dense = jax.nn.initializers.lecun_normal()

    def tower(key: jax.Array, inputs: int) -> dict:
        return {
            "up": {"kernel": dense(key, (inputs, config.hidden)), "bias": jnp.zeros(config.hidden)},
            "down": {"kernel": jnp.zeros((config.hidden, width))},
        }

    user_key, item_key = jax.random.split(key)
    return {"user": tower(user_key, 2 * width), "item": tower(item_key, width)}


def item_vectors(params: dict, inputs: jax.Array) -> jax.Array:
    """The item tower: inputs f32 [..., 2 D] -> unit f32 [..., 2 D]."""
    return unit(inputs + _hidden(params, inputs))


def user_vectors(params: dict, inputs: jax.Array, mask: jax.Array) -> jax.Array:
    """The user tower: recent items f32 [B, S, 2 D], the newest last, mask bool [B, S] -> unit f32 [B, 2 D]."""
    mean = (inputs * mask[..., None]).sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)
    return unit(mean + _hidden(params, jnp.concatenate([mean, inputs[:, -1] * mask[:, -1:]], axis=-1)))


def train_towers(key: jax.Array, data: TowerData, config: TowersConfig, params: dict | None = None) -> dict:
    """Both towers, trained on the examples that are not held out: in-batch softmax with logQ correction.

    Args:
      params: trained towers to start from, for example with new events; None: fresh ones.

    Returns:
      {"user": ..., "item": ...}; the second is what `scenario_embeddings` takes.

    Raises:
      UserError: there are no examples, or the item tower's learning rate is not the lower one.
    """
    if not 0 < config.item_learning_rate <= config.learning_rate:
        raise UserError(
            f"towers.item_learning_rate={config.item_learning_rate} must be above 0 and at most "
            f"towers.learning_rate={config.learning_rate}: semantic IDs would change too fast"
        )
    examples = np.flatnonzero(~data.held_out)
    if not len(examples):
        raise UserError("all examples of the towers are held out: give events of the split 'train'")
    init_key, order_key = jax.random.split(key)
    params = init_towers(init_key, data.inputs.shape[1], config) if params is None else jax.tree.map(jnp.copy, params)
    counts = np.bincount(data.item[data.target[examples]], minlength=data.item.max() + 1)
    log_q = jnp.asarray(np.log(np.maximum(counts / len(examples), 1e-12)), jnp.float32)[data.item]
    arrays = (jnp.asarray(data.inputs), jnp.asarray(data.item), log_q)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(order_key)))
    batch = min(config.batch_size, len(examples))
    passes = -(-config.steps * batch // len(examples))
    order = np.concatenate([rng.permutation(examples) for _ in range(passes)])[: config.steps * batch]
    order = order.reshape(config.steps, batch)
    state = params, _optimiser(config).init(params)
    for start in track(range(0, config.steps, STEPS_PER_CALL), "Training the towers of live streams"):
        some = order[start : start + STEPS_PER_CALL]
        state = _train(config, state, arrays, data.history[some], data.target[some])
    return state[0]


def tower_loss(
    params: dict,
    inputs: jax.Array,
    item: jax.Array,
    log_q: jax.Array,
    history: jax.Array,
    target: jax.Array,
    temperature: float,
) -> jax.Array:
    """In-batch softmax of each user's next item among those of the batch, f32 [B]; other rows of the same item are
    masked.

    inputs f32 [R, 2 D], item int [R], log_q f32 [R]; history int [B, S], target int [B].
    """
    users = user_vectors(params["user"], inputs[jnp.maximum(history, 0)], history >= 0)
    items = item_vectors(params["item"], inputs[target])
    own = item[target]
    return in_batch_softmax(
        users @ items.T / temperature,
        positive=jnp.arange(len(target)),
        candidates=own[:, None] != own,
        log_q=log_q[target],
    )


def retrieval_recall(params: dict, data: TowerData, examples: np.ndarray, candidates: np.ndarray, k: int) -> float:
    """Share of examples whose item is among the k candidates nearest to the user.

    Args:
      examples: int [n], of `data`.
      candidates: int [C], rows of distinct items; the target's row replaces that of the same item.
    """
    history, target = data.history[examples], data.target[examples]
    users = np.asarray(jax.jit(user_vectors)(params["user"], data.inputs[np.maximum(history, 0)], history >= 0))
    vectors = encode_items(params["item"], data.inputs)
    own = np.einsum("nd,nd->n", users, vectors[target])[:, None]
    others = data.item[candidates] != data.item[target][:, None]
    return float((((users @ vectors[candidates].T > own) & others).sum(1) < k).mean())


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _train(config: TowersConfig, state: tuple, arrays: tuple, history: jax.Array, target: jax.Array) -> tuple:
    optimiser = _optimiser(config)

    def step(state: tuple, batch: tuple) -> tuple:
        params, moments = state
        gradient = jax.grad(lambda params: tower_loss(params, *arrays, *batch, config.temperature).mean())(params)
        updates, moments = optimiser.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    return jax.lax.scan(step, state, (history, target))[0]


def _optimiser(config: TowersConfig) -> optax.GradientTransformation:
    fields = {"slow_prefixes": ("item/",), "slow_fraction": config.item_learning_rate / config.learning_rate}
    optim = OptimConfig(learning_rate=config.learning_rate, warmup=min(20, config.steps // 10), **fields)
    return make_optimizer(optim, config.steps)


def _rows(
    own: np.ndarray, items: pa.Table, live_streams: pa.Table | None
) -> tuple[np.ndarray, ScenarioChanges, np.ndarray]:
    """The inputs of all rows f32 [R, 2 D], the changes of live streams, the newest row of each item int32 [I]."""
    if len(own) != len(items):
        raise UserError(f"there are {len(own)} embeddings and {len(items)} items: give one embedding an item")
    ids = items["item_id"].combine_chunks()
    has_products = "product_ids" in items.column_names
    products = product_table(items["product_ids"], ids) if has_products else np.full((len(items), 1), -1)
    inputs = compose(own, products, own)
    current = np.arange(len(items), dtype=np.int32)
    if live_streams is None:
        return inputs, ScenarioChanges(np.zeros(0, np.int64), np.zeros(0, np.int64)), current
    stream = pc.index_in(live_streams["item_id"], ids)
    live_streams = live_streams.filter(pc.is_valid(stream))
    stream, time = stream.drop_null().to_numpy().astype(np.int64), live_streams["timestamp"].to_numpy().astype(np.int64)
    order = np.lexsort((time, stream))
    sold = product_table(live_streams["product_ids"], ids)[order]
    stream, time = stream[order], time[order]
    current[stream] = len(items) + np.arange(len(stream))  # the last change of an item stays
    return np.concatenate([inputs, compose(own[stream], sold, own)]), ScenarioChanges(stream, time), current


def _row_at(item: np.ndarray, time: np.ndarray, changes: ScenarioChanges, items: int) -> np.ndarray:
    """The row of each item at a time: the item itself, or the stream's newest change until then."""
    # One number of item and time, the sort key of the changes.
    times = np.unique(np.concatenate([changes.time, time]))
    change, wanted = (i * len(times) + np.searchsorted(times, t) for i, t in (changes, (item, time)))
    place = np.searchsorted(change, wanted, side="right") - 1
    found = place >= 0
    found[found] = changes.item[place[found]] == item[found]
    return np.where(found, items + place, item)


def _scenarios(items: pa.Table) -> np.ndarray:
    if "scenario" not in items.column_names:
        return np.full(len(items), "product_card")
    return np.array(items["scenario"].to_pylist(), object)


def _hidden(params: dict, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"]["kernel"]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def product_table(product_ids: pa.ChunkedArray, item_ids: pa.Array) -> np.ndarray:
    """Lists of item ids as item numbers, int32 [n, P], padded with -1; unknown ids are dropped."""
    lists = product_ids.combine_chunks() if isinstance(product_ids, pa.ChunkedArray) else product_ids
    number = pc.index_in(lists.flatten(), item_ids)
    parent = pc.list_parent_indices(lists).to_numpy()
    known = pc.is_valid(number).to_numpy(zero_copy_only=False)
    number, parent = number.filter(pc.is_valid(number)).to_numpy(), parent[known]
    counts = np.bincount(parent, minlength=len(lists))
    table = np.full((len(lists), max(1, counts.max(initial=0))), -1, np.int32)
    table[parent, np.arange(len(parent)) - np.repeat(np.cumsum(counts) - counts, counts)] = number
    return table
