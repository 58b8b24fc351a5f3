"""A recipe: the ordered stages that make an artifact, the text it is judged on, and its gates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, PositiveInt, ValidationError, model_validator

from edgekit.adapter import PREPENDED, Adapter
from edgekit.companion import Companion
from edgekit.config import Document, Strict, explain, yaml_value
from edgekit.decode import needs_verifier
from edgekit.engines import engine_names, find_engine
from edgekit.errors import InputError, suggest
from edgekit.measure import divergence
from edgekit.report.figures import KNOWN
from edgekit.stage import Stage, StageParams, find_stage, stage_names

S = TypeVar("S", bound=Strict)
Overrides = dict[tuple[str, str], Any]

CATALOG = Path(__file__).parent / "catalog" / "recipes"


class Gate(Strict):
    """A bound on a measurement, absolute or relative to the source model."""

    measure: str
    of: str = "bundle"
    """What is measured: `bundle`, or the name of a stage whose output is checked on the way."""
    max: float | None = None
    min: float | None = None
    max_ratio: float | None = None
    """Largest allowed ratio to the same measurement of the source model."""
    min_ratio: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Gate:
        if sum(bound is not None for bound in (self.max, self.min, self.max_ratio, self.min_ratio)) != 1:
            raise ValueError("needs exactly one of max, min, max_ratio, min_ratio")
        return self


class Evaluation(Strict):
    """The held-out text that the source model and the artifact are compared on."""

    text: str = "python-docs"
    """A text set, or the path of a file; only its evaluation split is used."""
    windows: PositiveInt = 8
    window_tokens: int = Field(default=512, ge=3)
    """Length of a window; its second half is scored."""


class RecipeFile(Strict):
    """What a recipe's YAML file holds."""

    name: str
    description: str
    engine: str
    """Engine that runs the result: a file in `engines/`."""
    stages: tuple[dict[str, dict[str, Any] | None], ...]
    """Stages in order, each `name: {parameters}`."""
    evaluation: Evaluation = Evaluation()
    gates: tuple[Gate, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A recipe whose stages are found and whose parameters are checked."""

    name: str
    description: str
    engine: str
    stages: tuple[tuple[Stage, StageParams], ...]
    evaluation: Evaluation
    gates: tuple[Gate, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that strategies are measured on."""
        return next((tuple(params.tasks) for stage, params in self.stages if stage.name == "strategies"), ())  # type: ignore[attr-defined]

    def describe(self) -> dict[str, Any]:
        """The recipe as plain JSON, every parameter filled in."""
        return {
            "name": self.name,
            "description": self.description,
            "engine": self.engine,
            "stages": [{stage.name: params.model_dump(mode="json")} for stage, params in self.stages],
            "evaluation": self.evaluation.model_dump(mode="json"),
            "gates": [gate.model_dump(mode="json", exclude_none=True) for gate in self.gates],
        }


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes in the catalog."""
    return tuple(sorted(path.stem for path in CATALOG.glob("*.yaml")))


def find_recipe(
    name: str,
    overrides: Overrides | None = None,
    adapters: Sequence[Adapter] = (),
    *,
    companion: Companion | None = None,
    tasks: Sequence[str] = (),
) -> Recipe:
    """Load a recipe by name or path, make room for what goes with the model, and apply `--set STAGE.PARAM=VALUE`.

    A companion adds the stage `verifier` at the end, after `trunk` where it has one of its own, and tasks add
    `strategies` after it. An adapter that can be merged adds `merge` after the import; one that acts like a prompt,
    and an override of `prefix`, adds `prefix` at the end. A recipe that names these stages itself keeps them.

    Raises InputError that lists every problem at once with its file and line.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    elif name in recipe_names():
        path = CATALOG / f"{name}.yaml"
    else:
        known = recipe_names()
        raise InputError(f"a recipe named {name!r}", f"none{suggest(name, known)}", "edgekit recipes list")
    overrides = overrides or {}
    begins = any(stage == "prefix" for stage, _ in overrides)
    recipe = _with_adapters(_resolve(Document(path)), adapters, begins)
    return _override(_with_companion(recipe, companion, tasks), overrides)


def _with_adapters(recipe: Recipe, adapters: Sequence[Adapter], begins: bool) -> Recipe:
    stages = list(recipe.stages)
    named = {stage.name for stage, _ in stages}
    prepended = [adapter for adapter in adapters if adapter.method in PREPENDED]
    if len(prepended) < len(adapters) and "merge" not in named:
        merge = find_stage("merge")
        # one for each adapter, as the stage counts them
        weights = tuple(adapter.weight for adapter in adapters)
        stages.insert(1, (merge, merge.params.model_validate({"weights": weights})))
    if (begins or prepended) and "prefix" not in named:
        prefix = find_stage("prefix")
        if not any(stage.gives in prefix.takes for stage, _ in stages):
            found = f"{recipe.name}, for {recipe.engine}"
            raise InputError("a recipe that makes GGUF, to ship a computed beginning", found, "--recipe gguf-q4")
        stages.append((prefix, prefix.params()))
    return replace(recipe, stages=tuple(stages))


def _with_companion(recipe: Recipe, companion: Companion | None, tasks: Sequence[str]) -> Recipe:
    stages = list(recipe.stages)
    if companion is not None and companion.has_trunk:
        stages.append(((trunk := find_stage("trunk")), trunk.params()))
    if companion is not None:
        stages.append(((judging := find_stage("verifier")), judging.params()))
    if tasks:
        choosing = find_stage("strategies")
        params = choosing.params.model_validate({"tasks": tuple(tasks)})
        if companion is None:
            names = tuple(name for name in params.names if not needs_verifier(name))  # type: ignore[attr-defined]
            params = params.model_copy(update={"names": names})
        stages.append((choosing, params))
    return replace(recipe, stages=tuple(stages))


def parse_overrides(texts: tuple[str, ...]) -> Overrides:
    """Parse `STAGE.PARAM=VALUE` texts; the value is read as YAML. Raises InputError."""
    parsed = {}
    for text in texts:
        match = re.fullmatch(r"([\w-]+)\.([\w-]+)=(.*)", text, re.DOTALL)
        if match is None:
            raise InputError("--set STAGE.PARAM=VALUE", repr(text), "e.g. --set gguf.type=Q5_K_M")
        parsed[match[1], match[2]] = yaml_value(match[3])
    return parsed


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file for editors: each stage with its own parameters."""
    schema = RecipeFile.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    choices = {}
    for name in stage_names():
        params = find_stage(name).params.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(params.pop("$defs", {}))
        choices[name] = {"anyOf": [params, {"type": "null"}], "description": find_stage(name).summary}
    schema["properties"]["stages"]["items"] = {
        "type": "object",
        "properties": choices,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _resolve(document: Document) -> Recipe:
    loaded = document.check(RecipeFile)
    stages = [(find_stage("checkpoint"), find_stage("checkpoint").params())]
    listed = document.value.get("stages") if isinstance(document.value, dict) else None
    for index, entry in enumerate(listed if isinstance(listed, list) else ()):
        if not isinstance(entry, dict) or len(entry) != 1:
            document.problem(("stages", index), "expected one stage, as `name: {parameters}`")
            continue
        ((name, values),) = entry.items()
        if name not in stage_names():
            document.problem(("stages", index, name), f"unknown stage{suggest(name, stage_names())}")
            continue
        stage = find_stage(name)
        params = document.check(stage.params, {} if values is None else values, at=("stages", index, name))
        if params is not None:
            stages.append((stage, params))
    _check_names(document)
    document.finish("recipe")
    assert loaded is not None
    return Recipe(loaded.name, loaded.description, loaded.engine, tuple(stages), loaded.evaluation, loaded.gates)


def _check_names(document: Document) -> None:
    """Record every name that means nothing, also in a document that is wrong elsewhere."""
    raw = document.value if isinstance(document.value, dict) else {}
    name, engine = raw.get("name"), raw.get("engine")
    listed, gates = (value if isinstance(value := raw.get(key), list) else [] for key in ("stages", "gates"))
    if isinstance(name, str) and name != document.path.stem:
        document.problem(("name",), f"must be the file's name, {document.path.stem!r}")
    if isinstance(engine, str) and engine not in engine_names():
        document.problem(("engine",), f"unknown engine{suggest(engine, engine_names())}")
    if raw.get("stages") == []:
        document.problem(("stages",), "needs at least one stage")
    names = [name for entry in listed if isinstance(entry, dict) for name in entry if name in stage_names()]
    # while the engine is unknown, any stage may be what it runs
    runs = find_engine(engine).RUNS if engine in engine_names() else None
    checked = ["bundle", *(name for name in names if runs is None or find_stage(name).gives in runs)]
    for index, gate in enumerate(gates):
        if not isinstance(gate, dict):
            continue
        of, measure = gate.get("of", "bundle"), gate.get("measure")
        if isinstance(of, str) and of not in checked:
            known = f"is not one of {', '.join(checked)}, which can be measured"
            document.problem(("gates", index, "of"), f"{of!r} {known}{suggest(of, checked)}")
        # what is checked on the way is compared with the source; only the bundle is timed and weighed, too
        measures = list(KNOWN) if of == "bundle" else list(divergence.FIGURES)
        if isinstance(measure, str) and measure not in measures:
            document.problem(("gates", index, "measure"), f"unknown measurement{suggest(measure, measures)}")


def _override(recipe: Recipe, overrides: Overrides) -> Recipe:
    places = {stage.name for stage, _ in recipe.stages} | {"evaluation"}
    for name, _ in overrides:
        if name not in places:
            raise InputError(
                f"--set with a stage of {recipe.name} ({', '.join(sorted(places))})",
                f"{name!r}{suggest(name, places)}",
                f"edgekit recipes show {recipe.name}",
            )
    return replace(
        recipe,
        stages=tuple((stage, _replace_fields(params, stage.name, overrides)) for stage, params in recipe.stages),
        evaluation=_replace_fields(recipe.evaluation, "evaluation", overrides),
    )


def _replace_fields(params: S, name: str, overrides: Overrides) -> S:
    values = {field: value for (owner, field), value in overrides.items() if owner == name}
    if not values:
        return params
    try:
        return type(params).model_validate({**params.model_dump(), **values})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, (name, *e['loc'])))}: {explain(type(params), e)}" for e in error.errors()]
        unknown = any(e["type"] == "extra_forbidden" for e in error.errors())
        fields = f"PARAM of {', '.join(type(params).model_fields)}" if unknown else "a VALUE that it can take"
        raise InputError(f"--set {name}.PARAM=VALUE with {fields}", "; ".join(problems), "correct --set") from None
