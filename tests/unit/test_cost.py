"""The cost of compiled programs: bytes, launches and host stops, read from HLO as XLA prints it."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxserve.plan.cost import read_cost
from jaxserve.plan.hlo import HloProgram

STACK = "bf16[4,64,64]"
LAYER = 64 * 64 * 2
ROWS = 8 * 64 * 2


def cost_of(text: str) -> int:
    """Return the bytes that a program without Pallas kernels moves."""
    return sum(each.num_bytes for each in read_cost(HloProgram(text)).moved)


def entry(*lines: str, parameters: tuple[str, ...] = (STACK, "s32[]", "bf16[8,64]")) -> str:
    body = [f"  %p{index} = {shape} parameter({index})" for index, shape in enumerate(parameters)]
    return "\n".join(["ENTRY %main (p0: bf16[8]) -> bf16[8] {", *body, *lines, "}"])


def fused(name: str, *lines: str, parameters: tuple[str, ...]) -> str:
    body = [f"  %{name}.{index} = {shape} parameter({index})" for index, shape in enumerate(parameters)]
    return "\n".join([f"%{name} (a: bf16[8]) -> bf16[8] {{", *body, *lines, "}", ""])


def test_a_slice_in_a_fusion_reads_only_what_it_takes() -> None:
    inside = fused(
        "f",
        "  %slice = bf16[1,64,64] dynamic-slice(%f.0, %f.1), dynamic_slice_sizes={1,64,64}",
        "  %view = bf16[64,64] bitcast(%slice)",
        "  ROOT %dot = bf16[8,64] dot(%f.2, %view)",
        parameters=(STACK, "s32[]", "bf16[8,64]"),
    )
    text = inside + entry("  ROOT %y = bf16[8,64] fusion(%p0, %p1, %p2), kind=kOutput, calls=%f")
    assert cost_of(text) == LAYER + 4 + 2 * ROWS


def test_a_copy_of_a_slice_is_read_and_written() -> None:
    inside = fused(
        "f",
        "  ROOT %slice = bf16[1,64,64] dynamic-slice(%f.0, %f.1), dynamic_slice_sizes={1,64,64}",
        parameters=(STACK, "s32[]"),
    )
    text = inside + entry("  ROOT %y = bf16[1,64,64] fusion(%p0, %p1), kind=kLoop, calls=%f")
    assert cost_of(text) == 2 * LAYER + 4


def test_an_asynchronous_call_names_its_operands() -> None:
    inside = fused(
        "f",
        "  ROOT %slice = bf16[1,64,64] dynamic-slice(%f.0, %f.1), dynamic_slice_sizes={1,64,64}",
        parameters=(STACK, "s32[]"),
    )
    text = inside + entry(
        f"  %start = (({STACK}, s32[]), bf16[1,64,64]) fusion-start(%p0, %p1), kind=kLoop, calls=%f",
        "  ROOT %y = bf16[1,64,64] fusion-done(%start)",
    )
    assert cost_of(text) == 2 * LAYER + 4


def test_a_gather_on_a_sparse_core_moves_what_it_takes() -> None:
    """A TPU starts it as a custom call, whose computation starts the fusion."""
    rows = "bf16[2,64,64]"
    inside = fused(
        "gather",
        f"  ROOT %taken = {rows} gather(%gather.0, %gather.1), slice_sizes={{1,64,64}}",
        parameters=(STACK, "s32[2]"),
    )
    inside += fused(
        "fusion",
        f"  ROOT %result = {rows} fusion(%fusion.0, %fusion.1), kind=kCustom, calls=%gather",
        parameters=(STACK, "s32[2]"),
    )
    inside += fused(
        "core",
        f"  %begin = (({STACK}, s32[2]), {rows}, u32[]) call-start(%core.0, %core.1), to_apply=%fusion",
        f"  ROOT %end = {rows} call-done(%begin)",
        parameters=(STACK, "s32[2]"),
    )
    text = inside + entry(
        '  %start = ((), (), (s32[4])) custom-call-start(), custom_call_target="x", called_computations={%core}',
        f"  %update = (({STACK}, s32[2]), {rows}, (s32[4])) custom-call-update(%start, %p0, %p1)",
        f"  ROOT %y = {rows} custom-call-done(%update)",
        parameters=(STACK, "s32[2]"),
    )
    assert cost_of(text) == 4 * LAYER + 8


def test_an_update_in_place_writes_the_update() -> None:
    inside = fused(
        "f",
        f"  ROOT %update = {STACK} dynamic-update-slice(%f.0, %f.1, %f.2)",
        parameters=(STACK, "bf16[1,64,64]", "s32[]"),
    )
    text = inside + entry(
        f"  ROOT %y = {STACK} fusion(%p0, %p1, %p2), kind=kLoop, calls=%f", parameters=(STACK, "bf16[1,64,64]", "s32[]")
    )
    assert cost_of(text) == 2 * LAYER + 4


def test_a_prefetch_to_the_core_is_read_once() -> None:
    layout, core = "{1,0:T(8,128)(2,1)}", "{1,0:T(8,128)(2,1)S(1)}"
    text = entry(
        f"  %start = (bf16[16,128]{core}, bf16[16,128]{layout}, u32[]) copy-start(%p0)",
        f"  %done = bf16[16,128]{core} copy-done(%start)",
        f"  ROOT %y = bf16[16,128]{core} negate(%done)",
        parameters=(f"bf16[16,128]{layout}",),
    )
    assert cost_of(text) == 16 * 128 * 2


def test_the_workspace_of_a_library_call_is_not_moved() -> None:
    call = 'custom-call(%p2, %w), custom_call_target="__cublas$lt$matmul"'
    text = entry(
        "  %w = bf16[64,64] bitcast(%p0)", f"  ROOT %y = (bf16[8,64], s8[33554432]) {call}",
        parameters=("bf16[64,64]", "s32[]", "bf16[8,64]"),
    )  # fmt: skip
    assert cost_of(text) == LAYER + 2 * ROWS


def test_a_kernel_in_a_fusion_is_a_kernel() -> None:
    call = 'custom-call(%f.0), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/kv_update/mpmd_map"}'
    inside = fused("f", f"  ROOT %k = bf16[8,64] {call}", parameters=("bf16[8,64]",))
    cost = read_cost(HloProgram(inside + entry("  ROOT %y = bf16[8,64] fusion(%p2), kind=kCustom, calls=%f")))
    assert [(kernel.kernel, runs) for kernel, runs in cost.kernels] == [("kv_update", 1)]
    assert cost.num_bytes(lambda _: 7) == 7


def compiled(function: jax.stages.Wrapped, *shapes: tuple[int, ...]) -> HloProgram:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return HloProgram(function.lower(*arrays).compile().as_text() or "")


def test_a_loop_counts_its_trips() -> None:
    @jax.jit
    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 5, lambda i, x: jnp.sin(x @ lax.dynamic_index_in_dim(w, i, keepdims=False)), x)

    cost = read_cost(compiled(layers, (64, 64), (5, 64, 64)))
    least = 5 * 3 * 64 * 64 * 4
    assert least <= cost.num_bytes(lambda _: 0) <= 3 * least
    assert len(cost.launches_in_loops) == 1
    assert not cost.host_stops


@pytest.mark.parametrize("kind", ["conditional", "while"])
def test_what_depends_on_the_data_stops_the_host(kind: str) -> None:
    @jax.jit
    def depends(x: jax.Array) -> jax.Array:
        if kind == "conditional":
            return lax.cond(x[0, 0] > 0, lambda x: x @ x, jnp.sin, x)
        return lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x)

    assert len(read_cost(compiled(depends, (64, 64))).host_stops) == 1


def test_what_the_compiler_repeats_is_found() -> None:
    text = entry("  %y.remat2 = bf16[8,64] negate(%p2)", "  ROOT %z = bf16[8,64] add(%y.remat2, %p2)")
    assert read_cost(HloProgram(text)).rematerialized == ["y.remat2"]
