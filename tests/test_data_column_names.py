"""Hints for the names of columns: by the meaning of their words, never by their letters alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import UserError
from jaxrec.data.sources.column_names import flag_of, hints, parse_columns

KNOWN = {"items": ("item_id", "title"), "events": ("user_id", "item_id")}


@pytest.mark.parametrize(
    ("ours", "names", "hint"),
    [
        ("item_id", ["Title", "Product ID"], "Product ID"),
        ("item_id", ["Title", "Vendor"], ""),
        ("item_id", ["Product Category", "Vendor"], ""),  # it means the category
        ("item_id", ["itemID", "id_user"], "itemID"),
        ("user_id", ["userPseudoID", "Product ID"], "userPseudoID"),
        ("user_id", ["user_name", "age"], "user_name"),
        ("timestamp", ["created_at", "updated"], "created_at"),
        ("timestamp", ["device", "behaviour"], ""),
        ("behavior", ["event_name", "event_time"], "event_name"),
        ("title", ["titel", "Product ID"], "titel"),
        ("price", ["Variant Price", "Variant Inventory Qty"], "Variant Price"),
        ("title", [], ""),
        ("title", ["", "---"], ""),
    ],
)
def test_hints_are_near_in_meaning(ours, names, hint):
    known, unknown = hints([ours], names)
    assert known == ([f"{ours}={hint}" if " " not in hint else f"{ours}='{hint}'"] if hint else [])
    assert unknown == ([] if hint else [ours])


def test_a_column_is_hinted_once_and_the_flag_is_whole():
    names = ["customer", "sku", "when"]
    said = flag_of(["item_id", "user_id", "timestamp", "title"], names, [("brand", "Maker")])
    assert said == (
        "say which with --data.columns brand=Maker item_id=sku user_id=customer timestamp=when title=...; it has "
        "customer, sku, when"
    )


@settings(deadline=None)
@given(names=st.lists(st.text(max_size=20), max_size=5))
def test_any_names_are_hinted_at_most_once_each(names):
    known, unknown = hints(["item_id", "user_id", "timestamp"], names)
    assert len(known) + len(unknown) == 3 and len(set(known)) == len(known)


def test_pairs_may_be_of_one_table():
    found = parse_columns(("item_id=sku", "items.item_id=id", "stock=Qty"), KNOWN)
    assert found == {"": {"item_id": "sku", "stock": "Qty"}, "items": {"item_id": "id", "stock": "Qty"}}
    with pytest.raises(UserError, match="did you mean title"):
        parse_columns(("items.tittle=x",), KNOWN)
