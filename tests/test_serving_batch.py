"""Batch files and the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from serving_run import NextInLine, write_run

from jaxrec.config import UserError
from jaxrec.serving import batch
from jaxrec.serving.batch import Summary, answer_file
from jaxrec.serving.retriever import Retriever

ROOT = Path(__file__).parent.parent


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


def test_many_chunks_give_what_one_request_at_a_time_gives(tmp_path, retriever, monkeypatch):
    monkeypatch.setattr(batch, "LINES_AT_ONCE", 8)
    requests = [
        {"history": [{"item_id": "abcde"[n % 5]}], "k": 1 + n % 4, "exclude_seen": n % 2 == 0} for n in range(37)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    answer_file(retriever, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
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
        (["nowhere", "--http", "localhost"], "error: --http localhost: give HOST:PORT"),
    ],
)
def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path, arguments, message):
    command = [sys.executable, str(ROOT / "serve.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith(message) and "Traceback" not in done.stderr
