"""OneSug (Kuaishou 2025): what is typed, related queries and the user's searches in, whole queries out, best first.

    source ─▶ tables ─▶ tokenizer, listed queries ─▶ examples ─▶ likelihood ─▶ preference ─▶ evaluation

The stage `likelihood` is the supervised one (§3.3), `preference` the reward-weighted ranking with it as the frozen
reference (§3.4); the latter may be left out.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from jaxrec.config import UserError, check_least
from jaxrec.data.completions import CompletionsConfig
from jaxrec.data.item_neighbours import NeighbourConfig
from jaxrec.data.suggestion_features import SuggestionFeatureConfig
from jaxrec.data.vetted_queries import VettedQueriesConfig
from jaxrec.losses.preference import HybridConfig
from jaxrec.losses.rewards import BASE_WEIGHTS
from jaxrec.models.backbone import BackboneConfig
from jaxrec.models.copying import check_labels
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.semantic_ids.related_queries import RelatedQueriesConfig
from jaxrec.systems.config import RunConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.systems.validation import MONITORED
from jaxrec.targets import TextSpaceConfig
from jaxrec.text.tokenizer import TokenizerConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

LIKELIHOOD, PREFERENCE = "likelihood", "preference"


@dataclass(frozen=True)
class LikelihoodObjective:
    """The supervised stage: the chosen queries of a prefix are targets of one context."""

    targets: int = 4
    """targets L of a prefix; of more, so many are drawn"""
    smoothing: float = 0.0
    """share of each label that is spread evenly over all tokens"""
    recut: float = 0.0
    """share of the samples whose prefix is cut anew from the chosen query, at any character, the first included"""
    without_past: float = 0.0
    """share of the samples of which the whole past is left out"""

    def __post_init__(self):
        check_least(self, "objective", targets=1)
        for name in ("smoothing", "recut", "without_past"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"configuration key 'objective.{name}' is {getattr(self, name)}; give 0 to 1")


@dataclass(frozen=True)
class PreferenceConfig:
    """The second stage (§3.4): chosen queries against rejected ones, weighted by the gap of their rewards."""

    loss: HybridConfig = field(default_factory=HybridConfig)
    """the hybrid loss of Eq. 7-9"""
    chosen: int = 2
    """chosen queries of a prefix; of more, so many are drawn"""
    rejected: int = 16
    """rejected queries of a prefix; of more, so many are drawn"""
    base: tuple[float, ...] = BASE_WEIGHTS
    """base weight lambda of each kind of feedback, strongest first (Table 1)"""
    weighted: bool = True
    """pairs are weighted by rw (Eq. 6); off, all equally"""
    stored_reference: bool = True
    """the reference's scores are computed once, before the first step; off, in every step"""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=2e-4, warmup=20))
    """Optimiser."""
    training: LoopConfig = field(default_factory=lambda: LoopConfig(steps=200, monitor="mrr@10"))
    """Length of training, logging, checkpoints, evaluation on the validation split."""

    def __post_init__(self):
        check_least(self, "preference", chosen=1, rejected=1, base=0)
        if len(self.base) != len(BASE_WEIGHTS) or list(self.base) != sorted(self.base, reverse=True):
            raise UserError(
                f"configuration key 'preference.base' is {self.base}; give {len(BASE_WEIGHTS)} falling weights, one "
                "for each kind of feedback"
            )


@dataclass(frozen=True)
class OneSugConfig(RunConfig):
    """Everything that decides a OneSug run."""

    system: str = "onesug"
    """Which system this configures."""
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(vocabulary=2000))
    """The tokenizer of queries."""
    texts: TextSpaceConfig = field(default_factory=lambda: TextSpaceConfig(max_length=16))
    """Lengths of queries, and how they are searched for."""
    features: SuggestionFeatureConfig = field(default_factory=SuggestionFeatureConfig)
    """How much of what is typed and of the past is read."""
    vetted: VettedQueriesConfig = field(default_factory=VettedQueriesConfig)
    """Which queries of training are listed, and may be suggested where the search is restricted to the list."""
    completions: CompletionsConfig = field(default_factory=CompletionsConfig)
    """What is counted of the queries of training."""
    related: RelatedQueriesConfig | None = None
    """Related queries of what is typed (§3.2), by the IDs of `text`'s embeddings, aligned where `align` is a
    SuggestionFinetuneConfig; None: the prompt has none."""
    neighbours: NeighbourConfig = field(default_factory=lambda: NeighbourConfig(kept=200))
    """How near queries are to the user's past, by who searched for both."""
    profile: tuple[str, ...] = ()
    """Columns of users.parquet that are the user's profile in the prompt; none: it is not read."""
    copying: bool = True
    """A distribution over the user's own queries and the most popular completions is mixed in; not in the paper."""
    model: BackboneConfig = field(default_factory=EncoderDecoderConfig)
    """Sizes and parts of the backbone: T5 or BART (EncoderDecoderConfig), or Qwen2 or Qwen3 (CausalConfig); vocabulary,
    levels and start token follow from the texts."""
    pretrained: str = ""
    """A folder with a BART, T5, mT5, Qwen2 or Qwen3 and its tokenizer.json in Hugging Face's layout, with which the
    first stage begins; its kind and sizes replace those of `model`, its tokenizer that of `tokenizer`. Empty: fresh
    parameters."""
    objective: LikelihoodObjective = field(default_factory=LikelihoodObjective)
    """The loss of the first stage, whose optimiser and length are `optim` and `training`."""
    training: LoopConfig = field(default_factory=lambda: LoopConfig(monitor="mrr@10"))
    """Length of training, logging, checkpoints, evaluation on the validation split."""
    preference: PreferenceConfig | None = field(default_factory=PreferenceConfig)
    """The second stage; None: there is none."""
    decoding: DecodingConfig = field(default_factory=lambda: DecodingConfig(beam_width=32))
    """Beam search of the trained model; another one needs no new training."""
    validation_decoding: DecodingConfig | None = None
    """Beam search of the validation while training; None: a copy of `decoding` as the configuration file gives it."""

    of_phases: ClassVar[tuple[str, ...]] = (
        *RunConfig.of_phases,
        "tokenizer",
        "texts",
        "vetted",
        "related",
        "neighbours",
        "profile",
        "pretrained",
    )
    of_validation: ClassVar[tuple[str, ...]] = (*RunConfig.of_validation, "validation_decoding")
    of_evaluation: ClassVar[tuple[str, ...]] = (*RunConfig.of_evaluation, "decoding")

    def __post_init__(self):
        super().__post_init__()
        if self.validation_decoding is None:
            # A value of its own: flags that change `decoding` leave it as it is.
            object.__setattr__(self, "validation_decoding", self.decoding)
        if self.copying and not self.features.candidates:
            raise UserError(
                "configuration key 'copying': there is nothing to copy; raise features.own or features.popular, or set "
                "copying to False"
            )
        if self.related is None and self.features.near:
            raise UserError(
                f"configuration key 'features.near' is {self.features.near}, but there are no related queries: give "
                "'related' a RelatedQueriesConfig, or set features.near to 0"
            )
        check_labels(self.copying, "copying", self.objective.smoothing)

    def check(self) -> None:
        """As of every system, and of the second stage."""
        super().check()
        if self.preference is not None:
            of_stage = self.preference
            of_stage.optim.check_steps(of_stage.training.steps, "preference.optim")
            of_stage.training.check_monitor(MONITORED)
