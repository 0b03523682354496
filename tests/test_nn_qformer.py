"""The Query-Former: moved projections against plain attention."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.nn.qformer import QFormer

B, S, D, Q, N, H = 2, 7, 12, 3, 2, 6


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def plain(params, sequence, mask, layers):
    """OneMall Eq. 3 with keys and values projected, one layer after the other."""
    x = jnp.broadcast_to(params["queries"], (B, Q, D))
    for layer in range(layers):
        query = jnp.einsum(
            "BQD,DNH->BQNH", norm(x, params[f"query_norm_{layer}"]["scale"]), params[f"query_{layer}"]["weight"]
        )
        key = jnp.einsum("BSD,DNH->BSNH", sequence, params[f"key_{layer}"])
        value = jnp.einsum("BSD,DNH->BSNH", sequence, params[f"value_{layer}"])
        scores = jnp.einsum("BQNH,BSNH->BNQS", query, key) / jnp.sqrt(H)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1)
        x = x + jnp.einsum("BNQS,BSNH->BQNH", weights, value).reshape(B, Q, -1) @ params[f"out_{layer}"]["weight"]
        feed_forward = params[f"feed_forward_{layer}"]
        hidden = jax.nn.gelu(norm(x, params[f"hidden_norm_{layer}"]["scale"]) @ feed_forward["up"]["weight"])
        x = x + hidden @ feed_forward["down"]["weight"]
    return x


def test_absorbed_projections_are_plain_attention():
    sequence, mask = draw(B, S, D), jnp.arange(S) < jnp.array([[4], [7]])
    for layers in (1, 2):
        module = QFormer(Q, N, H, 2 * D, layers)
        params = jax.tree.map(lambda x: x.unbox(), module.init(jax.random.key(0), sequence, mask)["params"],
                              is_leaf=lambda x: hasattr(x, "unbox"))  # fmt: skip
        out = module.apply({"params": params}, sequence, mask)
        np.testing.assert_allclose(out, plain(params, sequence, mask, layers), atol=2e-5)


def test_what_is_masked_does_not_matter_and_an_empty_history_is_finite():
    module, sequence = QFormer(Q, N, H, D), draw(B, S, D)
    mask = jnp.arange(S) < jnp.array([[3], [0]])
    variables = module.init(jax.random.key(0), sequence, mask)
    out = module.apply(variables, sequence, mask)
    np.testing.assert_array_equal(out, module.apply(variables, sequence + 5.0 * ~mask[..., None], mask))
    assert jnp.isfinite(out).all()
