"""Benchmark any OpenAI-compatible server in a closed loop: throughput, time to first token, inter-token latency.

Each of CONCURRENCY clients streams one completion after the other. Prompts are random token ids, so lengths are exact;
they differ in every request, except for an optional shared prefix. The client is a bare socket reader, because it
shares the machine with the server.

    python scripts/bench/serve.py --concurrency 1 8 32 --input 128 --output 128 --runs 3 --save results/x.json
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Load:
    """The load of a run.

    Attributes:
        concurrency: number of clients.
        num_input, num_output: number of prompt and output tokens of each request.
        num_shared: number of leading prompt tokens that all requests share.
        vocabulary: token ids are sampled from [100, vocabulary).
        fields: further fields of each request body, such as a grammar.
    """

    concurrency: int
    num_input: int
    num_output: int
    num_shared: int
    vocabulary: int
    fields: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass
class Run:
    """The measurements of a run; times in seconds."""

    seconds: float = 0.0
    num_requests: int = 0
    num_errors: int = 0
    ttft: list[float] = field(default_factory=list[float])
    gaps: list[float] = field(default_factory=list[float])

    def row(self, load: Load) -> dict[str, float]:
        """Return a row of the table, by column."""
        tokens = self.num_requests * load.num_output
        return {
            "concurrency": load.concurrency,
            "requests": self.num_requests,
            "errors": self.num_errors,
            "out_tok_s": tokens / self.seconds,
            "ttft_p50_ms": percentile(self.ttft, 50) * 1e3,
            "ttft_p99_ms": percentile(self.ttft, 99) * 1e3,
            "itl_p50_ms": percentile(self.gaps, 50) * 1e3,
            "itl_p99_ms": percentile(self.gaps, 99) * 1e3,
        }


def percentile(values: list[float], percent: float) -> float:
    """Return the nearest-rank percentile; nan without values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


async def stream(url: str, model: str, load: Load, rng: random.Random, run: Run) -> None:
    """Send one request and record its times; only events with text or tokens count."""
    shared = random.Random(0)
    ids = [shared.randrange(100, load.vocabulary) for _ in range(load.num_shared)]
    ids += [rng.randrange(100, load.vocabulary) for _ in range(load.num_input - load.num_shared)]
    body = json.dumps(
        {
            "model": model,
            "prompt": ids,
            "max_tokens": load.num_output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **load.fields,
        }
    ).encode()
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = (
        f"POST {parts.path}/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    start = last = time.perf_counter()
    writer.write(head.encode() + body)
    num_tokens = None
    first = True
    try:
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            if b'"usage":{' in line.replace(b" ", b""):  # its own event, or part of the last, which has no text
                num_tokens = json.loads(line[6:])["usage"]["completion_tokens"]
                continue
            (run.ttft if first else run.gaps).append(now - (start if first else last))
            first, last = False, now
    finally:
        writer.close()
    if num_tokens == load.num_output:
        run.num_requests += 1
    else:
        run.num_errors += 1


async def drive(url: str, models: Sequence[str], load: Load, num_requests: int, seed: int) -> Run:
    """Run a closed loop of `num_requests` requests in total, sent to the models in turn."""
    run = Run()
    rng = random.Random(seed)
    left = num_requests

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await stream(url, models[left % len(models)], load, rng, run)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(load.concurrency)))
    run.seconds = time.perf_counter() - start
    return run


def machine() -> dict[str, Any]:
    """Return the properties of the machine that affect the figures."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    """Parse arguments, run, print, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--model", nargs="+", default=["demo"], help="several, such as adapters, get requests in turn")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--shared", type=int, default=0, help="prompt tokens that all requests share")
    parser.add_argument("--vocabulary", type=int, default=20000, help="token ids are sampled below this")
    parser.add_argument("--fields", type=json.loads, default={}, help="further fields of each body, as JSON")
    parser.add_argument("--requests", type=int, help="per run; twice the concurrency and at least 4 if unset")
    parser.add_argument("--runs", type=int, default=3, help="the table gives their median")
    parser.add_argument("--note", default="", help="kept with the results")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, float]] = []
    for concurrency in args.concurrency:
        load = Load(concurrency, args.input, args.output, args.shared, args.vocabulary, args.fields)
        count = args.requests or max(4, 2 * concurrency)
        asyncio.run(drive(args.url, args.model, load, concurrency, seed=-1))  # warm-up
        runs = [asyncio.run(drive(args.url, args.model, load, count, seed)).row(load) for seed in range(args.runs)]
        row = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        rows.append(row)
        if len(rows) == 1:
            print(" | ".join(name.rjust(11) for name in row))
        print(" | ".join(f"{value:11.1f}" for value in row.values()), flush=True)
    if args.save:
        result = {"machine": machine(), "note": args.note, "load": asdict(load), "runs": args.runs, "rows": rows}
        args.save.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
