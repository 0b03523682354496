"""Timing in turns, the row that every benchmark prints, and what their command lines share."""

import argparse
import json
import time
from collections.abc import Callable

import jax

from jaxrec.config import UserError


def best_of(functions: list[Callable], repeats: int) -> list[float]:
    """Milliseconds of each function: the best of `repeats` turns, after one to warm up.

    The functions take turns, so that other work on the machine slows all of them. 0 repeats: the first turn counts, for
    work that takes minutes.
    """
    best = [float("inf")] * len(functions)
    for turn in range(repeats + 1):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            jax.block_until_ready(function())
            if turn or not repeats:
                best[index] = min(best[index], 1e3 * (time.perf_counter() - start))
    return best


def report(claim: str, case: str, ours: float, peer: float, peer_name: str, unit: str = "ms", **more: float) -> None:
    """Prints a row as a JSON line; ratio = ours / peer."""
    row = {"claim": claim, "case": case, "ours": round(ours, 3), "peer": round(peer, 3), "peer_name": peer_name}
    print(json.dumps(row | {"ratio": round(ours / peer, 3), "unit": unit} | more), flush=True)


def parser(docstring: str) -> argparse.ArgumentParser:
    """A command line with --quick."""
    made = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="few cases, under a minute")
    return made


def parse_seeds(text: str) -> list[int]:
    """The numbers of an argument such as "0,1,2".

    Raises:
      UserError: one is no whole number.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds {text!r}: give whole numbers with commas between, such as 0,1,2") from error
    if min(seeds) < 0:
        raise UserError(f"--seeds {text!r}: a seed is 0 or more")
    return list(dict.fromkeys(seeds))
