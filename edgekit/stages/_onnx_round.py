"""How `onnx_round` reads and writes a graph: its matrices and its table, the linear layers they are, their tensors."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edgekit.artifact import Artifact
from edgekit.errors import InputError, ToolError
from edgekit.grids import integer_parts, open_grid
from edgekit.grids.containers import onnx_tensors
from edgekit.grids.solver import Rounded, round_nearest
from edgekit.stages._moments import Rounding, round_network
from edgekit.stages._onnx_graph import DATA, HALF, MODEL, check_graph, read_values, rewrite_data, stored_bytes
from edgekit.stages._sensitivity import EMBEDDING, tensor_names
from edgekit.tools import copy_file

_NODE = re.compile(r"/model/layers\.(\d+)/\w+/(\w+)/MatMul")
_HEAD = re.compile(r"/lm_head/MatMul")
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What the builder puts into one matrix."""
_MOST_ERROR = 0.25
"""Of a matrix of the graph against the checkpoint's, in squares: rounding to 4 bits loses 0.01, another matrix 2."""


@dataclass(frozen=True)
class Part:
    """A matrix that the graph multiplies with, or looks up."""

    node: Any
    """MatMulNBits, or the Gather of the table."""
    linears: tuple[str, ...]
    """The layers of the network whose rows it has, one after the other; empty for the table."""
    tensors: tuple[str, ...]
    """GGUF's names of their weights."""
    rows: int
    columns: int
    scale_bytes: int
    readers: tuple[Any, ...] = ()
    """GatherBlockQuantized nodes that look tokens up in its codes."""

    def nbytes(self, kind: str) -> int:
        """Bytes as that type."""
        return stored_bytes(kind, self.rows, self.columns, self.scale_bytes)

    def kinds(self, losses: Mapping[str, Mapping[str, float]]) -> list[str]:
        """Types whose losses are known for all of it, of those that every node which reads it takes."""
        looked_up = bool(self.readers) or not self.linears
        known = set.intersection(*(set(losses.get(tensor, ())) for tensor in self.tensors))
        kinds = [kind for kind in sorted(known) if kind.startswith("int") and not (looked_up and "zeros" in kind)]
        return kinds if self.linears else [HALF, *kinds]


@dataclass
class Graph:
    """An ONNX model in memory, its data on disk."""

    model: Any
    path: Path
    network: Any
    parts: dict[str, Part]
    """By the names of nodes."""
    types: dict[str, str]
    """What each part is now."""
    nbytes: int
    """Of all files that the runtime reads."""
    _changed: dict[str, npt.NDArray[Any] | None] = field(default_factory=dict)

    def round(
        self,
        types: Mapping[str, str],
        windows: npt.NDArray[np.int32],
        out: Path,
        progress: Callable[[int, int], None],
        kept: Path | None = None,
    ) -> None:
        """Round every part to its type and write the model to `out`.

        Args:
            types: By the names of nodes.
            windows: (windows, tokens) of calibration text.
            out: Directory, in which the other files lie already.
            progress: Called with matrices done and their number.
            kept: As of `round_network`.
        """
        tokens = torch.from_numpy(windows.astype(np.int64))
        place = {linear: name for name, part in self.parts.items() for linear in part.linears}
        with tempfile.TemporaryDirectory(dir=out) as scratch, torch.inference_mode():
            for name, part in self.parts.items():
                if not part.linears and types[name] != HALF:
                    table = self.network.get_input_embeddings().weight
                    nearest = round_nearest(table.data, open_grid(types[name]))
                    table.data = nearest.matrix
                    self._set_table(part, types[name], nearest, Path(scratch))
            done, total = 0, len(place)
            grids = {linear: open_grid(types[name]) for linear, name in place.items()}
            for group in round_network(self.network, tokens, Rounding(grids), kept=kept):
                # what the graph has in one matrix reads one input
                for name in dict.fromkeys(place[linear] for linear in group):
                    found = [group[linear] for linear in self.parts[name].linears]
                    codes, scales = torch.cat([r.codes for r in found]), torch.cat([r.scales for r in found], 1)
                    self._set_matrix(self.parts[name], types[name], codes, scales, Path(scratch))
                done += len(group)
                progress(done, total)
            copy_file(self.path / DATA, out / DATA)
            rewrite_data(self.model.graph, out / DATA, self._changed)
        (out / MODEL).write_bytes(self.model.SerializeToString(deterministic=True))
        hidden = any(value.name == "hidden_states" for value in self.model.graph.output)
        check_graph(self.model, out, hidden_states=hidden)

    def _store(self, part: Part, kind: str, base: str, tensors: Mapping[str, Tensor], scratch: Path) -> dict[str, str]:
        """Keep tensors on disk; returns their names in the graph."""
        width = np.float32 if part.scale_bytes == 4 else np.float16
        blocks = {"scales": (part.rows, -1), "zero_points": (part.rows, -1)}
        suffixes = {"B": f"weight_{kind.removesuffix('-zeros').replace('int', 'Q').replace('-g', 'G')}",
                    "scales": "weight_scale", "zero_points": "weight_zp"}  # fmt: skip
        named = {}
        for key, tensor in tensors.items():
            values = tensor.numpy().astype(width) if key == "scales" else tensor.numpy()
            named[key] = f"{base}.{suffixes[key]}"
            file = scratch / f"{len(self._changed)}.npy"
            np.save(file, values.reshape(blocks.get(key, values.shape)))
            self._changed[named[key]] = np.load(file, mmap_mode="r")
        return named

    def _set_matrix(self, part: Part, kind: str, codes: Tensor, scales: Tensor, scratch: Path) -> None:
        bits, block, _ = integer_parts(kind)
        node = part.node
        old = [name for name in node.input[1:4] if name]
        for name in old:
            self._changed[name] = None
        named = self._store(part, kind, old[0].rpartition(".")[0], onnx_tensors(codes, scales, bits), scratch)
        inputs = [node.input[0], named["B"], named["scales"], named.get("zero_points", ""), *node.input[4:]]
        while not inputs[-1]:
            inputs.pop()
        del node.input[:]
        node.input.extend(inputs)
        _set_attributes(node, bits=bits, block_size=block)
        for reader in part.readers:
            reshape = next(other for other in self.model.graph.node if other.output[:1] == reader.input[:1])
            shape_name = f"{reshape.name}/shape"
            self._changed[shape_name] = np.array([part.rows, part.columns * bits // 8], np.int64)
            reshape.input[0], reshape.input[1] = named["B"], shape_name
            reader.input[2] = named["scales"]
            _set_attributes(reader, bits=bits, block_size=block)

    def _set_table(self, part: Part, kind: str, rounded: Rounded, scratch: Path) -> None:
        """Look tokens up in codes instead of a table of floats."""
        from onnx import helper

        bits, block, _ = integer_parts(kind)
        gather, nodes = part.node, self.model.graph.node
        self._changed[gather.input[0]] = None
        tensors = onnx_tensors(rounded.codes, rounded.scales, bits)
        base = gather.input[0].rpartition(".")[0]
        named = self._store(part, kind, base, {**tensors, "B": tensors["B"].reshape(part.rows, -1)}, scratch)
        at = list(nodes).index(gather)
        cast = next((node for node in nodes if node.op_type == "Cast" and node.input[0] == gather.output[0]), None)
        output = cast.output[0] if cast else gather.output[0]
        found = helper.make_node(
            "GatherBlockQuantized", [named["B"], gather.input[1], named["scales"]], [output],
            "/model/embed_tokens/GatherBlockQuantized", domain="com.microsoft", bits=bits, block_size=block,
            gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        nodes.insert(at, found)
        for stale in (gather, cast):
            if stale is not None:
                nodes.remove(stale)


def open_graph(path: Path, checkpoint: Artifact, network: Any) -> Graph:
    """Read an ONNX model of the builder and find what of it can be rounded, held against the checkpoint.

    Raises InputError where a matrix is not that of the checkpoint.
    """
    import onnx

    model = onnx.load(str(path / MODEL), load_external_data=False)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    named = tensor_names(checkpoint, network, linears)
    parts, types = {}, {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            mine = _linears_of(node.name, linears, network)
            values = {one.name: one.i for one in node.attribute}
            scales = read_values(constants[node.input[2]], path)
            reshaped = [other.output[0] for other in model.graph.node if list(other.input[:1]) == [node.input[1]]]
            readers = tuple(
                other
                for other in model.graph.node
                if other.op_type == "GatherBlockQuantized" and other.input[0] in reshaped
            )
            zeros = "-zeros" if len(node.input) > 3 and node.input[3] else ""
            kind = f"int{values['bits']}-g{values['block_size']}{zeros}"
            tensors = tuple(named[linear] for linear in mine)
            part = Part(node, mine, tensors, values["N"], values["K"], scales.itemsize, readers)
            _hold_against(part, kind, constants, path, [linears[name].weight.data for name in mine])
            parts[node.name], types[node.name] = part, kind
    head, table = network.get_output_embeddings(), network.get_input_embeddings()
    scale_bytes = next((part.scale_bytes for part in parts.values()), 4)
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in constants and head.weight is not table.weight:
            stored = constants[node.input[0]]
            if tuple(stored.dims) == tuple(table.weight.shape) and read_values(stored, path).dtype == np.float16:
                rows, columns = table.weight.shape
                parts[node.name] = Part(node, (), (EMBEDDING,), rows, columns, scale_bytes)
                types[node.name] = HALF
    nbytes = sum((path / name).stat().st_size for name in (MODEL, DATA))
    return Graph(model, path, network, parts, types, nbytes)


def _linears_of(node: str, linears: Mapping[str, nn.Linear], network: Any) -> tuple[str, ...]:
    if _HEAD.match(node):
        return tuple(name for name, module in linears.items() if module is network.get_output_embeddings())
    if found := _NODE.match(node):
        layer = f".{found[1]}."
        for parts in ((found[2],), _FUSED.get(found[2], ())):
            mine = [name for part in parts for name in linears if layer in name and name.endswith(f".{part}")]
            if mine and len(mine) == len(parts):
                return tuple(mine)
    raise ToolError("matrices of linear layers in the graph", node, "leave onnx_round out of the recipe")


def _hold_against(part: Part, kind: str, constants: Mapping[str, Any], path: Path, weights: list[Tensor]) -> None:
    """Raise InputError unless what the graph has now is near these weights."""
    bits, block, has_zeros = integer_parts(kind)
    stored = [torch.from_numpy(np.array(read_values(constants[name], path))) for name in part.node.input[1:4] if name]
    packed, scales = stored[0].view(part.rows, -1), stored[1].view(part.rows, -1).float()
    zeros: Tensor | float = float(1 << (bits - 1))
    if has_zeros:
        zeros = _unpack(stored[2].view(part.rows, -1), bits)[:, : scales.shape[1], None].float()
    codes = _unpack(packed, bits).unflatten(1, (-1, block)).float()
    values = ((codes - zeros) * scales[:, :, None]).flatten(1)[:, : part.columns]
    own = torch.cat(weights)
    if own.shape != values.shape or float((own - values).square().sum()) > _MOST_ERROR * float(own.square().sum()):
        found = f"another in {part.node.name}"
        raise InputError("the checkpoint's matrices in the graph", found, "leave onnx_round out of the recipe")


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes from bytes, the first in the lowest bits."""
    places = torch.arange(0, 8, bits, dtype=torch.int32)
    return (packed[..., None].to(torch.int32) >> places & ((1 << bits) - 1)).flatten(-2)


def _set_attributes(node: Any, **values: int) -> None:
    for attribute in node.attribute:
        if attribute.name in values:
            attribute.i = values[attribute.name]
