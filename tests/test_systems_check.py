"""`train.py --check` and sizes from the data: all is said and checked before any work, and nothing is written."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

import train
from jaxrec.config import UserError, load_config, parse_cli
from jaxrec.data.sources import Folder
from jaxrec.run import Run
from jaxrec.systems.phases import prepare_tables
from jaxrec.systems.sizes import sizes_of

SHOP = Path(__file__).parent.parent / "configs" / "shop.py"
DAY = 86_400
FLAGS = ["--data.columns", "item_id=Product ID", "title=Name", "--data.behaviors", "view=click", "buy=purchase"]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    goods = ["Product ID,Name,category,brand,price,Stock", *(f"{n},Thing {n},c{n % 3},b,{n}.5,{n}" for n in range(20))]
    log = ["user_id,Product ID,timestamp,behavior"]
    for user in range(10):
        for visit in range(3):
            log += [f"u{user},{(3 * user + visit) % 20},{visit * DAY + user},{what}" for what in ("view", "buy")]
    (folder / "goods.csv").write_text("\n".join(goods))
    (folder / "events.csv").write_text("\n".join(log))
    return folder


def run_train(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    train.main()


def test_the_check_says_everything_and_writes_nothing(export, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_train(monkeypatch, SHOP, "--data.path", export, *FLAGS, "--check", "--run", "runs/a")
    said = " ".join(capsys.readouterr().out.split())
    for part in ("item_id (Product ID), title (Name)", "read 60 rows of events.csv", "tested 10 of 10 users",
                 "sizes: steps 60", "codebooks (4, 4)", "estimate on this machine", "nothing was written"):  # fmt: skip
        assert part in said
    assert not list(tmp_path.iterdir()) and len(list(export.iterdir())) == 2


FAULTS = {
    "warm-up above the steps": (["--training.steps", "20", "--optim.warmup", "20"], "'optim.warmup' is 20, as long as"),
    "heads": (["--model.heads", "3"], "'model.heads' is 3; give a number that divides the width, 64"),
    "no column": (
        ["--attributes", "colour"],
        "the items have no column 'colour'; they have category, brand, price, Stock",
    ),
    "too many codes": (["--semantic-ids.hierarchy.sizes", "64"], "64"),
    "beams": (["--decoding.beam-widths", "3", "3"], "'decoding.beam_widths' has 2 numbers"),
    "monitor": (["--training.monitor", "luck"], "'luck' is not evaluated"),
    "unknown key": (["--model.widht", "64"], "did you mean 'model.width'"),
    "no behavior": (["--data.behaviors", "view=click"], "--data.target-behaviors click"),
    "a column that is not there": (["--data.columns", "item_id=SKU"], "there is no column 'SKU'|seems to be it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_whole_configuration_is_checked_before_any_work(export, monkeypatch, fault):
    flags, message = FAULTS[fault]
    given = [] if flags[0] == "--data.columns" else FLAGS[:3]
    given += [] if flags[0] == "--data.behaviors" else FLAGS[3:]
    with pytest.raises(UserError, match=message):
        run_train(monkeypatch, SHOP, "--data.path", export, *given, *flags, "--check")


def test_flags_hold_in_place_of_what_the_data_decide(export):
    args = [str(SHOP), "--data.path", str(export), *FLAGS, "--model.width", "96", "--run", "r"]
    config, run = parse_cli(args)
    sizes = sizes_of(20, 10, 10)
    assert (config.model.width, config.model.hidden, run) == (96, 2 * sizes.width, Path("r"))
    assert (config.batch_size, config.features.buckets) == (sizes.batch, sizes.buckets)
    assert config.training.steps == sizes.steps and config.data.behaviors == ("click", "purchase")
    with pytest.raises(UserError, match="--run is missing"):
        parse_cli(args[:-2])


def test_a_failed_first_try_locks_nothing(export, tmp_path):
    config = load_config(SHOP)
    first = dataclasses.replace(config, data=Folder(export, columns=("item_id=Product ID", "title=Name")), seed=3)
    run = Run.open(tmp_path / "run", first)
    with pytest.raises(UserError, match="'view' is none of"):
        prepare_tables(run, first)
    del run
    second = dataclasses.replace(first, data=dataclasses.replace(first.data, behaviors=("view=click", "buy=purchase")))
    second = dataclasses.replace(second, seed=4, batch_size=7)
    run = Run.open(tmp_path / "run", second)
    prepare_tables(run, second)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["batch_size"] == 7
    assert json.loads((tmp_path / "run" / "tables" / "statistics.json").read_text())["events"] == 60
    assert not list((tmp_path / "run").glob("*.partial"))
