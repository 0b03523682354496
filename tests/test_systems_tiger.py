"""TIGER: a training step against a plain computation, and a tiny run: killed, resumed, measured, served, exported."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compilations import constant_shapes
from exported import check_same_answers

from jaxrec.config import UserError, load_config
from jaxrec.data.examples import Records
from jaxrec.data.item_sequences import ItemSequenceConfig, following, whole
from jaxrec.evaluation import make_cases
from jaxrec.files import read_json
from jaxrec.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxrec.models.prior import popularity_prior
from jaxrec.models.vocabulary import ContextTokens
from jaxrec.run import TRAINING, Run
from jaxrec.serving.retriever import Retriever
from jaxrec.serving.schema import Request
from jaxrec.systems import load_recommender, train
from jaxrec.systems.generative import bound_loss
from jaxrec.systems.tiger.config import TigerObjective
from jaxrec.systems.tiger.model import TigerAssembly, fit_vocabulary, own_tokens
from jaxrec.systems.tiger.training import losses, mean_loss
from jaxrec.targets import SemanticIdSpace
from jaxrec.training import checkpoint
from jaxrec.training.step import make_state, make_step

ROOT = Path(__file__).parent.parent
CONFIG = load_config(ROOT / "tests" / "mall_tiger.py")
SIZES, ITEMS, USERS = (4, 3, 2), 12, 5
TINY = EncoderDecoderConfig(width=8, heads=2, head_dim=4, hidden=8, encoder_layers=1, layers=1, causal=True)
CODES = np.random.default_rng(0).integers(0, SIZES, (ITEMS, 3)).astype(np.int32)
FEATURES = ItemSequenceConfig((4,))
RECORDS = [
    {
        "item": np.array(items, np.int32),
        "behavior": np.zeros(len(items), np.int8),
        "session": np.array(sessions, np.int32),
        "user": user,
    }
    for user, items, sessions in ((3, [1, 5, 2, 9, 11], [0, 1, 1, 2, 3]), (8, [4, 7, 0], [0, 1, 2]))
]
WANTED = np.array([True])


COUNTS = np.random.default_rng(1).integers(0, 9, ITEMS)


def make_assembly(causal: bool, positions: str = "codes", prior: bool = False, own: bool = False) -> TigerAssembly:
    others = USERS + (ITEMS if own else 0)
    model = EncoderDecoder(fit_vocabulary(dataclasses.replace(TINY, causal=causal), SIZES, others))
    popularity = popularity_prior(CODES, COUNTS, SIZES) if prior else None
    reading = USERS, positions, own, popularity
    return TigerAssembly(model, SemanticIdSpace(CODES, SIZES), ("purchase",), WANTED, *reading)


def make_config(assembly: TigerAssembly, **objective):
    made = dataclasses.replace(CONFIG, model=assembly.model.config, features=FEATURES, users=USERS)
    return dataclasses.replace(made, objective=TigerObjective(**objective))


def stacked(examples: list[dict]) -> dict:
    batch = {name: jnp.asarray(np.stack([example[name] for example in examples])) for name in examples[0]}
    return batch | {"where": jnp.ones(len(examples), bool)}


def plain_loss(assembly, params, history: list[int], user: int, target: int, smoothing: float) -> jax.Array:
    """-log p of an item's codes after a history, one code after the other, without padding."""
    cfg = assembly.model.config
    offsets = np.array([offset for offset, _ in cfg.levels])
    hashed = (user * 2654435761 % 2**32) >> 8
    user = cfg.vocabulary - USERS + hashed % USERS
    if assembly.positions == "items":
        tokens = CODES[history] + offsets
        if assembly.own_tokens:
            own = cfg.vocabulary - USERS - ITEMS + np.array(history)
            tokens = np.concatenate([tokens, own[:, None]], axis=1)
        tokens = np.concatenate([[[user] + [-1] * (tokens.shape[1] - 1)], tokens])
    else:
        tokens = np.concatenate([[user], (CODES[history] + offsets).ravel()])
    variables = {"params": params}
    inputs = ContextTokens(jnp.asarray(tokens[None], jnp.int32), jnp.ones((1, len(tokens)), bool), assembly.prior)
    context = assembly.model.apply(variables, inputs, method="prefill")
    total, cache = 0.0, None
    for level, code in enumerate(CODES[target]):
        before = None if level == 0 else jnp.full((1, 1), CODES[target][level - 1], jnp.int32)
        log_probs, cache = assembly.model.apply(variables, context, before, cache, level, method="extend")
        total -= (1 - smoothing) * log_probs[0, 0, code] + smoothing * log_probs[0, 0].mean()
    return total


@pytest.mark.parametrize(
    ("causal", "positions", "prior", "own", "first"),
    [
        # The records from the second on: few plain computations, each of which is compiled.
        (True, "codes", False, False, 1),
        (True, "items", True, True, 0),
        (False, "codes", True, False, 0),
        (False, "items", False, False, 1),
    ],
)
def test_a_step_equals_a_plain_computation(causal, positions, prior, own, first):
    records = RECORDS[first:]
    assembly = make_assembly(causal, positions, prior, own)
    config = make_config(assembly, smoothing=0.2, targets=2, later_weight=0.25)
    if causal:
        batch = stacked([whole(record, len(record["item"]), FEATURES, wanted=WANTED) for record in records])
        asked = [(RECORDS[0], 1, 5, 1.0), (RECORDS[0], 1, 2, 1.0), (RECORDS[0], 3, 9, 1.0), (RECORDS[0], 4, 11, 1.0)]
        asked += [(RECORDS[1], 1, 7, 1.0), (RECORDS[1], 2, 0, 1.0)]
    else:
        cuts = [FEATURES.cut(record, 2, behaviors=1, wanted=WANTED) for record in records]
        batch = stacked(
            [cut | following(record, 2, 2, wanted=WANTED) for cut, record in zip(cuts, records, strict=True)]
        )
        asked = [(RECORDS[0], 3, 9, 1.0), (RECORDS[0], 3, 11, 0.25), (RECORDS[1], 2, 0, 1.0)]

    asked = [each for each in asked if any(each[0] is record for record in records)]

    def plain(params):
        each = [
            weight * plain_loss(assembly, params, record["item"][:seen].tolist(), record["user"], target, 0.2)
            for record, seen, target, weight in asked
        ]
        return sum(each) / sum(weight for *_, weight in asked)

    optimizer = optax.sgd(0.1)
    state = make_state(assembly.init(0), optimizer)
    loss, gradients = jax.jit(jax.value_and_grad(plain))(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)
    step = make_step(bound_loss(mean_loss, assembly, config), optimizer, config.seed)
    # Nothing of the catalogue is a constant of the program.
    assert not [shape for shape in constant_shapes(step, state, batch) if len(CODES) in shape]
    after, metrics = jax.jit(step)(state, batch)
    total, count = metrics["loss"]
    assert count == sum(weight for *_, weight in asked)
    np.testing.assert_allclose(total / count, loss, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_padding_and_unknown_users_change_nothing():
    assembly = make_assembly(causal=True)
    config, variables = make_config(assembly), assembly.init(0)
    record = {**RECORDS[1], "user": -1}
    short = stacked([whole(record, 3, ItemSequenceConfig((2,)), wanted=WANTED)])
    long = stacked([whole(record, 3, FEATURES, wanted=WANTED)])
    found = [
        losses(assembly, config, assembly.catalogue, variables, batch, jax.random.key(0)) for batch in (short, long)
    ]
    np.testing.assert_allclose(*found, rtol=1e-5)
    np.testing.assert_array_equal(assembly.tokens(jnp.asarray(CODES), long)[1][0], [False, *6 * [True], *6 * [False]])


@pytest.mark.parametrize("causal", [True, False])
def test_a_prior_is_what_a_decoder_that_says_nothing_answers(causal):
    """Counts of the items, one more for each, among those that begin alike."""
    assembly, counts = make_assembly(causal, prior=True), COUNTS + 1
    params = assembly.init(0)["params"]
    silent = {**params, "decoder_norm": jax.tree.map(jnp.zeros_like, params["decoder_norm"])}
    for item in (0, 5, 9):
        begun = np.cumprod(CODES[item] == CODES, axis=1)
        shares = [counts.sum(), *(counts @ begun)]
        expected = -np.log(np.divide(shares[1:], shares[:-1])).sum()
        found = plain_loss(assembly, silent, [1, 2], 3, item, 0.0)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_an_item_that_came_later_has_no_token_of_its_own():
    assembly = make_assembly(causal=True, positions="items", own=True)
    codes = jnp.asarray(np.concatenate([CODES, CODES[:1]]))
    arrays = {"item": jnp.array([[0, ITEMS]]), "mask": jnp.ones((1, 2), bool), "user": jnp.array([3])}
    tokens, _ = assembly.tokens(codes, arrays)
    np.testing.assert_array_equal(tokens[0, 1, :3], tokens[0, 2, :3])
    assert tokens[0, :, 3].tolist() == [-1, assembly.model.config.vocabulary - USERS - ITEMS, -1]


@pytest.mark.parametrize("width", [5, 11])
def test_tokens_of_their_own_begin_as_far_apart_as_what_ids_were_made_of(width):
    """A rotation of the embeddings, as large as the sum of the codes; all other tokens as without."""
    assembly = make_assembly(causal=True, positions="items", own=True)
    config = assembly.model.config
    embeddings = np.random.default_rng(2).normal(size=(ITEMS, width)).astype(np.float32)
    own = own_tokens(embeddings, config, 3)
    kept = min(width, TINY.width)
    np.testing.assert_allclose(np.square(own).sum(), ITEMS * kept * 3 * config.embed_scale**2, rtol=1e-5)
    if width == kept:
        apart, expected = (np.square(x[:, None] - x).sum(-1) for x in (own, embeddings))
        np.testing.assert_allclose(apart, expected * apart.sum() / expected.sum(), atol=1e-3)
    table = assembly.init(0)["params"]["embed"]["table"]
    begun = dataclasses.replace(assembly, embeddings=own).init(0)["params"]["embed"]["table"]
    first = config.vocabulary - USERS - ITEMS
    expected = np.array(table)
    expected[first : first + ITEMS, :kept] = own
    np.testing.assert_array_equal(begun, expected)


def test_a_token_of_its_own_where_positions_are_codes_is_refused():
    with pytest.raises(UserError, match=r"'own_tokens'.*positions"):
        dataclasses.replace(CONFIG, own_tokens=True, positions="codes")


def test_a_prior_of_levels_that_are_not_normalised_by_themselves_is_refused():
    with pytest.raises(UserError, match=r"'prior'.*model\.restrict"):
        dataclasses.replace(CONFIG, prior=True, model=dataclasses.replace(TINY, restrict=False))


def test_an_items_position_is_the_sum_of_its_codes():
    assembly = make_assembly(causal=False, positions="items")
    params = assembly.init(0)["params"]
    arrays = FEATURES.cut(RECORDS[1], 2, behaviors=1, wanted=WANTED)
    tokens, mask = assembly.tokens(jnp.asarray(CODES), {name: value[None] for name, value in arrays.items()})
    assert tokens.shape == (1, 5, 3)
    np.testing.assert_array_equal(mask[0], [True, True, True, False, False])
    np.testing.assert_array_equal(tokens[0, 1], CODES[4] + [offset for offset, _ in assembly.model.config.levels])
    np.testing.assert_array_equal(assembly.before(jnp.array([0, 2])), [1, 3])
    # One token more in the vocabulary, whose embedding is the sum of an item's, stands for the item as well.
    table = params["embed"]["table"]
    whole = jnp.concatenate([table, table[tokens[0, 1]].sum(0)[None], table[tokens[0, 2]].sum(0)[None]])
    given = {"params": {**params, "embed": {"table": whole}}}
    wider = EncoderDecoder(dataclasses.replace(assembly.model.config, vocabulary=len(whole)))
    flat = jnp.array([[tokens[0, 0, 0], len(table), len(table) + 1]])
    expected = wider.apply(given, ContextTokens(flat, jnp.ones((1, 3), bool)), method="prefill").state
    found = assembly.model.apply({"params": params}, ContextTokens(tokens, mask), method="prefill").state
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Two runs of one configuration: one without a stop, one killed at step 70 and run again."""
    folder = tmp_path_factory.mktemp("tiger")
    train(Run.open(folder / "whole", CONFIG), CONFIG)
    shutil.copytree(folder / "whole", folder / "killed", ignore=shutil.ignore_patterns("stages", "eval*", "*.jsonl"))
    killed = subprocess.run(
        [sys.executable, "train.py", "tests/mall_tiger.py", "--run", str(folder / "killed")],
        cwd=ROOT,
        env=os.environ | {"JAXREC_KILL_AT": "step:70"},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    train(Run.open(folder / "killed", CONFIG), CONFIG)
    return folder / "whole", folder / "killed"


def test_killed_and_resumed_it_ends_in_the_same_bits(runs):
    whole_run, killed = (checkpoint.load_parts(run / "stages" / TRAINING, "params", "opt_state") for run in runs)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole_run, killed))
    assert (runs[0] / "evaluation.json").read_bytes() == (runs[1] / "evaluation.json").read_bytes()


def test_it_beats_popularity(runs):
    rows = read_json(runs[0] / "evaluation.json")
    recall = {row["model"]: row["value"] for row in rows if row["metric"] == "recall@10" and row["subset"] == "all"}
    assert recall["tiger"] > 1.4 * recall["popularity"]


def test_items_under_one_id_are_told_apart_and_all_found(runs):
    recommender = load_recommender(Run(runs[0]))
    space, assembly = recommender.space, recommender.assembly
    assert space.levels == 3  # two of the RQ-VAE and one that numbers
    assert len(np.unique(space.codes, axis=0)) == len(space.codes)
    assert len(np.unique(space.codes[:, :2], axis=0)) < len(space.codes)
    cases = make_cases(Records(assembly.examples, "test"), assembly.target_behaviors).take(range(4))
    items, scores = recommender.recommend(cases.histories, len(space.codes))
    assert all(sorted(row) == list(range(len(space.codes))) for row in items.tolist())
    np.testing.assert_allclose(np.exp(scores).sum(1) <= 1 + 1e-4, True)


def test_it_is_served_and_gets_new_items(runs):
    """A new item under the ID of one that goes takes its place."""
    retriever = Retriever(runs[0])
    user = pq.read_table(runs[0] / "tables" / "users.parquet")["user_id"][0].as_py()
    (answer,) = retriever.answer([Request(user_id=user, k=5)])
    assert answer.source == "model"
    live, best = retriever.catalogue, answer.items[0].item_id
    code = live.current.codes[live.current.row(best)]
    live.remove([best])
    live.add(pa.table({"item_id": ["new"], "title": ["New"]}), code[None])
    (again,) = retriever.answer([Request(user_id=user, k=5)])
    assert again.items[0].item_id == "new"
    # As a set: what was compiled for another number of items may order near ties anew.
    assert {item.item_id for item in again.items[1:]} == {item.item_id for item in answer.items[1:]}


def test_an_export_answers_the_same(runs, tmp_path):
    run = Run(runs[0])
    events = {"item": np.array([3, 9], np.int32), "behavior": np.array([4, 4], np.int8)}
    events |= {"timestamp": np.array([5, 6], np.int64), "session": np.array([0, 1], np.int32)}
    check_same_answers(load_recommender(run), run, tmp_path / "out", events)
