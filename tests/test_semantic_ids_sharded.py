"""Codebooks of rows that are split over devices, or over two processes, against those of one device."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrec.semantic_ids.quantizers import residual
from jaxrec.semantic_ids.quantizers.kmeans import KMeansConfig
from jaxrec.semantic_ids.quantizers.residual import ResidualConfig

ROOT = Path(__file__).parent.parent
SOURCE = """
import sys
import jax, numpy as np
host, hosts, out, port = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if hosts > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", hosts, host)
from jaxrec.semantic_ids.quantizers import residual
from jaxrec.semantic_ids.quantizers.kmeans import KMeansConfig
from jaxrec.semantic_ids.quantizers.residual import ResidualConfig
from jaxrec.semantic_ids.quantizers.rows import place
from jaxrec.training.sharding import MeshConfig, make_mesh
x = np.load(out + "/x.npy")
mine = x[:300] if host == 0 else x[300:]
rows = place(mine if hosts > 1 else x, make_mesh(MeshConfig()))
assert len(rows) == len(x)
config = ResidualConfig((8, 4, 20), kmeans=KMeansConfig(start_rows=(100, 100), rows_per_cluster=50, axes_iterations=10))
fitted = residual.fit(jax.random.key(0), rows, config)
codes = rows.local(residual.encode_rows(fitted, rows))
assert len(codes) == (len(mine) if hosts > 1 else len(x))
np.savez(f"{out}/host{host}.npz", *fitted.centroids, codes=codes)
"""


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """501 rows of 8 far centres, saved for the other processes, and the codebooks that one device gives.

    The last level has so few rows a code that it is fitted axis by axis.
    """
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(8, 32))[np.arange(501) % 8] * 10 + rng.normal(size=(501, 32))).astype(np.float32)
    np.save(folder / "x.npy", x)
    config = ResidualConfig(
        (8, 4, 20), kmeans=KMeansConfig(start_rows=(100, 100), rows_per_cluster=50, axes_iterations=10)
    )
    fitted = residual.fit(jax.random.key(0), x, config)
    return folder, fitted, np.asarray(residual.encode(fitted, x))


def start(folder, host, hosts, devices, port=0):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SOURCE, str(host), str(hosts), str(folder), str(port)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    for process in processes:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error


def compare(folder, fitted, hosts):
    found = [np.load(folder / f"host{host}.npz") for host in range(hosts)]
    for each in found:
        for level, codebook in enumerate(fitted.centroids):
            np.testing.assert_allclose(each[f"arr_{level}"], codebook, rtol=1e-4, atol=1e-4)
    return np.concatenate([each["codes"] for each in found])


def test_eight_devices(one_device):
    folder, fitted, codes = one_device
    finish(start(folder, 0, 1, devices=8))
    np.testing.assert_array_equal(compare(folder, fitted, 1), codes)


def test_two_processes(one_device):
    folder, fitted, codes = one_device
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    finish(start(folder, 0, 2, 2, port), start(folder, 1, 2, 2, port))
    np.testing.assert_array_equal(compare(folder, fitted, 2), codes)
