"""TIGER and FORGE: an encoder-decoder generates the semantic ID of the next item from those of the items before.

TIGER (Rajput et al., "Recommender Systems with Generative Retrieval", NeurIPS 2023): RQ-VAE IDs of item texts, 3
levels of 256 codes and one more that tells items under one ID apart; a T5 of 4 + 4 layers reads a hashed user token and
the IDs of up to 20 items. Its authors report on Amazon Beauty (leave-one-out, full ranking) Recall@5 .0454, Recall@10
.0648, NDCG@5 .0321, NDCG@10 .0384; others' runs of it lie between Recall@10 .055 and .0775.

FORGE ("FORGE: Forming Semantic Identifiers for Generative Retrieval in Industrial Datasets", Alibaba 2025): the same
generative model on better IDs, which know what shoppers take together and of which few are shared. Its authors measure
on Taobao's own logs; the RankGR paper has it beside TIGER in its Tables 2 and 3, ahead at every cutoff. Here it is a
configuration: embeddings aligned on pairs of items (`align`), and `collisions` that move surplus items to the nearest
free ID.

    source ─▶ tables ─▶ semantic IDs ─▶ examples ─▶ training ─▶ evaluation ─▶ report
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxrec.config import UserError, check_least, check_shares
from jaxrec.data.item_sequences import ItemSequenceConfig
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.semantic_ids.quantizers.codebooks import SemanticIdConfig
from jaxrec.semantic_ids.quantizers.rqvae import RqVaeConfig
from jaxrec.semantic_ids.table.collisions import CollisionConfig
from jaxrec.systems.generative import GenerativeRunConfig
from jaxrec.text.align import AlignConfig
from jaxrec.text.finetune import FinetuneConfig

TEXT_ALONE = AlignConfig(width=384, epochs=0.0, item_residual=False)
"""Principal components of the texts, not aligned: TIGER's IDs know nothing of shoppers."""


@dataclass(frozen=True)
class TigerObjective:
    """What the model is trained for."""

    targets: int = 1
    """Next items that each prefix learns from (TIGER: 1); more cost little, since they share its encoding. With a
    causal encoder every item of a sequence is a target anyway, and this has no effect."""
    later_weight: float = 0.5
    """Weight of the items of the second next session, and so on by powers, where `targets` is above 1."""
    smoothing: float = 0.0
    """Share of each label that is spread evenly over its level."""
    without_user: float = 0.1
    """Share of the examples whose user is left out, so that users who weren't there in training can be served."""

    def __post_init__(self):
        check_least(self, "objective", targets=1)
        check_shares(self, "objective", "later_weight", "smoothing", "without_user", all_allowed=True)


@dataclass(frozen=True)
class TigerConfig(GenerativeRunConfig):
    """Everything that decides a run of TIGER or FORGE."""

    system: str = "tiger"
    """Which system this configures; forge is the same on other IDs, and goes by its own name in tables."""
    batch_size: int = 256
    """Contexts in a training step, over all hosts."""
    align: AlignConfig | FinetuneConfig = TEXT_ALONE
    """Contrastive alignment of the embeddings (FORGE); none by default."""
    semantic_ids: SemanticIdConfig = field(
        default_factory=lambda: SemanticIdConfig(RqVaeConfig((256, 256, 256)), remainder=None)
    )
    """Quantizers."""
    collisions: CollisionConfig = field(default_factory=lambda: CollisionConfig("extra_level"))
    """What is done about items that share a semantic ID."""
    features: ItemSequenceConfig = field(default_factory=ItemSequenceConfig)
    """How much of the past the model reads."""
    users: int = 2000
    """Tokens that users are hashed to, in front of their items; 0: no such token."""
    positions: Literal["codes", "items"] = "codes"
    """What a position of the context is: one code, as published, or an item, the sum of its codes' embeddings, which
    makes contexts as many times shorter as IDs have levels."""
    own_tokens: bool = False
    """An item of the context has a token of its own beside its codes' (`positions` "items"), so that it need not be
    made out by the combination of its codes; it is initialised with the embedding that the ID was made of. An item that
    came after training has none."""
    prior: bool = False
    """A popularity prior is added to the decoder's logits: the log-share of each code among the items with its prefix.
    Off, as published: the decoder learns popularity itself."""
    model: EncoderDecoderConfig = field(default_factory=lambda: EncoderDecoderConfig(dropout=0.1))
    """Sizes and parts of the model; vocabulary, levels and start token follow from the IDs."""
    objective: TigerObjective = field(default_factory=TigerObjective)
    """The loss."""

    def __post_init__(self):
        super().__post_init__()
        if self.own_tokens and self.positions != "items":
            raise UserError(
                "configuration key 'own_tokens': it is part of an item's position; set positions to items as well"
            )
        if self.prior and not self.model.restrict:
            raise UserError("configuration key 'prior': it is of a level's codes alone; set model.restrict as well")
