"""RankGR: generative retrieval that learns the order of a session's items and ranks inside the beam.

Fu et al., "RankGR: Rank-Enhanced Generative Retrieval with Listwise Direct Preference Optimization in Recommendation"
(Alibaba 2026). A decoder of the Qwen2.5 architecture reads a history and generates the next item's semantic ID. Items
of a session are trained by level (purchase > click > exposure > pseudo-exposure), a rank head chooses the beams. Its
authors report on Amazon Clothing 2023 HR@20 .0227, @50 .0313, @100 .0468, @500 .0996.

    source ─▶ tables ─▶ semantic IDs ─▶ examples ─▶ training ─▶ evaluation ─▶ report
"""

from dataclasses import dataclass, field
from pathlib import Path

from jaxrec.config import UserError, fingerprint, from_json
from jaxrec.data.leveled_sessions import LeveledSessionConfig
from jaxrec.data.prepare import PrepareConfig
from jaxrec.data.sources import AnySource
from jaxrec.data.sources.files import digest
from jaxrec.models.rankgr import RankGRConfig
from jaxrec.run import Run
from jaxrec.semantic_ids.codebooks import SemanticIdConfig
from jaxrec.semantic_ids.collisions import CollisionConfig
from jaxrec.systems.comparison import EvaluationConfig, compare, present
from jaxrec.systems.phases import prepare_with_ids
from jaxrec.systems.rankgr_model import assemble
from jaxrec.systems.rankgr_training import train_model
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.finetune import FinetuneConfig
from jaxrec.text.scenarios import TowersConfig
from jaxrec.training import checkpoint
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig
from jaxrec.training.sharding import MeshConfig

STAGE = "stages/train"


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model is trained for (RankGR Eq. 8-17)."""

    alpha: float = 1.0
    """Weight of listwise preferences beside next-token prediction (Eq. 11; RankGR's best: 1); 0 for none."""
    beta: float = 1.0
    """Scale of the log-probabilities that preferences compare (Eq. 8)."""
    levels: tuple[int, ...] = ()
    """The level of each behavior of the source, from 0 and never falling; empty: each is a level of its own."""
    level_weights: tuple[float, ...] = ()
    """Weight of each level's items in next-token prediction; empty: 1 for all, as published (Eq. 9)."""
    rank_weight: float = 1.0
    """Weight of the rank head's loss (Eq. 17: 1)."""
    smoothing: float = 0.0
    """Share of each label that is spread evenly, over its level or over the items."""

    def __post_init__(self):
        for name in ("alpha", "beta", "rank_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"configuration key 'objective.{name}' is {getattr(self, name)}; give 0 or more")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"configuration key 'objective.smoothing' is {self.smoothing}; give 0 or more, below 1")


@dataclass(frozen=True)
class RankGRRunConfig:
    """Everything that decides a run of RankGR."""

    data: AnySource
    """Where the logs come from."""
    system: str = "rankgr"
    """Which system this configures."""
    seed: int = 0
    """Seed of everything that is drawn."""
    pretrained: str = ""
    """A folder with a Qwen2 or Qwen2.5 in Hugging Face's layout to begin from, whose sizes replace those of
    `model.backbone`; empty: from scratch."""
    batch_size: int = 128
    """Contexts in a training step, over all hosts."""
    min_history: int = 1
    """Events that must come before a session for it to be trained on."""
    sessions_per_user: int = 0
    """Only the last so many sessions of a user are trained on; 0 for all."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """Cleaning, splits and pair statistics."""
    text: EncoderConfig = field(default_factory=EncoderConfig)
    """Text encoder."""
    align: AlignConfig | FinetuneConfig = field(default_factory=AlignConfig)
    """Contrastive alignment of the embeddings (the paper's IDs are FORGE's)."""
    scenarios: TowersConfig | None = None
    """Embeddings by scenario; None: by the texts alone."""
    semantic_ids: SemanticIdConfig = field(default_factory=SemanticIdConfig)
    """Quantizers."""
    collisions: CollisionConfig = field(default_factory=CollisionConfig)
    """What is done about items that share a semantic ID."""
    features: LeveledSessionConfig = field(default_factory=LeveledSessionConfig)
    """How much of the past the model reads, and what it learns from at once."""
    model: RankGRConfig = field(default_factory=RankGRConfig)
    """Sizes and parts of the model; vocabulary and levels follow from the IDs."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Losses."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    training: LoopConfig = field(default_factory=LoopConfig)
    """Length of training, logging, checkpoints, evaluation on the validation split."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Layout of the devices."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """Beam search; RankGR's: beam_widths 500, 1400 and candidates 1400, 1400."""
    validation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(split="valid", max_users=2000))
    """Who is measured while training, every `training.evaluate_every` steps."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured at the end."""


def train(run: Run, config: RankGRRunConfig) -> None:
    """Runs every phase that is not done yet, and prints the comparison table."""
    weights = _weights(config.pretrained)
    ids, examples = prepare_with_ids(run, config)
    trained = run.stage(
        STAGE,
        fingerprint(ids, examples, weights, *_training_inputs(config)),
        lambda folder: train_model(assemble(run, config), config, folder, run.metrics_file),
    )
    run.phase(
        "evaluation",
        fingerprint(trained, config.decoding, config.evaluation),
        lambda folder: compare(run, load_recommender(run), config.evaluation, folder),
    )
    present(run)


def load_recommender(run: Run) -> GenerativeRecommender:
    """The trained model of a run, ready to recommend; the weights it began from aren't needed.

    Raises:
      UserError: the run is not trained yet, or no checkpoint of it can be read.
    """
    config = from_json(RankGRRunConfig, Run.load(run.path)[1])
    trained = checkpoint.load_best(run.path / STAGE, "params")
    assembly = assemble(run, config, run.path / STAGE)
    return GenerativeRecommender(assembly, trained, config.features, config.decoding)


def _weights(folder: str) -> list:
    """What is known of the pretrained weights, without reading them as such."""
    if not folder:
        return []
    if not Path(folder).is_dir():
        raise UserError(f"configuration key 'pretrained': there is no folder {folder}; give one with a Qwen2")
    return [digest(path) for path in sorted(Path(folder).iterdir()) if path.suffix in (".json", ".safetensors")]


def _training_inputs(config: RankGRRunConfig) -> list:
    """What a training depends on beside the tables and IDs; the final evaluation may change without a new one."""
    names = ("seed", "batch_size", "min_history", "sessions_per_user", "features", "model", "objective", "optim")
    measured = (config.decoding, config.validation) if config.training.evaluate_every else ()
    return [*(getattr(config, name) for name in (*names, "training", "mesh")), *measured]
