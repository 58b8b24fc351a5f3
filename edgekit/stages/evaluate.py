"""A model on its engine against the source model: perplexity, KL divergence, agreement."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import PositiveInt

from edgekit.artifact import Artifact
from edgekit.devices import describe_machine
from edgekit.engine import EngineOptions
from edgekit.engines import find_engine
from edgekit.measure.divergence import compare, open_reference
from edgekit.measurement import Measurement
from edgekit.stage import Facts, StageContext, StageParams, stage

FILE_NAME = "evaluation.json"


class Params(StageParams):
    """Parameters of `evaluate`; the build states them from the recipe."""

    engine: str = "llama_cpp"
    windows: PositiveInt | None = None
    """Windows of the reference to read; None reads all."""

    @property
    def tools(self) -> tuple[str, ...]:
        """The engine's package."""
        return (find_engine(self.engine).DISTRIBUTION,)


@stage(version=1, takes="any", gives="evaluation", also=("reference",))
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Compare an artifact, run by its engine, with the source model on held-out text."""
    reference = open_reference(ctx.side["reference"].path)
    length = reference.window_tokens
    # a model made for another machine's accelerator is judged by the same graph on this one's processor
    options = EngineOptions(context_tokens=length, batch_tokens=length, fall_back=True)
    with find_engine(params.engine).open_model(model.model_path, options) as engine:
        divergence = compare(
            engine, reference, windows=params.windows, progress=lambda done, total: ctx.progress(done, total, "windows")
        )
    device = describe_machine().text
    measurements = divergence.measurements(device=device)
    (out / FILE_NAME).write_text(
        json.dumps(
            {
                "measurements": [m.model_dump(mode="json") for m in measurements],
                "window_divergence_nats": [float(value) for value in divergence.window_kld],
            },
            indent=2,
        )
        + "\n"
    )
    return {"device": device}


def read_evaluation(artifact: Artifact, of: str) -> tuple[list[Measurement], tuple[float, ...]]:
    """Measurements of an evaluation, labelled as `of`, and the mean divergence of each window (nats)."""
    content = json.loads((artifact.path / FILE_NAME).read_bytes())
    measurements = [Measurement.model_validate({**fields, "of": of}) for fields in content["measurements"]]
    return measurements, tuple(content["window_divergence_nats"])
