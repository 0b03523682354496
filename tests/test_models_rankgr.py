"""RankGR's model: packed targets and the rank head against each target by itself and a plain target attention."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rankgr_parts import FEATURES, ITEMS, MODEL, SIZES, make_arrays, make_assembly, make_record, make_variables

from jaxrec.config import UserError
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.targets import SemanticIdSpace

IDS = np.array(list(itertools.product(*map(range, SIZES))), np.int32)
PRIOR = dataclasses.replace(MODEL, prior=True)
POINTER = dataclasses.replace(MODEL, pointer=True)
VARIANTS = {
    "items": MODEL,
    "codes, no likelihood": dataclasses.replace(
        MODEL, context="codes", rank=dataclasses.replace(MODEL.rank, likelihood=False)
    ),
    "no behaviors or gaps": dataclasses.replace(MODEL, behaviors=False, gaps=False),
    "prior": PRIOR,
    "pointer": POINTER,
    "pointer and prior, codes": dataclasses.replace(POINTER, context="codes", prior=True),
}
SOFTMAX = dataclasses.replace(MODEL, rank=dataclasses.replace(MODEL.rank, loss="softmax"))
COSINE = dataclasses.replace(SOFTMAX, embeddings=True, rank=dataclasses.replace(SOFTMAX.rank, temperature=0.5))
ARRAYS = make_arrays([make_record(0, 12), make_record(1, 9)], dataclasses.replace(FEATURES, buckets=(6,)))
TARGETS = jnp.asarray(np.random.default_rng(1).integers(0, SIZES, (2, 4, 3)), jnp.int32)
LAST = np.array([[5, 0, 2, 5], [3, 1, 0, 2]])
LEVEL = 2


def everything(config, params, arrays, targets, last=None):
    """Log-probabilities [B, L, M] and rank logits [B, L, M] of the true codes, given the true ones before."""
    assembly = make_assembly(config)
    apply = functools.partial(assembly.model.apply, {"params": params})
    context = apply(assembly.inputs(assembly.catalogue, arrays), method="prefill")
    memory = apply(context, method="memory")
    if last is not None:
        context = context.at(last)
    scored = apply(context, targets, method="score")
    log_probs, states = scored.log_probs, scored.states
    logits = []
    for level in range(len(SIZES)):
        prefixes = apply(states[:, :, : level + 1], method="prefixes")
        asked = prefixes, targets[..., level : level + 1], log_probs[..., level : level + 1]
        logits.append(apply(context, memory, *asked, level, method="rank")[..., 0])
    return log_probs, jnp.stack(logits, -1)


@functools.cache
def compiled(config):
    """`everything` of a configuration, compiled once a shape: op by op it takes several times as long."""
    return jax.jit(functools.partial(everything, config))


def test_a_history_that_holds_nothing_is_not_its_first_items():
    nothing = {**ARRAYS, "mask": np.zeros_like(ARRAYS["mask"])}
    params = make_variables()["params"]
    found = compiled(MODEL)(params, nothing, TARGETS)
    other = compiled(MODEL)(params, {**nothing, "item": nothing["item"] * 0 + 7}, TARGETS)
    assert np.isfinite(found[0]).all()
    jax.tree.map(np.testing.assert_array_equal, found, other)


def test_there_are_histories_of_the_places_that_are_asked_about():
    assert (ARRAYS["mask"].sum(1)[:, None] > LAST).all()


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_packed_targets_are_scored_as_each_by_itself(config):
    """Every target after the history up to its place; values and gradients."""
    params = make_variables(config)["params"]
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, *TARGETS.shape)), jnp.float32)

    def packed(params):
        found = jnp.stack(everything(config, params, ARRAYS, TARGETS, LAST))
        # Likelihoods in the head are constants to its loss.
        return (found * weights).sum(), found

    # Each target with a history of its own, whose end is masked.
    own = {name: np.repeat(array, 4, axis=0) for name, array in ARRAYS.items()}
    own["mask"] = own["mask"] & (np.arange(6) <= LAST.reshape(-1, 1))

    def apart(params):
        found = jnp.stack(everything(config, params, own, TARGETS.reshape(8, 1, 3))).reshape(2, 2, 4, 3)
        return (found * weights).sum(), found

    (_, found), gradient = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(apart, has_aux=True))(params)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5, rtol=1e-4), gradient, expected_gradient)


def test_the_rank_head_is_target_attention_over_all_states_and_an_mlp():
    """RankGR Eq. 13-15 written out, with `match`: one candidate, one query, all states as its memory."""
    assembly, params = make_assembly(), make_variables()["params"]
    apply = functools.partial(assembly.model.apply, {"params": params})
    context = apply(assembly.inputs(assembly.catalogue, ARRAYS), method="prefill")
    scored = apply(context, TARGETS, method="score")
    log_probs, states = scored.log_probs, scored.states
    found = apply(
        context,
        apply(context, method="memory"),
        apply(states, method="prefixes"),
        TARGETS[..., LEVEL:],
        log_probs[..., LEVEL:],
        LEVEL,
        method="rank",
    )
    head, embed = params["rank_head"], params["backbone"]["embed"]["table"]

    def norm(x, part):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * part["scale"]

    for b, k in itertools.product(range(2), range(4)):
        code = TARGETS[b, k, LEVEL]
        x = np.asarray(embed[sum(SIZES[:LEVEL]) + code])
        # The last state is also what predicts the first code, and there once.
        history = context.own.states[b][: int(ARRAYS["mask"][b].sum()) - 1]
        memory = norm(np.concatenate([history, states[b, k]]), head["states_norm"])
        part, out = head["attention"], []
        query = np.einsum("D,DNH->NH", norm(x, part["norm"]), part["query"]["weight"])
        key, value = (np.einsum("TD,DNH->TNH", memory, part[name]["weight"]) for name in ("key", "value"))
        for n in range(query.shape[0]):
            weights = np.exp(key[:, n] @ query[n] / np.sqrt(query.shape[1]))
            out.append(weights / weights.sum() @ value[:, n])
        x = x + np.concatenate(out) @ part["out"]["weight"]
        hidden = jax.nn.gelu(norm(x, head["norm"]) @ head["feed_forward"]["up"]["weight"])
        x = x + hidden @ head["feed_forward"]["down"]["weight"]
        wanted = norm(x, head["found_norm"]) @ head["by_found"]["weight"]
        wanted += memory[-1] @ head["by_state"]["weight"]
        expected = x @ head["out"]["weight"][:, 0] + head["out"]["bias"][0] + head["share"] * log_probs[b, k, LEVEL]
        expected += wanted @ norm(np.asarray(embed[sum(SIZES[:LEVEL]) + code]), head["query_norm"])
        np.testing.assert_allclose(found[b, k, 0], expected, atol=1e-4)


def test_a_pointer_mixes_the_historys_items_with_what_the_decoder_generates():
    """Over whole IDs: (1 - g) of the decoder's probability and g of the weights of the items that have the ID."""
    assembly, variables = make_assembly(POINTER), make_variables(POINTER)
    params = {name: value for name, value in variables["params"].items() if name != "pointer"}
    plain, _ = compiled(MODEL)(params, ARRAYS, np.stack([IDS] * 2))
    mixed, _ = compiled(POINTER)(variables["params"], ARRAYS, np.stack([IDS] * 2))
    np.testing.assert_allclose(np.exp(mixed.sum(-1)).sum(-1), 1, rtol=1e-4)
    head, sigmoid = variables["params"]["pointer"], lambda x: 1 / (1 + np.exp(-x))
    context = assembly.context(assembly.serve(variables), ARRAYS)
    for b in range(2):
        length, state = int(ARRAYS["mask"][b].sum()), np.asarray(context.own.state[b, 0])
        share = 0.999 * sigmoid(state @ head["share"]["weight"][:, 0] + head["share"]["bias"][0])
        query, weights = state @ head["query"]["weight"], []
        for place in range(length):
            match = query @ (np.asarray(context.own.states[b, place]) @ head["key"]["weight"]) / 12**0.5
            weights.append(np.exp(match - head["decay"] * np.log(length - place)))
        weights = np.array(weights) / sum(weights)
        codes = assembly.space.codes[ARRAYS["item"][b, :length]]
        for number, code in enumerate(IDS):
            copied = weights[(codes == code).all(1)].sum()
            expected = (1 - share) * np.exp(plain[b, number].sum()) + share * copied
            np.testing.assert_allclose(np.exp(mixed[b, number].sum()), expected, rtol=1e-3)


def test_without_a_history_a_pointer_adds_nothing():
    nothing = {**ARRAYS, "mask": np.zeros_like(ARRAYS["mask"])}
    params = make_variables(POINTER)["params"]
    plain = {name: value for name, value in params.items() if name != "pointer"}
    np.testing.assert_allclose(
        compiled(POINTER)(params, nothing, TARGETS)[0], compiled(MODEL)(plain, nothing, TARGETS)[0], atol=1e-5
    )


def test_a_prior_is_the_popularity_of_ids_among_those_that_begin_alike():
    """With a decoder that says nothing, log-probabilities are those of the counts, one more for every item."""
    assembly, params = make_assembly(PRIOR), make_variables(PRIOR)["params"]
    silent = {**params, "backbone": {**params["backbone"], "norm": {"scale": jnp.zeros(12)}}}
    codes, counts = assembly.space.codes, assembly.counts + 1
    found, _ = compiled(PRIOR)(silent, ARRAYS, jnp.broadcast_to(codes, (2, ITEMS, 3)))
    for item, code in enumerate(codes):
        begun = np.cumprod(codes == code, axis=1)
        shares = [
            counts @ begun[:, level] / (counts @ begun[:, level - 1] if level else counts.sum()) for level in range(3)
        ]
        np.testing.assert_allclose(found[:, item], np.log([shares, shares]), atol=1e-3)
    # A code that no item has is unlikely, not impossible.
    free = next(code for code in IDS if not (codes == code).all(1).any())
    log_prob = compiled(PRIOR)(silent, ARRAYS, jnp.broadcast_to(jnp.asarray(free), (2, 1, 3)))[0].sum(-1)
    assert (log_prob < -8).all() and np.isfinite(log_prob).all()


def test_a_prior_of_levels_that_are_not_normalised_by_themselves_is_refused():
    with pytest.raises(UserError, match=r"'model\.prior'.*model\.backbone\.restrict"):
        dataclasses.replace(PRIOR, backbone=dataclasses.replace(PRIOR.backbone, restrict=False))


# ---- in the beam -----------------------------------------------------------------------------------------------------

RECORDS = [make_record(seed, events) for seed, events in enumerate([12, 3, 9, 0, 14, 1])]


def recommend(config, k=ITEMS, **decoding):
    wide = {"beam_widths": (len(IDS),) * 3, "candidates": (len(IDS),) * 3, "batch_size": 4} | decoding
    model = GenerativeRecommender(make_assembly(config), make_variables(config), FEATURES, DecodingConfig(**wide))
    return model.recommend(RECORDS, k)


def first_items(space: SemanticIdSpace) -> list[int]:
    return [int(space.items(tuple(code))[0]) for code in space.ids]


@pytest.mark.parametrize(("config", "weight"), [(MODEL, 0.0), (PRIOR, 0.5), (POINTER, 0.5)])
def test_the_beam_ranks_by_the_product_of_the_rank_heads_scores(config, weight):
    """RankGR Eq. 18, and the likelihood if it has a weight, against all IDs scored one by one."""
    items, scores = recommend(config, likelihood_weight=weight)
    space = make_assembly().space
    run = jax.jit(lambda params, arrays, ids: everything(config, params, arrays, ids))
    for row, record in enumerate(RECORDS):
        if not len(record["item"]):
            continue
        features = dataclasses.replace(FEATURES, buckets=(FEATURES.bucket_of(record, 10**6),))
        log_probs, logits = run(make_variables(config)["params"], make_arrays([record], features), space.ids[None])
        total = (jax.nn.log_sigmoid(logits) + weight * log_probs).sum(-1)[0]
        expected = {tuple(code): float(value) for code, value in zip(space.ids.tolist(), total)}
        found = [tuple(space.codes[item].tolist()) for item in items[row]]
        np.testing.assert_allclose(scores[row], [expected[code] for code in found], atol=1e-4)
        assert list(dict.fromkeys(found)) == sorted(expected, key=lambda code: -expected[code])


@pytest.mark.parametrize("config", [SOFTMAX, COSINE], ids=["products", "cosines and embeddings"])
def test_items_are_scored_by_themselves_at_the_end_of_the_beam(config):
    """And by their likelihood, if it has a weight."""
    items, scores = recommend(config, likelihood_weight=0.5)
    assembly, variables = make_assembly(config), make_variables(config)
    first = first_items(assembly.space)
    for row in (0, 2, 4):
        features = dataclasses.replace(FEATURES, buckets=(FEATURES.bucket_of(RECORDS[row], 10**6),))
        served = assembly.serve(variables)
        context = assembly.context(served, make_arrays([RECORDS[row]], features))
        factors = (
            assembly.model.apply(variables, context.own.state[:, 0], method="item_query"),
            assembly.model.apply(variables, served.table, method="item_vectors"),
        )
        log_probs = assembly.model.apply(variables, context, assembly.space.ids[None], method="score").log_probs
        expected = np.asarray(factors[1] @ factors[0][0])[first] + 0.5 * np.asarray(log_probs)[0].sum(-1)
        order = np.argsort(-expected, kind="stable")
        np.testing.assert_allclose(np.unique(scores[row]), np.unique(expected), atol=1e-4)
        assert items[row, 0] == first[order[0]]


def test_item_vectors_are_sums_and_cosines_are_divided_by_the_temperature():
    assembly, params = make_assembly(COSINE), make_variables(COSINE)["params"]
    table = np.asarray(assembly.serve({"params": params}).table)
    codes = sum(
        np.asarray(params["backbone"]["embed"]["table"])[assembly.space.codes[:, level] + offset]
        for level, (offset, _) in enumerate(assembly.model.config.backbone.levels)
    )
    known = assembly.embeddings * 6**0.5 @ np.asarray(params["known"]["weight"])
    np.testing.assert_allclose(table, params["item"]["table"] + codes + known, atol=1e-5)
    state = np.random.default_rng(0).normal(size=(1, 12)).astype(np.float32)
    query = assembly.model.apply({"params": params}, state, method="item_query")
    vectors = assembly.model.apply({"params": params}, table, method="item_vectors")
    plain = state @ np.asarray(params["query"]["weight"])
    cosines = (table @ plain[0]) / np.linalg.norm(table, axis=1) / np.linalg.norm(plain)
    np.testing.assert_allclose(query @ vectors.T, cosines[None] / 0.5, atol=1e-5)


def test_narrow_beams_and_widths_that_small_catalogues_do_not_have():
    items, _ = recommend(MODEL, k=3, beam_widths=(2, 5, 1400), candidates=(1400, 1400, 1400))
    assert (items >= 0).all()
    assert len(set(items[0].tolist())) == 3


def test_empty_histories_get_finite_scores():
    _, scores = recommend(MODEL, k=5)
    assert np.isfinite(scores).all()
