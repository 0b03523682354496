"""What was typed, as arrays of a search: every text that it finds begins with it, byte by byte."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TypedText:
    """What B users typed: after m of its bytes, which of the V tokens may follow (`jaxrec.text.token_bytes`)."""

    table: jax.Array
    """uint32 [B, words, V], bit m % 32 of word m // 32: whether the token may follow after m bytes."""
    length: jax.Array
    """int32 [B], bytes; after so many any token may follow."""
    token_lengths: jax.Array
    """int32 [V], bytes of every token."""

    def begun(self) -> jax.Array:
        """int32 [B, 1], the bytes written at the begin of a search."""
        return jnp.zeros((self.length.shape[0], 1), jnp.int32)

    def may_follow(self, written: jax.Array, tokens: jax.Array | None) -> jax.Array:
        """Which tokens may follow each beam: bool [B, W, n] of tokens int32 [B, W, n], or of all V where None.

        written: int32 [B, W], bytes of what was typed that each beam has written.
        """
        batch, words, vocabulary = self.table.shape
        place = (written & 31).astype(jnp.uint32)[..., None]
        if tokens is not None:
            index = (written >> 5)[..., None] * vocabulary + tokens
            flat = self.table.reshape(batch, -1)
            found = jax.vmap(lambda row, at: row.at[at].get(mode="promise_in_bounds"))(flat, index)
        elif words == 1:
            found = self.table
        else:
            found = jnp.take_along_axis(self.table, (written >> 5)[..., None], axis=1)
        return ((found >> place) & 1) == 1

    def after(self, written: jax.Array, tokens: jax.Array) -> jax.Array:
        """The bytes written int32 [B, W] once each beam has one more token int32 [B, W]."""
        return jnp.minimum(written + self.token_lengths[tokens], self.length[:, None])
