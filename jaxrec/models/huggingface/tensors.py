"""Tensors of a folder in Hugging Face's layout, read into our parameters and written back, bit for bit.

A *plan* names, for every parameter of ours, the tensor that it is. The same plan says which tensors a folder must hold
and of what shape, reads them, and writes them. Names, types and shapes of all tensors are checked before any
of them is read, so that nothing is half loaded.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxrec.config import UserError
from jaxrec.models.huggingface.config_json import CONFIG_FILE, WEIGHTS_FILE, read_json
from jaxrec.nn.finite import check_finite
from jaxrec.text.cache import write_files

INDEX_FILE = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
# What some files hold beside the weights: never read by the model.
UNUSED = ("EncDecAttention.relative_attention_bias.weight", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class Parameter:
    """One parameter of ours and the tensor of theirs that it is.

    Matrices of theirs are [outputs, inputs], ours [inputs, outputs], where a side may be split in two: heads and their
    width. A bias of ours may be split as well. `shape` is theirs, `ours` ours.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    ours: tuple[int, ...]
    turned: bool = False

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """Ours from theirs."""
        return np.ascontiguousarray(tensor.T if self.turned else tensor).reshape(self.ours)

    def write(self, value: np.ndarray) -> np.ndarray:
        """Theirs from ours."""
        return np.ascontiguousarray(value.reshape(self.shape[::-1]).T if self.turned else value.reshape(self.shape))


def same(path: str, name: str, *shape: int) -> Parameter:
    return Parameter(path, name, shape, shape)


def matrix(path: str, name: str, inputs: int, *outputs: int) -> Parameter:
    return Parameter(path, name, (math.prod(outputs), inputs), (inputs, *outputs), turned=True)


class Tensors:
    """The tensors of a folder, by name; files stay open while it is entered."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}

    def __enter__(self) -> "Tensors":
        index = self.folder / INDEX_FILE
        if (self.folder / WEIGHTS_FILE).is_file() or not index.is_file():
            self._where = dict.fromkeys(self._open(WEIGHTS_FILE).keys(), WEIGHTS_FILE)
            return self
        where = read_json(index, "").get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise UserError(f"{index} has no weight_map from tensors to files: copy the model anew")
        for file in sorted(set(where.values())):
            held = set(self._open(file).keys())
            for name in sorted(name for name in where if where[name] == file):
                if name not in held:
                    raise UserError(f"{self.folder / file} has no tensor {name}, which {INDEX_FILE} puts there")
        self._where = where
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if not path.is_file():
            raise UserError(f"there is no {path}: give a folder with {CONFIG_FILE} and all files of the weights")
        try:
            # Its NumPy reader knows no bfloat16, JAX's does.
            self._files[file] = safe_open(path, "flax")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} can't be read ({error}): copy it anew") from error
        return self._files[file]

    def path(self, name: str) -> Path:
        return self.folder / self._where[name]

    def get(self, name: str) -> np.ndarray:
        with jax.default_device(jax.devices("cpu")[0]):
            return np.asarray(self._files[self._where[name]].get_tensor(name)).astype(np.float32)

    def equal(self, one: str, other: str) -> bool:
        for name in (one, other):
            if name not in self:
                raise UserError(f"{self.folder} has no tensor {name}: it is not a complete model")
        return self._shape(one) == self._shape(other) and np.array_equal(self.get(one), self.get(other))

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def read(self, plan: list[Parameter], twins: dict[str, str]) -> dict:
        """The parameters of a plan; `twins` are tensors that may be there as copies of others.

        Everything but their content is checked before anything is read.
        """
        self._check(plan, twins)
        flat = {}
        for entry in plan:
            tensor = self.get(entry.name)
            check_finite({f"tensor {entry.name}": tensor}, self.path(entry.name), "copy the model anew")
            flat[entry.path] = entry.read(tensor)
        return unflatten_dict(flat, sep="/")

    def _check(self, plan: list[Parameter], twins: dict[str, str]) -> None:
        expected = {entry.name: entry.shape for entry in plan}
        for name, shape in expected.items():
            if name not in self:
                files = ", ".join(sorted(set(self._where.values())))
                raise UserError(f"{self.folder / files} has no tensor {name}, which {CONFIG_FILE} asks for")
            kind = self._files[self._where[name]].get_slice(name).get_dtype()
            if kind not in FLOATS:
                raise UserError(f"{self.path(name)}: tensor {name} is {kind}, expected one of {', '.join(FLOATS)}")
            if self._shape(name) != shape:
                raise UserError(
                    f"{self.path(name)}: tensor {name} has shape {list(self._shape(name))}, but {CONFIG_FILE} asks for "
                    f"{list(shape)}"
                )
        for name in sorted(set(self._where) - set(expected)):
            if name.endswith(UNUSED):
                continue
            if name not in twins:
                raise UserError(
                    f"{self.path(name)} has a tensor {name} that this model doesn't have: see {CONFIG_FILE}"
                )
            if not self.equal(name, twins[name]):
                raise UserError(
                    f"{self.path(name)}: tensor {name} differs from {twins[name]}, though {CONFIG_FILE} says that they "
                    "are one"
                )


def check_saved(what: str, config: Any, wanted: dict) -> None:
    """Raises UserError when a field of the configuration has another value than the family's, so has no name there."""
    for field, value in wanted.items():
        found = getattr(config, field)
        if found != value:
            raise UserError(f"{what} has model.{field}={value!r}: {found!r} can't be saved in Hugging Face's layout")


def save_model(folder: str | Path, config: Any, raw: dict, plan: list[Parameter], params: dict) -> None:
    if config.levels is not None:
        raw["jaxrec"] = {"levels": config.levels, "restrict": config.restrict}
    tensors = _write(plan, params)
    files = {
        # The weights first: a folder with a config.json is whole.
        WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
        CONFIG_FILE: (json.dumps(raw, indent=2) + "\n").encode(),
    }
    write_files(Path(folder), files, "the model")


def _write(plan: list[Parameter], params: dict) -> dict[str, np.ndarray]:
    flat = {path: np.asarray(value, np.float32) for path, value in flatten_dict(nn.unbox(params), sep="/").items()}
    wanted = {entry.path: entry.ours for entry in plan}
    for path in sorted(set(flat) | set(wanted)):
        found, shape = flat[path].shape if path in flat else None, wanted.get(path)
        if found != shape:
            raise UserError(f"parameter {path} has shape {found}, but the configuration asks for {shape}")
    return {entry.name: entry.write(flat[entry.path]) for entry in plan}
