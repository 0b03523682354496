"""OneMall, from logs to an evaluated run.

Query-Formers over long histories of every behavior, a cross-attention decoder with sparse experts, semantic IDs of two
residual k-means levels and FSQ. The phases of a run are those of `jaxrec.systems.generative`.
"""

from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

from jaxrec.config import UserError, check_heads, check_least, check_shares
from jaxrec.data.features import FeatureConfig
from jaxrec.data.popularity import PopularityConfig
from jaxrec.models.cross_decoder import CrossDecoderConfig
from jaxrec.systems.generative import GenerativeRunConfig
from jaxrec.systems.ranking.config import RankingStageConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig


@dataclass(frozen=True)
class OneMallObjective:
    """What the model is trained for (OneMall Eq. 7)."""

    contrastive_weight: float = 0.1
    """Weight of the in-batch contrastive task beside next-token prediction."""


EGPM = {"egpm": ("ctcvr", "price")}
"""What a term is the product of."""


@dataclass(frozen=True)
class RewardWeights:
    """r = ctr CTR + cvr CVR + ctcvr CTCVR + egpm EGPM + price P (OneMall Eq. 8), with EGPM = CTCVR * price."""

    ctr: float = 1.0
    """Weight of the probability of a click on an item that is shown."""
    cvr: float = 0.0
    """Weight of the probability of a purchase after a click."""
    ctcvr: float = 30.0
    """Weight of the probability of a purchase of an item that is shown."""
    egpm: float = 1.0
    """Weight of the expected revenue of showing the item, in units of the price."""
    price: float = 0.0
    """Weight of the price itself, whether anybody buys or not."""

    def given(self) -> dict[str, float]:
        """The weights that are not 0, by the name of the term."""
        return {name: weight for name, weight in asdict(self).items() if weight}

    def needed(self) -> tuple[str, ...]:
        """What must be predicted for these terms."""
        names = dict.fromkeys(name for each in self.given() for name in EGPM.get(each, (each,)))
        return tuple(names)


@dataclass(frozen=True)
class ReinforcementConfig:
    """Reinforcement learning behind the supervised stage (OneMall §3.3)."""

    loss: Literal["grpo", "dpo"] = "grpo"
    """grpo: all drawn candidates by their advantages (Eq. 10); dpo: the best against the worst (Eq. 9)."""
    reward: Literal["model", "environment", "spend"] = "model"
    """model: the ranking model of the stage before; environment: the true rates of a source that knows them; spend: the
    price of what the shopper did buy next."""
    weights: RewardWeights = field(default_factory=RewardWeights)
    """Weights of the reward that the policy learns from."""
    truth: RewardWeights = field(default_factory=RewardWeights)
    """Weights of the true reward, which is measured where the source is an environment and never learned from."""
    share: float = 0.02
    """Share of a step's contexts that candidates are drawn for, one context at least (OneMall: 2%)."""
    sampling: Literal["rollout", "beam"] = "rollout"
    """rollout: candidates are drawn without replacement; beam: the most probable ones, as OneMall has them."""
    candidates: int = 768
    """Candidates n of a context, over which rewards are normalised (OneMall: 768)."""
    drawn: int = 64
    """Candidates m of the n that GRPO is computed of, drawn evenly; DPO takes the best and the worst of all n."""
    temperature: float = 1.0
    """Temperature of rollouts."""
    refresh_every: int = 20
    """Steps after which the policy that draws candidates becomes that of the moment."""
    reference: Literal["refreshed", "frozen"] = "refreshed"
    """The denominator of the ratios: the policy that drew the candidates, or the supervised stage."""
    weight: float = 0.5
    """Weight of the policy's loss beside next-token prediction and contrastive task (OneMall: 0.5)."""
    scale: float = 0.1
    """lambda of DPO."""
    clip: float = 0.2
    """epsilon of GRPO."""
    delta: float = 0.0
    """Added to the reference's probabilities, as printed."""
    printed: bool = False
    """Eq. 9 and 10 as they are printed."""
    kl_weight: float = 0.0
    """Weight of the divergence from the supervised stage."""
    lost_hits: float = 0.01
    """The share of its hit rate that a policy may lose; a state that lost more is no better than where it began."""
    stop: bool = False
    """Whether training stops as soon as the reward has risen and the truth has fallen."""
    lost_truth: float = 0.01
    """The share by which the true reward may vary without having fallen."""
    batch_size: int = 32
    """Contexts of a step, over all hosts."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=3e-4, warmup=20))
    """Optimiser of the stage."""
    training: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=400, log_every=20, checkpoint_every=100, monitor="kept_reward@10")
    )
    """Length of the stage, logs, checkpoints, evaluations."""

    def __post_init__(self):
        place = "reinforcement"
        check_least(self, place, candidates=1, drawn=1, refresh_every=1, weight=0, scale=0, clip=0, delta=0)
        check_least(self, place, kl_weight=0, batch_size=1)
        check_shares(self, place, "lost_hits", "lost_truth")
        if not 0 < self.share <= 1:
            raise UserError(f"configuration key '{place}.share' is {self.share}; give more than 0, at most 1")
        if not self.temperature > 0:
            raise UserError(f"configuration key '{place}.temperature' is {self.temperature}; give a number above 0")
        if not self.weights.given():
            raise UserError(f"configuration key '{place}.weights' gives every term the weight 0; give one a weight")

    @property
    def contexts(self) -> int:
        """Contexts of a step that candidates are drawn for."""
        return max(1, round(self.share * self.batch_size))

    @property
    def reads_reference(self) -> bool:
        """Whether the loss reads the frozen supervised stage."""
        return self.reference == "frozen" or self.kl_weight > 0


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
    ranking: RankingStageConfig | None = None
    """The ranking model that rewards; None: none, or for `reinforcement.reward` model that of the defaults."""
    reinforcement: ReinforcementConfig | None = None
    """Reinforcement learning behind the supervised stage; None: none."""

    of_later: ClassVar[tuple[str, ...]] = ("ranking", "reinforcement")
    """Fields that the supervised stage does not depend on."""

    def check(self) -> None:
        """As `RunConfig.check`; and whether the source has the rewards.

        Raises:
          UserError: as there, or it has not.
        """
        super().check()
        check_heads(self.model.width, self.model.heads, "model.heads")
        own, rewards = self.reinforcement, self.reward_model
        if rewards is not None:
            rewards.check(tuple(self.data.behaviors))
            if missing := [name for name in own.weights.needed() if name not in rewards.predicted]:
                raise UserError(
                    f"configuration key 'ranking.towers' is {rewards.towers}, but the reward has a weight for "
                    f"{missing[0]}; add that tower, or set the weight in reinforcement.weights to 0"
                )
        if own is None:
            return
        own.optim.check_steps(own.training.steps, "reinforcement.optim")
        if own.reward == "environment" and not hasattr(self.data, "environment"):
            raise UserError(
                f"configuration key 'reinforcement.reward' is 'environment', but {type(self.data).__name__} does not "
                "know the true rates of its items; give another reward"
            )

    @property
    def reward_model(self) -> RankingStageConfig | None:
        """The ranking model that is trained as a stage; None where nothing is learned from one."""
        if self.reinforcement is None or self.reinforcement.reward != "model":
            return None
        return self.ranking or RankingStageConfig()
