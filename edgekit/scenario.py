"""What owning a fleet costs, stated as a file: a scenario, each of its figures with its source and its range."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from edgekit.config import Document, Strict, explain, yaml_value
from edgekit.errors import InputError, suggest
from edgekit.target import Name, Text

CATALOG = Path(__file__).parent / "catalog" / "scenarios"
Kind = Literal["measured", "predicted", "assumed"]
Overrides = dict[str, Any]

_SMALLEST, _LARGEST = 1e-9, 1e12
"""Bounds of every figure: no product of a few of them leaves the range of a float."""

Finite = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]


class Input(Strict):
    """One figure with where it comes from; low and high make it uncertain."""

    value: Finite
    source: Text = "no source stated"
    low: Finite | None = None
    high: Finite | None = None
    kind: Kind = "assumed"

    @model_validator(mode="after")
    def _range_holds_the_value(self) -> Input:
        if not self.lowest <= self.value <= self.highest:
            raise ValueError("needs low <= value <= high")
        return self

    @property
    def lowest(self) -> float:
        """`low`, or the value where none is given."""
        return self.value if self.low is None else self.low

    @property
    def highest(self) -> float:
        """`high`, or the value where none is given."""
        return self.value if self.high is None else self.high

    @property
    def uncertain(self) -> bool:
        """Whether the range has a width."""
        return self.lowest < self.highest


def _plain(value: Any) -> Any:
    """A number alone is a figure without a source."""
    return {"value": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


def _within(low: float, high: float) -> AfterValidator:
    def check(found: Input) -> Input:
        if found.lowest < low or found.highest > high:
            raise ValueError(f"must lie between {low:g} and {high:g}, from low to high")
        return found

    return AfterValidator(check)


_NUMBER = BeforeValidator(_plain, json_schema_input_type=float | Input)
Amount = Annotated[Input, _NUMBER, _within(0, _LARGEST)]
Positive = Annotated[Input, _NUMBER, _within(_SMALLEST, _LARGEST)]
Share = Annotated[Input, _NUMBER, _within(0, 1)]
Rate = Annotated[Input, _NUMBER, _within(0, 10)]
Years = Annotated[Input, _NUMBER, _within(0.25, 50)]
Overhead = Annotated[Input, _NUMBER, _within(1, 10)]

_NONE = Input(value=0, source="none")


class Load(Strict):
    """What one site asks of its device, as the mean of a day."""

    input_tokens_per_day: Amount
    """Of prompts."""
    output_tokens_per_day: Positive
    """Of answers that somebody reads; candidates that a strategy discards are not counted."""


class Region(Strict):
    """Electricity of one place."""

    energy_price_per_kwh: Amount
    carbon_kg_per_kwh: Amount
    """kgCO2e for one kWh from the grid."""


class Hardware(Strict):
    """One device. Figures left out are those of the build's target."""

    price: Amount | None = None
    """What one device costs, in the scenario's currency."""
    further_price: Amount = _NONE
    """Enclosure, power supply, storage and installation of one device; nothing of it is sold again."""
    residual_share: Share = _NONE
    """Of the price, what a device is sold for at the end."""
    spares_share: Share = _NONE
    """Further devices bought at the start, as a share of the fleet."""
    failure_rate_per_year: Share = _NONE
    """Share of the fleet that is bought again in a year."""
    busy_w: Positive | None = None
    """Power while a token is computed."""
    idle_w: Amount | None = None
    idle_share: Share = Input(value=0.4, low=0.2, high=0.7, source="assumption: idle power as a share of busy power")
    """Of the busy power; used where neither `idle_w` nor the target states the idle power."""


class Operations(Strict):
    """Work and services."""

    hours_per_device_year: Amount = _NONE
    cost_per_hour: Amount = _NONE
    network_per_device_year: Amount = _NONE


class Cloud(Strict):
    """A rented machine."""

    name: Name
    billing: Literal["on-demand", "reserved"]
    """`on-demand` is paid for the hours it is busy, `reserved` for every hour."""
    price_per_hour: Amount
    tokens_per_s: Positive
    """Output tokens of the whole machine, its prompts being read as well."""


class Api(Strict):
    """A service paid by the token."""

    name: Name
    price_per_1m_input_tokens: Amount
    price_per_1m_output_tokens: Amount


class Scenario(Strict):
    """Everything about a fleet but the build that runs there."""

    name: Name
    description: Text
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    per_usd: Positive | None = None
    """Units of the currency for one US dollar: needed where a target's price is used and the currency is another."""
    devices: Positive
    """Sites with one device each; a build that cannot keep up gets more devices."""
    years: Years
    discount_rate: Rate
    """Per year."""
    load: Load
    utilisation: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1, max_length=12)] = (
        0.05,
        0.25,
        0.5,
        1.0,
    )
    """Shares of the time a device is busy, for which costs are shown besides the load's own."""
    region: Text
    """One of `regions`."""
    regions: dict[str, Region]
    pue: Overhead = Input(value=1, source="none: no data centre around the device")
    """Energy taken from the grid over energy taken by the device."""
    hardware: Hardware = Hardware()
    operations: Operations = Operations()
    cloud: Annotated[tuple[Cloud, ...], Field(max_length=8)] = ()
    api: Annotated[tuple[Api, ...], Field(max_length=8)] = ()

    @model_validator(mode="after")
    def _names_are_known_and_unique(self) -> Scenario:
        if self.region not in self.regions:
            known = ", ".join(self.regions)
            raise ValueError(
                f"region {self.region!r} is not one of regions: {known}{suggest(self.region, self.regions)}"
            )
        names = [offer.name for offer in self.offers]
        if len(set(names)) < len(names):
            raise ValueError("two offers of cloud and api have the same name")
        return self

    @property
    def offers(self) -> tuple[Cloud | Api, ...]:
        """What owning is compared with."""
        return *self.cloud, *self.api

    def inputs(self) -> dict[str, Input]:
        """Every figure that is stated, by its dotted name; the chosen region's are `region.*`."""
        found = dict(_inputs(self, ""))
        chosen = f"regions.{self.region}."
        return {
            name.replace(chosen, "region."): value
            for name, value in found.items()
            if not name.startswith("regions.") or name.startswith(chosen)
        }


def _inputs(value: Any, name: str) -> Iterator[tuple[str, Input]]:
    if isinstance(value, Input):
        yield name, value
        return
    parts: Mapping[Any, Any] = {}
    if isinstance(value, BaseModel):
        parts = {field: getattr(value, field) for field in type(value).model_fields}
    elif isinstance(value, dict):
        parts = value
    elif isinstance(value, tuple):
        parts = {item.name: item for item in value if isinstance(item, Cloud | Api)}
    for key, part in parts.items():
        yield from _inputs(part, f"{name}.{key}" if name else str(key))


def scenario_names() -> tuple[str, ...]:
    """Names of the scenarios in the catalog."""
    return tuple(sorted(path.stem for path in CATALOG.glob("*.yaml")))


def scenario_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a scenario, for editors and for people."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Scenario.model_json_schema(),
        "title": "edgekit scenario",
        "description": "A fleet, its load and its prices. A figure is a number, or a value with its source and range.",
    }


def find_scenario(name: str, overrides: Overrides | None = None) -> Scenario:
    """Load a scenario by name or path, and apply `--set PATH=VALUE`.

    Raises:
        InputError: there is no such scenario, or it is not valid; every problem with its file and line.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    elif name in scenario_names():
        path = CATALOG / f"{name}.yaml"
    else:
        known = scenario_names()
        found = f"none{suggest(name, known)}"
        raise InputError(f"a scenario named {name!r}", found, f"choose from {', '.join(known)}, or give a .yaml file")
    document = Document(path)
    scenario = document.check(Scenario)
    stated = document.value.get("name") if isinstance(document.value, dict) else None
    if isinstance(stated, str) and stated != path.stem:
        document.problem(("name",), f"must be {path.stem!r} as in the file's name, found {stated!r}")
    document.finish("scenario")
    assert scenario is not None  # a failed check was recorded, and finish raised it
    return _override(scenario, overrides) if overrides else scenario


def parse_overrides(texts: tuple[str, ...]) -> Overrides:
    """Parse `PATH=VALUE` texts, e.g. `hardware.price=300`; the value is read as YAML. Raises InputError."""
    parsed: Overrides = {}
    for text in texts:
        match = re.fullmatch(r"([\w-]+(?:\.[\w-]+)*)=(.*)", text, re.DOTALL)
        if match is None:
            raise InputError("--set PATH=VALUE", repr(text), "e.g. --set hardware.price=300")
        value = yaml_value(match[2])
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        parsed[match[1]] = {"value": value, "source": "--set"} if is_number else value
    return parsed


def _override(scenario: Scenario, overrides: Overrides) -> Scenario:
    values = scenario.model_dump()
    for path, value in overrides.items():
        *parents, last = path.removeprefix("region.").split(".")
        place: Any = values
        if path.startswith("region."):
            parents = ["regions", scenario.region, *parents]
        for part in parents:
            place = _step(place, part)
        if not isinstance(place, dict):
            known = list(scenario.inputs())
            raise InputError("--set with a figure of the scenario", f"{path!r}{suggest(path, known)}", "correct --set")
        place[last] = value
    try:
        return Scenario.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, detail['loc']))}: {explain(Scenario, detail)}".removeprefix(": ")
            for detail in error.errors()
        )
        raise InputError("--set PATH=VALUE that leaves a valid scenario", problems, "correct --set") from None


def _step(place: Any, part: str) -> Any:
    """The part of a mapping, or the offer of that name in a list."""
    if isinstance(place, dict):
        # hardware.price may be left out
        return place.get(part)
    if isinstance(place, tuple | list):
        return next((item for item in place if isinstance(item, dict) and item.get("name") == part), None)
    return None
