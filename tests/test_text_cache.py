"""The embedding cache: what is written is found, damage is noticed, writers do not disturb each other."""

import errno
import os

import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.text import cache as cache_module
from jaxrec.text.cache import EmbeddingCache, default_cache_dir


def keys_of(numbers):
    return [int(n).to_bytes(32, "big") for n in numbers]


def vectors_of(numbers):
    return np.outer(np.array(numbers, np.float32), np.ones(4, np.float32))


def test_reads_what_was_written_and_says_what_is_unknown(tmp_path):
    cache = EmbeddingCache(tmp_path, "a", 4)
    cache.add(keys_of([1, 2]), vectors_of([1, 2]))
    assert not cache.read(keys_of([1]))[1].any()  # not before flush
    cache.flush()
    vectors, known = EmbeddingCache(tmp_path, "a", 4).read(keys_of([2, 3, 1]))
    assert known.tolist() == [True, False, True]
    np.testing.assert_array_equal(vectors, vectors_of([2, 0, 1]))


def test_shards_reach_the_disk_as_they_fill(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 2)
    cache = EmbeddingCache(tmp_path, "a", 4)
    cache.add(keys_of([1, 2]), vectors_of([1, 2]))
    cache.add(keys_of([3]), vectors_of([3]))  # lost with the process
    assert EmbeddingCache(tmp_path, "a", 4).read(keys_of([1, 2, 3]))[1].tolist() == [True, True, False]


def test_two_writers_share_a_store(tmp_path):
    one, two = EmbeddingCache(tmp_path, "a", 4), EmbeddingCache(tmp_path, "a", 4)
    one.add(keys_of([1, 2]), vectors_of([1, 2]))
    two.add(keys_of([2, 3]), vectors_of([2, 3]))
    one.flush()
    two.flush()
    assert one.read(keys_of([1, 2, 3]))[1].all()


@pytest.mark.parametrize("damage", [lambda raw: raw[:-3], lambda raw: b"", lambda raw: raw[:50] + b"x" + raw[51:]])
def test_a_damaged_shard_is_named_deleted_and_rebuilt(tmp_path, capsys, damage):
    cache = EmbeddingCache(tmp_path, "a", 4)
    cache.add(keys_of([1]), vectors_of([1]))
    cache.flush()
    (shard,) = cache.folder.glob("*.safetensors")
    shard.write_bytes(damage(shard.read_bytes()))
    assert not cache.read(keys_of([1]))[1].any()
    assert shard.name in capsys.readouterr().out
    assert not shard.exists()


def test_a_write_that_fails_leaves_nothing_and_says_why(tmp_path, monkeypatch):
    cache = EmbeddingCache(tmp_path, "a", 4)
    cache.add(keys_of([1]), vectors_of([1]))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left.*cache_dir"):
        cache.flush()
    assert list(cache.folder.iterdir()) == []


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXREC_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("JAXREC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "jaxrec"
