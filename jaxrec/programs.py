"""Compiled programs are kept between processes: whoever trains, measures or serves again need not wait for them."""

import os
from pathlib import Path

import jax

LEAST = 0.5
"""Seconds of compiling from which on a program is kept."""


def keep_compiled_programs() -> None:
    """From now on, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder: for command lines, not for a library."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(cache / "jaxrec" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST)
