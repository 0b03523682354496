"""What reinforcement learning costs: a step with candidates, against peers, and the rollouts themselves.

    python benchmarks/rewards.py [--peers PYTHON] [--quick]

PYTHON is an interpreter with torch and transformers, in an environment of its own; without it, its row is left out.
One JSON line a row; ratio = ours / peer, timed in turns, best of several. All in float32.

grpo_step        the demo's OneMall: next-token and contrastive step with GRPO over 64 candidates of every context,
                 drawn before, against the same step without candidates: forward, backward, AdamW
grpo_whole_step  the same with drawing, on the share of the contexts that is drawn for (OneMall: 2%)
grpo_packed      GRPO over 64 candidates of a prompt of a Qwen2, packed, forward and backward, against running each
                 candidate with a copy of its prompt: in ours, and in transformers
rollouts         rollouts a second, (contexts, rollouts of each), with rewards; the peer is the beam search as wide

--quick: smaller batches, one layer.
"""

import dataclasses
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from shared.synthetic import ITEMS, demo_config, make_assembly, make_batch
from shared.timing import best_of, parser, report
from training import PROMPT, QWEN2, TOKENS, Case, Peers, make_qwen2, same_losses

from jaxrec.console import report_user_errors
from jaxrec.losses.policy import advantages, grpo
from jaxrec.models.causal import CausalConfig
from jaxrec.models.huggingface import save_qwen2
from jaxrec.models.vocabulary import ContextTokens
from jaxrec.systems.generative import bound_loss
from jaxrec.systems.onemall.config import OneMallConfig, ReinforcementConfig
from jaxrec.systems.onemall.reinforcement import Known, draw, joint_loss, mean_loss, with_sampler
from jaxrec.systems.onemall.training import mean_loss as supervised_loss
from jaxrec.training.optim import make_optimizer
from jaxrec.training.step import make_state, make_step

CANDIDATES = 64


class DrawnRates:
    """Rates of every item, drawn once: a reward that costs a look-up."""

    def terms(self, state: dict, arrays: dict, items: jax.Array) -> dict[str, jax.Array]:
        """As `jaxrec.systems.onemall.rewards.Reward`."""
        return {name: values[items] for name, values in state.items()}


class Steps:
    """A training step of a loss, compiled; a call makes one step."""

    def __init__(self, loss, variables: dict, batch: dict, config: OneMallConfig):
        optimizer = make_optimizer(config.optim, config.training.steps)
        self.state, self.batch = make_state(jax.tree.map(jnp.copy, variables), optimizer), batch
        self.step = jax.jit(make_step(loss, optimizer, config.seed), donate_argnums=0)

    def __call__(self) -> dict:
        self.state, metrics = self.step(self.state, self.batch)
        return metrics


def onemall_steps(config: OneMallConfig, repeats: int) -> None:
    """The rows of OneMall's steps and rollouts."""
    assembly, own = make_assembly(config), config.reinforcement
    batch, variables, reward = make_batch(assembly, config), assembly.init(config.seed), DrawnRates()
    generator = np.random.default_rng(1)
    rates = {name: jnp.asarray(generator.uniform(size=ITEMS), jnp.float32) for name in ("ctr", "ctcvr", "price")}
    known = Known(assembly.catalogue, assembly.space.build_trie(), rates)
    everywhere = dataclasses.replace(own, share=1.0)
    drawing = jax.jit(partial(draw, assembly, everywhere, reward))
    group = jax.block_until_ready(drawing(known, variables, batch, jax.random.key(0)))
    given = Partial(partial(joint_loss, assembly, config), assembly.catalogue, group, None)
    whole = Partial(partial(mean_loss, assembly, config, reward), known, {})
    plain = bound_loss(supervised_loss, assembly, config)
    steps = [
        Steps(given, variables, batch, config),
        Steps(whole, with_sampler(variables), batch, config),
        Steps(plain, variables, batch, config),
    ]
    ours, drawn, without = best_of(steps, repeats)
    case = f"B={config.batch_size} L={config.features.targets} D={config.model.width}"
    name = "the step without candidates"
    report("grpo_step", f"{case} m={CANDIDATES} of every context", ours, without, name)
    report("grpo_whole_step", f"{case} m={CANDIDATES} of {own.contexts} contexts, drawn", drawn, without, name)
    few = {key: value[:8] for key, value in batch.items()}
    beam = jax.jit(partial(draw, assembly, dataclasses.replace(everywhere, sampling="beam"), reward))
    turns = [lambda search=search: search(known, variables, few, jax.random.key(0)) for search in (drawing, beam)]
    times = [8 * CANDIDATES / milliseconds * 1e3 for milliseconds in best_of(turns, repeats)]
    report("rollouts", f"(8, {CANDIDATES})", *times, "beam search", "candidates a second")


def packed(config: CausalConfig, batch: int, together: bool) -> Case:
    """GRPO over the candidates of one prompt, packed or each behind a copy of it."""
    model, params = make_qwen2(config)
    generator = np.random.default_rng(0)
    contexts = generator.integers(1, config.vocabulary, (batch, PROMPT))
    targets = generator.integers(1, config.vocabulary, (batch, CANDIDATES, TOKENS))
    reward = jnp.asarray(np.random.default_rng(1).uniform(size=(batch, CANDIDATES)), jnp.float32)
    where = jnp.ones(reward.shape, bool)
    advantage = advantages(reward, where=where)

    def loss(params, arrays, key):
        tokens, asked = arrays["contexts"], arrays["targets"]
        if not together:
            tokens, asked = jnp.repeat(tokens, CANDIDATES, axis=0), asked.reshape(-1, 1, TOKENS)
        variables, inputs = {"params": params}, ContextTokens(tokens, jnp.ones(tokens.shape, bool))
        context = model.apply(variables, inputs, method="prefill")
        policy = model.apply(variables, context, asked, method="score").log_probs.sum(-1).reshape(-1, CANDIDATES)
        # As when they were drawn; a candidate's log-likelihood is far from 0, so what is shown is that, not the ratio.
        values = grpo(policy, jax.lax.stop_gradient(policy), advantage, where=where)
        return (values + jax.lax.stop_gradient(policy * advantage)).mean()

    return Case(
        "grpo_packed",
        loss,
        params,
        {"contexts": contexts, "targets": targets, "advantage": np.asarray(advantage)},
        lambda folder: save_qwen2(folder, config, params),
        {"t5": False, "loss": "grpo", "config": {}},
        f"B={batch} P={PROMPT} m={CANDIDATES} M={TOKENS} D={config.width}",
        update=False,
    )


def compare_packed(config: CausalConfig, batch: int, peers: Peers | None, repeats: int) -> None:
    """The rows of packed candidates."""
    ours, apart = packed(config, batch, True), packed(config, batch, False)
    ours.begin()
    apart.begin()
    assert abs(float(ours()) - float(apart())) < 1e-4, "losses differ"
    for left, right in zip(*map(jax.tree.leaves, (ours.gradients, apart.gradients)), strict=True):
        assert jnp.abs(left - right).max() < 1e-3 * jnp.abs(right).max() + 1e-6, "gradients differ"
    turns, names = [ours, apart], [f"{batch * CANDIDATES} prompts of one candidate"]
    if peers is not None:
        peers.add(ours)
        same_losses(peers, ours, 1)
        turns.append(partial(peers.step, ours))
        names.append(f"{names[0]}, transformers")
    times = best_of(turns, repeats)
    for other, name in zip(times[1:], names, strict=True):
        report("grpo_packed", ours.case, times[0], other, name)


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--peers", metavar="PYTHON", help="an interpreter with torch and transformers")
    args = command.parse_args()
    peers = Peers(args.peers) if args.peers else None
    config, causal, repeats = demo_config(), QWEN2, 7
    if args.quick:
        config = demo_config(layers=1)
        config = dataclasses.replace(config, batch_size=16)
        causal, repeats = dataclasses.replace(causal, layers=1), 2
    own = ReinforcementConfig(candidates=CANDIDATES, drawn=CANDIDATES, batch_size=config.batch_size)
    onemall_steps(dataclasses.replace(config, reinforcement=own), repeats)
    compare_packed(causal, 1 if args.quick else 2, peers, repeats)
    if peers is not None:
        peers.process.close()


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
