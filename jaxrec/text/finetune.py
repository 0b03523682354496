"""Alignment of a text encoder with behavior, on typed pairs of texts.

One function for three papers: OneMall's InfoNCE on item pairs (§3.1.2: the term `i2i`), OneSearch's total loss of q2q,
i2i, q2i, rank and relevance (Eq. 1), and OneSug's prefix-query alignment (Eq. 1: `p2q` and `q2q`). It trains the BERT
encoder itself, or only a projection of its vectors, with the same loss.

    tuned = finetune(texts, {"i2i": TextPairs(left, right)}, FinetuneConfig(), EncoderConfig(), Path("aligned"))
    save(tuned, Path("encoder"))
    vectors = embed_texts(texts, EncoderConfig(model="encoder"))
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from jaxrec.config import UserError, fingerprint
from jaxrec.data.query_pairs import AskedPairConfig, QueryPairConfig
from jaxrec.files import read_json, writing
from jaxrec.losses.contrastive import margin_rank, pair_loss, relevance_regression
from jaxrec.nn.finite import check_finite
from jaxrec.text import align
from jaxrec.text.encoder import (
    Bert,
    BertConfig,
    EncoderConfig,
    TextEncoder,
    embed_texts,
    encode_batches,
    load_encoder,
    longest,
    save_encoder,
    token_ids,
    with_params,
)
from jaxrec.text.pair_batches import (
    CONTRASTIVE,
    SYMMETRIC,
    PairBatches,
    TermBatches,
    TermsConfig,
    TextPairs,
    check_pairs,
    comparable,
    merge_equal_texts,
    most_levels,
    select,
    similar,
    split,
)
from jaxrec.text.prefixes import PrefixConfig
from jaxrec.training.loop import LoopConfig, Metrics, TrainState, fit
from jaxrec.training.optim import OptimConfig, make_optimizer

# Padded lengths of a training batch: few, since each pair of lengths is compiled once, with the gradient.
WIDTHS = (16, 32, 64, 128, 256, 512)
MEASURED_PAIRS, MEASURED_CANDIDATES = 2000, 10_000
PROJECTION_FILE, METRICS_FILE = "projection.safetensors", "alignment.json"


@dataclass(frozen=True)
class FinetuneConfig:
    """Alignment of the text encoder by fine-tuning."""

    kinds: tuple[str, ...] = ("swing",)
    """The kinds of pairs in a run's pairs.parquet that make up the term i2i."""
    trains: Literal["encoder", "projection"] = "encoder"
    """All weights of the encoder, or only a projection of its vectors, whose steps are far cheaper."""
    terms: TermsConfig = field(default_factory=TermsConfig)
    """Weight, batch size and filter of each term of the loss."""
    temperature: float = 0.05
    """Temperature of the contrastive softmax."""
    margin: float = 0.1
    """Margin, a level, between the cosines of a stronger and a weaker behavior (term rank)."""
    rank_items: int = 4
    """Items of a query in one rank example."""
    held_out: float = 0.05
    """Share held out for evaluation: of the pairs of i2i and q2q; of the other terms, of the left ends (queries,
    prefixes) with all their pairs, the same ones in all of these terms."""
    projection_width: int = 128
    """Width of the projected vectors."""
    projection_hidden: int = 256
    """Width of the projection's hidden layer."""
    projection_learning_rate: float = 1e-3
    """Replaces optim.learning_rate when only a projection is trained."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=2e-5, warmup=20, b2=0.999))
    """The optimiser. The encoder is pretrained, so its learning rate is low."""
    training: LoopConfig = field(default_factory=lambda: LoopConfig(steps=500, log_every=10, keep=1))
    """The training loop; a step has a batch of every term."""


@dataclass(frozen=True)
class SearchFinetuneConfig(FinetuneConfig):
    """Alignment of the text encoder on searches too: all terms of OneSearch Eq. 1 whose weights are above 0."""

    queries: QueryPairConfig = field(default_factory=QueryPairConfig)
    """The pairs of q2q, i2i, q2i and rank that are made of the log's searches; those of `kinds` are in i2i too."""


@dataclass(frozen=True)
class SuggestionFinetuneConfig(FinetuneConfig):
    """Alignment of the text encoder on suggestions (OneSug Eq. 1): p2q, and q2q of related queries; without items."""

    kinds: tuple[str, ...] = ()
    """None: items play no part."""
    prefixes: PrefixConfig = field(default_factory=PrefixConfig)
    """The completions of a prefix that are its pairs of p2q; `weight` plays no part."""
    queries: AskedPairConfig = field(default_factory=AskedPairConfig)
    """The pairs of q2q: queries that were asked together. Which of them are near enough, terms.q2q.min_cosine says."""

    def __post_init__(self):
        if self.kinds:
            raise UserError("configuration key 'align.kinds' names pairs of items: on suggestions there are none")


class Tuned(NamedTuple):
    """An aligned encoder: tuned weights, or the initial ones and a projection for `align.apply`; and its metrics."""

    encoder: TextEncoder
    projection: dict | None
    metrics: dict[str, float]


def finetune(
    texts: Sequence[str],
    pairs: Mapping[str, TextPairs],
    config: FinetuneConfig,
    text_config: EncoderConfig,
    folder: Path,
    seed: int = 0,
    metrics_path: Path | None = None,
) -> Tuned:
    """Aligns the encoder of `text_config` on pairs of texts.

    Args:
      texts: queries, items and prefixes, in any order; equal texts are one.
      pairs: the pairs of each term, as rows of `texts`: q2q, i2i, q2i, p2q, rank, relevance. A term without pairs, or
        of weight 0, is left out.
      config: the loss, the trained parameters, the optimiser.
      text_config: the initial encoder.
      folder: holds `checkpoints/`, from which a stopped training is resumed.
      seed: of the split, the batches and the projection.
      metrics_path: the log file with the loss and each term's value; None: metrics.jsonl in `folder`.

    Returns:
      The tuned encoder. Its metrics, before and after: <term>_recall@50 of held-out pairs, rank_accuracy (share of
      correctly ordered pairs of items of a query), relevance_error (mean square); the numbers of pairs trained on,
      <term>_pairs, and given, <term>_given.

    Raises:
      UserError: unusable pairs, no pair left in a term, a configuration that doesn't fit, or checkpoints of another
        training in the folder.
    """
    _check(config)
    check_pairs(pairs, len(texts))
    pairs = {name: p for name, p in pairs.items() if len(p.left) and getattr(config.terms, name).weight > 0}
    if not pairs:
        raise UserError("there are no pairs to align the text encoder on: give pairs of a term whose weight is above 0")
    texts, pairs, given = merge_equal_texts(texts, pairs)
    encoder, before = load_encoder(text_config.model), embed_texts(texts, text_config)
    train, probes = {}, {}
    queries = np.random.default_rng([seed, 3]).random(len(texts)) < config.held_out
    for number, name in enumerate(sorted(pairs)):
        kept = _filtered(name, pairs[name], before, config, given[name])
        train[name], held_out = split(kept, name, queries, config.held_out, [seed, 1, number])
        if not len(train[name].left):
            raise UserError(f"{name}: all {len(kept.left)} pairs are held out: give more pairs, or lower held_out")
        probes[name] = make_probe(name, train[name], held_out, len(texts))
    metrics_path = metrics_path or Path(folder) / "metrics.jsonl"
    params = _train(encoder, texts, before, train, config, text_config, folder, seed, metrics_path)
    if config.trains == "encoder":
        tuned = Tuned(with_params(encoder, params), None, {})
    else:
        tuned = Tuned(encoder, params, {})
    figures = {f"{name}_before": value for name, value in measure(probes, before).items()}
    after = _after(tuned, texts, before, probes, text_config)
    figures |= {f"{name}_after": value for name, value in measure(probes, after).items()}
    counts = {f"{name}_pairs": len(train[name].left) for name in train}
    return tuned._replace(metrics=figures | counts | {f"{name}_given": given[name] for name in train})


def embed(tuned: Tuned, texts: Sequence[str], text_config: EncoderConfig) -> np.ndarray:
    """Aligned unit vectors of texts, f32 [len(texts), D].

    Vectors of a tuned encoder are not cached: save it and use `embed_texts` for a whole catalogue.
    """
    if tuned.projection is not None:
        return np.asarray(jax.jit(align.apply)(tuned.projection, embed_texts(texts, text_config)))
    vectors = np.zeros((len(texts), tuned.encoder.config.hidden_size), np.float32)
    max_tokens = longest(tuned.encoder, text_config)
    for rows, encoded in encode_batches(tuned.encoder, texts, max_tokens, text_config.batch_tokens):
        vectors[rows] = encoded
    return vectors


def save(tuned: Tuned, folder: Path) -> None:
    """Writes a tuned encoder as a folder that `text.model` accepts, or the projection; and alignment.json, the metrics.

    Raises:
      UserError: the folder can't be written.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METRICS_FILE).write_text(json.dumps(tuned.metrics, indent=1) + "\n")
        if tuned.projection is not None:
            flat = flatten_dict(tuned.projection, sep=".")
            save_file({name: np.asarray(value) for name, value in flat.items()}, folder / PROJECTION_FILE)
        else:
            # A projection of an earlier alignment here: `load` would apply it to this encoder.
            (folder / PROJECTION_FILE).unlink(missing_ok=True)
    if tuned.projection is None:
        save_encoder(tuned.encoder, folder)


def load(folder: Path, text_config: EncoderConfig) -> Tuned:
    """Load what `save` wrote; a projection is applied to the encoder of `text_config`."""
    metrics = read_json(Path(folder) / METRICS_FILE)
    if (Path(folder) / PROJECTION_FILE).is_file():
        return Tuned(load_encoder(text_config.model), load_projection(folder), metrics)
    return Tuned(load_encoder(str(folder)), None, metrics)


def load_projection(folder: Path) -> dict:
    """The parameters for `align.apply` that `save` wrote; UserError if there are none."""
    path = Path(folder) / PROJECTION_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {PROJECTION_FILE}: save an alignment with trains='projection' there")
    flat = load_file(path)
    check_finite(flat, path, "run the alignment again")
    return unflatten_dict(flat, sep=".")


def represent(bert: BertConfig | None, params: dict, inputs: dict) -> jax.Array:
    """Unit vectors f32 [T, D] of a batch's texts: encoded tokens or, if bert is None, projected vectors."""
    if bert is None:
        # The centre is that of the texts' principal components, not a weight.
        return align.apply(params | {"mean": jax.lax.stop_gradient(params["mean"])}, inputs["vectors"])
    parts = [Bert(bert).apply({"params": params}, tokens, mask) for tokens, mask in inputs["parts"]]
    return jnp.concatenate(parts)[inputs["place"]]


def losses(vectors: jax.Array, terms: dict[str, dict], config: FinetuneConfig) -> dict[str, jax.Array]:
    """Each term's loss, one value per pair (for `rank` per query).

    Args:
      vectors: unit f32 [T, D], concatenated over the terms in order of name; of each the left ends, then the right ends
        (for `rank` the queries, then each query's items).
      terms: the arrays of each term from `TermBatches`: `where` [B, B] and `log_q` [2, B]; `relevance` [B]; for `rank`
        `levels` and `where` [B, L].
    """
    result, begin = {}, 0
    for name in sorted(terms):
        arrays = terms[name]
        size = next(iter(arrays.values())).shape[-1] if name != "rank" else len(arrays["levels"])
        left = vectors[begin : begin + size]
        if name == "rank":
            of_each = arrays["levels"].shape[1]
            items = vectors[begin + size : begin + size * (1 + of_each)].reshape(size, of_each, -1)
            scores = jnp.einsum("bd,bld->bl", left, items)
            result[name] = margin_rank(scores, arrays["levels"], margin=config.margin, where=arrays["where"])
            begin += size * (1 + of_each)
            continue
        right = vectors[begin + size : begin + 2 * size]
        begin += 2 * size
        if name == "relevance":
            scores = jnp.einsum("bd,bd->b", left, right)
            result[name] = relevance_regression(scores, arrays["relevance"], where=jnp.ones(size, bool))
        else:
            result[name] = pair_loss(left @ right.T / config.temperature, arrays["log_q"], arrays["where"])
    return result


def make_step(bert: BertConfig | None, config: FinetuneConfig) -> Callable:
    """step(state, batch) -> (state, metrics) for the training loop; `loss` is the weighted sum (OneSearch Eq. 1)."""
    optimiser = make_optimizer(_optim(config), config.training.steps)

    def loss_of(params: dict, batch: dict) -> tuple[jax.Array, Metrics]:
        values = losses(represent(bert, params, batch["inputs"]), batch["terms"], config)
        total = sum(getattr(config.terms, name).weight * value.mean() for name, value in values.items())
        count = sum(len(value) for value in values.values())
        metrics = {name: (value.sum(), jnp.float32(len(value))) for name, value in values.items()}
        return total, metrics | {"loss": (total * count, jnp.float32(count))}

    def step(state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        gradient, metrics = jax.grad(loss_of, has_aux=True)(state.params, batch)
        updates, opt_state = optimiser.update(gradient, state.opt_state, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


class Probe(NamedTuple):
    """The held-out pairs of a term and, for recall, the known pairs and the candidates."""

    pairs: TextPairs
    known: np.ndarray
    candidates: np.ndarray


def make_probe(name: str, train: TextPairs, held_out: TextPairs, texts: int) -> Probe:
    """At most MEASURED_PAIRS held-out pairs, with at most MEASURED_CANDIDATES candidates beside their own texts."""
    test, known = held_out, np.stack([train.left, train.right], axis=1)
    if name in SYMMETRIC:
        test = TextPairs(*(np.concatenate(ends) for ends in ((test.left, test.right), (test.right, test.left))), None)
        known = np.concatenate([known, known[:, ::-1]])
    if name != "rank":  # all items of a query stay together
        test = select(test, align.evenly(np.arange(len(test.left)), MEASURED_PAIRS))
    candidates = np.zeros(texts, bool)
    candidates[align.evenly(np.unique(np.concatenate([known[:, 1], test.right])), MEASURED_CANDIDATES)] = True
    candidates[test.right] = True
    return Probe(test, known, candidates)


def measure(probes: Mapping[str, Probe], vectors: np.ndarray, k: int = 50) -> dict[str, float]:
    """The metrics of held-out pairs under vectors f32 [T, D]; none for a term without held-out pairs."""
    figures = {}
    for name, (pairs, known, candidates) in probes.items():
        if not len(pairs.left):
            continue
        if name in CONTRASTIVE:
            test = np.stack([pairs.left, pairs.right], axis=1)
            figures[f"{name}_recall@{k}"] = align.pair_recall(vectors, test, known, k=k, candidates=candidates)
            continue
        scores = np.einsum("nd,nd->n", vectors[pairs.left], vectors[pairs.right])
        if name == "relevance":
            figures["relevance_error"] = float(np.square(scores - pairs.value).mean())
        else:
            figures["rank_accuracy"] = _rank_accuracy(pairs, scores)
    return figures


def _rank_accuracy(pairs: TextPairs, scores: np.ndarray) -> float:
    """Share of item pairs of one query, with different levels, in which the stronger one has the higher score."""
    right = total = 0
    for rows in np.split(np.arange(len(scores)), np.flatnonzero(np.diff(pairs.left)) + 1):
        compared = pairs.value[rows][:, None] > pairs.value[rows][None, :]
        right += int((compared & (scores[rows][:, None] > scores[rows][None, :])).sum())
        total += int(compared.sum())
    return right / total


def _after(
    tuned: Tuned, texts: Sequence[str], before: np.ndarray, probes: Mapping[str, Probe], text_config: EncoderConfig
) -> np.ndarray:
    """The aligned vectors of the probes' texts; zero elsewhere."""
    if tuned.projection is not None:
        return np.asarray(jax.jit(align.apply)(tuned.projection, before))
    ends = [(p.pairs.left, p.pairs.right, np.flatnonzero(p.candidates)) for p in probes.values() if len(p.pairs.left)]
    rows = np.unique(np.concatenate([np.zeros(0, np.int64), *(side for each in ends for side in each)]))
    vectors = np.zeros_like(before)
    vectors[rows] = embed(tuned, [texts[row] for row in rows], text_config)
    return vectors


def _train(
    encoder: TextEncoder,
    texts: Sequence[str],
    vectors: np.ndarray,
    pairs: Mapping[str, TextPairs],
    config: FinetuneConfig,
    text_config: EncoderConfig,
    folder: Path,
    seed: int,
    metrics_path: Path,
) -> dict:
    """The trained weights of the encoder or of a projection."""
    if config.trains == "encoder":
        bert, make_inputs = encoder.config, TokenInputs(encoder, texts, longest(encoder, text_config))
        # A copy: the loop donates its state, and the loaded encoder is cached.
        params = jax.tree.map(jnp.copy, encoder.params)
    else:
        shape = align.AlignConfig(width=config.projection_width, hidden=config.projection_hidden, item_residual=False)
        bert, params = None, align.init(jax.random.key(seed), vectors, shape)

        def make_inputs(rows: np.ndarray) -> dict:
            return {"vectors": vectors[rows]}

    terms = {
        name: TermBatches(
            name, pairs[name], len(texts), getattr(config.terms, name).batch_size, config.rank_items, [seed, 2, number]
        )
        for number, name in enumerate(sorted(pairs))
    }
    optimiser = make_optimizer(_optim(config), config.training.steps)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=optimiser.init(params))
    state = fit(
        make_step(bert, config),
        state,
        PairBatches(terms, make_inputs, _origin(encoder, texts, pairs, config, text_config, seed), folder),
        config=config.training,
        folder=Path(folder) / "checkpoints",
        metrics_path=metrics_path,
        stage="alignment",
    )
    return state.params


def _origin(
    encoder: TextEncoder,
    texts: Sequence[str],
    pairs: Mapping[str, TextPairs],
    config: FinetuneConfig,
    text_config: EncoderConfig,
    seed: int,
) -> str:
    """A digest of the inputs of a training, except for its length and checkpoints, which may change on resuming."""
    same = replace(config, kinds=(), training=LoopConfig())
    digest = hashlib.sha256(fingerprint(encoder.fingerprint, longest(encoder, text_config), same, seed).encode())
    digest.update(json.dumps(texts).encode())
    for name in sorted(pairs):
        for side in (pairs[name].left, pairs[name].right, pairs[name].value):
            digest.update(f"{name} {side.dtype} {len(side)} ".encode() + side.tobytes())
    return digest.hexdigest()


class TokenInputs:
    """Padded tokens of texts for `represent`: the shorter and the longer half, each padded to its own width."""

    def __init__(self, encoder: TextEncoder, texts: Sequence[str], max_tokens: int):
        self.tokens = [np.array(ids, np.int32) for ids in token_ids(encoder, texts, max_tokens)]
        self.lengths = np.array([len(ids) for ids in self.tokens])

    def __call__(self, rows: np.ndarray) -> dict:
        order = np.argsort(self.lengths[rows], kind="stable")
        half = len(rows) // 2
        parts = tuple(self._pad(rows[some]) for some in (order[:half], order[half:]))
        return {"parts": parts, "place": np.argsort(order).astype(np.int32)}

    def _pad(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """tokens int32 [n, S], mask bool [n, S], S one of WIDTHS."""
        lengths = self.lengths[rows]
        width = WIDTHS[int(np.searchsorted(WIDTHS, lengths.max()))]
        tokens = np.zeros((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : lengths[i]] = self.tokens[row]
        return tokens, np.arange(width) < lengths[:, None]


def _filtered(name: str, pairs: TextPairs, vectors: np.ndarray, config: FinetuneConfig, given: int) -> TextPairs:
    limit = getattr(config.terms, name).min_cosine
    kept = similar(pairs, vectors, limit)
    if not len(kept.left):
        raise UserError(
            f"{name}: none of the {given} pairs has two different texts with a cosine above {limit}: "
            f"lower terms.{name}.min_cosine, or give other pairs"
        )
    kept = comparable(kept) if name == "rank" else kept
    if not len(kept.left):
        raise UserError(
            f"rank: no query has items at two levels of behavior with a cosine above {limit}: "
            "lower terms.rank.min_cosine, or give weaker behaviors too"
        )
    if name == "rank" and (levels := most_levels(kept)) > config.rank_items:
        raise UserError(
            f"rank_items={config.rank_items} is fewer than the {levels} levels of behavior that a query's items have, "
            f"so that its weakest would never be seen: set rank_items to {levels} or more"
        )
    return kept


def _check(config: FinetuneConfig) -> None:
    if config.temperature <= 0:
        raise UserError(f"temperature={config.temperature} must be above 0; 0.05 is usual")
    if config.rank_items < 2:
        raise UserError(f"rank_items={config.rank_items}: a query needs at least 2 items to rank")
    if not 0 <= config.held_out < 1:
        raise UserError(f"held_out={config.held_out} is a share of the pairs; give a number from 0 to below 1")


def _optim(config: FinetuneConfig) -> OptimConfig:
    if config.trains == "encoder":
        return config.optim
    return replace(config.optim, learning_rate=config.projection_learning_rate)
