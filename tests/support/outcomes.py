"""A store of compile outcomes of programs for devices that are not attached, kept between test runs.

A compiled program is a function of the lowered module, the devices, the compilers' versions and their flags. The key
of an outcome is a hash of all of these, so a change that does not affect a step recompiles nothing. Only the compiler's
output is kept; every test still checks it.
"""

import base64
import gzip
import hashlib
import json
import os
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from jax._src.lib import _jax, tpu, xla_client
from jax.experimental.mosaic.gpu import dialect as mosaic_gpu
from jaxlib.mlir import ir, passmanager

_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
compile_program = jax.stages.Lowered.compile  # kept here, because tests/compile patches the method to use the store


class MemoryFigures(NamedTuple):
    """The fields of `jax.stages.Compiled.memory_analysis()` that tests read, in bytes per device."""

    temp_size_in_bytes: int
    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    generated_code_size_in_bytes: int


class CompiledOutcome(NamedTuple):
    """A stand-in for `jax.stages.Compiled`.

    Attributes:
        text: the scheduled HLO.
        memory: memory that the program needs on one device.
        compile_s: seconds that the compilation took when it was run.
    """

    text: str
    memory: MemoryFigures
    compile_s: float

    def as_text(self) -> str:
        """Return the scheduled HLO."""
        return self.text

    def memory_analysis(self) -> MemoryFigures:
        """Return the memory that the program needs on one device."""
        return self.memory


class OutcomeStore:
    """A folder of outcomes, with one file each.

    Args:
        folder: the folder, created when the first outcome is written.
        recompile: whether to run the compiler every time and overwrite the stored outcome.
    """

    def __init__(self, folder: Path, *, recompile: bool = False) -> None:
        self._folder = folder
        self._recompile = recompile

    def compile(self, lowered: jax.stages.Lowered) -> CompiledOutcome:
        """Return the outcome of compiling a program for devices that are not attached."""

        def measure() -> list[Any]:
            started = time.perf_counter()
            compiled = compile_program(lowered)
            seconds = round(time.perf_counter() - started, 1)
            memory: Any = compiled.memory_analysis()
            return [compiled.as_text(), [getattr(memory, name) for name in MemoryFigures._fields], seconds]

        text, memory, seconds = self.get(program_key(lowered), measure)
        return CompiledOutcome(text, MemoryFigures(*memory), seconds)

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the JSON value stored under `key`; if there is none, call `measure` and store its result."""
        path = self._folder / f"{key}.json.gz"
        if path.exists() and not self._recompile:
            path.touch()  # files that no run uses grow old and are deleted
            return json.loads(gzip.decompress(path.read_bytes()))
        value = measure()
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(gzip.compress(json.dumps(value).encode(), mtime=0))
        partial.rename(path)
        # A later run reads tuples back as lists, so this run does, too.
        return json.loads(json.dumps(value))


def compiles_only(lowered: jax.stages.Lowered) -> bool:
    """Whether the devices of a program are not attached, so that it can be compiled but not run."""
    lowering: Any = lowered._lowering
    return isinstance(lowering._device_list[0].client, _jax.CompileOnlyPyClient)


def program_key(lowered: jax.stages.Lowered) -> str:
    """Return a hash of everything that the compiled program depends on.

    Debug locations are left out: a kernel that only moved within its file is the same kernel.
    """
    lowering: Any = lowered._lowering
    topology = xla_client.get_topology_for_devices(list(lowering._device_list)).fingerprint()
    parts = [
        _canonical_text(cast("ir.Module", lowered.compiler_ir("stablehlo"))),
        str(topology),
        str(sorted(lowering._compiler_options_kvs)),
        *(f"{name} {_version(name)}" for name in _COMPILERS),
        *(str(sorted(set(os.environ.get(name, "").split()))) for name in _FLAGS),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _canonical_text(module: ir.Module) -> str:
    """Return the text of the module and of the kernels in it, without debug locations."""
    kernels: list[str] = []

    def take_out(op: ir.Operation) -> ir.WalkResult:
        if op.name == "stablehlo.custom_call":
            target = ir.StringAttr(op.attributes["call_target_name"]).value
            if target == "tpu_custom_call":
                config = json.loads(ir.StringAttr(op.attributes["backend_config"]).value)
                call = config["custom_call_config"]
                call.pop("debug_locations", None)
                kernels.append(_kernel_text(base64.b64decode(call.pop("body"))))
                op.attributes["backend_config"] = ir.StringAttr.get(json.dumps(config, sort_keys=True))
            elif target.startswith("mosaic_gpu"):
                config = ir.DictAttr(op.attributes["mhlo.backend_config"])
                # `kernel_hash` is a hash of the kernel's text with locations.
                rest = {entry.name: entry.attr for entry in config if entry.name not in ("module", "kernel_hash")}
                kernels.append(_kernel_text(ir.StringAttr(config["module"]).value_bytes))
                op.attributes["mhlo.backend_config"] = ir.DictAttr.get(rest)
        return ir.WalkResult.ADVANCE

    with module.context, ir.Location.unknown():
        clone = cast("ir.Module", module.operation.clone(ip=False))
        clone.operation.walk(take_out)
        return "\n".join([clone.operation.get_asm(enable_debug_info=False), *kernels])


def _kernel_text(payload: bytes) -> str:
    """Return the text of a serialised kernel in Mosaic's dialects, without debug locations."""
    context = ir.Context()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    mosaic_gpu.register_dialect(context)
    with context, ir.Location.unknown():
        kernel = ir.Module.parse(payload)
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(kernel.operation)
        return kernel.operation.get_asm(enable_debug_info=False)
