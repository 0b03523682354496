"""Query-Formers read 1,205 tokens into 160 for at most a third of the FLOPs (OneMall Table 6: 9.2 instead of 34.4).

    python benchmarks/qformer.py [--quick]
    python benchmarks/qformer.py --quality runs/with_qformer runs/without_qformer

The peer is the same model with `queries=0`: its decoder reads the histories as they are. FLOPs are the matrix products
of the forward pass of one context and its L targets, with the experts run exactly; L = 1 is Table 6. They are counted
for the model of Table 6 and for the demo's, also deeper: every decoder layer has keys and values of the whole context.
With --quality, hit rates from two finished runs instead. One JSON line a row; ratio = ours / peer.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
from shared.synthetic import demo_config, make_assembly, make_batch
from shared.timing import best_of, parser, report

from jaxrec.systems.onemall.model import OneMallAssembly
from jaxrec.training.flops import matmul_flops

# 10 queries a behavior as in §3.2; 130 + 75 + 500 + 500 = 1,205 tokens, or 130 + 3 * 10 = 160.
QUERIES, RECENT, HISTORIES = 10, 130, (75, 500, 500)
# The row 0.5B-A0.1B of OneMall's Table 1, whose hit rates are those of Table 6.
PAPER = {"width": 1024, "heads": 8, "layers": 4, "hidden": 4096, "experts": 12}


def make_forward(assembly: OneMallAssembly) -> Callable:
    """forward(variables, batch) -> (log-probabilities [B, L, M], mask of the context [B, S])."""
    model, catalogue = assembly.model, assembly.catalogue

    def forward(variables, batch):
        context = model.apply(variables, assembly.inputs(catalogue, batch), method="prefill")
        scored = model.apply(variables, context, catalogue.codes[batch["target"]], method="score")
        return scored.log_probs, context.mask

    return jax.jit(forward)


def build(queries: int, targets: int, batch_size: int, **model) -> tuple[OneMallAssembly, dict]:
    """The model with and without (0) Query-Formers, and a batch for it."""
    features = {"history_lengths": HISTORIES, "targets": targets, "buckets": (max(HISTORIES),)}
    config = demo_config(features, queries=queries, recent=RECENT, **model)
    assembly = make_assembly(config)
    return assembly, make_batch(assembly, config, batch_size)


def count(queries: int, targets: int, **model) -> tuple[float, int]:
    """GFLOPs of one example more, and the tokens of its context. Nothing is run.

    One more: the item table is made once a batch, however many examples share it.
    """

    def total(batch_size: int) -> tuple[float, int]:
        assembly, batch = build(queries, targets, batch_size, dispatch="ragged", **model)
        variables = jax.eval_shape(lambda: assembly.init(0))
        forward = make_forward(assembly)
        return matmul_flops(forward, variables, batch) / 1e9, jax.eval_shape(forward, variables, batch)[1].shape[1]

    (one, length), (two, _) = total(1), total(2)
    return two - one, length


def compare_flops(targets: int, **model) -> None:
    (ours, short), (peer, long) = (count(queries, targets, **model) for queries in (QUERIES, 0))
    assert (short, long) == (160, 1205)
    report("qformer_flops", describe(targets, **model), ours, peer, f"context={long}", "GFLOPs an example")


def compare_times(targets: int, batch_size: int, repeats: int, **model) -> None:
    runs = []
    for queries in (QUERIES, 0):
        assembly, batch = build(queries, targets, batch_size, **model)
        runs.append(partial(make_forward(assembly), assembly.init(0), batch))
    ours, peer = (time / batch_size for time in best_of(runs, repeats))
    report("qformer_time", f"{describe(targets, **model)} B={batch_size}", ours, peer, "context=1205", "ms an example")


def describe(targets: int, **model) -> str:
    made = demo_config(**model).model
    return f"width={made.width} layers={made.layers} L={targets} queries={QUERIES} context=160"


def compare_quality(ours: Path, peer: Path) -> None:
    """The hit rates of two runs, from what their evaluation wrote."""
    values = [_hit_rates(ours), _hit_rates(peer)]
    for key in values[0]:
        if values[1].get(key):
            report("qformer_quality", " ".join(key), values[0][key], values[1][key], peer.name, "hit rate")


def _hit_rates(run: Path) -> dict[tuple[str, str, str], float]:
    system = json.loads((run / "config.json").read_text())["system"]
    rows = json.loads((run / "evaluation.json").read_text())
    return {
        (row["split"], row["subset"], row["metric"]): row["value"]
        for row in rows
        if row["model"] == system and row["metric"].startswith("hr@")
    }


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--quality", nargs=2, type=Path, metavar=("RUN", "PEER"), help="runs with and without")
    arguments = command.parse_args()
    if arguments.quality:
        return compare_quality(*arguments.quality)
    for targets in (1, 16):
        compare_flops(targets, **PAPER)
        for layers in (2, 4):
            compare_flops(targets, layers=layers)
    for layers in (2,) if arguments.quick else (2, 4):
        compare_times(16, 16, 3 if arguments.quick else 7, layers=layers)


if __name__ == "__main__":
    main()
