"""Train a system from its configuration: `python train.py configs/onemall.py --run runs/a [--any.field VALUE ...]`.

A run directory whose training would be lost, because the data or the configuration have changed, is refused; with
--replace a new training is made beside the old one and takes its place when it is finished.
"""

import sys
import warnings

from jaxrec.config import UserError, parse_cli
from jaxrec.programs import keep_compiled_programs
from jaxrec.run import Run, report_user_errors
from jaxrec.systems import SYSTEMS


def main() -> None:
    """Runs every phase that isn't done yet."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--replace"]
    config, path = parse_cli(arguments)
    if config.system not in SYSTEMS:
        known = ", ".join(SYSTEMS)
        raise UserError(f"configuration key 'system': there is no {config.system!r}; it is one of {known}")
    # Before the run directory is made: a configuration that is in it can't be changed any more.
    config.check()
    keep_compiled_programs()
    # Libraries announce what they will change one day; nobody who trains can act on it.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    SYSTEMS[config.system].train(Run.open(path, config, replace="--replace" in sys.argv), config)


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
