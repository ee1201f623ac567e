"""Random JSON schemas that finite outputs can satisfy."""

import random
from typing import Any


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """Return a schema of any kind; its strings, numbers and lists are short."""
    makers = [_string, _integer, _number, _boolean, _null, _enum, _const]
    if depth:
        makers += [_object, _object, _array, _any_of]
    return rng.choice(makers)(rng, depth)


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 6)},
        {"pattern": rng.choice(["^[a-c]{1,3}$", "^\\d{2}-\\d{2}$", "^(x|yz)+$"]), "maxLength": 8},
        {"format": rng.choice(["date", "time", "uuid", "ipv4"])},
    ]
    return {"type": "string", **rng.choice(kinds)}


def _integer(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)}


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randint(-9, 9)
    return {"type": "number", "minimum": low, "exclusiveMaximum": low + rng.randint(1, 9)}


def _boolean(_: random.Random, __: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _null(_: random.Random, __: int) -> dict[str, Any]:
    return {"type": "null"}


def _enum(rng: random.Random, _: int) -> dict[str, Any]:
    return {"enum": rng.sample(["a", 'b "c"', "ü漢", 1, -2.5, True, None, ["x"], {"k": 0}], rng.randint(1, 4))}


def _const(rng: random.Random, _: int) -> dict[str, Any]:
    return {"const": rng.choice(["fixed", 7, False, {"a": [1, 2]}])}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["id", "name", "é", "a b", "x-y", "n"], rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 2)
    return {
        "type": "array",
        "items": random_schema(rng, depth - 1),
        "minItems": low,
        "maxItems": low + rng.randint(0, 2),
    }


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
