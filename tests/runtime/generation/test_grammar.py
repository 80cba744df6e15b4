"""Texts of a form: whatever the model would say, what it says is JSON by the schema."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import pytest

import anymamba
from anymamba import Engine
from anymamba.errors import InputError

pytest.importorskip("llguidance")

from anymamba.runtime.generation.grammar import Grammars


@pytest.fixture(scope="module")
def bundled() -> Engine:
    return anymamba.load()


@pytest.fixture(scope="module")
def grammars(bundled: Engine) -> Grammars:
    return Grammars(bundled.tokenizer, 256, bundled.end_ids)


SCHEMAS: list[Any] = [
    {"enum": ["yes", "no"]},
    {"type": "integer", "minimum": 10, "maximum": 99},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "string", "pattern": "^[ab]{3,5}$"},
    {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"enum": [1, 2]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
]


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """The few words of JSON schema that are used here, by hand."""
    kinds = {"integer": int, "boolean": bool, "string": str, "array": list, "object": dict}
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "null":
        return value is None
    if type(value) is not kinds[schema["type"]]:
        return False
    if isinstance(value, list):
        size = schema["minItems"] <= len(value) <= schema["maxItems"]
        return size and all(fits(item, schema["items"]) for item in value)
    if isinstance(value, dict):
        same = set(value) == set(schema["required"])
        return same and all(fits(value[name], schema["properties"][name]) for name in value)
    if isinstance(value, bool):
        return True
    if isinstance(value, str):
        return 3 <= len(value) <= 5 and set(value) <= {"a", "b"}
    return schema["minimum"] <= value <= schema["maximum"]


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_what_is_written_fits_the_schema(
    bundled: Engine, grammars: Grammars, schema: dict[str, Any]
) -> None:
    for seed in range(5):
        settings = {"temperature": 1.5, "seed": seed, "max_new_tokens": 100}
        wanted = grammars.json(schema)
        found = bundled.generate("A:", constraint=wanted, stop_ids=grammars.end_ids, **settings)
        assert found.finish_reason == "eos"
        assert fits(json.loads(found.text), schema), found.text


def test_any_object(bundled: Engine, grammars: Grammars) -> None:
    found = bundled.generate("A:", constraint=grammars.json(), stop_ids=grammars.end_ids)
    assert found.text.startswith("{")


def test_a_constraint_belongs_to_one_text(bundled: Engine, grammars: Grammars) -> None:
    wanted = grammars.json({"enum": ["yes"]})
    for constraint in (wanted, wanted.fresh(), wanted.fresh()):
        found = bundled.generate("A:", constraint=constraint, stop_ids=grammars.end_ids)
        assert found.text == '"yes"'


BOMBS: list[Any] = [
    {"type": "wing"},
    {"$ref": "http://example.com/schema"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"type": "string", "pattern": "(a+)+(?=b)"},
    {"type": "string", "pattern": "(((a{1,1000}){1,1000}){1,1000})"},
    {"type": "string", "pattern": "(.*){500}(a|b|ab){300}$"},
    {"allOf": [{"type": "integer"}, {"type": "string"}]},
    {"type": "object", "properties": {str(i): {"type": "string"} for i in range(1500)}},
    {"anyOf": [{"type": "array", "minItems": i, "items": {}} for i in range(300)]},
]


def test_a_schema_that_is_too_large_is_refused(grammars: Grammars) -> None:
    with pytest.raises(InputError, match="characters, more than"):
        grammars.json({"enum": ["a" * 200_000]})


def test_a_schema_without_an_end_is_refused_in_a_line(grammars: Grammars) -> None:
    with pytest.raises(InputError, match=r"\Athe grammar fails: .{3,500}\Z"):
        grammars.json({"$ref": "#"})


@pytest.mark.parametrize("schema", BOMBS, ids=range(len(BOMBS)))
def test_bombs_end_in_bounded_time(bundled: Engine, grammars: Grammars, schema: Any) -> None:
    """Refused, or written by: no schema keeps the server busy for long."""
    start = time.monotonic()
    with suppress(InputError):
        wanted = grammars.json(schema)
        bundled.generate("A:", constraint=wanted, stop_ids=grammars.end_ids, max_new_tokens=20)
    assert time.monotonic() - start < 60
