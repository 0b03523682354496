"""OneMall's model on the counts of a log alone: whether it fits, its FLOPs and its memory, without data or training."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.data.attributes import PRICE_STEPS
from jaxrec.data.features import AGES, cut
from jaxrec.data.popularity import PopularityByPeriod
from jaxrec.models.cross_decoder import CatalogueArrays, CrossDecoder
from jaxrec.models.prior import build_prior
from jaxrec.semantic_ids.quantizers.codebooks import check as check_ids
from jaxrec.systems.check_data import Rehearsal
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.systems.onemall.model import OneMallAssembly
from jaxrec.systems.onemall.training import exact_loss
from jaxrec.targets import SemanticIdSpace
from jaxrec.training.flops import step_flops


def rehearse(config: OneMallConfig, counts: dict[str, Any]) -> Rehearsal:
    """What a training takes on a log with these counts (`jaxrec.data.prepare.survey`).

    Raises:
      UserError: the model or its IDs do not fit the log.
    """
    check_ids(config.semantic_ids, (counts["items"], config.align.width))
    assembly = _assembly(config, counts)
    config.decoding.check(assembly.space)
    config.validation_decoding.check(assembly.space, "validation_decoding")
    variables = jax.eval_shape(functools.partial(assembly.init, 0))
    params = jax.tree.leaves(variables["params"])
    flops = step_flops(exact_loss(assembly, config), variables)(_batch(assembly, config)).count
    # A step has the targets of B contexts and their gradients; an answer has W beams in the place of the targets.
    share = max(1.0, config.decoding.beam_width / config.features.targets)
    return Rehearsal(
        step_flops=flops,
        search_flops=flops / 3 / config.batch_size * share,
        parameters=sum(math.prod(leaf.shape) for leaf in params),
        activations=_activations(config, len(assembly.behaviors)),
    )


def _assembly(config: OneMallConfig, counts: dict[str, Any]) -> OneMallAssembly:
    """The model of a catalogue of as many items, with random IDs."""
    parts = [part for part in (config.semantic_ids.hierarchy, config.semantic_ids.remainder) if part is not None]
    sizes = tuple(size for part in parts for size in _codes(part))
    items = counts["items"]
    codes = np.random.default_rng(0).integers(0, sizes, (items, len(sizes)), dtype=np.int32)
    words = counts["attribute_values"]
    attributes = tuple(words.get(name, PRICE_STEPS) + 1 for name in config.attributes)
    weights = np.full((1, items), 1 / items)
    catalogue = CatalogueArrays(
        codes=jnp.asarray(codes),
        attributes=jnp.zeros((items, len(attributes)), jnp.int32),
        embeddings=jnp.zeros((items, config.align.width)),
        log_q=jnp.zeros(items),
        prior=build_prior(codes, weights, sizes),
    )
    behaviors = tuple(config.data.behaviors)
    model = CrossDecoder(config.model, behaviors, sizes, attributes, items, AGES)
    wanted = np.isin(behaviors, config.data.target_behaviors)
    return OneMallAssembly(
        model, catalogue, SemanticIdSpace(codes, sizes), PopularityByPeriod(weights, 0, 0), None, wanted
    )


def _codes(part: Any) -> tuple[int, ...]:
    """Codes in each level of a quantizer that is not fitted yet."""
    if hasattr(part, "sizes"):
        return tuple(part.sizes)
    return (math.prod(part.levels),)


def _batch(assembly: OneMallAssembly, config: OneMallConfig) -> dict[str, Any]:
    """The shapes of a batch of the middle bucket."""
    features = config.features
    length = features.buckets[(len(features.buckets) - 1) // 2]
    rows = np.arange(length, dtype=np.int32)
    many = {"item": rows % 2, "behavior": np.zeros(length, np.int32), "timestamp": rows, "session": rows, "now": length}
    arrays = cut(many, length, features, behaviors=len(assembly.behaviors), wanted=assembly.wanted)
    arrays["target"] = np.zeros(features.targets, np.int32)
    arrays["target_where"] = np.ones(features.targets, bool)
    arrays["where"] = np.ones((), bool)
    size = config.batch_size
    return {name: jnp.zeros((size, *np.shape(each)), np.asarray(each).dtype) for name, each in arrays.items()}


def _activations(config: OneMallConfig, behaviors: int) -> float:
    """Bytes that a step keeps for its gradients: about 16 vectors a token of a history and of a target, and logits."""
    model, features = config.model, config.features
    longest = features.buckets[-1]
    tokens = behaviors * longest + features.past_length + 3 * features.targets * model.layers * 4
    return 4.0 * config.batch_size * tokens * model.width * 16
