"""RankGR: generative retrieval that learns the order of a session's items and ranks inside the beam.

Fu et al., "RankGR: Rank-Enhanced Generative Retrieval with Listwise Direct Preference Optimization in Recommendation"
(Alibaba 2026). A decoder of the Qwen2.5 architecture reads a history and generates the next item's semantic ID. Items
of a session are trained by level (purchase > click > exposure > pseudo-exposure), a rank head chooses the beams. Its
authors report on Amazon Clothing 2023 HR@20 .0227, @50 .0313, @100 .0468, @500 .0996.

    source ─▶ tables ─▶ semantic IDs ─▶ examples ─▶ training ─▶ evaluation ─▶ report
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from jaxrec.config import UserError, check_least, check_shares, from_json
from jaxrec.data.leveled_sessions import LeveledSessionConfig
from jaxrec.data.sources.files import digest
from jaxrec.models.huggingface import CONFIG_FILE
from jaxrec.models.rankgr import RankGRConfig
from jaxrec.run import Run, read_json, write_json
from jaxrec.systems import rankgr_training
from jaxrec.systems.generative import STAGE, GenerativeRunConfig, load_trained, run_phases
from jaxrec.systems.rankgr_model import assemble, checked_levels
from jaxrec.systems.recommender import GenerativeRecommender
from jaxrec.training.loop import TrainState

WEIGHTS = "pretrained.json"
"""In the folder of the training: which weights it began from."""


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
    rank_from: int | None = None
    """The lowest level whose items the rank head learns to find: 0 for all, as published (Eq. 16 with Eq. 9); None:
    that of the target behaviors."""
    rank_weight: float = 1.0
    """Weight of the rank head's loss (Eq. 17: 1)."""
    smoothing: float = 0.0
    """Share of each label that is spread evenly, over its level or over the items."""

    def __post_init__(self):
        check_least(self, "objective", alpha=0, beta=0, rank_weight=0)
        check_shares(self, "objective", "smoothing")


@dataclass(frozen=True)
class RankGRRunConfig(GenerativeRunConfig):
    """Everything that decides a run of RankGR."""

    system: str = "rankgr"
    """Which system this configures."""
    pretrained: str = ""
    """A folder with a Qwen2 or Qwen2.5 in Hugging Face's layout to begin from, whose sizes replace those of
    `model.backbone`; empty: from scratch."""
    min_history: int = 1
    """Events that must come before a session for it to be trained on."""
    sessions_per_user: int = 0
    """Only the last so many sessions of a user are trained on; 0 for all."""
    features: LeveledSessionConfig = field(default_factory=LeveledSessionConfig)
    """How much of the past the model reads, and what it learns from at once."""
    model: RankGRConfig = field(default_factory=RankGRConfig)
    """Sizes and parts of the model; vocabulary and levels follow from the IDs."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Losses."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, "", min_history=0, sessions_per_user=0)

    def check(self) -> None:
        """As `jaxrec.systems.generative.GenerativeRunConfig.check`."""
        super().check()
        checked_levels(self)

    # The weights themselves count, wherever they lie.
    before_training: ClassVar[tuple[str, ...]] = (*GenerativeRunConfig.before_training, "pretrained")


def train(run: Run, config: RankGRRunConfig) -> None:
    """Runs every phase that is not done yet, and prints the comparison table."""
    weights = _weights(config.pretrained, run.path / STAGE / WEIGHTS)

    def trained(folder: Path) -> TrainState:
        if weights:
            write_json(folder / WEIGHTS, {"folder": config.pretrained, "files": weights})
        return rankgr_training.train(assemble(run, config), config, folder, run.metrics_file)

    run_phases(run, config, trained, lambda: load_recommender(run), weights)


def load_recommender(run: Run) -> GenerativeRecommender:
    """As `jaxrec.systems.generative.load_trained`; the weights that it began from aren't needed."""
    config = from_json(RankGRRunConfig, Run.load(run.path)[1])
    return load_trained(run, assemble(run, config, run.path / STAGE), config)


def _weights(folder: str, kept: Path) -> list:
    """Digests of the pretrained weights; those that a training kept, when their folder is there no more."""
    if not folder:
        return []
    if not Path(folder).is_dir():
        noted = read_json(kept) if kept.exists() else {}
        if noted.get("folder") == folder:
            return noted["files"]
        raise UserError(f"configuration key 'pretrained': there is no folder {folder}; give one with a Qwen2")
    files = (Path(folder) / CONFIG_FILE, *sorted(Path(folder).glob("*.safetensors*")))
    return [digest(path) for path in files if path.is_file()]
