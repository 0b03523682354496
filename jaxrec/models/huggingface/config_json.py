"""config.json of a folder in Hugging Face's layout: read, and its values checked one by one."""

import json
from pathlib import Path
from typing import Any

from jaxrec.config import UserError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def read_config(folder: Path, *kinds: str) -> dict:
    """The values of a folder's config.json, whose model_type is one of `kinds`."""
    path = folder / CONFIG_FILE
    raw = read_json(path, f"give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if raw.get("model_type") not in kinds:
        wanted = " or ".join(map(repr, kinds))
        raise UserError(f"{path} is of a model_type {raw.get('model_type')!r}, expected {wanted}: use its loader")
    return raw


def read_json(path: Path, mend: str) -> dict:
    if not path.is_file():
        raise UserError(f"there is no {path}: {mend}")
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): copy the model anew") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object: copy the model anew")
    return raw


def size_of(path: Path, raw: dict, name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {name} is {value!r}, expected a whole number above 0")
    return value


def number_of(path: Path, raw: dict, name: str, default: float) -> float:
    """A number of config.json; one that is missing or null is the default."""
    value = default if raw.get(name) is None else raw[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{path}: {name} is {value!r}; a number was expected")
    return float(value)


def flag_of(path: Path, raw: dict, name: str, default: bool) -> bool:
    """As `_number`, of true and false."""
    value = default if raw.get(name) is None else raw[name]
    if not isinstance(value, bool):
        raise UserError(f"{path}: {name} is {value!r}; true or false was expected")
    return value


def make_config(path: Path, kind: type, raw: dict, **fields: Any) -> Any:
    """The configuration, with what `save_*` wrote of ours, which Hugging Face has no name for."""
    ours = raw.get("jaxrec") or {}
    try:
        if ours.get("levels") is not None:
            fields["levels"] = tuple((int(offset), int(size)) for offset, size in ours["levels"])
        fields["restrict"] = bool(ours.get("restrict", True))
    except (AttributeError, TypeError, ValueError) as error:
        wanted = '{"levels": [[offset, size], ...], "restrict": true or false}'
        raise UserError(f"{path}: jaxrec is {ours!r}; {wanted} was expected") from error
    try:
        return kind(**fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
