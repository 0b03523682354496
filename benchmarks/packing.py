"""Packed targets: scoring L targets against one context is at least 5x faster than L contexts of one target each.

    python benchmarks/packing.py [--quick]

The peer is what a trainer does that makes an example of every target: the same model, on B * L contexts with L = 1. One
JSON line a row; ratio = ours / peer, timed in turns in the same run, best of several.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from shared.synthetic import demo_config, make_assembly, make_batch
from shared.timing import best_of, parser, report

from jaxrec.systems.onemall.model import OneMallAssembly


def make_functions(assembly: OneMallAssembly) -> tuple[Callable, Callable]:
    """score(variables, batch) -> log-probabilities [B, L, M]; gradient(variables, batch, train) -> as the params."""
    model, catalogue = assembly.model, assembly.catalogue

    def score(variables, batch, train=False, table=None):
        rngs, inputs = {"dropout": jax.random.key(0)}, assembly.inputs(catalogue, batch, table)
        context = model.apply(variables, inputs, train, method="prefill", rngs=rngs)
        codes = catalogue.codes[batch["target"]]
        return model.apply(variables, context, codes, None, train, method="score", rngs=rngs).log_probs

    def gradient(variables, batch, train):
        rest = {name: value for name, value in variables.items() if name != "params"}
        return jax.grad(lambda params: -score({"params": params, **rest}, batch, train).mean())(variables["params"])

    return jax.jit(score), jax.jit(gradient, static_argnums=2)


def separate(batch: dict) -> dict:
    """The same targets, each with a context of its own: [B, L, ...] -> [B * L, 1, ...]."""
    count = batch["target"].shape[1]
    repeated = {name: jnp.repeat(value, count, axis=0) for name, value in batch.items()}
    return repeated | {"target": batch["target"].reshape(-1, 1)}


def check_equal(score: Callable, gradient: Callable, variables: dict, packed: dict, apart: dict) -> None:
    """Means and norms: rounding differs with the shapes, and a token between two experts may fall to the other."""
    ours, peer = score(variables, packed), score(variables, apart).reshape(*packed["target"].shape, -1)
    assert jnp.abs(ours - peer).mean() < 1e-4, "log-probabilities differ"
    # Without `train`: then no expert is too full for a token, whatever else is in the batch.
    ours, peer = gradient(variables, packed, False), gradient(variables, apart, False)
    distance = optax.global_norm(jax.tree.map(jnp.subtract, ours, peer)) / optax.global_norm(peer)
    assert distance < 1e-2, f"gradients differ by {distance:.1e}"


def compare(targets: int, batch_size: int, repeats: int, **features) -> None:
    """Both rows of one L."""
    config = demo_config({"targets": targets, **features})
    assembly = make_assembly(config)
    packed = make_batch(assembly, config, batch_size)
    apart, variables = separate(packed), assembly.init(0)
    score, gradient = make_functions(assembly)
    # As when answering: the item table is made once for all batches, on both sides.
    table = assembly.model.apply(variables, assembly.catalogue, method="item_table")
    check_equal(score, gradient, variables, packed, apart)
    lengths = [packed[f"history_{index}_item"].shape[1] for index in range(len(assembly.behaviors))]
    case = f"L={targets} B={batch_size} history={'+'.join(map(str, lengths))} recent={config.model.recent}"
    peer_name = f"{batch_size * targets} contexts of one target"
    for claim, function in (
        ("packed_forward", lambda batch: score(variables, batch, table=table)),
        ("packed_forward_and_backward", lambda batch: gradient(variables, batch, True)),
    ):
        ours, peer = best_of([partial(function, packed), partial(function, apart)], repeats)
        report(claim, case, ours, peer, peer_name)


def main() -> None:
    quick = parser(__doc__).parse_args().quick
    for targets in (16,) if quick else (4, 16, 64):
        # 768 targets in all: the demo's 48 contexts at L=16, and what the peer's gradients leave room for.
        compare(targets, 768 // targets, 2 if quick else 7)
    if not quick:
        compare(16, 256 // 16, 7, history_lengths=(500,), buckets=(500,))


if __name__ == "__main__":
    main()
