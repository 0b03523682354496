"""Configuration: frozen dataclasses, a file that composes them, a command line that sets any field.

A configuration file (`configs/onemall.py`) is Python and defines one module-level `config`, a frozen dataclass with
a field `system: str`. Every field is a flag: `train.py configs/onemall.py --run runs/a --model.width 256`. A field that
allows several dataclasses takes the name of one: `--data Folder --data.path my_shop`, `--semantic-ids.remainder
OpqConfig`. The resolved configuration is plain JSON (`to_json`); the run directory keeps it, and `from_json` rebuilds
the dataclass from it.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tyro

Config = TypeVar("Config")


class UserError(ValueError):
    """A mistake of the user: one sentence that names the file and field or the key, the mistake, and the mend."""


def check_least(config: Any, place: str, **least: float) -> None:
    """Checks that numbers of a dataclass, or all numbers of a tuple, are large enough.

    `place` is the prefix of the key in messages, such as "training", or empty.

    Raises:
      UserError: one is below its bound in `least`, infinite or NaN.
    """
    for name, value in least.items():
        given = getattr(config, name)
        if not all(value <= each < math.inf for each in (given if isinstance(given, tuple) else (given,))):
            raise UserError(f"configuration key '{_key(place, name)}' is {given}; give {value} or more")


def check_shares(config: Any, place: str, *names: str, all_allowed: bool = False) -> None:
    """Checks that numbers of a dataclass, such as dropout rates, are in [0, 1); None passes, and 1 if `all_allowed`.

    Raises:
      UserError: one is not.
    """
    for name in names:
        given = getattr(config, name)
        if given is not None and not (0 <= given < 1 or (all_allowed and given == 1)):
            bounds = "0 to 1" if all_allowed else "0 or more, below 1"
            raise UserError(f"configuration key '{_key(place, name)}' is {given}; give {bounds}")


def check_choice(config: Any, place: str, name: str, choices: Sequence[str]) -> None:
    """Checks that a field of a dataclass is one of `choices`.

    Raises:
      UserError: it is not.
    """
    given = getattr(config, name)
    if given not in choices:
        raise UserError(f"configuration key '{_key(place, name)}' is {given!r}; give one of {', '.join(choices)}")


def _key(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def check_heads(width: int, heads: int, key: str) -> None:
    """Checks that the number of attention heads divides the width; `key` is that of the heads.

    Raises:
      UserError: it does not.
    """
    if heads < 1 or width % heads:
        raise UserError(f"configuration key '{key}' is {heads}; give a number that divides the width, {width}")


def load_config(path: Path) -> Any:
    """Runs a configuration file and returns its module-level `config`.

    Raises:
      UserError: the file is missing, is no Python, or defines no dataclass called `config`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no configuration file {path}{_nearest_file(path)}")
    # A real module, so that tyro can read the docstrings of classes defined in the file.
    spec = importlib.util.spec_from_file_location(_module_name(path), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: this is no valid Python ({error.msg})") from error
    config = getattr(module, "config", None)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UserError(f"{path} defines no `config`; end it with `config = ` and the dataclass of a system")
    return config


def _module_name(path: Path) -> str:
    return f"config_{path.stem}"


def parse_cli(argv: Sequence[str] | None = None, needs_run: bool = True) -> tuple[Any, Path]:
    """Reads `CONFIG --run DIR [--any.field VALUE ...]`.

    A configuration file may define `complete(config)`, which returns the configuration with values that depend on
    others, such as sizes that depend on the data. It gets the fields of the command line, and they hold for its result.

    needs_run: whether `--run` must be given; without it the run directory is `Path()`.

    Returns:
      The configuration with those fields changed, and the run directory.

    Raises:
      UserError: the configuration file or `--run` is missing, or a key is unknown (the nearest known one is named).
      SystemExit: `--help`, or a value of the wrong type (reported by tyro).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    usage = "usage: train.py CONFIG --run DIR [--until STAGE | --only STAGE] [--replace] [--check] [--FIELD VALUE ...]"
    usage = f"{usage}, such as train.py configs/NAME.py --run runs/a"
    if not args or args[0] in ("-h", "--help"):
        print(f"{usage}\n\ntrain.py CONFIG --help lists the fields of a configuration.")
        print("--until STAGE: stop when this stage is trained; --only STAGE: train this stage alone.")
        print("--replace: train anew where DIR holds a training of other data or another configuration.")
        print("--check: say what the data hold and what a run would take, without one; nothing is written.")
        raise SystemExit(0 if args else 2)
    if args[0].startswith("-"):
        raise UserError(f"the configuration file comes first, not {args[0]!r}; {usage}")
    path, wants_help = Path(args[0]), "--help" in args or "-h" in args
    config = load_config(path)
    run, rest = take_option(args[1:], "--run", "a directory, for example --run runs/a")
    if run is None and needs_run and not wants_help:
        raise UserError(f"--run is missing; say where the run goes, such as train.py {path} --run runs/{path.stem}")
    config = _with_flags(config, rest, path, wants_help)
    complete = getattr(sys.modules[_module_name(path)], "complete", None)
    if complete is not None:
        config = _with_flags(complete(config), rest, path, wants_help)
    return config, Path(run or "")


def _with_flags(config: Any, args: list[str], path: Path, wants_help: bool) -> Any:
    """A configuration with the fields of the command line."""
    config, rest = choose_types(config, args)
    if not wants_help:
        _check_keys(config, rest)
    return tyro.cli(
        type(config),
        default=config,
        args=rest,
        prog=f"train.py {path} --run DIR",
        description=f"Fields of {path}, with the values that it gives them.",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        compact_help=False,
    )


def to_json(config: Any) -> Any:
    """A configuration (or any tree of dataclasses, tuples, dicts, paths, enums and scalars) as plain JSON values.

    In a field that allows several dataclasses, the class name is kept under the key "type".
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        hints = typing.get_type_hints(type(config))
        return {f.name: _tagged(getattr(config, f.name), hints[f.name]) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_json(value) for value in config]
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, np.generic):
        return config.item()
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise TypeError(f"{type(config).__name__} can't be written as JSON; use dataclasses, tuples, paths and scalars")


def from_json(cls: type[Config], values: dict[str, Any]) -> Config:
    """The inverse of `to_json` for a dataclass `cls`.

    Raises:
      UserError: a key is missing or unknown, as in a config.json of another version. A key whose default is None or ()
        may be missing, since it may have been added later.
    """
    return _restore(cls, values, "")


def fingerprint(*objects: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of the objects' canonical JSON; equal objects give equal digits."""
    text = json.dumps(to_json(objects), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted key, old value, new value) wherever two JSON trees differ; a missing value is given as None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix, old, new


def field_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted key of every field of a configuration that the command line can set."""
    if dataclasses.is_dataclass(config):
        children = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    elif isinstance(config, tuple) and any(dataclasses.is_dataclass(value) for value in config):
        children = {str(index): value for index, value in enumerate(config)}
    else:
        yield prefix
        return
    for name, value in children.items():
        yield from field_keys(value, f"{prefix}.{name}" if prefix else name)


def _nearest_file(path: Path) -> str:
    names = sorted(other.name for other in path.parent.glob("*.py")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def take_option(args: list[str], name: str, what: str) -> tuple[str | None, list[str]]:
    """Splits `NAME VALUE` (or `NAME=VALUE`) from the other arguments; None if it is missing.

    Raises:
      UserError: the value is missing; `what` describes it in the message.
    """
    given, rest, index = None, [], 0
    while index < len(args):
        if args[index] == name:
            if index + 1 == len(args) or args[index + 1].startswith("--"):
                raise UserError(f"{name} needs {what}")
            given, index = args[index + 1], index + 2
        elif args[index].startswith(f"{name}="):
            given, index = args[index].removeprefix(f"{name}="), index + 1
        else:
            rest, index = [*rest, args[index]], index + 1
    return given, rest


def choose_types(config: Any, args: list[str]) -> tuple[Any, list[str]]:
    """Applies `--field ClassName` to fields, at any depth, that allow several dataclasses.

    An optional field takes `None` too.
    """
    rest, index = [], 0
    while index < len(args):
        name, _, value = args[index].removeprefix("--").partition("=")
        keys = name.replace("-", "_").split(".")
        hint = _hint_of(config, keys)
        members = _dataclass_members(hint)
        if not args[index].startswith("--") or not members:
            rest, index = [*rest, args[index]], index + 1
            continue
        if not value and index + 1 < len(args):
            index, value = index + 1, args[index + 1]
        choices = {member.__name__: member for member in members}
        if type(None) in typing.get_args(hint):
            choices["None"] = type(None)
        if value not in choices:
            raise UserError(f"configuration key {name!r}: there is no {value!r} here, only {', '.join(choices)}")
        config, index = _replace(config, keys, _instance(choices[value])), index + 1
    return config, rest


def _hint_of(config: Any, keys: list[str]) -> Any:
    """The type hint of a field, by its path of names; None if there is no such field."""
    for key in keys[:-1]:
        config = getattr(config, key, None)
    if not dataclasses.is_dataclass(config):
        return None
    return typing.get_type_hints(type(config), include_extras=True).get(keys[-1])


def _replace(config: Any, keys: list[str], value: Any) -> Any:
    if len(keys) > 1:
        value = _replace(getattr(config, keys[0]), keys[1:], value)
    return dataclasses.replace(config, **{keys[0]: value})


def _instance(chosen: type) -> Any:
    """A dataclass with its defaults; fields without one are set later."""
    if chosen is type(None):
        return None
    fields = dataclasses.fields(chosen)
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    return chosen(**dict.fromkeys(required, tyro.MISSING))


def _check_keys(config: Any, args: list[str]) -> None:
    known = list(field_keys(config))
    for arg in args:
        key = arg[2:].split("=")[0].replace("-", "_")
        if not arg.startswith("--") or key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
        raise UserError(f"unknown configuration key {key!r}; {_other_member(config, key) or hint}")


def _other_member(config: Any, key: str) -> str:
    """The mend, if the key belongs to another dataclass that the field allows; else ""."""
    *parents, name = key.split(".")
    if not parents:
        return ""
    members = _dataclass_members(_hint_of(config, parents))
    owners = [member.__name__ for member in members if name in {f.name for f in dataclasses.fields(member)}]
    if not owners:
        return ""
    for parent in parents:
        config = getattr(config, parent)
    here, place = type(config).__name__.replace("NoneType", "None"), ".".join(parents)
    return f"{place!r} is {here} here, and the key belongs to {' and '.join(owners)}: add --{place} {owners[0]}"


def _dataclass_members(hint: Any) -> list[type]:
    """The dataclasses among the members of a union, or the hint itself if it is a dataclass."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [member for member in members if dataclasses.is_dataclass(member)]


def _tagged(value: Any, hint: Any) -> Any:
    result = to_json(value)
    if isinstance(result, dict) and dataclasses.is_dataclass(value) and len(_dataclass_members(hint)) > 1:
        return {"type": type(value).__name__, **result}
    if isinstance(value, tuple | list):
        inner = [arg for arg in typing.get_args(hint) if arg is not Ellipsis] or [None]
        return [_tagged(item, inner[min(index, len(inner) - 1)]) for index, item in enumerate(value)]
    return result


def _restore(hint: Any, value: Any, key: str) -> Any:
    """Rebuilds a value of type `hint` from JSON; `key` is its dotted name, for messages."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if isinstance(value, dict) and (members := _dataclass_members(hint)):
        return _restore_dataclass(members, value, key)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _restore_union(args, value, key)
    if origin in (tuple, list) and isinstance(value, list):
        inner = args if origin is tuple and Ellipsis not in args else (args[0],) * len(value)
        pairs = enumerate(zip(inner, value, strict=True))
        return origin(_restore(each, item, f"{key}.{index}") for index, (each, item) in pairs)
    if origin is dict and isinstance(value, dict):
        return {name: _restore(args[1], item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Path | Enum):
        return hint(value)
    if hint is tuple:
        return tuple(value)
    return value


def _restore_union(members: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None or any(type(value) is member for member in members):
        return value
    rest = [member for member in members if member is not type(None)]
    return _restore(rest[0], value, key)


def _restore_dataclass(members: list[type], value: dict[str, Any], key: str) -> Any:
    by_name = {member.__name__: member for member in members}
    values = dict(value)
    name = values.pop("type") if len(members) > 1 and "type" in values else members[0].__name__
    if name not in by_name:
        raise UserError(f"configuration key {key!r}: there is no type {name!r}; it is one of {', '.join(by_name)}")
    cls = by_name[name]
    hints, names = typing.get_type_hints(cls, include_extras=True), [f.name for f in dataclasses.fields(cls)]
    prefix = f"{key}." if key else ""
    if unknown := [each for each in values if each not in names]:
        raise UserError(f"unknown configuration key {prefix + unknown[0]!r}; this version of jaxrec has no such field")
    values = {f.name: f.default for f in dataclasses.fields(cls) if f.default in (None, ())} | values
    if missing := [each for each in names if each not in values]:
        raise UserError(f"configuration key {prefix + missing[0]!r} is missing; another version of jaxrec wrote it")
    return cls(**{each: _restore(hints[each], values[each], prefix + each) for each in names})
