"""Fine-tuning a text encoder: weights out and in bit for bit, what batches hold, what each term of the loss does."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_encoder import make_encoder

from jaxrec.config import UserError, from_json, to_json
from jaxrec.text.encoder import (
    PACKAGE,
    WEIGHTS_FILE,
    EncoderConfig,
    embed_texts,
    find_model,
    load_encoder,
    save_encoder,
    with_params,
)
from jaxrec.text.finetune import (
    FinetuneConfig,
    TokenInputs,
    embed,
    finetune,
    load,
    load_projection,
    losses,
    make_probe,
    measure,
    represent,
    save,
)
from jaxrec.text.pair_batches import (
    TermBatches,
    TermConfig,
    TermsConfig,
    TextPairs,
    levels,
    merge_equal_texts,
    rank_lists,
)
from jaxrec.text.weights import from_huggingface, to_huggingface
from jaxrec.training.loop import LoopConfig
from jaxrec.training.optim import OptimConfig

ALL = TermConfig(batch_size=16, min_cosine=-1.0)
COLORS, GOODS = ("red", "blue", "green", "black", "white"), ("shirt", "lamp", "cup", "shoe", "chair", "pen")
WORDS = [*COLORS, *GOODS, "cheap", "fine", "new"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Items "new red shirt"; those of one color go together, whatever they are; a query is the color alone."""
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder(folder, WORDS)
    texts = [f"{extra} {color} {thing}" for extra in ("new", "fine") for color in COLORS for thing in GOODS]
    color = np.array([COLORS.index(text.split()[1]) for text in texts])
    left, right = np.nonzero((color[:, None] == color) & (np.arange(60)[:, None] < np.arange(60)))
    text_config = EncoderConfig(model=str(folder), cache_dir=str(folder / "cache"))
    return texts + list(COLORS), color, TextPairs(left, right), text_config


def config_of(steps=40, **fields):
    terms = TermsConfig(**{name: ALL for name in ("i2i", "q2q", "q2i", "p2q", "rank", "relevance")})
    fields = {"terms": terms, "held_out": 0.2, "projection_width": 16, "projection_hidden": 16} | fields
    return FinetuneConfig(
        optim=OptimConfig(learning_rate=3e-3, warmup=5, weight_decay=0.0),
        projection_learning_rate=1e-2,
        training=LoopConfig(steps=steps, log_every=5, checkpoint_every=20),
        **fields,
    )


def test_minilm_survives_the_way_out_and_in_bit_for_bit():
    tensors = load_file(find_model(PACKAGE) / WEIGHTS_FILE)
    encoder = load_encoder()
    back = to_huggingface(encoder.params)
    assert set(tensors) - set(back) == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert all(value.dtype == np.float32 and np.array_equal(value, tensors[name]) for name, value in back.items())
    again = from_huggingface(back, encoder.config.num_hidden_layers)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, jax.tree.map(np.asarray, encoder.params)))


def test_a_saved_encoder_is_the_same_encoder(tmp_path):
    made = make_encoder(tmp_path / "a", WORDS)
    made.tokenizer.enable_truncation(4)  # which must not be saved
    named = with_params(made, made.params)
    save_encoder(named, tmp_path / "b")
    loaded = load_encoder(str(tmp_path / "b"))
    assert loaded.config == made.config
    assert loaded.fingerprint == named.fingerprint == load_encoder(str(tmp_path / "a")).fingerprint
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, made.params))
    assert len(loaded.tokenizer.encode("red blue green black white").ids) == 7
    # Another encoder in the same place is not taken for the one before.
    make_encoder(tmp_path / "b", WORDS, seed=1)
    assert load_encoder(str(tmp_path / "b")).fingerprint != named.fingerprint


def test_an_encoder_that_cannot_be_saved(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't be saved in .*file"):
        save_encoder(make_encoder(tmp_path / "a", WORDS), tmp_path / "file")


def test_a_training_batch_is_encoded_as_embedding_does(shop):
    texts, _, _, text_config = shop
    texts = [*texts[:5], " ".join(WORDS * 2)]  # one text fills the longer half's next width
    encoder = load_encoder(text_config.model)
    inputs = TokenInputs(encoder, texts, 32)(np.array([5, 0, 3, 3, 1]))
    assert [tokens.shape for tokens, _ in inputs["parts"]] == [(2, 16), (3, 32)]
    vectors = represent(encoder.config, encoder.params, inputs)
    np.testing.assert_allclose(vectors, embed_texts(texts, text_config)[[5, 0, 3, 3, 1]], atol=1e-5)


def test_batches_hold_pairs_and_their_honest_negatives():
    pairs = TextPairs(np.array([0, 0, 1, 2, 4]), np.array([1, 2, 3, 3, 5]), np.zeros(5))
    known = {(0, 1), (0, 2), (1, 3), (2, 3), (4, 5)}
    term = TermBatches("i2i", pairs, 6, 4, 4, [0])
    seen, turned = set(), False
    for number in range(12):
        rows, arrays = term(number)
        left, right = rows.reshape(2, -1)
        ends = [tuple(sorted(pair)) for pair in zip(left.tolist(), right.tolist())]
        assert len(set(ends)) == 4 and set(ends) <= known
        seen, turned = seen | set(ends), turned or (left > right).any()
        for b in range(4):
            for c in range(4):
                partners = tuple(sorted((left[b], right[c]))) in known
                same = left[b] in (right[c], left[c]) or right[b] == right[c]
                assert arrays["where"][b, c] == (not partners and not same)
        # Text 3 is an end of two of the five pairs, so it is on a side of a drawn pair with probability 2 / 10.
        shares = np.array([2, 2, 2, 2, 1, 1]) / 10
        np.testing.assert_allclose(arrays["log_q"], np.log(shares)[np.stack([left, right])], rtol=1e-5)
    assert seen == known and turned
    again = TermBatches("i2i", pairs, 6, 4, 4, [0])
    for number in (7, 2):  # any batch, in any order
        np.testing.assert_array_equal(again(number)[0], term(number)[0])


def test_directed_terms_keep_their_sides_and_shares():
    pairs = TextPairs(np.array([0, 0, 0, 1]), np.array([2, 3, 4, 4]), np.zeros(4))
    rows, arrays = TermBatches("q2i", pairs, 5, 8, 4, [0])(0)
    left, right = rows.reshape(2, -1)
    assert set(left) == {0, 1} and set(right) == {2, 3, 4}
    np.testing.assert_allclose(np.exp(arrays["log_q"][0]), np.array([0.75, 0.25])[left], rtol=1e-5)
    np.testing.assert_allclose(np.exp(arrays["log_q"][1]), np.array([0.25, 0.25, 0.5])[right - 2], rtol=1e-5)


def test_rank_lists_take_levels_in_turn():
    # Query 0: five shown, two clicked, one ordered; query 1: one of two levels.
    pairs = TextPairs(
        np.array([0] * 8 + [1] * 2), np.arange(10, 20), np.array([0, 0, 0, 0, 0, 1, 1, 2, 1, 0], np.float64)
    )
    drawn = set()
    for seed in range(20):
        queries, items, level = rank_lists(pairs, 4, np.random.default_rng(seed))
        assert queries.tolist() == [0, 1]
        assert level[0].tolist() == [2, 1, 0, 1] and level[1].tolist() == [1, 0, -1, -1]
        assert items[1].tolist() == [18, 19, -1, -1] and items[0, 0] == 17 and set(items[0, [1, 3]]) == {15, 16}
        drawn.add(int(items[0, 2]))
    assert drawn == {10, 11, 12, 13, 14}


def test_equal_texts_and_repeated_pairs_are_one():
    texts = ["b", "a", "b", "unused", "c"]
    pairs = {
        "i2i": TextPairs(np.array([0, 1, 0, 4]), np.array([1, 2, 2, 0])),  # b-a, a-b, b-b, c-b
        "rank": TextPairs(np.array([1, 1, 1]), np.array([0, 2, 4]), np.array([0, 2, 1])),  # a: b shown and ordered
    }
    distinct, merged, given = merge_equal_texts(texts, pairs)
    assert distinct == ["a", "b", "c"] and given == {"i2i": 4, "rank": 3}
    assert np.stack([merged["i2i"].left, merged["i2i"].right]).T.tolist() == [[0, 1], [1, 2]]
    rank = merged["rank"]
    assert (rank.left.tolist(), rank.right.tolist(), rank.value.tolist()) == ([0, 0], [1, 2], [2, 1])


def test_the_loss_of_every_term_by_hand():
    """Vectors in the plane, two pairs a term: what `losses` cuts from them and gives to each loss."""
    angle = np.deg2rad(np.array([0, 90, 0, 60, 0, 30, 60, 90, 20, 80, 50, 110.0]))
    vectors = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], axis=1), jnp.float32)
    cosine = lambda a, b: np.cos(np.deg2rad(a - b))  # noqa: E731
    terms = {
        "i2i": {"where": jnp.ones((2, 2), bool), "log_q": jnp.zeros((2, 2))},
        "rank": {"levels": jnp.array([[1, 0, -1]]), "where": jnp.array([[True, True, False]])},
        "relevance": {"relevance": jnp.array([1.0, 0.5])},
    }
    values = losses(vectors, terms, FinetuneConfig(temperature=0.5, margin=0.2))
    scores = np.array([[cosine(0, 0), cosine(0, 60)], [cosine(90, 0), cosine(90, 60)]]) / 0.5
    rows, columns = (np.log(np.exp(scores).sum(axis)) - np.diag(scores) for axis in (1, 0))
    np.testing.assert_allclose(values["i2i"], (rows + columns) / 2, rtol=1e-4)
    # Query at 0 degrees; the clicked item at 30, the shown one at 60, a masked one at 90.
    np.testing.assert_allclose(values["rank"], [max(0, 0.2 - cosine(0, 30) + cosine(0, 60))], atol=1e-6)
    squares = [(cosine(20, 50) - 1) ** 2, (cosine(80, 110) - 0.5) ** 2]
    np.testing.assert_allclose(values["relevance"], squares, rtol=1e-4)


def test_the_tuned_encoder_finds_held_out_pairs_and_is_read_again(shop, tmp_path):
    texts, color, pairs, text_config = shop
    tuned = finetune(texts, {"i2i": pairs}, config_of(), text_config, tmp_path / "work")
    vectors = embed(tuned, texts[:60], text_config)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)

    def right_neighbours(vectors):
        scores = vectors @ vectors.T - 9 * np.eye(60)
        return (color[np.argsort(-scores, axis=1)[:, :11]] == color[:, None]).mean()

    before = embed_texts(texts[:60], text_config)
    assert right_neighbours(vectors) > right_neighbours(before) + 0.3
    save(tuned, tmp_path / "saved")
    again = EncoderConfig(model=str(tmp_path / "saved"), cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(embed_texts(texts[:60], again), vectors)
    assert load_encoder(again.model).fingerprint == tuned.encoder.fingerprint
    assert json.loads((tmp_path / "saved" / "alignment.json").read_text()) == tuned.metrics
    # The encoder that was loaded is as it was.
    np.testing.assert_array_equal(embed_texts(texts[:60], replace(text_config, cache_dir=str(tmp_path))), before)


def test_every_term_is_logged_and_does_what_it_is_for(shop, tmp_path):
    texts, color, pairs, text_config = shop
    rng = np.random.default_rng(0)
    query = 60 + color
    ordered = np.arange(60) % 6 // 2  # shirts and lamps shown, cups and shoes clicked, chairs and pens ordered
    scored = rng.integers(0, 60, (200, 2))
    given = {
        "i2i": pairs,
        "q2q": TextPairs(np.array([60, 61]), np.array([62, 63])),
        "q2i": TextPairs(query, np.arange(60)),
        "p2q": TextPairs(query, np.arange(60)),
        "rank": TextPairs(query, np.arange(60), ordered),
        "relevance": TextPairs(*scored.T, np.where(np.diff(scored % 6)[:, 0] == 0, 0.9, 0.1)),
    }
    terms = TermsConfig(**{name: ALL for name in given} | {"q2i": replace(ALL, weight=0.0)})
    config = config_of(steps=60, held_out=0.0, terms=terms, rank_items=3)
    tuned = finetune(texts, given, config, text_config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(given) - {"q2i"} <= set(lines[0]) and "q2i" not in lines[0]
    assert lines[-1]["loss"] == pytest.approx(sum(lines[-1][name] for name in set(given) - {"q2i"}), rel=1e-4)
    for name in ("i2i", "rank", "relevance"):
        assert lines[-1][name] < 0.8 * lines[0][name], name
    vectors = embed(tuned, texts, text_config)
    scores = (vectors[query] * vectors[:60]).sum(1)
    assert scores[ordered == 2].mean() > scores[ordered == 1].mean() > scores[ordered == 0].mean()


def test_the_weights_make_the_total(shop, tmp_path):
    texts, color, pairs, text_config = shop
    given = {"i2i": pairs, "q2i": TextPairs(60 + color, np.arange(60))}
    terms = TermsConfig(i2i=replace(ALL, weight=0.25), q2i=replace(ALL, weight=3.0))
    finetune(texts, given, config_of(steps=6, terms=terms, trains="projection"), text_config, tmp_path)
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        assert line["loss"] == pytest.approx(0.25 * line["i2i"] + 3 * line["q2i"], rel=1e-5)


def test_a_projection_learns_the_same_pairs_and_leaves_the_encoder_alone(shop, tmp_path):
    texts, _, pairs, text_config = shop
    tuned = finetune(texts, {"i2i": pairs}, config_of(trains="projection"), text_config, tmp_path / "work")
    encoder = load_encoder(text_config.model)
    assert tuned.encoder is encoder
    lines = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["i2i"] < 0.8 * lines[0]["i2i"]
    save(tuned, tmp_path / "saved")
    read = tuned._replace(projection=load_projection(tmp_path / "saved"))
    np.testing.assert_array_equal(embed(read, texts, text_config), embed(tuned, texts, text_config))
    with pytest.raises(UserError, match="holds no projection"):
        load_projection(tmp_path)


def test_only_similar_pairs_are_kept(shop, tmp_path):
    texts, _, pairs, text_config = shop
    vectors = embed_texts(texts, text_config)
    cosines = (vectors[pairs.left] * vectors[pairs.right]).sum(1)
    limit = float(np.median(cosines))
    terms = TermsConfig(i2i=replace(ALL, min_cosine=limit))
    config = config_of(steps=6, terms=terms, held_out=0.0, trains="projection")
    figures = finetune(texts, {"i2i": pairs}, config, text_config, tmp_path).metrics
    assert figures["i2i_pairs"] == (cosines > limit).sum() < figures["i2i_given"] == len(cosines)


def test_figures_by_hand():
    """Vectors in the plane: what `make_probe` holds ready, and what `measure` makes of it."""
    angle = np.deg2rad(np.array([0, 90, 10, 20, 70, 80.0]))  # two queries, then four items
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    none = TextPairs(np.zeros(0, int), np.zeros(0, int), np.zeros(0))
    # Query 0 has item 2 above 3, right, and both above 4, right; query 1 has 2 above 5 and 4 above 5, both wrong.
    rank = TextPairs(np.array([0, 0, 0, 1, 1, 1]), np.array([2, 3, 4, 2, 4, 5]), np.array([2, 1, 0, 1, 1, 0.0]))
    relevance = TextPairs(np.array([0, 1]), np.array([2, 2]), np.array([1.0, 0.5]))
    # Of query 0, the items 2 and 3 are known, so that 4 comes first; of query 1 item 2 comes last of four.
    q2i = TextPairs(np.array([0, 1]), np.array([4, 2]), np.zeros(2))
    known = TextPairs(np.array([0, 0, 1]), np.array([2, 3, 3]), np.zeros(3))
    probes = {
        "rank": make_probe("rank", none, rank, 6),
        "relevance": make_probe("relevance", none, relevance, 6),
        "q2i": make_probe("q2i", known, q2i, 6),
        "q2q": make_probe("q2q", known, none, 6),
    }
    assert np.flatnonzero(probes["q2i"].candidates).tolist() == [2, 3, 4]
    errors = [(np.cos(np.deg2rad(10)) - 1) ** 2, (np.cos(np.deg2rad(80)) - 0.5) ** 2]
    figures = measure(probes, vectors, k=1)
    assert figures["rank_accuracy"] == 3 / 5
    assert figures["relevance_error"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert figures["q2i_recall@1"] == 0.5 and set(figures) == {"rank_accuracy", "relevance_error", "q2i_recall@1"}


def test_what_one_term_is_measured_on_no_term_is_trained_on(shop, tmp_path, monkeypatch):
    texts, color, pairs, text_config = shop
    given = {
        "i2i": pairs,
        "q2i": TextPairs(60 + color, np.arange(60)),
        "rank": TextPairs(60 + color, np.arange(60), np.arange(60) % 6 // 2),
        "relevance": TextPairs(60 + color, np.arange(60), np.full(60, 0.25)),
    }
    sides = {}

    def spy(name, train, held_out, texts):
        sides[name] = [set(zip(each.left.tolist(), each.right.tolist())) for each in (train, held_out)]
        return make_probe(name, train, held_out, texts)

    monkeypatch.setattr("jaxrec.text.finetune.make_probe", spy)
    config = config_of(steps=6, held_out=0.4, trains="projection")
    figures = finetune(texts, given, config, text_config, tmp_path).metrics
    train, held_out = zip(*(sides[name] for name in ("q2i", "rank", "relevance")))
    assert all(held_out) and not set.union(*train) & set.union(*held_out)
    assert 0.2 < len(sides["i2i"][1]) / figures["i2i_given"] < 0.6
    for name, (kept, measured) in sides.items():
        assert figures[f"{name}_pairs"] == len(kept) == figures[f"{name}_given"] - len(measured)
    for name in ("i2i_recall@50", "q2i_recall@50", "rank_accuracy", "relevance_error"):
        assert {f"{name}_before", f"{name}_after"} <= set(figures)
    assert figures["relevance_error_before"] != figures["relevance_error_after"]


@pytest.mark.parametrize("changed", ["texts", "pairs", "seed", "config", "max_tokens"])
def test_a_folder_of_another_training_is_refused(shop, tmp_path, changed):
    texts, _, pairs, text_config = shop
    config, seed = config_of(steps=6, trains="projection"), 0
    done = finetune(texts, {"i2i": pairs}, config, text_config, tmp_path)
    # The same one is at its end; how often it logs and saves makes no other of it.
    often = replace(config, training=replace(config.training, log_every=1, checkpoint_every=1))
    again = finetune(texts, {"i2i": pairs}, often, text_config, tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, done.projection, again.projection))
    if changed == "texts":
        texts = [text.replace("lamp", "cheap") for text in texts]
    elif changed == "pairs":
        pairs = TextPairs(pairs.left[1:], pairs.right[1:])
    elif changed == "config":
        config = replace(config, terms=replace(config.terms, i2i=replace(ALL, weight=0.5)))
    elif changed == "max_tokens":
        text_config = replace(text_config, max_tokens=4)
    else:
        seed = 1
    with pytest.raises(UserError, match=rf"the checkpoints in {tmp_path} are of an alignment with other"):
        finetune(texts, {"i2i": pairs}, config, text_config, tmp_path, seed=seed)


def test_a_folder_takes_one_kind_after_the_other(shop, tmp_path):
    texts, _, pairs, text_config = shop
    made = [
        finetune(texts, {"i2i": pairs}, config_of(steps=6, trains=kind), text_config, tmp_path / kind)
        for kind in ("projection", "encoder")
    ]
    for tuned in (*made, made[0]):
        save(tuned, tmp_path / "saved")
        found = load(tmp_path / "saved", text_config)
        assert (found.projection is None) == (tuned.projection is None)
        np.testing.assert_array_equal(embed(found, texts, text_config), embed(tuned, texts, text_config))


def test_the_same_seed_and_a_resumed_training_give_the_same_bits(shop, tmp_path):
    texts, _, pairs, text_config = shop
    config = config_of(steps=20)
    one, two = (finetune(texts, {"i2i": pairs}, config, text_config, tmp_path / name, seed=3) for name in "ab")
    # As if it had been killed after step 10: the last checkpoint has no manifest.
    half = replace(config, training=replace(config.training, checkpoint_every=10, keep=2))
    finetune(texts, {"i2i": pairs}, half, text_config, tmp_path / "c", seed=3)
    last = next((tmp_path / "c" / "checkpoints").glob("*20"))
    (last / "manifest.json").unlink()
    resumed = finetune(texts, {"i2i": pairs}, half, text_config, tmp_path / "c", seed=3)
    for other in (two, resumed):
        assert jax.tree.all(jax.tree.map(np.array_equal, one.encoder.params, other.encoder.params))
    other = finetune(texts, {"i2i": pairs}, config, text_config, tmp_path / "d", seed=4)
    assert other.encoder.fingerprint != one.encoder.fingerprint == two.encoder.fingerprint


def test_one_step_of_minilm(tmp_path):
    texts = ["red shoes", "running shoes", "green tea", "black tea"]
    config = FinetuneConfig(
        terms=TermsConfig(i2i=TermConfig(min_cosine=0.3)),
        held_out=0.0,
        optim=OptimConfig(learning_rate=1e-4, warmup=0),
        training=LoopConfig(steps=1),
    )
    pairs = {"i2i": TextPairs(np.array([0, 2]), np.array([1, 3]))}
    text_config = EncoderConfig(cache_dir=str(tmp_path / "cache"))
    tuned = finetune(texts, pairs, config, text_config, tmp_path)
    before, after = embed_texts(texts, text_config), embed(tuned, texts, text_config)

    def contrast(x):
        return (x[0] @ x[1] + x[2] @ x[3] - x[0] @ x[3] - x[2] @ x[1]) / 2

    assert contrast(after) > contrast(before)
    assert (before * after).sum(1).min() > 0.9


def test_levels_follow_any_order():
    assert levels(["click", "show", "order", "show"]).tolist() == [1, 0, 2, 0]
    assert levels(["b", "a"], order=("a", "z", "b")).tolist() == [2, 0]
    with pytest.raises(UserError, match="'cart' in row 1 is none of show, click, order"):
        levels(["click", "cart"])


def test_the_configuration_survives_json():
    config = config_of(trains="projection")
    assert from_json(FinetuneConfig, to_json(config)) == config


@pytest.mark.parametrize(
    ("pairs", "fields", "message"),
    [
        ({}, {}, "no pairs"),
        ({"i2u": TextPairs(np.array([0]), np.array([1]))}, {}, "no alignment term 'i2u'"),
        ({"i2i": TextPairs(np.array([0, 0]), np.array([1, 999]))}, {}, "i2i pairs, row 1: right is text 999"),
        ({"i2i": TextPairs(np.array([0, 0]), np.array([1]))}, {}, "2 left and 1 right"),
        ({"i2i": TextPairs(np.array([0]), np.array([0]))}, {}, "none of the 1 pairs"),
        ({"rank": TextPairs(np.array([60, 60]), np.array([1, 2]))}, {}, "rank pairs have no value"),
        ({"rank": TextPairs(np.array([60]), np.array([1]), np.array([0.5]))}, {}, "row 0: the value is 0.5"),
        ({"rank": TextPairs(np.array([60, 60]), np.array([1, 2]), np.array([1, 1]))}, {}, "two levels"),
        ({"relevance": TextPairs(np.array([60]), np.array([1]), np.array([3]))}, {}, "a relevance between -1 and 1"),
        ({"relevance": TextPairs(np.array([60]), np.array([1]), np.array([np.nan]))}, {}, "value is nan"),
        ({"i2i": TextPairs(np.array([0]), np.array([1]))}, {"temperature": 0.0}, "temperature=0.0"),
        ({"i2i": TextPairs(np.array([0]), np.array([1]))}, {"rank_items": 1}, "rank_items=1"),
        ({"i2i": TextPairs(np.array([0]), np.array([1]))}, {"held_out": 1.0}, "held_out=1.0"),
        ({"rank": TextPairs(np.full(3, 60), np.arange(3), np.arange(3))}, {"rank_items": 2}, "fewer than the 3 levels"),
    ],
)  # fmt: skip
def test_bad_input_is_named(shop, tmp_path, pairs, fields, message):
    texts, _, _, text_config = shop
    with pytest.raises(UserError, match=message):
        finetune(texts, pairs, config_of(**fields), text_config, tmp_path)
