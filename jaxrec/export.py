"""Export of a trained run as an artefact that needs no jaxrec: StableHLO, weights, and a manifest.

    python -m jaxrec.export runs/<name> --to DIR

The whole retrieval (feature arrays -> context -> beam over the trie -> items or texts) is one function of two
dictionaries of arrays, `(weights, requests) -> answers`, exported by `jax.export` for a batch of any size and for CPU,
CUDA and TPU:

    DIR/
      manifest.json             inputs, outputs, weights, sizes, versions, and the sha256 of every other file
      retrieve_<S>.stablehlo    the function for histories padded to S, one a length bucket
      model.safetensors         weights
      catalogue.safetensors     the model's arrays of the items
      trie.safetensors          the semantic IDs, or the listed texts, as a trie
      items.jsonl               line i (from 0) is item i: {"item_id": ...}
      texts.jsonl, text_space.json                       of a run that answers with texts
      tokenizer.model or .json, text_tokenizer.json      of a run that reads or answers with texts
      reader/                   what reads a query, of a system that can save it

Only arrays that the function reads are written. docs/export.md describes the inputs and has the code that answers with
jax and safetensors alone; `load` needs jaxrec.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from jax import export as jax_export
from jax.interpreters.partial_eval import dce_jaxpr
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from jaxrec import __version__
from jaxrec.config import UserError, fingerprint, from_json, to_json
from jaxrec.console import console, report_user_errors, track
from jaxrec.data.features import AGES, FeatureConfig
from jaxrec.data.item_sequences import ItemSequenceConfig
from jaxrec.data.leveled_sessions import LeveledSessionConfig
from jaxrec.data.search_features import SearchFeatureConfig
from jaxrec.data.suggestion_features import SuggestionFeatureConfig
from jaxrec.data.token_sequences import TokenSequenceConfig
from jaxrec.data.words import normalised, typed
from jaxrec.evaluation.cases import History
from jaxrec.files import read_json, sync, write_json, writing
from jaxrec.run import Run
from jaxrec.semantic_ids.table.versions import trained_version
from jaxrec.serving.histories import InlineHistories, moment_of
from jaxrec.serving.schema import Request, parse_request
from jaxrec.systems import SYSTEMS, load_recommender
from jaxrec.systems.generative import GenerativeRunConfig
from jaxrec.systems.recommender import typed_text
from jaxrec.targets import Found, load_text_space
from jaxrec.text.tokenizer import NOTES as TOKENIZER
from jaxrec.text.tokenizer import TextTokenizer, load_tokenizer, save_tokenizer

FORMAT = 1
MANIFEST, ITEMS = "manifest.json", "items.jsonl"
PLATFORMS = ("cpu", "cuda", "tpu")
FILES = {"variables": "model.safetensors", "trie": "trie.safetensors"}
"""The file of an array of `GenerativeRecommender.served`, by its first key; others are in that of the catalogue."""
CATALOGUE = "catalogue.safetensors"
READER = "reader"
"""The folder of what reads the texts of a history."""
ANSWERED = {"history", "query", "prefix", "profile", "k", "now"}
"""Fields of the requests that an artefact answers."""
READERS = {
    reader.__name__: reader
    for reader in (
        FeatureConfig,
        ItemSequenceConfig,
        LeveledSessionConfig,
        SearchFeatureConfig,
        SuggestionFeatureConfig,
        TokenSequenceConfig,
    )
}
"""What makes the inputs of histories, by the name in the manifest."""


@dataclass(frozen=True)
class ExportConfig:
    """Size of the answers, filters, and platforms of an artefact."""

    k: int = 10
    """items or texts a request gets"""
    beam_width: int | None = None
    """number of beams, raised to k if smaller; default: decoding.beam_width of the run"""
    filters: bool = False
    """take one more input `allowed`, bool [batch, items], or [batch, texts] of a run that answers with texts of a list:
    what each request may get"""
    platforms: tuple[str, ...] = PLATFORMS
    """platforms on which the artefact runs"""

    def __post_init__(self):
        if self.k < 1 or (self.beam_width is not None and self.beam_width < 1):
            raise UserError(f"--k is {self.k} and --beam-width {self.beam_width}; give numbers of 1 or more")
        unknown = sorted(set(self.platforms) - set(PLATFORMS))
        if unknown or not self.platforms:
            raise UserError(f"--platforms: {', '.join(unknown) or 'none given'}; give some of {', '.join(PLATFORMS)}")


# ---- writing -----------------------------------------------------------------------------------------------------


def export_run(run_path: Path, to: Path, config: ExportConfig | None = None) -> dict[str, Any]:
    """Exports a trained run into the new folder `to`, whole or not at all; returns the manifest.

    Raises:
      UserError: there is no trained run at `run_path`, its system is unknown or generates nothing, `to` exists or
        can't be written.
    """
    run, values = Run.load(Path(run_path))
    system = str(values.get("system"))
    _check_target(Path(to))
    recommender = load_recommender(run)
    if not hasattr(recommender, "retrieve"):
        exported = ", ".join(name for name, each in SYSTEMS.items() if issubclass(each.config, GenerativeRunConfig))
        raise UserError(
            f"{run.path} is a run of {system}, which scores all items: only systems that generate "
            f"their answers are exported ({exported}); answer with serve.py instead"
        )
    if getattr(recommender, "reorder", None) is not None:
        raise UserError(
            f"{run.path}: configuration key 'reorder' is {recommender.reorder}: answers are ordered by a reward model, "
            "which an artefact does not hold; run train.py again with --reorder None, or answer with serve.py instead"
        )
    item_ids = pq.read_table(run.tables / "items.parquet", columns=["item_id"])["item_id"].to_pylist()
    # Items appended or published since are not in the artefact.
    version = trained_version(run.semantic_ids)
    about = {"system": system, "run": fingerprint(values), "catalogue_version": version, **_time(run)}
    return write_artefact(recommender, item_ids, to, config, about)


def write_artefact(
    recommender: Any,
    item_ids: Sequence[str],
    to: Path,
    config: ExportConfig | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Exports a `GenerativeRecommender` whose items have these ids [I] into the new folder `to`; returns the manifest.

    `about` is added to the manifest.

    Raises:
      UserError: `to` exists or can't be written, or the disk is full.
    """
    to, config = Path(to), config or ExportConfig()
    _check_target(to)
    weights, modules = export_modules(recommender, config)
    partial = to.with_name(f"{to.name}.partial")
    try:
        with writing(to.parent):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            manifest = _describe(recommender, item_ids, config, weights, modules) | (about or {})
            _write_arrays(partial, weights, manifest["catalogue"]["fingerprint"])
            for length, module in modules.items():
                (partial / _module_file(length)).write_bytes(module.serialize())
            lines = (json.dumps({"item_id": item}, ensure_ascii=False) + "\n" for item in item_ids)
            (partial / ITEMS).write_text("".join(lines), encoding="utf-8")
            recommender.space.save(partial)
            if (tokenizer := getattr(recommender.assembly, "tokenizer", None)) is not None:
                save_tokenizer(tokenizer, partial)
            if (reader := getattr(recommender.assembly, "reader", None)) is not None:
                reader.save(partial / READER)
            files = {path.relative_to(partial).as_posix(): path for path in partial.rglob("*") if path.is_file()}
            manifest["files"] = {name: _file_record(files[name]) for name in sorted(files)}
            write_json(partial / MANIFEST, manifest | {"fingerprint": fingerprint(manifest)})
            for path in [*partial.rglob("*"), partial]:
                sync(path)
            partial.rename(to)
            sync(to.parent)
    except PermissionError as error:
        raise UserError(f"--to {to} can't be written: {error.strerror}; give another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _time(run: Run) -> dict[str, Any]:
    """The end of the log, which is the time of requests that tell none, and whether models see the time at all."""
    ends = [0]
    for name in ("events", "searches"):
        if (path := run.tables / f"{name}.parquet").is_file():
            ends.append(pc.max(pq.read_table(path, columns=["timestamp"])["timestamp"]).as_py() or 0)
    path = run.tables / "statistics.json"
    statistics = read_json(path) if path.is_file() else {}
    return {"latest": int(max(ends)), "answer_time": bool(statistics.get("answer_time", True))}


def export_modules(recommender: Any, config: ExportConfig) -> tuple[dict[str, jax.Array], dict[int, Any]]:
    """(the arrays that the retrieval reads, by name; `jax.export.Exported` of each length bucket).

    A module maps (weights {name: array}, requests {name: array [batch, ...]}) to {name: array [batch, ...]}, as
    `jaxrec.targets.TargetSpace.outputs`; `batch` is symbolic.

    Raises:
      UserError: filters, where nothing is listed.
    """
    if config.filters and not len(recommender.space):
        raise UserError("--filters restricts listed answers, but this run generates any text; leave it out")
    leaves, tree = jax.tree_util.tree_flatten_with_path(recommender.served)
    served = {jax.tree_util.keystr(path, simple=True, separator="/"): array for path, array in leaves}
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in served.items()}
    width = _width(recommender, config)

    def retrieve(weights, requests):
        # Arrays that the retrieval doesn't read are not exported; zeros of their shape are enough.
        filled = [weights[name] if name in weights else jnp.zeros_like(like) for name, like in shapes.items()]
        requests = dict(requests)
        allowed = requests.pop("allowed", None)
        found = recommender.retrieve(jax.tree.unflatten(tree, filled), requests, allowed, width, config.k)
        return recommender.space.outputs(found)

    lengths = sorted(set(recommender.feature_config.buckets))
    read = _read_by(retrieve, shapes, _requests(recommender, lengths[0], config, 1))
    shapes_read = {name: shapes[name] for name in read}
    (batch,) = jax_export.symbolic_shape("batch")
    export = jax_export.export(jax.jit(retrieve), platforms=config.platforms)
    modules = {
        length: export(shapes_read, _requests(recommender, length, config, batch))
        for length in track(lengths, "export", total=len(lengths))
    }
    return {name: served[name] for name in read}, modules


def _read_by(function: Callable, weights: dict, requests: dict) -> list[str]:
    """Names of the weights that the function's result depends on."""
    jaxpr = jax.make_jaxpr(function)(weights, requests).jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    # Leaves of a dictionary are in the order of its sorted keys, those of the first argument first.
    return [name for name, is_used in zip(sorted(weights), used, strict=False) if is_used]


def _requests(recommender: Any, length: int, config: ExportConfig, batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the inputs for histories of one bucket."""
    only = replace(recommender.feature_config, buckets=(length,))
    history = recommender.assembly.read_texts(dict(_EMPTY)) if recommender.reads_queries else _EMPTY
    arrays = _cut(history, only, recommender.assembly.behaviors, recommender.assembly.wanted)
    if recommender.config.completing:
        arrays |= recommender.space.begin("", room=True)
    shapes = {name: jax.ShapeDtypeStruct((batch, *each.shape), each.dtype) for name, each in arrays.items()}
    if config.filters:
        shapes["allowed"] = jax.ShapeDtypeStruct((batch, len(recommender.space)), np.dtype(bool))
    return shapes


_EMPTY = {name: np.zeros(0, np.int32) for name in ("item", "behavior", "timestamp", "session")} | {"now": 0}


def _text_fields(assembly: Any) -> list[str]:
    """The fields of a history that `read_texts` adds, from which the features are cut; none if no texts are read."""
    if not hasattr(assembly, "read_texts"):
        return []
    return sorted(set(assembly.read_texts(dict(_EMPTY))) - set(_EMPTY))


def _width(recommender: Any, config: ExportConfig) -> int | tuple[int, ...]:
    return max(config.beam_width, config.k) if config.beam_width else recommender.width(config.k)


def _cut(history: History, config: Any, behaviors: Sequence[str], wanted: np.ndarray) -> dict:
    """The features of a whole history."""
    end = int(history["session"][-1]) + 1 if len(history["session"]) else 0
    cut = config.cut(history, end, behaviors=len(behaviors), wanted=wanted)
    return {name: np.asarray(array) for name, array in cut.items()}


def _describe(recommender: Any, item_ids: Sequence[str], config: ExportConfig, weights: dict, modules: dict) -> dict:
    """The manifest, but for the files."""
    assembly, space = recommender.assembly, recommender.space
    first, width = next(iter(modules.values())), _width(recommender, config)
    return {
        "format": FORMAT,
        "jaxrec": __version__,
        "jax": jax.__version__,
        "calling_convention": first.calling_convention_version,
        "platforms": list(config.platforms),
        "catalogue": space.describe(item_ids),
        "k": config.k,
        "beam_widths": [width] * (space.levels or 1) if isinstance(width, int) else list(width),
        "reader": type(recommender.feature_config).__name__,
        "features": to_json(recommender.feature_config),
        "text_fields": _text_fields(assembly),
        "required_text": getattr(assembly, "required_text", None),
        "profile": list(getattr(assembly, "profile_columns", ())),
        "behaviors": list(assembly.behaviors),
        "target_behaviors": [assembly.behaviors[index] for index in assembly.target_behaviors],
        "ages": AGES,
        "modules": [
            {"length": length, "file": _module_file(length), "inputs": _arrays_of(module.in_tree, module.in_avals)}
            for length, module in modules.items()
        ],
        "outputs": {
            name: _array(aval) | {"meaning": space.meanings[name]}
            for name, aval in jax.tree.unflatten(first.out_tree, first.out_avals).items()
        },
        "weights": {name: _array(array) | {"file": _file_of(name)} for name, array in weights.items()},
    }


def _arrays_of(tree: Any, avals: Sequence[Any]) -> dict[str, dict]:
    """Shapes of a module's second argument."""
    (_, requests), _ = jax.tree.unflatten(tree, avals)
    return {name: _array(aval) for name, aval in requests.items()}


def _array(aval: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in aval.shape]
    return {"shape": shape, "dtype": str(aval.dtype)}


def _file_of(name: str) -> str:
    return FILES.get(name.split("/")[0], CATALOGUE)


def _module_file(length: int) -> str:
    return f"retrieve_{length}.stablehlo"


def _write_arrays(folder: Path, weights: dict[str, jax.Array], catalogue: str) -> None:
    for file in sorted({_file_of(name) for name in weights}):
        arrays = {name: np.asarray(array) for name, array in weights.items() if _file_of(name) == file}
        save_file(arrays, folder / file, metadata={"catalogue": catalogue})


def _file_record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _check_target(to: Path) -> None:
    if to.exists():
        raise UserError(f"--to {to} is there already; give a new folder, or delete that one first")


# ---- reading -----------------------------------------------------------------------------------------------------


class Artefact:
    """A loaded artefact; made by `load`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.manifest = manifest
        self.item_ids = [json.loads(line)["item_id"] for line in (folder / ITEMS).open(encoding="utf-8")]
        self._rows = {item: row for row, item in enumerate(self.item_ids)}
        files = {array["file"] for array in manifest["weights"].values()}
        self.weights = jax.device_put({k: v for file in sorted(files) for k, v in load_file(folder / file).items()})
        self.features = from_json(READERS[manifest["reader"]], manifest["features"])
        self.tokenizer: TextTokenizer | None = load_tokenizer(folder) if (folder / TOKENIZER).exists() else None
        self.reader = self._load_reader(folder)
        self._texts = load_text_space(folder) if "texts" in manifest["catalogue"] else None
        self._calls = {}
        for module in manifest["modules"]:
            exported = jax_export.deserialize(bytearray((folder / module["file"]).read_bytes()))
            self._calls[module["length"]] = jax.jit(exported.call)

    def _load_reader(self, folder: Path) -> Any | None:
        """What reads the texts of histories, where it is part of the artefact."""
        load = getattr(SYSTEMS.get(self.manifest.get("system")), "load_reader", None)
        there = load is not None and (folder / READER).is_dir()
        return load(folder / READER, self.features, self.tokenizer) if there else None

    def answer(self, requests: Sequence[dict[str, Any]]) -> list[list[tuple[str, float]]]:
        """The answers to requests as `serve.py` takes them, best first: (item id or text, score).

        A request brings its history, since the artefact knows no users: {"history": [], "query": "rain boots"}. It may
        say `now`, `k` up to that of the artefact, and the `profile` of its user where the model reads one.

        Raises:
          UserError: a request is refused, or the artefact lacks what reads its texts.
        """
        if self.manifest["text_fields"] and self.reader is None:
            raise UserError(
                "this artefact holds nothing that reads texts: make its inputs from the run, with "
                "load_recommender(Run.load(RUN)[0]).assembly.read_texts, prepare and retrieve"
            )
        asked = [self._request(number, request) for number, request in enumerate(requests)]
        if not asked:
            return []
        outputs = self.retrieve(self.prepare([self._history(request) for request in asked]))
        return [row[: request.k] for row, request in zip(self.show(outputs), asked, strict=True)]

    def _request(self, number: int, given: dict[str, Any]) -> Request:
        """A request that the artefact can answer."""
        try:
            request = parse_request(json.dumps(given))
            if refused := sorted(request.model_fields_set - ANSWERED):
                raise UserError(f"an artefact takes no {refused[0]}; give {', '.join(sorted(ANSWERED))}")
            if request.k > self.manifest["k"]:
                if "k" in request.model_fields_set:
                    raise UserError(f"k is {request.k}, but the artefact has {self.manifest['k']} answers; export more")
                request.k = self.manifest["k"]
            if request.has_query and self.reader is None:
                raise UserError("the run that was exported reads no queries; leave them out")
            wanted = self.manifest["required_text"]
            if wanted is not None and getattr(request, wanted) is None:
                raise UserError(f"the field {wanted} is missing, without which the run answers nothing")
            for name in sorted(set(request.profile or ()) - set(self.manifest["profile"])):
                raise UserError(f"the run that was exported reads no {name} of a profile; leave it out")
        except (UserError, TypeError) as error:
            raise UserError(f"request {number}: {error}") from error
        return request

    def _history(self, request: Request) -> History:
        """As `jaxrec.serving.retriever.Retriever.history`; unknown items are left out."""
        behaviors, latest = self.manifest["behaviors"], self.manifest.get("latest", 0)
        targets = [behaviors.index(name) for name in self.manifest["target_behaviors"]]
        inline = InlineHistories(self._rows.get, behaviors, targets, latest, searches=self.reader is not None)
        history, _ = inline.history(request.history)
        told = {"query": request.query, "prefix": request.prefix, "profile": request.profile}
        history |= {name: value for name, value in told.items() if value is not None}
        if self.manifest.get("answer_time", True):
            history["now"] = np.int64(moment_of(history, latest, request.now))
        return history if self.reader is None else self.reader.read_texts(history)

    def prepare(self, histories: Sequence[History]) -> dict[str, np.ndarray]:
        """The inputs of histories (jaxrec/evaluation/cases.py), padded to the bucket of the longest.

        Raises:
          UserError: a history lacks a field that the run's system makes of texts (`text_fields` of the manifest).
        """
        for number, history in enumerate(histories):
            self._check_fields(number, history)
        behaviors = self.manifest["behaviors"]
        wanted = np.isin(behaviors, self.manifest["target_behaviors"])
        ends = [int(each["session"][-1]) + 1 if len(each["session"]) else 0 for each in histories]
        lengths = [self.features.bucket_of(each, end) for each, end in zip(histories, ends, strict=True)]
        config = replace(self.features, buckets=(max(lengths),))
        cuts = [_cut(history, config, behaviors, wanted) for history in histories]
        if "typed" in self.manifest["modules"][0]["inputs"]:
            begins = (self._texts.begin(typed(typed_text(history)), room=True) for history in histories)
            cuts = [cut | begin for cut, begin in zip(cuts, begins, strict=True)]
        return {name: np.stack([cut[name] for cut in cuts]) for name in cuts[0]}

    def _check_fields(self, number: int, history: History) -> None:
        """Without the fields the features would silently be those of a user who typed nothing."""
        if missing := [name for name in self.manifest.get("text_fields", ()) if name not in history]:
            raise UserError(
                f"history {number} lacks {', '.join(missing)}, which the run's system makes of texts: give what "
                "load_recommender(Run.load(RUN)[0]).assembly.read_texts(history) returns"
            )

    def tokens(self, text: str) -> np.ndarray:
        """The tokens int32 [n] of a query or prefix, which a system's context is made of, without an end token.

        Raises:
          UserError: the artefact has no tokenizer, or the text holds half a character.
        """
        if self.tokenizer is None:
            raise UserError("this artefact has no tokenizer: the run that was exported reads no texts")
        return np.array(self.tokenizer.encode([normalised(text)])[0], np.int32)

    def retrieve(self, requests: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answers a batch: the inputs of one module of the manifest -> its outputs. Each new batch size compiles once.

        Raises:
          UserError: an input is missing, unknown, or of another shape or dtype than the manifest's.
        """
        module = self._module(requests)
        return jax.device_get(self._calls[module["length"]](self.weights, requests))

    def show(self, outputs: dict[str, np.ndarray]) -> list[list[tuple[str, float]]]:
        """The answers of `retrieve` by request, best first: (item id, or text; score)."""
        k, scores, nan = self.manifest["k"], outputs["scores"], outputs["nan"]
        if self._texts is None:
            found = outputs["items"], scores
        else:
            answers = outputs.get("texts", np.full_like(scores, -1, np.int32))
            found = self._texts.read(Found(answers, scores, nan, outputs.get("tokens")), k)
        names = self.item_ids.__getitem__ if self._texts is None else lambda answer: self._texts.show([answer])[0]
        return [
            [(names(answer), float(score)) for answer, score in zip(*row, strict=True) if answer >= 0]
            for row in zip(*found, strict=True)
        ]

    def _module(self, requests: dict[str, np.ndarray]) -> dict[str, Any]:
        """The module that takes these inputs."""
        modules = self.manifest["modules"]
        if different := set(requests) ^ set(modules[0]["inputs"]):
            name = min(different)
            wrong = "is missing" if name not in requests else "is no input of this artefact"
            raise UserError(f"input {name!r} {wrong}; the inputs are {', '.join(modules[0]['inputs'])}")
        batch = np.shape(next(iter(requests.values())))[:1]
        for module in modules:
            given = {name: [*batch, *module["inputs"][name]["shape"][1:]] for name in requests}
            if all(list(np.shape(requests[name])) == given[name] for name in requests):
                break
        else:
            shapes = ", ".join(f"{name} {list(np.shape(array))}" for name, array in requests.items())
            lengths = ", ".join(str(module["length"]) for module in modules)
            raise UserError(f"no module takes inputs of the shapes {shapes}; pad them to one of {lengths}")
        for name, array in requests.items():
            if str(array.dtype) != (wanted := module["inputs"][name]["dtype"]):
                raise UserError(f"input {name!r} is {array.dtype}; give {wanted}")
        return module


def load(folder: Path) -> Artefact:
    """Loads an artefact after checking every file of it against the manifest.

    Raises:
      UserError: there is no artefact, a file is missing, damaged, or of another version of the catalogue, or this jax
        or this device can't run it.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(
            f"{folder} holds no artefact (no {MANIFEST}); make one with python -m jaxrec.export RUN --to DIR"
        )
    manifest = read_json(path)
    _check_manifest(path, manifest)
    for name, record in manifest["files"].items():
        _check_file(folder / name, record, manifest["catalogue"]["fingerprint"])
    return Artefact(folder, manifest)


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    again = "export the run again"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is no manifest of format {FORMAT}; {again} with this version of jaxrec")
    content = {key: value for key, value in manifest.items() if key != "fingerprint"}
    if manifest.get("fingerprint") != fingerprint(content):
        raise UserError(f"{path} was changed after the export; copy the folder once more, or {again}")
    least, most = (
        jax_export.minimum_supported_calling_convention_version,
        jax_export.maximum_supported_calling_convention_version,
    )
    if not least <= manifest["calling_convention"] <= most:
        raise UserError(
            f"{path} was exported by jax {manifest['jax']}, whose modules jax {jax.__version__} can't run; {again}"
        )
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in manifest["platforms"]:
        runs_on = ", ".join(manifest["platforms"])
        raise UserError(f"{path} was exported for {runs_on}, but this process runs on {platform}; {again} for it")


def _check_file(path: Path, record: dict[str, Any], catalogue: str) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing; copy the folder of the export as a whole")
    if _file_record(path) == record:
        return
    found = _catalogue_in(path)
    if found not in (None, catalogue):
        raise UserError(
            f"{path} belongs to another version of the catalogue ({found}) than the manifest beside it ({catalogue}); "
            "keep the files of one export together"
        )
    raise UserError(f"{path} is damaged or of another export: its sha256 is not the manifest's; copy the folder again")


def _catalogue_in(path: Path) -> str | None:
    """The catalogue that a file of arrays was written for."""
    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("catalogue")
    except (SafetensorError, OSError):
        return None


# ---- the command -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional]
    """the run directory, as given to train.py --run"""
    to: Path
    """the new folder"""
    config: Annotated[ExportConfig, tyro.conf.arg(name="")]


def main() -> None:
    """The command line."""
    arguments = tyro.cli(Arguments, description=__doc__, prog="python -m jaxrec.export")
    manifest = export_run(arguments.run, arguments.to, arguments.config)
    size = sum(record["bytes"] for record in manifest["files"].values())
    lengths = ", ".join(str(module["length"]) for module in manifest["modules"])
    console.print(
        f"{_counted(manifest['catalogue'])}, histories of {lengths}, {', '.join(manifest['platforms'])}: "
        f"{size / 2**20:.1f} MiB written to {arguments.to}"
    )


def _counted(catalogue: dict[str, Any]) -> str:
    """What an artefact answers with, and the items that histories hold."""
    items = f"{catalogue['items']:,} items"
    if "texts" not in catalogue:
        return items
    return (
        f"{catalogue['texts']:,} texts, {items} in histories"
        if catalogue["texts"]
        else f"any text, {items} in histories"
    )


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
