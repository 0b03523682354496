"""Train a system from its configuration: `python train.py configs/onemall.py --run runs/a [--any.field VALUE ...]`."""

import os
import sys
from pathlib import Path

import jax

from jaxrec.config import UserError, parse_cli
from jaxrec.run import Run, console
from jaxrec.systems import SYSTEMS


def main() -> int:
    """Runs every phase that isn't done yet. Returns the exit status: 2 after a mistake of the user."""
    try:
        config, path = parse_cli()
        if config.system not in SYSTEMS:
            raise UserError(
                f"configuration key 'system': there is no {config.system!r}; it is one of {', '.join(SYSTEMS)}"
            )
        keep_compiled_programs()
        SYSTEMS[config.system].train(Run.open(path, config), config)
    except UserError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    return 0


def keep_compiled_programs() -> None:
    """Compiled programs are kept between runs, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxrec" / "compiled"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(default)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    sys.exit(main())
