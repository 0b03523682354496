"""k-means against NumPy, and at its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import UserError
from jaxrec.semantic_ids.quantizers import kmeans as kmeans_module
from jaxrec.semantic_ids.quantizers.kmeans import KMeansConfig, assign, assign_all, kmeans, plus_plus, sample_sizes
from jaxrec.semantic_ids.quantizers.kmeans import lloyd as lloyd_on_sample


def numpy_assign(x, centroids):
    distances = ((x[:, None].astype(np.float64) - centroids[None]) ** 2).sum(-1)
    return distances.argmin(1), distances.min(1)


def lloyd(x, centroids, config):
    """Lloyd from given centroids, as (centroids, assignment, inertia)."""
    x, where = jnp.asarray(x), jnp.ones(len(x), bool)
    centroids = lloyd_on_sample(x, where, jnp.asarray(centroids), x, config)
    return kmeans_module.KMeans(centroids, *assign_all(x, where, centroids))


def numpy_lloyd(x, centroids, iterations):
    """Each iteration goes one and a half times as far as the means; the last means are the result."""
    for _ in range(iterations):
        nearest, _ = numpy_assign(x, centroids)
        means = np.stack([x[nearest == k].mean(0) for k in range(len(centroids))])
        centroids = centroids + 1.5 * (means - centroids)
    return means


@pytest.fixture(scope="module")
def blobs():
    """300 rows around 6 far centres, [300, 5], with the centre of each row."""
    rng = np.random.default_rng(0)
    member = np.arange(300) % 6
    return (rng.normal(size=(6, 5))[member] * 20 + rng.normal(size=(300, 5))).astype(np.float32), member


@pytest.mark.parametrize("k", [1, 7, 8, 9, 60])
@pytest.mark.parametrize("rows", [1, 63, 300])
def test_assignment_in_chunks_is_numpys(blobs, monkeypatch, k, rows):
    x, _ = blobs
    monkeypatch.setattr(kmeans_module, "DISTANCES_AT_ONCE", 64)
    jax.clear_caches()
    nearest, distances = assign(jnp.asarray(x[-rows:]), jnp.asarray(x[:k]))
    expected, squared = numpy_assign(x[-rows:], x[:k])
    np.testing.assert_array_equal(nearest, expected)
    np.testing.assert_allclose(distances, squared, rtol=1e-4, atol=1e-3)


def test_equal_centroids_give_the_first_and_nan_a_code():
    centroids = jnp.tile(jnp.array([[0.0, 1], [1, 0]]), (20, 1))
    nearest, _ = assign(jnp.array([[0.0, 2], [3, 0], [jnp.nan, 0]]), centroids)
    assert nearest[:2].tolist() == [0, 1] and 0 <= nearest[2] < 40


def test_far_from_zero_no_digits_are_lost(blobs):
    x, _ = blobs
    moved = x + np.float32(4096)
    nearest, _ = assign(jnp.asarray(moved), jnp.asarray(moved[:9]))
    np.testing.assert_array_equal(nearest, numpy_assign(moved, moved[:9])[0])


def test_prices_count_beside_distances():
    nearest, distances = assign(jnp.array([[1.0]]), jnp.array([[0.0], [3.0]]), jnp.array([4.0, 0.5]))
    assert (nearest.tolist(), distances.tolist()) == ([1], [4.0])  # 1 + 4 against 4 + 0.5


@pytest.mark.parametrize("iterations", [1, 4])
def test_lloyd_is_numpys(iterations):
    x = np.random.default_rng(1).normal(size=(300, 3)).astype(np.float32)
    fitted = lloyd(x, x[:6], KMeansConfig(iterations=iterations, tolerance=0.0))
    expected = numpy_lloyd(x, x[:6], iterations)
    np.testing.assert_allclose(fitted.centroids, expected, atol=1e-4)
    np.testing.assert_allclose(fitted.inertia, numpy_assign(x, expected)[1].sum(), rtol=1e-4)


def test_iterations_descend_to_where_every_centroid_is_the_mean_of_its_rows():
    x = np.random.default_rng(2).normal(size=(500, 3)).astype(np.float32)
    steps = [lloyd(x, x[:8], KMeansConfig(iterations=n, tolerance=0.0)) for n in (1, 2, 4, 8, 200)]
    assert np.all(np.diff([fitted.inertia for fitted in steps]) < 0)
    means = [x[np.asarray(steps[-1].assignment) == k].mean(0) for k in range(8)]
    np.testing.assert_allclose(steps[-1].centroids, np.stack(means), atol=1e-5)


def test_fits_to_so_many_rows_a_cluster_and_assigns_all():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(3000, 4)).astype(np.float32)
    fitted = kmeans(jax.random.key(0), x, 8, KMeansConfig(rows_per_cluster=50))
    everything = kmeans(jax.random.key(0), x, 8, KMeansConfig(rows_per_cluster=0))
    assert fitted.assignment.shape == (3000,)
    assert everything.inertia < fitted.inertia < 1.1 * everything.inertia


def test_finds_far_clusters(blobs):
    x, member = blobs
    fitted = kmeans(jax.random.key(0), x, 6)
    assert len(set(zip(np.asarray(fitted.assignment).tolist(), member.tolist(), strict=True))) == 6
    assert fitted.inertia < 1.2 * 300 * 5


def test_start_takes_one_row_of_each_far_cluster(blobs):
    x, _ = blobs
    start = np.asarray(plus_plus(jax.random.key(1), jnp.asarray(x), 6))
    assert numpy_assign(x, start)[1].max() < 200  # clusters are hundreds apart
    assert all((x == row).all(1).any() for row in start)


def test_a_start_from_a_sample_is_as_good(blobs):
    x, _ = blobs
    fitted = kmeans(jax.random.key(0), np.tile(x, (4, 1)), 6, KMeansConfig(start_rows=(100, 100)))
    assert fitted.inertia < 1.2 * 1200 * 5


def test_samples_grow_up_to_half_of_the_rows():
    assert sample_sizes(2000, 2, KMeansConfig(start_rows=(20, 20))) == [20, 256]
    assert sample_sizes(1000, 50, KMeansConfig(start_rows=(20, 20))) == [200]
    assert sample_sizes(1000, 4, KMeansConfig(start_rows=(20, 20), growth=0)) == [20]
    assert sample_sizes(15, 4, KMeansConfig(start_rows=(20, 20))) == [15]


def test_growing_samples_end_as_well_as_all_rows():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4000, 8)).astype(np.float32)
    inertia = [kmeans(jax.random.key(0), x, 32, KMeansConfig(start_rows=(250, 250), growth=g)).inertia for g in (0, 4)]
    assert inertia[1] < 1.02 * inertia[0]


@pytest.mark.parametrize("width", [40, 64])
def test_with_few_rows_a_cluster_axes_that_grow_end_lower(width):
    x = np.random.default_rng(0).normal(size=(3000, width)).astype(np.float32) * np.geomspace(1, 0.2, width) + 3
    at_once, by_axes = (
        [float(kmeans(jax.random.key(seed), x, 200, KMeansConfig(axes_iterations=count)).inertia) for seed in range(3)]
        for count in (0, 10)
    )
    assert np.mean(by_axes) < 0.995 * np.mean(at_once)


def test_many_clusters_start_both_ways_and_the_better_end_is_kept(monkeypatch):
    """Clusters without any order along axes want the one start, a cloud without clusters the other."""
    rng, width, k = np.random.default_rng(0), 48, 40
    cloud = rng.normal(size=(4000, width)) * np.geomspace(1, 0.2, width)
    heavy = rng.normal(size=(k, width))[(k * rng.random(4000) ** 3).astype(int)] + 0.05 * rng.normal(size=(4000, width))
    by_axes = []

    def noted(*arguments, kept=kmeans_module.fit_by_axes):
        by_axes.append(kept(*arguments))
        return by_axes[-1]

    monkeypatch.setattr(kmeans_module, "fit_by_axes", noted)
    for x, axes_win in ((cloud, True), (heavy, False)):
        x = x.astype(np.float32)
        monkeypatch.setattr(kmeans_module, "MANY", 10**6)
        plain = kmeans(jax.random.key(0), x, k, KMeansConfig(axes_iterations=10))
        monkeypatch.setattr(kmeans_module, "MANY", k)
        both = kmeans(jax.random.key(0), x, k, KMeansConfig(axes_iterations=10))
        assert (both.inertia < plain.inertia) == axes_win
        np.testing.assert_array_equal(both.centroids, by_axes[-1] if axes_win else plain.centroids)
    assert len(by_axes) == 2


def test_moments_are_numpys_and_of_real_rows():
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32) + 1
    mean, squares = kmeans_module.moments(jnp.asarray(x), jnp.arange(50) < 40)
    np.testing.assert_allclose(mean, x[:40].mean(0), rtol=1e-5)
    np.testing.assert_allclose(squares, np.cov(x[:40].T) * 39, rtol=1e-4)


def test_empty_clusters_start_again(blobs):
    x, _ = blobs
    nowhere = np.concatenate([x[:3], np.full((3, 5), 1e4, np.float32)])
    fitted = lloyd(jnp.asarray(x), jnp.asarray(nowhere), KMeansConfig())
    assert np.bincount(fitted.assignment, minlength=6).min() > 0
    assert fitted.inertia < numpy_assign(x, x[:3])[1].sum() / 2


def test_stops_at_the_tolerance(blobs):
    x, _ = blobs
    start = jnp.asarray(x[[0, 40, 80, 120, 160, 190]])
    assert np.unique(numpy_assign(x, np.asarray(start))[0]).size == 6  # No cluster is empty, so none starts again.
    stopped = lloyd(jnp.asarray(x), start, KMeansConfig(tolerance=1e6))
    once, twice = (lloyd(jnp.asarray(x), start, KMeansConfig(iterations=n, tolerance=0.0)) for n in (1, 2))
    np.testing.assert_array_equal(stopped.centroids, once.centroids)
    assert (np.asarray(once.centroids) != twice.centroids).any()


def test_fewer_distinct_rows_than_clusters():
    x = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    fitted = kmeans(jax.random.key(0), x, 8)
    assert fitted.inertia == 0 and np.isfinite(fitted.centroids).all()


@pytest.mark.parametrize("rows", [1, 4])
def test_as_many_clusters_as_rows(rows):
    x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    assert kmeans(jax.random.key(0), x, rows).inertia == 0


def test_the_same_key_gives_the_same_bits(blobs):
    x, _ = blobs
    one, two = (kmeans(jax.random.key(5), x, 16) for _ in range(2))
    np.testing.assert_array_equal(one.centroids, two.centroids)


def test_bad_input_is_named(blobs):
    x, _ = blobs
    broken = x.copy()
    broken[[4, 9], 1] = [np.nan, np.inf]
    with pytest.raises(UserError, match=r"row 4 .*2 such rows"):
        kmeans(jax.random.key(0), broken, 2)
    with pytest.raises(UserError, match="300 rows cannot fill a codebook of 301"):
        kmeans(jax.random.key(0), x, 301)
    with pytest.raises(UserError, match="matrix"):
        kmeans(jax.random.key(0), x[0], 2)
