"""The child process: does the tasks of one phase in order, and prints an event per line."""

import importlib.metadata
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from jaxserve.device_check.events import Begin, DeviceInfo, Event, Failure, Speed
from jaxserve.device_check.flags import engine_config, parse_flags
from jaxserve.errors import LaunchError
from jaxserve.plan.targets import set_xla_flag

# Enough threads for the interpreters' callbacks, which wait for each other.
_INTERPRETER_DEVICES = 8
_PAGE_SIZE = 128
_INTERPRETED_POOL_BYTES = 64 << 20
_POOL_FRACTION = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run a phase; the parent knows from the last event which task ended the process."""
    args = parse_flags(argv)
    if args.interpret:
        os.environ["JAX_PLATFORMS"] = "cpu"
    set_xla_flag("--xla_force_host_platform_device_count", max(_INTERPRETER_DEVICES, args.tp_size))
    # The events have the standard output for themselves.
    events, sys.stdout = sys.stdout, sys.stderr
    try:
        for event in run_phase(args):
            print(msgspec.json.encode(event).decode(), file=events, flush=True)
    except LaunchError as error:
        print(msgspec.json.encode(Failure(str(error))).decode(), file=events, flush=True)
        return 1
    return 0


def run_phase(args: Any) -> Iterator[Event]:
    """Yield the events of a phase, from its task number `--first` on."""
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    device = jax.devices()[0]
    interpret = args.interpret or ("gpu" if device.platform == "cpu" else None)
    yield _device_info(device, interpret)
    tasks: Iterator[tuple[str, Iterator[Event]]] = _TASKS[args.phase](args, interpret)
    for index, (label, task) in enumerate(tasks):
        if index >= args.first:
            yield Begin(index, label)
            yield from task


def _device_info(device: Any, interpret: str | None) -> DeviceInfo:
    import jax

    return DeviceInfo(
        kind=device.device_kind,
        platform=device.platform,
        count=1 if interpret else jax.device_count(),
        memory_bytes=_memory(device)[0],
        driver=" ".join(device.client.platform_version.split()),
        jax=jax.__version__,
        jaxlib=importlib.metadata.version("jaxlib"),
        kernels=interpret or device.platform,
        interpreted=interpret is not None,
    )


def _memory(device: Any) -> tuple[int, int]:
    """Return the bytes that programs may use on a device, and those in use; 0 where they are not known."""
    stats = device.memory_stats() or {} if device.platform != "cpu" else {}
    return stats.get("bytes_limit", 0), stats.get("bytes_in_use", 0)


def _models(args: Any) -> dict[str, dict[str, Any]]:
    """Return the parsed `config.json` of each model to check, by its name."""
    from jaxserve.device_check.examples import EXAMPLES
    from jaxserve.loading.hub import find_config

    if args.model_path:
        return {args.model_path: dict(find_config(args.model_path, args.revision, args.download_dir))}
    return dict(EXAMPLES)


def _engines(args: Any, interpret: str | None) -> Iterator[tuple[str, Any, Any]]:
    """Yield each model's name, its layout, and what the kernels of one device have to compute for it."""
    import jax

    from jaxserve.device_check.specs import specs_of
    from jaxserve.layout.expert_groups import choose_ep_size
    from jaxserve.layout.layout import layout_engine, layout_model
    from jaxserve.parallel.mesh import make_mesh

    for name, hf_config in _models(args).items():
        config = engine_config(args, name)
        if interpret and config.dtype == "auto":
            config = msgspec.structs.replace(config, dtype="bfloat16")
        if interpret and config.page_size is None:
            config = msgspec.structs.replace(config, page_size=_PAGE_SIZE)
        device = jax.devices()[0]
        mesh = make_mesh(config.tp_size, config.dp_size, choose_ep_size(config, hf_config, device.platform))
        model = layout_model(config, hf_config, mesh)
        limit, in_use = _memory(device)
        free = limit - in_use - model.device_weight_bytes
        pool = max(_INTERPRETED_POOL_BYTES, int(_POOL_FRACTION * free))
        engine = layout_engine(config, model, pool)
        yield name, engine, specs_of(engine, name)


def _kernels(interpret: Any) -> Any:
    from jaxserve.device_check.kernels import NativeKernels
    from jaxserve.parallel.mesh import make_mesh

    if interpret is None:
        return NativeKernels(make_mesh(1))
    from kernels_pallas.interpreted import InterpretedKernels

    return InterpretedKernels(interpret, make_mesh(1), detect_races=False)


def _contact(args: Any, interpret: str | None) -> Iterator[tuple[str, Iterator[Event]]]:
    from jaxserve.device_check.contact import run_case
    from jaxserve.device_check.contact_cases import contact_cases

    kernels, repeats = _kernels(interpret), 1 if interpret else args.repeats
    for name, _, specs in _engines(args, interpret):
        for case in contact_cases(specs):
            if case.quick or not args.quick:
                label = f"{name}: {case.op}, {case.name}"
                yield label, (run_case(name, case, kernels, repeats) for _ in range(1))


def _speed(args: Any, interpret: str | None) -> Iterator[tuple[str, Iterator[Event]]]:
    from jaxserve.device_check.speed_cases import speed_cases
    from jaxserve.device_check.timing import Loop

    # The interpreters' speed says nothing: they only show that the calls can be made.
    loop = Loop(1, 1) if interpret else Loop(runs=5) if args.quick else Loop()
    kernels = _kernels(interpret)
    for name, _, specs in _engines(args, interpret):
        cases = [case for case in speed_cases(specs) if case.quick or not args.quick]
        if interpret:  # one of each op; a server's attention would take minutes
            cases = list({case.op: case for case in reversed(cases) if case.op != "paged_attention"}.values())
        for case in cases:
            yield f"{name}: speed of {case.op}, {case.name}", _time(name, case, kernels, loop)


def _time(model: str, case: Any, kernels: Any, loop: Any) -> Iterator[Speed]:
    import jax

    from jaxserve.device_check.timing import device_spec, seconds_of, share_of

    try:
        timed = case.make(kernels)
    except NotImplementedError:  # there is no kernel for the call
        return
    seconds = seconds_of(timed, loop)
    yield Speed(
        model=model,
        op=case.op,
        name=case.name,
        seconds=seconds,
        num_bytes=timed.num_bytes,
        num_flops=timed.num_flops,
        share=share_of(timed, seconds, device_spec(jax.devices()[0].device_kind)),
    )


def _steps(args: Any, interpret: str | None) -> Iterator[tuple[str, Iterator[Event]]]:
    import jax

    from jaxserve.device_check.steps import time_steps
    from jaxserve.device_check.timing import device_spec

    for name, engine, _ in _engines(args, interpret):
        yield f"{name}: steps, decode", time_steps(engine, name, device_spec(jax.devices()[0].device_kind))


def _tune(args: Any, interpret: str | None) -> Iterator[tuple[str, Iterator[Event]]]:
    from jaxserve.device_check.timing import Loop
    from jaxserve.device_check.tune import tune_attention

    kernels, loop = _kernels(interpret), Loop(1, 1) if interpret else Loop(runs=5)
    for name, _, specs in _engines(args, interpret):
        yield f"{name}: tiles, attention", tune_attention(specs, kernels, loop, small=interpret is not None)


_TASKS: dict[str, Any] = {"contact": _contact, "speed": _speed, "steps": _steps, "tune": _tune}


if __name__ == "__main__":
    sys.exit(main())
