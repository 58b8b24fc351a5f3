"""The verifier for this very file: calibrated and judged again on the states of the model as it is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

from pydantic import PositiveInt

from edgekit.artifact import Artifact
from edgekit.companion import open_verifier
from edgekit.companions.rollouts import read_states
from edgekit.companions.verifier import judge, read_trunk
from edgekit.devices import describe_machine
from edgekit.engine import EngineOptions
from edgekit.engines import find_engine
from edgekit.errors import InputError
from edgekit.measurement import Measurement
from edgekit.stage import Facts, StageContext, StageParams, runnable, stage
from edgekit.tools import copy_file
from edgekit.verifier import (
    TRUNK,
    Head,
    Isotonic,
    Metric,
    OwnTrunk,
    Platt,
    Prefixes,
    load_head,
    read_heldout,
    save_verifier,
)

_SHOWN = {"auc": "verifier_auc", "auc_within": "verifier_auc_within", "ece": "verifier_ece"}
_WORSE = 0.02


class Params(StageParams):
    """Parameters of `verifier`."""

    engine: str = "llama_cpp"
    """The build states it."""
    calibration: Literal["platt", "isotonic"] = "platt"
    problems: PositiveInt = 80
    """Held-out problems to judge by, of those that come with the verifier."""
    source: bool = True
    """Judge it on the source model in float32, too, to tell what quantizing did to it."""

    @property
    def tools(self) -> tuple[str, ...]:
        """The engine's package."""
        return (find_engine(self.engine).DISTRIBUTION,)


@stage(
    version=2,
    takes=runnable(),
    gives="verifier",
    also=("companion", "checkpoint", "trunk"),
    tools=("torch",),
    reports=True,
)
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Judge the verifier's held-out answers by the states of this model, calibrate it, and store it."""
    directory = ctx.side["companion"].path
    manifest, head = load_head(directory)
    every = read_heldout(directory)
    chosen = set(list(dict.fromkeys(item.problem for item in every))[: params.problems])
    heldout = [item for item in every if item.problem in chosen]
    if not heldout:
        raise InputError(f"a verifier with held-out answers in {directory}", "none", "edgekit train verifier")

    def save(head: Head, metrics: Mapping[str, Metric]) -> None:
        save_verifier(
            out,
            head,
            trunk=manifest.trunk.model_copy(update={"model_digest": model.digest, "engine": params.engine}),
            domains=manifest.domains,
            training=manifest.training,
            metrics=metrics,
            heldout=every,
            kind=manifest.kind,
            reads_text=manifest.reads_text,
            files=[TRUNK] if "trunk" in ctx.side else [],
        )

    if "trunk" in ctx.side:
        copy_file(ctx.side["trunk"].path / TRUNK, out / TRUNK)
        save(head, manifest.metrics)
    calibration, metrics = _judge(params.engine, model, heldout, head, params, out if "trunk" in ctx.side else None)
    save(Head(head.architecture, head.tensors, calibration=calibration), metrics)
    measurements = _measurements(metrics, "")
    notes = []
    if params.source:
        if "trunk" in ctx.side:
            before = manifest.metrics  # it was trained in float32
        else:
            _, before = _judge("torch_reference", ctx.side["checkpoint"], heldout, head, params, None)
        measurements += _measurements(before, "_source")
        if "auc" in before and metrics["auc"].value < before["auc"].value - _WORSE:
            notes.append(
                f"Quantizing cost the verifier {before['auc'].value - metrics['auc'].value:.3f} of its AUC: "
                "train it on the states of this recipe, or choose a larger type."
            )
    return {
        "domains": list(manifest.domains),
        "measurements": [m.model_dump(mode="json") for m in measurements],
        "notes": notes,
    }


def _judge(
    engine: str, model: Artifact, heldout: list[Prefixes], head: Head, params: Params, trunk: Path | None
) -> tuple[Platt | Isotonic, dict[str, Metric]]:
    """Judge by the states that the base gives, or a trunk beside it, of a verifier in the directory `trunk`."""
    longest = max(len(item.prompt) + len(item.answer) for item in heldout)
    # a tokenizer of its own may take more tokens
    options = EngineOptions(context_tokens=longest + 2 if trunk is None else 4 * longest, sequences=8, fall_back=True)
    with find_engine(engine).open_model(model.model_path, options) as opened:
        if trunk is None:
            read = read_states(opened, heldout)
        else:
            with open_verifier(trunk, opened, options) as verifier:
                read = read_trunk(cast(OwnTrunk, verifier), heldout)
        return judge(head, read, calibration=params.calibration)


def _measurements(metrics: dict[str, Metric], suffix: str) -> list[Measurement]:
    return [
        Measurement(
            name=_SHOWN[name] + suffix,
            value=metric.value,
            unit="ratio",
            kind="measured",
            ci_low=metric.ci_low,
            ci_high=metric.ci_high,
            device=describe_machine().text,
            note="on held-out problems",
        )
        for name, metric in metrics.items()
        if name in _SHOWN
    ]
