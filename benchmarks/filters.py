"""What a filter of its own for each request costs: to make, and in the search.

    python benchmarks/filters.py [--quick]

Eight requests with two filters between them and 50 items blocked for each. `from_masks` is what a request pays when its
filter was asked for before; `new_predicate` when it was not. The peer of both is bool [B, I], gathered and packed.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from decoding import decode, make_model
from shared.timing import best_of, parser, report

from jaxrec.catalogue import LiveCatalogue
from jaxrec.decoding import build_filter, stack

LEVELS, BATCH, BLOCKED = 3, 8, 50


def make_catalogue(count: int, codebook_size: int) -> LiveCatalogue:
    """Items with a category of twenty, a price and a stock that is half empty."""
    generator = np.random.default_rng(0)
    words = pa.DictionaryArray.from_arrays(generator.integers(0, 20, count, np.int32), [f"kind {n}" for n in range(20)])
    items = pa.table(
        {
            "item_id": pa.array(np.arange(count)).cast(pa.string()),
            "category": words.cast(pa.string()),
            "price": generator.gamma(2.0, 20.0, count),
            "in_stock": generator.random(count) < 0.5,
        }
    )
    return LiveCatalogue(items, generator.integers(0, codebook_size, (count, LEVELS)), (codebook_size,) * LEVELS)


def compare(count: int, codebook_size: int, beam_width: int, repeats: int) -> None:
    """All rows of one catalogue."""
    version = make_catalogue(count, codebook_size).current
    case = f"items={count} B={BATCH}"
    filters = [{"category": ["kind 3", "kind 7"], "in_stock": True}, {"price": {"min": 5, "max": 40}, "in_stock": True}]
    blocked = np.random.default_rng(1).integers(0, count, (BATCH, BLOCKED))

    def from_masks():
        return stack([version.allowed(filters[row % 2], blocked=blocked[row]) for row in range(BATCH)])

    def new_predicate():
        version.masks.clear()
        return version.mask(filters[0]).on_device

    made = from_masks()
    rows = np.arange(count)
    bools = np.stack(
        [
            version.mask(filters[row % 2]).holds(version.order.positions) & ~np.isin(rows, blocked[row])
            for row in range(BATCH)
        ]
    )
    packed = jax.jit(build_filter)(version.trie, jnp.asarray(bools))
    jax.tree.map(np.testing.assert_array_equal, made, packed)

    def from_bools():
        return jax.jit(build_filter)(version.trie, jnp.asarray(bools))

    ours, peer = best_of([from_masks, from_bools], repeats)
    report("filter_from_masks", case, ours, peer, "bool [B, I], gathered and packed")
    first, peer = best_of([new_predicate, from_bools], min(repeats, 3))
    report("filter_new_predicate", f"{case} one filter of two columns", first, peer, "bool [B, I], gathered and packed")

    model = make_model(2, BATCH, codebook_size)
    search = partial(decode, model, version.trie, beam_width=beam_width)
    free, filtered, whole = best_of([search, partial(search, made), lambda: search(from_masks())], repeats)
    case = f"{case} K={codebook_size} W={beam_width}"
    report("search_with_filter", case, filtered, free, "the search without a filter")
    report("search_and_making_its_filter", case, whole, free, "the search without a filter")


def main() -> None:
    quick = parser(__doc__).parse_args().quick
    for count, codebook_size in ((100_000, 256),) if quick else ((1_000_000, 2048), (10_000_000, 4096)):
        compare(count, codebook_size, 64, 3 if quick else 5)


if __name__ == "__main__":
    main()
