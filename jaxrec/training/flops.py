"""Counts of a model's floating-point operations, from its jaxpr."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal


@dataclass(frozen=True)
class Flops:
    """FLOPs of matrix products; `exact` is False if the count is a lower bound: see `count_matmuls`."""

    count: float
    exact: bool = True

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.count + other.count, self.exact and other.exact)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.count * times, self.exact or not times)


NONE = Flops(0.0)


def count_matmuls(function: Callable[..., Any], *args: Any) -> Flops:
    """FLOPs of all matrix products in one call: 2 for each multiply-add, nothing else counted.

    `args` may be shapes (`jax.ShapeDtypeStruct`); nothing is computed. A loop's body counts once for each iteration,
    and the products of a `shard_map` once for each device. A loop with a data-dependent number of iterations counts as
    0, and a data-dependent branch as the smallest one: then the count isn't exact. A training step is commonly counted
    as three times the forward pass: one forward, two backward.
    """
    jaxpr = jax.make_jaxpr(function)(*args)
    return _walk(jaxpr, [None] * len(jaxpr.in_avals))[0]


def matmul_flops(function: Callable[..., Any], *args: Any) -> float:
    """The FLOPs of `count_matmuls`."""
    return count_matmuls(function, *args).count


def step_flops(loss: Callable[..., Any], variables: dict) -> Callable[[Any], Flops]:
    """A function of a batch: the model FLOPs of a training step, three times the matrix products of the forward pass.

    loss: as `jaxrec.training.step.Loss`; variables: {"params", ...}, shapes are enough. Each shape of batch is counted
      once.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    params, extra = shapes.pop("params"), shapes
    counted: dict[tuple, Flops] = {}

    def count(batch: Any) -> Flops:
        case = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
        if case not in counted:
            counted[case] = count_matmuls(lambda *inputs: loss(*inputs, jax.random.key(0)), params, extra, batch) * 3
        return counted[case]

    return count


# ---- walking through a jaxpr; a value is that of an integer known at tracing time, None for all others ---------------

LONGEST = 100_000
"""The most iterations up to which a loop is followed."""
ARITHMETIC = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "max": max,
    "min": min,
    "clamp": lambda low, value, high: min(max(value, low), high),
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": operator.and_,
    "or": operator.or_,
    "convert_element_type": lambda value: value,
}
"""The primitives that compute the limits of loops."""


def _walk(jaxpr: Any, inputs: list) -> tuple[Flops, list]:
    """FLOPs of a jaxpr, closed or not, and the values of its outputs, given those of its inputs."""
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    values = dict(zip(jaxpr.constvars, map(_number, consts)))
    values |= zip(jaxpr.invars, inputs, strict=True)
    total = NONE
    for equation in jaxpr.eqns:
        flops, found = _visit(equation, [_value(values, each) for each in equation.invars])
        total += flops
        values |= zip(equation.outvars, found, strict=True)
    return total, [_value(values, each) for each in jaxpr.outvars]


def _visit(equation: Any, values: list) -> tuple[Flops, list]:
    """FLOPs of an equation, and the values of its outputs, given those of its inputs."""
    name, params, unknown = equation.primitive.name, equation.params, [None] * len(equation.outvars)
    if name in ARITHMETIC:
        return NONE, unknown if None in values else [_compute(equation, values)]
    if name in LOOPS:
        return LOOPS[name](params, values), unknown
    if name.startswith("ragged_dot"):
        return Flops(2.0 * math.prod(equation.outvars[0].aval.shape) * equation.invars[0].aval.shape[-1]), unknown
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return Flops(2.0 * math.prod(out) * math.prod(left[axis] for axis in contracting)), unknown
    total = NONE
    for inner in _jaxprs(params):
        count = len(getattr(inner, "jaxpr", inner).invars)
        flops, found = _walk(inner, values if count == len(values) else [None] * count)
        total += flops
        unknown = found if len(found) == len(unknown) else unknown
    if name == "shard_map":
        total *= math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return total, unknown


def _scan(params: dict, values: list) -> Flops:
    kept = params["num_consts"]  # the others change at every iteration
    return _walk(params["jaxpr"], values[:kept] + [None] * (len(values) - kept))[0] * params["length"]


def _while(params: dict, values: list) -> Flops:
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    of_test, of_both = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    test_consts, body_consts, begin = values[:of_test], values[of_test:of_both], values[of_both:]
    changing = [None] * len(begin)
    each_test, each_turn = _walk(test, test_consts + changing)[0], _walk(body, body_consts + changing)[0]
    if each_test == each_turn == NONE:
        return NONE
    turns = _turns(test.jaxpr, body.jaxpr, test_consts, body_consts, begin)
    if turns is None:
        return replace(each_test, exact=False)
    return each_test * (turns + 1) + each_turn * turns


def _turns(test: Any, body: Any, test_consts: list, body_consts: list, carried: list) -> int | None:
    """The number of iterations of a loop, found by following its condition; None if unknown."""
    for turn in range(LONGEST):
        (going,) = _follow(test, test_consts + carried)
        if going is None:
            return None
        if not going:
            return turn
        carried = _follow(body, body_consts + carried)
    return None


def _follow(jaxpr: Any, inputs: list) -> list:
    """The values of a jaxpr's outputs, computed from those of its inputs; None where unknown."""
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        if equation.primitive.name in ARITHMETIC:
            known = [_value(values, each) for each in equation.invars]
            values[equation.outvars[0]] = None if None in known else _compute(equation, known)
    return [_value(values, each) for each in jaxpr.outvars]


def _cond(params: dict, values: list) -> Flops:
    index, branches = values[0], params["branches"]
    if index is not None:
        branches = [branches[max(0, min(int(index), len(branches) - 1))]]
    found = [_walk(branch, values[1:])[0] for branch in branches]
    least = min(found, key=lambda each: each.count)
    return replace(least, exact=all(each == least for each in found) and least.exact)


LOOPS = {"scan": _scan, "while": _while, "cond": _cond}


def _compute(equation: Any, values: list) -> Any:
    return equation.outvars[0].aval.dtype.type(ARITHMETIC[equation.primitive.name](*values))


def _value(values: dict, variable: Any) -> Any:
    return _number(variable.val) if isinstance(variable, Literal) else values.get(variable)


def _number(value: Any) -> Any:
    kind = jnp.result_type(value)
    plain = jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.bool_)
    return np.asarray(value)[()] if plain and not np.ndim(value) else None


def _jaxprs(params: dict) -> list:
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
    return [each for each in leaves if hasattr(each, "eqns") or hasattr(each, "jaxpr")]
