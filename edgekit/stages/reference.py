"""The source model's log-probabilities on held-out text: what every artifact is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import PositiveInt

from edgekit.artifact import Artifact
from edgekit.calibration import Split
from edgekit.huggingface import open_checkpoint, text_windows
from edgekit.stage import Facts, StageContext, StageParams, stage


class Params(StageParams):
    """Parameters of `reference`; a recipe states them under `evaluation`."""

    text: str = "python-docs"
    windows: PositiveInt = 8
    window_tokens: PositiveInt = 512

    @property
    def text_fields(self) -> Mapping[str, Split]:
        """The evaluation text."""
        return {"text": "evaluation"}


@stage(version=1, takes="checkpoint", gives="reference", tools=("torch", "transformers"))
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Run the checkpoint in float32 over the evaluation text and keep its log-probabilities."""
    import torch

    from edgekit.measure.divergence import write_reference

    tokenizer, network = open_checkpoint(model)
    windows = text_windows(tokenizer, params.text, "evaluation", params.windows, params.window_tokens)

    def logits(index: int) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            output = network(torch.from_numpy(windows[index].astype(np.int64))[None], use_cache=False)
        ctx.progress(index + 1, len(windows), "windows")
        return np.asarray(output.logits[0].float().numpy())

    write_reference(out, windows, logits)
    return {"text": params.text, "windows": len(windows), "window_tokens": params.window_tokens}
