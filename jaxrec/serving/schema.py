"""Requests and answers: what a line of a request file, or the body of a POST, may say."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from jaxrec.config import UserError
from jaxrec.decoding.predicates import parse_where

MAX_K = 500
MAX_HISTORY = 100_000
MAX_LISTED = 10_000
"""Item ids that a request may block or allow; what is more is a filter."""
MILLISECONDS = 100_000_000_000
"""Seconds reach this in the year 5138; a larger time is in milliseconds."""


class Event(BaseModel):
    """One thing that a user did."""

    model_config = ConfigDict(extra="forbid")

    item_id: str = Field(description="An item of the catalogue that the run was trained on.")
    behavior: str | None = Field(None, description="Default: the weakest behavior that counts as a target.")
    timestamp: Annotated[int, Field(ge=0, lt=MILLISECONDS)] | None = Field(
        None, description="Seconds since 1970; events of one timestamp are one session. Give it for all or for none."
    )


class Request(BaseModel):
    """Who asks: a user that the run knows, or a history given inline, oldest first."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"user_id": "123", "k": 10},
                {"history": [{"item_id": "1003037"}, {"item_id": "1007082"}], "k": 5, "exclude_seen": True},
                {
                    "user_id": "123",
                    "filter": {"category": ["shoes", "bags"], "price": {"min": 5, "max": 20}, "in_stock": True},
                    "blocked": ["1003037"],
                },
            ]
        },
    )

    user_id: str | None = Field(None, description="A user of the run; one that it does not know gets popular items.")
    history: Annotated[list[Event], Field(max_length=MAX_HISTORY)] | None = None
    k: int = Field(10, ge=1, le=MAX_K, strict=True, description="The most items wanted.")
    exclude_seen: bool = Field(False, strict=True, description="Leave out what the user already had.")
    filter: dict[str, Any] | None = Field(
        None,
        description="Columns of the items table that have to match, all of them: a value, a list of values, or bounds "
        '{"min": 5, "max": 20}, which are included. A missing value never matches.',
    )
    blocked: Annotated[list[str], Field(max_length=MAX_LISTED)] | None = Field(
        None, description="Item ids that are left out."
    )
    allowed: Annotated[list[str], Field(max_length=MAX_LISTED)] | None = Field(
        None, description="The only item ids that may come; an empty list allows none."
    )
    now: Annotated[int, Field(ge=0, lt=MILLISECONDS)] | None = Field(
        None, description="When the user asks, in seconds since 1970. Default: the end of the log."
    )

    @field_validator("filter")
    @classmethod
    def _a_filter(cls, conditions: dict[str, Any] | None) -> dict[str, Any] | None:
        if conditions is not None:
            parse_where(conditions)
        return conditions

    @model_validator(mode="after")
    def _one_source(self) -> "Request":
        if (self.user_id is None) == (self.history is None):
            raise ValueError("give either user_id or history")
        timed = {event.timestamp is not None for event in self.history or ()}
        if len(timed) == 2:
            raise ValueError("some events of the history have a timestamp and some have none; give it for all or none")
        return self


class Item(BaseModel):
    """One recommended item."""

    item_id: str
    title: str
    score: float = Field(description="The model's log-probability of the item's ID; for popular items, their count.")


class Answer(BaseModel):
    """The items, best first."""

    items: list[Item]
    source: Literal["model", "popular"] = Field(description="popular: nothing is known about this user.")
    ignored: list[str] | None = Field(None, description="Item ids of the request that the catalogue does not know.")
    note: str | None = Field(None, description="Why there are no items.")

    def to_json(self) -> str:
        """One line of JSON; without `ignored` and `note` where there is nothing to say."""
        return self.model_dump_json(exclude_none=True)


def parse_request(line: str | bytes) -> Request:
    """A request from its JSON text.

    Raises:
      UserError: one sentence: what is wrong with it, and where.
    """
    try:
        return Request.model_validate_json(line)  # several times as fast as what follows, which can explain
    except ValidationError:
        pass
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError("this is no UTF-8 text") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"this is no JSON: {getattr(error, 'msg', 'nested too deeply')}") from error
    if not isinstance(value, dict):
        raise UserError('a request is a JSON object such as {"user_id": "123"}')
    try:
        return Request.model_validate(value)
    except ValidationError as error:
        raise UserError(explain(error.errors())) from error


def explain(errors: list[dict[str, Any]]) -> str:
    """The first of pydantic's errors as one sentence that names the field."""
    first = errors[0]
    path = [part for part in first["loc"] if part != "body"]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    match first["type"]:
        case "json_invalid":
            return f"this is no JSON: {first.get('ctx', {}).get('error', first['msg'])}"
        case "model_attributes_type" if not where:
            return 'a request is a JSON object such as {"user_id": "123"}'
        case "extra_forbidden":
            known = ", ".join((Event if path[0] == "history" else Request).model_fields)
            return f"unknown field {where}; known are {known}"
        case "missing" if where:
            return f"{where} is missing"
        case "missing":
            return "the request has no body"
        case "value_error":
            return str(first["ctx"]["error"])
        case "less_than" if path[-1] in ("timestamp", "now"):
            return f"{where} is {first['input']}, which looks like milliseconds; give seconds since 1970"
    message = first["msg"].removeprefix("Input ")
    return f"{where} {message}, not {json.dumps(first['input'], default=str)[:60]}"
