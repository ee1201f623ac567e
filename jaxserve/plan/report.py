"""The report of `jaxserve.plan`: memory, programs, and bounds on speed, as a table or as JSON."""

from typing import NamedTuple

import msgspec

from jaxserve.config import ModelConfig
from jaxserve.plan.targets import DeviceSpec


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """One compiled program.

    Attributes:
        name: `forward` with its tokens and rows, or `sample` with its rows.
        compile_s: compile time in seconds on this machine, with other compilations in parallel.
        temporary_bytes, code_bytes: bytes of temporary buffers and of code on each device.
        kernels: number of calls of Pallas kernels; a call in the loop over layers counts once.
        collectives: how often a step runs each kind.
        roofline_share: for a decode step, the bytes that must move over those that the program moves, if all of its
            rows are in use and have half the context; None for other programs.
    """

    name: str
    compile_s: float
    temporary_bytes: int
    code_bytes: int
    kernels: int
    collectives: dict[str, int]
    roofline_share: float | None


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on each device.

    Attributes:
        total: memory of the device, or None if it is not known.
        weights, adapters, kv_pool: the weights, the LoRA pool and the KV pool.
        state: device state of the running requests, and the logits of two steps.
        temporaries: temporary buffers of the program that needs the most.
        programs: code of all programs.
    """

    total: int | None
    weights: int
    adapters: int
    kv_pool: int
    state: int
    temporaries: int
    programs: int

    @property
    def used(self) -> int:
        """Sum of the parts."""
        return self.weights + self.adapters + self.kv_pool + self.state + self.temporaries + self.programs

    @property
    def fits(self) -> bool:
        """Whether the parts fit the device; True if its memory is not known."""
        return self.total is None or self.used <= self.total


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Upper bounds on tokens per second per device, from memory bandwidth and FLOPs; computed, not measured.

    A decode step moves the bytes that its compiled program moves.

    Attributes:
        rows, context: number of requests in the decode step, and number of keys of each.
        decode: bound for all rows together.
        decode_alone: bound for a single request.
        prefill: bound for prompt tokens.
    """

    rows: int
    context: int
    decode: float
    decode_alone: float
    prefill: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The report on a model and a target.

    Attributes:
        fits: whether the model fits the target.
        advice: changes that would make it fit, and other hints.
        kv_tokens: number of tokens that the KV pools of all replicas hold.
        full_requests: number of requests of `context_length` tokens that they hold.
    """

    model: str
    target: str
    devices: int
    tp_size: int
    dp_size: int
    ep_size: int
    dp_attention: bool
    dtype: str
    kv_dtype: str
    attention_backend: str
    fits: bool
    advice: list[str]
    memory: Memory
    context_length: int
    kv_tokens: int
    full_requests: int
    programs: list[Program]
    compile_s: float
    bounds: Bounds | None

    def table(self) -> str:
        """Return the report as a text table."""
        rows = [
            ("model", self.model),
            ("target", f"{self.target}, {self.devices} devices: {self._split()}"),
            ("dtype", f"{self.dtype}, keys and values {self.kv_dtype}"),
            ("attention", self.attention_backend),
            ("fits", "yes" if self.fits else "NO"),
            *(("", line) for line in self.advice),
            ("", ""),
            *self._memory_rows(),
            ("", ""),
            ("KV tokens", f"{self.kv_tokens:,}, or {self.full_requests:,} requests of {self.context_length:,} tokens"),
            *self._bound_rows(),
            ("", ""),
            ("programs", f"{len(self.programs)}, compiled in {self.compile_s:.1f} s"),
        ]
        lines = [f"{name:<16}{text}".rstrip() for name, text in rows]
        return "\n".join(lines + self._program_lines())

    def _split(self) -> str:
        experts = f", ep {self.ep_size}" if self.ep_size > 1 else ""
        shared = ", one set of experts for all replicas" if self.dp_attention else ""
        return f"tp {self.tp_size}, dp {self.dp_size}{experts}{shared}"

    def _memory_rows(self) -> list[tuple[str, str]]:
        memory = self.memory
        parts = [("weights", memory.weights)]
        parts += [("adapters", memory.adapters)] if memory.adapters else []
        parts += [("KV pool", memory.kv_pool), ("state, logits", memory.state)]
        parts += [("temporaries", memory.temporaries), ("programs", memory.programs), ("total", memory.used)]
        rows = [(name, f"{size / 2**30:8.2f} GiB on each device") for name, size in parts]
        if memory.total is not None:
            rows.append(("device has", f"{memory.total / 2**30:8.2f} GiB"))
        return rows

    def _bound_rows(self) -> list[tuple[str, str]]:
        if self.bounds is None:
            return [("bounds", "not known for this device")]
        b = self.bounds
        return [
            ("decode bound", f"{b.decode:,.0f} tokens/s a device, {b.rows} requests with {b.context:,} keys each"),
            ("alone bound", f"{b.decode_alone:,.0f} tokens/s a device, one request"),
            ("prefill bound", f"{b.prefill:,.0f} tokens/s a device"),
        ]

    def _program_lines(self) -> list[str]:
        def line(name: str, *numbers: object) -> str:
            compile_s, temporary, kernels, roofline, collectives = numbers
            return f"  {name:<30}{compile_s:>10}{temporary:>10}{kernels:>9}{roofline:>10}  {collectives}"

        return [line("", "compile s", "temp MiB", "kernels", "roofline", "collectives of a step")] + [
            line(
                program.name,
                f"{program.compile_s:.1f}",
                f"{program.temporary_bytes / 2**20:.1f}",
                program.kernels,
                "" if program.roofline_share is None else f"{program.roofline_share:.0%}",
                ", ".join(f"{count} {kind}" for kind, count in program.collectives.items()) or "none",
            )
            for program in self.programs
        ]


class DecodeStep(NamedTuple):
    """A decode step that bounds are computed for.

    Attributes:
        rows: number of requests of a replica.
        context: number of keys of each request.
        moved_bytes: bytes that a device moves: those of the compiled program, or those that must move if it is not
            known.
    """

    rows: int
    context: int
    moved_bytes: float


def bound(model: ModelConfig, device: DeviceSpec, tp_size: int, steps: tuple[DecodeStep, DecodeStep]) -> Bounds | None:
    """Return roofline bounds: a step takes as long as its bytes or its FLOPs at full speed.

    Args:
        model: config of the model.
        device: the kind of device.
        tp_size: number of devices of a replica.
        steps: decode steps of many requests and of a single one, with the same context.
    """
    if not device.bytes_per_s:
        return None
    flops = device.flops * tp_size
    together, alone = steps
    # Keys that a query sees, on average over the layers.
    seen = sum(min(together.context, layer.window or together.context) for layer in model.layers) / model.num_layers
    value_dim = model.head_dim if model.mla is None else model.mla.kv_lora_rank
    attention_flops = 2 * model.num_layers * model.num_q_heads * (model.head_dim + value_dim)

    def tokens_per_s(step: DecodeStep) -> float:
        arithmetic_s = step.rows * (2 * num_multiplied(model) + attention_flops * seen) / flops
        return step.rows / max(step.moved_bytes / device.bytes_per_s, arithmetic_s)

    # A prompt's tokens see half of it on average, and only the last one needs logits.
    head = model.vocab_size * model.hidden_size
    prefill = flops / (2 * (num_multiplied(model) - head) + attention_flops * seen / 2)
    return Bounds(
        rows=together.rows,
        context=together.context,
        decode=tokens_per_s(together) / tp_size,
        decode_alone=tokens_per_s(alone) / tp_size,
        prefill=prefill / tp_size,
    )


def num_multiplied(model: ModelConfig) -> int:
    """Return the number of weights that a token is multiplied with: all but input embedding, norms, other experts."""
    rows = {"dense": 3 * model.intermediate_size}
    if (experts := model.moe) is not None:
        own = experts.top_k * experts.intermediate_size + (experts.shared_intermediate_size or 0)
        rows["experts"] = 3 * own + experts.num_experts
    mlps = sum(rows[layer.mlp] for layer in model.layers) * model.hidden_size
    return mlps + model.num_layers * _attention_multiplied(model) + model.vocab_size * model.hidden_size


def _attention_multiplied(model: ModelConfig) -> int:
    """Return the number of weights of a layer's attention projections."""
    heads, hidden = model.num_q_heads, model.hidden_size
    if (mla := model.mla) is None:
        return hidden * model.head_dim * (2 * heads + 2 * model.num_kv_heads)
    q_size = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    queries = hidden * q_size if mla.q_lora_rank is None else mla.q_lora_rank * (hidden + q_size)
    expansion = heads * (mla.qk_nope_head_dim + mla.v_head_dim) * mla.kv_lora_rank
    return queries + hidden * model.head_dim + expansion + heads * mla.v_head_dim * hidden


def experts_read(model: ModelConfig, rows: int) -> float:
    """Return the share of the experts that a step of `rows` tokens uses, if the router is uniform."""
    if model.moe is None:
        return 0.0
    return 1 - (1 - model.moe.top_k / model.moe.num_experts) ** rows
