"""A persistent cache of compiled programs, shared by training, evaluation and serving."""

import os
from pathlib import Path

import jax

LEAST = 0.5
"""Compile time, in seconds, from which a program is cached."""


def keep_compiled_programs() -> None:
    """Enables the cache in $JAX_COMPILATION_CACHE_DIR or the user's cache folder; called by command lines only."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(cache / "jaxrec" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST)
