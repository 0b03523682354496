"""What holds of every quantizer, and of two of them one behind the other, for embeddings of any shape."""

import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.semantic_ids import (
    BalancedConfig,
    FsqConfig,
    KMeansConfig,
    OpqConfig,
    ResidualConfig,
    RqVaeConfig,
    SemanticIdConfig,
)
from jaxrec.semantic_ids.quantizers import codebooks

QUICK = KMeansConfig(iterations=5)
BALANCE = BalancedConfig(iterations=2, rounds=3)


def residual(sizes):
    return ResidualConfig(sizes, kmeans=QUICK)


def balanced(sizes):
    return ResidualConfig(sizes, balanced=(len(sizes),), kmeans=QUICK, balance=BALANCE)


def rqvae(sizes):
    return RqVaeConfig(sizes, hidden=(4,), latent_width=3, warm_steps=2, steps=3, batch_size=8, start=QUICK)


def grid(sizes):
    return FsqConfig(sizes, hidden=4, steps=3, batch_size=8)


def opq(sizes):
    return OpqConfig(sizes, rotations=2, start=QUICK, finish=QUICK)


ALONE = {
    "residual": lambda sizes: SemanticIdConfig(residual(sizes), None),
    "balanced": lambda sizes: SemanticIdConfig(balanced(sizes), None),
    "rqvae": lambda sizes: SemanticIdConfig(rqvae(sizes), None),
    "fsq": lambda sizes: SemanticIdConfig(None, grid(sizes)),
    "opq": lambda sizes: SemanticIdConfig(None, opq(sizes)),
}
BOTH = {
    "residual-fsq": lambda sizes: SemanticIdConfig(residual((3,)), grid(sizes)),
    "balanced-opq": lambda sizes: SemanticIdConfig(balanced((3,)), opq(sizes)),
    "rqvae-fsq": lambda sizes: SemanticIdConfig(rqvae((3,)), grid(sizes)),
    "rqvae-opq": lambda sizes: SemanticIdConfig(rqvae((3,)), opq(sizes)),
}
# Every other shape is another compilation.
SHAPES = st.sampled_from([((5, 2), (2,)), ((19, 4), (4, 3))])


def expected_sizes(config, sizes):
    """Codes in each level: a grid of any number of coordinates is one level."""
    first = () if config.hierarchy is None else config.hierarchy.sizes
    if config.remainder is None:
        return first
    return (*first, int(np.prod(sizes))) if isinstance(config.remainder, FsqConfig) else (*first, *sizes)


def same_bits(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("kind", [*ALONE, *BOTH])
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(shapes=SHAPES, seed=st.integers(0, 2**16), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_any_shape(kind, shapes, seed, scale):
    shape, sizes = shapes
    config = (ALONE | BOTH)[kind](sizes)
    x = (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)
    key = jax.random.key(seed)
    books = codebooks.fit(key, x, config)
    codes = codebooks.encode(books, x)
    assert books.sizes == expected_sizes(config, sizes) and books.width == shape[1]
    assert codes.dtype == np.int32 and codes.shape == (shape[0], len(books.sizes))
    assert (codes >= 0).all() and (codes < books.sizes).all()
    for levels in range(codes.shape[1] + 1):
        decoded = codebooks.decode(books, codes[:, :levels])
        assert decoded.dtype == np.float32 and decoded.shape == shape and np.isfinite(decoded).all()
    together = codebooks.encode_catalogue(books, x, config)
    assert together.dtype == np.int32 and together.shape == codes.shape
    assert (together >= 0).all() and (together < books.sizes).all()

    row = seed % len(x)
    np.testing.assert_array_equal(codebooks.encode(books, x[row : row + 1])[0], codes[row])
    assert codebooks.encode(books, x[:0]).shape == (0, len(books.sizes))
    with tempfile.TemporaryDirectory() as folder:
        codebooks.save(books, Path(folder) / "codebooks.safetensors")
        loaded = codebooks.load(Path(folder) / "codebooks.safetensors")
    same_bits(loaded, books)
    np.testing.assert_array_equal(codebooks.encode(loaded, x), codes)
    same_bits(codebooks.fit(key, x, config), books)


@pytest.mark.parametrize("kind", ALONE)
def test_a_quantizer_alone_is_what_it_is_among_others(kind):
    config = ALONE[kind]((4, 3))
    x = np.random.default_rng(0).normal(size=(19, 4)).astype(np.float32)
    books = codebooks.fit(jax.random.key(0), x, config)
    (part,) = books.parts
    module = codebooks.MODULES[type(part)]
    keys = jax.random.split(jax.random.key(0))
    own = module.fit(keys[int(config.hierarchy is None)], x, config.hierarchy or config.remainder)
    same_bits(own, part)
    codes = module.encode(own, x)
    assert codes.dtype == np.int32 and own.sizes == books.sizes and own.width == books.width
    np.testing.assert_array_equal(codes, codebooks.encode(books, x))
    decoded = module.decode(own, codes)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, codebooks.decode(books, np.asarray(codes)))
