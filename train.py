"""Train a system from its configuration: `python train.py configs/onemall.py --run runs/a [--any.field VALUE ...]`.

The trainings of a system are named stages, in order: --until STAGE stops behind one, --only STAGE trains one alone.
A run directory whose training would be lost, because the data or the configuration have changed, is refused; with
--replace a new training is made beside the old one and takes its place when it is finished. --check reads the data,
checks the whole configuration against them and estimates time and memory; nothing is written.
"""

import sys
import warnings

from jaxrec.config import parse_cli, take_option
from jaxrec.console import report_user_errors
from jaxrec.programs import keep_compiled_programs
from jaxrec.run import Run
from jaxrec.systems import check, rehearse, train


def main() -> None:
    """Runs every phase and stage that isn't done yet."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--replace", "--check")]
    until, arguments = take_option(arguments, "--until", "the name of a stage")
    only, arguments = take_option(arguments, "--only", "the name of a stage")
    checks = "--check" in sys.argv
    config, path = parse_cli(arguments, needs_run=not checks)
    until, only = until or "", only or ""
    check(path, config, until, only)
    if checks:
        rehearse(config)
        return
    keep_compiled_programs()
    # Libraries announce what they will change one day; nobody who trains can act on it.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    train(Run.open(path, config, replace="--replace" in sys.argv), config, until=until, only=only)


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
