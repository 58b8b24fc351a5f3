"""What a verifier computes beside the base, as llama.cpp opens it: a LoRA in GGUF, or a quantized model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from edgekit.artifact import Artifact, Manifest, describe_files, relative_files
from edgekit.companions.verifier import write_gguf_adapter
from edgekit.model import resolve_model
from edgekit.stage import Facts, StageContext, StageParams, Tensor, find_stage, stage
from edgekit.stages.gguf import FILE_TYPES, QuantizerParams
from edgekit.tools import CONVERTER
from edgekit.verifier import ADAPTER_DIRECTORY, MODEL_DIRECTORY, TRUNK, read_manifest


class Params(QuantizerParams):
    """Parameters of `trunk`: those of `gguf`. They are for a model; a LoRA stays in float32."""

    type: str = Field("Q8_0", json_schema_extra={"enum": [*sorted(FILE_TYPES)]})


@stage(
    version=1,
    takes="companion",
    gives="trunk",
    also=("checkpoint",),
    tools=(CONVERTER, "gguf", "llama-cpp-python", "safetensors", "torch", "transformers"),
)
def run(companion: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Convert the LoRA for the base, or convert and quantize the model."""
    kind = read_manifest(companion.path).kind
    if kind == "adapter":
        write_gguf_adapter(companion.path / ADAPTER_DIRECTORY, ctx.side["checkpoint"].path, out / TRUNK)
        return {"kind": kind}
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        model = resolve_model(str(companion.path / MODEL_DIRECTORY)).artifact
        for name in ("checkpoint", "convert", "gguf"):
            step = find_stage(name)
            place = Path(scratch) / name
            place.mkdir()
            own = _quantizer_params(params) if name == "gguf" else step.params()
            facts = step.run(model, place, own, ctx)
            files = describe_files(place, [*relative_files(place)])
            model = Artifact(place, Manifest(kind=step.gives, files=files, facts=facts))
        model.model_path.rename(out / TRUNK)
    return {"kind": kind, "type": params.type}


def predict(tensors: Sequence[Tensor], params: Params, side: frozenset[str]) -> tuple[Sequence[Tensor], Sequence[str]]:
    """The tensors of a model, as `gguf` quantizes them."""
    return find_stage("gguf").predict(tensors, _quantizer_params(params), side)


def _quantizer_params(params: Params) -> StageParams:
    return find_stage("gguf").params.model_validate(params.model_dump())
