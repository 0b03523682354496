"""OneSearch (Kuaishou 2025): a query and its user's past in, items' IDs out.

    source ─▶ tables ─▶ semantic IDs of items and queries ─▶ content ─▶ co_occurrence ─▶ personalisation ─▶ evaluation

The three stages are those of Table 4; each has its own mixture of tasks, optimiser and length, and begins with the best
state of the one before. A stage whose tasks all have the weight 0 is left out. Those of the reward system (§3.4.2)
follow where `rewards` is given (`jaxrec.systems.onesearch.reward_config`).
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from jaxrec.config import UserError, check_least, check_shares
from jaxrec.data.item_neighbours import NeighbourConfig
from jaxrec.data.search_features import SearchFeatureConfig
from jaxrec.data.search_statistics import SearchStatisticsConfig
from jaxrec.models.backbone import BackboneConfig
from jaxrec.models.copying import check_labels
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.models.personal_search import PromptConfig
from jaxrec.systems.generative import GenerativeRunConfig
from jaxrec.systems.onesearch.reward_config import SearchRewardsConfig
from jaxrec.text.tokenizer import TokenizerConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

CONTENT, CO_OCCURRENCE, PERSONALISATION = "content", "co_occurrence", "personalisation"


def _loop(steps: int) -> LoopConfig:
    return LoopConfig(steps=steps, log_every=50, checkpoint_every=500, evaluate_every=0)


@dataclass(frozen=True)
class TaskStageConfig:
    """A stage of tasks: their weights, which are the fields that a stage adds, and its training."""

    stage: ClassVar[str]
    """its name"""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    training: LoopConfig = field(default_factory=lambda: _loop(400))
    """Length of training; it is not validated, since it doesn't rank."""

    def __post_init__(self):
        check_least(self, self.stage, **dict.fromkeys(self.weights, 0))
        if self.training.evaluate_every:
            raise UserError(
                f"configuration key '{self.stage}.training.evaluate_every': this stage does not rank items and is not "
                "validated; give 0"
            )

    @classmethod
    def tasks(cls) -> tuple[str, ...]:
        """The names of all of its tasks."""
        return tuple(each.name for each in fields(cls) if each.type is float)

    @property
    def weights(self) -> dict[str, float]:
        """By task, those of weight 0 left out; a stage without any is left out itself."""
        return {name: weight for name in self.tasks() if (weight := getattr(self, name))}


@dataclass(frozen=True)
class ContentConfig(TaskStageConfig):
    """The first stage, semantic content alignment: weights of its tasks, 0 leaves one out; and its training.

    Without a task there is no such stage.
    """

    stage: ClassVar[str] = CONTENT

    query_to_id: float = 1.0
    """a query's text to its ID"""
    item_to_id: float = 1.0
    """an item's text to its ID"""
    id_to_query: float = 0.5
    """a query's ID to its text"""
    id_to_item: float = 0.5
    """an item's ID to its text"""
    query_to_category: float = 0.5
    """a query's text to the category that it leads to most often"""
    item_to_category: float = 0.5
    """an item's text to its category"""
    query_id_to_category: float = 0.5
    """a query's ID to that category"""
    item_id_to_category: float = 0.5
    """an item's ID to its category"""


@dataclass(frozen=True)
class CoOccurrenceConfig(TaskStageConfig):
    """The second stage, co-occurrence synchronisation, on pairs of a query and an item that it led to.

    Without a task there is no such stage.
    """

    stage: ClassVar[str] = CO_OCCURRENCE

    query_to_item: float = 0.5
    """a query's text to an item's text"""
    item_to_query: float = 0.5
    """an item's text to a query's text"""
    query_id_to_item_id: float = 1.0
    """a query's ID to an item's ID"""
    item_id_to_query_id: float = 1.0
    """an item's ID to a query's ID"""


TASKS = (*ContentConfig.tasks(), *CoOccurrenceConfig.tasks())
"""Names of all tasks, in the order of their prompt tokens."""


@dataclass(frozen=True)
class TextLengths:
    """How much of texts is read and written in the first two stages."""

    read: int = 24
    """tokens of a text that is read"""
    written: int = 16
    """tokens of a text that is written, its end included"""
    column: str = "title"
    """the column of the items table that is the item's text: title, or text, which holds its attributes too"""

    def __post_init__(self):
        check_least(self, "texts", read=1, written=2)


@dataclass(frozen=True)
class PersonalisationObjective:
    """The third stage: the items of a search are targets of one context."""

    targets: int = 4
    """targets L per search; of more, so many are drawn"""
    smoothing: float = 0.0
    """share of each label that is spread evenly over its level"""
    window: int = 5
    """the sliding window (§3.4.1): each search of training is a sample; in some of them the short sequences (the last
    items and queries, and the short behavior of the user ID) are cut to a length drawn from 0 to this, as users have
    them who are new; the long sequences and the candidates stay; 0: none is cut"""
    windowed: float = 0.3
    """share of the samples that are cut"""
    without_past: float = 0.0
    """share of the samples of which the whole past is left out"""

    def __post_init__(self):
        check_least(self, "objective", targets=1, window=0)
        check_shares(self, "objective", "smoothing", "windowed", "without_past", all_allowed=True)


@dataclass(frozen=True)
class OneSearchConfig(GenerativeRunConfig):
    """Everything that decides a OneSearch run."""

    system: str = "onesearch"
    """Which system this configures."""
    tokenizer: TokenizerConfig = field(default_factory=lambda: TokenizerConfig(vocabulary=4000))
    """The tokenizer of queries and items' texts."""
    texts: TextLengths = field(default_factory=TextLengths)
    """Lengths of texts."""
    features: SearchFeatureConfig = field(default_factory=SearchFeatureConfig)
    """How much of the past is read."""
    statistics: SearchStatisticsConfig = field(default_factory=SearchStatisticsConfig)
    """What is counted of the searches of training."""
    neighbours: NeighbourConfig = field(default_factory=NeighbourConfig)
    """How near candidates are to the user's past, by who took both."""
    profile: tuple[str, ...] = ()
    """Columns of users.parquet that are the user's profile in the prompt; none: it is not read."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """Parts of the prompt, long sequences, copying."""
    prior: bool = False
    """A popularity prior is added to the decoder's logits, as for TIGER; not in the paper."""
    model: BackboneConfig = field(default_factory=EncoderDecoderConfig)
    """Sizes and parts of the backbone: a T5 or BART (EncoderDecoderConfig), or a Qwen2 or Qwen3 (CausalConfig);
    vocabulary, levels and start token follow from texts and IDs."""
    pretrained: str = ""
    """A folder with a BART, T5, Qwen2 or Qwen3 and its tokenizer.json in Hugging Face's layout, with which the first
    stage begins; its kind and sizes replace those of `model`, its tokenizer that of `tokenizer`. Empty: fresh
    parameters."""
    content: ContentConfig = field(default_factory=ContentConfig)
    """The first stage."""
    co_occurrence: CoOccurrenceConfig = field(default_factory=CoOccurrenceConfig)
    """The second stage."""
    objective: PersonalisationObjective = field(default_factory=PersonalisationObjective)
    """The loss of the third stage, whose optimiser and length are `optim` and `training`."""
    rewards: SearchRewardsConfig | None = None
    """The adaptive reward system behind the third stage (§3.4.2); None: there is none."""
    reorder: int | None = None
    """First answers of the beam search that are served in the order of the reward (OneSearch_RM); None: none are. It
    needs `rewards`, but no new training."""

    of_phases: ClassVar[tuple[str, ...]] = (
        *GenerativeRunConfig.of_phases,
        "tokenizer",
        "neighbours",
        "profile",
        "pretrained",
    )
    of_evaluation: ClassVar[tuple[str, ...]] = (*GenerativeRunConfig.of_evaluation, "reorder")
    query_ids: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.reorder is not None:
            check_least(self, "", reorder=1)
        if self.prior and not self.model.restrict:
            raise UserError("configuration key 'prior': it is of a level's codes alone; set model.restrict as well")
        if self.prompt.copying and not self.features.candidates:
            raise UserError(
                "configuration key 'prompt.copying': there is nothing to copy; raise features.related or "
                "features.popular, or set prompt.copying to False"
            )
        check_labels(self.prompt.copying, "prompt.copying", self.objective.smoothing)

    def evaluation_inputs(self) -> dict[str, Any]:
        """As of every system; what a run does without is left out, as in runs from before it could be configured."""
        values = super().evaluation_inputs()
        return {name: value for name, value in values.items() if name != "reorder" or value is not None}

    def check(self) -> None:
        """As of every system, of the first two stages, and of the rewards."""
        super().check()
        if self.rewards is not None:
            self.rewards.check(tuple(self.data.behaviors))
        elif self.reorder is not None:
            raise UserError(
                f"configuration key 'reorder' is {self.reorder}, but there is no reward model to order answers by; "
                "give 'rewards', or leave it out"
            )
        for of_stage in (self.content, self.co_occurrence):
            if of_stage.weights:
                of_stage.optim.check_steps(of_stage.training.steps, f"{of_stage.stage}.optim")
        behaviors, weakest = self.data.behaviors, self.features.weakest
        if weakest is not None and weakest >= len(behaviors):
            raise UserError(
                f"configuration key 'features.weakest' is {weakest}, so that nothing would count as a click; give 0 to "
                f"{len(behaviors) - 1}, for {', '.join(behaviors)}"
            )
