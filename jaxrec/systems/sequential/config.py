"""The item-level baselines, from logs to an evaluated run: one loop and one protocol for all.

    source ─▶ tables ─▶ examples ─▶ training ─▶ evaluation ─▶ report

No semantic IDs: every item has a vector of its own, and that of its text if asked for.
"""

from dataclasses import dataclass, field

from jaxrec.config import check_least, check_shares
from jaxrec.data.padding import check_buckets
from jaxrec.data.prepare import PrepareConfig
from jaxrec.data.sources import AnySource
from jaxrec.models.sequential import (
    Bert4RecConfig,
    CaserConfig,
    CoreConfig,
    HstuConfig,
    NextItNetConfig,
    SasRecConfig,
    YouTubeDnnConfig,
)
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.validation import check_training
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.finetune import FinetuneConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig
from jaxrec.training.sharding import MeshConfig

NAMES = ("youtubednn", "sasrec", "sasrec_ce", "sasrec_text", "bert4rec", "caser", "nextitnet", "core", "hstu")
"""The systems that this module runs."""


@dataclass(frozen=True)
class FullSoftmax:
    """Cross-entropy over the whole catalogue."""

    label_smoothing: float = 0.0
    """share of the probability that is spread over all items"""
    rows: int = 256
    """targets whose logits are there at once; 0 for all"""

    def __post_init__(self):
        check_least(self, "objective", rows=0)
        check_shares(self, "objective", "label_smoothing")


@dataclass(frozen=True)
class SampledSoftmax:
    """Softmax among items drawn by their popularity, corrected for that (YouTubeDNN)."""

    negatives: int = 1024
    """items drawn for a batch"""
    power: float = 1.0
    """items are drawn by their popularity to this power; 0 for all alike"""

    def __post_init__(self):
        check_least(self, "objective", negatives=1, power=0)


@dataclass(frozen=True)
class Binary:
    """Each target against items that the user never had, drawn evenly (SASRec as published: one)."""

    negatives: int = 1
    """items drawn for a target"""

    def __post_init__(self):
        check_least(self, "objective", negatives=1)


Objective = FullSoftmax | SampledSoftmax | Binary


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
