"""The part of a configuration that every system has."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from jaxrec.config import check_least
from jaxrec.data.prepare import PrepareConfig
from jaxrec.data.sources import AnySource
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.validation import check_training
from jaxrec.text.align import AlignConfig
from jaxrec.text.encoder import EncoderConfig
from jaxrec.text.finetune import FinetuneConfig, SearchFinetuneConfig, SuggestionFinetuneConfig
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig
from jaxrec.training.sharding import MeshConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run; a system adds its model, its loss and what it reads."""

    data: AnySource
    """Where the logs come from."""
    system: str = ""
    """Which system this configures, and its name in tables."""
    seed: int = 0
    """Seed of everything that is drawn."""
    batch_size: int = 128
    """Contexts in a training step, over all hosts."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """Cleaning, splits and pair statistics."""
    text: EncoderConfig = field(default_factory=EncoderConfig)
    """Text encoder."""
    align: AlignConfig | FinetuneConfig | SearchFinetuneConfig | SuggestionFinetuneConfig = field(
        default_factory=AlignConfig
    )
    """Contrastive alignment of the embeddings: by a projection and a free vector an item, or of the text encoder, on
    pairs of items alone, on searches too, or on suggestions without items."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    training: LoopConfig = field(default_factory=LoopConfig)
    """Length of training, logging, checkpoints, evaluation on the validation split."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Layout of the devices."""
    validation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(split="valid", max_users=2000))
    """Which users are measured while training, every `training.evaluate_every` steps."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured at the end."""

    of_phases: ClassVar[tuple[str, ...]] = ("data", "system", "prepare", "text", "align")
    """Fields that reach a training only through the folders that the phases before it made."""
    of_validation: ClassVar[tuple[str, ...]] = ("validation",)
    """Fields that a training depends on where it is validated."""
    of_evaluation: ClassVar[tuple[str, ...]] = ("evaluation",)
    """Fields that the final evaluation alone depends on: they may change without a new training."""

    def __post_init__(self):
        check_least(self, "", seed=0, batch_size=1)
        self.validation.check_validation()

    def check(self) -> None:
        """What only the whole configuration shows, as `jaxrec.systems.validation.check_training`."""
        check_training(self)

    def training_inputs(self, *without: str) -> dict[str, Any]:
        """The fields that decide a stage, given the folders that the phases before it made.

        without: fields that decide other stages alone.
        """
        others = {*self.of_phases, *self.of_evaluation, *without}
        others |= set() if self.training.evaluate_every else set(self.of_validation)
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in others}

    def evaluation_inputs(self) -> dict[str, Any]:
        """The fields that decide the final evaluation of a trained model."""
        return {name: getattr(self, name) for name in self.of_evaluation}
