import subprocess
import sys
import time

from rich.console import Console

from jaxrec import console as console_module
from jaxrec.config import UserError
from jaxrec.console import PlainProgress, progress, report_user_errors, track


def test_user_errors_have_no_traceback(capsys):
    def main() -> None:
        raise UserError("items.csv, row 3: no price")

    assert report_user_errors(main) == 2
    assert capsys.readouterr().err == "error: items.csv, row 3: no price\n"
    assert report_user_errors(lambda: None) == 0


def test_a_reader_who_leaves_early_is_no_error():
    code = "import sys\nfrom jaxrec.console import report_user_errors\n"
    code += "sys.exit(report_user_errors(lambda: [print('x' * 99) for _ in range(10**5)] and None))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_track_yields_everything(capsys):
    assert list(track([3, 1, 2], "numbers")) == [3, 1, 2]
    assert list(track((n for n in range(3)), "numbers", total=3)) == [0, 1, 2]
    # What is quick prints nothing where there is no terminal.
    assert capsys.readouterr().out == ""


def test_plain_progress_prints_now_and_then(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with PlainProgress(("loss {task.fields[loss]:.2f}",), interval=10) as bars:
        task = bars.add_task("train", total=40, completed=10, loss=3.0)
        for _ in range(10):
            now += 3
            bars.update(task, advance=1, loss=1.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train: 14/40, loss 1.50, 12 s, 78 s left"
    assert lines[-1] == "train: 20/40, loss 1.50, 30 s, 60 s left"
    assert len(lines) == 3


def test_a_terminal_gets_bars(monkeypatch):
    monkeypatch.setattr(console_module, "console", Console(force_terminal=True, quiet=True))
    with progress("loss {task.fields[loss]:.2f}") as bars:
        task = bars.add_task("train", total=2, loss=1.0)
        bars.update(task, completed=2, loss=0.5)
        assert bars.finished
