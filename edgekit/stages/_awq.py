"""AWQ's scaling (Lin et al., arXiv:2306.00978): inputs with large activations weigh more when a matrix is rounded.

With W' = W diag(s) and x' = x / s a matrix gives what it gave; s grows with a power of the inputs' size, the power
with the least error of plain rounding is taken, and 1 / s goes into the norm or the rows of the matrix before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.grids.solver import proxy_loss
from edgekit.stages._moments import Group, Moments

_POWERS = tuple(step / 10 for step in range(10))
_TOP = 15
_NORMS = {
    "q_proj": ("input_layernorm",),
    "gate_proj": ("pre_feedforward_layernorm", "post_attention_layernorm"),
}
"""The norm before each, by the first matrix that reads it; the first of the names that a layer has."""
_MATRICES = {"o_proj": "v_proj", "down_proj": "up_proj"}
"""The matrix whose outputs, times something that no scale changes, are the inputs of each."""
_KNOWN = {*_MATRICES, *_MATRICES.values(), "q_proj", "k_proj", "gate_proj", "q_norm", "k_norm", "input_layernorm",
          "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}  # fmt: skip
"""Parts of a layer whose norms are read by what `_NORMS` says and nothing else: Llama's, Mistral's, Qwen's, Gemma's."""


class Folding:
    """Scales the inputs of a layer's matrices; what comes before them takes the inverse."""

    def __init__(self, network: Any, group_size: int, dtype: str) -> None:
        self._network, self._group = network, group_size
        self._dtype: torch.dtype = getattr(torch, dtype)
        self.changed: dict[str, Tensor] = {}
        """Norms and biases by their names in the network."""

    def __call__(self, layer: str, groups: Sequence[Group]) -> None:
        """Scale the matrices of a layer."""
        linears = {name.rpartition(".")[2]: module for modules, _ in groups for name, module in modules.items()}
        names = {name.rpartition(".")[2]: name for modules, _ in groups for name in modules}
        parts = {name.rpartition(".")[2] for name, module in self._network.get_submodule(layer).named_modules()
                 if name and next(module.parameters(recurse=False), None) is not None}  # fmt: skip
        for modules, moments in groups:
            first = next(iter(modules)).rpartition(".")[2]
            weight = torch.cat([module.weight.data for module in modules.values()])
            scale = None
            if first in _NORMS and parts <= _KNOWN:
                norm = next((f"{layer}.{name}" for name in _NORMS[first] if name in parts), None)
                scale = self._into_norm(norm, self._search(weight, moments)) if norm else None
            elif (before := _MATRICES.get(first)) in linears and linears[before].out_features == weight.shape[1]:
                scale = self._into_rows(names[before], linears[before], self._search(weight, moments))
            if scale is not None:
                for module in modules.values():
                    module.weight.data = module.weight.data * scale

    def _search(self, weight: Tensor, moments: Moments) -> Tensor:
        """The scales (in,) with the least error of rounding to the nearest."""
        size = moments.hessian.diagonal().sqrt()
        size = size.clamp_min(1e-4 * float(size.mean()) or 1.0)
        best, least = torch.ones_like(size), float("inf")
        for power in _POWERS:
            scale = size**power
            scale = scale / (scale.max() * scale.min()).sqrt()
            error = weight - _nearest(weight * scale, self._group) / scale
            loss = proxy_loss(error, moments.hessian)
            if loss < least:
                best, least = scale, loss
        return best

    def _into_norm(self, name: str, scale: Tensor) -> Tensor | None:
        """Divide what a norm gives by `scale`, as near as its weights can be stored; returns by what it was divided."""
        norm = self._network.get_submodule(name)
        offset = _offset(norm)
        if offset is None:
            return None
        old = norm.weight.data
        new = ((old + offset) / scale - offset).to(self._dtype).float()
        exact = (old + offset) / (new + offset)
        if not bool(exact.isfinite().all()) or float(exact.min()) <= 0:
            return None
        norm.weight.data = self.changed[f"{name}.weight"] = new
        return exact

    def _into_rows(self, name: str, module: nn.Linear, scale: Tensor) -> Tensor:
        """Divide the outputs of a matrix by `scale`."""
        module.weight.data = module.weight.data / scale[:, None]
        if module.bias is not None:
            module.bias.data = self.changed[f"{name}.bias"] = module.bias.data / scale
        return scale


def _nearest(weight: Tensor, group: int) -> Tensor:
    """Round to 4 bits with a zero point between the ends of each group, as AWQ does."""
    x = weight.unflatten(1, (-1, group))
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    step = ((high - low) / _TOP).clamp_min(1e-8)
    zero = (-low / step).round()
    return ((((x / step).round() + zero).clamp(0, _TOP) - zero) * step).flatten(1)


def _offset(norm: nn.Module) -> float | None:
    """What a norm adds to its weights before it multiplies with them (Gemma 1, others 0); None for another kind."""
    weight: Tensor = norm.weight.data
    probe = torch.linspace(-1, 2, len(weight))
    given = norm(probe)
    for offset in (0.0, 1.0):
        norm.weight.data = 2 * weight + offset
        doubled = norm(probe)
        norm.weight.data = weight
        if torch.allclose(doubled, 2 * given, rtol=1e-5, atol=1e-6):
            return offset
    return None
