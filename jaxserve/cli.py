"""The `jaxserve` command: `serve`, `plan`, `convert`, `device-check`."""

import sys
from collections.abc import Callable

USAGE = """usage: jaxserve COMMAND [FLAGS]

commands:
  serve         serve a model over the OpenAI API       (python -m jaxserve.launch)
  plan          does a model fit devices, and how fast  (python -m jaxserve.plan)
  convert       write a checkpoint as an Orbax folder   (python -m jaxserve.convert)
  device-check  are the kernels right, and how fast     (python -m jaxserve.device_check)

`jaxserve COMMAND --help` lists the flags of a command.
"""


def _serve() -> int:
    from jaxserve.launch import main  # noqa: PLC0415  (imported per command: it takes seconds)

    return main()


def _plan() -> int:
    from jaxserve.plan.__main__ import main  # noqa: PLC0415

    return main()


def _convert() -> int:
    from jaxserve.convert import main  # noqa: PLC0415

    return main()


def _device_check() -> int:
    from jaxserve.device_check.__main__ import main  # noqa: PLC0415

    return main()


_COMMANDS: dict[str, Callable[[], int]] = {
    "serve": _serve,
    "plan": _plan,
    "convert": _convert,
    "device-check": _device_check,
}


def main() -> int:
    """Run a command; return its exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if name not in _COMMANDS:
        print(f"error: unknown command {name!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    del sys.argv[1]
    return _COMMANDS[name]()


if __name__ == "__main__":
    sys.exit(main())
