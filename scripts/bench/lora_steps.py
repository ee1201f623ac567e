"""Measure the cost of adapters per step: the same step without and with them in turn, so noise affects both.

Accepts the flags of the server; the adapters of `--lora-paths` are spread over the rows.

    python scripts/bench/lora_steps.py --model-path demo --max-loras-per-batch 9 --lora-paths a=… b=… --rounds 30
"""

import argparse
import statistics
import time

import msgspec

from jaxserve.arguments import parse_arguments
from jaxserve.engine.builder import BuiltRunner, build_runner
from jaxserve.loading.hub import find_model
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import AdapterLoad, NewRow, ScheduledRow, SchedulerOutput

_NUM_ROWS = 32
_PROMPT_TOKENS = 128
_CONTEXT = 200
_FIRST_TOKEN = 100


def plan_step(built: BuiltRunner, num_rows: int, num_tokens: int, num_adapters: int) -> SchedulerOutput:
    """Plan a step of new rows that each run their last `num_tokens` tokens; adapters are assigned in turn."""
    num_computed = 0 if num_tokens > 1 else _CONTEXT
    num_pages = -(-(num_computed + num_tokens) // built.cache.page_size)
    slots = [1 + row % num_adapters if num_adapters else 0 for row in range(num_rows)]
    greedy = SamplingParams(temperature=0)
    return SchedulerOutput(
        step=0,
        new_rows=tuple(NewRow(row=row, sampling=greedy, seed=0, adapter_slot=slot) for row, slot in enumerate(slots)),
        rows=tuple(
            ScheduledRow(
                row=row,
                token_ids=tuple(range(_FIRST_TOKEN + row, _FIRST_TOKEN + row + num_tokens)),
                num_computed_tokens=num_computed,
                new_page_ids=tuple(range(row * num_pages, (row + 1) * num_pages)),
                samples=True,
            )
            for row in range(num_rows)
        ),
    )


def seconds(built: BuiltRunner, plan: SchedulerOutput) -> float:
    """Run one step and return its seconds."""
    start = time.perf_counter()
    built.runner.forward((plan,)).sample((None,)).result()
    return time.perf_counter() - start


def main() -> None:
    """Print a line for a decode step and one for a prefill step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    args, flags = parser.parse_known_args()
    config = parse_arguments([*flags, "--max-running-requests", str(_NUM_ROWS)]).engine
    if config.lora is None:
        parser.error("--lora-paths: there are no adapters to measure")
    path = find_model(config.model_path, config.revision, config.download_dir)
    built = build_runner(msgspec.structs.replace(config, model_path=str(path)), lambda items, *_: items)
    built.runner.compile(lambda names: names)
    built.runner.warm_up()
    names = list(config.lora.paths)
    loads = tuple(AdapterLoad(slot=slot, key=name) for slot, name in enumerate(names, 1))
    first = plan_step(built, 1, 1, len(names))
    built.runner.forward((msgspec.structs.replace(first, adapter_loads=loads),)).sample((None,)).result()
    for kind, num_rows, num_tokens in (("decode", _NUM_ROWS, 1), ("prompts", 4, _PROMPT_TOKENS)):
        plans = [plan_step(built, num_rows, num_tokens, number) for number in (0, len(names))]
        rounds = [[seconds(built, plan) for plan in plans] for _ in range(args.rounds)]
        base, adapted = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
        ratio = statistics.median(adapted_s / base_s for base_s, adapted_s in rounds)
        print(f"{kind}: {num_rows} rows of {num_tokens}: {base:.1f} ms, adapted {adapted:.1f} ms, {ratio:.3f} of it")


if __name__ == "__main__":
    main()
