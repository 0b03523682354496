"""Phase one of OneSearch's preferences (§3.4.2): what the reward model changes in the order of the beam's answers.

The frozen stage `personalisation` answers searches of training; the reward model (Eq. 10) orders the answers anew. Of a
search whose order changes one answer is chosen: the strongest that the user clicked or bought, or else the one that
gained most places. Rejected are answers that lost places, and those behind the chosen one in the new order, but none
that the user clicked or bought. Answers and scores are kept in files beside the stage (`jaxrec.systems.stored_rows`).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrec.config import UserError
from jaxrec.console import console
from jaxrec.data.behavior_levels import POSITIVES
from jaxrec.data.examples import Record
from jaxrec.data.pipeline import Features
from jaxrec.run import Run
from jaxrec.systems.onesearch.config import PERSONALISATION, OneSearchConfig
from jaxrec.systems.onesearch.model import OneSearchAssembly
from jaxrec.systems.onesearch.preference import SearchExamples, packed_pairs, same_id, search_examples
from jaxrec.systems.onesearch.reward_config import REWARD_MODEL
from jaxrec.systems.onesearch.reward_model import SearchReward, make_search_reward, rewarded_order
from jaxrec.systems.recommender import DecodingConfig, GenerativeRecommender
from jaxrec.systems.stored_rows import stored_rows

ANSWERS = "answers"
"""The folder of the answers inside the stage's."""


class Preferred(NamedTuple):
    """The targets of a search."""

    items: np.ndarray
    """int32 [n]: the chosen item, then the rejected ones"""
    level: np.ndarray
    """int8 [n]"""
    score: np.ndarray | None
    """float32 [n]: their Rscores; None where they are compared by their levels, since a user chose"""


@dataclass(frozen=True, eq=False)
class AnsweredSearches(SearchExamples):
    """Searches as the frozen stage and the reward model read them."""

    reward: SearchReward

    def __call__(self, record: Record, place: int, rng: np.random.Generator) -> Features:
        """The arrays of a search for both models, which have no name in common."""
        history = self.reward.ranker.before_search(record, place)
        return self.prompt(record, place) | self.reward.read(history)


@dataclass(frozen=True, eq=False)
class ReorderedExamples(SearchExamples):
    """Phase one: searches whose order of answers the reward model changes."""

    preferred: dict[tuple[int, int], Preferred]
    """by user and place of the search"""

    def __call__(self, record: Record, place: int, rng: np.random.Generator) -> Features:
        """The arrays of a search and of its targets, as `packed_pairs`."""
        items, level, score = self.preferred[record["user"], place]
        counts, chosen = self.counts_of(record, place, items), np.arange(len(items)) == 0
        size = 1 + self.config.rewards.reordered.rejected
        return self.prompt(record, place) | packed_pairs(items, chosen, level, counts, size, score)


def reordered_examples(
    run: Run, assembly: OneSearchAssembly, config: OneSearchConfig, frozen: dict[str, dict], folder: Path
) -> ReorderedExamples:
    """Those of a run's training log.

    Args:
      config: with the batches, optimiser and length of the phase.
      frozen: the variables of the stages `personalisation` and `reward_model`.
      folder: where the answers are kept.

    Raises:
      UserError: the reward model changes the order of no search.
    """
    settings = config.rewards.reordered
    log = search_examples(run, assembly, config, settings.searches)
    reward = make_search_reward(run, config, frozen[REWARD_MODEL])
    answered = answered_searches(AnsweredSearches(**vars(log), reward=reward), frozen[PERSONALISATION], folder)
    preferred, kept = {}, []
    for row, (at, place) in enumerate(log.cuts):
        record = log.records[at]
        found = preferred_of(log, record, place, answered["answers"][row], answered["scores"][row], settings.rejected)
        if found is not None:
            preferred[record["user"], int(place)] = found
            kept.append(row)
    where = answered["answers"] >= 0
    bad = int((where & ~np.isfinite(answered["scores"])).sum())
    told = f"{len(kept):,} of {len(log.cuts):,} searches have an answer that the reward prefers to another"
    if bad:
        told += f"; {bad:,} of {int(where.sum()):,} rewards are no finite numbers, and such answers keep their places"
    if not kept:
        raise UserError(
            f"stage {REWARD_MODEL}: {told}, so that nothing can be learned from it; train it longer, raise "
            "rewards.reordered.answers, or leave out rewards.reordered"
        )
    console.print(f"rewards: {told}", markup=False)
    return ReorderedExamples(**log.take(np.array(kept)), preferred=preferred)


def answered_searches(examples: AnsweredSearches, variables: dict, folder: Path) -> dict[str, np.ndarray]:
    """answers int32 [n, k] (NONE: there is none) and scores float32 [n, k] (Eq. 10) of searches; made where missing."""
    assembly, config, reward = examples.assembly, examples.config, examples.reward
    count = config.rewards.reordered.answers
    decoding = DecodingConfig(beam_width=count, batch_size=config.batch_size)
    model = GenerativeRecommender(assembly, variables, assembly.features, decoding)

    @jax.jit
    def answer(served: Any, state: Any, batch: dict) -> dict[str, jax.Array]:
        found = model.retrieve(served, batch, None, count, count)
        answers = found.answers[:, :count]
        return {"answers": answers, "scores": reward.scores(state, batch, answers)}

    return stored_rows(folder, examples, partial(answer, model.served, reward.state), "answers")


def preferred_of(
    log: SearchExamples, record: Record, place: int, answers: np.ndarray, scores: np.ndarray, rejected: int
) -> Preferred | None:
    """The chosen answer of a search and at most `rejected` rejected ones; None where the reward changes nothing.

    answers int32 [k], in the order of the beam, NONE where there is none; scores float32 [k].
    """
    order = rewarded_order(scores, answers >= 0)
    place_of = np.argsort(order)
    gained = np.arange(len(answers)) - place_of
    if not gained.any():
        return None
    met = dict(zip(*(each.tolist() for each in log.levels.of(record, place)), strict=True))
    unmet = log.levels.unmet(np.maximum(answers, 0), log.levels.categories(record, place))
    level = np.array([met.get(int(item), int(other)) for item, other in zip(answers, unmet, strict=True)], np.int8)
    there = order[answers[order] >= 0]
    asked = there[level[there] < POSITIVES]
    best = asked[np.argmin(level[asked])] if len(asked) else int(np.argmax(gained))
    behind = (gained[there] < 0) | (place_of[there] > place_of[best])
    lost = there[behind & ~same_id(log.assembly.space.codes, answers[there], answers[[best, *asked]])]
    lost = lost[np.argsort(gained[lost] >= 0, kind="stable")][:rejected]  # those that lost places come first
    if not len(lost):
        return None
    both = np.array([best, *lost])
    return Preferred(answers[both], level[both], None if len(asked) else scores[both])
