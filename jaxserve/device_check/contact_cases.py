"""The calls that every kernel has to get right, in order from harmless to risky."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxserve.device_check.kernels import Kernels
from jaxserve.device_check.specs import AttentionSpec, ExpertSpec, KernelSpecs
from jaxserve.layers.context import MAX_EXACT_TOKENS
from kernels_pallas.grouped_matmul.api import ExpertShape
from kernels_pallas.grouped_matmul.cases import SPREADS, GroupedCase, HeadCase, grouped_case, head_case
from kernels_pallas.kernel_case import KernelCase
from kernels_pallas.lora_matmul.api import LoraModule
from kernels_pallas.lora_matmul.cases import SLOTS, LoraCase, lora_case
from kernels_pallas.paged_attention.cases import Case, attention_case
from kernels_pallas.rms_norm.cases import NormCase, norm_case
from kernels_pallas.rope.cases import RopeCase, rope_case
from kernels_pallas.routing.cases import random_logits, routing_case, tied_logits
from kernels_pallas.sampling.cases import sampling_case, step_cases

_LORA_RANK = 16
# Rows of a decode step, of a step that fills a tile, and of a prompt.
_ROWS = (1, 8, 200)
_QUICK_ROWS = (8,)
# Elements of a layer's matrices that are compared with the reference, and outputs that belong together.
_MAX_ELEMENTS, _OUTPUT_BLOCK = 1 << 24, 128


class ContactCase(NamedTuple):
    """One call.

    Attributes:
        op: the op's name, as in the folders of `kernels_pallas`.
        name: what is special about the call.
        quick: whether a quick check includes it.
        make: builds the call; raises NotImplementedError if there is no kernel for it.
    """

    op: str
    name: str
    quick: bool
    make: Callable[[Kernels], KernelCase]


def contact_cases(specs: KernelSpecs) -> Iterator[ContactCase]:
    """Yield the calls for a model."""
    for rows in _ROWS:
        quick = rows in _QUICK_ROWS
        norm = NormCase(num_tokens=rows, size=specs.hidden_size, added=True)
        yield ContactCase("rms_norm", f"{rows} rows", quick, partial(_norm, norm))
        if specs.mla is None:
            heads = (specs.attention.heads[0], specs.attention.heads[1])
            rope = RopeCase(
                num_tokens=rows, num_heads=heads, head_dim=specs.rope_dim, normalized=specs.normalized_heads
            )
            yield ContactCase("rope", f"{rows} rows", quick, partial(_rope, rope))
    if specs.experts is not None:
        yield from _routing(specs.experts)
    for step in step_cases((specs.vocab_size,)):
        quick = step.name == "filtered"
        yield ContactCase(
            "sampling", step.name, quick, lambda kernels, step=step: sampling_case(kernels.sampler(), step)
        )
    for name, shape in specs.linears.items():
        yield from _products(specs, name, shape, num_groups=1)
    if specs.experts is not None:
        for index, shape in enumerate(specs.experts.shapes):
            yield from _products(specs, f"experts {index}", shape, num_groups=specs.experts.num_experts)
    if specs.mla is not None:
        yield from _heads(specs)
    yield from _attention(specs.attention)
    yield from _lora(specs)


def _norm(case: NormCase, kernels: Kernels) -> KernelCase:
    return norm_case(kernels.norm(), case)


def _rope(case: RopeCase, kernels: Kernels) -> KernelCase:
    return rope_case(kernels.rope(), case)


def _routing(experts: ExpertSpec) -> Iterator[ContactCase]:
    def make(logits_TE: np.ndarray, kernels: Kernels) -> KernelCase:
        router = kernels.router(experts.router, experts.routed)
        return routing_case(router, experts.router, logits_TE, corrected=experts.corrected)

    for rows in _ROWS:
        logits_TE = random_logits(rows, experts.routed)
        yield ContactCase("routing", f"{rows} rows", rows in _QUICK_ROWS, partial(make, logits_TE))
    yield ContactCase("routing", "ties", False, partial(make, tied_logits(experts.routed)))


def _products(specs: KernelSpecs, name: str, shape: ExpertShape, *, num_groups: int) -> Iterator[ContactCase]:
    """Yield the products of a linear module, or of experts; the reference would take minutes for whole large ones."""
    shape = shape._replace(num_outputs=_fewer_outputs(shape))
    num_groups = min(num_groups, max(2, _MAX_ELEMENTS // (shape.num_outputs * shape.num_inputs)))

    def make(group_R: np.ndarray, quantized_rows: bool, kernels: Kernels) -> KernelCase:
        matmul = kernels.grouped_matmul(shape)
        if num_groups == 1 and shape.format is None and not matmul.max_dense_rows:
            raise NotImplementedError("XLA multiplies by these matrices")
        if quantized_rows and not (shape.format and matmul.takes_quantized_rows(shape.format, shape.num_inputs)):
            raise NotImplementedError("no product of quantised rows")
        case = GroupedCase(
            shape=shape,
            num_groups=num_groups,
            group_R=group_R,
            scale_dtype=specs.scale_dtype,
            quantized_rows=quantized_rows,
        )
        return grouped_case(matmul, case)

    spreads = list(SPREADS.items()) if num_groups > 1 else [("", _one_group)]
    top_k = 1 if specs.experts is None or num_groups == 1 else specs.experts.top_k
    for rows in _ROWS:
        for index, (spread, groups) in enumerate(spreads):
            quick = rows in _QUICK_ROWS and index == 0
            label = f"{name}, {rows} rows" + (f" {spread}" if spread else "")
            group_R = groups(num_groups, rows * top_k)
            yield ContactCase("grouped_matmul", label, quick, partial(make, group_R, False))
            if shape.format is not None and rows > MAX_EXACT_TOKENS:
                label += ", quantised"
                yield ContactCase("grouped_matmul", label, index == 0, partial(make, group_R, True))


def _fewer_outputs(shape: ExpertShape) -> int:
    """Return the number of outputs, or whole blocks of 128 of them if the matrix is large."""
    most = max(_OUTPUT_BLOCK, _MAX_ELEMENTS // shape.num_inputs // _OUTPUT_BLOCK * _OUTPUT_BLOCK)
    return shape.num_outputs if shape.num_outputs % _OUTPUT_BLOCK else min(shape.num_outputs, most)


def _one_group(_: int, num_rows: int) -> np.ndarray:
    return np.zeros(num_rows, int)


def _heads(specs: KernelSpecs) -> Iterator[ContactCase]:
    mla = specs.mla
    assert mla is not None
    for transposed in (True, False):
        channels = mla.head_rows + mla.rotated if transposed else mla.latent
        case = HeadCase(
            num_tokens=8,
            num_heads=mla.num_heads,
            num_rows=mla.head_rows,
            num_columns=mla.latent,
            num_channels=channels,
            transposed=transposed,
        )
        name = "MLA keys" if transposed else "MLA values"
        yield ContactCase(
            "grouped_matmul", name, True, lambda kernels, case=case: head_case(kernels.head_matmul(), case)
        )


def _attention(spec: AttentionSpec) -> Iterator[ContactCase]:
    size = spec.page_size
    edges = (1, size - 1, size, size + 1, 2 * size, 3 * size + 7, 1, size)
    options = {"page_size": size, "heads": spec.heads, "value_dim": spec.value_dim, "sinks": spec.sinks}
    steps = {
        "no rows": Case(q_lens=(), kv_lens=(), num_tokens=8),
        "one row": Case(q_lens=(1,), kv_lens=(3 * size + 7,), num_tokens=8),
        "rows that end at pages' edges": Case(q_lens=(1,) * 8, kv_lens=edges, num_tokens=8),
        "256 rows": Case(
            q_lens=(1,) * 256,
            kv_lens=tuple(1 + 7 * row % (4 * size) for row in range(256)),
            num_rows=256,
            num_tokens=256,
        ),
        "a prompt": Case(q_lens=(100,), kv_lens=(100,)),
        "a chunk of a prompt": Case(q_lens=(90,), kv_lens=(90 + 2 * size + 5,)),
        "prompts and single tokens": Case(q_lens=(1, 1, 30, 70), kv_lens=(size, 3 * size + 1, 30, size + 90)),
    }
    quick = ("no rows", "rows that end at pages' edges", "a chunk of a prompt")
    dtypes = dict.fromkeys((jnp.dtype(spec.dtype), *map(jnp.dtype, (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int8))))
    for name, step in steps.items():
        for window in spec.windows:
            for dtype in dtypes:
                magnitude = 30.0 if dtype == jnp.int8 else 1.0
                case = step.with_options(**options, window=window, magnitude=magnitude)
                label = f"{name}, {dtype}" + ("" if window is None else f", window of {window}")
                own = dtype == spec.dtype and window == spec.windows[0]
                yield ContactCase("paged_attention", label, own and name in quick, partial(_attend, case, dtype))
    again = steps["prompts and single tokens"].with_options(**options, window=spec.windows[0], seed=1)
    yield ContactCase("paged_attention", "other pages", True, partial(_attend, again, jnp.dtype(spec.dtype)))


def _attend(case: Case, dtype: jnp.dtype, kernels: Kernels) -> KernelCase:
    return attention_case(kernels.attention(case.config(dtype)), case)


def _lora(specs: KernelSpecs) -> Iterator[ContactCase]:
    sizes = next(((shape.num_inputs, shape.num_outputs) for shape in specs.linears.values()), (specs.hidden_size,) * 2)

    def make(case: LoraCase, kernels: Kernels) -> KernelCase:
        module = LoraModule(case.num_inputs, case.num_outputs, case.rank, jnp.dtype(case.dtype))
        return lora_case(kernels.lora(module), case)

    for rows in _ROWS:
        for name, slots in SLOTS.items():
            case = LoraCase(
                num_tokens=rows, num_inputs=sizes[0], num_outputs=sizes[1], rank=_LORA_RANK, num_slots=4, slots=slots
            )
            label = f"{rows} rows, slots {name}"
            yield ContactCase("lora_matmul", label, rows in _QUICK_ROWS and name == "mixed", partial(make, case))
