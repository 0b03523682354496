"""OneMall, from logs to an evaluated run.

Query-Formers over long histories of every behavior, a cross-attention decoder with sparse experts, semantic IDs of two
residual k-means levels and FSQ. The phases of a run are those of `jaxrec.systems.generative`.
"""

from dataclasses import dataclass, field

from jaxrec.data.features import FeatureConfig
from jaxrec.data.popularity import PopularityConfig
from jaxrec.models.cross_decoder import CrossDecoderConfig
from jaxrec.systems.generative import GenerativeRunConfig


@dataclass(frozen=True)
class OneMallObjective:
    """What the model is trained for (OneMall Eq. 7)."""

    contrastive_weight: float = 0.1
    """Weight of the in-batch contrastive task beside next-token prediction."""


@dataclass(frozen=True)
class OneMallConfig(GenerativeRunConfig):
    """Everything that decides a OneMall run."""

    system: str = "onemall"
    """Which system this configures."""
    attributes: tuple[str, ...] = ("category", "brand")
    """Columns of the items table that the model reads."""
    batch_size: int = 64
    """Contexts in a training step, over all hosts."""
    min_history: int = 1
    """Events that must come before a session for it to be trained on."""
    popularity: PopularityConfig = field(default_factory=PopularityConfig)
    """The popularity that the decoder starts from."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """How much of the past the model reads."""
    model: CrossDecoderConfig = field(default_factory=CrossDecoderConfig)
    """Sizes and parts of the model."""
    objective: OneMallObjective = field(default_factory=OneMallObjective)
    """Losses."""
