"""A target: the hardware profile that a bundle is made for. One YAML file in `catalog/targets/` each."""

from __future__ import annotations

import datetime
from typing import Generic, Literal, TypeVar

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from edgekit.config import Strict

T = TypeVar("T")


class Figure(Strict, Generic[T]):
    """One value of a profile with where it comes from: a source and its date, or marked an estimate."""

    value: T
    source: str | None = None
    """Publication, data sheet or measurement that states the value."""
    date: str | None = None
    """When the source stated it: `YYYY`, `YYYY-MM` or `YYYY-MM-DD`."""
    estimate: str | None = None
    """How the value was estimated, for one that no source states."""

    @model_validator(mode="after")
    def _has_an_origin(self) -> Figure[T]:
        if (self.estimate is None) == (self.source is None):
            raise ValueError("needs either a source with its date, or an estimate that says how")
        if self.source is not None and self.date is None:
            raise ValueError("a source needs its date")
        if self.date is not None:
            _parse_date(self.date)
        return self


def _parse_date(text: str) -> None:
    for form in ("%Y", "%Y-%m", "%Y-%m-%d"):
        try:
            datetime.datetime.strptime(text, form)
            return
        except ValueError:
            continue
    raise ValueError(f"a date looks like 2025, 2025-03 or 2025-03-31, not {text!r}")


class Memory(Strict):
    """What the device has and what a model may use of it."""

    total_bytes: Figure[PositiveInt]
    usable_bytes: Figure[PositiveInt]
    """Free for weights, KV cache and buffers once the system runs."""
    bandwidth_bytes_per_s: Figure[PositiveFloat]
    """Peak of the memory that holds the weights."""
    unified: bool
    """True where the CPU and the accelerator share this memory."""


class Compute(Strict):
    """What bounds decode and prefill on the engine the target prefers."""

    accelerator: Literal["none", "cuda", "metal", "vulkan", "sycl"]
    threads: PositiveInt
    """CPU threads the engine should use: physical big cores."""
    dense_flops_per_s: Figure[PositiveFloat]
    """Dense half-precision (or CPU dot-product) peak that prefill runs on."""
    decode_efficiency: Figure[PositiveFloat]
    """Share of the peak bandwidth that decode reaches."""
    prefill_efficiency: Figure[PositiveFloat]
    """Share of the dense peak that prefill reaches."""
    token_overhead_s: Figure[NonNegativeFloat]
    """Time per token that does not shrink with the model: launches, sampling, synchronisation."""


class Power(Strict):
    """Board power in watts; absent where nobody published it."""

    idle_w: Figure[NonNegativeFloat] | None = None
    typical_w: Figure[PositiveFloat] | None = None
    """While decoding a language model."""
    max_w: Figure[PositiveFloat] | None = None
    modes: tuple[str, ...] = ()


class Target(Strict):
    """A hardware profile."""

    name: str
    title: str
    aliases: tuple[str, ...] = ()
    arch: Literal["aarch64", "x86_64"]
    os: Literal["linux", "android", "macos", "windows"] = "linux"
    engines: tuple[str, ...]
    """Engines that run there, best first, by the names of the files in `engines/`."""
    default_recipe: str
    default_recipe_reason: str
    context_tokens: PositiveInt = 4096
    """Context length that the bundle is planned for."""
    memory: Memory
    compute: Compute
    power: Power = Power()
    price_usd: Figure[PositiveFloat] | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Target:
        if self.memory.usable_bytes.value > self.memory.total_bytes.value:
            raise ValueError("memory.usable_bytes is more than memory.total_bytes")
        if not self.engines:
            raise ValueError("engines is empty")
        return self
