"""The source model's log-probabilities on held-out text: what every artifact is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import PositiveInt

from edgekit.artifact import Artifact
from edgekit.calibration import token_windows
from edgekit.huggingface import load_model, load_tokenizer
from edgekit.stage import Facts, StageContext, StageParams, stage


class Params(StageParams):
    """Parameters of `reference`; a recipe states them under `evaluation`."""

    text_fields: ClassVar[tuple[str, ...]] = ("text",)

    text: str = "python-docs"
    windows: PositiveInt = 8
    window_tokens: PositiveInt = 512


@stage(version=1, takes="checkpoint", gives="reference", tools=("torch", "transformers"))
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Run the checkpoint in float32 over the evaluation text and keep its log-probabilities."""
    import torch

    from edgekit.measure.divergence import write_reference

    trust = bool(model.facts.get("trust_remote_code"))
    tokenizer = load_tokenizer(model.path, trust_remote_code=trust)
    bos = tokenizer.bos_token_id if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None
    windows = token_windows(
        params.text,
        "evaluation",
        params.windows,
        params.window_tokens,
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        bos,
    )
    network = load_model(model.path, trust_remote_code=trust)

    def logits(index: int) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            output = network(torch.from_numpy(windows[index].astype(np.int64))[None], use_cache=False)
        ctx.progress(index + 1, len(windows), "windows")
        return np.asarray(output.logits[0].float().numpy())

    write_reference(out, windows, logits)
    return {"text": params.text, "windows": len(windows), "window_tokens": params.window_tokens}
