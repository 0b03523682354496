"""`make bench`: a benchmark that says what it needs is passed over, one that crashes is not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDS = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    + """
from jaxrec.config import UserError
from jaxrec.console import report_user_errors

def main():
    raise UserError("give --data")

sys.exit(report_user_errors(main))
"""
)


@pytest.mark.parametrize(
    ("crash", "status"), [("1 / 0", 1), ("import os; os.kill(os.getpid(), 11)", 139)], ids=["traceback", "signal"]
)
def test_make_bench_tells_a_crash_from_what_is_missing(tmp_path, crash, status):
    for name in ("requirements.lock", "requirements-nodeps.lock"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    benchmarks = tmp_path / "benchmarks"
    benchmarks.mkdir()
    for name, code in {"c_fine": "print('{\"row\": 1}')", "a_needs": NEEDS}.items():
        (benchmarks / f"{name}.py").write_text(code)

    # A suite that `make test` started hands its own make's flags on, with which this one says what folder it enters.
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in outer}

    def bench() -> subprocess.CompletedProcess:
        return subprocess.run(["make", "bench"], cwd=tmp_path, capture_output=True, text=True, env=environment)

    done = bench()
    assert (done.returncode, done.stdout) == (0, '{"row": 1}\n'), done.stderr
    assert "error: give --data\n   (not run)\n== benchmarks/c_fine.py" in done.stderr
    (benchmarks / "b_crashes.py").write_text(crash)
    done = bench()
    assert (done.returncode == 0, done.stdout) == (False, '{"row": 1}\n'), "the others are run all the same"
    assert f"(crashed with status {status})" in done.stderr
    assert "\ncrashed: benchmarks/b_crashes.py\n" in done.stderr
