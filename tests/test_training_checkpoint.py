"""Checkpoints against files that are cut, changed, missing, and a disk that is full."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxrec.config import UserError
from jaxrec.training import checkpoint
from jaxrec.training.loop import TrainState


def state_of(step: int) -> TrainState:
    params = {"layer": {"kernel": jax.random.normal(jax.random.key(step), (16, 8)), "bias": jnp.zeros(8, jnp.bfloat16)}}
    return TrainState(jnp.int32(step), params, ({"mu": params}, ()), {"router": jnp.ones(3)})


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for step in (1, 2, 3):
        checkpoint.save(folder, step, state_of(step), {"iterator": {"next_index": step * 10}}, keep=3)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def largest(folder: Path, step: int) -> Path:
    paths = [path for path in (folder / f"{step:08d}" / "state").rglob("*") if path.is_file()]
    return max(paths, key=lambda path: path.stat().st_size)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "truncated": lambda folder: largest(folder, 3).write_bytes(largest(folder, 3).read_bytes()[:-7]),
    "garbled": lambda folder: largest(folder, 3).write_bytes(b"x" * largest(folder, 3).stat().st_size),
    "one bit": lambda folder: flip_a_bit(largest(folder, 3)),
    "missing file": lambda folder: largest(folder, 3).unlink(),
    "missing state": lambda folder: shutil.rmtree(folder / "00000003" / "state"),
    "empty manifest": lambda folder: (folder / "00000003" / "manifest.json").write_text(""),
    "garbled manifest": lambda folder: (folder / "00000003" / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "other manifest": lambda folder: (folder / "00000003" / "manifest.json").write_text("[]"),
}


def test_restore_gives_the_newest_bit_for_bit(saved):
    state, notes, step = checkpoint.restore(saved, state_of(0))
    assert (step, notes) == (3, {"iterator": {"next_index": 30}})
    assert isinstance(state, TrainState) and same(state, state_of(3))


def test_nothing_saved_is_no_error(tmp_path):
    assert checkpoint.restore(tmp_path / "none", state_of(0)) is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.load_parts(tmp_path / "none", "params")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_and_says_so(folder, capsys, damage):
    DAMAGES[damage](folder)
    state, notes, step = checkpoint.restore(folder, state_of(0))
    assert (step, notes["iterator"]["next_index"]) == (2, 20) and same(state, state_of(2))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "the checkpoint of step 3 is damaged (" in lines[0]
    assert lines[0].endswith("going on from the checkpoint of step 2")


def test_all_damaged_is_an_error_that_names_the_mend(folder):
    for step in (1, 2, 3):
        flip_a_bit(largest(folder, step))
    with pytest.raises(UserError) as error:
        checkpoint.restore(folder, state_of(0))
    assert str(error.value).count("has changed since it was written") == 3
    assert "delete that folder" in str(error.value)


def test_damage_that_the_checksums_miss_falls_back_too(folder, capsys):
    path = largest(folder, 3)
    path.write_bytes(b"x" * path.stat().st_size)
    manifest = folder / "00000003" / "manifest.json"
    content = json.loads(manifest.read_text())
    # As with many hosts, where sizes alone are kept.
    content["files"] = {name: [size, 0] for name, (size, _) in content["files"].items()}
    manifest.write_text(json.dumps(content))
    assert checkpoint.restore(folder, state_of(0))[2] == 2
    assert "step 3 is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("poison", [np.nan, -np.inf])
@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_not_a_number_is_refused_and_named(tmp_path, part, poison):
    checkpoint.save(tmp_path, 1, state_of(1), {})
    state = state_of(2)
    kernel = state.params["layer"]["kernel"].at[3, 2].set(poison)
    damaged = {"layer": {"kernel": kernel, "bias": state.params["layer"]["bias"]}}
    state = state.replace(params=damaged) if part == "params" else state.replace(opt_state=({"mu": damaged}, ()))
    checkpoint.save(tmp_path, 2, state, {})
    message = rf"00000002: {part}/.*layer/kernel holds NaN or infinity: the training diverged"
    with pytest.raises(UserError, match=message):
        checkpoint.restore(tmp_path, state_of(0))
    if part == "params":
        with pytest.raises(UserError, match=message):
            checkpoint.load_parts(tmp_path, "params", "extra")
    assert checkpoint.load_parts(tmp_path, "extra")["extra"]["router"].tolist() == [1, 1, 1]
    shutil.rmtree(tmp_path / "00000002")
    assert same(checkpoint.restore(tmp_path, state_of(0))[0], state_of(1))


def test_a_save_that_was_cut_off_is_ignored_and_removed(folder):
    (folder / "00000003" / "manifest.json").unlink()
    assert checkpoint.restore(folder, state_of(0))[2] == 2
    checkpoint.save(folder, 4, state_of(4), {}, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["00000002", "00000004"]


def test_saving_the_same_step_again_replaces_it(folder):
    checkpoint.save(folder, 3, state_of(7), {"iterator": {}}, keep=3)
    assert same(checkpoint.restore(folder, state_of(0))[0], state_of(7))
    assert checkpoint.steps(folder) == [1, 2, 3]


def test_a_full_disk_keeps_the_earlier_ones(folder, monkeypatch):
    def fill(self, path, *args, **kwargs):
        path.mkdir()
        (path / "part").write_text("half")
        # As tensorstore words it.
        raise ValueError("RESOURCE_EXHAUSTED: Error writing 'params': Failed to write 4 bytes: No space left on device")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", fill)
    with pytest.raises(UserError, match=r"the disk is full: checkpoint .*00000004 could not .*before it are kept"):
        checkpoint.save(folder, 4, state_of(4), {}, keep=1)
    monkeypatch.undo()
    assert checkpoint.steps(folder) == [1, 2, 3]
    assert not (folder / "00000004").exists()
    assert checkpoint.restore(folder, state_of(0))[2] == 3


def test_another_model_is_no_damage(folder):
    like = state_of(0)
    like.params["layer"]["kernel"] = jnp.ones((16, 9))
    with pytest.raises(UserError, match=r"params/layer/kernel is \(16, 8\) there and \(16, 9\) in this configuration"):
        checkpoint.restore(folder, like)


def test_parameters_alone(saved):
    assert same(checkpoint.load_parts(saved, "params")["params"], state_of(3).params)
