"""What all tests share: the CPU, simulated devices on request, a compilation cache that makes the second run fast."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "jax"

# Environment variables, and before jax is imported, so that the subprocesses of tests get them too.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Tests compile much and compute little: this compiles four times as fast.
FLAGS = ("backend_optimization_level=0", "llvm_disable_expensive_passes=true", "cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(f"--xla_{flag}" for flag in FLAGS)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Embeddings of texts, by their content: the small malls of many modules have the same ones.
os.environ["JAXREC_CACHE"] = str(ROOT / ".cache" / "texts")


SLOW = (
    "runs_reinforcement", "systems_onemall_reinforcement",
    "systems_onemall", "systems_tiger", "systems_rankgr", "models_rankgr", "semantic_ids_shapes",
    "semantic_ids_sharded", "serving_batch", "toy_system", "systems_recommender", "models_encoder_decoder",
    "semantic_ids_embeddings", "sharding_onemall", "semantic_ids_streaming", "semantic_ids_opq", "export",
    "serving_live", "systems_sequential", "systems_onesearch", "systems_onesug", "models_personal_search",
    "text_finetune", "models_dropout", "models_causal", "semantic_ids_balanced", "benchmarks_sequential",
    "text_prefixes", "nn_attention", "models_cross_decoder",
)  # fmt: skip
"""Modules of tests that train, or compile much, the longest first. They start first, so that the last minutes of a run
on several cores have many short modules to share; `--quick` leaves them out."""


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="without the modules that train or compile much")


def pytest_collection_modifyitems(config, items):
    turns = {f"test_{name}": turn for turn, name in enumerate(SLOW)}
    items.sort(key=lambda item: turns.get(item.path.stem, len(turns)))
    if config.getoption("quick"):
        config.hook.pytest_deselected(items=[item for item in items if item.path.stem in turns])
        items[:] = [item for item in items if item.path.stem not in turns]


# Tracing makes many small objects, and a test process keeps many: by default a tenth of the time is spent on looking
# for cycles among them.
gc.set_threshold(200_000, 50, 100)

MOST_MAPS = 20_000
"""Memory maps of this process beyond which compiled programs are dropped. Each program has dozens, and a process that
has Linux's most, 65,530, crashes; what is dropped and asked for again comes from the cache."""


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Drops the compiled programs of the modules before, when there are many."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        import jax  # not before the environment variables above

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def on_devices():
    """Runs Python source in a process of its own with simulated devices: `on_devices(8, source) -> stdout`."""

    def run(count: int, source: str) -> str:
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(count), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", source]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
