"""The item-level baselines, from logs to an evaluated run: one loop and one protocol for all.

    source ─▶ tables ─▶ examples ─▶ training ─▶ evaluation ─▶ report

No semantic IDs: every item has a vector of its own, and that of its text if asked for.
"""

from dataclasses import dataclass, field

from jaxrec.config import check_least, check_shares
from jaxrec.data.padding import check_buckets
from jaxrec.models.sequential import (
    Bert4RecConfig,
    CaserConfig,
    CoreConfig,
    HstuConfig,
    NextItNetConfig,
    SasRecConfig,
    YouTubeDnnConfig,
)
from jaxrec.systems.config import RunConfig
from jaxrec.systems.validation import check_training

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
class SequentialConfig(RunConfig):
    """Everything that decides the run of an item-level baseline; `text` and `align` only with `model.embeddings`."""

    system: str = "sasrec_ce"
    """The name of the baseline."""
    batch_size: int = 256
    """Histories in a training step, over all hosts."""
    model: (
        YouTubeDnnConfig | SasRecConfig | Bert4RecConfig | CaserConfig | NextItNetConfig | CoreConfig | HstuConfig
    ) = field(default_factory=SasRecConfig)
    """Which model, and its sizes."""
    objective: Objective = field(default_factory=FullSoftmax)
    """Loss."""
    lengths: tuple[int, ...] = (4, 8, 16, 32, 50)
    """Lengths that histories are padded to, rising; of longer ones the latest events are read."""

    def __post_init__(self):
        super().__post_init__()
        check_buckets(self.lengths, "lengths")

    def check(self) -> None:
        """As `jaxrec.systems.config.RunConfig.check`."""
        check_training(self, alignment=self.model.embeddings)
