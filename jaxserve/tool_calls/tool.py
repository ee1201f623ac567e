"""A function that the model may call."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Tool:
    """What a request declares.

    Attributes:
        name: of the function.
        parameters: JSON schema of its arguments, an object.
        strict: the arguments must follow the schema.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    strict: bool = False

    def types_of(self, parameter: str) -> frozenset[str]:
        """JSON types that a parameter may have; empty when the schema does not tell."""
        properties = self.parameters.get("properties")
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        return frozenset(_types(schema))


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {item for item in kind if isinstance(item, str)}
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        if isinstance(options, list):
            return set().union(*(_types(option) for option in options))
    if isinstance(schema.get("enum"), list) and all(isinstance(item, str) for item in schema["enum"]):
        return {"string"}
    return set()
