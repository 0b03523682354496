"""Systems: each puts the parts together for one published system, from a source to an evaluated run.

A system is a package of three files: `config.py` what decides a run, `model.py` the model fitted to a run's items,
`training.py` its losses, batches and stages. Every phase and stage reads what the ones before it wrote into the run
directory, is skipped when its inputs are unchanged, and can be killed and run again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jaxrec.config import UserError, fingerprint, from_json
from jaxrec.console import console
from jaxrec.evaluation import Recommender
from jaxrec.files import read_json
from jaxrec.run import Run
from jaxrec.systems import generative
from jaxrec.systems.check_data import Rehearsal, check_data
from jaxrec.systems.comparison import TrainedRecommender, compare, present
from jaxrec.systems.config import RunConfig
from jaxrec.systems.onemall import model as onemall_model
from jaxrec.systems.onemall import rehearsal as onemall_rehearsal
from jaxrec.systems.onemall import stages as onemall_stages
from jaxrec.systems.onemall.config import OneMallConfig
from jaxrec.systems.onesearch import model as onesearch_model
from jaxrec.systems.onesearch import reader as onesearch_reader
from jaxrec.systems.onesearch import stages as onesearch_stages
from jaxrec.systems.onesearch.config import OneSearchConfig
from jaxrec.systems.onesug import model as onesug_model
from jaxrec.systems.onesug import training as onesug_training
from jaxrec.systems.onesug.config import OneSugConfig
from jaxrec.systems.rankgr import model as rankgr_model
from jaxrec.systems.rankgr import training as rankgr_training
from jaxrec.systems.rankgr.config import RankGRRunConfig
from jaxrec.systems.ranking import cascade
from jaxrec.systems.ranking.config import CASCADE, CascadeConfig
from jaxrec.systems.sequential import model as sequential_model
from jaxrec.systems.sequential import training as sequential_training
from jaxrec.systems.sequential.config import NAMES, SequentialConfig
from jaxrec.systems.tiger import model as tiger_model
from jaxrec.systems.tiger import training as tiger_training
from jaxrec.systems.tiger.config import TigerConfig
from jaxrec.text.tokenizer import TextTokenizer
from jaxrec.training.stages import Stage, best_variables, check_names, run_stages


@dataclass(frozen=True)
class System:
    """What a system is made of; `train` and `load_recommender` do the rest."""

    config: type[RunConfig]
    """The class of its configuration."""
    assemble: Callable[[Run, Any], Any]
    """assemble(run, config): the model fitted to the items of a trained run."""
    stages: Callable[[Run, Any], tuple[Stage, ...]]
    """stages(run, config): its trainings in order; the last one is served."""
    recommender: Callable[[Any, dict, Any], TrainedRecommender] = generative.recommender
    """recommender(assembly, variables, config): the trained model, ready to recommend."""
    rehearse: Callable[[Any, dict[str, Any]], Rehearsal] | None = None
    """rehearse(config, counts): what a training takes on data with these counts, which its model is checked against;
    None: no estimate."""
    load_reader: Callable[[Path, Any, TextTokenizer], Any] | None = None
    """load_reader(folder, features, tokenizer): what the `reader` of its assembly saved, whose `read_texts` reads the
    texts of a history; None: its artefacts answer prepared histories alone."""


TIGER = System(TigerConfig, tiger_model.assemble, tiger_training.stages)
SEQUENTIAL = System(
    SequentialConfig, sequential_model.assemble, sequential_training.stages, sequential_model.recommender
)

SYSTEMS: dict[str, System] = {
    "onemall": System(
        OneMallConfig,
        onemall_model.assemble,
        onemall_stages.stages,
        onemall_stages.recommender,
        rehearse=onemall_rehearsal.rehearse,
    ),
    "onesearch": System(
        OneSearchConfig,
        onesearch_model.assemble,
        onesearch_stages.stages,
        onesearch_stages.recommender,
        load_reader=onesearch_reader.load_reader,
    ),
    "onesug": System(OneSugConfig, onesug_model.assemble, onesug_training.stages, onesug_model.recommender),
    "rankgr": System(RankGRRunConfig, rankgr_model.assemble_trained, rankgr_training.stages),
    CASCADE: System(CascadeConfig, cascade.assemble, cascade.stages, cascade.recommender),
    "tiger": TIGER,
    "forge": TIGER,
} | dict.fromkeys(NAMES, SEQUENTIAL)
"""By the name that a configuration gives as its `system`."""


def check(path: Path, config: RunConfig, until: str = "", only: str = "") -> None:
    """What can be refused before a run directory is made, of which a configuration then is part.

    Raises:
      UserError: the configuration contradicts itself, or its system has no stage of that name.
    """
    if config.system not in SYSTEMS:
        known = ", ".join(SYSTEMS)
        raise UserError(f"configuration key 'system': there is no {config.system!r}; it is one of {known}")
    config.check()
    check_names(SYSTEMS[config.system].stages(Run(path), config), until, only)


def rehearse(config: RunConfig) -> None:
    """Prints what a run of a configuration would read, be and take (`train.py --check`); nothing is written.

    Raises:
      UserError: the data can't be read, or the configuration doesn't fit them.
    """
    check_data(config, SYSTEMS[config.system].rehearse)


def train(run: Run, config: RunConfig, *, until: str = "", only: str = "") -> None:
    """Runs every phase and stage that is not done yet, and prints the comparison table when the last stage is trained.

    until, only: as `jaxrec.training.stages.run_stages`.
    """
    trained = run_stages(run, SYSTEMS[config.system].stages(run, config), until=until, only=only)
    if trained is None:
        console.print(f"the stage {until or only} is trained; the same command without it goes on", markup=False)
        return
    beside = config.evaluation.beside
    others = [read_json(path / Run(path).training / "fingerprint.json") for path in check_beside(run, beside)]

    def make(folder: Path) -> None:
        model = load_recommender(run)
        compare(run, model, config.evaluation, folder, load_beside(model, config.system, beside))

    run.phase("evaluation", fingerprint(trained, config.evaluation_inputs(), *others), make)
    present(run)


def check_beside(run: Run, paths: Sequence[Path]) -> Sequence[Path]:
    """The paths of runs whose models can be measured on the cases of this one: of the same items, users and behaviors.

    Raises:
      UserError: one is not finished, or of other tables.
    """
    for path in paths:
        other, _ = Run.load(path)
        other.check_trained()
        columns = {"items": "item_id", "users": "user_id"}
        same = all(
            pq.read_table(run.tables / f"{table}.parquet", columns=[column])
            .equals(pq.read_table(other.tables / f"{table}.parquet", columns=[column]))
            for table, column in columns.items()
        )  # fmt: skip
        behaviors = [read_json(each.tables / "statistics.json")["behaviors"] for each in (run, other)]
        if not same or behaviors[0] != behaviors[1]:
            raise UserError(
                f"configuration key 'evaluation.beside': {path} is of other items, users or behaviors than {run.path}; "
                "train both on the same data"
            )
    return paths


def load_beside(model: TrainedRecommender, system: str, paths: Sequence[Path]) -> dict[str, Recommender]:
    """The trained models of other runs by the names of their rows, each with its variants.

    Raises:
      UserError: one answers with texts where `model`, of `system`, answers with items, or it needs what was typed.
    """
    found: dict[str, Recommender] = {}
    mine = {system, *getattr(model, "variants", ())}
    for path in paths:
        run, values = Run.load(path)
        other = load_recommender(run)
        kinds = [each.space.kind if hasattr(each, "space") else "items" for each in (model, other)]
        needed = getattr(other, "required_text", None)
        if kinds[0] != kinds[1] or needed not in (None, getattr(model, "required_text", None)):
            needs = f"needs a {needed}" if kinds[0] == kinds[1] else f"answers with {kinds[1]}"
            raise UserError(f"configuration key 'evaluation.beside': the model of {path} {needs}; leave it out")
        for name, each in {str(values["system"]): other, **getattr(other, "variants", {})}.items():
            found[f"{name} of {Path(path).name}" if name in {*found, *mine} else name] = each
    return found


def load_recommender(run: Run) -> TrainedRecommender:
    """The trained model of a run, in its best state where it was validated, ready to recommend.

    Raises:
      UserError: the run is not trained yet, or on other data than are there, it is of an unknown system, or no
        checkpoint of it can be read.
    """
    _, values = Run.load(run.path)
    name = str(values.get("system"))
    if name not in SYSTEMS:
        raise UserError(f"{run.config_file}: unknown system {name!r}; known are {', '.join(SYSTEMS)}")
    run.check_trained()
    system = SYSTEMS[name]
    config = from_json(system.config, values)
    variables = best_variables(run.path / run.training)
    return system.recommender(system.assemble(run, config), variables, config)
