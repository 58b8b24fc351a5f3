"""How `sensitivity` predicts losses: the Fisher metric of every output, and every type's expected error in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgekit.artifact import Artifact
from edgekit.grids import Grid, open_grid
from edgekit.grids.solver import expected_losses, round_nearest
from edgekit.model import gguf_names
from edgekit.stages._feedback import find_places
from edgekit.stages._moments import fast_matmul, with_moments

EMBEDDING = "token_embd.weight"
_ROWS = 128
"""About how many rows of a matrix are tried in every type: their mean is within some percent of that of all."""
_TINY = 1e-300


def measure(
    checkpoint: Artifact,
    network: Any,
    windows: npt.NDArray[np.int64],
    source: Path | None,
    types: Sequence[str],
    progress: Callable[[int, int, str], None],
) -> dict[str, dict[str, float]]:
    """Return nats by GGUF's name of the tensor, and type.

    Args:
        checkpoint: What the network was loaded from.
        network: A causal language model of transformers in float32.
        windows: (windows, tokens) of calibration text.
        source: The model as GGUF, not quantized: its tensors are meant. None for the network's.
        types: Names of grids.
        progress: Called with what is done, its number and its unit.
    """
    tokens = torch.from_numpy(windows)
    linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    if source is not None:
        found_there = find_places(checkpoint, network, source)
        linears = {name: place.module for name, place in found_there.items()}
        named = {name: place.tensor for name, place in found_there.items()}
    else:
        named = tensor_names(checkpoint, network, linears)
    embedding = network.get_input_embeddings()
    modules = [*linears.values()]
    slopes, table = squared_slopes(network, modules, embedding, tokens, lambda i, n: progress(i, n, "windows"))
    found: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for group, moments in with_moments(network, tokens, linears):
            metric = moments.metric()
            rows = {name: _sample(slopes[module]) for name, module in group.items()}
            weight = torch.cat([module.weight.data[rows[name]] for name, module in group.items()])
            for grid in _grids(types, weight.shape[1]):
                lost = expected_losses(weight, metric, grid).double().cpu()
                parts = lost.split([len(chosen) for chosen in rows.values()])
                for (name, module), part in zip(group.items(), parts, strict=True):
                    steep = slopes[module].double()
                    mean = float(steep[rows[name]] @ part) / max(float(steep[rows[name]].sum()), _TINY)
                    found.setdefault(named[name], {})[grid.name] = 0.5 * float(steep.sum()) * mean
            progress(len(found), len(linears), "matrices")
        # a row that was never looked up loses nothing
        seen = table.any(1)
        weight, table = embedding.weight.data[seen], table[seen]
        looked_up = found.setdefault(EMBEDDING, {})
        for grid in _grids(types, weight.shape[1]):
            # a tied matrix is rounded once, and read twice
            error = weight - round_nearest(weight, grid).matrix
            looked_up[grid.name] = looked_up.get(grid.name, 0.0) + 0.5 * float((table * error.square()).sum())
    return found


def _sample(slopes: Tensor) -> Tensor:
    """Rows that stand for all: evenly spaced when they are sorted by what their outputs weigh."""
    return slopes.argsort()[:: -(-len(slopes) // _ROWS)]


def tensor_names(checkpoint: Artifact, network: Any, linears: Iterable[str]) -> dict[str, str]:
    """GGUF's names of linear layers' weights; of a tied head, the embedding's."""
    head, table = network.get_output_embeddings(), network.get_input_embeddings()
    tied = {name for name in linears if network.get_submodule(name) is head and head.weight is table.weight}
    keys = {f"{name}.weight": name for name in linears if name not in tied}
    found = gguf_names(checkpoint.facts["architecture"], checkpoint.facts["layers"], [*keys])
    return dict.fromkeys(tied, EMBEDDING) | {name: called for key, name in keys.items() if (called := found[key])}


def squared_slopes(
    network: Any,
    modules: Sequence[nn.Linear],
    embedding: nn.Embedding,
    tokens: Tensor,
    progress: Callable[[int, int], None],
) -> tuple[dict[nn.Linear, Tensor], Tensor]:
    """Mean squared derivatives of the log-probability of drawn tokens, per calibration token.

    Returns those of every module's outputs, shape (out,), and those by the embedding's weights, shape (vocabulary,
    hidden): summed over the places where a token was looked up. Draws are the same for the same tokens.
    """
    sums: dict[nn.Linear, Tensor] = {}
    table = torch.zeros_like(embedding.weight.data)
    looked_up: list[Tensor] = []

    def keep(module: nn.Linear, grad: Tensor) -> None:
        squares = grad.reshape(-1, grad.shape[-1]).square().sum(0)
        sums[module] = sums[module] + squares if module in sums else squares

    def watch(module: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> None:
        output.register_hook(lambda grad: keep(module, grad))

    def begin(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        # the weights need no gradient, so the graph begins here
        output.requires_grad_()
        rows = embedding.weight.data[looked_up[-1]]
        # some models scale what they look up
        scale = output.detach().square().sum() / rows.square().sum()

        def add(grad: Tensor) -> None:
            table.index_add_(0, looked_up[-1], scale * grad[0].square())

        output.register_hook(add)

    generator = torch.Generator().manual_seed(0)
    hooks = [module.register_forward_hook(watch) for module in modules]
    hooks.append(embedding.register_forward_hook(begin))
    with _frozen(network), fast_matmul():
        try:
            for index, window in enumerate(tokens):
                looked_up.append(window)
                logits = network(window[None], use_cache=False).logits[0]
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                logits.log_softmax(-1).gather(1, drawn).sum().backward()
                progress(index + 1, len(tokens))
        finally:
            for hook in hooks:
                hook.remove()
    count = tokens.numel()
    return {module: total / count for module, total in sums.items()}, table / count


@contextmanager
def _frozen(network: Any) -> Iterator[None]:
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()


def _grids(types: Sequence[str], columns: int) -> list[Grid]:
    return [grid for grid in map(open_grid, types) if columns % grid.block == 0]
