"""Times of requests: Unix seconds, or ISO 8601 as a log writes them."""

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.serving.schema import Request, parse_request

ZONES = st.integers(-12 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
TIMES = st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1), timezones=ZONES)


@settings(deadline=None)
@given(TIMES)
def test_a_time_with_a_zone_is_its_second(time):
    request = parse_request(json.dumps({"user_id": "1", "now": time.isoformat()}))
    assert request.now == (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)


@pytest.mark.parametrize(
    "time", [1717171200, "2024-05-31T18:00:00+02:00", "2024-05-31T16:00:00.9Z", "2024-05-31 16:00", "20240531T160000Z"]
)
def test_now_and_timestamps_are_read_alike(time):
    line = json.dumps({"history": [{"item_id": "a", "timestamp": time}], "now": time})
    request = parse_request(line)
    assert request.now == request.history[0].timestamp == 1717171200


@pytest.mark.parametrize("time", ["yesterday", "1717171200", "31.05.2024", "", "2024-13-01"])
def test_other_texts_are_no_times(time):
    with pytest.raises(UserError, match=r"history\[0\]\.timestamp is no time; give seconds since 1970, or a time such"):
        parse_request(json.dumps({"history": [{"item_id": "a", "timestamp": time}]}))
    with pytest.raises(UserError, match=r"now is no time"):
        parse_request(json.dumps({"user_id": "a", "now": time}))


def test_the_schema_says_so():
    kinds = [each.get("type") for each in Request.model_json_schema()["properties"]["now"]["anyOf"]]
    assert kinds == ["integer", "string", "null"]
