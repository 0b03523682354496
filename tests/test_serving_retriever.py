"""The retriever: who gets what, and what the model is asked."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_run import LINES, QUERY_REQUESTS, NextInLine, write_run

from jaxrec.config import UserError
from jaxrec.serving.retriever import AT_ONCE, Retriever, batch_sizes
from jaxrec.serving.schema import HALF, Answer, Request, parse_request


@pytest.fixture
def retriever(tmp_path):
    return Retriever(write_run(tmp_path / "run"), NextInLine())


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return Retriever(write_run(tmp_path_factory.mktemp("fuzzed") / "run"), NextInLine())


def ask(retriever, **request):
    (answer,) = retriever.answer([Request(**request)])
    return answer


def ids(answer):
    return [item.item_id for item in answer.items]


def test_a_known_user_is_answered_by_the_model_from_all_he_did(retriever):
    answer = ask(retriever, user_id="u1", k=3)
    assert answer.source == "model" and ids(answer) == ["d", "e", "a"]
    assert [item.title for item in answer.items] == ["Title d", "Title e", "Title a"]
    assert [item.score for item in answer.items] == [0, -1, -2]
    history = retriever.recommender.histories[0]
    assert history["item"].tolist() == [0, 1, 2] and history["behavior"].tolist() == [0, 1, 1]
    assert history["timestamp"].tolist() == [100, 100, 200] and history["session"].tolist() == [0, 0, 1]
    assert history["now"] == 300, "asked at the end of the log"


def test_the_test_session_is_history_by_now(retriever):
    assert ids(ask(retriever, user_id="u2", k=1)) == ["a"]


@pytest.mark.parametrize("request_", [{"user_id": "stranger"}, {"user_id": "u3"}, {"history": []}])
def test_who_did_nothing_gets_popular_items_and_is_told(retriever, request_):
    answer = ask(retriever, **request_, k=3)
    assert answer.source == "popular" and ids(answer) == ["b", "c", "a"]
    assert [item.score for item in answer.items] == [9, 9, 3] and retriever.recommender.calls == []


def test_unknown_items_of_an_inline_history_are_ignored_and_listed(retriever):
    answer = ask(retriever, history=[{"item_id": "zzz"}, {"item_id": "d"}], k=2)
    assert answer.source == "model" and ids(answer) == ["e", "a"] and answer.ignored == ["zzz"]
    answer = ask(retriever, history=[{"item_id": "zzz"}, {"item_id": "yyy"}])
    assert answer.source == "popular" and answer.ignored == ["zzz", "yyy"]


def test_an_inline_history_without_times_keeps_its_order_one_session_an_event(retriever):
    ask(retriever, history=[{"item_id": "c"}, {"item_id": "a", "behavior": "exposure"}, {"item_id": "a"}])
    history = retriever.recommender.histories[0]
    assert history["item"].tolist() == [2, 0, 0] and history["session"].tolist() == [0, 1, 2]
    assert history["behavior"].tolist() == [1, 0, 1] and history["timestamp"].tolist() == [300] * 3


def test_an_inline_history_with_times_is_sorted_and_cut_into_sessions(retriever):
    events = [("a", 50), ("b", 20), ("c", 50), ("d", 900)]
    ask(retriever, history=[{"item_id": item, "timestamp": time} for item, time in events])
    history = retriever.recommender.histories[0]
    assert history["item"].tolist() == [1, 0, 2, 3] and history["session"].tolist() == [0, 1, 1, 2]
    assert history["now"] == 900
    ask(retriever, user_id="u1", now=1000)
    assert retriever.recommender.histories[0]["now"] == 1000


def test_a_model_trained_without_the_answers_time_is_not_told_when_it_is_asked(tmp_path):
    tables = write_run(tmp_path / "run") / "tables"
    statistics = json.loads((tables / "statistics.json").read_text())
    (tables / "statistics.json").write_text(json.dumps(statistics | {"answer_time": False}))
    retriever = Retriever(tmp_path / "run", NextInLine())
    ask(retriever, user_id="u1", now=1000)
    assert "now" not in retriever.recommender.histories[0]


def test_exclude_history_leaves_out_what_was_taken_and_short_rankings_stay_short(retriever):
    answer = ask(retriever, user_id="u1", exclude_history=True)
    assert ids(answer) == ["d", "e", "a"], "a was only shown to u1"
    assert answer.note is None


def test_exclude_history_was_exclude_seen():
    assert parse_request('{"user_id": "u1", "exclude_seen": true}') == Request(user_id="u1", exclude_history=True)
    with pytest.raises(UserError, match=r"known are .* exclude_history"):
        parse_request('{"user_id": "u1", "exclude": true}')


def test_answers_keep_the_order_of_mixed_requests_and_shapes_stay_few(retriever):
    requests, expected = [], []
    for number in range(150):
        if number % 7 == 0:
            requests.append(Request(user_id="stranger", k=1))
            expected.append(("popular", "b"))
        else:
            start = number % 5
            requests.append(
                Request(history=[{"item_id": "abcde"[start]}], k=1 + number % 90, exclude_history=number % 3 == 0)
            )
            expected.append(("model", "abcde"[(start + 1) % 5]))
    answers = retriever.answer(requests)
    assert [(answer.source, ids(answer)[0]) for answer in answers] == expected
    assert all(len(answer.items) <= request.k for answer, request in zip(answers, requests, strict=True))
    # Nobody but the model pads: it gets each request once.
    assert sum(size for size, _, _ in retriever.recommender.calls) == sum(number % 7 != 0 for number in range(150))
    assert max(size for size, _, _ in retriever.recommender.calls) <= AT_ONCE
    assert {k for _, k, _ in retriever.recommender.calls} == {5, 10, 50, 100}, "all 5 items where some are left out"


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, (1,)), (4, (1, 4)), (8, (1, 8)), (32, (1, 8, 32)), (100, (1, 8, 32, 100)), (256, (1, 8, 32, 128, 256))],
)
def test_few_sizes_up_to_the_largest_batch(most, sizes):
    assert batch_sizes(most) == sizes


def test_a_fault_of_ours_fails_its_request_alone(retriever, monkeypatch, caplog):
    history = retriever.history

    def faulty(request, version):
        if request.user_id == "u2":
            raise ZeroDivisionError("no fault of the user")
        return history(request, version)

    monkeypatch.setattr(retriever, "history", faulty)
    answers = retriever.answer([Request(user_id=user) for user in ("u1", "u2", "u1")])
    assert str(answers[1]) == "this request can't be answered: ZeroDivisionError; the log says why"
    assert answers[0] == answers[2] and ids(answers[0])[0] == "d" and "no fault of the user" in caplog.text


def test_an_unknown_behavior_fails_its_request_alone(retriever):
    bad = Request(history=[{"item_id": "a", "behavior": "glance"}])
    answers = retriever.answer([bad, Request(user_id="u1")])
    assert str(answers[0]) == "unknown behavior 'glance' in the history; known are exposure, purchase, coupon"
    assert answers[1].source == "model"


def test_a_folder_that_is_no_run_and_a_run_without_tables(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        Retriever(tmp_path / "nothing", NextInLine())
    path = write_run(tmp_path / "run")
    shutil.rmtree(path / "tables")
    with pytest.raises(UserError, match=r"items.parquet is missing; run train.py again"):
        Retriever(path, NextInLine())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "this is no JSON: Expecting property name enclosed in double quotes"),
        (b"\xff\xfe{", "this is no UTF-8 text"),
        ("", "this is no JSON: Expecting value"),
        ("[" * 100_000, "this is no JSON: nested too deeply"),
        ("[1]", 'a request is a JSON object such as {"user_id": "123"}'),
        ("{}", "give either user_id or history"),
        ('{"user_id": "1", "history": []}', "give either user_id or history"),
        ('{"user_id": 5}', "user_id should be a valid string, not 5"),
        ('{"user_id": "1", "k": 0}', "k should be greater than or equal to 1, not 0"),
        ('{"user_id": "1", "k": 501}', "k should be less than or equal to 500, not 501"),
        ('{"user_id": "1", "k": "7"}', 'k should be a valid integer, not "7"'),
        (
            '{"user_id": "1", "topk": 3}',
            "unknown field topk; known are user_id, history, query, prefix, profile, k, exclude_history, filter, "
            "blocked, allowed, now, searches, mode, timeout_ms, priority",
        ),
        (
            '{"history": [{"item": "a"}]}',
            "unknown field history[0].item; known are item_id, behavior, timestamp, query",
        ),
        (
            '{"history": [{"item_id": "a", "x": 1}]}',
            "unknown field history[0].x; known are item_id, behavior, timestamp, query",
        ),
        (
            '{"history": [{"item_id": "a"}, {"item_id": "b", "timestamp": 1700000000000}]}',
            "history[1].timestamp is 1700000000000, which looks like milliseconds; give seconds since 1970",
        ),
        (
            '{"user_id": "1", "now": "17"}',
            "now is no time; give seconds since 1970, or a time such as 2024-05-31T18:00:00+02:00",
        ),
        ('{"user_id": "1", "now": true}', "now should be a valid integer, not true"),
        (
            '{"history": [{"item_id": "a", "timestamp": 17.0}]}',
            "history[0].timestamp should be a valid integer, not 17.0",
        ),
        (
            f'{{"user_id": "1", "filter": {{"price": {{"min": 1{"0" * 400}}}}}}}',
            "filter.price.min has a number beyond 1.8e+308: give a smaller one",
        ),
        (
            f'{{"user_id": "1", "filter": {{"price": -1{"0" * 400}}}}}',
            "filter.price has a number beyond 1.8e+308: give a smaller one",
        ),
        (
            f'{{"user_id": "1", "k": {"9" * 5000}}}',
            "this is no JSON that can be read: a number has thousands of digits",
        ),
        ('{"history": [{"item_id": "\\ud800"}]}', f"history[0].item_id {HALF}"),
        ('{"user_id": "1", "filter": {"\\udfff": 3}}', f"filter.\\udfff {HALF}"),
        ('{"user_id": "1", "filter": {"category": ["shoes", "\\ud800"]}}', f"filter.category[1] {HALF}"),
        ('{"user_id": "1", "\\ud800": 1}', f"\\ud800 {HALF}"),
        (b'{"user_id": "\xed\xa0\x80"}', f"user_id {HALF}"),
        (f'{{"user_id": "1", "k": {"[" * 900}{"]" * 900}}}', "this is no JSON: nested too deeply"),
        ('{"history": [{}]}', "history[0].item_id is missing"),
        ('{"history": [{"item_id": "a"}, {"item_id": null}]}', "history[1].item_id is missing"),
        (
            '{"history": [{"query": "sh", "behavior": "click"}]}',
            "history[0].behavior is given without an item_id; leave it out of a search",
        ),
        ('{"user_id": "1", "query": ""}', "query is empty; give the typed text, or leave it out"),
        ('{"history": [{"query": "\\n"}]}', "history[0].query is empty; give the typed text, or leave it out"),
        ('{"user_id": "1", "query": "a", "prefix": "a"}', "give either query or prefix"),
        ('{"query": "a"}', "give either user_id or history"),
        ('{"user_id": "1", "query": 7}', "query should be a valid string, not 7"),
        ('{"user_id": "1", "query": ["a"]}', 'query should be a valid string, not ["a"]'),
        (
            f'{{"user_id": "1", "query": "{"x" * 10_001}"}}',
            f'query String should have at most 10000 characters, not "{"x" * 59}',
        ),
        (
            f'{{"history": [{{"query": "{"x" * 10_001}"}}]}}',
            f'history[0].query String should have at most 10000 characters, not "{"x" * 59}',
        ),
        ('{"user_id": "1", "prefix": "\\ud800"}', f"prefix {HALF}"),
        (b'{"user_id": "1", "query": "\xed\xa0\x80"}', f"query {HALF}"),
        ('{"history": [{"item_id": "a", "query": "\\udc00"}]}', f"history[0].query {HALF}"),
        (
            '{"history": [{"query": "a"}, {"item_id": "b", "timestamp": 17}]}',
            "some events of the history have a timestamp and some have none; give it for all or none",
        ),
        (
            '{"history": [{"item_id": "a"}, {"item_id": "b", "timestamp": 17}]}',
            "some events of the history have a timestamp and some have none; give it for all or none",
        ),
    ],
)
def test_one_sentence_for_every_bad_request(line, message):
    with pytest.raises(UserError) as error:
        parse_request(line)
    assert str(error.value) == message


@settings(max_examples=250, deadline=None)
@given(line=LINES)
def test_any_line_is_a_request_or_one_printable_sentence(line):
    try:
        request = parse_request(line)
    except UserError as error:
        assert 0 < len(str(error).encode()) < 2000 and "\n" not in str(error)
    else:
        assert parse_request(request.model_dump_json(exclude_none=True)) == request


@settings(max_examples=250, deadline=None)
@given(value=QUERY_REQUESTS)
def test_any_query_is_read_as_written_or_refused_in_one_sentence(value):
    """The rules once more, over the values: which requests with queries are good."""
    entries, typed = value["history"], [value.get("query"), value.get("prefix")]
    texts = [text for text in [*typed, *(entry.get("query") for entry in entries)] if text is not None]
    blank = isinstance(typed[1], str) and not typed[1].strip()  # nothing was typed yet
    checked = texts[1:] if blank and typed[0] is None else texts
    timed = {entry.get("timestamp") is not None for entry in entries}
    good = (
        all(text in ("sh", "shoes", " red", "x" * 1000) for text in checked)
        and None in typed
        and len(timed) < 2
        and all(entry.get("item_id") is not None or entry.get("query") is not None for entry in entries)
        and all(entry.get("item_id") is not None or entry.get("behavior") is None for entry in entries)
    )
    try:
        request = parse_request(json.dumps(value))
    except UserError as error:
        assert not good and 0 < len(str(error).encode()) < 2000 and "\n" not in str(error)
    else:
        assert good and [request.query, request.prefix] == typed
        assert [event.query for event in request.history] == [entry.get("query") for entry in entries]
        assert request.has_query == bool(texts)


QUERIES = [
    {"user_id": "u1", "query": "shoes"},
    {"user_id": "u1", "prefix": "sh"},
    {"user_id": "stranger", "query": "shoes"},
    {"history": [{"item_id": "a", "query": "shoes"}]},
    {"history": [{"item_id": "a"}, {"query": "shoes"}]},
    {"history": [], "prefix": "sh"},
]


def test_a_recommender_that_reads_no_query_refuses_it_and_answers_the_others(retriever):
    answers = retriever.answer([Request(user_id="u1"), *(Request(**query) for query in QUERIES), Request(user_id="u1")])
    assert answers[0] == answers[-1] and isinstance(answers[0], Answer)
    message = (
        "the system 'none' of this run reads no queries; leave query and prefix out of the request, and searches out "
        "of its history"
    )
    assert [str(answer) for answer in answers[1:-1]] == [message] * len(QUERIES)


def test_requests_without_queries_are_what_they_were():
    """The text of a request of an earlier version comes back byte for byte."""
    for text in (
        '{"user_id":"1","k":10,"exclude_history":false}',
        '{"history":[{"item_id":"a","behavior":"click","timestamp":17},{"item_id":"b","timestamp":18}],"k":3,'
        '"exclude_history":true,"filter":{"price":{"min":5}},"blocked":["x"],"allowed":[],"now":20}',
    ):
        request = parse_request(text)
        assert request.model_dump_json(exclude_none=True) == text and not request.has_query


@settings(max_examples=120, deadline=None)
@given(
    filters=st.dictionaries(
        st.sampled_from(["category", "price", "in_stock", "tags", "count", "title", "item_id", "none"]),
        st.sampled_from([True, "red", "", 0, -1, 2**63, -(2**70), 10**300, 1e300, 0.5, [], [1, 2**64], ["red", ""],
                         {"min": 2**70}, {"max": -1e300}, {"min": None}, {"min": -(10**308), "max": 10**308}]),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_any_filter_is_answered_or_refused_in_a_sentence(fuzzed, filters):
    (answer,) = fuzzed.answer([Request(user_id="stranger", filter=filters)])
    assert isinstance(answer, UserError | Answer)
    assert "the log says why" not in str(answer)


@pytest.mark.parametrize(
    "line",
    [
        '{"user_id": "1", "user_id": "2", "k": 3}',
        '{"history": [{"item_id": "é", "timestamp": 17, "behavior": null}], "exclude_history": true, "now": 20}',
        '\ufeff{"user_id": "1"}'.encode("utf-16-le"),
    ],
)
def test_a_good_request_is_what_json_says(line):
    """Whichever of the two parsers takes it; the last one is for the second."""
    assert parse_request(line) == Request.model_validate(json.loads(line))
