"""NF4, FP4 and int8 by bitsandbytes, stored quantized: a loader reads the codes and computes none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Literal

from edgekit.artifact import Artifact
from edgekit.errors import InputError
from edgekit.formats.safetensors import read_checkpoint
from edgekit.model import ModelShape, elements, read_config
from edgekit.stage import Facts, StageContext, StageParams, Tensor, stage
from edgekit.stages._quantized import (
    copy_side_files,
    is_matrix,
    planned_tensors,
    predict_tensors,
    store_weights,
    stored_dtype,
    write_config,
)

_BLOCK = 64
_NESTED_BLOCK = 256
_STATE_BYTES = 256
"""bitsandbytes describes each matrix in JSON, with a float among it; padded, its size does not depend on the value."""


class Params(StageParams):
    """Parameters of `bitsandbytes`."""

    type: Literal["nf4", "fp4", "int8"] = "nf4"
    """nf4: 16 levels that suit normally distributed weights; fp4: 4-bit floats; int8: one scale per output."""
    double_quant: bool = True
    """Quantize the scales of 4-bit blocks, too: 0.37 bits less per weight."""
    compute_dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    """Type that a loader multiplies 4-bit matrices in; part of the config, not of the weights."""


@stage(
    version=1,
    takes="checkpoint",
    gives="checkpoint[bnb]",
    tools=("bitsandbytes", "torch", "transformers", "safetensors"),
)
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Quantize the matrices of all layers with bitsandbytes (Dettmers et al., arXiv:2305.14314 and 2208.07339).

    Computed on the CPU, matrix by matrix, the same everywhere. No calibration text.
    """
    tensors = planned_tensors(model)
    buffers = [name for name in read_checkpoint(model.path) if name not in tensors]
    config = read_config(model.path)
    if config.get("tie_word_embeddings"):
        buffers.append("lm_head.weight")
    quantize = _quantizer(params)

    def convert(name: str, tensor: Any) -> Mapping[str, Any]:
        return quantize(name, tensor) if is_matrix(tensors[name]) else {name: tensor}

    copy_side_files(model, out)
    dtype = store_weights(
        model.path,
        out,
        stored_dtype(config),
        drop=buffers,
        convert=convert,
        progress=lambda done, total: ctx.progress(done, total, "tensors"),
    )
    write_config(out, config, dtype, _quantization_config(params))
    return {
        **model.facts,
        "quantization": "bitsandbytes",
        "type": params.type,
        "weight_bytes": sum(tensor.nbytes for tensor in read_checkpoint(out).values()),
    }


def predict(tensors: Sequence[Tensor], params: Params, side: frozenset[str]) -> tuple[Sequence[Tensor], Sequence[str]]:
    """Codes, scales of blocks or outputs, and the tables and description that bitsandbytes stores with each matrix.

    Raises InputError for 4 bits and rows that are no whole number of blocks: on processors with AVX-512, bitsandbytes
    0.50 gives such matrices back wrong, without a word.
    """
    if odd := [t for t in tensors if params.type != "int8" and is_matrix(t) and t.shape[0] % _BLOCK]:
        raise InputError(
            f"matrices whose inputs are a multiple of {_BLOCK} for {params.type}",
            f"{odd[0].shape[0]} inputs of {odd[0].name}",
            "--set bitsandbytes.type=int8, or use gptq or gguf",
        )

    def matrix_bytes(inputs: int, outputs: int) -> int:
        values = inputs * outputs
        if params.type == "int8":
            return values + 4 * outputs + 1
        blocks = ceil(values / _BLOCK)
        # a scale per block: float32, or a byte with float32 scales of their own and a table of 256 levels
        scales = blocks + 4 * ceil(blocks / _NESTED_BLOCK) + 4 * 256 if params.double_quant else 4 * blocks
        return ceil(values / 2) + scales + 4 * 16 + _STATE_BYTES

    name = params.type + ("-dq" if params.double_quant and params.type != "int8" else "")
    return predict_tensors(tensors, name, matrix_bytes), ()


def host_bytes(shape: ModelShape, params: Params) -> int:
    """Peak memory of the build host in bytes: a shard in 16 bits at most, its codes, and a matrix in float32."""
    largest = max(elements(tensor.shape) for tensor in shape.tensors)
    return (3 << 29) + 2 * shape.parameters + 12 * largest


def _quantizer(params: Params) -> Callable[[str, Any], Mapping[str, Any]]:
    """Return what turns a named matrix into the tensors that transformers reads for it."""
    import torch
    from bitsandbytes import functional

    def four_bit(name: str, tensor: Any) -> Mapping[str, Any]:
        codes, state = functional.quantize_4bit(
            tensor, blocksize=_BLOCK, compress_statistics=params.double_quant, quant_type=params.type
        )
        parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        described = f"{name}.quant_state.bitsandbytes__{params.type}"
        text = bytes(parts[described].tolist())
        assert len(text) <= _STATE_BYTES
        padded = torch.frombuffer(bytearray(text.ljust(_STATE_BYTES)), dtype=torch.uint8)
        return {name: codes, **parts, described: padded}

    def eight_bit(name: str, tensor: Any) -> Mapping[str, Any]:
        codes, scales, _ = functional.int8_vectorwise_quant(tensor.to(torch.float16))
        layer = name.removesuffix(".weight")
        # row-major, the only order that CPU kernels know
        return {name: codes, f"{layer}.SCB": scales, f"{layer}.weight_format": torch.zeros((), dtype=torch.uint8)}

    return eight_bit if params.type == "int8" else four_bit


def _quantization_config(params: Params) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    if params.type == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=params.type,
            bnb_4bit_use_double_quant=params.double_quant,
            bnb_4bit_compute_dtype=params.compute_dtype,
            llm_int8_skip_modules=["lm_head"],
        )
    return dict(json.loads(config.to_json_string(use_diff=False)))
