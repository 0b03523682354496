"""What 24 experts, 2 for each token, cost against a dense feed-forward of the same active size.

    python benchmarks/moe.py [--quick]

The layer alone (forward and backward) and the whole training step; then the ways of running experts against each other.
`blocked` is what a CPU uses. One JSON line a row; ratio = ours / peer, timed in turns in the same run, best of several.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from shared.synthetic import TrainingStep, demo_config
from shared.timing import best_of, parser, report

from jaxrec.nn.layers import FeedForward
from jaxrec.nn.moe import MixtureOfExperts

EXPERTS, EXPERTS_PER_TOKEN = 24, 2
CONFIG = demo_config()
WIDTH, HIDDEN = CONFIG.model.width, CONFIG.model.hidden
TOKENS = CONFIG.batch_size * CONFIG.features.targets * 3  # of the whole batch: 3 for each target


def make_layer(layer, x: jax.Array) -> Callable:
    """A call of the layer and its gradients for parameters and input: () -> (out, gradients)."""
    variables = layer.init(jax.random.key(0), x)
    upstream = jax.random.normal(jax.random.key(1), x.shape)

    @jax.jit
    def run(variables, x):
        out, pull = jax.vjp(layer.apply, variables, x)
        return out, pull(upstream)

    return lambda: run(variables, x)


def compare_layers(repeats: int) -> None:
    """The layer against a dense one, and the ways of running it against each other."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((TOKENS, WIDTH)), jnp.float32)
    names = ("blocked", "ragged", "dense")
    experts = {name: make_layer(MixtureOfExperts(EXPERTS, EXPERTS_PER_TOKEN, HIDDEN, name), x) for name in names}
    oracle = experts["dense"]()
    for exact in ("blocked", "ragged"):
        for one, other in zip(jax.tree.leaves(experts[exact]()), jax.tree.leaves(oracle)):
            np.testing.assert_allclose(one, other, atol=2e-3, rtol=2e-3, err_msg=exact)
    feed_forward = make_layer(FeedForward(EXPERTS_PER_TOKEN * HIDDEN), x)
    ragged, dense = best_of([experts["ragged"], experts["dense"]], 2)
    blocked, peer = best_of([experts["blocked"], feed_forward], repeats)
    case = f"layer, E={EXPERTS} top-{EXPERTS_PER_TOKEN} D={WIDTH} F={HIDDEN} tokens={TOKENS}"
    report("moe_layer", case, blocked, peer, f"feed-forward of {EXPERTS_PER_TOKEN * HIDDEN}")
    for time, name in ((ragged, "ragged_dot"), (dense, "all experts, dense")):
        report("moe_dispatch", f"{case}, blocked", blocked, time, name)


def compare_steps(repeats: int) -> None:
    """The whole training step."""
    sparse = TrainingStep(demo_config(experts=EXPERTS, experts_per_token=EXPERTS_PER_TOKEN))
    dense = TrainingStep(demo_config(experts=1, hidden=EXPERTS_PER_TOKEN * HIDDEN))
    ours, peer = best_of([sparse, dense], repeats)
    case = f"training step, E={EXPERTS} top-{EXPERTS_PER_TOKEN} D={WIDTH} F={HIDDEN} B={CONFIG.batch_size}"
    report("moe_step", case, ours, peer, f"feed-forward of {EXPERTS_PER_TOKEN * HIDDEN}")


def main() -> None:
    quick = parser(__doc__).parse_args().quick
    compare_layers(3 if quick else 12)
    compare_steps(3 if quick else 12)


if __name__ == "__main__":
    main()
