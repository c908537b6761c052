"""Counts what a program does, from its jaxpr: loops by their trip counts, custom calls by what they read and write."""

import math

import jax

from harmonic.models.costs import jaxprs


def operations(function, *args):
    """Operations of one call: 2 for each multiplication of a product or a convolution, 1 for each element of arrays
    that anything else reads or writes, and the body of a loop as often as it runs.

    Raises:
      ValueError: a loop whose number of rounds the jaxpr does not say.
    """
    return _operations(jax.make_jaxpr(function)(*args).jaxpr)


def _operations(jaxpr):
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation):
    name, parameters = equation.primitive.name, equation.params
    inner = [_operations(jaxpr) for value in parameters.values() for jaxpr in jaxprs(value)]
    if name == "while":
        raise ValueError(f"a loop whose rounds are not known: {equation.source_info}")
    if name == "scan":
        return parameters["length"] * inner[0]
    if name == "cond":
        return max(inner)
    if name == "pallas_call":
        return math.prod(parameters["grid_mapping"].grid) * inner[0]
    if name.startswith("custom_"):
        return inner[0]  # the function; the others are its derivatives
    if inner:
        return sum(inner)
    out = math.prod(equation.outvars[0].aval.shape)
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        return 2 * out * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        return 2 * out * math.prod(kernel) // kernel[parameters["dimension_numbers"].rhs_spec[0]]
    return sum(math.prod(getattr(v.aval, "shape", ())) for v in (*equation.invars, *equation.outvars))
