"""Settings of a `config.json` that have few meanings here. Host data only: knows no jax."""

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import LaunchError


def check_supported(config: Mapping[str, Any], owner: str = "", **supported: tuple[Any, ...]) -> None:
    """See that settings have values that are supported.

    Args:
        config: the settings.
        owner: what has them, for the message.
        supported: values by key; the first is what a file means that says nothing.

    Raises:
        LaunchError: one has another.
    """
    for key, values in supported.items():
        if config.get(key, values[0]) not in values:
            named = f"{owner} with {key}" if owner else key
            wanted = ", ".join(str(value) for value in values)
            raise LaunchError(f"config.json: {named} {config[key]!r} is not supported; supported: {wanted}")
