"""Reading facts out of a sentence into a JSON object: made-up orders, as many fields as the argument says.

`json-extraction` asks for 3 fields, `json-extraction:5` for 5 of name, item, price, city, age and date.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgekit.decode import first_json
from edgekit.errors import InputError
from edgekit.tasks import Problem, Split, choose

SUMMARY = "facts of a sentence as a JSON object"
_NAMES = "Ada Boris Chen Dora Emil Fatima Goran Hana Ivan Julia Karim Lena Marco Nadia Omar Paula Rosa Sven Tara Yusuf"
_CITIES = "Athens Berlin Cairo Dublin Florence Geneva Hanoi Istanbul Kyoto Lisbon Madrid Nairobi Oslo Prague Quito Rome"
_ITEMS = "lamp kettle bicycle guitar carpet camera tent violin mirror ladder backpack teapot scarf drill clock helmet"
_MONTHS = "January February March April May June July August September October November December"
_TEMPLATES = (
    "{name} from {city}, {age} years old, bought a {item} for {price} euros on {date}.",
    "On {date} a {item} was sold for {price} euros to {name}, who is {age} and lives in {city}.",
    "{age}-year-old {name} paid {price} euros for a {item} in {city} on {date}.",
    "A {item} at {price} euros: that is what {name} ({age}, {city}) ordered on {date}.",
)
FIELDS = ("name", "item", "price", "city", "age", "date")
_EXAMPLE = {"name": "Mia", "item": "desk", "price": 120, "city": "Vienna", "age": 34, "date": "3 May"}


@dataclass(frozen=True)
class JsonExtraction:
    """The task; `fields` are the keys of the object it asks for."""

    name: str
    fields: tuple[str, ...]
    summary: str = SUMMARY
    answer: str = "json"
    stop: tuple[str, ...] = ("\n",)
    max_tokens: int = 48

    def problems(self, split: Split, count: int | None, seed: int = 0) -> list[Problem]:
        """Made-up sentences, without end; `count` None gives 1000."""
        return choose(self._generate(seed), split, 1000 if count is None else count)

    def _generate(self, seed: int) -> Iterator[Problem]:
        draw = random.Random(seed)  # noqa: S311 - puzzles, no secrets
        example = _TEMPLATES[1].format(**_EXAMPLE)
        shot = f"Text: {example}\nJSON: {json.dumps({field: _EXAMPLE[field] for field in self.fields})}\n"
        while True:
            facts: dict[str, Any] = {
                "name": draw.choice(_NAMES.split()),
                "item": draw.choice(_ITEMS.split()),
                "price": draw.randrange(5, 1000),
                "city": draw.choice(_CITIES.split()),
                "age": draw.randrange(18, 80),
                "date": f"{draw.randrange(1, 29)} {draw.choice(_MONTHS.split())}",
            }
            text = draw.choice(_TEMPLATES).format(**facts)
            wanted = {field: facts[field] for field in self.fields}
            yield Problem(f"{shot}Text: {text}\nJSON:", {"fields": wanted}, chat=False)

    def check(self, problem: Problem, answer: str) -> float:
        """1 when every field and no other is right, else 0."""
        return float(first_object(answer) == problem.data["fields"])

    def share(self, problem: Problem, answer: str) -> float:
        """Fraction of the fields that are right."""
        found: dict[str, Any] = first_object(answer) or {}
        wanted: dict[str, Any] = problem.data["fields"]
        right = [field for field, value in wanted.items() if field in found and found[field] == value]
        return len(right) / len(wanted)


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text, with or without a fence around it."""
    found: dict[str, Any] | None = first_json(text, "{")
    return found


def open_task(name: str, argument: str) -> JsonExtraction:
    """`argument`: how many fields, 1 to 6; empty for 3."""
    if argument not in ("", *map(str, range(1, len(FIELDS) + 1))):
        wanted = f"a number of fields from 1 to {len(FIELDS)}"
        raise InputError(wanted, repr(argument), "use json-extraction:3")
    return JsonExtraction(name, FIELDS[: int(argument or 3)])
