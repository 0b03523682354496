"""The Query-Former: a few learned queries that read a long sequence (OneMall Eq. 3 and 4)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers as init

from jaxrec.nn.attention import masked_softmax
from jaxrec.nn.layers import FeedForward, Projection, RMSNorm, partitioned


class QFormer(nn.Module):
    """F = QFormer(Q, H, H): [B, S, D] with mask [B, S] -> [B, Q, D] (OneMall Eq. 3).

    Each layer is cross-attention from the queries to the sequence and a feed-forward, pre-norm on the queries' side (a
    norm over the long sequence would cost as much as reading it, so its tokens should be normalised already). Since
    queries are few and keys many, the key and value projections are moved to the queries' side:
    `q (h W_k)^T = (q W_k^T) h^T` and `p (h W_v) = (p h) W_v`. This is the same function with S*D*(2*Q*N) instead of
    S*D*(2*D) + S*D*(2*Q) multiplications, and without [B, S, N, H] arrays.
    """

    queries: int
    heads: int
    head_dim: int
    hidden: int
    layers: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, sequence: jax.Array, mask: jax.Array) -> jax.Array:
        width = sequence.shape[-1]
        learned = self.param("queries", partitioned(init.normal(1.0), "queries", "embed"), (self.queries, width))
        x = jnp.broadcast_to(learned.astype(self.dtype), (sequence.shape[0], *learned.shape))
        for layer in range(self.layers):
            # The first layer's queries are the same in every row, so its scores are one large matrix product.
            asked = learned[None].astype(self.dtype) if layer == 0 else x
            attended = self._attend(RMSNorm(name=f"query_norm_{layer}")(asked), sequence, mask, layer)
            x = x + Projection(width, ("heads", "embed"), self.dtype, name=f"out_{layer}")(attended)
            hidden = RMSNorm(name=f"hidden_norm_{layer}")(x)
            x = x + FeedForward(self.hidden, self.dtype, name=f"feed_forward_{layer}")(hidden)
        return x

    def _attend(self, queries: jax.Array, sequence: jax.Array, mask: jax.Array, layer: int) -> jax.Array:
        """[1 or B, Q, D] over [B, S, D] -> [B, Q, N*H]."""
        width, shape = sequence.shape[-1], (self.heads, self.head_dim)
        fan_in = partitioned(init.lecun_normal(in_axis=0, out_axis=(1, 2)), "embed", "heads", "head_dim")
        key = self.param(f"key_{layer}", fan_in, (width, *shape)).astype(self.dtype)
        value = self.param(f"value_{layer}", fan_in, (width, *shape)).astype(self.dtype)
        query = Projection(shape, ("embed", "heads", "head_dim"), self.dtype, name=f"query_{layer}")(queries)
        absorbed = jnp.einsum("BQNH,DNH->BQND", query, key) * self.head_dim**-0.5
        absorbed = absorbed.reshape(queries.shape[0], -1, width)  # [1 or B, Q*N, D]
        # The sequence's axis stays in front: with [B, X, S] the compiler would transpose the whole sequence first.
        if layer == 0:
            scores = jnp.einsum("BSD,XD->BSX", sequence, absorbed[0])
        else:
            scores = jnp.einsum("BSD,BXD->BSX", sequence, absorbed)
        weights = masked_softmax(scores, mask[..., None], axis=1).astype(self.dtype)
        read = jnp.einsum("BSX,BSD->BXD", weights, sequence).reshape(-1, self.queries, self.heads, width)
        return jnp.einsum("BQND,DNH->BQNH", read, value).reshape(*read.shape[:2], -1)
