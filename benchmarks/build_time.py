"""Wall time of a build, of a second target on a warm store, and edgekit's own share of it."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from edgekit.build import BuildEvents
from edgekit.deliver import deliver
from edgekit.devices import open_device
from edgekit.model import BUILTIN, resolve_model
from edgekit.plan import make_plan
from edgekit.recipe import find_recipe
from edgekit.store import Store
from edgekit.target import find_target


class Clock(BuildEvents):
    """Adds up the time between a step's start and its end, and of the measurement that comes last."""

    def __init__(self) -> None:
        self.tools_s: dict[str, float] = {}
        self._running: tuple[str, float] | None = None

    def started(self, step: str, position: int, steps: int) -> None:
        """A step begins."""
        self._running = (step, time.perf_counter())

    def finished(self, step: str, status: str, seconds: float) -> None:
        """A step ended; a cached one never began."""
        self.stop()

    def stop(self) -> None:
        """End what runs."""
        if self._running:
            name, start = self._running
            self.tools_s[name] = self.tools_s.get(name, 0) + time.perf_counter() - start
            self._running = None


def build(model: str, target_name: str, recipe_name: str, store: Store, out: Path) -> dict[str, object]:
    """Build one target from names to bundle and return its times in seconds."""
    clock = Clock()
    start = time.perf_counter()
    target = find_target(target_name)
    plan = make_plan(resolve_model(model), find_recipe(recipe_name), target)
    device = open_device("local")
    result = deliver(plan, store, out, _Timed(device, clock), clock)
    wall = time.perf_counter() - start
    tools = sum(clock.tools_s.values())
    return {
        "target": target.name,
        "recipe": recipe_name,
        "wall_s": round(wall, 2),
        "tools_s": {name: round(seconds, 2) for name, seconds in clock.tools_s.items()},
        "own_s": round(wall - tools, 2),
        "own_share": round((wall - tools) / wall, 4),
        "executed": [step.stage for step in result.report.steps if step.status == "executed"],
    }


class _Timed:
    """A device whose measurement counts as a tool."""

    def __init__(self, device: object, clock: Clock) -> None:
        self._device, self._clock = device, clock

    def fingerprint(self) -> object:
        """Pass on."""
        return self._device.fingerprint()

    def run(self, *arguments: object, **options: object) -> object:
        """Time the measurement."""
        try:
            return self._device.run(*arguments, **options)
        finally:
            self._clock.stop()


def main() -> None:
    """Build a first target in an empty store, then a second one, then both again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=BUILTIN)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch) / "store")
        runs = [
            {"run": label, **build(arguments.model, target, recipe, store, Path(scratch) / "out")}
            for label, target, recipe in (
                ("first target, cold", "jetson-orin-nano-super", "gguf-q4"),
                ("second target, same recipe", "jetson-agx-orin-64gb", "gguf-q4"),
                ("third target, other type", "raspberry-pi-5", "gguf-q4-0"),
                ("first target again", "jetson-orin-nano-super", "gguf-q4"),
            )
        ]
    first = float(str(runs[0]["wall_s"]))
    print(f"{'run':<28} {'wall s':>8} {'/ first':>8} {'own s':>7} {'own %':>6}  executed")
    for run in runs:
        ratio = run["ratio_to_first"] = round(float(str(run["wall_s"])) / first, 3)
        executed = ", ".join(run["executed"]) or "-"
        print(f"{run['run']:<28} {run['wall_s']:>8} {ratio:>8} {run['own_s']:>7} {run['own_share']:>6.1%}  {executed}")
    print(json.dumps({"benchmark": "build_time", "model": arguments.model, "runs": runs}))


if __name__ == "__main__":
    main()
