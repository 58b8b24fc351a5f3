"""Codes and scales as the tensors of GPTQ and AWQ checkpoints and of ONNX's MatMulNBits."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekit.grids.solver import Rounded


def gptq_tensors(rounded: Rounded, bits: int) -> dict[str, Tensor]:
    """The tensors of a linear layer in GPTQ's first format (AutoGPTQ), which transformers and vLLM load.

    Args:
        rounded: On a grid of integers.
        bits: of a code: 2, 3, 4 or 8.

    Returns `qweight` int32 (in * bits / 32, out), `qzeros` int32 (groups, out * bits / 32), `scales` float16 (groups,
    out) and `g_idx` int32 (in): bits fill words from the lowest, along the inputs and the outputs. The format stores
    zeros less 1.
    """
    codes, scales = rounded.codes, rounded.scales
    inputs = codes.shape[1]
    place = torch.arange(inputs, device=codes.device) if rounded.order is None else rounded.order
    return {
        "qweight": _words(codes.T, bits, 0),
        "qzeros": _words(_zeros(scales, bits) - 1 & (1 << bits) - 1, bits, 1),
        "scales": scales[:, :, 0].half().contiguous(),
        "g_idx": (place // (inputs // len(scales))).to(torch.int32),
    }


def awq_tensors(rounded: Rounded) -> dict[str, Tensor]:
    """The tensors of a linear layer in AWQ's format `gemm` (AutoAWQ), which transformers and vLLM load: 4 bits.

    Returns `qweight` int32 (in, out / 8), `qzeros` int32 (groups, out / 8) and `scales` float16 (groups, out): of eight
    outputs, those with even numbers come first.
    """
    scales = rounded.scales
    return {
        "qweight": _words(_even_first(rounded.codes.T), 4, 1),
        "qzeros": _words(_even_first(_zeros(scales, 4)), 4, 1),
        "scales": scales[:, :, 0].half().contiguous(),
    }


def _even_first(values: Tensor) -> Tensor:
    return values.unflatten(-1, (-1, 4, 2)).mT.flatten(-3)


def onnx_tensors(codes: Tensor, scales: Tensor, bits: int) -> dict[str, Tensor]:
    """The inputs of com.microsoft.MatMulNBits (onnxruntime, docs/ContribOperators.md) for 2, 4 or 8 bits.

    Args:
        codes: uint8 (out, in).
        scales: float32 (groups, out, k): the scale, and the zero where k is 2.
        bits: of a code.

    Returns `B` uint8 (out, blocks, block * bits / 8), `scales` float32 (out *
    blocks) and, where there are zeros, `zero_points` uint8 (out * ceil(blocks * bits / 8)). The first code of a byte
    is in its lowest bits.
    """
    blocks, outputs, kinds = scales.shape
    packed = {
        "B": _bytes(codes.view(outputs, blocks, -1), bits),
        "scales": scales[:, :, 0].T.contiguous().flatten(),
    }
    if kinds > 1:
        packed["zero_points"] = _bytes(_zeros(scales, bits).T.to(torch.uint8), bits).flatten()
    return packed


def _zeros(scales: Tensor, bits: int) -> Tensor:
    if scales.shape[2] > 1:
        return scales[:, :, 1].to(torch.int64)
    return torch.full(scales.shape[:2], 1 << (bits - 1), dtype=torch.int64, device=scales.device)


def _words(values: Tensor, bits: int, dim: int) -> Tensor:
    """Fill 32-bit words along a dimension; with 3 bits a value may lie in two words."""
    values = values.to(torch.int32).movedim(dim, -1)
    if 32 % bits:
        values = (values[..., None] >> torch.arange(bits, device=values.device) & 1).to(torch.int32).flatten(-2)
        bits = 1
    parts = values.unflatten(-1, (-1, 32 // bits))
    words = torch.zeros_like(parts[..., 0])
    for place in range(32 // bits):
        words |= parts[..., place] << bits * place
    return words.movedim(-1, dim).contiguous()


def _bytes(values: Tensor, bits: int) -> Tensor:
    per = 8 // bits
    short = -values.shape[-1] % per
    values = torch.nn.functional.pad(values, (0, short)).unflatten(-1, (-1, per)).to(torch.int64)
    return (values << bits * torch.arange(per, device=values.device)).sum(-1).to(torch.uint8)
