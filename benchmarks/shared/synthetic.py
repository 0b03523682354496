"""OneMall's model as configs/onemall.py has it, over a made-up catalogue as large as the demo's, and full histories.

Times depend on shapes alone; everything else is drawn.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import load_config
from jaxrec.data.features import AGES, FeatureConfig, cut, targets
from jaxrec.data.popularity import PopularityByPeriod
from jaxrec.models.cross_decoder import CatalogueArrays, CrossDecoder
from jaxrec.models.prior import build_prior
from jaxrec.systems.generative import bound_loss
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.systems.onemall.model import OneMallAssembly
from jaxrec.systems.onemall.training import mean_loss
from jaxrec.targets import SemanticIdSpace
from jaxrec.training.optim import make_optimizer
from jaxrec.training.step import make_state, make_step

DEMO = load_config(Path(__file__).parents[2] / "configs" / "onemall.py")
ITEMS = 10_374
CODEBOOK_SIZES = (*DEMO.semantic_ids.hierarchy.sizes, int(np.prod(DEMO.semantic_ids.remainder.levels)))
ATTRIBUTE_SIZES = (256,) * len(DEMO.attributes)
EVENTS_A_SESSION = 20


def demo_config(features: dict | None = None, **model) -> OneMallConfig:
    """The demo's configuration, with other fields of its `features` and `model` where they are given."""
    return dataclasses.replace(
        DEMO,
        features=dataclasses.replace(DEMO.features, **(features or {})),
        model=dataclasses.replace(DEMO.model, **model),
    )


def make_assembly(config: OneMallConfig) -> OneMallAssembly:
    """The model over a catalogue whose codes and attributes are drawn."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, CODEBOOK_SIZES, (ITEMS, len(CODEBOOK_SIZES))).astype(np.int32)
    attributes = generator.integers(0, ATTRIBUTE_SIZES, (ITEMS, len(ATTRIBUTE_SIZES))).astype(np.int32)
    lately = PopularityByPeriod(generator.dirichlet(np.ones(ITEMS), 100), first_day=0, days=3)
    catalogue = CatalogueArrays(
        codes=jnp.asarray(codes),
        attributes=jnp.asarray(attributes),
        embeddings=jnp.asarray(generator.normal(size=(ITEMS, 64)), jnp.float32),
        log_q=jnp.full(ITEMS, -np.log(ITEMS), jnp.float32),
        prior=build_prior(codes, lately.weights, CODEBOOK_SIZES),
    )
    behaviors = tuple(config.data.behaviors)
    model = CrossDecoder(config.model, behaviors, CODEBOOK_SIZES, ATTRIBUTE_SIZES, ITEMS, AGES)
    wanted = np.isin(behaviors, config.data.target_behaviors)
    return OneMallAssembly(model, catalogue, SemanticIdSpace(codes, CODEBOOK_SIZES), lately, None, wanted)


def make_batch(assembly: OneMallAssembly, config: OneMallConfig, batch_size: int | None = None) -> dict[str, jax.Array]:
    """What `training_batches` yields, of users who fill every sequence and take L items next."""
    examples = [_example(assembly, config.features, seed) for seed in range(batch_size or config.batch_size)]
    batch = {name: jnp.asarray(np.stack([example[name] for example in examples])) for name in examples[0]}
    return batch | {"where": jnp.ones(len(examples), bool)}


class TrainingStep:
    """The training step of `config`, compiled; a call makes one step and returns its metrics."""

    def __init__(self, config: OneMallConfig):
        self.assembly = make_assembly(config)
        self.batch = make_batch(self.assembly, config)
        optimizer = make_optimizer(config.optim, config.training.steps)
        self.state = make_state(self.assembly.init(config.seed), optimizer)
        self.step = jax.jit(
            make_step(bound_loss(mean_loss, self.assembly, config), optimizer, config.seed), donate_argnums=0
        )

    def __call__(self) -> dict:
        self.state, metrics = self.step(self.state, self.batch)
        return metrics


def _example(assembly: OneMallAssembly, config: FeatureConfig, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    behaviors = len(assembly.behaviors)
    # As many of each behavior as the longest sequence, then a session of distinct items.
    past = generator.permutation(np.repeat(np.arange(behaviors), max(config.history_lengths)))
    following = np.full(config.targets, assembly.target_behaviors[0])
    session = np.concatenate([np.arange(len(past)) // EVENTS_A_SESSION, np.full(config.targets, len(past))])
    items = np.concatenate([
        generator.integers(0, ITEMS, len(past)), generator.choice(ITEMS, config.targets, replace=False)
    ])  # fmt: skip
    record = {
        "item": items.astype(np.int32),
        "behavior": np.concatenate([past, following]).astype(np.int8),
        "timestamp": 3600 * np.arange(len(items), dtype=np.int64),
        "session": session.astype(np.int32),
    }
    context = cut(record, len(past), config, behaviors=behaviors, wanted=assembly.wanted)
    return context | targets(record, len(past), config, wanted=assembly.wanted, rng=generator)
