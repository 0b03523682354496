"""What the systems with semantic IDs share: a configuration, a supervised stage, batches, the trained model.

    source ─▶ tables ─▶ semantic IDs ─▶ examples ─▶ training ─▶ evaluation ─▶ report

A system adds what it reads, a model, a loss and batches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
from jax.sharding import Mesh
from jax.tree_util import Partial

from jaxrec.data.examples import Records
from jaxrec.data.pipeline import CutToFeatures, Features, batches, cut_index
from jaxrec.run import TRAINING, Run
from jaxrec.semantic_ids.quantizers.codebooks import SemanticIdConfig
from jaxrec.semantic_ids.table.collisions import CollisionConfig
from jaxrec.semantic_ids.table.versions import trained_space
from jaxrec.systems.config import RunConfig
from jaxrec.systems.phases import ALIGNMENT, alignment, prepare_with_ids
from jaxrec.systems.recommender import Assembly, DecodingConfig, GenerativeRecommender
from jaxrec.systems.validation import make_validation
from jaxrec.targets import SemanticIdSpace
from jaxrec.text.keywords import KeywordConfig
from jaxrec.text.scenarios import TowersConfig
from jaxrec.training.loop import TrainState
from jaxrec.training.prefetch import BatchIterator
from jaxrec.training.stages import Stage, Task, minimise
from jaxrec.training.step import Loss


@dataclass(frozen=True)
class SemanticIdRunConfig(RunConfig):
    """What decides a run whose items have semantic IDs."""

    scenarios: TowersConfig | None = None
    """Embeddings by scenario: a video's product beside it, live streams by an item tower; None: by the texts alone."""
    keywords: KeywordConfig | None = None
    """Core keywords that enhance the embeddings of items and queries (OneSearch Eq. 2); None: none."""
    semantic_ids: SemanticIdConfig = field(default_factory=SemanticIdConfig)
    """Quantizers."""
    collisions: CollisionConfig = field(default_factory=CollisionConfig)
    """What is done about items that share a semantic ID."""

    of_phases: ClassVar[tuple[str, ...]] = (*RunConfig.of_phases, "scenarios", "keywords", "semantic_ids", "collisions")
    query_ids: ClassVar[bool] = False
    """Whether the system's model reads semantic IDs of queries, which the tokenize phase then makes."""


@dataclass(frozen=True)
class GenerativeRunConfig(SemanticIdRunConfig):
    """What decides a run of any of these systems; each adds `features`, `model` and `objective`."""

    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """Beam search of the trained model; another one needs no new training."""
    validation_decoding: DecodingConfig | None = None
    """Beam search of the validation while training; None: a copy of `decoding` as the configuration file gives it."""

    of_validation: ClassVar[tuple[str, ...]] = (*RunConfig.of_validation, "validation_decoding")
    of_evaluation: ClassVar[tuple[str, ...]] = (*RunConfig.of_evaluation, "decoding")

    def __post_init__(self):
        super().__post_init__()
        if self.validation_decoding is None:
            # A value of its own: flags that change `decoding` leave it as it is.
            object.__setattr__(self, "validation_decoding", self.decoding)


class TrainedItems(NamedTuple):
    """The items that a run's model is fitted to, and the behaviors of its source."""

    item_ids: list[str]
    counts: np.ndarray
    """int64 [I]: how often each item was taken in training"""
    space: SemanticIdSpace
    """their semantic IDs"""
    behaviors: tuple[str, ...]
    """names, weakest first"""
    wanted: np.ndarray
    """bool [behaviors]: the target behaviors"""


def read_items(run: Run, config: SemanticIdRunConfig) -> TrainedItems:
    """Reads the items of a run and their semantic IDs.

    Raises:
      UserError: a file is missing, or an item has no semantic ID.
    """
    items = pq.read_table(run.tables / "items.parquet", columns=["item_id", "count"])
    item_ids, counts = items["item_id"].to_pylist(), items["count"].to_numpy()
    behaviors = tuple(config.data.behaviors)
    wanted = np.isin(behaviors, config.data.target_behaviors)
    space = SemanticIdSpace.of(trained_space(run.semantic_ids, item_ids, counts))
    return TrainedItems(item_ids, counts, space, behaviors, wanted)


def supervised(
    run: Run,
    config: GenerativeRunConfig,
    train: Callable[[Task], Any],
    weights: Callable[[], Sequence[Any]] = tuple,
    without: Sequence[str] = (),
) -> tuple[Stage, ...]:
    """The stages of a system that is trained once on the targets of its contexts, behind that of the text encoder.

    weights: returns digests of the pretrained weights that `train` reads. without: fields that decide later stages
    alone.
    """
    before = alignment(run, config, with_ids=True)

    def data() -> tuple[Any, ...]:
        return *weights(), *prepare_with_ids(run, config)

    needs = (ALIGNMENT,) if before else ()
    return *before, Stage(TRAINING, config.training_inputs(*without), data, train, needs=needs)


def train_model(
    assembly: Assembly,
    config: GenerativeRunConfig,
    mean_loss: Callable[..., Any],
    batches: BatchIterator,
    task: Task,
    *,
    init: Callable[[int, Mesh | None], dict] | None = None,
    counted: Loss | None = None,
) -> TrainState:
    """As `jaxrec.training.stages.minimise`, validated by beam search.

    mean_loss: mean_loss(assembly, config, catalogue, params, extra, batch, key); where the task has frozen stages,
    their variables come behind the catalogue. init: makes the first variables; None: the assembly's.
    """
    # A search that doesn't fit the IDs is refused before the training; `make_validation` checks its own.
    config.decoding.check(assembly.space)
    evaluate = None
    if config.training.evaluate_every:
        evaluate = make_validation(assembly, config.features, config.validation_decoding, config.validation)
    loss = bound_loss(mean_loss, assembly, config)
    return minimise(loss, init or assembly.init, batches, config, task, evaluate=evaluate, counted=counted)


def bound_loss(mean_loss: Callable[..., Any], assembly: Assembly, config: GenerativeRunConfig) -> Loss:
    """A system's mean_loss(assembly, config, catalogue, params, extra, batch, key), bound to its catalogue."""
    return Partial(partial(mean_loss, assembly, config), assembly.catalogue)


def mean_of(losses: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., Any]:
    """The mean_loss of a system whose losses(assembly, config, catalogue, variables, batch, key) are (sum, count)."""

    def mean_loss(assembly, config, catalogue, params, extra, batch, key):
        """As `jaxrec.training.step.Loss`."""
        total, count = losses(assembly, config, catalogue, {"params": params}, batch, key)
        return total / jnp.maximum(count, 1), ({"loss": (total, count)}, extra)

    return mean_loss


def training_cuts(
    assembly: Assembly, *, min_history: int = 1, max_per_record: int | None = None
) -> tuple[Records, np.ndarray]:
    """The training records, and their cuts at sessions with a target behavior, as `jaxrec.data.pipeline.cut_index`."""
    records = Records(assembly.examples, "train")
    names = [assembly.behaviors[index] for index in assembly.target_behaviors]
    return records, cut_index(records, names, min_history=min_history, max_per_record=max_per_record)


def context_batches(
    records: Records,
    cuts: np.ndarray,
    example: CutToFeatures,
    config: GenerativeRunConfig,
    lengths: Sequence[int] | None = None,
) -> Iterator[Features]:
    """Batches of contexts with their targets, without end, in an order that the seed decides.

    Args:
      cuts: int [n, 2] of (record, session).
      example: (record, session, rng) -> the arrays of one context and its targets.
      lengths: int [n], the bucket of `config.features` that each cut is padded to; None: of what is before the session.
    """
    if lengths is None:
        lengths = [config.features.bucket_of(records[record], session) for record, session in cuts]
    return batches(
        records,
        cuts,
        example,
        batch_size=config.batch_size,
        seed=config.seed,
        buckets=np.searchsorted(config.features.buckets, np.array(lengths)),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def recommender(assembly: Assembly, variables: dict, config: GenerativeRunConfig) -> GenerativeRecommender:
    """The trained model of a run, ready to recommend."""
    return GenerativeRecommender(assembly, variables, config.features, config.decoding)
