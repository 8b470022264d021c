"""Reading compiled programs: a hand-written text with known counts."""

import pytest

from mocosfl_jax.preflight import hlo

TEXT = """\
HloModule jit_f, is_scheduled=true

%fused_reduce (p: f32[8,4]) -> f32[8] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %all-reduce.9 = f32[8]{0} all-reduce(%p), to_apply=%add
}

%body (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%arg), index=1
  %fusion.1 = bf16[8,4]{1,0:T(8,128)(2,1)} fusion(%x), metadata={NAME}, backend_config={CYCLES}
  %all-gather-start = (f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%x), dimensions={0}
  %all-gather-done = f32[32,4]{1,0} all-gather-done(%all-gather-start)
  ROOT %tuple = (s32[], f32[8,4]{1,0}) tuple(%x, %x)
}

ENTRY %main (a: f32[8,4]) -> f32[8] {
  %a = f32[8,4]{1,0} parameter(0)
  %while.1 = (s32[], f32[8,4]{1,0}) while(%a), condition=%cond, body=%body
  %convert = s32[4]{0} convert(%a), backend_config={"estimated_cycles":"7"}
  ROOT %fusion.2 = f32[8]{0} fusion(%a, %convert), calls=%fused_reduce, metadata={op_name="jit(f)/reduce_sum"}
}
""".replace("CYCLES", '"estimated_cycles":"100"').replace(
    "NAME", 'op_name="jit(f)/while/body/closed_call/vmap(Client)/layer0/mul" stack_frame_id=3'
)


def test_operations_of_a_loop_count_as_often_as_it_runs() -> None:
    program = hlo.read(TEXT, trips=5)
    found = {o.name: o for o in program.operations}
    assert set(found) == {"fusion.1", "all-gather-start", "all-gather-done", "convert", "fusion.2"}
    assert found["fusion.1"] == ("fusion.1", "fusion", "vmap(Client)/layer0/mul", 100, 8 * 4 * (2 + 4), 5)
    assert found["convert"] == ("convert", "convert", "", 7, 4 * 4 + 8 * 4 * 4, 1)
    assert found["fusion.2"][2:] == ("reduce_sum", 0, 4 * (8 + 8 * 4 + 4), 1)
    assert sum(o.cycles * o.times for o in program.operations) == 507


def test_a_known_number_of_iterations_wins() -> None:
    text = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert {o.times for o in hlo.read(text, trips=5).operations if o.name == "fusion.1"} == {3}


def test_collectives_count_what_arrives() -> None:
    """Also those inside a fusion; of an asynchronous one, the result and not the operand."""
    assert hlo.read(TEXT, trips=5).collectives == {"all-gather": 5 * 32 * 4 * 4, "all-reduce": 8 * 4}


def test_a_collective_that_several_fusions_carry_counts_once() -> None:
    """As in the programs of a TPU: each fusion repeats it, with the same channel."""
    carried = TEXT.replace("all-reduce(%p),", "all-reduce(%p), channel_id=8,").replace(
        "  ROOT %fusion.2", "  %fusion.3 = f32[8]{0} fusion(%a), calls=%fused_reduce\n  ROOT %fusion.2"
    )
    assert hlo.read(carried, trips=5).collectives["all-reduce"] == 8 * 4
    two = carried.replace("channel_id=8, ", "")  # without a channel they are two
    assert hlo.read(two, trips=5).collectives["all-reduce"] == 2 * 8 * 4


@pytest.mark.parametrize(
    "shapes, size",
    [("pred[3]{0}", 3), ("s4[6]", 3), ("(u8[2,3], (f64[], bf16[5]))", 6 + 8 + 10), ("token[]", 0)],
)
def test_sizes(shapes: str, size: int) -> None:
    assert hlo.size_in_bytes(shapes) == size


@pytest.mark.parametrize(
    "branches", ["branch_computations={%one, %two}", "true_computation=%one, false_computation=%two"]
)
def test_every_branch_of_a_condition_counts(branches: str) -> None:
    text = "HloModule jit_f\n\n"
    for name, cycles in (("one", 3), ("two", 4)):
        text += f"%{name} (p: f32[2]) -> f32[2] {{\n  %p = f32[2]{{0}} parameter(0)\n"
        text += f"  ROOT %sine.{name} = f32[2]{{0}} sine(%p), "
        text += f'backend_config={{"estimated_cycles":"{cycles}"}}\n}}\n\n'
    text += "ENTRY %main (a: f32[2], i: pred[]) -> f32[2] {\n  %a = f32[2]{0} parameter(0)\n"
    text += "  %i = pred[] parameter(1)\n"
    text += f"  ROOT %conditional = f32[2]{{0}} conditional(%i, %a, %a), {branches}\n}}\n"
    assert [(o.name, o.cycles, o.times) for o in hlo.read(text, trips=1).operations] == [
        ("sine.one", 3, 1),
        ("sine.two", 4, 1),
    ]
