"""Every target space keeps the Protocol: its methods, the shapes and types of answers, arrays as arguments."""

import dataclasses
import functools
import inspect

import jax
import numpy as np
import pytest
from compilations import constant_shapes
from jax.tree_util import Partial
from onemall_parts import FEATURES as ITEM_FEATURES
from onemall_parts import ITEMS, MODEL, make_assembly, make_variables
from onemall_parts import make_history as item_history
from text_parts import make_history, make_space, make_text_model

from jaxrec.config import UserError
from jaxrec.semantic_ids.table.space import SemanticIds
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.targets import Found, SemanticIdSpace, TargetSpace

TEXTS = ["".join(letters) for letters in ("a", "b", "ab", "ba", "bb", "aa", "aab", "abb")]


def items_model() -> GenerativeRecommender:
    assembly = make_assembly(dataclasses.replace(MODEL, layers=1, queries=0))
    return GenerativeRecommender(assembly, make_variables(assembly), ITEM_FEATURES, DecodingConfig(8, batch_size=2))


def texts_model(listed: bool) -> GenerativeRecommender:
    return make_text_model(make_space(TEXTS if listed else (), max_length=4), beam_width=8)


MODELS = {
    "items": (items_model, [item_history(seed, 6) for seed in range(3)], [[3, 1], [5]]),
    "listed": (lambda: texts_model(True), [make_history([item]) for item in range(3)], [["A", "bab"], ["bb"]]),
    "free": (lambda: texts_model(False), [make_history([item]) for item in range(3)], [["A", "bab"], ["bb"]]),
}


@pytest.fixture(scope="module", params=list(MODELS))
def case(request):
    make, histories, truths = MODELS[request.param]
    return make(), histories, truths


def test_it_has_every_member_with_the_same_arguments(case):
    space = case[0].space
    members = [name for name in vars(TargetSpace) if not name.startswith("_") or name == "__len__"]
    assert {"search", "expand", "read", "show", "truths", "tokens", "held", "outputs", "save", "__len__"} <= set(
        members
    )
    for name in [*members, *(name for name in TargetSpace.__annotations__)]:
        assert hasattr(space, name), name
        declared = getattr(TargetSpace, name, None)
        if inspect.isfunction(declared):
            given = inspect.signature(getattr(type(space), name)).parameters
            asked = inspect.signature(declared).parameters
            more = [given[each] for each in list(given)[len(asked) :]]
            assert list(given)[: len(asked)] == list(asked), name
            assert all(each.default is not each.empty for each in more), name


def test_answers_are_numbers_with_falling_scores(case):
    model, histories, _ = case
    k = 30
    answers, scores = model.recommend(histories, k)
    assert (answers.dtype, scores.dtype, answers.shape, scores.shape) == (np.int32, np.float32, (3, k), (3, k))
    assert ((answers >= 0) == (scores > -np.inf)).all() and (answers >= 0).any(1).all()
    for row, score in zip(answers, scores, strict=True):
        found = row[row >= 0]
        assert len(set(found.tolist())) == len(found), "each answer once"
        assert (np.diff(score[: len(found)]) <= 0).all() and (row[len(found) :] == -1).all()
        shown = model.space.show(found, [f"Title {item}" for item in range(ITEMS)])
        assert len(shown) == len(found) and all(isinstance(text, str) and text for text in shown)
        if len(model.space):
            assert found.max() < len(model.space)


def test_truths_and_tokens_have_the_stated_shapes(case):
    model, _, given = case
    truths, where = model.space.truths([*given, []])
    assert truths.dtype == np.int32 and where.dtype == bool and truths.shape == where.shape == (3, 2)
    assert where.tolist() == [[True, True], [True, False], [False, False]]
    assert (truths[~where] == -1).all() and truths[0, 0] != truths[0, 1]
    tokens, mask = model.space.tokens(np.maximum(truths, 0))
    assert tokens.dtype == np.int32 and mask.dtype == bool and tokens.shape == mask.shape
    assert tokens.shape[:2] == truths.shape and tokens.shape[2] == (model.space.levels or 4)
    again, _ = model.space.truths([[*row, *row] for row in given])
    assert again.tolist() == truths[:2].tolist(), "each truth once, and by the same number"


def test_the_whole_search_is_a_function_of_arrays(case):
    """Nothing that grows with the list of answers is a constant of the compiled function."""
    model, histories, _ = case
    ((_, arrays), *_) = model.batches(histories[:1], (1,))
    search = Partial(functools.partial(model.retrieve, allowed=None, width=4, k=3))
    found = jax.eval_shape(search, model.served, arrays)
    assert isinstance(found, Found) and found.scores.shape == found.answers.shape and found.nan.shape == (1,)
    assert all(np.prod(shape) < len(TEXTS) for shape in constant_shapes(search, model.served, arrays))


def test_an_export_says_what_its_outputs_are(case, tmp_path):
    model, histories, _ = case
    ((_, arrays), *_) = model.batches(histories[:1], (1,))
    outputs = jax.eval_shape(lambda: model.space.outputs(model.retrieve(model.served, arrays, None, 4, 3)))
    assert set(outputs) <= set(model.space.meanings)
    item_ids = [str(item) for item in range(ITEMS)]
    described = model.space.describe(item_ids)
    assert len(described["fingerprint"]) == 16 and described["items"] == ITEMS
    assert described["fingerprint"] != model.space.describe(item_ids[::-1])["fingerprint"]
    if model.space.kind == "items":
        model.space.save(tmp_path)
        assert not list(tmp_path.iterdir())


def test_a_space_of_items_is_its_table_of_ids():
    table = SemanticIds(np.array([[0, 1], [1, 0], [0, 1]], np.int32), (2, 2), np.array([1, 2, 3]))
    space = SemanticIdSpace.of(table)
    assert space.item_codes == (table.codes, table.codebook_sizes) and len(space) == 3
    trie = space.build_trie()
    assert np.asarray(trie.items)[:3].tolist() == [2, 0, 1], "items of an ID stand in falling popularity"
    assert space.tokens(np.array([[1], [2]]))[0].tolist() == [[[1, 0]], [[0, 1]]]
    history = {"item": np.array([4, 5, 4]), "behavior": np.array([1, 0, 1])}
    assert space.held(history, np.array([False, True])).tolist() == [4, 4]
    with pytest.raises(UserError, match="2 item ids for 3 items"):
        space.describe(["a", "b"])


def test_candidates_are_never_fewer_than_beams(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "jaxrec.targets.semantic_ids.beam_search", lambda *_, **options: asked.append(options["candidates"])
    )
    space = SemanticIdSpace(np.zeros((1, 2), np.int32), (2, 2))
    options = {"batch": 1, "k": 1, "candidates": (3, 9)}
    space.search(None, space.build_trie(), width=5, rescore=lambda *_: None, **options)
    space.search(None, space.build_trie(), width=(2, 9), rescore=lambda *_: None, **options)
    space.search(None, space.build_trie(), width=5, **options)
    assert asked == [(5, 9), (3, 9), None]
