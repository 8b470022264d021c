"""Counts multiply-adds, and the bytes kept for a backward pass, from the jaxpr of a function."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def forward_flops(function: Callable[..., Any], *shapes: Any) -> int:
    """Count the FLOPs of function(*shapes): twice the multiply-adds of its convolutions and matrix products.

    Zeros of the padding are counted. Zeros that a dilation inserts are not, so a backward pass costs as much
    as its forward pass for each of its gradients.

    Args:
      function: a function of arrays.
      shapes: trees of arrays or jax.ShapeDtypeStruct.

    Raises:
      ValueError: if the function has a loop of unknown length.

    Example:
      >>> import jax.numpy as jnp
      >>> forward_flops(jnp.matmul, jnp.zeros((2, 3)), jnp.zeros((3, 5)))
      60
    """
    return 2 * multiply_adds(jax.make_jaxpr(function)(*shapes).jaxpr)


def multiply_adds(jaxpr: core.Jaxpr) -> int:
    """Count the multiply-adds of a jaxpr, on all devices.

    Raises:
      ValueError: if it has a loop of unknown length that multiplies.
    """
    total = 0
    for eqn in jaxpr.eqns:
        match eqn.primitive.name:
            case "dot_general":
                total += _of_product(eqn)
            case "conv_general_dilated":
                total += _of_convolution(eqn)
            case "scan":
                total += eqn.params["length"] * multiply_adds(eqn.params["jaxpr"].jaxpr)
            case "cond":
                total += max(multiply_adds(branch.jaxpr) for branch in eqn.params["branches"])
            case "while":
                if sum(map(multiply_adds, core.jaxprs_in_params(eqn.params))):
                    raise ValueError("found a while loop, allowed: loops of known length")
            case "shard_map":
                total += eqn.params["mesh"].size * multiply_adds(eqn.params["jaxpr"])
            case _:
                total += sum(map(multiply_adds, core.jaxprs_in_params(eqn.params)))
    return total


def _of_product(eqn: core.JaxprEqn) -> int:
    """Each output is a sum over the contracted axes."""
    lhs: Any = eqn.invars[0].aval
    out: Any = eqn.outvars[0].aval
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return out.size * math.prod(lhs.shape[axis] for axis in contracted)


def _of_convolution(eqn: core.JaxprEqn) -> int:
    """Each output is a sum over the window and the input channels of its group.

    Where the input is dilated (in gradients of strides and in transposed convolutions), only one in
    prod(lhs_dilation) of these inputs is not an inserted zero.
    """
    rhs: Any = eqn.invars[1].aval
    out: Any = eqn.outvars[0].aval
    channels_out = rhs.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return out.size * (rhs.size // channels_out) // math.prod(eqn.params["lhs_dilation"])


def backward_flops(model: Callable[[Any, Any], Any], params: Any, x: Any, *, of_input: bool) -> int:
    """Count the FLOPs of the backward pass of model(params, x), without its forward pass.

    Args:
      model: a function of parameters and a batch.
      params: tree of shapes.
      x: shape of the batch.
      of_input: include the gradient of `x`.
    """
    out, pullback = jax.eval_shape(_vjp(model, of_input), params, x)
    return forward_flops(lambda pullback, grad: pullback(grad), pullback, out)


def kept_bytes(model: Callable[[Any, Any], Any], params: Any, x: Any, *, of_input: bool) -> int:
    """Count the bytes that model(params, x) keeps for its backward pass, without the parameters.

    Args:
      model: a function of parameters and a batch.
      params: tree of shapes.
      x: shape of the batch.
      of_input: include the gradient of `x`.
    """

    def residuals(params: Any, x: Any) -> list[Any]:
        return jax.tree.leaves(_vjp(model, of_input)(params, x)[1])

    jaxpr = jax.make_jaxpr(residuals)(params, x).jaxpr
    kept = {var for var in jaxpr.outvars if isinstance(var, core.Var)}
    return sum(size_in_bytes(var.aval) for var in kept - set(jaxpr.invars[: len(jax.tree.leaves(params))]))


def _vjp(model: Callable[[Any, Any], Any], of_input: bool) -> Callable[[Any, Any], tuple[Any, Any]]:
    if of_input:
        return lambda params, x: jax.vjp(model, params, x)
    return lambda params, x: jax.vjp(lambda params: model(params, x), params)


def size_in_bytes(tree: Any) -> int:
    """Return the bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
