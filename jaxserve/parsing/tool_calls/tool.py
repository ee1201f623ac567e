"""A function that the model may call."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MAX_DEPTH = 16
_JSON_TYPES: Mapping[type, str] = {
    str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function tool that a request declares.

    Attributes:
        name: name of the function.
        parameters: JSON schema of the function's arguments, an object.
        strict: whether the arguments must follow the schema.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    strict: bool = False

    def types_of(self, parameter: str) -> frozenset[str]:
        """Return the JSON types that a parameter may have; empty if the schema does not specify them."""
        properties = self.parameters.get("properties")
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        return frozenset(self._types(schema, 0))

    def _types(self, schema: Any, depth: int) -> set[str]:
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return set()
        kind = schema.get("type")
        if isinstance(kind, str):
            return {kind}
        if isinstance(kind, list):
            return {item for item in kind if isinstance(item, str)}
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list):
            return {_JSON_TYPES[type(value)] for value in values if type(value) in _JSON_TYPES}
        if isinstance(schema.get("$ref"), str):
            return self._types(self._resolve(schema["$ref"]), depth + 1)
        options = next((schema[key] for key in ("anyOf", "oneOf", "allOf") if isinstance(schema.get(key), list)), ())
        return set().union(*(self._types(option, depth + 1) for option in options))

    def _resolve(self, reference: str) -> Any:
        """Return what a reference points to inside the parameters, or None."""
        node: Any = self.parameters
        for part in reference.removeprefix("#/").split("/"):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node
