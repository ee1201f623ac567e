"""What a child process reports, one JSON object per line."""

from typing import Literal, TypeAlias

import msgspec

Status = Literal["passed", "failed", "unsupported", "crashed", "timed out"]


class DeviceInfo(msgspec.Struct, frozen=True, kw_only=True, tag="device"):
    """The devices and the software.

    Attributes:
        kind: JAX's name of the kind of device.
        platform: JAX's name of the platform.
        count: number of devices.
        memory_bytes: memory that programs may use on one device; 0 if it is not known.
        driver: version of the platform's runtime.
        jax, jaxlib: versions.
        kernels: whose kernels are checked.
        interpreted: whether they are interpreted on the CPU.
    """

    kind: str
    platform: str
    count: int
    memory_bytes: int
    driver: str
    jax: str
    jaxlib: str
    kernels: str
    interpreted: bool


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """The child begins a task; `label` names it."""

    index: int
    label: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True, tag="outcome"):
    """What one call did.

    Attributes:
        model, op, name: the call.
        status: whether the result was right; `unsupported` if there is no kernel for the call.
        detail: what was wrong.
        seconds: duration, compilation included.
    """

    model: str
    op: str
    name: str
    status: Status
    detail: str = ""
    seconds: float = 0.0


class Speed(msgspec.Struct, frozen=True, kw_only=True, tag="speed"):
    """How fast one kernel is.

    Attributes:
        model, op, name: the call.
        seconds: median duration of one call.
        num_bytes, num_flops: what the kernel's own schedule moves and computes.
        share: time that the device's bandwidth or its arithmetic would need at least, over the duration; None if the
            device's figures are not known.
    """

    model: str
    op: str
    name: str
    seconds: float
    num_bytes: float
    num_flops: float
    share: float | None = None


class StepSpeed(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """How fast one step of the model is, with random weights.

    Attributes:
        model: the model.
        rows, context: requests, and keys of each.
        seconds: mean duration of a step when steps are sent without waiting.
        share: time that the device's bandwidth would need at least, over the duration; None if it is not known.
        kernel_seconds, xla_seconds, idle_seconds: the step's parts on one device, from a profile; None without one.
    """

    model: str
    rows: int
    context: int
    seconds: float
    share: float | None = None
    kernel_seconds: float | None = None
    xla_seconds: float | None = None
    idle_seconds: float | None = None


class Tuned(msgspec.Struct, frozen=True, kw_only=True, tag="tuned"):
    """The fastest tile of one kernel.

    Attributes:
        model, op, key: the kernel, and what the tile depends on.
        tile: the tile's fields.
        seconds: duration with the tile, and with the one that the formula chooses.
        tried: number of tiles that were right.
    """

    model: str
    op: str
    key: str
    tile: dict[str, int | bool]
    seconds: tuple[float, float]
    tried: int


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """Settings, model and devices do not fit together."""

    message: str


Event: TypeAlias = DeviceInfo | Begin | Outcome | Speed | StepSpeed | Tuned | Failure
