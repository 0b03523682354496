"""Training steps against PyTorch, against the machine's matrix product, and packed targets against one at a time.

    python benchmarks/training.py [--peers PYTHON] [--quick]

PYTHON is an interpreter with torch and transformers, in an environment of its own; without it, its rows are left out.
One JSON line a row; ratio = ours / peer in milliseconds a step, timed in turns, best of several. All in float32.

training_tiger          TIGER's published T5, contexts of 20 items and their user, against transformers' T5: forward,
                        backward and AdamW. Both start from the same weights, without dropout, and must give the same
                        losses to 1e-3 while they learn; then once more with a dropout of 0.1, each as it has it.
training_qwen2          a Qwen2 that learns every next token, in the same way
training_*_lengths      the same examples with lengths as logs have them (Amazon Beauty's): ours a step of each length
                        bucket, weighted by the share of the examples that it holds; the peer a step of sequences that
                        are padded to the longest, under a mask. Milliseconds for a batch of the same size, losses agree
packed_preference       a listwise preference loss over 16 targets of one prompt, forward and backward, against running
                        each target with a copy of the prompt: in ours, and in transformers
training_*_share        the step's model FLOPs (three times the forward's matrix products) at the rate of a 2048 x 2048
training_onemall_share  `jnp.dot`, in the same turns: ratio = ours / that = 1 / peak_share. OneMall's experts count
                        without the empty rows of their blocks.

--quick: smaller batches, one layer, without dropout, lengths and OneMall.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared.peer_process import PeerProcess
from shared.synthetic import TrainingStep, demo_config
from shared.timing import best_of, parser, report

from jaxrec.console import report_user_errors
from jaxrec.models.causal import Causal, CausalConfig
from jaxrec.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxrec.models.huggingface import save_qwen2, save_t5
from jaxrec.models.vocabulary import ContextTokens
from jaxrec.systems.onemall.training import exact_loss
from jaxrec.training.flops import matmul_flops, step_flops

LEVELS, SIZE, USERS = 4, 256, 2000
TIGER = EncoderDecoderConfig(
    vocabulary=1 + LEVELS * SIZE + USERS,
    levels=tuple((1 + level * SIZE, SIZE) for level in range(LEVELS)),
    restrict=False,  # as transformers normalises
)
QWEN2 = CausalConfig(
    vocabulary=1 + LEVELS * SIZE, width=256, heads=4, groups=2, head_dim=64, hidden=1024, layers=4, restrict=False
)
PROMPT, TARGETS, TOKENS = 240, 16, 3
# Items of a context, and the share of Amazon Beauty's training examples that are so long: of the prefixes that TIGER
# reads, and of whole sequences, of each of which the last 20 items are read.
PREFIXES = {4: 0.54, 6: 0.112, 9: 0.098, 20: 0.25}
SEQUENCES = {4: 0.509, 6: 0.201, 9: 0.131, 20: 0.159}
RATE, DOT_SIZE = 1e-3, 2048


@dataclass
class Case:
    """A training step in both libraries."""

    name: str
    loss: Callable
    """loss(params, arrays, key) -> float32 []"""
    params: dict
    arrays: dict[str, np.ndarray]
    save: Callable
    """save(folder): the weights in Hugging Face's layout"""
    peer: dict
    """which model and loss `shared/training_peers.py` runs"""
    case: str
    """what the rows call it"""
    update: bool = True
    """AdamW included"""
    optimizer: optax.GradientTransformation = field(default_factory=lambda: optax.adamw(RATE, weight_decay=0.01))

    def begin(self) -> None:
        """A fresh state, and the compiled step."""
        params = jax.tree.map(jnp.array, self.params)
        self.state = params, self.optimizer.init(params), jax.random.key(0)
        self.compiled = jax.jit(self._step, donate_argnums=0)
        self.device_arrays = {name: jnp.asarray(as_type(value, 32)) for name, value in self.arrays.items()}

    def __call__(self) -> jax.Array:
        self.state, loss, self.gradients = self.compiled(self.state, self.device_arrays)
        return loss

    def _step(self, state, arrays):
        params, moments, key = state
        loss, gradients = jax.value_and_grad(self.loss)(params, arrays, jax.random.fold_in(key, 1))
        if not self.update:
            # What is not returned would not be computed.
            return state, loss, gradients
        updates, moments = self.optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments, jax.random.fold_in(key, 0)), loss, None

    def flops(self) -> float:
        """Model FLOPs of a step."""
        return 3 * matmul_flops(self.loss, self.params, self.arrays, jax.random.key(0))


def as_type(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers of so many bits, as tokens are; float32 for all else."""
    return values.astype(f"int{bits}" if np.issubdtype(values.dtype, np.integer) else np.float32)


def draw_lengths(batch: int, shares: dict[int, float], bucket: int | None = None) -> np.ndarray:
    """Items of each context, int [B]: such as fall into a bucket, or into all of them by their shares."""
    sizes, rng = np.array(list(shares)), np.random.default_rng(1)
    place = rng.choice(len(sizes), batch, p=list(shares.values()))
    if bucket is not None:
        place[:] = list(shares).index(bucket)
    # One that is as long as can be, so that the arrays are as wide as the bucket.
    place[0] = place.max()
    lengths = rng.integers(np.append(0, sizes)[place] + 1, sizes[place] + 1)
    lengths[0] = sizes[place[0]]
    return lengths


def tiger(config: EncoderDecoderConfig, batch: int, dropout: float, lengths: np.ndarray | None = None) -> Case:
    """Contexts of a user and 20 items, or as many as `lengths` says; the next item's codes."""
    full = lengths is None
    lengths = np.full(batch, 20) if full else lengths
    config = replace(config, dropout=dropout)
    model = EncoderDecoder(config)
    rng = np.random.default_rng(0)
    offsets = 1 + SIZE * np.arange(LEVELS)
    history = rng.integers(0, SIZE, (batch, lengths.max(), LEVELS)) + offsets
    user = rng.integers(1 + LEVELS * SIZE, config.vocabulary, (batch, 1))
    contexts = np.concatenate([user, history.reshape(batch, -1)], axis=1)
    mask = np.arange(contexts.shape[1]) < 1 + LEVELS * lengths[:, None]
    targets = rng.integers(0, SIZE, (batch, LEVELS))
    first = ContextTokens(jnp.asarray(contexts[:1], jnp.int32), jnp.ones((1, contexts.shape[1]), bool))
    shapes = first, jnp.zeros((1, 1, LEVELS), int)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *shapes))["params"]

    def loss(params, arrays, key):
        inputs, train = ContextTokens(arrays["contexts"], arrays["mask"] > 0), bool(dropout)
        variables, rngs = {"params": params}, {"dropout": key} if train else None
        context = model.apply(variables, inputs, train, method="prefill", rngs=rngs)
        codes = arrays["targets"][:, None] - offsets
        return -model.apply(variables, context, codes, None, train, method="score", rngs=rngs).log_probs.mean()

    return Case(
        "training_tiger" if full else "training_tiger_lengths",
        loss,
        params,
        {"contexts": contexts, "mask": mask, "targets": targets + offsets},
        lambda folder: save_t5(folder, config, params),
        {"t5": True, "loss": "targets", "config": {}},
        f"B={batch} S={contexts.shape[1]} M={LEVELS} dropout={dropout}",
    )


def make_qwen2(config: CausalConfig) -> tuple[Causal, dict]:
    """The model and random parameters."""
    model = Causal(config)
    shapes = ContextTokens(jnp.zeros((1, 4), int), jnp.ones((1, 4), bool)), jnp.zeros((1, 1, LEVELS), int)
    return model, nn.unbox(jax.jit(model.init)(jax.random.key(0), *shapes))["params"]


def qwen2(config: CausalConfig, batch: int, lengths: np.ndarray | None = None) -> Case:
    """Every next token of sequences of 20 items, or as many as `lengths` says."""
    full = lengths is None
    lengths = np.full(batch, 20) if full else lengths
    length = LEVELS * int(lengths.max())
    model, params = make_qwen2(config)
    contexts = np.random.default_rng(0).integers(1, config.vocabulary, (batch, length))
    given = np.arange(length) < LEVELS * lengths[:, None]

    def loss(params, arrays, key):
        tokens, variables = arrays["contexts"], {"params": params}
        mask = arrays["mask"] > 0
        context = model.apply(variables, ContextTokens(tokens, mask), method="prefill")
        log_probs = model.apply(variables, context.states, tokens, mask, method="score_context")
        return -log_probs[:, 1:].sum() / mask[:, 1:].sum()

    return Case(
        "training_qwen2" if full else "training_qwen2_lengths",
        loss,
        params,
        {"contexts": contexts, "mask": given},
        lambda folder: save_qwen2(folder, config, params),
        {"t5": False, "loss": "next_tokens", "config": {}},
        f"B={batch} S={length} D={config.width} F={config.hidden} layers={config.layers}",
    )


def preference(config: CausalConfig, batch: int, packed: bool) -> Case:
    """16 targets of one prompt, packed or each behind a copy of it."""
    model, params = make_qwen2(config)
    rng = np.random.default_rng(0)
    contexts = rng.integers(1, config.vocabulary, (batch, PROMPT))
    targets = rng.integers(1, config.vocabulary, (batch, TARGETS, TOKENS))

    def loss(params, arrays, key):
        tokens, asked = arrays["contexts"], arrays["targets"]
        if not packed:
            tokens, asked = jnp.repeat(tokens, TARGETS, axis=0), asked.reshape(-1, 1, TOKENS)
        variables, inputs = {"params": params}, ContextTokens(tokens, jnp.ones(tokens.shape, bool))
        context = model.apply(variables, inputs, method="prefill")
        scores = model.apply(variables, context, asked, method="score").log_probs.sum(-1).reshape(-1, TARGETS)
        return -jax.nn.log_softmax(scores)[:, 0].mean()

    return Case(
        "packed_preference",
        loss,
        params,
        {"contexts": contexts, "targets": targets},
        lambda folder: save_qwen2(folder, config, params),
        {"t5": False, "loss": "preference", "config": {}},
        f"B={batch} P={PROMPT} L={TARGETS} M={TOKENS} D={config.width}",
        update=False,
    )


class Peers:
    """The process that PyTorch runs in."""

    def __init__(self, python: str):
        self.folder, threads = tempfile.TemporaryDirectory(), len(os.sched_getaffinity(0))
        self.process = PeerProcess(
            python, "training_peers.py", Path(self.folder.name), threads, "torch and transformers"
        )

    def add(self, case: Case) -> None:
        """Writes what the process needs for a case."""
        folder = Path(self.folder.name) / case.name
        folder.mkdir(exist_ok=True)
        case.save(folder)
        for name, array in case.arrays.items():
            np.save(folder / f"{name}.npy", as_type(array, 64))
        (folder / "case.json").write_text(json.dumps(case.peer | {"update": case.update}))

    def step(self, case: Case, fresh: bool = False) -> dict:
        """One step."""
        return self.process.ask(case=case.name, fresh=fresh)


def same_losses(peers: Peers, case: Case, steps: int) -> None:
    """AssertionError unless both libraries give the same losses, step after step."""
    case.begin()
    for step in range(steps):
        ours, peer = float(case()), peers.step(case, fresh=not step)["loss"]
        assert abs(ours - peer) < 1e-3 * max(1, abs(peer)), f"{case.name}, step {step}: loss {ours} and {peer}"


def compare(case: Case, peers: Peers | None, repeats: int, check: bool = True) -> None:
    """The rows of a training step: against PyTorch, and against the machine."""
    x = jnp.ones((DOT_SIZE, DOT_SIZE), jnp.float32)
    dot = jax.jit(jnp.dot)
    turns = [case, lambda: dot(x, x)]
    if peers is not None:
        peers.add(case)
        if check:
            same_losses(peers, case, 4)
        turns.append(partial(peers.step, case))
    case.begin()
    ours, product, *peer = best_of(turns, repeats)
    flops, peak = case.flops(), 2 * DOT_SIZE**3 / product  # FLOPs in a millisecond
    if peer:
        report(case.name, case.case, ours, peer[0], "transformers")
    more = {"peak_share": round(flops / peak / ours, 4), "gflops": round(flops / 1e9, 2)}
    report(f"{case.name}_share", case.case, ours, flops / peak, "jnp.dot peak", **more)


def compare_lengths(
    make: Callable[[np.ndarray], Case], shares: dict[int, float], batch: int, peers: Peers, repeats: int
):
    """The row of examples of all lengths: in buckets, and padded to the longest."""
    mixed, longest = make(draw_lengths(batch, shares)), max(shares)
    peers.add(mixed)
    same_losses(peers, mixed, 4)
    buckets = [make(draw_lengths(batch, shares, size)) for size in shares if size < longest] + [mixed]
    for case in buckets:
        case.begin()
    *ours, peer = best_of([*buckets, partial(peers.step, mixed)], repeats)
    mean = sum(share * each for share, each in zip(shares.values(), ours, strict=True))
    report(mixed.name, f"B={batch}, 1 to {longest} items", mean, peer, f"transformers, padded to {longest}")


def compare_packed(config: CausalConfig, batch: int, peers: Peers | None, repeats: int) -> None:
    """The rows of packed targets."""
    packed, apart = preference(config, batch, True), preference(config, batch, False)
    packed.begin()
    apart.begin()
    assert abs(float(packed()) - float(apart())) < 1e-4, "losses differ"
    for ours, peer in zip(*map(jax.tree.leaves, (packed.gradients, apart.gradients)), strict=True):
        assert jnp.abs(ours - peer).max() < 1e-3 * jnp.abs(peer).max() + 1e-6, "gradients differ"
    turns = [packed, apart]
    if peers is not None:
        peers.add(packed)
        same_losses(peers, packed, 1)
        turns.append(partial(peers.step, packed))
    ours, *others = best_of(turns, repeats)
    names = (f"{batch * TARGETS} prompts of one target", f"{batch * TARGETS} prompts of one target, transformers")
    for other, name in zip(others, names, strict=False):
        report("packed_preference", packed.case, ours, other, name)


def onemall_share(width: int, repeats: int) -> None:
    """The share of the demo's model, at a width; heads stay, experts grow with the width."""
    config = demo_config(width=width, hidden=2 * width)
    step = TrainingStep(config)
    variables = jax.eval_shape(lambda: step.assembly.init(config.seed))
    flops = step_flops(exact_loss(step.assembly, config), variables)(step.batch).count
    x = jnp.ones((DOT_SIZE, DOT_SIZE), jnp.float32)
    dot = jax.jit(jnp.dot)
    ours, product = best_of([step, lambda: dot(x, x)], repeats)
    peak = 2 * DOT_SIZE**3 / product
    case = f"width={width} hidden={2 * width} B={config.batch_size} L={config.features.targets}"
    more = {"peak_share": round(flops / peak / ours, 4), "gflops": round(flops / 1e9, 2)}
    report("training_onemall_share", case, ours, flops / peak, "jnp.dot peak", **more)


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--peers", metavar="PYTHON", help="an interpreter with torch and transformers")
    args = command.parse_args()
    peers = Peers(args.peers) if args.peers else None
    repeats, batch = (2, 32) if args.quick else (7, 256)
    t5, causal = TIGER, QWEN2
    if args.quick:  # compiling is most of it
        t5, causal = replace(t5, encoder_layers=1, layers=1), replace(causal, layers=1)
    compare(tiger(t5, batch, 0.0), peers, repeats)
    compare(qwen2(causal, batch // 4), peers, repeats)
    compare_packed(causal, 2 if args.quick else 4, peers, repeats)
    if not args.quick:
        compare(tiger(t5, batch, 0.1), peers, repeats, check=False)
        if peers is not None:
            compare_lengths(partial(tiger, t5, batch, 0.0), PREFIXES, batch, peers, repeats)
            compare_lengths(partial(qwen2, causal, batch // 4), SEQUENCES, batch // 4, peers, repeats)
        for width in (128, 192, 256):
            onemall_share(width, 12)
    if peers is not None:
        peers.process.close()


if __name__ == "__main__":
    sys.exit(report_user_errors(main))
