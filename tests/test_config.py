"""Configuration files, the command line, JSON and fingerprints."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import pytest

import train
from jaxrec.config import UserError, differences, fingerprint, from_json, load_config, parse_cli, to_json
from jaxrec.models import sequential
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.systems.comparison import EvaluationConfig
from jaxrec.systems.rankgr import config as rankgr
from jaxrec.systems.rankgr.config import RankGRRunConfig
from jaxrec.systems.recommender import DecodingConfig
from jaxrec.systems.sequential.config import FullSoftmax, SampledSoftmax, SequentialConfig
from jaxrec.training.optim import OptimConfig

CONFIGS = Path(__file__).parent.parent / "configs"
CONFIG_FILE = '''
import dataclasses
from pathlib import Path

@dataclasses.dataclass(frozen=True)
class Folder:
    path: Path
    """The folder with the tables."""

@dataclasses.dataclass(frozen=True)
class Shop:
    size: int = 3
    """Number of items."""

@dataclasses.dataclass(frozen=True)
class Even:
    ways: int = 2
    """How many."""

@dataclasses.dataclass(frozen=True)
class Odd:
    times: int = 1
    """How often."""

@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 64
    """Model width."""
    codebook_sizes: tuple[int, ...] = (8, 4)
    """Codes per level."""
    dropout: float | None = None
    """Share of activations that are dropped."""
    moe: bool = True
    """Sparse feed-forward layers."""
    split: Even | Odd | None = Even()
    """What is done with the rest."""

@dataclasses.dataclass(frozen=True)
class Config:
    system: str = "onemall"
    """The system."""
    data: Folder | Shop = Shop()
    """Where the logs come from."""
    model: Model = Model()
    """The model."""

config = Config(model=Model(width=32))
'''


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "example.py"
    path.write_text(CONFIG_FILE)
    return path


def parse(config_file: Path, *args: str):
    return parse_cli([str(config_file), "--run", "runs/a", *args])


def test_the_file_gives_the_defaults(config_file):
    config, run = parse(config_file)
    assert run == Path("runs/a")
    assert (config.model.width, config.data.size) == (32, 3)


@pytest.mark.parametrize(
    ("args", "read"),
    [
        (["--model.width", "7"], lambda c: c.model.width == 7),
        (["--model.width=7"], lambda c: c.model.width == 7),
        (["--model.codebook-sizes", "5", "6", "7"], lambda c: c.model.codebook_sizes == (5, 6, 7)),
        (["--model.codebook_sizes", "5"], lambda c: c.model.codebook_sizes == (5,)),
        (["--model.dropout", "0.5"], lambda c: c.model.dropout == 0.5),
        (["--model.moe", "False"], lambda c: c.model.moe is False),
        (["--data.size", "9"], lambda c: c.data.size == 9),
        (["--data", "Folder", "--data.path", "x/y"], lambda c: c.data.path == Path("x/y")),
        (["--data.path=x", "--data=Folder"], lambda c: c.data.path == Path("x")),
        (["--model.split", "Odd", "--model.split.times", "4"], lambda c: c.model.split.times == 4),
        (["--model.split=None", "--model.width=3"], lambda c: (c.model.split, c.model.width) == (None, 3)),
    ],
)
def test_any_field_is_a_flag(config_file, args, read):
    assert read(parse(config_file, *args)[0])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.widht", "7"], "unknown configuration key 'model.widht'; did you mean 'model.width'?"),
        (["--modell.width=7"], "unknown configuration key 'modell.width'; did you mean 'model.width'?"),
        (["--zzzz", "1"], "unknown configuration key 'zzzz'; --help lists the keys"),
        (["--data.path", "x"], "'data' is Shop here, and the key belongs to Folder: add --data Folder"),
        (["--data", "Table"], "there is no 'Table' here, only Folder, Shop"),
        (["--model.split", "Half"], "'model.split': there is no 'Half' here, only Even, Odd, None"),
        (["--model.split.times", "2"], "'model.split' is Even here, and the key belongs to Odd: add --model.split Odd"),
        (["--model.split.thymes", "2"], "unknown configuration key 'model.split.thymes'"),
    ],
)
def test_unknown_keys_name_the_mend(config_file, args, message):
    with pytest.raises(UserError) as error:
        parse(config_file, *args)
    assert message in str(error.value)


def test_help_lists_fields_with_their_docstrings(config_file, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli([str(config_file), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--model.width" in text and "Model width. (default: 32)" in text and "Number of items." in text


def test_a_value_of_the_wrong_type_is_refused(config_file, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(config_file, "--model.width", "wide")
    assert stop.value.code == 2
    assert "--model.width" in capsys.readouterr().err


def test_a_missing_required_field_is_refused(config_file, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(config_file, "--data", "Folder")
    assert stop.value.code == 2
    assert "--data.path" in capsys.readouterr().err


def test_files_that_hold_no_configuration(config_file, tmp_path):
    with pytest.raises(UserError, match=r"no configuration file .*exmaple\.py; did you mean .*example\.py\?"):
        load_config(tmp_path / "exmaple.py")
    config_file.write_text("x = 1\n")
    with pytest.raises(UserError, match="defines no `config`"):
        load_config(config_file)
    config_file.write_text("x = 1\ny = (\n")
    with pytest.raises(UserError, match="line 2: this is no valid Python"):
        load_config(config_file)


def test_the_run_directory_is_asked_for(config_file):
    with pytest.raises(UserError, match="--run is missing"):
        parse_cli([str(config_file)])
    with pytest.raises(UserError, match="--run needs a directory"):
        parse_cli([str(config_file), "--run", "--model.width"])
    with pytest.raises(UserError, match="configuration file comes first"):
        parse_cli(["--run", "runs/a"])


@dataclasses.dataclass(frozen=True)
class Near:
    path: Path = Path("a")


@dataclasses.dataclass(frozen=True)
class Far:
    path: Path = Path("a")


@dataclasses.dataclass(frozen=True)
class Whole:
    kind: Literal["x", "y"] = "x"
    source: Near | Far = Far()
    more: tuple[Near | Far, ...] = (Near(), Far())
    pair: tuple[int, str] = (1, "b")
    maybe: Near | None = None
    rates: dict[str, float] = dataclasses.field(default_factory=lambda: {"b": 0.5})
    learning_rate: float = 1e-3


@pytest.mark.parametrize("whole", [Whole(), Whole(source=Near(Path("b/c")), maybe=Near(), more=())])
def test_json_gives_the_same_configuration_back(whole):
    again = from_json(Whole, to_json(whole))
    assert again == whole
    assert fingerprint(again) == fingerprint(whole)


def test_json_of_another_version_is_refused():
    values = to_json(Whole())
    with pytest.raises(UserError, match=r"'source\.depth'"):
        from_json(Whole, {**values, "source": {**values["source"], "depth": 1}})
    with pytest.raises(UserError, match="'learning_rate' is missing"):
        from_json(Whole, {name: value for name, value in values.items() if name != "learning_rate"})
    with pytest.raises(UserError, match="no type 'Farther'"):
        from_json(Whole, {**values, "source": {"type": "Farther", "path": "a"}})


def test_fingerprints_depend_on_values_alone():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    # The same fields in another class are another source.
    assert fingerprint(Whole(source=Near())) != fingerprint(Whole(source=Far()))
    assert fingerprint("a", "b") != fingerprint("ab")
    # Held for good: a changed digest would rebuild every run directory.
    assert fingerprint("tables", 1, (2.5, None)) == "616d002c8bd06b27"
    with pytest.raises(TypeError, match="object can't be written"):
        fingerprint(object())


def test_differences_name_nested_keys():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}
    assert list(differences(old, new)) == [("a.c", 2, 5), ("d", 3, None), ("e", None, 4)]


def test_argv_defaults_to_the_command_line(config_file, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", str(config_file), "--run", "r", "--model.width", "5"])
    assert parse_cli()[0].model.width == 5


# ---- numbers that make no sense --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OptimConfig(learning_rate=-1.0), "'optim.learning_rate' is -1.0; give 0 or more"),
        (lambda: OptimConfig(b1=2.0), "'optim.b1' is 2.0; give 0 or more, below 1"),
        (lambda: EvaluationConfig(split="foo"), "'evaluation.split' is 'foo'; give one of test, valid"),
        (lambda: EvaluationConfig(cutoffs=()), "'evaluation.cutoffs' is empty"),
        (lambda: EvaluationConfig(cutoffs=(0,)), "'evaluation.cutoffs' is (0,); give 1 or more"),
        (lambda: EvaluationConfig(shown_users=-1), "'evaluation.shown_users' is -1"),
        (lambda: DecodingConfig(likelihood_weight=float("nan")), "'decoding.likelihood_weight' is nan"),
        (lambda: DecodingConfig(beam_widths=(8, 0)), "'decoding.beam_widths' is (8, 0); give 1 or more"),
        (lambda: rankgr.RankGRObjective(alpha=float("inf")), "'objective.alpha' is inf"),
        (lambda: RankGRRunConfig(data=None, batch_size=0), "'batch_size' is 0; give 1 or more"),
        (lambda: RankGRRunConfig(data=None, seed=-1), "'seed' is -1"),
        (lambda: RankGRRunConfig(data=None, sessions_per_user=-1), "'sessions_per_user' is -1"),
        (lambda: RankGRRunConfig(data=None, validation=EvaluationConfig()), "'validation.split' is 'test'"),
        (lambda: SequentialConfig(data=None, validation=EvaluationConfig()), "'validation.split' is 'test'"),
        (lambda: sequential.SasRecConfig(dropout=1.5), "'model.dropout' is 1.5"),
        (lambda: sequential.Bert4RecConfig(masked=2.0), "'model.masked' is 2.0"),
        (lambda: sequential.CaserConfig(window=0), "'model.window' is 0"),
        (lambda: sequential.NextItNetConfig(kernel=0), "'model.kernel' is 0"),
        (lambda: sequential.HstuConfig(time_buckets=0), "'model.time_buckets' is 0"),
        (lambda: FullSoftmax(label_smoothing=2.0), "'objective.label_smoothing' is 2.0"),
        (lambda: SampledSoftmax(negatives=0), "'objective.negatives' is 0"),
        (lambda: EncoderDecoderConfig(heads=0), "'model.heads' is 0"),
    ],
)
def test_numbers_that_make_no_sense_are_named(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("file", "flags", "message"),
    [
        *((file, "--optim.warmup 50 --training.steps 50", r"'optim.warmup' is 50, as long as the training of 50; make")
          for file in ("mall.py", "mall_tiger.py", "mall_rankgr.py", "mall_sequential.py")),
        ("mall.py", "--align FinetuneConfig --align.training.steps 20", r"'align.optim.warmup' is 20, as long"),
        ("mall_tiger.py", "--training.evaluate-every 5 --training.monitor ndcg", r"'ndcg' is not evaluated; .*ndcg@10"),
        ("mall_sequential.py", "--training.evaluate-every 5 --training.monitor mrr@7", r"'mrr@7' is not evaluated"),
        ("mall_rankgr.py", "--pretrained nowhere", "'pretrained': there is no folder nowhere; give one with a Qwen2"),
        ("mall.py", "--until reward", "--until reward: there is no such stage; there are train"),
        ("mall.py", "--align FinetuneConfig --only reward", "--only reward: .*; there are alignment, train"),
        ("mall.py", "--until train --only train", "--until and --only exclude each other"),
        ("mall.py", "--until --only train", "--until needs the name of a stage"),
        ("mall_rankgr.py", "--features.weakest 9", r"'features.weakest' is 9, so that histories would hold nothing"),
        ("mall_onesearch.py", "--features.weakest 5", r"'features.weakest' is 5, so that nothing would count"),
        ("mall_onesearch.py", "--content.optim.warmup 24", r"'content.optim.warmup' is 24, as long"),
        ("mall_onesearch.py", "--co-occurrence.optim.warmup 24", r"'co_occurrence.optim.warmup' is 24, as long"),
        ("mall_rankgr.py", "--objective.smoothing 0.1", r"'objective.smoothing' is 0.1 and 'model.pointer' is on"),
        ("mall_rankgr.py", "--objective.levels 0 1", r"'objective.levels' is \(0, 1\); give one level from 0 for each"),
        ("mall_rankgr.py", "--objective.rank-from 9", r"'objective.rank_from' is 9; levels go from 0 to 3"),
        ("mall_rankgr.py", "--objective.level-weights 1 2", r"'objective.level_weights' is .* each of 4 levels"),
    ],
)  # fmt: skip
def test_contradictions_are_found_before_a_run_is_made(tmp_path, monkeypatch, file, flags, message):
    """Else the run directory would keep the configuration, and the mended one be refused as another's."""
    path, run = Path(__file__).parent / file, tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train.py", str(path), "--run", str(run), *flags.split()])
    with pytest.raises(UserError, match=message):
        train.main()
    assert not run.exists()


def test_the_decoding_may_change_without_a_new_training():
    """Validation keeps a copy of the one that the configuration file gives."""
    path = Path(__file__).parent / "mall.py"
    before, served = load_config(path), DecodingConfig(beam_width=16, batch_size=32)
    config, _ = parse_cli([str(path), "--run", "r", "--decoding.beam-width", "99", "--evaluation.max-users", "7"])
    assert (config.decoding.beam_width, config.validation_decoding) == (99, served)
    assert before.validation_decoding == served
    assert fingerprint(config.training_inputs()) == fingerprint(before.training_inputs())
    assert fingerprint(config.evaluation_inputs()) != fingerprint(before.evaluation_inputs())
    assert from_json(type(config), to_json(config)) == config
    wider, _ = parse_cli([str(path), "--run", "r", "--validation-decoding.beam-width", "99"])
    assert wider.decoding == served and wider.training_inputs() != before.training_inputs()
    # Where nothing is validated, it decides nothing.
    never = dataclasses.replace(before.training, evaluate_every=0)
    configs = [dataclasses.replace(each, training=never) for each in (before, wider)]
    assert configs[0].training_inputs() == configs[1].training_inputs()
    # The settings of one stage leave those of others out.
    assert set(before.training_inputs()) - set(before.training_inputs("optim")) == {"optim"}


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "configs").glob("*.py")), ids=lambda path: path.stem
)
def test_published_configurations_contradict_nothing(path):
    load_config(path).check()
