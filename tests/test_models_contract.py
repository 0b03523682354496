"""The contract of models and losses: what holds for every model with the three verbs, and for every loss on each."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onemall_parts
import pytest
import rankgr_parts
from flax import linen as nn

import jaxrec.models
from jaxrec.losses.likelihood import log_likelihood, next_token
from jaxrec.losses.policy import best_against_worst, grpo
from jaxrec.losses.preference import HybridConfig, hybrid, ldpo
from jaxrec.losses.rewards import pair_weights
from jaxrec.models.causal import Causal, CausalConfig
from jaxrec.models.contract import Scored, TargetModel
from jaxrec.models.cross_decoder import CrossDecoder
from jaxrec.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, bart_config
from jaxrec.models.personal_search import PersonalSearch, PromptConfig, SearchInputs, SearchVocabulary
from jaxrec.models.prior import popularity_prior
from jaxrec.models.rankgr import RankGR
from jaxrec.models.suggestion import SuggestionInputs, SuggestionModel, SuggestionVocabulary
from jaxrec.models.vocabulary import ContextTokens

SIZES = (4, 3, 2)
LEVELS = ((3, 4), (7, 3), (10, 2))
B, S, L, M = 2, 6, 4, 3
TARGETS = np.random.default_rng(0).integers(0, SIZES, (B, L, M)).astype(np.int32)
LAST = np.array([[5, 0, 2, 3], [3, 1, 0, 3]])
"""the last position of the context that each target sees in a view"""
LENGTHS = np.array([[3, 1, 2, 3], [2, 3, 1, 1]])
"""tokens of targets of unequal length"""
PREFERENCE = jnp.array([[2, 1, 0, 0], [1, 1, 0, 2]])
"""the level of each target in the order of preference"""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model with random variables, and two contexts for it, as arrays from which its inputs are built."""

    model: nn.Module
    variables: dict
    arrays: dict[str, np.ndarray]
    build: Callable[[dict], Any]
    masks: dict[str, str]
    """the mask of every array that has one"""
    targets: np.ndarray = dataclasses.field(default_factory=lambda: TARGETS)
    others: str = "$."
    """parameters that no loss over `Scored` trains: a regular expression"""
    sums_to_one: bool = True
    sizes: tuple[int, ...] = SIZES
    """tokens of every level, of models whose targets have levels"""

    def apply(self, params: dict, *args, method: str, **options):
        return self.model.apply({**self.variables, "params": params}, *args, method=method, **options)

    def context(self, params: dict, arrays: dict):
        return self.apply(params, self.build(arrays), method="prefill")


def random_params(model: nn.Module, inputs: Any, rng: np.random.Generator) -> dict:
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs, TARGETS)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape) + (leaf.ndim == 1), leaf.dtype),
        nn.unbox(shapes)["params"],
    )


def text(model: nn.Module, **options) -> Case:
    rng, prior = np.random.default_rng(1), None
    if options.pop("prior"):
        prior = popularity_prior(rng.integers(0, SIZES, (9, M)), np.arange(9), SIZES)
    arrays = {"tokens": rng.integers(3, 12, (B, S)).astype(np.int32), "mask": np.arange(S) < [[S], [4]]}
    params = random_params(model, ContextTokens(**arrays), rng)

    def build(arrays: dict) -> ContextTokens:
        return ContextTokens(arrays["tokens"], arrays["mask"], prior)

    return Case(model, {"params": params}, arrays, build, {"tokens": "mask"}, **options)


def causal(prior: bool = False, sums_to_one: bool = True, **changes) -> Case:
    sizes = {"vocabulary": 14, "width": 8, "heads": 4, "groups": 2, "head_dim": 4, "hidden": 6, "layers": 1}
    model = Causal(CausalConfig(rotary_base=100.0, **sizes | {"levels": LEVELS} | changes))
    return text(model, prior=prior, sums_to_one=sums_to_one)


def encoder_decoder(prior: bool = False, sums_to_one: bool = True, **changes) -> Case:
    sizes = {"vocabulary": 14, "width": 8, "heads": 2, "head_dim": 4, "hidden": 6, "encoder_layers": 1, "layers": 1}
    model = EncoderDecoder(EncoderDecoderConfig(**sizes | {"levels": LEVELS} | changes))
    return text(model, prior=prior, sums_to_one=sums_to_one)


def bart(prior: bool = False, sums_to_one: bool = True, **changes) -> Case:
    sizes = {"vocabulary": 14, "width": 8, "heads": 2, "head_dim": 4, "hidden": 6, "encoder_layers": 1, "layers": 1}
    model = EncoderDecoder(bart_config(**sizes | {"max_positions": 9, "levels": LEVELS} | changes))
    return text(model, prior=prior, sums_to_one=sums_to_one, others="logits_bias")


def cross_decoder(**changes) -> Case:
    assembly = onemall_parts.make_assembly(dataclasses.replace(onemall_parts.MODEL, **{"layers": 1, **changes}))
    arrays = onemall_parts.make_arrays([onemall_parts.make_history(seed, 7) for seed in range(B)], assembly)
    names = ("history_0", "history_1", "past")
    masks = {f"{name}_{field}": f"{name}_mask" for name in names for field in ("item", "age")}
    targets = TARGETS.copy()
    targets[:, 0] = assembly.space.codes[arrays["past_item"][:, 0]]  # for the habit head to learn from
    build = functools.partial(assembly.inputs, assembly.catalogue)
    # The auxiliary task trains the item tower. A bias under a softmax has no gradient.
    others = r"item_tower|'match'|\['habit_out'\]\['bias'\]"
    variables = onemall_parts.make_variables(assembly)
    return Case(assembly.model, variables, arrays, build, masks | {"habit": "past_mask"}, targets, others)


def rankgr(**changes) -> Case:
    config = dataclasses.replace(rankgr_parts.MODEL, **changes)
    assembly, features = rankgr_parts.make_assembly(config), dataclasses.replace(rankgr_parts.FEATURES, buckets=(S,))
    arrays = rankgr_parts.make_arrays([rankgr_parts.make_record(0, 12), rankgr_parts.make_record(1, 7)], features)
    masks, targets = dict.fromkeys(("item", "behavior", "gap"), "mask"), TARGETS.copy()
    targets[:, 0] = assembly.space.codes[arrays["item"][:, 0]]  # for the pointer to learn from
    build = functools.partial(assembly.inputs, assembly.catalogue)
    variables = rankgr_parts.make_variables(config)
    return Case(assembly.model, variables, arrays, build, masks, targets, "rank_head")


def personal_search(positions: str = "items", make: Callable = EncoderDecoderConfig, **changes) -> Case:
    sizes = {"width": 8, "heads": 2, "head_dim": 4, "hidden": 6, "layers": 1}
    sizes |= {} if make is CausalConfig else {"encoder_layers": 1}
    vocabulary = SearchVocabulary(texts=6, tasks=1, sizes=SIZES)
    model = PersonalSearch(
        vocabulary.fit(make(**sizes | changes)), vocabulary, PromptConfig(positions, long_queries=2, long_heads=2)
    )
    rng = np.random.default_rng(2)
    ids = {"query_codes": (), "user_codes": (2,), "recent_queries": (2,), "recent_items": (3,), "candidates": (4,)}
    arrays = {name: rng.integers(0, SIZES, (B, *shape, M)).astype(np.int32) for name, shape in ids.items()}
    arrays |= {name: rng.normal(size=(B, *shape)).astype(np.float32) for name, shape in
               {"long": (3, M, 5), "habits": (4, 3), "user": (2,)}.items()}  # fmt: skip
    arrays["query"] = rng.integers(0, 6, (B, 4)).astype(np.int32)
    masks = {"query": "query_mask", "recent_items": "recent_items_mask", "candidates": "candidates_mask"}
    masks |= {"habits": "candidates_mask"}
    arrays |= {mask: np.arange(arrays[name].shape[1]) < [[9], [2]] for name, mask in masks.items()}
    targets = TARGETS.copy()
    targets[:, 0] = arrays["candidates"][:, 0]  # for the candidates' weights to learn from

    def build(arrays: dict) -> SearchInputs:
        of_masks = {
            name: jnp.where(arrays[mask][(...,) + (None,) * (arrays[name].ndim - 2)], arrays[name], -1)
            for name, mask in masks.items()
            if name != "habits"
        }
        others = {name: value for name, value in arrays.items() if name not in masks.values()}
        return SearchInputs(**others | of_masks)

    params = random_params(model, build(arrays), rng)
    # A bias under a softmax has no gradient.
    return Case(model, {"params": params}, arrays, build, masks, targets, r"\['habit_out'\]\['bias'\]")


def suggestion(make: Callable = EncoderDecoderConfig, copying: bool = True, **changes) -> Case:
    sizes = {"width": 8, "heads": 2, "head_dim": 4, "hidden": 6, "layers": 1}
    sizes |= {} if make is CausalConfig else {"encoder_layers": 1}
    vocabulary, rng = SuggestionVocabulary(texts=6), np.random.default_rng(3)
    model = SuggestionModel(vocabulary.fit(make(**sizes | changes), M), vocabulary, copying)
    arrays = {"tokens": rng.integers(0, 10, (B, S)), "candidates": rng.integers(0, 6, (B, 4, M))}
    arrays = {name: value.astype(np.int32) for name, value in arrays.items()}
    arrays |= {"habits": rng.normal(size=(B, 4, 3)).astype(np.float32), "user": np.eye(2, dtype=np.float32)}
    masks = {"tokens": "mask", "candidates": "candidates_mask", "habits": "candidates_mask"}
    arrays |= {mask: np.arange(arrays[name].shape[1]) < [[9], [2]] for name, mask in masks.items()}
    targets = TARGETS.copy()
    targets[:, 0] = arrays["candidates"][:, 0]  # for the candidates' weights to learn from
    arrays["candidates"][:, 1, 2:] = -1  # a shorter query

    def build(arrays: dict) -> SuggestionInputs:
        candidates = jnp.where(arrays["candidates_mask"][..., None], arrays["candidates"], -1)
        tokens = jnp.where(arrays["mask"], arrays["tokens"], -1)
        return SuggestionInputs(tokens, candidates, arrays["habits"], arrays["user"])

    params, others = random_params(model, build(arrays), rng), r"\['habit_out'\]\['bias'\]|logits_bias"
    return Case(model, {"params": params}, arrays, build, masks, targets, others, sizes=(6,) * M)


CASES = {
    "causal": lambda: causal(prior=True),
    "encoder_decoder": lambda: encoder_decoder(tied=False),
    "encoder_decoder, prefixes": lambda: encoder_decoder(prior=True, causal=True),
    "bart": lambda: bart(prior=True),
    "cross_decoder": cross_decoder,
    "rankgr": lambda: rankgr(pointer=True, prior=True),
    "personal_search": personal_search,
    "suggestion": suggestion,
}
VARIANTS = CASES | {
    "causal, whole vocabulary": lambda: causal(sums_to_one=False, restrict=False, groups=4, tied=False),
    "causal, tokens": lambda: causal(levels=None, groups=1, bias=False),
    "causal, Qwen3": lambda: causal(bias=False, head_norm=True),
    "encoder_decoder, whole vocabulary": lambda: encoder_decoder(sums_to_one=False, restrict=False),
    "encoder_decoder, tokens": lambda: encoder_decoder(levels=None, activation="gelu", gated=True, start_token=2),
    "bart, prefixes": lambda: bart(causal=True, restrict=False, tied=False, sums_to_one=False),
    "bart, tokens": lambda: bart(levels=None, activation="relu"),
    "cross_decoder, uncompressed": lambda: cross_decoder(
        habit=False, places=True, queries=0, experts=1, item_embedding=False, prior=False
    ),
    "personal_search, codes": lambda: personal_search("codes"),
    "personal_search, BART": lambda: personal_search(make=bart_config),
    "personal_search, Qwen2": lambda: personal_search(make=CausalConfig),
    "personal_search, Qwen3, codes": lambda: personal_search("codes", CausalConfig, bias=False, head_norm=True),
    "suggestion, BART": lambda: suggestion(bart_config),
    "suggestion, Qwen2": lambda: suggestion(CausalConfig),
    "suggestion, Qwen3 without copying": lambda: suggestion(CausalConfig, False, bias=False, head_norm=True),
    "rankgr, codes": lambda: rankgr(context="codes", behaviors=False, gaps=False),
}
MODELS = (Causal, EncoderDecoder, CrossDecoder, RankGR, PersonalSearch, SuggestionModel)
VIEWS = ("causal", "encoder_decoder, prefixes", "bart, prefixes", "rankgr")
UNCUT = ("encoder_decoder", "bart")
"""their contexts have views with `model.causal` alone"""


def of_pairs(config: HybridConfig, scored: Scored, where) -> jax.Array:
    """The hybrid loss at policy = reference."""
    likelihood = log_likelihood(scored.log_probs, where)
    pairs = pair_weights(PREFERENCE, chosen=PREFERENCE > 0, where=where)
    return hybrid(likelihood, likelihood, pairs.weight, config).sum(-1)


LOSSES = {
    "next_token": lambda scored, where: next_token(scored.log_probs, where).sum(-1),
    "smoothed": lambda scored, where: next_token(
        scored.log_probs, where, mean_log_probs=scored.mean_log_probs, smoothing=0.3
    ).sum(-1),
    "ldpo": lambda scored, where: ldpo(log_likelihood(scored.log_probs, where), PREFERENCE, where, beta=0.5),
    "listwise": functools.partial(of_pairs, HybridConfig()),
    "pairwise": functools.partial(of_pairs, HybridConfig(compare="pairs")),
    "best_against_worst": lambda scored, where: best_against_worst(
        *[log_likelihood(scored.log_probs, where)] * 2, PREFERENCE, where=where
    ),
    # Advantages of mean zero would add up to 0 at policy = reference.
    "grpo": lambda scored, where: grpo(*[scored.log_probs] * 2, -PREFERENCE, where=where).sum(-1),
}


@functools.cache
def make(name: str) -> Case:
    return VARIANTS[name]()


def chain(case: Case, params: dict, context, targets) -> list:
    """The log-probabilities of every level [B, L, K], one call of `extend` after the other along the targets."""
    found, cache = [], None
    for level in range(targets.shape[-1]):
        tokens = targets[..., level - 1] if level else None
        log_probs, cache = case.apply(params, context, tokens, cache, level, method="extend")
        found.append(jnp.broadcast_to(log_probs, (*targets.shape[:2], log_probs.shape[-1])))
        cache = jax.tree.map(lambda x: jnp.repeat(x, targets.shape[1] // x.shape[1], axis=1), cache)
    return found


@functools.cache
def both(name: str) -> Callable:
    """(params, arrays, targets, where) -> (what `score` gives, what `extend` gives), compiled."""
    case = make(name)

    @jax.jit
    def run(params, arrays, targets, where):
        context = case.context(params, arrays)
        return case.apply(params, context, targets, where, method="score"), chain(case, params, context, targets)

    return run


@functools.cache
def scores(name: str) -> tuple[Scored, list]:
    """Of the case's own contexts and targets."""
    case = make(name)
    return jax.device_get(both(name)(case.variables["params"], case.arrays, case.targets, np.ones((B, L), bool)))


@functools.cache
def alone(name: str) -> Callable:
    """(params, arrays, targets) -> log-probabilities, compiled for every number of tokens."""
    case = make(name)
    return jax.jit(
        lambda params, arrays, targets: (
            case.apply(params, case.context(params, arrays), targets, method="score").log_probs
        )
    )


def padded(case: Case) -> dict:
    """The case's arrays with two positions more of padding."""
    names = {*case.masks, *case.masks.values()}
    return {
        name: np.pad(value, [(0, 0), (0, 2)] + [(0, 0)] * (value.ndim - 2)) if name in names else value
        for name, value in case.arrays.items()
    }


# ---- the list --------------------------------------------------------------------------------------------------------


def verbs_of(module: type) -> bool:
    return all(callable(getattr(module, verb, None)) for verb in ("prefill", "score", "extend"))


def test_every_model_with_the_three_verbs_is_in_the_list():
    found = set()
    for module in pkgutil.iter_modules(jaxrec.models.__path__, "jaxrec.models."):
        members = vars(importlib.import_module(module.name)).values()
        found |= {each for each in members if isinstance(each, type) and issubclass(each, nn.Module) and verbs_of(each)}
    assert found == set(MODELS) == {type(make(name).model) for name in CASES}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("verb", ["prefill", "score", "extend"])
def test_verbs_have_the_signature_of_the_contract(model, verb):
    of_contract, own = (inspect.signature(getattr(each, verb)).parameters for each in (TargetModel, model))
    assert [(each.name, each.default) for each in own.values()] == [
        (each.name, each.default) for each in of_contract.values()
    ]


# ---- the verbs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_score_is_the_chain_of_extend(name):
    case, (scored, steps) = make(name), scores(name)
    assert scored.log_probs.dtype == scored.mean_log_probs.dtype == np.float32
    assert scored.states.shape[:3] == (B, L, M)
    chosen = [np.take_along_axis(p, case.targets[..., m, None], -1)[..., 0] for m, p in enumerate(steps)]
    np.testing.assert_allclose(scored.log_probs, np.stack(chosen, -1), atol=2e-5)
    sizes = case.sizes if getattr(case.model.config, "levels", LEVELS) else (case.model.config.vocabulary,) * M
    assert tuple(p.shape[-1] for p in steps) == sizes
    total = np.concatenate([np.exp(p).sum(-1) for p in steps])
    if case.sums_to_one:
        np.testing.assert_allclose(total, 1, atol=1e-5)
    else:
        assert (total < 0.99).all()


@pytest.mark.parametrize(
    "name", [name for name in VARIANTS if not re.match("cross_decoder|rankgr|personal_search|suggestion", name)]
)
def test_the_mean_is_that_of_the_levels_log_probabilities(name):
    """In models that mix nothing in."""
    scored, steps = scores(name)
    np.testing.assert_allclose(scored.mean_log_probs, np.stack([p.mean(-1) for p in steps], -1), atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_target_does_not_change_the_others(name):
    case, run = make(name), both(name)
    targets, where = case.targets.copy(), np.ones((B, L), bool)
    targets[:, 1], where[:, 1] = (targets[:, 1] + 1) % SIZES, False
    changed = run(case.variables["params"], case.arrays, targets, where)[0].log_probs
    whole = scores(name)[0].log_probs
    np.testing.assert_allclose(np.delete(changed, 1, 1), np.delete(whole, 1, 1), atol=1e-5)
    assert np.abs(changed[:, 1] - whole[:, 1]).max() > 1e-3


@pytest.mark.parametrize("name", [*CASES, "cross_decoder, uncompressed"])
def test_what_stands_under_the_mask_changes_nothing(name):
    case, arrays = make(name), dict(make(name).arrays)
    for array, mask in case.masks.items():
        value, mask = arrays[array], arrays[mask]
        mask = mask.reshape(*mask.shape, *[1] * (value.ndim - 2))
        assert not mask.all()
        other = (value + 1) % (value.max() + 1) if value.dtype.kind == "i" else value + 9
        arrays[array] = np.where(mask, value, other).astype(value.dtype)
    ones = np.ones((B, L), bool)
    found = both(name)(case.variables["params"], arrays, case.targets, ones)[0]
    np.testing.assert_allclose(found.log_probs, scores(name)[0].log_probs, atol=1e-5)
    # And what is not masked matters.
    array = next(iter(case.masks))
    arrays[array] = (arrays[array] + 1) % (arrays[array].max() + 1)
    other = both(name)(case.variables["params"], arrays, case.targets, ones)[0]
    assert np.abs(other.log_probs - found.log_probs).max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_padding_of_contexts_and_targets_changes_nothing(name):
    """Packed targets of unequal length against each by itself, without its padding and after a longer context."""
    case, arrays = make(name), padded(make(name))
    where = np.arange(M) < LENGTHS[..., None]
    targets = np.where(where, case.targets, (case.targets + 1) % SIZES).astype(np.int32)
    packed = both(name)(case.variables["params"], case.arrays, targets, np.ones((B, L), bool))[0].log_probs
    apart = np.zeros((B, L), np.float32)
    for place in range(L):
        for length in np.unique(LENGTHS[:, place]):
            found = alone(name)(case.variables["params"], arrays, targets[:, place : place + 1, :length])
            rows = LENGTHS[:, place] == length
            np.testing.assert_allclose(packed[rows, place, :length], found[rows, 0], atol=2e-5)
            apart[rows, place] = np.asarray(found)[rows, 0].sum(-1)
    np.testing.assert_allclose(next_token(packed, where), -apart, atol=5e-5)
    exists = jnp.ones((B, L), bool)
    preferred = ldpo(log_likelihood(packed, where), PREFERENCE, exists)
    np.testing.assert_allclose(preferred, ldpo(jnp.asarray(apart), PREFERENCE, exists), atol=5e-5)


@pytest.mark.parametrize("name", VIEWS)
def test_targets_of_a_view_are_scored_as_after_their_part_alone(name):
    case = make(name)
    repeated = {array: np.repeat(value, L, axis=0) for array, value in case.arrays.items()}
    repeated["mask"] = repeated["mask"] & (np.arange(S) <= LAST.reshape(-1, 1))

    @jax.jit
    def run(params):
        view = case.context(params, case.arrays).at(LAST)
        packed = case.apply(params, view, case.targets, method="score").log_probs
        apart = case.apply(params, case.context(params, repeated), case.targets.reshape(B * L, 1, M), method="score")
        return packed, chain(case, params, view, case.targets), apart.log_probs.reshape(B, L, M)

    packed, steps, apart = jax.device_get(run(case.variables["params"]))
    np.testing.assert_allclose(packed, apart, atol=2e-5)
    chosen = [np.take_along_axis(p, case.targets[..., m, None], -1)[..., 0] for m, p in enumerate(steps)]
    np.testing.assert_allclose(np.stack(chosen, -1), apart, atol=2e-5)


def test_views_are_of_the_models_whose_contexts_can_be_cut():
    def shapes_of(case: Case):
        return jax.eval_shape(case.context, case.variables["params"], case.arrays)

    shapes = {name: shapes_of(make(name)) for name in {*CASES, *VIEWS}}
    assert {name for name, context in shapes.items() if hasattr(context, "at")} - set(UNCUT) == set(VIEWS)
    for name in UNCUT:
        with pytest.raises(ValueError, match=r"model\.causal"):
            shapes[name].at(LAST)


@pytest.mark.parametrize("name", CASES)
def test_export_with_a_symbolic_batch(name):
    case = make(name)

    def run(params, arrays, targets):
        context = case.context(params, arrays)
        return case.apply(params, context, targets, method="score"), chain(case, params, context, targets)

    (batch,) = jax.export.symbolic_shape("batch")
    arrays, targets = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), each)
        for each in (case.arrays, case.targets)
    )
    exported = jax.export.export(jax.jit(run), platforms=["cpu"])(case.variables["params"], arrays, targets)
    assert {leaf.shape[0] for leaf in exported.out_avals} <= {batch, 1}
    assert exported.out_avals[0].shape == (batch, L, M)


# ---- losses on models ------------------------------------------------------------------------------------------------


@functools.cache
def learnt(name: str) -> Callable:
    """(params, arrays, where) -> {loss: (values [B], gradient)}, compiled."""
    case = make(name)

    @jax.jit
    def run(params, arrays, where):
        def every(params):
            scored = case.apply(params, case.context(params, arrays), case.targets, where, method="score")
            return jnp.stack([function(scored, where) for function in LOSSES.values()])

        values, pull = jax.vjp(every, params)
        # One backward pass for all losses, which is much faster to compile than one each.
        ones = jnp.broadcast_to(jnp.eye(len(LOSSES))[:, :, None], (len(LOSSES), *values.shape))
        return values, jax.vmap(pull)(ones)[0]

    def by_name(*given) -> dict:
        values, gradients = jax.device_get(run(*given))
        return {
            loss: (values[at], jax.tree.map(lambda leaf, at=at: leaf[at], gradients)) for at, loss in enumerate(LOSSES)
        }

    return by_name


@pytest.mark.parametrize("name", CASES)
def test_losses_are_finite_and_reach_every_parameter(name):
    case = make(name)
    found = learnt(name)(case.variables["params"], case.arrays, np.ones((B, L), bool))
    for loss, (values, gradient) in found.items():
        assert (values > 0).all()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        dead = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(gradient) if not leaf.any()]
        assert all(re.search(case.others, path) for path in dead), (loss, dead)


@pytest.mark.parametrize("name", CASES)
def test_rows_without_targets_or_context_have_no_loss_and_no_nan(name):
    case, where = make(name), np.array([[False] * L, [True] * L])
    masks = set(case.masks.values())
    empty = {array: np.zeros_like(value) if array in masks else value for array, value in case.arrays.items()}
    found = learnt(name)(case.variables["params"], empty, where)
    for values, gradient in found.values():
        assert values[0] == 0
        assert values[1] > 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    nothing = learnt(name)(case.variables["params"], case.arrays, np.zeros_like(where))
    for values, gradient in nothing.values():
        assert not values.any()
        assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))
