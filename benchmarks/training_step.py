"""The training step of the demo's model uses at least 35% of what the machine's matrix product can do.

    python benchmarks/training_step.py [--quick]

The peer is the machine's limit: the step's model FLOPs at the rate of a 2048 x 2048 float32 `jnp.dot`, timed in turns
with the step. Model FLOPs are three times the forward's matrix products, with the experts run exactly: embeddings,
norms, softmax and the optimiser count as nothing. One JSON line a row; ratio = ours / peer = 1 / peak_share.
"""

import jax
import jax.numpy as jnp
from shared.synthetic import TrainingStep, demo_config
from shared.timing import best_of, parser, report

from jaxrec.systems.onemall_training import flops_counter

DOT_SIZE = 2048


def compare(width: int, repeats: int) -> None:
    """The row of one model width; heads stay, experts grow with the width."""
    config = demo_config(width=width, hidden=2 * width)
    step = TrainingStep(config)
    flops = flops_counter(step.assembly, config)(step.batch)
    x = jnp.ones((DOT_SIZE, DOT_SIZE), jnp.float32)
    dot = jax.jit(jnp.dot)
    ours, product = best_of([step, lambda: dot(x, x)], repeats)
    peak = 2 * DOT_SIZE**3 / product  # FLOPs in a millisecond
    limit = flops / peak
    case = f"width={width} hidden={2 * width} B={config.batch_size} L={config.features.targets}"
    more = {"peak_share": round(limit / ours, 4), "gflops": round(flops / 1e9, 2), "peak_gflops_s": round(peak / 1e6)}
    report("training_step", case, ours, limit, "jnp.dot peak", **more)


def main() -> None:
    quick = parser(__doc__).parse_args().quick
    for width in (128,) if quick else (128, 192, 256):
        compare(width, 4 if quick else 12)


if __name__ == "__main__":
    main()
