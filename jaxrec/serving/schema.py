"""Requests and answers: the fields of a line of a request file, and of the body of a POST."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from jaxrec.catalogue.predicates import parse_where
from jaxrec.config import UserError

MAX_K = 500
MAX_HISTORY = 100_000
MAX_LISTED = 10_000
"""The most item ids that a request may block or allow; use a filter for more."""
MAX_TEXT = 10_000
"""The most characters of an id or a name."""
MAX_QUERY = 10_000
"""The most characters of a query or a prefix; how much of it is read, the model decides."""
MAX_TIMEOUT = 600_000
"""The most milliseconds that a request may wait."""
MAX_SENTENCE = 500
"""The most characters of an error, which may quote the request."""
HALF = "holds half a character (a lone surrogate); give whole ones"
NESTED = "this is no JSON: nested too deeply"
MILLISECONDS = 100_000_000_000
"""The year 5138 in seconds; a larger time is in milliseconds."""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "is empty; give the typed text, or leave it out")
    return text


# The length makes pydantic read the text as Unicode; without it a lone surrogate would pass.
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Query = Annotated[str, StringConstraints(max_length=MAX_QUERY), AfterValidator(_not_blank)]
Prefix = Annotated[str, StringConstraints(max_length=MAX_QUERY)]


def _to_seconds(value: Any) -> Any:
    """The seconds of a time written as ISO 8601; UTC without a zone. Any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        time = datetime.fromisoformat(value.strip())
    except ValueError as error:
        form = "is no time; give seconds since 1970, or a time such as 2024-05-31T18:00:00+02:00"
        raise PydanticCustomError("no_time", form) from error
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() // 1)


Seconds = Annotated[
    int, Field(ge=0, lt=MILLISECONDS, strict=True), BeforeValidator(_to_seconds, json_schema_input_type=int | str)
]


class NoJsonError(UserError):
    """The text of a request can't be parsed."""


class Event(BaseModel):
    """An event of a user, or a search: an entry with a query and without an item."""

    model_config = ConfigDict(extra="forbid")

    item_id: Text | None = Field(None, description="An item of the catalogue that the run was trained on.")
    behavior: Text | None = Field(None, description="Default: the weakest behavior that counts as a target.")
    timestamp: Seconds | None = Field(
        None,
        description="Seconds since 1970, or ISO 8601 (UTC without a zone); events of one timestamp are one session. "
        "Give it for all or for none.",
    )
    query: Query | None = Field(
        None,
        description="Without item_id: a search of the user. With it: the query of the search that led to the event.",
    )


class Request(BaseModel):
    """A user that the run knows, or a history given inline, oldest first. Product search adds a query, query suggestion
    a prefix."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"user_id": "123", "k": 10},
                {"history": [{"item_id": "1003037"}, {"item_id": "1007082"}], "k": 5, "exclude_history": True},
                {
                    "user_id": "123",
                    "filter": {"category": ["shoes", "bags"], "price": {"min": 5, "max": 20}, "in_stock": True},
                    "blocked": ["1003037"],
                },
                {"history": [{"query": "boots"}, {"item_id": "1003037", "query": "boots"}], "query": "rain boots"},
            ]
        },
    )

    user_id: Text | None = Field(None, description="A user of the run; one that it does not know gets popular items.")
    history: Annotated[list[Event], Field(max_length=MAX_HISTORY)] | None = None
    query: Query | None = Field(None, description="The query that items are wanted for, as typed.")
    prefix: Prefix | None = Field(
        None, description="The typed prefix that queries are wanted for, as typed; empty: what the user may look for."
    )
    profile: dict[Text, Text | None] | None = Field(
        None, description="What is known of the user, by column, of a run whose model reads it; default: of the log."
    )
    k: int = Field(10, ge=1, le=MAX_K, strict=True, description="The most items or texts wanted.")
    exclude_history: bool = Field(
        False,
        strict=True,
        description="Leave out what the user already had. Its earlier name, exclude_seen, is accepted too.",
        validation_alias=AliasChoices("exclude_history", "exclude_seen"),
    )
    filter: dict[str, Any] | None = Field(
        None,
        description="Columns of the items table that have to match, all of them: a value, a list of values, or bounds "
        '{"min": 5, "max": 20}, which are included. A missing value never matches.',
    )
    blocked: Annotated[list[Text], Field(max_length=MAX_LISTED)] | None = Field(
        None, description="Item ids that are left out."
    )
    allowed: Annotated[list[Text], Field(max_length=MAX_LISTED)] | None = Field(
        None, description="The only item ids that may come; an empty list allows none."
    )
    now: Seconds | None = Field(
        None,
        description="When the user asks, in seconds since 1970 or as ISO 8601, such as 2024-05-31T18:00:00+02:00 (UTC "
        "without a zone). Default: the end of the log.",
    )

    searches: Annotated[list[Query], Field(max_length=MAX_HISTORY)] | None = Field(
        None, description="The user's searches, oldest first, in place of user_id and history."
    )
    mode: Literal["own"] | None = Field(
        None, description="own: the user's own searches that begin with the prefix, without the model."
    )
    timeout_ms: int | None = Field(
        None,
        ge=1,
        le=MAX_TIMEOUT,
        strict=True,
        description="Over HTTP: milliseconds after which the answer is of no use; a late one is status 504.",
    )
    priority: Literal["batch"] | None = Field(
        None, description="Over HTTP: batch: after the requests of those who wait for a page."
    )

    @field_validator("filter")
    @classmethod
    def _a_filter(cls, conditions: dict[str, Any] | None) -> dict[str, Any] | None:
        if conditions is not None:
            parse_where(conditions)
        return conditions

    @model_validator(mode="after")
    def _one_source(self) -> "Request":
        if self.searches is not None and self.user_id is None and self.history is None:
            self.history, self.searches = [Event(query=query) for query in self.searches], None
        elif self.searches is not None:
            raise ValueError("searches stand in place of user_id and history; leave these out")
        elif (self.user_id is None) == (self.history is None):
            raise ValueError("give either user_id or history")
        if self.query is not None and self.prefix is not None:
            raise ValueError("give either query or prefix")
        for place, event in enumerate(self.history or ()):
            if event.item_id is None:
                _check_search(place, event)
        timed = {event.timestamp is not None for event in self.history or ()}
        if len(timed) == 2:
            raise ValueError("some events of the history have a timestamp and some have none; give it for all or none")
        return self

    @property
    def has_query(self) -> bool:
        """Whether the request or its history holds a query or a prefix."""
        asked = self.query is not None or self.prefix is not None
        return asked or any(event.query is not None for event in self.history or ())


class SearchRequest(Request):
    """A query, and who asks: a user that the run knows, or a history given inline. For one who is unknown, give an
    empty history."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "123", "query": "rain boots", "k": 10},
                {"history": [], "query": "rain boots", "filter": {"price": {"max": 20}}},
                {"history": [{"query": "boots"}, {"item_id": "1003037", "query": "boots"}], "query": "rain boots"},
            ]
        },
    )

    query: Query = Field(description="The query that items are wanted for, as typed.")
    prefix: SkipJsonSchema[Prefix | None] = None


def _check_search(place: int, event: Event) -> None:
    """Raises ValueError unless an entry of a history without an item is a search."""
    if event.query is None:
        raise ValueError(f"history[{place}].item_id is missing")
    if event.behavior is not None:
        raise ValueError(f"history[{place}].behavior is given without an item_id; leave it out of a search")


class Item(BaseModel):
    """One recommended item."""

    item_id: str
    title: str
    score: float = Field(description="The model's log-probability of the item's ID; for popular items, their count.")


class GeneratedText(BaseModel):
    """One generated text."""

    text: str
    score: float = Field(
        description="The model's log-probability of the text; for popular texts and own searches, their count."
    )
    vetted: bool = Field(False, description="It is one of the list.")
    own: bool = Field(False, description="The user searched for it before.")


class Answer(BaseModel):
    """The answers, best first: items or, of a run that generates texts, texts."""

    items: list[Item] | None = Field(None, description="Of a run that answers with items.")
    texts: list[GeneratedText] | None = Field(None, description="Of a run that answers with texts.")
    source: Literal["model", "popular", "own"] = Field(
        description="popular: nothing is known about this user; own: the user's own searches were asked for."
    )
    ignored: list[str] | None = Field(None, description="Item ids of the request that the catalogue does not know.")
    note: str | None = Field(None, description="Why there are no answers.")

    def to_json(self) -> str:
        """One line of JSON, without the fields that say nothing."""
        return self.model_dump_json(exclude_none=True)


def parse_request(line: str | bytes, kind: type[Request] = Request) -> Request:
    """A request of this kind from its JSON text.

    Raises:
      NoJsonError: it can't be parsed.
      UserError: one sentence with the error and its field.
    """
    try:
        return kind.model_validate_json(line)  # several times as fast as the code below, which explains errors
    except (ValidationError, RecursionError):
        pass
    value = _load_json(line)
    if not isinstance(value, dict):
        raise UserError('a request is a JSON object such as {"user_id": "123"}')
    try:
        if (path := _half_character(value)) is not None:
            raise UserError(_printable(f"{_place(path)} {HALF}"))
        return kind.model_validate(value)
    except ValidationError as error:
        raise UserError(_printable(_explain(error.errors()[0]))) from error
    except RecursionError as error:
        raise NoJsonError(NESTED) from error


def _load_json(line: str | bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise NoJsonError("this is no UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise NoJsonError(f"this is no JSON: {error.msg}") from error
    except RecursionError as error:
        raise NoJsonError(NESTED) from error
    except ValueError as error:  # Python's limit on the digits of integers
        raise NoJsonError("this is no JSON that can be read: a number has thousands of digits") from error


def _explain(error: dict[str, Any]) -> str:
    """One of pydantic's errors as one sentence that names the field."""
    path = error["loc"]
    where = _place(path)
    match error["type"]:
        case "extra_forbidden":
            known = ", ".join((Event if path[0] == "history" else Request).model_fields)
            return f"unknown field {where}; known are {known}"
        case "missing":
            return f"{where} is missing"
        case "value_error":
            return str(error["ctx"]["error"])
        case "string_unicode":
            return f"{where} {HALF}"
        case "blank" | "no_time":
            return f"{where} {error['msg']}"
        case "less_than" if path[-1] in ("timestamp", "now"):
            return f"{where} is {_shown(error['input'])}, which looks like milliseconds; give seconds since 1970"
    return f"{where} {error['msg'].removeprefix('Input ')}, not {_shown(error['input'])}"


def _place(path: Sequence[str | int]) -> str:
    """`history[0].item_id`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part[:100]}" for part in path).lstrip(".")


def _half_character(value: Any) -> tuple[str | int, ...] | None:
    """The path to the first text or name with a lone surrogate in JSON values."""
    if isinstance(value, str):
        return None if _is_unicode(value) else ()
    if isinstance(value, dict) and (halves := [(name,) for name in value if not _is_unicode(name)]):
        return halves[0]
    parts = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    found = ((name, _half_character(part)) for name, part in parts)
    return next(((name, *path) for name, path in found if path is not None), None)


def _shown(value: Any) -> str:
    try:
        return json.dumps(value, default=str)[:60]
    except (RecursionError, ValueError):
        return f"this {type(value).__name__}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(sentence: str) -> str:
    """A sentence made safe for UTF-8, whatever it quotes, and truncated."""
    sentence = sentence.encode("utf-8", "backslashreplace").decode()
    return sentence if len(sentence) <= MAX_SENTENCE else f"{sentence[:MAX_SENTENCE]}..."
