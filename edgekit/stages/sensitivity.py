"""What each type would cost each tensor: the divergence that rounding it alone adds, predicted from calibration text.

With y = W x and the rounding error E, the logits' law moves by half the squared length of E x in the Fisher metric of y
(as in optimal brain surgeon, Hassibi and Stork 1993). The metric is taken diagonal and independent of x, as K-FAC does
(Martens and Grosse, arXiv:1503.05671): sum over outputs o of g_o^2 (E H E^T)_oo / 2, where H is the mean of x x^T and
g_o^2 the mean squared derivative of the log-probability of tokens that the model draws itself. One backward pass gives
all of g; no labels are needed. E H E^T is what error feedback is expected to leave (`grids.solver.expected_losses`), on
a sample of rows. Losses of tensors are taken to add up.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pydantic import field_validator

from edgekit.artifact import Artifact
from edgekit.errors import InputError
from edgekit.grids import NAMES, grid_name
from edgekit.huggingface import calibration_windows, open_checkpoint
from edgekit.model import ModelShape
from edgekit.stage import CalibratedParams, Facts, StageContext, stage

FILE_NAME = "sensitivity.json"


class Params(CalibratedParams):
    """Parameters of `sensitivity`."""

    types: tuple[str, ...] = NAMES
    """Types to try; a tensor is tried in those whose blocks divide its rows."""

    @field_validator("types")
    @classmethod
    def _are_grids(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(map(grid_name, value))
        except InputError as error:
            raise ValueError(f"{error.found} has no grid ({', '.join(NAMES)}, int4-g32, int4-g32-zeros...)") from None


@stage(
    version=5,
    takes=("gguf", "checkpoint"),
    gives="sensitivity",
    also=("checkpoint",),
    tools=("torch", "transformers", "gguf"),
)
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Try every type on every tensor and predict the divergence that each choice adds.

    Tensors are those of a GGUF file where the recipe has one, else the checkpoint's; names are GGUF's.
    """
    from edgekit.stages import _sensitivity

    tokenizer, network = open_checkpoint(ctx.side["checkpoint"])
    windows = calibration_windows(
        tokenizer, lambda: network, params.text, params.windows, params.window_tokens, ctx.progress
    )
    losses = _sensitivity.measure(
        ctx.side["checkpoint"],
        network,
        windows.astype(np.int64),
        model.model_path if model.manifest.kind == "gguf" else None,
        params.types,
        ctx.progress,
    )
    (out / FILE_NAME).write_text(json.dumps(losses, indent=1, sort_keys=True) + "\n")
    return {"tensors": len(losses), "types": list(params.types)}


def host_bytes(shape: ModelShape, params: Params) -> int:
    """The weights in float32, and the activations of one window that a backward pass keeps."""
    kept = params.window_tokens * shape.layers * (8 * shape.hidden + 4 * shape.feed_forward)
    return (2 << 30) + 4 * (shape.parameters + kept + params.windows * params.window_tokens * shape.hidden)


def read_sensitivity(path: Path) -> dict[str, dict[str, float]]:
    """Nats by tensor and type."""
    found: dict[str, dict[str, float]] = json.loads(path.read_text())
    return found
