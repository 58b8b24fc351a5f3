"""Checkpoint to an unquantized GGUF, by llama.cpp's own converter."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from edgekit.artifact import Artifact
from edgekit.errors import ToolError
from edgekit.formats import gguf
from edgekit.stage import Facts, StageContext, StageParams, Tensor, stage
from edgekit.tools import CONVERTER, converter_directory, run_tool

FILE_NAME = "model.gguf"
CARD = "README.md"


class Params(StageParams):
    """Parameters of `convert`."""

    type: Literal["f16", "bf16", "f32"] = "f16"
    """Storage type of matrices; vectors stay in f32."""


@stage(version=2, takes="checkpoint", gives="gguf", tools=(CONVERTER, "gguf", "transformers", "torch"))
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Convert the checkpoint to GGUF without quantizing it."""
    directory = converter_directory(ctx.store)
    target = out / FILE_NAME
    arguments = ["--outtype", params.type, "--outfile", str(target), "--model-name", str(model.facts["name"])]
    # bytecode would change the fetched tool's directory
    environment = {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory() as scratch:
        # the converter reads metadata out of the directory's name, which is a digest here
        named = Path(scratch) / "model"
        named.mkdir()
        for path in model.path.absolute().iterdir():
            (named / path.name).symlink_to(path)
        # and the licence only out of a model card, which an imported GGUF has not
        licence = model.facts["licence"]
        if licence != "unknown" and not (named / CARD).exists():
            (named / CARD).write_text(f"---\nlicense: {json.dumps(licence)}\n---\n")
        command = [sys.executable, str(directory / "convert_hf_to_gguf.py"), str(named), *arguments]
        done = run_tool(command, environment)
    if done.returncode != 0 or not target.is_file():
        errors = [line for line in done.stderr.splitlines() if line.strip() and "it/s" not in line]
        raise ToolError(
            f"a GGUF file of {model.facts['name']} from llama.cpp's converter",
            (errors or ["no message"])[-1].strip(),
            "edgekit doctor",
        )
    header = gguf.read_header(target)
    return {"architecture": header.architecture, "type": params.type, "weight_bytes": header.weight_bytes}


def predict(tensors: Sequence[Tensor], params: Params, side: frozenset[str]) -> tuple[Sequence[Tensor], Sequence[str]]:
    """Matrices take the chosen type."""
    return [replace(t, type=params.type) if t.type == "f16" else t for t in tensors], ()
