"""What a build costs to own: formulas with their units in their names, and all figures of builds side by side.

Costs are in the scenario's currency. A token that is paid for is an output token that somebody reads; the prompt
tokens that come with it, and whatever a strategy and its verifier compute besides, are part of its time. Formulas take
numbers or arrays of draws alike.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from edgekit.config import Strict
from edgekit.errors import InputError
from edgekit.measurement import Measurement
from edgekit.report import Report, StrategyResult
from edgekit.scenario import Api, Cloud, Input, Kind, Scenario
from edgekit.target import LOCAL, Target, Watts

Number = Any
"""A float, or an array with one value for each draw: formulas broadcast."""

DAYS_PER_YEAR = 365
HOURS_PER_YEAR = 24 * DAYS_PER_YEAR
SECONDS_PER_DAY = 86400
SECONDS_PER_YEAR = SECONDS_PER_DAY * DAYS_PER_YEAR
MILLION = 1e6
DRAWS = 10_000
PERCENTILES = (5, 95)
"""The interval that the Monte Carlo draws give: 90% of them lie inside."""

ENERGY = "energy_j_per_token"
PARTS = ("hardware", "idle energy", "operations", "network", "busy energy")
"""What a token costs; all but the last are fixed."""
_SLOWEST = 1e-6
"""Least rate (tokens/s) and least accuracy that a cost is computed with."""
HEADLINE = "cost_per_1m_output_tokens"


# --- formulas


def output_token_s(
    decode_tokens_per_s: Number, prefill_tokens_per_s: Number, input_per_output: Number, work_factor: Number = 1.0
) -> Number:
    """Seconds a device is busy for one output token, the prompt tokens that come with it included.

    `work_factor` is the time of an answer by the build's strategy over the time of a plain answer.
    """
    return work_factor * (1 / decode_tokens_per_s + input_per_output / prefill_tokens_per_s)


def energy_kwh(power_w: Number, hours: Number) -> Number:
    """Energy of a constant power."""
    return power_w * hours / 1000


def break_even_time(capex: Number, alternative_per_time: Number, own_per_time: Number) -> Number:
    """Time until what is saved has paid for the purchase, in the unit of the two running costs; inf where never.

    capex / (alternative - own), undiscounted, as vendors state it.
    """
    saving = np.asarray(alternative_per_time, float) - own_per_time
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(saving > 0, capex / saving, np.inf)[()]


def annuity_years(years: Number, discount_rate_per_year: Number) -> Number:
    """Present value of 1 a year, paid in equal parts at the end of each month; the years themselves without discount.

    The geometric sum of (1 + r)^(-m / 12) / 12 over the months m.
    """
    months = 12 * np.asarray(years, float)
    monthly = (1 + np.asarray(discount_rate_per_year, float)) ** (-1 / 12)
    with np.errstate(divide="ignore", invalid="ignore"):
        discounted = monthly * (1 - monthly**months) / (1 - monthly) / 12
    return np.where(monthly == 1, years, discounted)[()]


class Case:
    """One build in one scenario at given values of every input. Sums are of the fleet unless they say otherwise."""

    def __init__(self, scenario: Scenario, values: Mapping[str, Number]) -> None:
        """`values` has a number or an array for every name of `Build.inputs`."""
        self._scenario = scenario
        self._v = values

    @property
    def input_per_output(self) -> Number:
        """Prompt tokens for each output token."""
        return self._v["load.input_tokens_per_day"] / self._v["load.output_tokens_per_day"]

    @property
    def output_token_s(self) -> Number:
        """Busy seconds of a device for one output token."""
        v = self._v
        prefill = v.get("build.prefill_tokens_per_s", math.inf)
        return output_token_s(v["build.decode_tokens_per_s"], prefill, self.input_per_output, v["build.work_factor"])

    @property
    def busy_per_site(self) -> Number:
        """Devices that one site keeps busy: more than 1 where one device cannot keep up."""
        return self._v["load.output_tokens_per_day"] * self.output_token_s / SECONDS_PER_DAY

    @property
    def devices_per_site(self) -> Number:
        """Whole devices that a site needs."""
        return np.maximum(1.0, np.ceil(self.busy_per_site * (1 - 1e-9)))

    @property
    def devices(self) -> Number:
        """Devices at work, spares not counted."""
        return self._v["devices"] * self.devices_per_site

    @property
    def utilisation(self) -> Number:
        """Share of the time that a device is busy under the scenario's load."""
        return self.busy_per_site / self.devices_per_site

    @property
    def output_tokens_per_year(self) -> Number:
        """Tokens that the fleet is asked for."""
        return self._v["devices"] * self._v["load.output_tokens_per_day"] * DAYS_PER_YEAR

    @property
    def device_cost(self) -> Number:
        """One device, ready to work."""
        return self._v["hardware.price"] + self._v["hardware.further_price"]

    @property
    def capex(self) -> Number:
        """What is bought at the start, spares included."""
        return self.devices * (1 + self._v["hardware.spares_share"]) * self.device_cost

    @property
    def residual(self) -> Number:
        """What the devices are sold for at the end."""
        v = self._v
        sold = self.devices * (1 + v["hardware.spares_share"])
        return sold * v["hardware.price"] * v["hardware.residual_share"]

    @property
    def replacements_per_year(self) -> Number:
        """Devices that failed and are bought again."""
        return self.devices * self._v["hardware.failure_rate_per_year"] * self.device_cost

    @property
    def operations_per_year(self) -> Number:
        """Hours of work."""
        return self.devices * self._v["operations.hours_per_device_year"] * self._v["operations.cost_per_hour"]

    @property
    def network_per_year(self) -> Number:
        """Connections."""
        return self.devices * self._v["operations.network_per_device_year"]

    @property
    def idle_w(self) -> Number:
        """Power of a device that waits."""
        if "hardware.idle_w" in self._v:
            return self._v["hardware.idle_w"]
        return self._v["hardware.busy_w"] * self._v["hardware.idle_share"]

    @property
    def idle_kwh_per_year(self) -> Number:
        """Energy at the devices that the fleet would take without work."""
        return self.devices * energy_kwh(self.idle_w, HOURS_PER_YEAR)

    def busy_kwh_per_year(self, utilisation: Number) -> Number:
        """Energy at the devices that work adds, at a share of busy time."""
        above_w = np.maximum(0.0, self._v["hardware.busy_w"] - self.idle_w)
        return self.devices * energy_kwh(above_w, HOURS_PER_YEAR * utilisation)

    def kwh_per_year(self, utilisation: Number) -> Number:
        """Energy from the grid."""
        return (self.idle_kwh_per_year + self.busy_kwh_per_year(utilisation)) * self._v["pue"]

    def running_per_year(self, utilisation: Number) -> Number:
        """What is paid each year after the purchase."""
        energy = self.kwh_per_year(utilisation) * self._v["region.energy_price_per_kwh"]
        return energy + self.replacements_per_year + self.operations_per_year + self.network_per_year

    def parts_per_1m(self, utilisation: Number) -> dict[str, Number]:
        """Cost of 1M output tokens at a share of busy time, by `PARTS`; the purchase is spread over the years."""
        per_kwh = self._v["region.energy_price_per_kwh"] * self._v["pue"]
        million_per_year = self.devices * utilisation * SECONDS_PER_YEAR / self.output_token_s / MILLION
        yearly = {
            "hardware": (self.capex - self.residual) / self._v["years"] + self.replacements_per_year,
            "idle energy": self.idle_kwh_per_year * per_kwh,
            "operations": self.operations_per_year,
            "network": self.network_per_year,
            "busy energy": self.busy_kwh_per_year(utilisation) * per_kwh,
        }
        return {part: cost / million_per_year for part, cost in yearly.items()}

    def cost_per_1m(self, utilisation: Number) -> Number:
        """Cost of 1M output tokens, fixed and marginal."""
        return sum(self.parts_per_1m(utilisation).values())

    def kwh_per_1m(self, utilisation: Number) -> Number:
        """Energy from the grid for 1M output tokens."""
        million_per_year = self.devices * utilisation * SECONDS_PER_YEAR / self.output_token_s / MILLION
        return self.kwh_per_year(utilisation) / million_per_year

    def kgco2e(self, kwh: Number) -> Number:
        """Emissions of energy from the grid; those of making the devices are not counted."""
        return kwh * self._v["region.carbon_kg_per_kwh"]

    def cost_per_correct_answer(self, utilisation: Number) -> Number:
        """Cost of an answer by the build's strategy, over the share of right ones."""
        per_busy_s = self.cost_per_1m(utilisation) / MILLION / self.output_token_s
        return per_busy_s * self._v["build.answer_s"] / self._v["build.task_accuracy"]

    def alternative_per_year(self, offer: Cloud | Api) -> Number:
        """What the fleet's tokens cost elsewhere.

        On demand a cloud is paid for the seconds it is busy, and reserved for whole machines around the clock.
        """
        v, tokens = self._v, self.output_tokens_per_year
        if isinstance(offer, Api):
            price = v[f"api.{offer.name}.price_per_1m_output_tokens"]
            price = price + self.input_per_output * v[f"api.{offer.name}.price_per_1m_input_tokens"]
            return tokens / MILLION * price
        per_hour, rate = v[f"cloud.{offer.name}.price_per_hour"], v[f"cloud.{offer.name}.tokens_per_s"]
        if offer.billing == "on-demand":
            return tokens / (rate * 3600) * per_hour
        return np.maximum(1.0, np.ceil(tokens / SECONDS_PER_YEAR / rate * (1 - 1e-9))) * HOURS_PER_YEAR * per_hour

    def break_even_months(self, offer: Cloud | Api) -> Number:
        """Months until owning has cost no more than the offer; inf where never."""
        own = self.running_per_year(self.utilisation)
        return break_even_time(self.capex, self.alternative_per_year(offer) / 12, own / 12)

    @property
    def present_cost(self) -> Number:
        """Everything that owning costs over the years, what is sold at the end taken off, in money of today."""
        years, rate = self._v["years"], self._v["discount_rate"]
        running = self.running_per_year(self.utilisation) * annuity_years(years, rate)
        return self.capex + running - self.residual * (1 + rate) ** -years

    def npv(self, offer: Cloud | Api) -> Number:
        """Net present value of owning instead of the offer: positive where owning is cheaper."""
        years, rate = self._v["years"], self._v["discount_rate"]
        return self.alternative_per_year(offer) * annuity_years(years, rate) - self.present_cost


# --- builds


@dataclass(frozen=True)
class Build:
    """What a report says of one build that its cost rests on."""

    name: str
    report: Report
    inputs: dict[str, Input] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_build(name: str, report: Report, target: Target | None, scenario: Scenario) -> Build:
    """Collect the inputs of one build: the scenario's, the report's and, for what neither states, its target's.

    Args:
        name: What the build is called in the output.
        report: Of the build.
        target: Its profile, where it is known.
        scenario: What it is to be owned for.

    Raises:
        InputError: a figure that every cost needs is nowhere to be found.
    """
    inputs, notes = scenario.inputs(), []
    try:
        prompts = inputs["load.input_tokens_per_day"].highest > 0
        for figure in ("decode_tokens_per_s", *(["prefill_tokens_per_s"] if prompts else [])):
            found = _on_target(report, figure)
            if found is None or found.value < _SLOWEST:
                told = f"{name}, {f'{found.value:g}' if found else 'without one'}"
                raise InputError(f"a report with {figure} of its target", told, "edgekit build")
            inputs[f"build.{figure}"] = _above_zero(_from_measurement(found))
        inputs["build.work_factor"], note = _work_factor(report)
        notes += [note] if note else []
        inputs |= _answers(report, inputs)
        if "build.answer_s" not in inputs:
            notes.append("No accuracy on a task is known, and so no cost of a right answer: edgekit build --task.")
        inputs |= _hardware(name, report, target, scenario, inputs)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise InputError(f"figures of {name} within bounds", str(problem), "build it again") from None
    if inputs["hardware.busy_w"].kind == "predicted":
        notes.append("Energy is predicted from a power figure of the target; it was not measured.")
    elif scenario.hardware.busy_w is None and (energy := _on_target(report, ENERGY)):
        covers = (energy.note or "what covers is not said").partition(";")[0]
        notes.append(f"Energy is what a sensor told ({covers}): losses between it and the socket are in no cost.")
    return Build(name, report, dict(sorted(inputs.items())), tuple(notes))


def _on_target(report: Report, name: str) -> Measurement | None:
    """The figure as measured where the bundle will run, else as predicted for it.

    What was measured on the build host says nothing about another machine.
    """
    found = [m for m in report.measurements if (m.name, m.of) == (name, "bundle")]
    local, host = report.target.get("name") == LOCAL, report.host.get("fingerprint")
    there = [m for m in found if m.kind == "measured" and (local or (m.device or host) != host)]
    return next(iter([*there, *(m for m in found if m.kind == "predicted")]), None)


def _from_measurement(m: Measurement) -> Input:
    interval = "95% interval" if m.kind == "measured" else "expected range"
    words = [f"the build's report, {m.name}", f"on {m.device}" if m.device else "", m.note or ""]
    if m.ci_low is None or m.ci_high is None:
        return Input(value=m.value, source=", ".join(filter(None, words)), kind=m.kind)
    return Input(
        value=m.value,
        low=min(m.ci_low, m.value),
        high=max(m.ci_high, m.value),
        source=", ".join(filter(None, [*words, interval])),
        kind=m.kind,
    )


def _above_zero(divisor: Input) -> Input:
    """The same, its range kept away from 0: what is divided by it could be anything."""
    return divisor.model_copy(update={"low": max(divisor.lowest, divisor.value / 10)})


def _work_factor(report: Report) -> tuple[Input, str]:
    """Time of an answer by the chosen strategy over the time of a plain one, and what a reader must know."""
    chosen = next((row for row in report.strategies if row.chosen), None)
    if chosen is None:
        return Input(value=1, source="the report chooses no strategy: an answer is its own tokens"), ""
    plain = [row for row in report.strategies if row.task == chosen.task and row.strategy in ("greedy", "sample")]
    if not plain or min(plain[0].answer_s, chosen.answer_s) <= 0:
        note = "The report has no plain answer to compare the strategy with: its further work is not in these costs."
        return Input(value=1, source="no plain answer in the report"), note
    source = f"the build's report: time of an answer by {_words(chosen)} over {_words(plain[0])}, on {chosen.task}"
    factor = Input(value=chosen.answer_s / plain[0].answer_s, source=source, kind="predicted")
    if chosen.strategy == plain[0].strategy:
        return factor, ""
    note = f"An answer by {_words(chosen)} takes {factor.value:.3g} times as long as by {_words(plain[0])} (predicted)"
    return factor, f"{note}: verifier and discarded candidates are in every cost."


def _words(row: StrategyResult) -> str:
    return row.strategy if row.candidates == 1 else f"{row.strategy} with {row.candidates} candidates"


def _answers(report: Report, inputs: Mapping[str, Input]) -> dict[str, Input]:
    """Accuracy and time of an answer, where the report has them."""
    accuracy = [m for m in report.measurements if (m.name, m.of) == ("task_accuracy", "bundle")]
    if not accuracy or accuracy[0].value < _SLOWEST:
        return {}
    found = {"build.task_accuracy": _above_zero(_from_measurement(accuracy[0]))}
    answer, tokens = _on_target(report, "answer_s"), _on_target(report, "answer_tokens_forward")
    if answer is not None and answer.value > 0:
        return {**found, "build.answer_s": _from_measurement(answer)}
    if tokens is not None and tokens.value > 0:
        rate = inputs["build.decode_tokens_per_s"]
        source = "tokens forward of an answer (the build's report) over its decode speed"
        return {**found, "build.answer_s": Input(value=tokens.value / rate.value, source=source, kind="predicted")}
    return {}


def _hardware(
    name: str, report: Report, target: Target | None, scenario: Scenario, inputs: Mapping[str, Input]
) -> dict[str, Input]:
    """Price and power of one device, as the scenario states them or as the target does."""
    found: dict[str, Input] = {}
    if scenario.hardware.price is None:
        found["hardware.price"] = _price(name, target, scenario)
    energy = _on_target(report, ENERGY)
    power = target.power if target else None
    if scenario.hardware.busy_w is None:
        watts = power and (power.typical_w or power.max_w)
        # a prediction is the profile's power over the very rate that it is multiplied by here
        if energy is not None and (energy.kind == "measured" or not watts):
            joules, rate = _from_measurement(energy), inputs["build.decode_tokens_per_s"].value
            scaled = {part: getattr(joules, part) * rate for part in ("value", "lowest", "highest")}
            source = f"{joules.source}, times the decode speed"
            found["hardware.busy_w"] = Input(
                value=scaled["value"], low=scaled["lowest"], high=scaled["highest"], source=source, kind=energy.kind
            )
        elif watts:
            found["hardware.busy_w"] = _watts(watts, "while decoding" if watts == power.typical_w else "at most")  # type: ignore[union-attr]
        else:
            raise InputError("the power of a device", f"none for {name}", "--set hardware.busy_w=WATTS")
    if scenario.hardware.idle_w is None:
        if (idle := _on_target(report, "idle_w")) is not None:
            found["hardware.idle_w"] = _from_measurement(idle)
        elif power and power.idle_w:
            found["hardware.idle_w"] = _watts(power.idle_w, "idle")
    return found


def _price(name: str, target: Target | None, scenario: Scenario) -> Input:
    price = target.price_usd if target else None
    if price is None:
        raise InputError("the price of a device", f"none for {name}", "--set hardware.price=PRICE")
    if scenario.currency != "USD" and scenario.per_usd is None:
        found = f"{name}, {price.value:g} USD"
        raise InputError(f"a price in {scenario.currency}", found, "--set hardware.price=PRICE, or --set per_usd=RATE")
    rate = scenario.per_usd or Input(value=1)
    low, value, high = (price.value * at for at in (rate.lowest, rate.value, rate.highest))
    return Input(value=value, low=low, high=high, source=f"target profile: {price.origin}")


def _watts(watts: Watts, what: str) -> Input:
    return Input(value=watts.value, source=f"target profile, {watts.scope} {what}: {watts.origin}", kind="predicted")


# --- what is found out


class Estimate(Strict):
    """A figure, the interval that 90% of the draws lie in, and the weakest kind of input it rests on."""

    value: float | None
    """None: never."""
    low: float | None
    high: float | None
    kind: Kind


class InputRow(Strict):
    """One input as it was used."""

    name: str
    value: float
    low: float
    high: float
    kind: Kind
    source: str


class Utilisation(Strict):
    """Costs at one share of busy time, in the currency per 1M output tokens where nothing else is said."""

    share: float
    parts: dict[str, float]
    fixed: float
    marginal: float
    total: float
    kwh_per_1m: float
    kgco2e_per_1m: float
    cost_per_correct_answer: float | None
    kind: Kind


class Alternative(Strict):
    """Owning against one offer."""

    name: str
    billing: str
    """`on-demand`, `reserved` or `api`."""
    cost_per_year: Estimate
    cost_per_1m_output_tokens: Estimate
    break_even_months: Estimate
    npv: Estimate
    """Of owning instead: positive where owning is cheaper."""
    cumulative: tuple[float, ...]
    """Paid after each month, undiscounted, from month 0."""


class Swing(Strict):
    """The cost of 1M output tokens with one input at its low and at its high end."""

    name: str
    low_input: float
    high_input: float
    at_low: float
    at_high: float
    kind: Kind


class BuildCosts(Strict):
    """Everything about one build."""

    name: str
    model: str
    recipe: str
    target: str
    figures: dict[str, Estimate]
    utilisation: tuple[Utilisation, ...]
    alternatives: tuple[Alternative, ...]
    cumulative: tuple[float, ...]
    """Paid for owning after each month, undiscounted, from month 0, without what is sold at the end."""
    tornado: tuple[Swing, ...]
    """Widest first."""
    inputs: tuple[InputRow, ...]
    notes: tuple[str, ...]


class Costs(Strict):
    """Builds side by side in one scenario: what `tco.json` holds."""

    schema_version: int = 1
    edgekit_version: str
    scenario: dict[str, Any]
    draws: int
    seed: int
    interval: str = "5th to 95th percentile of the draws"
    builds: tuple[BuildCosts, ...]


class _Recorder(dict[str, float]):
    """Values that remember which of them were asked for."""

    def __init__(self, values: Mapping[str, float]) -> None:
        super().__init__(values)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> float:
        self.seen.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.update({name} & self.keys())
        return super().get(name, default)


_WEAKEST_FIRST: tuple[Kind, ...] = ("predicted", "assumed", "measured")


def draw(inputs: Mapping[str, Input], draws: int = DRAWS, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """Draw every uncertain input from the triangle over low, value and high; the others stay as they are.

    Each input has a stream of its own, so that builds in one scenario meet the same draws of what they share.
    """
    drawn = {}
    for name, one in inputs.items():
        if one.uncertain:
            stream = np.random.default_rng([seed, zlib.crc32(name.encode())])
            drawn[name] = stream.triangular(one.lowest, one.value, one.highest, draws)
        else:
            drawn[name] = np.full(draws, one.value)
    return drawn


class _Assessment:
    """One build in one scenario: every figure at the stated values, over the draws, and with its kind."""

    def __init__(self, build: Build, scenario: Scenario, draws: int, seed: int) -> None:
        self.build, self.scenario = build, scenario
        self.values = {name: one.value for name, one in build.inputs.items()}
        self.stated = Case(scenario, self.values)
        self.drawn = Case(scenario, draw(build.inputs, draws, seed))

    def kind(self, figure: Callable[[Case], Number]) -> Kind:
        recorder = _Recorder(self.values)
        figure(Case(self.scenario, recorder))
        kinds = {self.build.inputs[name].kind for name in recorder.seen}
        return next(kind for kind in _WEAKEST_FIRST if kind in kinds)

    def estimate(self, figure: Callable[[Case], Number]) -> Estimate:
        # order statistics: between a number and infinity there is nothing to interpolate
        low, high = np.percentile(figure(self.drawn), PERCENTILES, method="inverted_cdf")
        value = float(figure(self.stated))
        return Estimate(value=_finite(value), low=_finite(low), high=_finite(high), kind=self.kind(figure))

    def utilisation(self, share: float) -> Utilisation:
        case = self.stated
        parts = {name: float(cost) for name, cost in case.parts_per_1m(share).items()}
        kwh = float(case.kwh_per_1m(share))
        answered = "build.answer_s" in self.values
        return Utilisation(
            share=share,
            parts=parts,
            fixed=sum(parts.values()) - parts["busy energy"],
            marginal=parts["busy energy"],
            total=sum(parts.values()),
            kwh_per_1m=kwh,
            kgco2e_per_1m=float(case.kgco2e(kwh)),
            cost_per_correct_answer=float(case.cost_per_correct_answer(share)) if answered else None,
            kind=self.kind(lambda case: case.cost_per_1m(share)),
        )

    def alternative(self, offer: Cloud | Api) -> Alternative:
        def per_1m(case: Case) -> Number:
            return case.alternative_per_year(offer) / case.output_tokens_per_year * MILLION

        return Alternative(
            name=offer.name,
            billing=offer.billing if isinstance(offer, Cloud) else "api",
            cost_per_year=self.estimate(lambda case: case.alternative_per_year(offer)),
            cost_per_1m_output_tokens=self.estimate(per_1m),
            break_even_months=self.estimate(lambda case: case.break_even_months(offer)),
            npv=self.estimate(lambda case: case.npv(offer)),
            cumulative=self.cumulative(0.0, float(self.stated.alternative_per_year(offer))),
        )

    def cumulative(self, capex: float, per_year: float) -> tuple[float, ...]:
        months = math.ceil(12 * self.values["years"])
        return tuple(capex + per_year / 12 * month for month in range(months + 1))

    def swing(self, name: str, one: Input) -> Swing:
        def at(value: float) -> float:
            return float(_headline(Case(self.scenario, {**self.values, name: value})))

        return Swing(
            name=name,
            low_input=one.lowest,
            high_input=one.highest,
            at_low=at(one.lowest),
            at_high=at(one.highest),
            kind=one.kind,
        )


def _headline(case: Case) -> Number:
    return case.cost_per_1m(case.utilisation)


_FIGURES: dict[str, Callable[[Case], Number]] = {
    HEADLINE: _headline,
    "fixed_per_1m_output_tokens": lambda case: _headline(case) - case.parts_per_1m(case.utilisation)["busy energy"],
    "marginal_per_1m_output_tokens": lambda case: case.parts_per_1m(case.utilisation)["busy energy"],
    "cost_per_correct_answer": lambda case: case.cost_per_correct_answer(case.utilisation),
    "utilisation": lambda case: case.utilisation,
    "devices": lambda case: case.devices,
    "capex": lambda case: case.capex,
    "running_cost_per_year": lambda case: case.running_per_year(case.utilisation),
    "present_cost": lambda case: case.present_cost,
    "kwh_per_year": lambda case: case.kwh_per_year(case.utilisation),
    "kgco2e_per_year": lambda case: case.kgco2e(case.kwh_per_year(case.utilisation)),
    "kwh_per_1m_output_tokens": lambda case: case.kwh_per_1m(case.utilisation),
    "kgco2e_per_1m_output_tokens": lambda case: case.kgco2e(case.kwh_per_1m(case.utilisation)),
}


def assess(build: Build, scenario: Scenario, draws: int = DRAWS, seed: int = 0) -> BuildCosts:
    """Work out everything about one build."""
    one = _Assessment(build, scenario, draws, seed)
    answered = "build.answer_s" in build.inputs
    swings = [one.swing(name, value) for name, value in build.inputs.items() if value.uncertain]
    swings = [swing for swing in swings if swing.at_low != swing.at_high]
    notes = list(build.notes)
    if (per_site := float(one.stated.devices_per_site)) > 1:
        notes.append(f"One device cannot keep up with a site's load: {per_site:,.0f} are counted for each.")
    report = build.report
    return BuildCosts(
        name=build.name,
        model=str(report.model.get("name") or report.model.get("source") or "unnamed model"),
        recipe=str(report.recipe.get("name") or "unnamed recipe"),
        target=str(report.target.get("title") or report.target.get("name") or "unnamed target"),
        figures={
            name: one.estimate(figure)
            for name, figure in _FIGURES.items()
            if answered or name != "cost_per_correct_answer"
        },
        utilisation=tuple(one.utilisation(share) for share in scenario.utilisation),
        alternatives=tuple(one.alternative(offer) for offer in scenario.offers),
        cumulative=one.cumulative(float(one.stated.capex), float(one.stated.running_per_year(one.stated.utilisation))),
        tornado=tuple(sorted(swings, key=lambda swing: -abs(swing.at_high - swing.at_low))),
        inputs=tuple(
            InputRow(name=name, value=i.value, low=i.lowest, high=i.highest, kind=i.kind, source=i.source)
            for name, i in build.inputs.items()
        ),
        notes=tuple(notes),
    )


def compare_costs(
    builds: Sequence[Build], scenario: Scenario, version: str, draws: int = DRAWS, seed: int = 0
) -> Costs:
    """Work out builds side by side."""
    return Costs(
        edgekit_version=version,
        scenario=scenario.model_dump(mode="json"),
        draws=draws,
        seed=seed,
        builds=tuple(assess(build, scenario, draws, seed) for build in builds),
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
