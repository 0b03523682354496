"""The item-level baselines, from logs to an evaluated run: one loop and one protocol for all.

    source ─▶ tables ─▶ examples ─▶ training ─▶ evaluation ─▶ report

As `systems/onemall.py`, without semantic IDs: every item has a vector of its own, and that of its text if asked for.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq

from jaxrec.config import check_least, fingerprint, from_json
from jaxrec.data.padding import check_buckets
from jaxrec.data.prepare import PrepareConfig, tells_answer_time
from jaxrec.data.sources import AnySource
from jaxrec.models.sequential import (
    Bert4RecConfig,
    CaserConfig,
    CoreConfig,
    HstuConfig,
    ItemFacts,
    NextItNetConfig,
    SasRecConfig,
    SequentialModel,
    YouTubeDnnConfig,
)
from jaxrec.run import Run
from jaxrec.semantic_ids.vectors import EMBEDDINGS, read_embeddings
from jaxrec.systems import sequential_training
from jaxrec.systems.comparison import EvaluationConfig, compare, present
from jaxrec.systems.generative import STAGE
from jaxrec.systems.phases import prepare_examples, prepare_tables, prepare_with_embeddings
from jaxrec.systems.sequential_recommender import SequentialAssembly, SequentialRecommender
from jaxrec.systems.sequential_training import FullSoftmax, Objective
from jaxrec.systems.validation import check_training
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.finetune import FinetuneConfig
from jaxrec.training import checkpoint
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig
from jaxrec.training.sharding import MeshConfig

NAMES = ("youtubednn", "sasrec", "sasrec_ce", "sasrec_text", "bert4rec", "caser", "nextitnet", "core", "hstu")
"""The systems that this module runs."""


@dataclass(frozen=True)
class SequentialConfig:
    """Everything that decides the run of an item-level baseline."""

    data: AnySource
    """Where the logs come from."""
    model: (
        YouTubeDnnConfig | SasRecConfig | Bert4RecConfig | CaserConfig | NextItNetConfig | CoreConfig | HstuConfig
    ) = field(default_factory=SasRecConfig)
    """Which model, and its sizes."""
    objective: Objective = field(default_factory=FullSoftmax)
    """Loss."""
    system: str = "sasrec_ce"
    """The name of the baseline."""
    seed: int = 0
    """Seed of everything that is drawn."""
    batch_size: int = 256
    """Histories in a training step, over all hosts."""
    lengths: tuple[int, ...] = (4, 8, 16, 32, 50)
    """Lengths that histories are padded to, rising; of longer ones the latest events are read."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """Cleaning and splits."""
    text: EncoderConfig = field(default_factory=EncoderConfig)
    """Text encoder; only with `model.embeddings`."""
    align: AlignConfig | FinetuneConfig = field(default_factory=AlignConfig)
    """Contrastive alignment of the embeddings; only with `model.embeddings`."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    training: LoopConfig = field(default_factory=LoopConfig)
    """Length of training, evaluation, early stopping, checkpoints."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Layout of the devices."""
    validation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(split="valid", max_users=2000))
    """Who is measured while training, every `training.evaluate_every` steps."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured at the end."""

    def __post_init__(self):
        check_buckets(self.lengths, "lengths")
        check_least(self, "", seed=0, batch_size=1)
        self.validation.check_validation()

    def check(self) -> None:
        """What only the whole configuration shows, as `jaxrec.systems.validation.check_training`."""
        check_training(self, alignment=self.model.embeddings)


def train(run: Run, config: SequentialConfig) -> None:
    """Runs every phase that is not done yet, and prints the comparison table."""
    if config.model.embeddings:
        inputs = prepare_with_embeddings(run, config)
    else:
        inputs = (prepare_examples(run, config, prepare_tables(run, config)),)
    names = ("seed", "model", "objective", "batch_size", "lengths", "optim", "training", "mesh")
    measured = (config.validation,) if config.training.evaluate_every else ()
    trained = run.stage(
        STAGE,
        fingerprint(*inputs, *(getattr(config, name) for name in names), *measured),
        lambda folder: sequential_training.train(assemble(run, config), config, folder, run.metrics_file),
    )
    run.phase(
        "evaluation",
        fingerprint(trained, config.evaluation),
        lambda folder: compare(run, load_recommender(run), config.evaluation, folder),
    )
    present(run)


def assemble(run: Run, config: SequentialConfig) -> SequentialAssembly:
    """Shapes the model to the items of a run.

    Raises:
      UserError: the model reads text embeddings, and they are missing or of other items.
    """
    items = pq.read_table(run.tables / "items.parquet", columns=["item_id", "count"])
    counts, embeddings = items["count"].to_numpy(), None
    # One event more for everybody, so that an item nobody took in training has a finite log-probability.
    log_q = np.log((counts + 1) / (counts + 1).sum()).astype(np.float32)
    if config.model.embeddings:
        embeddings = jnp.asarray(read_embeddings(run.place("embeddings") / EMBEDDINGS, items["item_id"].to_pylist()))
    told = tells_answer_time(config.data, config.prepare)
    model = SequentialModel(config.model, len(counts), config.lengths[-1], told)
    wanted = np.isin(config.data.behaviors, config.data.target_behaviors)
    return SequentialAssembly(model, config.lengths, ItemFacts(jnp.asarray(log_q), embeddings), run.examples, wanted)


def load_recommender(run: Run) -> SequentialRecommender:
    """The trained model of a run, in its best state, ready to recommend.

    Raises:
      UserError: the run is not trained yet, or on other data than are there, or no checkpoint of it can be read.
    """
    run.check_trained()
    config = from_json(SequentialConfig, Run.load(run.path)[1])
    params = checkpoint.load_best(run.path / STAGE, "params")["params"]
    return SequentialRecommender(assemble(run, config), params)
