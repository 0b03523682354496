"""Batch files and the command line."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import onemall_parts as parts
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_run import LINES, NextInLine, write_run

from jaxrec.config import UserError
from jaxrec.serving import batch
from jaxrec.serving.batch import Summary, answer_file
from jaxrec.serving.retriever import Retriever
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender

ROOT = Path(__file__).parent.parent
WINDOW = 16


@pytest.fixture
def retriever(tmp_path):
    return Retriever(write_run(tmp_path / "run"), NextInLine())


def test_lines_are_answered_in_order_and_bad_ones_in_their_place(tmp_path, retriever):
    lines = [
        b'{"user_id": "u1", "k": 1}',
        b"{oops",
        b"",
        b'{"user_id": "stranger", "k": 1}',
        b"\xff",
        b'{"history": [{"item_id": "a", "behavior": "glance"}]}',
        b'{"history": [{"item_id": "zz"}, {"item_id": "b"}], "k": 1}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    summary = answer_file(retriever, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert summary == Summary(answered=3, popular=1, bad=4)
    assert answers[0] == {"items": [{"item_id": "d", "title": "Title d", "score": 0.0}], "source": "model"}
    assert [answer.get("line") for answer in answers] == [None, 2, 3, None, 5, 6, None]
    assert answers[1]["error"].startswith("this is no JSON") and "glance" in answers[5]["error"]
    assert answers[3]["source"] == "popular" and answers[3]["items"][0]["item_id"] == "b"
    assert answers[6]["items"][0]["item_id"] == "c" and answers[6]["ignored"] == ["zz"]
    assert not (tmp_path / "out.jsonl.partial").exists()


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(LINES.map(lambda line: line.replace(b"\n", b" ")), max_size=6))
def test_any_bytes_are_a_file_of_requests(fuzzed, lines):
    """What no line can be is the end of the others."""
    good = b'{"user_id": "u1", "k": 1}'
    (fuzzed / "in.jsonl").write_bytes(b"\n".join([good, *lines, good]))
    summary = answer_file(Retriever(fuzzed / "run", NextInLine()), fuzzed / "in.jsonl", fuzzed / "out.jsonl")
    answers = [json.loads(line) for line in (fuzzed / "out.jsonl").read_bytes().splitlines()]
    assert len(answers) == len(lines) + 2 == summary.answered + summary.bad
    assert answers[0] == answers[-1] and answers[0]["items"][0]["item_id"] == "d"
    assert all(("items" in answer) != ("error" in answer and answer["line"] > 1) for answer in answers)
    assert not any("the log says why" in answer.get("error", "") for answer in answers)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    write_run(folder / "run")
    return folder


def test_a_fault_of_ours_costs_one_line(tmp_path, retriever, monkeypatch, caplog):
    parse = batch.parse_request
    monkeypatch.setattr(batch, "parse_request", lambda line: 1 / 0 if b"u2" in line else parse(line))
    (tmp_path / "in.jsonl").write_text('{"user_id": "u2"}\n{"user_id": "u1"}\n')
    assert answer_file(retriever, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == Summary(1, 0, 1)
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert first == {"line": 1, "error": "this line can't be read: ZeroDivisionError; the log says why"}
    assert "division by zero" in caplog.text


def test_many_windows_give_what_one_request_at_a_time_gives(tmp_path, retriever):
    requests = [
        {"history": [{"item_id": "abcde"[n % 5]}], "k": 1 + n % 4, "exclude_history": n % 2 == 0} for n in range(37)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    answer_file(retriever, tmp_path / "in.jsonl", tmp_path / "out.jsonl", window_lines=8)
    expected = [answer.to_json() for request in requests for answer in retriever.answer([batch.Request(**request)])]
    assert (tmp_path / "out.jsonl").read_text().splitlines() == expected


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file(tmp_path, retriever, content):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"in.jsonl holds no requests; write one JSON object a line"):
        answer_file(retriever, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_paths_that_can_not_work(tmp_path, retriever):
    with pytest.raises(UserError, match="can't be read: No such file"):
        answer_file(retriever, tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    (tmp_path / "in.jsonl").write_text('{"user_id": "u1"}\n')
    with pytest.raises(UserError, match="are the same file"):
        answer_file(retriever, tmp_path / "in.jsonl", tmp_path / "in.jsonl")
    with pytest.raises(UserError, match="there is no folder"):
        answer_file(retriever, tmp_path / "in.jsonl", tmp_path / "none" / "out.jsonl")
    assert (tmp_path / "in.jsonl").read_text() == '{"user_id": "u1"}\n'


@pytest.mark.parametrize(
    ("out", "folder", "message"),
    [
        ("out", "out", "out is a folder; give the path of a file in it"),
        (".", ".", "is a folder; give the path of a file in it"),
        ("out", "out.partial", "out.partial can't be written: Is a directory; give another --out"),
        ("out", "out.partial.json", "out.partial.json is there and no file; give another --out"),
        ("out", ".out.partial.json.partial", ".partial is there and no file; give another --out"),
        ("o" * 300, ".", "can't be written: File name too long; give another --out"),
        ("o" * 240, ".", "can't be written: File name too long; give another --out"),
        ("pipe", ".", "--out pipe: pipe is there and no file; give another --out"),
    ],
)
def test_answers_without_a_place_are_refused_before_the_first(tmp_path, retriever, monkeypatch, out, folder, message):
    (tmp_path / "in.jsonl").write_text('{"user_id": "u1"}\n')
    (tmp_path / folder).mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(retriever, "answer", lambda *_, **__: pytest.fail("it answers"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=re.escape(message)):
        answer_file(retriever, tmp_path / "in.jsonl", Path(out))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_keeps_the_earlier_answers(tmp_path, retriever):
    (tmp_path / "in.jsonl").write_text('{"user_id": "u1"}\n' * 2000)
    (tmp_path / "out.jsonl").write_text("earlier\n")
    (tmp_path / "out.jsonl.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="the disk is full"):
        answer_file(retriever, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "earlier\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--requests", "a", "--out", "b"], "error: nowhere holds no run"),
        (["nowhere"], "error: give either --requests IN.jsonl with --out OUT.jsonl, or --http HOST:PORT"),
        (["nowhere", "--requests", "a"], "error: --requests and --out go together; give both"),
        (["nowhere", "--http", ":80", "--restart"], "error: --restart and --window are for --requests"),
        (["nowhere", "--requests", "a", "--out", "b", "--batch-size", "0"], "error: --batch-size 0: give a number"),
        (
            ["nowhere", "--requests", "a", "--out", "b", "--max-body", "2"],
            "error: --max-body is for --http; leave it out",
        ),
        (["nowhere", "--requests", "a", "--out", "b", "--log", "-"], "error: --log is for --http; leave it out"),
        (["nowhere", "b", "--requests", "a", "--out", "b"], "error: --requests are answered by one run; give one"),
        (["nowhere", "--http", "0.0.0.0:0"], "error: --http 0.0.0.0:0 is open to other machines: give a token with"),
        (["nowhere", "--http", ":0", "--token-file", "t"], "error: --token-file t can't be read: No such file"),
        ([], "error: give a run directory"),
        (["nowhere", "--http", ":80", "--max-waiting", "0"], "error: --max-waiting 0: give a number of 1 or more"),
        (["nowhere", "--http", ":80", "--max-body", "0"], "error: --max-body 0.0: give MiB above 0, such as 16"),
        (["nowhere", "--http", "localhost"], "error: --http localhost: give HOST:PORT"),
        (["nowhere", "--http", "a..b:80"], "error: --http a..b:80 can't be listened on: that is no host name"),
    ],
)
def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path, arguments, message):
    command = [sys.executable, str(ROOT / "serve.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith(message) and "Traceback" not in done.stderr


# ---- with a model ----------------------------------------------------------------------------------------------------


def write_model_run(path: Path) -> Path:
    """A run over the catalogue of onemall_parts, with users whose histories are of two length buckets."""
    write_run(path)
    histories = [parts.make_history(seed, events) for seed, events in enumerate([12, 2, 9, 3, 14, 1, 10, 16, 11, 4])]
    behavior = [parts.BEHAVIORS[code] for each in histories for code in each["behavior"]]
    events = {name: np.concatenate([each[name] for each in histories]) for name in ("item", "timestamp", "session")}
    users = np.repeat(np.arange(len(histories)), [len(each["item"]) for each in histories])
    tables = path / "tables"
    pq.write_table(pa.table({"user": users, "behavior": behavior, **events}), tables / "events.parquet")
    pq.write_table(pa.table({"user_id": [f"u{row}" for row in range(len(histories))]}), tables / "users.parquet")
    ids = [f"i{row}" for row in range(parts.ITEMS)]
    pq.write_table(pa.table({"item_id": ids, "title": ids, "count": range(parts.ITEMS)}), tables / "items.parquet")
    statistics = {"behaviors": parts.BEHAVIORS, "target_behaviors": ["purchase"]}
    (tables / "statistics.json").write_text(json.dumps(statistics))
    return path


def make_model() -> GenerativeRecommender:
    assembly = parts.make_assembly(dataclasses.replace(parts.MODEL, layers=1, queries=0))
    two_lengths = dataclasses.replace(parts.FEATURES, buckets=(3, 6))
    return GenerativeRecommender(assembly, parts.make_variables(assembly), two_lengths, DecodingConfig(8, 4))


def write_requests(path: Path, count: int) -> Path:
    """Users, inline histories, strangers and bad lines; of both depths and length buckets, `exclude_history` or not."""
    lines = []
    for number in range(count):
        request: dict = {"k": (3, 12)[number // 3 % 2], "exclude_history": number % 4 == 1}
        match number % 7:
            case 0:
                request["history"] = [{"item_id": f"i{(number + step) % 20}"} for step in range(number % 9)]
            case 1:
                request["user_id"] = "stranger"
            case 2:
                request["topk"] = 3
            case _:
                request["user_id"] = f"u{number % 10}"
        lines.append(json.dumps(request) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def model() -> GenerativeRecommender:
    return make_model()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """A folder with run/, in.jsonl of 100 lines, and out.jsonl made in one go."""
    folder = tmp_path_factory.mktemp("whole")
    retriever = Retriever(write_model_run(folder / "run"), model)
    answer_file(retriever, write_requests(folder / "in.jsonl", 100), folder / "out.jsonl", window_lines=WINDOW)
    return folder


def test_the_model_answers_as_one_request_at_a_time(model, whole):
    retriever = Retriever(whole / "run", model)
    lines = (whole / "in.jsonl").read_text().splitlines()
    answers = (whole / "out.jsonl").read_text().splitlines()
    assert len(answers) == len(lines) == 100
    for line, text in zip(lines[:30], answers, strict=False):
        if "topk" in line:
            assert "unknown field topk" in text
            continue
        (alone,), answer = retriever.answer([batch.parse_request(line)]), json.loads(text)
        assert [item["item_id"] for item in answer["items"]] == [item.item_id for item in alone.items]
        scores = [item["score"] for item in answer["items"]]
        np.testing.assert_allclose(scores, [item.score for item in alone.items], atol=2e-5)
    assert len(set(answers)) > 20, "requests differ"


@pytest.fixture
def compilations():
    """The names of what XLA compiles from here on."""
    names: list[str] = []

    def listen(event: str, _: float, **about: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_recompiles_after_the_first_window_of_every_shape(model, whole, tmp_path, compilations):
    retriever = Retriever(whole / "run", model)
    for window in (1, 100):  # batches of one, and of as many as there can be
        answer_file(retriever, whole / "in.jsonl", tmp_path / "out.jsonl", window_lines=window)
    compilations.clear()
    for window in (WINDOW, 7, 64):  # other windows, other rests: the same shapes
        answer_file(retriever, whole / "in.jsonl", tmp_path / "out.jsonl", window_lines=window)
        write_requests(tmp_path / "more.jsonl", 61)
        answer_file(retriever, tmp_path / "more.jsonl", tmp_path / "out.jsonl", window_lines=window)
    assert compilations == []
    deeper = Retriever(whole / "run", model)
    (tmp_path / "in.jsonl").write_text('{"user_id": "u1", "k": 60}\n')
    answer_file(deeper, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert len(compilations) == 1, "a new depth is one compilation, and is counted"


# ---- killed and gone on with -----------------------------------------------------------------------------------------

# The command, with the tests' model.
COMMAND = """
import sys, time
from pathlib import Path
from test_serving_batch import WINDOW, NextInLine, make_model
from jaxrec.console import report_user_errors
from jaxrec.serving import batch
from jaxrec.serving.retriever import Retriever
run, requests, out, kind, *flags = sys.argv[1:]
model = make_model() if kind == "model" else NextInLine()
if kind == "slow":
    recommend = model.recommend
    model.recommend = lambda *of, **also: (time.sleep(0.02), recommend(*of, **also))[1]
def main():
    retriever = Retriever(Path(run), model)
    print(batch.answer_file(retriever, Path(requests), Path(out), restart="--restart" in flags, window_lines=WINDOW))
sys.exit(report_user_errors(main))
"""


def start(run: Path, requests: Path, out: Path, kind: str, *flags: str, kill_at: str = "") -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAXREC_KILL_AT": kill_at}
    command = [sys.executable, "-c", COMMAND, *map(str, (run, requests, out, kind, *flags))]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_with_a_model_and_gone_on_with_it_gives_the_same_bytes(model, whole, tmp_path):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    killed = start(whole / "run", whole / "in.jsonl", out, "model", kill_at="answers:48")
    assert killed.wait(120) == -signal.SIGKILL, killed.stderr.read()
    assert len(partial.read_text().splitlines()) == 48 and not out.exists()
    assert json.loads((tmp_path / "out.jsonl.partial.json").read_text())["position"]["lines"] == 32
    with partial.open("a") as file:
        file.write('{"items": [{"item_id"')  # a line that was never finished
    summary = answer_file(Retriever(whole / "run", model), whole / "in.jsonl", out, window_lines=WINDOW)
    assert out.read_bytes() == (whole / "out.jsonl").read_bytes()
    assert summary.resumed == 32 and summary.answered + summary.bad == 100 and summary.bad == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl"]


def test_killed_anywhere_again_and_again_no_line_is_missing_or_double(tmp_path):
    run = write_run(tmp_path / "run")
    requests = [
        {"history": [{"item_id": "abcde"[n % 5]}, {"item_id": f"number {n}"}], "k": 1 + n % 4} for n in range(900)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in requests))
    out, seen = tmp_path / "out.jsonl", []
    for _ in range(3):
        process = start(run, tmp_path / "in.jsonl", out, "slow")
        notes, before = tmp_path / "out.jsonl.partial.json", seen[-1] if seen else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if notes.exists() and json.loads(notes.read_text())["position"]["lines"] > before:
                break
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL, process.stderr.read()
        seen.append(json.loads(notes.read_text())["position"]["lines"])
    assert 0 < seen[0] < seen[1] < seen[2] < 900
    summary = answer_file(Retriever(run, NextInLine()), tmp_path / "in.jsonl", out, window_lines=WINDOW)
    assert summary == Summary(answered=900, popular=0, bad=0, resumed=seen[2])
    assert [json.loads(line)["ignored"] for line in out.open()] == [[f"number {n}"] for n in range(900)]


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """A folder with run/, in.jsonl of 40 lines and the answers to the first 32."""
    write_run(tmp_path / "run")
    (tmp_path / "in.jsonl").write_text('{"user_id": "u1"}\n' * 40)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batch, "fault_point", lambda point: stop() if point == "noted:32" else None)
        go_on(tmp_path)
    return tmp_path


def stop():
    raise KeyboardInterrupt


def go_on(folder: Path, window_lines: int = 8, **options) -> Summary:
    retriever = Retriever(folder / "run", NextInLine())
    return answer_file(retriever, folder / "in.jsonl", folder / "out.jsonl", window_lines=window_lines, **options)


def test_interrupted_it_goes_on(unfinished):
    assert go_on(unfinished) == Summary(answered=40, popular=0, bad=0, resumed=32)
    assert len((unfinished / "out.jsonl").read_text().splitlines()) == 40


def change_requests(folder: Path) -> None:
    (folder / "in.jsonl").write_text('{"user_id": "u2"}\n' * 40)


def change_answers(folder: Path) -> None:
    path = folder / "out.jsonl.partial"
    path.write_text(path.read_text().replace("Title", "Tilte", 1))


def shorten_answers(folder: Path) -> None:
    os.truncate(folder / "out.jsonl.partial", 100)


def break_notes(folder: Path) -> None:
    (folder / "out.jsonl.partial.json").write_text('{"origin": {}}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            change_requests,
            "holds unfinished answers to other requests; give --restart to begin again, or another",
        ),
        (change_answers, "was changed since it was written"),
        (shorten_answers, "was changed since it was written"),
        (break_notes, "can't be understood"),
    ],
)
def test_what_does_not_belong_together_is_refused_until_restart(unfinished, change, message):
    change(unfinished)
    before = (unfinished / "out.jsonl.partial").read_bytes()
    with pytest.raises(UserError, match=message):
        go_on(unfinished)
    assert (unfinished / "out.jsonl.partial").read_bytes() == before
    assert go_on(unfinished, restart=True) == Summary(answered=40, popular=0, bad=0)
    assert len((unfinished / "out.jsonl").read_text().splitlines()) == 40


def test_other_settings_and_another_run_are_refused(unfinished):
    with pytest.raises(UserError, match="holds unfinished answers with other settings or versions"):
        go_on(unfinished, window_lines=16)
    config = unfinished / "run" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(UserError, match="holds unfinished answers of another run"):
        go_on(unfinished)


def test_two_processes_do_not_write_the_same_answers(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "in.jsonl").write_text('{"user_id": "u1"}\n' * 4000)
    first = start(run, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "slow")
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.jsonl.partial.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        with pytest.raises(UserError, match="another process is writing"):
            answer_file(Retriever(run, NextInLine()), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    finally:
        first.kill()
        first.wait(20)


# ---- windows ---------------------------------------------------------------------------------------------------------


def sizes_of_windows(lines: list[bytes], window_lines: int = 100) -> list[int]:
    windows = list(batch._windows(io.BytesIO(b"".join(lines)), 1, window_lines))
    sizes = [len(window.requests) for window in windows]
    assert [window.first for window in windows] == [1 + sum(sizes[:n]) for n in range(len(sizes))]
    assert windows[-1].end == sum(map(len, lines))
    return sizes


def test_a_window_ends_by_lines_by_items_or_by_bytes(monkeypatch):
    small, deep = b'{"user_id": "1"}\n', b'{"user_id": "1", "k": 500}\n'
    assert sizes_of_windows([small] * 250) == [100, 100, 50]
    monkeypatch.setattr(batch, "WINDOW_ITEMS", 1000)
    assert sizes_of_windows([small] * 5 + [deep] * 5) == [7, 2, 1]
    monkeypatch.setattr(batch, "WINDOW_BYTES", 3 * len(small))
    assert sizes_of_windows([small] * 7) == [3, 3, 1]


def test_a_line_without_end_is_bad_and_the_next_is_answered(tmp_path, retriever, monkeypatch):
    monkeypatch.setattr(batch, "MAX_LINE", 64)
    lines = [b'{"user_id": "u1", "k": 1}', b"[" * 1000, b"{" * 63, b'{"user_id": "u1", "k": 1}', b"[" * 64]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    assert answer_file(retriever, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == Summary(2, 0, 3)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer.get("line") for answer in answers] == [None, 2, 3, None, 5]
    assert [answer.get("error", "")[:18] for answer in answers] == [
        "",
        "the line is longer",
        "this is no JSON: E",
        "",
        "the line is longer",
    ]
