"""OneSearch's rewards and preferences (Eq. 6-12) against values computed by hand; what is no reward is refused."""

import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mall_onesearch import config as CONFIG

from jaxrec.config import UserError, fingerprint, from_json, to_json
from jaxrec.data.behavior_levels import CLICKED, EXPOSED, OTHER, PURCHASED, UNSHOWN, BehaviorLevels
from jaxrec.data.ranking_features import LabelConfig, Labels
from jaxrec.losses.preference import HybridConfig
from jaxrec.losses.rewards import places_gained
from jaxrec.run import Run
from jaxrec.systems.onesearch.config import CO_OCCURRENCE, CONTENT, PERSONALISATION, OneSearchConfig
from jaxrec.systems.onesearch.preference import packed_pairs, pair_rewards, preference_loss, referring_loss, same_id
from jaxrec.systems.onesearch.reordered import preferred_of
from jaxrec.systems.onesearch.reward_config import (
    INTERACTIONS,
    REORDERED,
    REWARD_MODEL,
    InteractionsConfig,
    RscoreWeights,
    SearchRewardsConfig,
)
from jaxrec.systems.onesearch.reward_model import SearchReward, rewarded_order
from jaxrec.systems.onesearch.stages import stages
from jaxrec.systems.ranking.config import RankingStageConfig

REWARDS = CONFIG.rewards

# ---- loss ------------------------------------------------------------------------------------------------------------


def model_of_scores():
    """A model whose parameters are the log-likelihoods of the targets, in one code."""

    def apply(variables, *_, method, rngs):
        return SimpleNamespace(log_probs=variables["params"][..., None]) if method == "score" else None

    return SimpleNamespace(model=SimpleNamespace(apply=apply), inputs=lambda *_: None)


def config_with(loss: HybridConfig, **changes) -> OneSearchConfig:
    return replace(CONFIG, rewards=replace(REWARDS, loss=loss, **changes))


def batch_of(*searches) -> dict:
    stacked = {name: jnp.stack([each[name] for each in searches]) for name in searches[0]}
    return stacked | {"where": jnp.ones(len(searches), bool)}


def search(level, score=None, counts=None, chosen=1, size=4):
    items, counts = np.arange(len(level)), np.zeros((len(level), 3)) if counts is None else np.array(counts)
    return packed_pairs(items, items < chosen, np.array(level), counts, size, score)


CATALOGUE = SimpleNamespace(codes=jnp.zeros((9, 1), jnp.int32))


def loss_of(config, params, batch):
    found, (metrics, _) = preference_loss(model_of_scores(), config, CATALOGUE, params, {}, batch, jax.random.key(0))
    return found, metrics


def test_rewards_of_a_search_by_hand():
    """Eq. 6-8: without counts CTR is 1/3, CVR 1 and their harmonic mean 1/2; 990 exposures, 90 clicks: 1/3 and 1/2."""
    batch = batch_of(
        search([PURCHASED, EXPOSED, OTHER]),
        search([CLICKED, UNSHOWN], counts=[[990, 90, 0], [0, 0, 0]]),
        search([UNSHOWN, UNSHOWN], score=np.array([9.5, -2.0])),
    )
    expected = [[1.0, 0.25, 0, 0], [0.4, 0.1, 0, 0], [9.5, -2, 0, 0]]
    np.testing.assert_allclose(pair_rewards(batch, REWARDS.levels.base), expected, rtol=1e-6)
    assert batch["target"].tolist()[1] == [0, 1, -1, -1] and batch["chosen"].tolist()[1] == [True, False, False, False]


def test_the_loss_and_its_gradient_by_hand():
    """Eq. 9 and 11-12: rewards 1, 1/4 and 0, so that rw is 4/3 and 1; beta .5, delta .2, alpha .1."""
    config = config_with(HybridConfig(beta=0.5, margin=0.2, likelihood=0.1))
    policy, reference = jnp.array([[-2.0, -1.0, -3.0, 7.0]]), jnp.array([[-2.5, -1.2, -2.0, 8.0]])
    batch = batch_of(search([PURCHASED, EXPOSED, OTHER])) | {"reference": reference}
    # Implicit rewards .25, .1, -.5: the first pair is .05 short of the margin, the second keeps it.
    z = [4 / 3 * (0.1 - 0.25 + 0.2), 0.0]
    total = math.log(math.exp(z[0]) + math.exp(z[1]))
    value, gradient = jax.value_and_grad(lambda params: loss_of(config, params, batch)[0])(policy)
    np.testing.assert_allclose(value, math.log(1 + math.exp(total)) + 0.1 * 2.0, rtol=1e-6)
    slope = 1 / (1 + math.exp(-total)) * math.exp(z[0] - total) * 4 / 3 * 0.5
    np.testing.assert_allclose(gradient, [[-slope - 0.1, slope, 0, 0]], rtol=1e-5, atol=1e-7)
    metrics = loss_of(config, policy, batch)[1]
    assert [float(each) for each in metrics["pairs_ordered"]] == [2, 2]
    assert [float(each) for each in metrics["pairs_left_out"]] == [0, 2]


def test_it_trains_from_the_reference_on_and_as_printed_it_does_not():
    scores = jnp.array([[-2.0, -1.0, -3.0, 0.0]])
    batch = batch_of(search([CLICKED, EXPOSED, OTHER]))
    for form, trains in (("margin", True), ("lead", False)):
        config = config_with(HybridConfig(likelihood=0.0, form=form))
        frozen = {PERSONALISATION: {"params": scores}}

        def total(params, config=config, frozen=frozen):
            arguments = (frozen, params, {}, batch, jax.random.key(0))
            return referring_loss(model_of_scores(), config, CATALOGUE, *arguments)[0]

        gradient = jax.grad(total)(scores)
        assert bool((gradient[0, 0] < 0) & (gradient[0, 1] > 0)) == trains and bool(gradient.any()) == trains


def test_the_weight_is_bounded_and_rewards_without_an_order_are_counted():
    """Scores 1, .999, 1, and no number; and a search whose rewards are all the same, which has no loss."""
    scores = jnp.array([[-2.0, -1.0, -3.0, -1.0], [-1.0, -1.0, 0.0, 0.0]])
    batch = batch_of(
        search([UNSHOWN] * 4, score=np.array([1.0, 0.999, 1.0, np.nan])),
        search([UNSHOWN] * 2, score=np.array([1.0, 1.0])),
    ) | {"reference": scores}
    config = config_with(HybridConfig(likelihood=0.0, largest_weight=5.0))
    value, metrics = loss_of(config, scores, batch)
    np.testing.assert_allclose(value, math.log(1 + math.exp(5.0)), rtol=1e-6)  # rw 5, margin 1
    assert [float(each) for each in metrics["pairs_left_out"]] == [3, 4]
    equal, _ = loss_of(replace(config, rewards=replace(config.rewards, weighted=False)), scores, batch)
    np.testing.assert_allclose(equal, math.log(1 + math.e), rtol=1e-6)
    gradient = jax.grad(lambda params: loss_of(config, params, batch)[0])(scores)
    assert np.isfinite(gradient).all() and not gradient[1].any() and not gradient[0, 2:].any()


# ---- reward ----------------------------------------------------------------------------------------------------------


def test_the_reward_of_items_by_hand():
    """Eq. 10: .1 + .2 + .02 + 10 times a relevance of 1, 1/2 and 0; without relevance; a query without a vector."""
    embeddings = jnp.array([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    probabilities = {name: jnp.full((2, 3), value) for name, value in (("ctr", 0.1), ("cvr", 0.2), ("ctcvr", 0.02))}
    ranker = SimpleNamespace(rewards=lambda *_: dict(probabilities))
    state = {"params": None, "items": SimpleNamespace(embeddings=embeddings)}
    arrays, items = {"query_vector": jnp.array([[3.0, 0.0], [0.0, 0.0]])}, jnp.array([[0, 1, 2], [0, 1, -1]])
    found = SearchReward(ranker, RscoreWeights(), state).scores(state, arrays, items)
    np.testing.assert_allclose(found, [[10.32, 5.32, 0.32], [5.32] * 3], rtol=1e-6)
    weights = RscoreWeights(ctr=2.0, cvr=0.0, relevance=0.0)
    np.testing.assert_allclose(SearchReward(ranker, weights, state).scores(state, arrays, items), 0.22, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_answers_without_a_reward_keep_their_places(seed):
    """In the order of the rewards, equal ones as they were; `places_gained` counts the same."""
    rng = np.random.default_rng(seed)
    reward, where = rng.integers(0, 4, (5, 9)).astype(np.float32), rng.random((5, 9)) < 0.8
    reward[rng.random((5, 9)) < 0.2] = np.nan
    order = rewarded_order(reward, where)
    known = where & np.isfinite(reward)
    for row, mine, there in zip(order, reward, known, strict=True):
        assert sorted(row.tolist()) == list(range(9)) and (row[~there] == np.flatnonzero(~there)).all()
        assert (np.diff(mine[row[there]]) <= 0).all()
    gained = np.arange(9) - np.argsort(order, axis=1)
    among = [np.searchsorted(np.flatnonzero(there), np.argsort(row)[there]) for row, there in zip(order, known)]
    expected = places_gained(jnp.asarray(reward), where=jnp.asarray(where))
    for row, (there, places) in enumerate(zip(known, among)):
        np.testing.assert_array_equal(np.arange(there.sum()) - places, expected[row][there])
    assert rewarded_order(-np.arange(9.0), np.ones(9, bool)).tolist() == list(range(9)) and not gained.sum()


# ---- phase one -------------------------------------------------------------------------------------------------------

ITEMS = np.array([0, 1, 2, 3, 4, 5], np.int32)
RECORD = {
    "item": np.array([6, 3], np.int32), "behavior": np.array([0, 0], np.int8),
    "timestamp": np.array([5, 5]), "search": np.array([0, 0]), "search_timestamp": np.array([5, 9]),
}  # fmt: skip


def log_of(behavior=0, codes=None):
    """Two searches: the first showed items 6 and 3, and met them with a behavior; all items but 5 have category 1."""
    labels = Labels.of(LabelConfig(), ("exposure", "click", "purchase"))
    levels = BehaviorLevels(labels, np.array([1, 1, 1, 1, 1, 2, 1], np.int32), 0)
    space = SimpleNamespace(codes=np.arange(7)[:, None] if codes is None else np.array(codes)[:, None])
    record = RECORD | {"behavior": np.array([0, behavior], np.int8)}
    return SimpleNamespace(levels=levels, assembly=SimpleNamespace(space=space)), record


def preferred(scores, behavior=0, codes=None, rejected=9, answers=ITEMS, place=0):
    log, record = log_of(behavior, codes)
    found = preferred_of(log, record, place, answers, np.array(scores, np.float32), rejected)
    return found and (found.items.tolist(), found.level.tolist(), None if found.score is None else found.score.tolist())


def test_what_gains_most_places_is_chosen_and_what_loses_places_rejected():
    """The order becomes 4 0 1 2 3 5: item 4 gains four places, items 0 to 3 lose one, item 5 is behind."""
    scores = [5.0, 4.0, 3.0, 2.0, 6.0, 1.0]
    levels = [UNSHOWN, UNSHOWN, UNSHOWN, UNSHOWN, EXPOSED, OTHER]
    assert preferred(scores) == ([4, 0, 1, 2, 3, 5], levels, [6, 5, 4, 3, 2, 1])
    assert preferred(scores, rejected=2) == ([4, 0, 1], levels[:3], [6, 5, 4])
    assert preferred([6, 5, 4, 3, 2, 1]) is None  # nothing changes
    assert preferred([np.nan] * 6) is None
    # Without a score item 4 keeps its place; of the others 5 gains most.
    assert preferred([5, 4, 3, 2, np.nan, 6])[0] == [5, 0, 1, 2, 3, 4]
    # A search that met nothing tells no category.
    assert preferred(scores, place=1)[1] == [OTHER] * 6


def test_what_was_clicked_is_chosen_wherever_it_stands_and_compared_by_its_level():
    """Item 3 was clicked; the order becomes 4 0 1 2 3 5: it is behind all but item 5, and items 0 to 2 lose a place."""
    scores = [5.0, 4.0, 3.0, 2.0, 6.0, 1.0]
    items, level, score = preferred(scores, behavior=1)
    assert items == [3, 0, 1, 2, 5] and level == [CLICKED, *[UNSHOWN] * 3, OTHER] and score is None
    assert preferred(scores, behavior=2)[1][0] == PURCHASED


def test_items_of_the_chosen_id_are_not_rejected_and_missing_answers_are_none():
    scores = [5.0, 4.0, 3.0, 2.0, 6.0, 1.0]
    assert preferred(scores, codes=[9, 1, 2, 3, 9, 5, 6])[0] == [4, 1, 2, 3, 5]
    assert same_id(np.array([[0], [1], [0]]), np.array([0, 1, 2]), np.array([2])).tolist() == [True, False, True]
    some = np.array([0, 1, 2, -1, -1, -1], np.int32)
    assert preferred([1.0, 3.0, 2.0, 9.0, 9.0, 9.0], answers=some) == ([1, 0, 2], [UNSHOWN] * 3, [3, 1, 2])
    assert preferred([1.0, 2.0, 0, 0, 0, 0], answers=np.array([0, 1, *[-1] * 4]), codes=[7] * 7) is None


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_a_configuration_survives_json():
    assert from_json(OneSearchConfig, to_json(CONFIG)) == CONFIG
    # One that was written before there were rewards.
    values = to_json(replace(CONFIG, rewards=None))
    assert from_json(OneSearchConfig, {name: values[name] for name in set(values) - {"rewards", "reorder"}}) == replace(
        CONFIG, rewards=None
    )


def settings_of(path, config) -> dict[str, str]:
    """The fingerprint of each stage's settings, by its name."""
    return {stage.name: fingerprint(stage.settings) for stage in stages(Run(path), config)}


def test_the_supervised_stages_are_those_of_a_run_without_rewards(tmp_path):
    """So that a run that is trained can go on; what no run had before is in no fingerprint of theirs."""
    plain = replace(CONFIG, rewards=None)
    with_rewards, without = settings_of(tmp_path, CONFIG), settings_of(tmp_path, plain)
    assert list(without) == [CONTENT, CO_OCCURRENCE, PERSONALISATION]
    assert list(with_rewards) == [*without, REWARD_MODEL, REORDERED, INTERACTIONS]
    assert {name: with_rewards[name] for name in without} == without
    assert not any({"rewards", "reorder"} & set(stage.settings) for stage in stages(Run(tmp_path), plain))
    assert "reorder" not in plain.evaluation_inputs() and replace(CONFIG, reorder=9).evaluation_inputs()["reorder"] == 9
    assert settings_of(tmp_path, replace(CONFIG, reorder=9)) == with_rewards


def test_each_phase_begins_with_the_one_before_and_reads_the_supervised_stage(tmp_path):
    def order(rewards):
        found = stages(Run(tmp_path), replace(CONFIG, rewards=rewards))[3:]
        return [(stage.name, stage.start, stage.frozen, stage.needs) for stage in found]

    first = (REWARD_MODEL, "", (), ())
    reordered = (REORDERED, PERSONALISATION, (PERSONALISATION, REWARD_MODEL), ())
    assert order(REWARDS) == [first, reordered, (INTERACTIONS, REORDERED, (PERSONALISATION,), ())]
    assert order(replace(REWARDS, interactions=None)) == [first, reordered]
    alone = (INTERACTIONS, PERSONALISATION, (PERSONALISATION,), (REWARD_MODEL,))
    assert order(replace(REWARDS, reordered=None)) == [first, alone]
    # A later phase changes no earlier one.
    longer = replace(REWARDS, interactions=replace(REWARDS.interactions, chosen=1))
    one, other = (settings_of(tmp_path, replace(CONFIG, rewards=each)) for each in (REWARDS, longer))
    assert [name for name in one if one[name] != other[name]] == [INTERACTIONS]


def test_what_contradicts_itself_is_refused():
    with pytest.raises(UserError, match=r"'rewards\.model\.contexts' is 'sessions'; give searches"):
        SearchRewardsConfig(model=RankingStageConfig())
    with pytest.raises(UserError, match=r"'rewards\.reordered' and 'rewards\.interactions' are both None"):
        SearchRewardsConfig(reordered=None, interactions=None)
    with pytest.raises(UserError, match=r"'rewards\.interactions\.exposed'.* all 0: there is nothing to reject"):
        InteractionsConfig(exposed=0, unshown=0, other=0)
    with pytest.raises(UserError, match=r"'rewards\.weights' gives every term of the reward the weight 0"):
        RscoreWeights(0, 0, 0, 0)
    with pytest.raises(UserError, match=r"'rewards\.weights\.ctr' is nan"):
        RscoreWeights(ctr=math.nan)
    with pytest.raises(UserError, match=r"'reorder' is 9, but there is no reward model .*give 'rewards'"):
        replace(CONFIG, rewards=None, reorder=9).check()
    with pytest.raises(UserError, match=r"'reorder' is 0"):
        replace(CONFIG, reorder=0)
    one = replace(REWARDS.model, towers=("ctcvr",), training=replace(REWARDS.model.training, monitor="auc_ctcvr"))
    with pytest.raises(UserError, match=r"'rewards\.model\.towers' is \('ctcvr',\), but .* weight for ctr; add"):
        replace(CONFIG, rewards=replace(REWARDS, model=one)).check()
    replace(CONFIG, rewards=replace(REWARDS, model=one, weights=RscoreWeights(ctr=0, cvr=0))).check()
    late = replace(REWARDS.reordered, optim=replace(REWARDS.reordered.optim, warmup=16))
    with pytest.raises(UserError, match=r"'rewards\.reordered\.optim\.warmup' is 16, as long"):
        replace(CONFIG, rewards=replace(REWARDS, reordered=late)).check()
    unknown = replace(REWARDS.model, labels=LabelConfig(click="glance"))
    with pytest.raises(UserError, match=r"'rewards\.model\.towers' has ctr, and the log has no behavior 'glance'"):
        replace(CONFIG, rewards=replace(REWARDS, model=unknown)).check()
