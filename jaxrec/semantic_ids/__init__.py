"""Semantic IDs: quantizers `fit(key, x, config)`, `encode(fitted, x)`, `decode(fitted, codes)`, and the ID space.

    from jaxrec.semantic_ids import SemanticIdConfig, ResidualConfig, OpqConfig, decode, encode, fit

    config = SemanticIdConfig(hierarchy=ResidualConfig(sizes=(256, 256)), remainder=OpqConfig(sizes=(256, 256)))
    books = fit(jax.random.key(0), x, config)      # x: NumPy, f32 [I, D]
    codes = encode(books, x)                       # int32 [I, 4]

Embeddings larger than memory: `files.open_items`, `streaming.fit` and `streaming.encode`.

The quantizers alone are the modules `kmeans`, `balanced`, `residual`, `fsq`, `opq` and `rqvae`.
"""

from jaxrec.semantic_ids.quantizers.balanced import BalancedConfig
from jaxrec.semantic_ids.quantizers.codebooks import (
    Codebooks,
    SemanticIdConfig,
    decode,
    encode,
    encode_catalogue,
    fit,
    rq_opq,
)
from jaxrec.semantic_ids.quantizers.fsq import FsqConfig
from jaxrec.semantic_ids.quantizers.kmeans import KMeansConfig
from jaxrec.semantic_ids.quantizers.opq import OpqConfig
from jaxrec.semantic_ids.quantizers.residual import ResidualConfig
from jaxrec.semantic_ids.quantizers.rqvae import RqVaeConfig
from jaxrec.semantic_ids.table.collisions import CollisionConfig, resolve
from jaxrec.semantic_ids.table.space import SemanticIds, read_codes, write_codes

__all__ = [
    "BalancedConfig",
    "Codebooks",
    "CollisionConfig",
    "FsqConfig",
    "KMeansConfig",
    "OpqConfig",
    "ResidualConfig",
    "RqVaeConfig",
    "SemanticIdConfig",
    "SemanticIds",
    "decode",
    "encode",
    "encode_catalogue",
    "fit",
    "read_codes",
    "resolve",
    "rq_opq",
    "write_codes",
]
