"""Quantizers against faiss, scikit-learn and k-means-constrained: time, and the reconstruction error it buys.

    pip install jaxrec[peers]; python benchmarks/semantic_ids.py [--quick]

Each task is fit on all rows and encode all rows, two threads each, in turns, best of several; `mse`, not timed, is the
mean squared distance of a row to what its codes stand for, and a faster but worse quantizer is no better: look at both.
The data are seeded Gaussians with falling variances (`gauss`), which have no clusters to find, and a mixture with a few
heavy and many light clusters (`mix`). One JSON line a row; ratio = ours / peer. In full it takes three quarters of
an hour; cases of minutes run once, compiling included.
"""

import os
import sys

# These slow a current OpenBLAS down on some processors; both peers and NumPy read them when they are loaded.
if any(name in os.environ for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    os.execve(sys.executable, [sys.executable, *sys.argv], clean)

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from shared.timing import best_of, parser, report

from jaxrec.config import UserError
from jaxrec.console import report_user_errors
from jaxrec.semantic_ids.quantizers import balanced, opq, residual
from jaxrec.semantic_ids.quantizers.balanced import BalancedConfig
from jaxrec.semantic_ids.quantizers.kmeans import kmeans
from jaxrec.semantic_ids.quantizers.opq import OpqConfig
from jaxrec.semantic_ids.quantizers.residual import Residual, ResidualConfig

try:
    import faiss
    from k_means_constrained import KMeansConstrained
    from sklearn.cluster import KMeans
except ImportError:
    faiss = None


def main() -> None:
    """Prints the rows."""
    args = parser(__doc__).parse_args()
    if faiss is None:
        raise UserError("the peers are not installed: run `pip install faiss-cpu scikit-learn k-means-constrained`")
    faiss.omp_set_num_threads(2)
    warnings.filterwarnings("ignore")
    repeats = 1 if args.quick else 2
    for kind in ("gauss", "mix"):
        x = make(kind, 100_000, 64)
        compare_kmeans(f"{kind} 100000 x 64, K=256", x, 256, repeats, sklearn=not args.quick)
        compare_balanced(f"{kind} 5000 x 64, K=64, sizes within 10%", make(kind, 5000, 64), repeats)
    measure_encoding(make("gauss", 200_000 if args.quick else 1_000_000, 64), 3)
    if args.quick:
        compare_residual("gauss 100000 x 64, 3 x 256", make("gauss", 100_000, 64), 256, repeats)
        return
    for kind in ("gauss", "mix"):
        x = make(kind, 100_000, 64)
        compare_residual(f"{kind} 100000 x 64, 3 x 256", x, 256, repeats)
        compare_opq(f"{kind} 100000 x 64, 2 x 256", x, repeats)
        compare_kmeans(f"{kind} 100000 x 64, K=4096", x, 4096, repeats)
        compare_residual(f"{kind} 100000 x 64, 3 x 4096", x, 4096, 0)
        x = make(kind, 1_000_000, 128)
        compare_kmeans(f"{kind} 1000000 x 128, K=256", x, 256, repeats)
        compare_residual(f"{kind} 1000000 x 128, 3 x 256", x, 256, 0)
        compare_kmeans(f"{kind} 1000000 x 128, K=4096", x, 4096, 0)
    for kind in ("gauss", "mix"):
        compare_residual(f"{kind} 1000000 x 128, 3 x 4096", make(kind, 1_000_000, 128), 4096, 0)


def make(kind: str, rows: int, width: int) -> np.ndarray:
    """Seeded rows f32 [rows, width]."""
    rng = np.random.default_rng(0)
    if kind == "gauss":
        return (rng.normal(size=(rows, width)) * np.geomspace(1, 0.2, width)).astype(np.float32)
    centres, member = rng.normal(size=(2000, width)), rng.zipf(1.3, rows) % 2000
    return (centres[member] + rng.normal(size=(rows, width)) * 0.5).astype(np.float32)


def compare(claim: str, case: str, x: np.ndarray, repeats: int, ours, peers: dict) -> None:
    """Times functions () -> (a function that decodes, what it takes) in turns, and prints a row a peer."""
    kept = {}

    def keep(name, function):
        kept[name] = function()
        return kept[name][1]

    functions = {"ours": ours, **peers}
    times = best_of([functools.partial(keep, *pair) for pair in functions.items()], repeats)
    errors = {name: squared_error(x, *made) for name, made in kept.items()}
    for name, milliseconds in list(zip(functions, times, strict=True))[1:]:
        mse = {"mse": round(errors["ours"], 4), "peer_mse": round(errors[name], 4)}
        report(claim, case, times[0], milliseconds, name, **mse)


def squared_error(x: np.ndarray, decode, codes) -> float:
    """The mean squared distance of rows to what their codes are decoded to."""
    return float(((x - np.asarray(decode(codes))) ** 2).sum(1).mean())


def compare_kmeans(case: str, x: np.ndarray, k: int, repeats: int, sklearn: bool = False) -> None:
    def ours():
        fitted = kmeans(jax.random.key(0), x, k)
        return lambda codes: fitted.centroids[codes], fitted.assignment

    def of_faiss():
        made = faiss.Kmeans(x.shape[1], k, niter=20, seed=1)
        made.train(x)
        return made.centroids.__getitem__, made.index.search(x, 1)[1][:, 0]

    def of_sklearn():
        made = KMeans(k, n_init=1, max_iter=20, random_state=0).fit(x)
        return made.cluster_centers_.__getitem__, made.labels_

    peers = {"faiss.Kmeans, 20 iterations": of_faiss}
    if sklearn:
        peers["sklearn KMeans, at most 20 iterations"] = of_sklearn
    compare("k-means", case, x, repeats, ours, peers)


def compare_residual(case: str, x: np.ndarray, k: int, repeats: int) -> None:
    def ours():
        fitted = residual.fit(jax.random.key(0), x, ResidualConfig((k,) * 3))
        return functools.partial(residual.decode, fitted), residual.encode(fitted, x)

    def of_faiss():
        made = faiss.ResidualQuantizer(x.shape[1], 3, int(np.log2(k)))
        made.max_beam_size = 1
        made.train(x)
        return made.decode, made.compute_codes(x)

    compare("residual k-means", case, x, repeats, ours, {"faiss.ResidualQuantizer, beam 1": of_faiss})


def compare_opq(case: str, x: np.ndarray, repeats: int) -> None:
    def ours():
        fitted = opq.fit(jax.random.key(0), x, OpqConfig((256, 256)))
        return functools.partial(opq.decode, fitted), opq.encode(fitted, x)

    def of_faiss():
        made = faiss.index_factory(x.shape[1], "OPQ2,IVF1,PQ2x8")
        made.train(x)
        return made.sa_decode, made.sa_encode(x)

    compare("OPQ", case, x, repeats, ours, {"faiss OPQ2,IVF1,PQ2x8": of_faiss})


def compare_balanced(case: str, x: np.ndarray, repeats: int) -> None:
    least, most = balanced.bounds(len(x), 64, 0.1)

    def ours():
        fitted = balanced.fit(jax.random.key(0), x, 64, BalancedConfig(slack=0.1))
        codes = balanced.assign_within(x, *fitted, slack=0.1)
        assert least <= np.bincount(codes, minlength=64).min() and np.bincount(codes).max() <= most
        return np.asarray(fitted.centroids).__getitem__, codes

    def constrained():
        made = KMeansConstrained(64, size_min=least, size_max=most, n_init=1, random_state=0).fit(x)
        return made.cluster_centers_.__getitem__, made.labels_

    compare("balanced k-means", case, x, repeats, ours, {"k-means-constrained, n_init=1": constrained})


def measure_encoding(x: np.ndarray, repeats: int) -> None:
    """Three levels of 1024 against the time that their distances take at the matmul peak of the same run."""
    fitted = Residual(tuple(jnp.asarray(x[level * 1024 : (level + 1) * 1024]) for level in range(3)), (None,) * 3)
    rows, square = jnp.asarray(x), jnp.ones((2048, 2048))
    times = best_of([lambda: residual._codes(fitted, rows), lambda: square @ square], 4 * repeats)
    at_peak = times[1] * 3 * len(x) * x.shape[1] * 1024 / 2048**3
    report("encoding", f"{len(x)} x 64, 3 x 1024", times[0], at_peak, "the same products at the matmul peak")


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
