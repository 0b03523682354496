"""The living catalogue: versions on disk, items that come, leave and change, drift, and the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxrec.config import UserError, load_config
from jaxrec.run import Run
from jaxrec.semantic_ids import Codebooks, SemanticIds, commands, read_codes, write_codes
from jaxrec.semantic_ids.quantizers import codebooks
from jaxrec.semantic_ids.quantizers.residual import Residual
from jaxrec.semantic_ids.table.changes import append, reencode, remove
from jaxrec.semantic_ids.table.collisions import CollisionConfig, resolve
from jaxrec.semantic_ids.table.drift import drift
from jaxrec.semantic_ids.table.version_files import IdChanges, _stack, list_versions, locked, read_version
from jaxrec.semantic_ids.table.versions import begin, publish, roll_back
from jaxrec.systems import phases, train
from jaxrec.text.scenarios import TowersConfig

LEVELS = ([[0.0], [100.0]], [[0.0], [10.0], [20.0]])
"""IDs on a line: <a,b> stands for 100 a + 10 b."""
KEEP, NEAREST, EXTRA = CollisionConfig(), CollisionConfig("nearest_free"), CollisionConfig("extra_level", extra_size=3)


def line(*values):
    return np.array(values, np.float32)[:, None]


def make_folder(folder, x, config=KEEP, levels=LEVELS, embeddings=True):
    """A semantic_ids folder as the tokenize phase leaves it, for items a, b, c, ..."""
    folder.mkdir()
    books = Codebooks(Residual(tuple(jnp.asarray(level, jnp.float32) for level in levels), (None,) * len(levels)), None)
    codebooks.save(books, folder / "codebooks.safetensors")
    resolved = resolve(codebooks.encode(books, x), books.sizes, config, x, books)
    ids = [chr(ord("a") + row) for row in range(len(x))]
    write_codes(folder / "codes.parquet", ids, SemanticIds(resolved.codes, resolved.sizes))
    (folder / "quality.json").write_text(json.dumps({"collisions": resolved.changed}))
    if embeddings:
        save_file({"embeddings": x}, folder / "embeddings.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path):
    """Items a <0,0>, b <0,1>, c <1,0>, d <1,0>; squared errors 0, 1, 0, 4."""
    return make_folder(tmp_path / "ids", line(0, 11, 100, 102))


def codes_of(folder, version=None):
    table = read_version(folder, version)
    return dict(zip(table.item_ids.to_pylist(), map(tuple, table.codes.tolist())))


def test_the_first_version_is_what_tokenize_made(folder):
    table = begin(folder)
    assert codes_of(folder) == {"a": (0, 0), "b": (0, 1), "c": (1, 0), "d": (1, 0)}
    assert table.record["figures"] == {
        "items": 4,
        "inactive": 0,
        "distinct_ids": 3,
        "utilization": [1.0, 0.5],
        "independent_coding_rate": pytest.approx(2 / 3),
        "conflict_rate": 0.5,
        "largest_bucket": 2,
        "error": pytest.approx(1.25),
    }
    assert begin(folder).version == 1 and [r["version"] for r in list_versions(folder)] == [1]


def test_new_items_get_ids_and_the_others_keep_theirs(folder):
    made = append(folder, ["x", "y"], line(21, 113))
    assert (made["version"], made["added"], made["known"], made["returned"]) == (2, 2, 0, 0)
    before = codes_of(folder, 1)
    assert codes_of(folder) == before | {"x": (0, 2), "y": (1, 1)}
    record = list_versions(folder)[-1]
    assert (record["parent"], record["action"], record["current"]) == (1, "append", True)
    assert record["figures"]["error"] == pytest.approx((1 + 9) / 2)
    assert record["time"].endswith("+00:00")


def test_an_append_can_be_run_again(folder):
    append(folder, ["x"], line(21))
    again = append(folder, ["x", "a"], line(150, 150))
    assert again["version"] == 2 and (again["added"], again["known"]) == (0, 2)
    assert codes_of(folder)["x"] == (0, 2) and len(list_versions(folder)) == 2


def test_of_an_item_the_last_row_counts_at_the_place_of_its_first():
    rng = np.random.default_rng(0)
    parts, expected, first = [], {}, 0
    for size in (7, 0, 30, 11):
        ids = [f"i{n}" for n in rng.permutation(40)[:size]]
        codes = np.arange(first, first + size, dtype=np.int32)[:, None]
        first += size
        parts.append(IdChanges(pa.array(ids, pa.string()), codes, codes, codes[:, 0] % 2 == 0))
        for item, code in zip(ids, codes[:, 0].tolist()):
            expected[item] = code
    table = _stack(parts, {"codebook_sizes": [100]})
    assert dict(zip(table.item_ids.to_pylist(), table.codes[:, 0].tolist())) == expected
    assert table.item_ids.to_pylist() == list(expected)
    np.testing.assert_array_equal(table.active, table.codes[:, 0] % 2 == 0)
    assert table.rows(["i3", "no", "i5"]).tolist() == [list(expected).index("i3"), -1, list(expected).index("i5")]


def test_an_item_that_left_comes_back_with_its_id(folder):
    append(folder, ["x"], line(21))
    assert remove(folder, ["x", "b"]) == {"version": 3, "removed": 2, "known": 0}
    assert remove(folder, ["x"]) == {"version": 3, "removed": 0, "known": 1}
    table = read_version(folder)
    assert table.active_ids.to_pylist() == ["a", "c", "d"] and table.record["figures"]["inactive"] == 2
    with pytest.raises(UserError, match="no active item_id 'b'"):
        table.space(["a", "b"])
    back = append(folder, ["b", "y"], line(150, 113))  # Its embedding has changed; its ID has not.
    assert (back["version"], back["added"], back["returned"], back["known"]) == (4, 1, 1, 0)
    assert read_version(folder).active_ids.to_pylist() == ["a", "b", "c", "d", "y"]
    assert codes_of(folder)["b"] == (0, 1)
    assert list_versions(folder)[-1]["figures"]["error"] == pytest.approx(9)  # That of y alone.


def test_the_last_item_cannot_leave(folder):
    with pytest.raises(UserError, match="no item would be left"):
        remove(folder, list("abcd"))
    assert read_version(folder).version == 1


def test_roll_back_and_go_on(folder):
    append(folder, ["x"], line(21))
    append(folder, ["y"], line(113))
    assert roll_back(folder, 2)["version"] == 2
    assert "y" not in codes_of(folder) and "y" in codes_of(folder, 3)
    assert append(folder, ["z"], line(113))["version"] == 4
    assert [(r["version"], r["parent"], r["current"]) for r in list_versions(folder)] == [
        (1, None, False), (2, 1, False), (3, 2, False), (4, 2, True),
    ]  # fmt: skip
    assert list(codes_of(folder)) == ["a", "b", "c", "d", "x", "z"]
    assert [row["version"] for row in drift(folder)] == [1, 2, 4]
    with pytest.raises(UserError, match="no version 9: there are 1, 2, 3, 4"):
        roll_back(folder, 9)


def test_published_codes_are_those_that_the_run_reads(folder):
    before = (folder / "codes.parquet").read_bytes()
    append(folder, ["x"], line(21))
    remove(folder, ["a"])
    assert (folder / "codes.parquet").read_bytes() == before
    publish(folder)
    space = read_codes(folder / "codes.parquet", list("xdcb"))
    np.testing.assert_array_equal(space.codes, [[0, 2], [1, 0], [1, 0], [0, 1]])
    assert space.codebook_sizes == (2, 3)
    publish(folder, 1)
    assert (folder / "codes.parquet").read_bytes() == before


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-20, 140, width=32), min_size=1, max_size=12), st.data())
@pytest.mark.parametrize(
    "config", [KEEP, NEAREST, CollisionConfig("extra_level", extra_size=20)], ids=lambda c: c.policy
)
def test_appending_in_any_parts_keeps_earlier_ids(tmp_path_factory, config, values, data):
    folder = make_folder(tmp_path_factory.mktemp("any") / "ids", line(0, 11, 100, 102), config)
    names = [f"new{row}" for row in range(len(values))]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(values)))) | {len(values)})
    known, start = codes_of_begun(folder), 0
    for end in cuts:
        append(folder, names[start:end], line(*values[start:end]))
        now = codes_of(folder)
        assert now.items() >= known.items() and len(now) == 4 + end
        known, start = now, end
    assert [len(codes_of(folder, version)) for version in range(2, 2 + len(cuts))] == [4 + end for end in cuts]
    if config.policy == "extra_level":
        assert len(set(known.values())) == len(known)
    if config.policy == "keep":
        whole = codebooks.encode(codebooks.load(folder / "codebooks.safetensors"), line(*values))
        assert [known[name] for name in names] == [tuple(code) for code in whole.tolist()]
    # Read again from the disk, each row of the last version is where the first version put it.
    assert list(known)[:4] == list("abcd")


def codes_of_begun(folder):
    begin(folder)
    return codes_of(folder)


def test_nearest_free_keeps_clear_of_those_that_left(tmp_path):
    folder = make_folder(tmp_path / "ids", line(0, 1, 100), NEAREST)
    assert codes_of_begun(folder) == {"a": (0, 0), "b": (0, 1), "c": (1, 0)}
    remove(folder, ["a"])
    made = append(folder, ["x", "y"], line(2, 103), np.array([1, 2]))
    assert codes_of(folder)["x"] == (0, 2) and codes_of(folder)["y"] == (1, 1)
    assert made["collisions"]["moved"] == 2
    # The error of drift is that of the codebooks, not of the move.
    assert list_versions(folder)[-1]["figures"]["error"] == pytest.approx((4 + 9) / 2)
    full = append(folder, ["z"], line(3))["collisions"]
    assert full["without_room"] == 1 and codes_of(folder)["z"] == (0, 0)


def test_the_popular_new_item_stays(tmp_path):
    folder = make_folder(tmp_path / "ids", line(100), NEAREST)
    append(folder, ["x", "y"], line(0, 0), np.array([1, 2]))
    assert codes_of(folder) == {"a": (1, 0), "x": (0, 1), "y": (0, 0)}
    with pytest.raises(UserError, match=r"popularity of shape \(3,\)"):
        append(folder, ["z"], line(0), np.zeros(3))


def test_an_extra_level_counts_on_until_it_is_full(tmp_path):
    folder = make_folder(tmp_path / "ids", line(0, 1, 100), EXTRA)
    assert codes_of_begun(folder) == {"a": (0, 0, 0), "b": (0, 0, 1), "c": (1, 0, 0)}
    append(folder, ["x"], line(2))
    assert codes_of(folder)["x"] == (0, 0, 2)
    with pytest.raises(UserError, match="extra_size=3 is too small: the ID <0,0> needs 4"):
        append(folder, ["y"], line(0))
    assert read_version(folder).version == 2 and read_version(folder).space().codebook_sizes == (2, 3, 3)


def test_live_streams_are_encoded_anew(folder):
    # b stays in its cell, c moves at the second level, d at both.
    made = reencode(folder, ["d", "b", "c"], line(21, 9, 112))
    assert codes_of(folder) == {"a": (0, 0), "b": (0, 1), "c": (1, 1), "d": (0, 2)}
    assert (made["version"], made["encoded"], made["changed"]) == (2, 3, 2)
    assert made["changed_share"] == pytest.approx(2 / 3)
    assert made["changed_codes"] == pytest.approx([1 / 3, 2 / 3])
    assert made["changed_codes_mean"] == pytest.approx(1 / 2)
    assert list_versions(folder)[-1]["figures"]["error"] == pytest.approx((1 + 1 + 4) / 3)
    again = reencode(folder, ["d", "b"], line(21, 11))
    assert again["version"] == 2 and again["changed"] == 0


@pytest.mark.parametrize(("config", "kept"), [(NEAREST, (0, 1)), (EXTRA, (0, 0, 1))])
def test_what_stays_in_its_cell_keeps_its_whole_id(tmp_path, config, kept):
    # b shares a's cell and was moved, or numbered; it stays so even when a goes elsewhere.
    folder = make_folder(tmp_path / "ids", line(0, 1, 100), config)
    assert codes_of_begun(folder)["b"] == kept
    reencode(folder, ["a", "b"], line(21, 2))
    assert codes_of(folder)["b"] == kept and codes_of(folder)["a"][:2] == (0, 2)
    # The place that a gave up is free for the next.
    append(folder, ["x"], line(0))
    assert codes_of(folder)["x"] == (0, 0, 0)[: len(kept)]


def test_drift_tells_when_codebooks_are_outdated(folder):
    append(folder, ["x"], line(21))
    append(folder, ["y"], line(116))
    remove(folder, ["y"])
    first, near, far, left = drift(folder)
    assert (first["error_ratio"], near["error_ratio"], left["error_ratio"]) == (1.0, pytest.approx(0.8), None)
    assert (first["hint"], near["hint"], left["hint"]) == ("", "", "")
    assert far["error_ratio"] == pytest.approx(16 / 1.25)
    assert "version 3 have 12.80 times the squared error of the first ones" in far["hint"]
    assert (first["error_rise"], near["error_rise"], far["error_rise"]) == (None, 1.0, pytest.approx(16))
    assert [row["items"] for row in (first, near, far, left)] == [4, 5, 6, 5]
    assert [row["cur_total"] for row in (first, near, far, left)] == pytest.approx([3 / 6, 4 / 6, 5 / 6, 4 / 6])
    assert far["icr"] == pytest.approx(4 / 5) and far["conflict_rate"] == pytest.approx(2 / 6)
    assert far["cur"] == pytest.approx([1, 5 / 6]) and far["largest_bucket"] == 2
    assert json.loads(json.dumps([first, far])) == [first, far]


def test_without_embeddings_a_rise_is_told_from_the_first_append_on(tmp_path):
    folder = make_folder(tmp_path / "ids", line(0, 11), embeddings=False)
    for item, value in (("x", 22), ("y", 112.5), ("z", 103)):  # Squared errors 4, 6.25 and 9.
        append(folder, [item], line(value))
    assert [row["error_rise"] for row in drift(folder)] == [None, 1, pytest.approx(6.25 / 4), pytest.approx(9 / 4)]


def test_what_is_refused_leaves_a_fresh_folder_as_it_was(folder):
    for call in (
        lambda: append(folder, ["x"], line(np.nan)),
        lambda: append(folder, ["x"], line(0), np.array([np.nan])),
        lambda: append(folder, ["x"], line(0), np.zeros(2)),
        lambda: reencode(folder, ["a", "a"], line(0, 0)),
        lambda: reencode(folder, ["a"], np.zeros((1, 2))),
    ):
        with pytest.raises(UserError):
            call()
        assert list_versions(folder) == []


def test_a_folder_without_codebooks_is_left_alone(tmp_path):
    for call in (lambda: begin(tmp_path), lambda: append(tmp_path, ["x"], line(0)), lambda: publish(tmp_path)):
        with pytest.raises(UserError, match=r"holds no codebooks\.safetensors: give the semantic_ids folder"):
            call()
    assert not list(tmp_path.iterdir())


def test_known_items_are_not_sorted_into_the_catalogue_again(folder, monkeypatch):
    begin(folder)
    remove(folder, ["b"])
    monkeypatch.setattr("jaxrec.semantic_ids.table.changes.resolve", lambda *_: pytest.fail("IDs were resolved"))
    assert append(folder, ["a"], line(0)) == {"version": 2, "added": 0, "returned": 0, "known": 1}
    assert append(folder, ["b", "a"], line(0, 0)) == {"version": 3, "added": 0, "returned": 1, "known": 1}
    assert codes_of(folder)["b"] == (0, 1)


def test_without_embeddings_the_first_errors_are_those_of_the_first_append(tmp_path):
    folder = make_folder(tmp_path / "ids", line(0, 11), embeddings=False)
    append(folder, ["x"], line(21))
    append(folder, ["y"], line(112))
    assert [row["error_ratio"] for row in drift(folder)] == [None, 1.0, pytest.approx(4)]


def test_a_rise_after_the_first_append_counts_too(tmp_path):
    folder = make_folder(tmp_path / "ids", line(3, 13, 103))
    append(folder, ["x"], line(23))
    append(folder, ["y"], line(113.5))  # 3.5^2 is 1.36 times 3^2, less than 1.5 times, more than 1.25.
    hints = [row["hint"] for row in drift(folder)]
    assert hints[:2] == ["", ""] and "1.36 times the squared error of the first that came later" in hints[2]


class ExamplesWanted(Exception):
    """The run has its IDs."""


def test_a_run_does_not_replace_ids_that_have_later_versions(tmp_path, monkeypatch):
    def stop(*_):
        raise ExamplesWanted

    monkeypatch.setattr(phases, "prepare", lambda *_: None)
    monkeypatch.setattr(phases, "_encoder", lambda *_: ("encoder",))  # There are no tables to ask.
    monkeypatch.setattr(phases, "tokenize", lambda *_, **__: None)
    monkeypatch.setattr(phases, "write_examples", stop)
    run, config = Run(tmp_path), load_config("tests/mall.py")
    made = tmp_path / "semantic_ids" / "versions"

    def begin(seed):
        with pytest.raises(ExamplesWanted):
            train(run, replace(config, seed=seed))

    begin(0)
    (made / "000001").mkdir(parents=True)
    begin(1)  # The first version alone is what the phase makes anyway.
    assert not made.exists()
    (made / "000001").mkdir(parents=True)
    (made / "000002").mkdir()
    begin(1)
    with pytest.raises(UserError, match="in its versions, which new IDs would replace: give another --run"):
        train(run, replace(config, seed=2))
    assert (made / "000002").exists()


@pytest.mark.parametrize("trained", [True, False])
def test_items_that_are_appended_while_the_new_ids_are_made_are_not_replaced(tmp_path, monkeypatch, trained):
    def make_ids(_, folder, *__, **___):
        make_folder(folder / "made", line(0, 11))
        for file in (folder / "made").iterdir():
            file.rename(folder / file.name)

    def write_examples(*_):
        if not trained:
            raise ExamplesWanted

    monkeypatch.setattr(phases, "prepare", lambda *_: None)
    monkeypatch.setattr(phases, "_encoder", lambda *_: ("encoder",))  # There are no tables to ask.
    monkeypatch.setattr(phases, "tokenize", make_ids)
    monkeypatch.setattr(phases, "write_examples", write_examples)
    config, folder = load_config("tests/mall.py"), tmp_path / "semantic_ids"

    def train(seed, during=lambda: None):
        run = Run.open(tmp_path, replace(config, seed=seed), replace=True)
        if trained:
            ids, _ = phases.prepare_with_ids(run, replace(config, seed=seed))
            run.stage("stages/train", ids, lambda _: during())
            return
        monkeypatch.setattr(phases, "tokenize", lambda *args, **rest: (make_ids(*args, **rest), during()))
        with pytest.raises(ExamplesWanted):
            phases.prepare_with_ids(run, replace(config, seed=seed))

    train(0)
    with locked(folder), pytest.raises(UserError, match="another process is changing"):
        train(2)
    kept = "what is to take its place is kept in .*/next" if trained else "away$"
    with pytest.raises(UserError, match=rf"in its versions, which new IDs would replace.*{kept}"):
        train(1, during=lambda: append(folder, ["x"], line(21)))
    assert codes_of(folder)["x"] == (0, 2)
    folder.rename(tmp_path / "moved")
    train(1)
    assert not list(folder.glob("versions/0*")) and codes_of(tmp_path / "moved")["x"] == (0, 2)


def test_scenarios_count_only_where_they_are_chosen(tmp_path, monkeypatch):
    def stop(_, parts):
        raise ExamplesWanted(*parts)

    monkeypatch.setattr(Run, "phase", lambda *_: "tables")
    monkeypatch.setattr(phases, "fingerprint", lambda *parts: parts)
    monkeypatch.setattr(phases, "_encoder", lambda *_: ("encoder",))  # There are no tables to ask.
    monkeypatch.setattr(phases, "check_replaceable", stop)
    config = load_config("tests/mall.py")
    for scenarios, counted in ((None, []), (TowersConfig(), [TowersConfig()])):
        with pytest.raises(ExamplesWanted) as found:
            train(Run(tmp_path), replace(config, scenarios=scenarios))
        # Without them the inputs are those of runs from before there were any.
        *_, align, ids, collisions, seed = (part for part in found.value.args if part not in counted)
        assert (align, ids, collisions, seed) == (config.align, config.semantic_ids, config.collisions, config.seed)
        assert [part for part in found.value.args if part in (None, TowersConfig())] == counted


PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from jaxrec.semantic_ids.table.changes import append
from jaxrec.semantic_ids.table.versions import begin, publish
folder = Path(sys.argv[1])
if sys.argv[2] == "begin":
    begin(folder)
else:
    append(folder, ["x", "y"], np.array([[21], [113]], np.float32))
    publish(folder)
"""


def run_program(folder, what, kill_at=""):
    environment = {**os.environ, "JAXREC_KILL_AT": kill_at, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", PROGRAM, str(folder), what]
    return subprocess.run(command, env=environment, check=False).returncode


@pytest.mark.parametrize("point", ["partial:version", "done:version", "current:version", "partial:publish"])
def test_killed_anywhere_nothing_is_lost(folder, point):
    before = codes_of_begun(folder)
    after = before | {"x": (0, 2), "y": (1, 1)}
    published = (folder / "codes.parquet").read_bytes()
    assert run_program(folder, "append", point) == -signal.SIGKILL
    assert codes_of(folder) == (after if point in ("current:version", "partial:publish") else before)
    assert (folder / "codes.parquet").read_bytes() == published
    for record in list_versions(folder):
        read_version(folder, record["version"])
    append(folder, ["x", "y"], line(21, 113))
    publish(folder)
    assert codes_of(folder) == after
    assert not list((folder / "versions").glob("*.partial")) and len(
        read_codes(folder / "codes.parquet", list(after)).ids
    )


def test_killed_before_the_first_version_counts_it_is_taken_up(folder):
    assert run_program(folder, "begin", "done:version") == -signal.SIGKILL
    with pytest.raises(UserError, match="no current version: roll back to one of 1"):
        read_version(folder)
    assert append(folder, ["x"], line(21))["version"] == 2
    assert len(list_versions(folder)) == 2


def test_only_one_process_changes_a_catalogue(folder):
    with locked(folder), pytest.raises(UserError, match="another process is changing"):
        append(folder, ["x"], line(21))


def test_ids_of_other_codebooks_are_refused(folder, tmp_path):
    append(folder, ["x"], line(21))
    other = make_folder(tmp_path / "other", line(0, 11), levels=([[0.0], [90.0]], LEVELS[1]))
    shutil.copy(other / "codebooks.safetensors", folder / "codebooks.safetensors")
    for call in (
        lambda: read_version(folder),
        lambda: append(folder, ["y"], line(0)),
        lambda: roll_back(folder, 1),
        lambda: publish(folder),
    ):
        with pytest.raises(UserError, match=r"version 1 of .* was made with other codebooks"):
            call()


@pytest.mark.parametrize(
    "name", ["000001/changes.parquet", "000001/version.json", "000002/version.json", "current.json"]
)
def test_a_damaged_file_is_named(folder, name):
    append(folder, ["x"], line(21))
    path = folder / "versions" / name
    raw = path.read_bytes()
    broken = raw.replace(b"a", b"b", 1) if name.startswith("0") else b'{"version": 7}'
    path.write_bytes(broken)
    with pytest.raises(UserError, match=r"is damaged") as error:
        read_version(folder)
    assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match=r"missing|no current version") as error:
        read_version(folder)
    assert "train.py" not in str(error.value)


def test_a_lost_pointer_is_not_guessed(folder):
    append(folder, ["x"], line(21))
    (folder / "versions" / "current.json").unlink()
    with pytest.raises(UserError, match="no current version: roll back to one of 1, 2"):
        append(folder, ["y"], line(21))
    assert [record["current"] for record in list_versions(folder)] == [False, False]
    roll_back(folder, 2)
    assert "x" in codes_of(folder)


def test_the_policy_must_have_made_the_ids(folder, tmp_path):
    with pytest.raises(UserError, match=r"levels of \(2, 3\) codes.*'extra_level'"):
        begin(folder, EXTRA)
    numbered = make_folder(tmp_path / "extra", line(0, 11), EXTRA)
    with pytest.raises(UserError, match=r"levels of \(2, 3, 3\) codes.*'keep'"):
        begin(numbered, KEEP)
    assert begin(numbered).collisions == EXTRA
    with pytest.raises(UserError, match="there is no folder"):
        begin(tmp_path / "nowhere")
    assert list_versions(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("ids", "x", "message"),
    [
        ([], np.zeros((0, 1)), "table of items is empty"),
        (["x", "y", "x"], line(0, 1, 2), "'x' is listed in row 0 and row 2"),
        (["x", ""], line(0, 1), "row 1 of the items has item_id ''"),
        (["x", None], line(0, 1), "row 1 of the items has item_id None"),
        (["x", "y"], line(0, np.nan), r"item_id 'y' \(row 1\) holds NaN"),
        (["x", "y"], np.array([[0.0], [1e300]]), r"item_id 'y' \(row 1\) holds NaN or infinity"),
        (["x", "y"], np.zeros((2, 3)), "embeddings are 3 wide"),
        (["x", "y"], line(0), "1 embeddings do not fit 2 items"),
        (["x"], np.zeros(1), "must be a matrix"),
        (["x"], [["a"]], "are no numbers"),
    ],
)
def test_items_that_cannot_be_used_are_named(folder, ids, x, message):
    begin(folder)
    with pytest.raises(UserError, match=message):
        append(folder, ids, x)
    assert len(list_versions(folder)) == 1


def test_items_that_are_not_there_are_named(folder):
    with pytest.raises(UserError, match="'x' has no semantic ID in version 1"):
        remove(folder, ["a", "x"])
    with pytest.raises(UserError, match=r"'x' has no semantic ID.*append it first"):
        reencode(folder, ["x"], line(0))
    remove(folder, ["a"])
    with pytest.raises(UserError, match="'a' has left the catalogue"):
        reencode(folder, ["a"], line(0))
    with pytest.raises(UserError, match="no current version: append makes the first"):
        read_version(folder.parent)


def write_items(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_commands_say_what_they_did(folder, tmp_path, capsys):
    new = write_items(tmp_path / "new.parquet", item_id=["x", "a"], embedding=[[21.0], [0.0]], count=[3, None])
    gone = write_items(tmp_path / "gone.parquet", item_id=["b"])
    live = write_items(tmp_path / "live.parquet", item_id=["c", "d"], embedding=pa.array(list(line(112, 102))))
    commands.append(folder, new)
    commands.remove(folder, gone, publish=True)
    first = capsys.readouterr().out
    assert "embeddings.safetensors stays as it was tokenized" in first
    assert read_codes(folder / "codes.parquet", list("acdx")).levels == 2
    commands.reencode(folder, live)
    commands.rollback(folder, 2)
    said = first + capsys.readouterr().out
    for words in (
        "Version 2: 1 new, 1 were there and keep their IDs.",
        "Collisions: items keep their IDs",
        "Version 3: 1 items left.",
        "codes.parquet holds these IDs now.",
        "Version 4: 1 of 2 items have another ID (50.0%). "
        "Codes that changed, level by level: 0.0%, 50.0%; of all, 25.0%.",
        "Version 2 of ",
    ):
        assert words in said, words
    commands.show_versions(folder)
    commands.show_drift(folder)
    said = capsys.readouterr().out
    assert "reencode" in said and "shared" in said and "66.7%" in said  # Four of six IDs are used in version 2.
    commands.show_versions(folder, as_json=True)
    commands.show_drift(folder, as_json=True)
    versions, rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert [record["current"] for record in versions] == [False, True, False, False] and rows == drift(folder)
    commands.show_versions(tmp_path)
    assert "no versions yet" in capsys.readouterr().out


def test_text_embeddings_go_through_the_alignment(folder, tmp_path):
    params = {"mean": np.float32([1, 0]), "linear": np.float32([[1], [0]])}
    params |= {"up.kernel": np.zeros((2, 1), np.float32), "up.bias": np.zeros(1, np.float32)}
    params |= {"down.kernel": np.zeros((1, 1), np.float32), "residual": np.ones((4, 1), np.float32)}
    save_file(params, folder / "alignment.safetensors")
    # (4, 9) - mean is 3 along the line, and 1 as a unit vector.
    np.testing.assert_allclose(commands.aligned(folder, np.float32([[4, 9], [0, 5]])), [[1], [-1]])
    path = write_items(tmp_path / "text.parquet", item_id=["x"], embedding=[[4.0, 9.0]])
    commands.append(folder, path, text=True)
    assert list_versions(folder)[-1]["figures"]["error"] == pytest.approx(1)
    with pytest.raises(UserError, match=r"are 3 wide, but the alignment .* takes 2"):
        commands.aligned(folder, np.zeros((1, 3), np.float32))
    with pytest.raises(UserError, match="holds no alignment"):
        commands.aligned(tmp_path, np.zeros((1, 2), np.float32))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": ["x"]}, "no column 'embedding'"),
        ({"embedding": [[1.0]]}, "no column 'item_id'"),
        ({"item_id": ["x", None], "embedding": [[1.0], [2.0]]}, "row 1 has no item_id"),
        ({"item_id": ["x", "y"], "embedding": [[1.0], None]}, r"item_id 'y' \(row 1\) is missing"),
        ({"item_id": ["x", "y"], "embedding": [[1.0], [1.0, 2.0]]}, r"'y' \(row 1\) is 2 wide, those before it 1"),
        ({"item_id": ["x"], "embedding": ["1.0"]}, "'embedding' is string"),
        ({"item_id": ["x"], "embedding": [["1"]]}, "must be a list of numbers"),
        ({"item_id": ["x"], "embedding": [[1.0]], "count": ["3"]}, "'count' is string"),
        ({"item_id": pa.array([], pa.string()), "embedding": pa.array([], pa.list_(pa.float32()))}, "has no rows"),
    ],
)
def test_a_file_of_items_that_cannot_be_used_is_named(tmp_path, columns, message):
    path = write_items(tmp_path / "items.parquet", **columns)
    with pytest.raises(UserError, match=message) as error:
        commands.read_items(path)
    assert str(path) in str(error.value)


def test_files_of_items_are_read(tmp_path):
    fixed = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float16(), 2))
    for column in (fixed, [[1, 2], [3, 4]], pa.array([[1.0, 2.0], [3.0, 4.0]], pa.large_list(pa.float64()))):
        ids, x, counts = commands.read_items(write_items(tmp_path / "i.parquet", item_id=["x", "y"], embedding=column))
        assert ids == ["x", "y"] and counts is None and x.dtype == np.float32
        np.testing.assert_array_equal(x, [[1, 2], [3, 4]])
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        commands.read_items(tmp_path / "bad.parquet")
