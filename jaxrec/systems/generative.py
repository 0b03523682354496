"""What the systems with semantic IDs share: a configuration, the phases of a run, training, the trained model.

    source ─▶ tables ─▶ semantic IDs ─▶ examples ─▶ training ─▶ evaluation ─▶ report

Every phase reads what the ones before it wrote into the run directory, is skipped when its inputs are unchanged, and
can be killed and run again. A system adds what it reads, a model, a loss and batches.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from jax.tree_util import Partial

from jaxrec.config import check_least, fingerprint
from jaxrec.data.prepare import PrepareConfig
from jaxrec.data.sources import AnySource
from jaxrec.run import TRAINING, Run
from jaxrec.semantic_ids.quantizers.codebooks import SemanticIdConfig
from jaxrec.semantic_ids.table.collisions import CollisionConfig
from jaxrec.systems.comparison import EvaluationConfig, compare, present
from jaxrec.systems.phases import prepare_with_ids
from jaxrec.systems.recommender import Assembly, DecodingConfig, GenerativeRecommender
from jaxrec.systems.validation import check_training, make_validation
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.finetune import FinetuneConfig
from jaxrec.text.scenarios import TowersConfig
from jaxrec.training import checkpoint
from jaxrec.training.loop import LoopConfig, TrainState
from jaxrec.training.minimise import minimise
from jaxrec.training.optim import OptimConfig
from jaxrec.training.prefetch import BatchIterator
from jaxrec.training.sharding import MeshConfig
from jaxrec.training.step import Loss


@dataclass(frozen=True)
class GenerativeRunConfig:
    """What decides a run of any of these systems; each adds `features`, `model` and `objective`."""

    data: AnySource
    """Where the logs come from."""
    system: str = ""
    """Which system this configures, and its name in tables."""
    seed: int = 0
    """Seed of everything that is drawn."""
    batch_size: int = 128
    """Contexts in a training step, over all hosts."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """Cleaning, splits and pair statistics."""
    text: EncoderConfig = field(default_factory=EncoderConfig)
    """Text encoder."""
    align: AlignConfig | FinetuneConfig = field(default_factory=AlignConfig)
    """Contrastive alignment of the embeddings: by a projection and a free vector an item, or of the text encoder."""
    scenarios: TowersConfig | None = None
    """Embeddings by scenario: a video's product beside it, live streams by an item tower; None: by the texts alone."""
    semantic_ids: SemanticIdConfig = field(default_factory=SemanticIdConfig)
    """Quantizers."""
    collisions: CollisionConfig = field(default_factory=CollisionConfig)
    """What is done about items that share a semantic ID."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    training: LoopConfig = field(default_factory=LoopConfig)
    """Length of training, logging, checkpoints, evaluation on the validation split."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Layout of the devices."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """Beam search."""
    validation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(split="valid", max_users=2000))
    """Who is measured while training, every `training.evaluate_every` steps."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured at the end."""

    before_training: ClassVar[tuple[str, ...]] = (
        *("data", "system", "prepare", "text", "align", "scenarios", "semantic_ids", "collisions"),
        *("decoding", "validation", "evaluation"),
    )
    """Fields that training depends on through what they made, or not at all."""

    def __post_init__(self):
        check_least(self, "", seed=0, batch_size=1)
        self.validation.check_validation()

    def check(self) -> None:
        """What only the whole configuration shows, as `jaxrec.systems.validation.check_training`."""
        check_training(self)

    def training_inputs(self) -> dict[str, Any]:
        """What a training depends on beside tables and IDs; the final evaluation may change without a new one."""
        names = [each.name for each in fields(self) if each.name not in self.before_training]
        if self.training.evaluate_every:
            names += ["decoding", "validation"]
        return {name: getattr(self, name) for name in names}


def run_phases(
    run: Run,
    config: GenerativeRunConfig,
    train: Callable[[Path], TrainState],
    load: Callable[[], GenerativeRecommender],
    *inputs: Any,
) -> None:
    """Runs every phase that is not done yet, and prints the comparison table.

    Args:
      train: trains into a folder, or goes on with what it finds there.
      load: the trained model.
      inputs: what training depends on beside the configuration and the phases before.
    """
    ids, examples = prepare_with_ids(run, config)
    trained = run.stage(TRAINING, fingerprint(ids, examples, *inputs, config.training_inputs()), train)
    run.phase(
        "evaluation",
        fingerprint(trained, config.decoding, config.evaluation),
        lambda folder: compare(run, load(), config.evaluation, folder),
    )
    present(run)


def bound_loss(mean_loss: Callable[..., Any], assembly: Assembly, config: GenerativeRunConfig) -> Loss:
    """A system's mean_loss(assembly, config, catalogue, params, extra, batch, key), bound to its catalogue."""
    return Partial(partial(mean_loss, assembly, config), assembly.catalogue)


def train_model(
    assembly: Assembly,
    config: GenerativeRunConfig,
    loss: Loss,
    batches: BatchIterator,
    folder: Path,
    metrics_path: Path,
    *,
    counted: Loss | None = None,
) -> TrainState:
    """As `jaxrec.training.minimise.minimise`, with the beam search over the validation split on the way."""
    evaluate = make_validation(assembly, config.features, config.decoding, config.validation)
    return minimise(loss, assembly.init, batches, config, folder, metrics_path, evaluate=evaluate, counted=counted)


def load_trained(run: Run, assembly: Assembly, config: GenerativeRunConfig) -> GenerativeRecommender:
    """The trained model of a run, in its best state where it was measured on the way, ready to recommend.

    Raises:
      UserError: the run is not trained yet, or on other data than are there, or no checkpoint of it can be read.
    """
    run.check_trained()
    trained = checkpoint.load_best(run.path / TRAINING, "params", "extra")
    variables = {"params": trained["params"], **trained["extra"]}
    return GenerativeRecommender(assembly, variables, config.features, config.decoding)
