"""OneMall, from logs to an evaluated run: the story of a run, phase by phase.

    source ─▶ tables ─▶ semantic IDs ─▶ examples ─▶ training ─▶ evaluation ─▶ report

Every phase reads what the ones before it wrote into the run directory, is skipped when its inputs are unchanged, and
can be killed and run again.
"""

from dataclasses import dataclass, field

from jaxrec.config import fingerprint, from_json
from jaxrec.data.features import FeatureConfig
from jaxrec.data.popularity import PopularityConfig
from jaxrec.data.prepare import PrepareConfig
from jaxrec.data.sources import AnySource
from jaxrec.models.cross_decoder import CrossDecoderConfig
from jaxrec.run import Run
from jaxrec.semantic_ids.codebooks import SemanticIdConfig
from jaxrec.semantic_ids.collisions import CollisionConfig
from jaxrec.systems.comparison import EvaluationConfig, compare, present
from jaxrec.systems.onemall_model import assemble
from jaxrec.systems.onemall_training import train_model
from jaxrec.systems.phases import prepare_with_ids
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.finetune import FinetuneConfig
from jaxrec.text.scenarios import TowersConfig
from jaxrec.training import checkpoint
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig
from jaxrec.training.sharding import MeshConfig

STAGE = "stages/pretrain"


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model is trained for (OneMall Eq. 7)."""

    contrastive_weight: float = 0.1
    """Weight of the in-batch contrastive task beside next-token prediction."""


@dataclass(frozen=True)
class OneMallConfig:
    """Everything that decides a OneMall run."""

    data: AnySource
    """Where the logs come from."""
    system: str = "onemall"
    """Which system this configures."""
    seed: int = 0
    """Seed of everything that is drawn."""
    attributes: tuple[str, ...] = ("category", "brand")
    """Columns of the items table that the model reads."""
    batch_size: int = 64
    """Contexts in a training step, over all hosts."""
    min_history: int = 1
    """Events that must come before a session for it to be trained on."""
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
    popularity: PopularityConfig = field(default_factory=PopularityConfig)
    """The popularity that the decoder starts from."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """How much of the past the model reads."""
    model: CrossDecoderConfig = field(default_factory=CrossDecoderConfig)
    """Sizes and parts of the model."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Losses."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    training: LoopConfig = field(default_factory=LoopConfig)
    """Length of training, logging, checkpoints."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Layout of the devices."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """Beam search."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured at the end."""


def train(run: Run, config: OneMallConfig) -> None:
    """Runs every phase that is not done yet, and prints the comparison table."""
    ids, examples = prepare_with_ids(run, config)
    trained = run.stage(
        STAGE,
        fingerprint(ids, examples, *_training_inputs(config)),
        lambda folder: train_model(assemble(run, config), config, folder, run.metrics_file),
    )
    run.phase(
        "evaluation",
        fingerprint(trained, config.decoding, config.evaluation),
        lambda folder: compare(run, load_recommender(run), config.evaluation, folder),
    )
    present(run)


def load_recommender(run: Run) -> GenerativeRecommender:
    """The trained model of a run, ready to recommend.

    Raises:
      UserError: the run is not trained yet, or no checkpoint of it can be read.
    """
    config = from_json(OneMallConfig, Run.load(run.path)[1])
    trained = checkpoint.load_best(run.path / STAGE, "params", "extra")
    variables = {"params": trained["params"], **trained["extra"]}
    return GenerativeRecommender(assemble(run, config), variables, config.features, config.decoding)


def _training_inputs(config: OneMallConfig) -> list:
    """What a training depends on beside the tables and IDs; evaluation and decoding may change without a new one."""
    names = ("seed", "popularity", "attributes", "batch_size", "min_history", "features", "model", "objective", "optim")
    return [getattr(config, name) for name in (*names, "training", "mesh")]
