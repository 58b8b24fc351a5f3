"""A target: the hardware profile that a bundle is made for. One YAML file in `catalog/targets/` each."""

from __future__ import annotations

import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator
from typing_extensions import TypeAliasType

from edgekit.config import Document, Strict
from edgekit.errors import InputError, suggest

CATALOG = Path(__file__).parent / "catalog" / "targets"
LOCAL = "local"
"""The target that is this machine: probed, never a file."""

T = TypeVar("T")

# named aliases: the JSON Schema calls its definitions after them
Count = TypeAliasType("Count", Annotated[int, Field(gt=0)])
Positive = TypeAliasType("Positive", Annotated[float, Field(gt=0, allow_inf_nan=False)])
NonNegative = TypeAliasType("NonNegative", Annotated[float, Field(ge=0, allow_inf_nan=False)])
Share = TypeAliasType("Share", Annotated[float, Field(gt=0, le=1)])
Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Text = Annotated[str, Field(min_length=1)]


def _as_text(date: Any) -> Any:
    """YAML reads an unquoted 2025 as a number and 2025-03-31 as a date; both are meant as they are written."""
    if isinstance(date, datetime.date) or (isinstance(date, int) and not isinstance(date, bool)):
        return str(date)
    return date


class Figure(Strict, Generic[T]):
    """One value of a profile with where it comes from: a source and its date, or marked an estimate."""

    value: T
    source: Text | None = None
    """Publication, data sheet or measurement that states the value."""
    date: Annotated[str, BeforeValidator(_as_text)] | None = None
    """When the source stated it: `YYYY`, `YYYY-MM` or `YYYY-MM-DD`."""
    estimate: Text | None = None
    """How the value was estimated, for one that no source states."""

    @model_validator(mode="after")
    def _has_an_origin(self) -> Figure[T]:
        if (self.estimate is None) == (self.source is None):
            raise ValueError("needs either a source with its date, or an estimate that says how")
        if (self.source is None) != (self.date is None):
            raise ValueError("a source needs its date, and only a source has one")
        if self.date is not None:
            _parse_date(self.date)
        return self

    @property
    def origin(self) -> str:
        """Where the value comes from, in one phrase."""
        return f"estimate: {self.estimate}" if self.estimate else f"{self.source}, {self.date}"


def _parse_date(text: str) -> None:
    for form in ("%Y", "%Y-%m", "%Y-%m-%d"):
        try:
            datetime.datetime.strptime(text, form)
            return
        except ValueError:
            continue
    raise ValueError(f"a date looks like 2025, 2025-03 or 2025-03-31, not {text!r}")


class Watts(Figure[NonNegative]):
    """A power figure: watts mean nothing without what they cover."""

    scope: Literal["chip", "board", "wall"]
    """`chip`: processor or card alone; `board`: at its input; `wall`: with the power supply, or a whole computer."""


class Memory(Strict):
    """What the device has and what a model may use of it."""

    total_bytes: Figure[Count]
    usable_bytes: Figure[Count]
    """Free for weights, KV cache and buffers once the system runs."""
    bandwidth_bytes_per_s: Figure[Positive]
    """Peak of the memory that holds the weights."""
    copy_bytes_per_s: Figure[Positive] | None = None
    """What a memory copy by the CPU reads and writes per second; on boards it tells more of decode than the peak."""
    unified: bool
    """True where the CPU and the accelerator share this memory."""


class Compute(Strict):
    """What bounds decode and prefill on the engine the target prefers."""

    accelerator: Literal["none", "cuda", "metal", "vulkan", "sycl"]
    threads: PositiveInt
    """CPU threads the engine should use: physical big cores."""
    dense_flops_per_s: Figure[Positive]
    """Dense half-precision (or CPU dot-product) peak that prefill runs on."""
    decode_efficiency: Figure[Share]
    """Share of the peak bandwidth that decode reaches, besides `token_overhead_s`."""
    prefill_efficiency: Figure[Share]
    """Share of the dense peak that prefill reaches."""
    token_overhead_s: Figure[NonNegative]
    """Time per token that does not shrink with the model: launches, sampling, synchronisation."""
    weight_costs: Figure[dict[str, Positive]] | None = None
    """Time that a weight of each GGUF type takes in decode on the engine's kernels there, relative to Q8_0. A byte
    budget chooses among these types only; without, among all, and what a weight costs is its bytes."""
    points: NonNegativeInt = 0
    """Published decode rates that efficiency and overhead were fitted to; 0 where they were estimated otherwise."""

    @property
    def costs(self) -> dict[str, float]:
        """`weight_costs`, or nothing."""
        return self.weight_costs.value if self.weight_costs else {}


class Runtime(Strict):
    """The same shares for another engine than the first of `engines`, or for a runtime that edgekit does not drive."""

    decode_efficiency: Figure[Share]
    token_overhead_s: Figure[NonNegative]
    prefill_efficiency: Figure[Share] | None = None
    peak_flops_per_s: Figure[Positive] | None = None
    """Peak of the processor it runs on, where that is not the one of `compute`."""
    points: PositiveInt
    """Published decode rates that efficiency and overhead were fitted to."""


class Power(Strict):
    """Power in watts; absent where nobody published it."""

    idle_w: Watts | None = None
    typical_w: Watts | None = None
    """While decoding a language model."""
    max_w: Watts | None = None
    modes: tuple[str, ...] = ()
    mode_rates: dict[str, Figure[Share]] = Field(default={})
    """Decode rate in a mode over that of the profile, where somebody published it."""

    @model_validator(mode="after")
    def _modes_are_known(self) -> Power:
        if unknown := sorted(set(self.mode_rates) - set(self.modes)):
            raise ValueError(f"mode_rates names {unknown[0]!r}, which is not in modes")
        return self


class Target(Strict):
    """A hardware profile."""

    name: Name
    """The same as the name of the file, without `.yaml`."""
    title: Text
    aliases: tuple[Name, ...] = ()
    """Shorter names; each belongs to one profile only."""
    arch: Literal["aarch64", "x86_64"]
    os: Literal["linux", "android", "macos", "windows"] = "linux"
    engines: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Engines that run there, best first, by the names of the files in `engines/`."""
    onnx_provider: Literal["cpu", "cuda", "dml", "openvino", "qnn", "tensorrt", "webgpu"] = "cpu"
    """Execution provider that ONNX models are exported for."""
    default_recipe: Name
    default_recipe_reason: Text
    context_tokens: PositiveInt = 4096
    """Context length that the bundle is planned for."""
    memory: Memory
    compute: Compute
    runtimes: dict[Annotated[str, Field(pattern=r"^[a-z0-9_-]+(/[a-z]+)?$")], Runtime] = Field(default={})
    """Constants of further engines; after a slash the back end, where it is not the target's accelerator."""
    power: Power = Power()
    price_usd: Figure[Positive] | None = None
    notes: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Target:
        if self.memory.usable_bytes.value > self.memory.total_bytes.value:
            raise ValueError("memory.usable_bytes is more than memory.total_bytes")
        return self


def load_target(path: Path) -> Target:
    """Read one profile.

    Raises:
        InputError: everything wrong with the file at once, each problem with its line.
    """
    document = Document(path)
    target = document.check(Target)
    name = document.value.get("name") if isinstance(document.value, dict) else None
    if isinstance(name, str) and name != path.stem:
        document.problem(("name",), f"must be {path.stem!r} as in the file's name, found {name!r}")
    _check_names(document)
    document.finish("target profile")
    assert target is not None  # a failed check was recorded, and finish raised it
    return target


def _check_names(document: Document) -> None:
    # imported here, for both lie above targets
    from edgekit.engines import engine_names
    from edgekit.recipe import recipe_names

    raw = document.value if isinstance(document.value, dict) else {}
    recipe, engines = raw.get("default_recipe"), raw.get("engines")
    if isinstance(recipe, str) and recipe not in recipe_names():
        document.problem(("default_recipe",), f"unknown recipe{suggest(recipe, recipe_names())}, found {recipe!r}")
    for index, engine in enumerate(engines if isinstance(engines, list) else ()):
        if isinstance(engine, str) and engine not in engine_names():
            document.problem(("engines", index), f"unknown engine{suggest(engine, engine_names())}, found {engine!r}")


@cache
def _catalog() -> tuple[Target, ...]:
    return tuple(load_target(path) for path in sorted(CATALOG.glob("*.yaml"), key=lambda path: path.stem))


def all_targets() -> list[Target]:
    """Every profile of the catalog, sorted by name; without `local`."""
    return list(_catalog())


def find_target(name: str) -> Target:
    """Return a target by its name, an alias, the path of a profile (`./board.yaml`), or `local`.

    A power mode may follow, as in `jetson-agx-orin-64gb@30W`: the same target, slowed to what was published of it.

    Raises:
        InputError: there is no such target or mode (with the closest known name), or the file is not valid.
    """
    if name == LOCAL:
        from edgekit.devices.probe import probe_local

        return probe_local()
    if Path(name).suffix in (".yaml", ".yml"):
        return load_target(Path(name))
    if "@" in name:
        whole, _, mode = name.rpartition("@")
        return in_mode(find_target(whole), mode)
    known = {key: target for target in _catalog() for key in (target.name, *target.aliases)}
    if name not in known:
        raise InputError(f"a target named {name!r}", f"none{suggest(name, [*known, LOCAL])}", "edgekit targets list")
    return known[name]


def in_mode(target: Target, mode: str) -> Target:
    """The target in one of its power modes; what it draws in it is not known.

    Bandwidth and arithmetic take the published share of the decode rate, and the overhead of a token its inverse.

    Raises:
        InputError: the profile has no rate for such a mode.
    """
    rates = target.power.mode_rates
    if mode not in rates:
        known = ", ".join(f"{target.name}@{name}" for name in rates) or "there is none"
        wanted = f"a power mode of {target.name} with a known rate ({known})"
        raise InputError(wanted, repr(mode), f"edgekit targets show {target.name}")
    share, memory, compute = rates[mode], target.memory, target.compute

    def times(figure: Figure[float], factor: float) -> Figure[float]:
        how = f"{figure.origin}; times {factor:.3g} in {mode}: {share.origin}"
        return Figure(value=figure.value * factor, estimate=how)

    copy = memory.copy_bytes_per_s
    slower = 1 / share.value
    return target.model_copy(
        update={
            "title": f"{target.title}, in {mode}",
            "memory": memory.model_copy(
                update={
                    "bandwidth_bytes_per_s": times(memory.bandwidth_bytes_per_s, share.value),
                    "copy_bytes_per_s": copy and times(copy, share.value),
                }
            ),
            "compute": compute.model_copy(
                update={
                    "dense_flops_per_s": times(compute.dense_flops_per_s, share.value),
                    "token_overhead_s": times(compute.token_overhead_s, slower),
                }
            ),
            "runtimes": {
                name: runtime.model_copy(update={"token_overhead_s": times(runtime.token_overhead_s, slower)})
                for name, runtime in target.runtimes.items()
            },
            "power": target.power.model_copy(update={"idle_w": None, "typical_w": None, "max_w": None}),
        }
    )


def target_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a profile, for editors and for people."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Target.model_json_schema(),
        "title": "edgekit target profile",
        "description": "The hardware that a bundle is made for. Every figure states its source and date, "
        "or says how it was estimated.",
    }
