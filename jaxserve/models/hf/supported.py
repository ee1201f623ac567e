"""Checks settings of a `config.json` that support only a few values. Host-only: does not import jax."""

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import LaunchError


def check_supported(config: Mapping[str, Any], owner: str = "", **supported: tuple[Any, ...]) -> None:
    """Check that settings have supported values.

    Args:
        config: the settings.
        owner: owner of the settings, for the error message.
        supported: supported values by key; the first is the default of a missing setting.

    Raises:
        LaunchError: a setting has another value.
    """
    for key, values in supported.items():
        if config.get(key, values[0]) not in values:
            named = f"{owner} with {key}" if owner else key
            wanted = ", ".join(str(value) for value in values)
            raise LaunchError(f"config.json: {named} {config[key]!r} is not supported; supported: {wanted}")
