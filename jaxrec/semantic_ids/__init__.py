"""Semantic IDs: quantizers `fit(key, x, ...)`, `encode(codebooks, x)`, `decode(codebooks, codes)`, and the ID space."""

from jaxrec.semantic_ids.codebooks import Codebooks, SemanticIdConfig, decode, encode
from jaxrec.semantic_ids.codebooks import fit as fit_semantic_ids
from jaxrec.semantic_ids.space import SemanticIdSpace, read_codes, write_codes

__all__ = [
    "Codebooks",
    "SemanticIdConfig",
    "SemanticIdSpace",
    "decode",
    "encode",
    "fit_semantic_ids",
    "read_codes",
    "write_codes",
]
