"""JD's micro-behaviours, on tiny files of the same layout."""

from collections import Counter

import pytest

from jaxrec.config import UserError, from_json, to_json
from jaxrec.data.prepare import PrepareConfig, prepare
from jaxrec.data.sources import JdMicro
from jaxrec.data.tables import Tables
from jaxrec.systems.onemall.config import OneMallConfig

#          search   detail    search    cart      order (after a pause of two hours)  home       cart
FIRST = "11+5+7+10+20 11+7+7+30+20 12+5+8+5+9 12+9+8+7200+9 12+10+8+60+3 13+1+7+0+2 13+9+7+99+2"
SECOND = "12+4+8+1+1 12+4+8+1+1"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a_sample.txt").write_text(f"{FIRST}\n\n{SECOND}\n{FIRST}\n")
    (tmp_path / "b_sample.txt").write_text(f"{FIRST}  \n9+6+1+4+4\n")
    (tmp_path / "README.md").write_text("not a session\n")
    return tmp_path


def events_of(source):
    events = source.load().events.order_by(["user_id", "timestamp", "kind"]).to_pyarrow().to_pylist()
    by_user = {}
    for event in events:
        by_user.setdefault(event["user_id"], []).append(event)
    return by_user


def test_events_by_hand(folder):
    first = events_of(JdMicro(folder))["a_sample.txt:1"]
    assert [(e["item_id"], e["timestamp"], e["behavior"], e["kind"], e["dwell_seconds"]) for e in first] == [
        ("11", 0, "click", "search", 20),
        ("11", 10, "detail", "specification", 20),
        ("12", 40, "click", "search", 9),
        ("12", 45, "cart", "cart", 9),
        ("12", 7245, "purchase", "order", 3),
        ("13", 7305, "cart", "cart", 2),  # both at one time, here in the order of their kinds' names
        ("13", 7305, "click", "home", 2),
    ]
    assert [e["session_id"] for e in first] == ["000000"] * 4 + ["000001"] * 3


def test_a_line_that_is_there_twice_is_one_user(folder):
    """In one file or in two, whatever blanks stand at its end."""
    raw = JdMicro(folder).load()
    users = Counter(raw.events.to_pyarrow()["user_id"].to_pylist())
    assert users == {"a_sample.txt:1": 7, "a_sample.txt:3": 2, "b_sample.txt:2": 1}
    assert raw.dropped == {"event of a repeated line": 14}
    assert raw.facts == {"lines": 3, "repeated_lines": 2}


def test_a_file_or_a_pattern_says_what_is_read(folder):
    assert set(events_of(JdMicro(folder / "b_sample.txt"))) == {"b_sample.txt:1", "b_sample.txt:2"}
    (folder / "c.log").write_text("1+2+3+4+5\n")
    assert set(events_of(JdMicro(folder, pattern="*.log"))) == {"c.log:1"}


def test_files_that_differ_by_ending_or_folder_are_different_users(tmp_path):
    (tmp_path / "more").mkdir()
    for place, name in enumerate(("day.1", "day.2", "more/day.1")):
        (tmp_path / name).write_text(f"{place}+1+1+5+1\n")
    users = events_of(JdMicro(tmp_path, pattern="**/day.*"))
    assert {user: [event["item_id"] for event in events] for user, events in users.items()} == {
        "day.1:1": ["0"], "day.2:1": ["1"], "more/day.1:1": ["2"],
    }  # fmt: skip


def test_items_are_titled_by_their_number(folder):
    items = JdMicro(folder).load().items.to_pyarrow().to_pylist()
    assert {item["item_id"] for item in items} == {"9", "11", "12", "13"}
    twelve = next(item for item in items if item["item_id"] == "12")
    assert twelve == {
        "item_id": "12", "title": "Product 12", "text": "Category 8", "category": "8", "brand": "", "price": None,
    }  # fmt: skip


def test_an_item_in_two_categories_is_in_the_one_seen_first(tmp_path):
    (tmp_path / "a.txt").write_text("5+1+30+1+1 5+1+20+1+1\n")
    (tmp_path / "b.txt").write_text("5+1+10+1+1\n")
    assert JdMicro(tmp_path).load().items.to_pyarrow()["category"].to_pylist() == ["30"]


def prepared(source, out):
    out.mkdir()
    statistics = prepare(source, PrepareConfig(), out)
    rows = Tables.read(out).events.to_pylist()
    return statistics, [(e["item_id"], e["behavior"], e["session"], e["split"]) for e in rows]


def test_leave_one_out_holds_out_a_cart_or_order_with_the_browsing_that_led_to_it(tmp_path):
    (tmp_path / "a.txt").write_text(FIRST + "\n")
    statistics, events = prepared(JdMicro(tmp_path), tmp_path / "out")
    assert events == [
        ("11", "click", 0, "train"),
        ("11", "detail", 0, "train"),
        ("12", "click", 0, "train"),
        ("12", "cart", 0, "train"),
        ("12", "purchase", 1, "valid"),
        ("13", "click", 2, "test"),  # of equal time, the weaker behavior first
        ("13", "cart", 2, "test"),
    ]
    assert statistics["target_sessions"] == 3 and statistics["test_users"] == 1
    assert statistics["events_by_behavior"] == {"click": 3, "detail": 1, "cart": 2, "purchase": 1}


def test_last_session_cuts_visits_at_long_pauses(tmp_path):
    visit = "1+5+1+1+1 1+9+1+{pause}+1"
    (tmp_path / "a.txt").write_text(" ".join(visit.format(pause=pause) for pause in (100, 101, 101, 0)))
    _, events = prepared(JdMicro(tmp_path, split="last_session", session_gap_seconds=100), tmp_path / "out")
    # The second cart of the first visit is a repeat inside it.
    assert events == [
        ("1", behavior, session, split)
        for session, split in enumerate(("train", "valid", "test"))
        for behavior in ("click", "cart")
    ]


def test_there_is_no_split_by_time(folder):
    with pytest.raises(UserError, match='no dates; set split to "leave_one_out" or "last_session"'):
        JdMicro(folder, split="time").load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1+5+1+1+1\n1+5+1+1\n", r"a\.txt, line 2: event 1, '1\+5\+1\+1', has 4 fields, not 5; write a session a line"),
        ("1+5+1+1+1 x\n", r"a\.txt, line 1: event 2, 'x', has 1 fields"),
        ("\n\n1+5+1+1+1 1+11+1+1+1\n", r"line 3: event 2, '1\+11\+1\+1\+1': there is no kind 11; kinds are 1 to 10"),
        ("1+0+1+1+1\n", r"there is no kind 0"),
        ("1+5+1+-3+1\n", r"its pause '-3' is no whole number"),
        ("1+5+1+2.5+1\n", r"its pause '2\.5' is no whole number"),
        ("a+5+1+2+1\n", r"its item 'a' is no whole number"),
        ("1+5++2+1\n", r"its category '' is no whole number"),
        ("1+5+1+2+9999999999999999999\n", r"its dwell '9999999999999999999' is no whole number"),
        ("\u0661+5+1+2+1\n", r"its item '\u0661' is no whole number"),
        ("1,5,1,2,1\n", r"has 1 fields"),
        ("", r"holds no sessions; write a session a line"),
        ("\n \n", r"holds no sessions"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        JdMicro(tmp_path).load()


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"1+5+1+1+1\n1+5+\xff+1+1\n")
    with pytest.raises(UserError, match=r"a\.txt, line 2: event 1, .* its category"):
        JdMicro(tmp_path).load()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf1+5+1+1+1\r\n")  # a mark at the start and ends of Windows are fine
    assert set(events_of(JdMicro(tmp_path))) == {"a.txt:1"}


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        JdMicro(tmp_path / "nowhere").load()
    with pytest.raises(UserError, match=r"has no file \*\.txt"):
        JdMicro(tmp_path).fingerprint()


def test_fingerprint_follows_content_and_not_the_place(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    first = JdMicro(folder).fingerprint()
    assert JdMicro(other).fingerprint() == first != JdMicro(folder, split="last_session").fingerprint()
    (folder / "a_sample.txt").write_text(SECOND + "\n")
    assert JdMicro(folder).fingerprint() != first


def test_a_configuration_may_name_it(folder):
    config = OneMallConfig(data=JdMicro(folder))
    assert from_json(OneMallConfig, to_json(config)) == config
