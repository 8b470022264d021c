"""A client checks what a server sends before it runs any of it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mocosfl_jax.errors import UserError
from mocosfl_jax.wire import contract


def exported(target: str) -> jax.export.Exported:
    """A program that calls native code of the machine on which it runs."""
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((2,), jnp.float32))
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(target)]
    export = jax.export.export(jax.jit(lambda x: call(x)), platforms=("cpu",), disabled_checks=unchecked)
    return export(jax.ShapeDtypeStruct((2,), jnp.float32))


@pytest.mark.parametrize("target", ["xla_ffi_python_cpu_callback", "nowhere"])
@pytest.mark.parametrize("admitted", [True, False])
def test_a_program_that_calls_native_code_is_refused(target: str, admitted: bool) -> None:
    """Also if the server says that no check was disabled."""
    program = exported(target)
    assert program.disabled_safety_checks
    if not admitted:
        program = dataclasses.replace(program, disabled_safety_checks=())
    with pytest.raises(UserError, match="contract: found a program with custom calls, allowed: one without"):
        contract._load("forward", bytes(program.serialize()), "cpu")


def test_a_program_for_another_platform_is_one_line() -> None:
    export = jax.export.export(jax.jit(jnp.sin), platforms=("tpu",))
    program = bytes(export(jax.ShapeDtypeStruct((2,), jnp.float32)).serialize())
    with pytest.raises(UserError, match="contract: found a program that cannot be compiled") as caught:
        contract._load("forward", program, "cpu")
    assert "\n" not in str(caught.value)
