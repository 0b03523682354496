"""Sparse mixture of experts with loss-free load balancing (OneMall Eq. 6).

The router's bias affects the *selection* of experts only, never the gates. It is not a parameter: after each step
`balance` moves it against the measured load, without a gradient (DeepSeek's auxiliary-loss-free rule).

Three ways to compute the chosen experts, equal up to rounding. None drops a token, and padding has no expert:

- `dense`: every expert on every token; the oracle of the tests.
- `ragged`: `jax.lax.ragged_dot` over tokens sorted by expert, for accelerators (on CPU it costs as much as `dense`).
- `blocked`: tokens arranged by expert in blocks, and a loop that multiplies each block by its expert's matrices; for
  CPU.

`auto` chooses one of the last two, in training and in serving.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers as init
from jax.export import is_symbolic_dim

from jaxrec.nn.layers import partitioned

EXPORT_BATCH = 32
"""The batch size for which an exported model is tuned on CPU; others give the same numbers."""

NOWHERE = jnp.iinfo(jnp.int32).max
"""the slot of an assignment to no expert"""

Dispatch = Literal["auto", "blocked", "ragged", "dense"]


def route(logits: jax.Array, bias: jax.Array, experts_per_token: int) -> tuple[jax.Array, jax.Array]:
    """Choose experts: logits [T, E] and bias [E] -> (experts int32 [T, k], gates float32 [T, k] that sum to 1).

    Selection by score + bias, gates from the scores alone.
    """
    scores = jax.nn.sigmoid(logits.astype(jnp.float32))
    _, experts = jax.lax.top_k(scores + jax.lax.stop_gradient(bias), experts_per_token)
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    return experts, gates / jnp.maximum(gates.sum(-1, keepdims=True), 1e-9)


def balance(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """The next bias [E] after a step with `load` [E] assignments: down where the load is above its mean, up below."""
    return bias + rate * jnp.sign(load.mean() - load)


def run_dense(x, up, down, experts, gates):
    """x [T, D]; up [E, D, F]; down [E, F, D]; experts, gates [T, k] -> [T, D]. Every expert on every token.

    A token without an expert has the index E; its gates are ignored.
    """
    out = jnp.einsum("TEF,EFD->TED", nn.gelu(jnp.einsum("TD,EDF->TEF", x, up)), down)
    weight = (jax.nn.one_hot(experts, len(up), dtype=gates.dtype) * gates[..., None]).sum(1)
    return jnp.einsum("TED,TE->TD", out, weight.astype(x.dtype))


def run_ragged(x, up, down, experts, gates):
    """As `run_dense`, over tokens sorted by expert."""
    k = experts.shape[1]
    flat, gates = experts.reshape(-1), jnp.where(experts < len(up), gates, 0.0)
    order = jnp.argsort(flat, stable=True)
    # Rows outside all groups are undefined, so tokens without an expert are appended to the last group.
    sizes = jnp.bincount(jnp.minimum(flat, len(up) - 1), length=len(up)).astype(jnp.int32)
    hidden = nn.gelu(jax.lax.ragged_dot(x[order // k], up, sizes))
    out = jax.lax.ragged_dot(hidden, down, sizes)
    return jnp.zeros_like(x).at[order // k].add(out * gates.reshape(-1)[order, None].astype(x.dtype))


def _rank_in_expert(experts: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """For flat assignments int32 [A]: each one's rank among those of its expert, and the load [E].

    The rank of an assignment to no expert is undefined.
    """
    chosen = jax.nn.one_hot(experts, count, dtype=jnp.int32)
    ranks = jnp.cumsum(chosen, axis=0) - 1
    return jnp.take_along_axis(ranks, experts[:, None], axis=1)[:, 0], chosen.sum(0)


def _through(x, slots, total, gates, apply):
    """Scatter the tokens of x [T, D] to `slots` int32 [T*k], apply [total, D] -> [total, D], and gather them.

    A slot of `total` or more is none: nothing is scattered there, and zeros are gathered.
    """
    k = gates.shape[1]
    nowhere, rows = x.shape[0], jnp.arange(slots.shape[0]) // k  # `len` would refuse the symbolic batch of an export
    source = jnp.full((total,), nowhere, jnp.int32).at[slots].set(rows, mode="drop")
    laid = jnp.take(x, source, axis=0, mode="fill", fill_value=0)
    home = jnp.take(apply(laid), slots, axis=0, mode="fill", fill_value=0).reshape(x.shape[0], k, x.shape[1])
    return jnp.einsum("TkD,Tk->TD", home, gates.astype(x.dtype))


def run_blocked(x, up, down, experts, gates, block: int | None = None):
    """As `run_dense`: tokens arranged by expert, each expert's share padded to whole blocks, nothing dropped.

    `block` is in tokens; by default a fair share of an expert is about four blocks.
    """
    count, flat = len(up), experts.reshape(-1)
    block = block or block_size(flat.shape[0], count)
    blocks = -(-flat.shape[0] // block) + count
    rank, load = _rank_in_expert(flat, count)
    used = -(-load // block)  # blocks of each expert
    first = jnp.cumsum(used) - used
    owner = jnp.clip(jnp.searchsorted(jnp.cumsum(used), jnp.arange(blocks), side="right"), 0, count - 1)

    slots = jnp.where(flat < count, first[flat] * block + rank, NOWHERE)
    # A loop would span devices.
    alone = jax.sharding.get_abstract_mesh().size <= 1
    apply = partial(_blocks, used=used.sum()) if alone else _batched_blocks
    return _through(x, slots, blocks * block, gates, lambda laid: apply(laid, up, down, owner))


def _batched_blocks(laid: jax.Array, up: jax.Array, down: jax.Array, owner: jax.Array) -> jax.Array:
    """As `_blocks`, all blocks at once, sharded over the devices of the mesh."""
    laid = laid.reshape(len(owner), -1, laid.shape[1])
    laid = nn.with_logical_constraint(laid, ("act_expert", None, "act_embed"))
    hidden = nn.gelu(jnp.einsum("XTD,XDF->XTF", laid, up[owner]))
    hidden = nn.with_logical_constraint(hidden, ("act_expert", None, "act_mlp"))
    return jnp.einsum("XTF,XFD->XTD", hidden, down[owner]).reshape(-1, laid.shape[2])


@jax.custom_vjp
def _blocks(laid: jax.Array, up: jax.Array, down: jax.Array, owner: jax.Array, used: jax.Array) -> jax.Array:
    """laid [X * block, D] -> [X * block, D]: the first `used` blocks, each through its expert `owner` int32 [X].

    A loop over the used blocks alone. No block copies its expert's matrices, as a batched product of gathered matrices
    would. The gradient is explicit, since JAX cannot differentiate a loop of data-dependent length.
    """
    return _blocks_forward(laid, up, down, owner, used)[0]


def _blocks_forward(laid, up, down, owner, used):
    block = laid.shape[0] // owner.shape[0]

    def one(index, made):
        out, hidden = made
        expert, row = owner[index], index * block
        inner = jax.lax.dynamic_slice_in_dim(laid, row, block) @ up[expert]
        out = jax.lax.dynamic_update_slice_in_dim(out, nn.gelu(inner) @ down[expert], row, 0)
        return out, jax.lax.dynamic_update_slice_in_dim(hidden, inner, row, 0)

    hidden = jnp.zeros((laid.shape[0], up.shape[2]), laid.dtype)
    out, hidden = jax.lax.fori_loop(0, used, one, (jnp.zeros_like(laid), hidden))
    return out, (laid, up, down, owner, used, hidden)


def _blocks_backward(kept, upstream):
    laid, up, down, owner, used, hidden = kept
    block = laid.shape[0] // owner.shape[0]

    def add(total, part, expert):  # `.at[expert].add` would be a scatter, element by element
        return jax.lax.dynamic_update_index_in_dim(total, total[expert] + part, expert, 0)

    def one(index, gradients):
        to_laid, to_up, to_down = gradients
        expert, row = owner[index], index * block
        inputs, inner, above = (jax.lax.dynamic_slice_in_dim(a, row, block) for a in (laid, hidden, upstream))
        outer, pull = jax.vjp(nn.gelu, inner)
        (to_inner,) = pull(above @ down[expert].T)
        to_laid = jax.lax.dynamic_update_slice_in_dim(to_laid, to_inner @ up[expert].T, row, 0)
        return to_laid, add(to_up, inputs.T @ to_inner, expert), add(to_down, outer.T @ above, expert)

    gradients = jax.lax.fori_loop(0, used, one, (jnp.zeros_like(laid), jnp.zeros_like(up), jnp.zeros_like(down)))
    return *gradients, None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def block_size(assignments: int, experts: int) -> int:
    """Tokens in a block of `run_blocked`: the power of two nearest to a quarter of a fair share, from 8 to 256."""
    return max(8, min(256, 2 ** round(math.log2(max(1, assignments / experts / 4)))))


RUN = {"dense": run_dense, "ragged": run_ragged, "blocked": run_blocked}


class MixtureOfExperts(nn.Module):
    """[..., D] -> [..., D] through `experts_per_token` of E experts of width F (OneMall Eq. 6).

    The bias of the selection is the variable `bias` [E] in the collection `balance`; if that is mutable, the load [E]
    of a call is sown into it as `load`.
    """

    experts: int
    experts_per_token: int
    hidden: int
    dispatch: Dispatch = "auto"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, where: jax.Array | None = None) -> jax.Array:
        """`where` bool [...]: mask of the tokens; padding has no expert, gives zeros and does not count as load."""
        width = x.shape[-1]
        fan_in = init.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
        up = self.param("up", partitioned(fan_in, "expert", "embed", "mlp"), (self.experts, width, self.hidden))
        down = self.param("down", partitioned(fan_in, "expert", "mlp", "embed"), (self.experts, self.hidden, width))
        router = self.param("router", partitioned(init.normal(0.02), "embed", None), (width, self.experts))
        bias = self.variable("balance", "bias", jnp.zeros, (self.experts,))
        flat = x.reshape(-1, width).astype(self.dtype)
        experts, gates = route(flat.astype(jnp.float32) @ router, bias.value, self.experts_per_token)
        if where is not None:
            experts = jnp.where(where.reshape(-1, 1), experts, self.experts)
        if self.is_mutable_collection("balance") and not self.is_initializing():
            load = jax.nn.one_hot(experts, self.experts).sum((0, 1))
            self.sow("balance", "load", load, reduce_fn=jnp.add, init_fn=lambda: 0.0)
        out = self._dispatch(x)(flat, up.astype(self.dtype), down.astype(self.dtype), experts, gates)
        return out.reshape(x.shape)

    def _dispatch(self, x: jax.Array):
        if self.dispatch != "auto":
            return RUN[self.dispatch]
        if is_symbolic_dim(x.shape[0]):
            # Exported: one program for all platforms, with the block size of a batch of EXPORT_BATCH.
            assignments = EXPORT_BATCH * math.prod(x.shape[1:-1]) * self.experts_per_token
            blocked = partial(run_blocked, block=block_size(assignments, self.experts))
            return partial(jax.lax.platform_dependent, cpu=blocked, default=run_ragged)
        return run_blocked if jax.default_backend() == "cpu" else run_ragged
