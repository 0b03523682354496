"""Weights and tokenizer of a pretrained text model, with which a system's first stage begins.

The tokens of the prompts and the codes come behind the words of the weights. A phase of the run keeps the tokenizer and
the sizes of the model, so that a trained run needs the folder no more.
"""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrec.config import UserError, from_json, to_json
from jaxrec.data.sources.files import digest
from jaxrec.files import read_json, write_json
from jaxrec.models.backbone import BackboneConfig
from jaxrec.models.causal import CausalConfig
from jaxrec.models.encoder_decoder import EncoderDecoderConfig
from jaxrec.models.huggingface import CONFIG_FILE, load
from jaxrec.models.vocabulary import grow_vocabulary
from jaxrec.systems.recommender import Assembly
from jaxrec.text.tokenizer import HuggingFaceTokenizer, save_tokenizer
from jaxrec.training.stages import Task

BACKBONE, TOKENIZER = "backbone.json", "tokenizer.json"
KINDS = {kind.__name__: kind for kind in (EncoderDecoderConfig, CausalConfig)}
ENDS = {EncoderDecoderConfig: "</s>", CausalConfig: "<|endoftext|>"}
"""the token that ends a text: of BART and T5, and of Qwen"""
KEPT = ("dropout", "decoder_dropout", "target_dropout", "dtype", "restrict")
"""fields of a configuration that weights do not decide"""


def digests(folder: str) -> list[str]:
    """Of the files with weights, sizes and tokens.

    Raises:
      UserError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise UserError(
            f"configuration key 'pretrained': there is no folder {folder}; give one with the weights of a "
            "BART, T5, Qwen2 or Qwen3"
        )
    files = sorted([Path(folder) / CONFIG_FILE, Path(folder) / TOKENIZER, *Path(folder).glob("*.safetensors")])
    return [digest(path) for path in files if path.is_file()]


def read_tokenizer(folder: str, kind: type[BackboneConfig]) -> HuggingFaceTokenizer:
    """The tokenizer of a folder with weights of this kind.

    Raises:
      UserError: there is none, or it has no end token.
    """
    path = Path(folder) / TOKENIZER
    if not path.is_file():
        raise UserError(f"configuration key 'pretrained': {path} is missing; copy the tokenizer of the weights there")
    return HuggingFaceTokenizer(path.read_bytes(), ENDS[kind])


def write_pretrained(folder: Path, pretrained: str) -> tuple[HuggingFaceTokenizer, int]:
    """Keeps the tokenizer and the sizes of the pretrained model in a folder; the tokenizer and the model's vocabulary.

    Raises:
      UserError: as `jaxrec.models.huggingface.load` or `read_tokenizer`, or the two don't belong together.
    """
    config, _ = load(pretrained)
    tokenizer = read_tokenizer(pretrained, type(config))
    if tokenizer.size > config.vocabulary:
        raise UserError(
            f"configuration key 'pretrained': {Path(pretrained) / TOKENIZER} has {tokenizer.size} tokens, but the "
            f"weights have {config.vocabulary}; copy the tokenizer of the weights there"
        )
    save_tokenizer(tokenizer, folder)
    write_json(folder / BACKBONE, {"type": type(config).__name__, **to_json(config)})
    return tokenizer, config.vocabulary


def backbone_of(folder: Path, config: BackboneConfig) -> BackboneConfig:
    """The configuration of a run's backbone: the given one or, where kind and sizes are noted in `folder`, those."""
    if not (folder / BACKBONE).is_file():
        return config
    values = read_json(folder / BACKBONE)
    noted = from_json(KINDS[values.pop("type")], values)
    kept = {name: getattr(config, name) for name in KEPT if hasattr(noted, name) and hasattr(config, name)}
    return replace(noted, **kept)


def with_pretrained(variables: dict, pretrained: str, seed: int) -> dict:
    """Fresh variables with the weights in their place, on their devices; other tokens begin near the mean of words.

    Raises:
      UserError: as `jaxrec.models.huggingface.load`.
    """
    config, params = load(pretrained)
    fresh = variables["params"]["backbone"]
    more = len(fresh["embed"]["table"]) - config.vocabulary
    _, grown = grow_vocabulary(config, params, more, jax.random.key(seed))
    placed = jax.tree.map(lambda old, new: jax.device_put(np.asarray(new, old.dtype), old.sharding), fresh, grown)
    return {**variables, "params": {**variables["params"], "backbone": placed}}


def initial(assembly: Assembly, pretrained: str, task: Task, seed: int, mesh: Mesh | None) -> dict:
    """The first variables of a stage; pretrained ones where it is the first and there are some."""
    fresh = assembly.init(seed, mesh)
    return with_pretrained(fresh, pretrained, seed) if pretrained and task.start is None else fresh
