"""A tiny tokenizer and a tiny causal model that generates texts from histories, for the tests of target spaces."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.data.item_sequences import ItemSequenceConfig
from jaxrec.models.causal import Causal, CausalConfig
from jaxrec.models.vocabulary import ContextTokens
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender, Served
from jaxrec.targets import TextSpace, TextSpaceConfig, text_space

ITEMS = 5
BEHAVIORS = ("exposure", "purchase", "coupon")
WANTED = np.array([False, True, True])
LETTERS = "|abB "
"""Tokens of `Letters`; the first ends a text. Two of them read alike, and a space at an end reads as nothing."""
FEATURES = ItemSequenceConfig(buckets=(4,))


class Letters:
    """A tokenizer of one token a letter."""

    size, end, end_name = len(LETTERS), 0, "|"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[LETTERS.index(letter) for letter in text] for text in texts]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return ["".join(LETTERS[token] for token in row if 0 < token < self.size) for row in rows]

    def token_bytes(self) -> list[bytes]:
        return [letter.encode() if token else b"" for token, letter in enumerate(LETTERS)]

    def file(self) -> tuple[str, bytes]:
        return "letters", LETTERS.encode()


@dataclass(frozen=True, eq=False)
class TextAssembly:
    """A Qwen2 that reads items and writes texts; items are tokens behind those of the texts."""

    model: Causal
    space: TextSpace
    behaviors: tuple[str, ...] = BEHAVIORS
    wanted: np.ndarray = dataclasses.field(default_factory=lambda: WANTED)
    examples: Any = None
    catalogue: Any = None

    @property
    def target_behaviors(self) -> list[int]:
        return np.flatnonzero(self.wanted).tolist()

    def serve(self, variables, version=None, before=None) -> Served:
        return Served(variables=variables)

    def context(self, served: Served, arrays: dict[str, jax.Array]):
        tokens = self.space.tokenizer.size + arrays["item"] % ITEMS
        return self.model.apply(served.variables, ContextTokens(tokens, arrays["mask"]), method="prefill")

    def extend(self, served: Served, context, tokens, cache, level: int):
        return self.model.apply(served.variables, context, tokens, cache, level, method="extend")

    def rescore(self, served: Served, context, likelihood_weight: float) -> None:
        return None


def make_space(texts: Sequence[str] = (), popularity=None, tokenizer=None, **config) -> TextSpace:
    tokenizer = tokenizer or Letters()
    return text_space(tokenizer, texts, popularity, TextSpaceConfig(**config), vocabulary=tokenizer.size + ITEMS)


def make_text_model(space: TextSpace, seed: int = 0, **decoding) -> GenerativeRecommender:
    """Random parameters that are large enough for distributions far from uniform."""
    config = CausalConfig(vocabulary=space.vocabulary, width=8, heads=2, groups=1, head_dim=4, hidden=8, layers=1)
    model, one = Causal(config), jnp.zeros((1, 1), jnp.int32)
    inputs, targets = ContextTokens(one, one > -1), jnp.zeros((1, 1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, targets))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    variables = tree.unflatten([jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])
    assembly = TextAssembly(model, space)
    return GenerativeRecommender(assembly, variables, FEATURES, DecodingConfig(batch_size=4, **decoding))


def make_history(items: Sequence[int]) -> dict[str, np.ndarray]:
    """Somebody who bought items in turn."""
    return {
        "item": np.array(items, np.int32),
        "behavior": np.ones(len(items), np.int8),
        "timestamp": np.arange(len(items), dtype=np.int64),
        "session": np.arange(len(items), dtype=np.int32),
        "now": np.int64(len(items)),
    }


def log_probs(model: GenerativeRecommender, history: dict, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """float64 [rows]: the log-probability of each row of tokens after a history, teacher-forced by `score`."""
    lengths = np.array([len(row) for row in rows])
    # Few shapes: each is compiled once.
    targets = np.zeros((-(-len(rows) // 64) * 64, 4), np.int32)
    for target, row in zip(targets, rows, strict=False):
        target[: len(row)] = row
    items, size = model.assembly.space.tokenizer.size + history["item"], FEATURES.buckets[-1]
    context = np.pad(items, (0, size - len(items)))[None], np.arange(size)[None] < len(items)
    found = np.asarray(_score(model.assembly.model, model.variables, *context, targets[None]), np.float64)[: len(rows)]
    return np.where(np.arange(4) < lengths[:, None], found, 0).sum(1)


@functools.partial(jax.jit, static_argnums=0)
def _score(model: Causal, variables: dict, tokens: jax.Array, mask: jax.Array, targets: jax.Array) -> jax.Array:
    context = model.apply(variables, ContextTokens(tokens, mask), method="prefill")
    return model.apply(variables, context, targets, method="score").log_probs[0]
