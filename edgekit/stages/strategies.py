"""Which strategy suits the model and its verifier: accuracy and cost of each on validation problems of the tasks."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, field_validator

from edgekit.artifact import Artifact
from edgekit.chat import problem_tokens
from edgekit.companion import open_verifier
from edgekit.decode import Options, Sampling, Traffic, find_strategy
from edgekit.engine import EngineOptions
from edgekit.engines import find_engine
from edgekit.errors import InputError
from edgekit.formats.weights import read_weights
from edgekit.measure.strategies import Curve, measure_strategies
from edgekit.stage import Facts, StageContext, StageParams, runnable, stage
from edgekit.tasks import find_task

FILE_NAME = "strategies.json"


class Params(StageParams):
    """Parameters of `strategies`."""

    engine: str = "llama_cpp"
    """The build states it, the types and sizes that follow, and the tasks."""
    kv_type: str = "f16"
    tasks: tuple[str, ...] = ()
    task_sha256: tuple[str, ...] = ()
    """Of the files that tasks read."""
    problems: PositiveInt = 40
    """Of each task."""
    names: tuple[str, ...] = ("greedy", "majority", "weighted", "best-of-n", "beam", "rebase", "vgb")
    candidates: tuple[PositiveInt, ...] = (4, 16)
    temperature: float = 0.7
    top_p: float = 0.95
    context_tokens: PositiveInt = 2048
    """KV cache that all candidates share."""
    kv_bytes_per_token: NonNegativeInt = 0
    seed: NonNegativeInt = 0

    @field_validator("names")
    @classmethod
    def _names_are_strategies(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            try:
                find_strategy(name)
            except InputError as error:
                raise ValueError(f"{error.wanted}: {error.found}") from None
        return names

    @property
    def tools(self) -> tuple[str, ...]:
        """The engine's package."""
        return (find_engine(self.engine).DISTRIBUTION,)


@stage(version=2, takes=runnable(), gives="strategies", also=("verifier", "checkpoint"))
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Answer validation problems by every strategy and keep the accuracy-cost curve."""
    options = EngineOptions(
        context_tokens=params.context_tokens,
        sequences=max(params.candidates),
        total_tokens=params.context_tokens,
        kv_type=params.kv_type,
        fall_back=True,
    )
    sampling = Sampling(temperature=params.temperature, top_p=params.top_p)
    weight_bytes = sum(weight.nbytes for weight in read_weights(model.model_path))
    rows, choices, asked = [], [], {}
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(find_engine(params.engine).open_model(model.model_path, options))
        verifier = None
        if "verifier" in ctx.side:
            verifier = stack.enter_context(open_verifier(ctx.side["verifier"].path, engine, options))
        for position, name in enumerate(params.tasks):
            task = find_task(name)
            problems = task.problems("validation", params.problems, params.seed)
            done = position * len(problems)

            def progress(d: int, t: int, done: int = done) -> None:
                ctx.progress(done + d, len(params.tasks) * t, "problems")

            curve = measure_strategies(
                engine,
                task,
                problems,
                lambda problem: problem_tokens(engine, ctx.side["checkpoint"].path, problem),
                verifier,
                params.names,
                params.candidates,
                Options(sampling=sampling, seed=params.seed),
                Traffic(weight_bytes, params.kv_bytes_per_token),
                progress,
            )
            rows += [row.model_dump(mode="json") for row in curve.rows]
            if position == 0:
                choices = _choices(curve) if curve.difficulties else []
                asked = {"max_tokens": task.max_tokens, "stop": list(task.stop), "answer": task.answer}
    asked |= {"temperature": params.temperature, "top_p": params.top_p, "choices": choices}
    (out / FILE_NAME).write_text(json.dumps({"rows": rows, "decode": asked}, indent=2) + "\n")
    return {"rows": rows, "decode": asked}


def _choices(curve: Curve) -> list[tuple[float, str, int]]:
    """For the easier and the harder half of the problems, the run that got most right; of equals the cheapest."""
    difficulties = np.array(curve.difficulties)
    middle = float(np.median(difficulties))
    found = []
    for bound, chosen in ((middle, difficulties <= middle), (1.0, difficulties > middle)):
        if not chosen.any():
            continue

        def merit(run: tuple[str, int], chosen: np.ndarray = chosen) -> tuple[float, float]:  # type: ignore[type-arg]
            outcomes = [one for one, member in zip(curve.outcomes[run], chosen, strict=True) if member]
            return sum(one.right for one in outcomes), -sum(one.cost.tokens_forward for one in outcomes)

        found.append((bound, *max(curve.outcomes, key=merit)))
    return found
