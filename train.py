"""Train a system from its configuration: `python train.py configs/onemall.py --run runs/a [--any.field VALUE ...]`."""

import os
import sys
import warnings
from pathlib import Path

import jax

from jaxrec.config import UserError, parse_cli
from jaxrec.run import Run, report_user_errors
from jaxrec.systems import SYSTEMS


def main() -> None:
    """Runs every phase that isn't done yet."""
    config, path = parse_cli()
    if config.system not in SYSTEMS:
        known = ", ".join(SYSTEMS)
        raise UserError(f"configuration key 'system': there is no {config.system!r}; it is one of {known}")
    keep_compiled_programs()
    # Libraries announce what they will change one day; nobody who trains can act on it.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    SYSTEMS[config.system].train(Run.open(path, config), config)


def keep_compiled_programs() -> None:
    """Compiled programs are kept between runs, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(cache / "jaxrec" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
