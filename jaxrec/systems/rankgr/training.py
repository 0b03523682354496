"""Training RankGR (Eq. 17): the initial assessment phase (next tokens and LDPO) and the rank head, all at once.

The targets of a context are one packed list: the items of the session after it with their levels, items of the history
itself after those before them (Eq. 2), and drawn pseudo-exposures.
"""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import UserError
from jaxrec.data import leveled_sessions
from jaxrec.data.sources.files import digest
from jaxrec.files import read_json, write_json
from jaxrec.losses.likelihood import ROWS, full_softmax, log_likelihood, next_token
from jaxrec.losses.preference import has_preference, ldpo
from jaxrec.models.huggingface import CONFIG_FILE
from jaxrec.models.rankgr import RankContext
from jaxrec.run import NEXT, TRAINING, Run, stage_path
from jaxrec.systems.generative import bound_loss, context_batches, supervised, train_model, training_cuts
from jaxrec.systems.rankgr.config import RankGRRunConfig, check_level_weights
from jaxrec.systems.rankgr.model import RankGRAssembly, RankGRCatalogue, assemble, write_backbone
from jaxrec.training.loop import TrainState
from jaxrec.training.stages import Stage, Task
from jaxrec.training.step import Loss

WEIGHTS = "pretrained.json"
"""The file in the stage's folder that says which pretrained weights it was initialised with."""


def stages(run: Run, config: RankGRRunConfig) -> tuple[Stage, ...]:
    """One supervised stage, from fresh or from pretrained weights."""
    # A training beside the old one may be initialised with other weights of the same folder.
    kept = (each / stage_path(TRAINING) / WEIGHTS for each in (run.path / NEXT, run.path))
    # Gigabytes are digested once, and only when the stage's turn has come.
    weights = cache(partial(_weights, config.pretrained, *kept))
    if config.pretrained and not Path(config.pretrained).is_dir():
        weights()  # A missing folder is refused before any work.

    def train(task: Task) -> None:
        if config.pretrained:
            write_json(task.folder / WEIGHTS, {"folder": config.pretrained, "files": weights()})
        fit(assemble(run, config), config, task)

    return supervised(run, config, train, weights)


def fit(assembly: RankGRAssembly, config: RankGRRunConfig, task: Task) -> TrainState:
    """As `jaxrec.systems.generative.train_model`."""
    write_backbone(task.folder, assembly.model.config)
    counted = counted_loss(assembly, config)
    return train_model(assembly, config, mean_loss, training_batches(assembly, config), task, counted=counted)


def mean_loss(
    assembly: RankGRAssembly,
    config: RankGRRunConfig,
    catalogue: RankGRCatalogue,
    params: Any,
    extra: dict,
    batch: dict,
    key: jax.Array,
    rows: int = ROWS,
):
    """As `jaxrec.training.step.Loss` (Eq. 17); a batch is what `training_batches` yields, rows as of `full_softmax`.

    All terms are divided by the weight of the batch's next-token targets, the paper's by users.
    """
    objective = config.objective
    sums, count, notes = losses(assembly, config, catalogue, {"params": params}, batch, key, rows)
    total = sums["next_token"] + objective.alpha * sums["ldpo"] + objective.rank_weight * sums["rank"]
    metrics = {name: (value, count) for name, value in (sums | {"loss": total}).items()} | notes
    return total / jnp.where(count > 0, count, 1), (metrics, extra)


def counted_loss(assembly: RankGRAssembly, config: RankGRRunConfig) -> Loss:
    """`mean_loss` as its FLOPs are counted: how many chunks `full_softmax` has, only the data decide."""
    return bound_loss(partial(mean_loss, rows=0), assembly, config)


def losses(
    assembly: RankGRAssembly,
    config: RankGRRunConfig,
    catalogue: RankGRCatalogue,
    variables: dict,
    batch: dict,
    key: jax.Array,
    rows: int = ROWS,
):
    """(sums over the batch of each loss of Eq. 17, the weight of the next-token targets, counts for the metrics)."""
    model, objective, rngs = assembly.model, config.objective, {"dropout": key}
    codes = catalogue.codes
    table = model.apply(variables, codes, catalogue.embeddings, method="item_table")
    inputs = assembly.inputs(catalogue, batch, table)
    context = model.apply(variables, inputs, True, method="prefill", rngs=rngs)
    targets = pack(assembly, config, batch)
    view, where = context.at(targets["last"]), targets["where"]
    scored = model.apply(variables, view, codes[targets["item"]], where, True, method="score", rngs=rngs)
    smoothing, means = objective.smoothing, scored.mean_log_probs
    loss = next_token(scored.log_probs, where, mean_log_probs=means, smoothing=smoothing)
    sums = {"next_token": (targets["weight"] * loss).sum()}
    # Items of the history are targets from other places than the session's: they have no level among its items.
    level, compared = targets["level"], targets["compared"]
    sums["ldpo"] = jnp.float32(0)
    if objective.alpha:
        scores = log_likelihood(scored.log_probs, compared)
        sums["ldpo"] = ldpo(scores, level, compared, beta=objective.beta).sum()
    sums["rank"] = jnp.float32(0)
    loss, wanted = model.config.rank.loss, targets["wanted"]
    if loss == "softmax":
        query = model.apply(variables, scored.states[:, :, 0], method="item_query")
        vectors = model.apply(variables, table, method="item_vectors")
        flat, items = query.reshape(-1, query.shape[-1]), targets["item"].reshape(-1)
        sums["rank"] = full_softmax(
            flat, vectors, items, where=wanted.reshape(-1), label_smoothing=smoothing, rows=rows
        ).sum()
    elif loss == "bce":
        # Dropout draws from the key itself.
        drawn = draw_targets(jax.random.fold_in(key, 0), targets, model.config.rank.targets)
        sums["rank"] = rank_loss(assembly, codes, variables, context, scored.states, targets, drawn).sum()
    held = compared.any(-1)
    notes = {
        "one_level": ((held & ~has_preference(level, compared)).sum(), held.sum()),
        "left_out": (jnp.where(batch["where"], batch["left_out"], 0).sum(), batch["where"].sum()),
    }
    return sums, targets["weight"].sum(), notes


def pack(assembly: RankGRAssembly, config: RankGRRunConfig, batch: dict) -> dict[str, jax.Array]:
    """All targets of a batch of contexts, [B, L] each.

    Returns, by name:
      item, level: int32, the target and its level in the order of preference.
      last: int32, the last item of the history that the target sees.
      weight: float32, of the target's next tokens (Eq. 9-10), 0 where it was drawn.
      where: bool, the weight isn't 0.
      compared: bool, LDPO compares the target with others (Eq. 8).
      wanted: bool, the target is a positive of the rank head.
      end: int32 [B, 1], the last item of the history, which the session's targets see.
      left_out: int32 [B, X], further positives of the session that are no targets (-1 = none).
    """
    there, shift = batch["where"][:, None], int(config.features.sampled > 0)
    end = jnp.maximum(batch["mask"].sum(-1, keepdims=True) - 1, 0)
    level, item = batch["target_level"], batch["target"]
    last = jnp.broadcast_to(end, item.shape)
    compared = (level >= 0) & there
    weights = level_weights(assembly, config)
    weight = jnp.where(compared & (level >= shift), weights[jnp.maximum(level - shift, 0)], 0.0)
    found_from = rank_from(assembly, config)
    wanted = compared & (level - shift >= found_from)
    if config.features.next_items:
        # The item after a place of the history; where there is none, next_where says so.
        after, real = batch["next_after"], batch["next_where"] & there
        place = jnp.minimum(after + 1, batch["item"].shape[1] - 1)
        following, behavior = (jnp.take_along_axis(batch[name], place, axis=1) for name in ("item", "behavior"))
        own_level = jnp.asarray(assembly.levels)[behavior]
        item, last = jnp.concatenate([item, following], 1), jnp.concatenate([last, after], 1)
        level = jnp.concatenate([level, jnp.full_like(after, -1)], 1)
        compared = jnp.concatenate([compared, jnp.zeros_like(real)], 1)
        weight = jnp.concatenate([weight, jnp.where(real, weights[own_level], 0.0)], 1)
        wanted = jnp.concatenate([wanted, real & (own_level >= found_from)], 1)
    return {
        "item": item,
        "last": last,
        "level": level,
        "weight": weight,
        "where": weight > 0,
        "compared": compared,
        "wanted": wanted,
        "end": end,
        "left_out": batch["left_out_item"],
    }


def rank_from(assembly: RankGRAssembly, config: RankGRRunConfig) -> int:
    """The lowest level whose items are positives of the rank head."""
    return assembly.positive if config.objective.rank_from is None else config.objective.rank_from


def level_weights(assembly: RankGRAssembly, config: RankGRRunConfig) -> jax.Array:
    """float32 [levels]: the weight of every level's items in next-token prediction.

    Raises:
      UserError: they are not one a level.
    """
    count, given = int(assembly.levels[-1]) + 1, config.objective.level_weights
    check_level_weights(given, count)
    return jnp.array(given or [1.0] * count, jnp.float32)


def draw_targets(key: jax.Array, targets: dict, count: int) -> jax.Array:
    """The positives that the rank head is trained on in this step: int32 [B, R], indices along L of `pack`, R <= count.

    Drawn uniformly from the session's positives, then from those of the history: the first R would always be the
    strongest and the earliest. Where there are fewer than R positives, other places fill the row.
    """
    wanted, history = targets["wanted"], targets["last"] < targets["end"]
    turn = jnp.where(wanted, history + jax.random.uniform(key, wanted.shape), 2.0)
    drawn = wanted & (jnp.argsort(jnp.argsort(turn, axis=1), axis=1) < count)
    return jnp.argsort(~drawn, axis=1, stable=True)[:, :count]


def rank_loss(
    assembly: RankGRAssembly,
    codes: jax.Array,
    variables: dict,
    context: RankContext,
    states: jax.Array,
    targets: dict,
    drawn: jax.Array,
) -> jax.Array:
    """Binary cross-entropy of the rank head over the candidates of every level, a value a target [B, R] (Eq. 12, 16).

    Candidates of a drawn target (`draw_targets`) are the true code and the most probable others. A candidate is a
    positive if any positive item of the same place of the history, drawn or not, continues the same prefix with it
    (Eq. 9). It is left out of the loss if only positives that are no targets do.

    Args:
      codes: int32 [I, M] of all items.
      states: [B, L, M, D], of all targets.
      targets: of `pack`.
      drawn: int32 [B, R].
    """
    model, count = assembly.model, targets["item"].shape[1]
    wanted, last, item = (jnp.take_along_axis(targets[name], drawn, axis=1) for name in ("wanted", "last", "item"))
    states = jnp.take_along_axis(states, drawn[..., None, None], axis=1)
    # together [B, R, L + X]: positives of the same place of the history, with the prefix so far in common.
    others = jnp.concatenate([targets["item"], targets["left_out"]], axis=1)
    packed = (last[:, :, None] == targets["last"][:, None, :]) & targets["wanted"][:, None, :]
    left_out = (last == targets["end"])[:, :, None] & (targets["left_out"] >= 0)[:, None, :]
    together, others = jnp.concatenate([packed, left_out], axis=2), codes[others]
    codes, memory = codes[item], model.apply(variables, context, method="memory")
    context, known = context.at(last), {}
    total = jnp.zeros(wanted.shape, jnp.float32)
    for level, size in enumerate(assembly.space.codebook_sizes):
        before = None if level == 0 else codes[..., level - 1]
        found = model.apply(variables, context, states[:, :, level], before, known, level, method="next_codes")
        log_probs, known = jax.lax.stop_gradient(found)
        true = codes[..., level]
        _, best = jax.lax.top_k(log_probs, min(model.config.rank.candidates, size))
        candidates = jnp.concatenate([true[..., None], best], axis=-1)
        same = (candidates[:, :, None, :] == others[:, None, :, None, level]) & together[..., None]
        labels, unlabelled = same[:, :, :count].any(2), same[:, :, count:].any(2)
        where = jnp.concatenate([jnp.ones_like(wanted)[..., None], best != true[..., None]], -1) & wanted[..., None]
        where &= labels | ~unlabelled
        own = jnp.take_along_axis(log_probs, candidates, axis=-1)
        prefixes = model.apply(variables, states[:, :, : level + 1], method="prefixes")
        logits = model.apply(variables, context, memory, prefixes, candidates, own, level, method="rank")
        total += jnp.where(where, jax.nn.softplus(jnp.where(labels, -logits, logits)), 0.0).sum(-1)
        together &= true[:, :, None] == others[:, None, :, level]
    return total


def training_batches(assembly: RankGRAssembly, config: RankGRRunConfig) -> Iterator[dict]:
    """Batches of contexts with their targets, without end, in an order that the seed decides."""
    most, features = config.sessions_per_user or None, config.features
    records, cuts = training_cuts(assembly, min_history=config.min_history, max_per_record=most)
    levels, positive = assembly.levels, rank_from(assembly, config)
    lengths, room = np.empty(len(cuts), np.int64), 0
    for row, (index, session) in enumerate(cuts):
        record = records[index]
        lengths[row] = features.bucket_of(record, session)
        if config.model.rank.loss == "bce":
            room = max(room, leveled_sessions.positives_left_out(record, session, features, levels, positive))
    # Drawn as often as word2vec draws: the power of 3/4 keeps popular items from being all that is drawn.
    share = (assembly.counts + 1.0) ** 0.75
    popular = np.cumsum(share / share.sum())
    popular[-1] = 1.0

    def example(record: dict, session: int, rng: np.random.Generator) -> dict:
        context = features.cut(record, session, behaviors=len(assembly.behaviors), wanted=assembly.wanted)
        held = leveled_sessions.targets(
            record, session, features, level_of=levels, rng=rng, popular=popular, positive=positive, room=room
        )
        following = leveled_sessions.next_items(context, features, rng) if features.next_items else {}
        return context | held | following

    return context_batches(records, cuts, example, config, lengths)


def _weights(folder: str, *kept: Path) -> list:
    """Digests of the pretrained weights; when their folder is there no more, the first that a training kept of it."""
    if not folder:
        return []
    if not Path(folder).is_dir():
        for noted in (read_json(file) for file in kept if file.exists()):
            if noted.get("folder") == folder:
                return noted["files"]
        raise UserError(f"configuration key 'pretrained': there is no folder {folder}; give one with a Qwen2")
    files = (Path(folder) / CONFIG_FILE, *sorted(Path(folder).glob("*.safetensors*")))
    return [digest(path) for path in files if path.is_file()]
