"""Counting a model's floating-point operations from what it computes."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def matmul_flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of all matrix products in one call: 2 for each multiply-add, nothing else counted.

    `args` may be shapes (`jax.ShapeDtypeStruct`); nothing is run. A training step of a model is commonly taken as three
    times its forward pass: one forward, two backward.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def step_flops(loss: Callable[..., Any], variables: dict) -> Callable[[Any], float]:
    """A function of a batch: the model FLOPs of a training step, three times the matrix products of the forward pass.

    loss: as `jaxrec.training.step.Loss`; variables: {"params", ...}, shapes suffice. Each shape of batch counts once.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    params, extra = shapes.pop("params"), shapes
    counted: dict[tuple, float] = {}

    def count(batch: Any) -> float:
        case = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
        if case not in counted:
            counted[case] = 3 * matmul_flops(lambda *inputs: loss(*inputs, jax.random.key(0)), params, extra, batch)
        return counted[case]

    return count


def _count(jaxpr: Any) -> float:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> float:
    if equation.primitive.name == "dot_general":
        (contracting, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod([left[axis] for axis in contracting])
    if equation.primitive.name.startswith("ragged_dot"):
        return 2.0 * np.prod(equation.outvars[0].aval.shape) * equation.invars[0].aval.shape[-1]
    inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
    inner = [getattr(value, "jaxpr", value) for value in inner if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
    return sum(_count(each) for each in inner) * equation.params.get("length", 1)
