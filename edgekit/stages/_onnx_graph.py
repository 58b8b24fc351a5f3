"""What the stages share that write an ONNX model: its files, its external data, and the check of its structure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import InputError
from edgekit.formats.onnx import read_tensors
from edgekit.grids import integer_parts

MODEL, DATA, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"
HALF = "f16"
"""A table that is not in integers."""
_BLOCK = 1 << 22
_SMALL_BYTES = 64
"""Shapes are read before any data is: they stay in the graph."""


def stored_bytes(kind: str, rows: int, columns: int, scale_bytes: int) -> int:
    """Bytes of a matrix as MatMulNBits holds it: codes, a scale for each block, and zero points where it has them.

    Args:
        kind: A grid of integers, e.g. `int4-g32-zeros`, or `HALF`.
        rows: Outputs.
        columns: Inputs.
        scale_bytes: Of one scale.
    """
    if kind == HALF:
        return 2 * rows * columns
    bits, block, has_zeros = integer_parts(kind)
    blocks = -(-columns // block)
    zeros = -(-blocks * bits // 8) if has_zeros else 0
    return rows * (blocks * block * bits // 8 + blocks * scale_bytes + zeros)


def rewrite_data(graph: Any, data: Path, changed: Mapping[str, npt.NDArray[Any] | None]) -> None:
    """Write the external data of a graph anew, and put the graph's constants in its order.

    Args:
        graph: GraphProto; its constants are changed in place.
        data: The one file of its external data.
        changed: By name, new content of any type and shape, or None for a constant to leave out; others stay as
            they are. Names that the graph does not have are added.
    """
    from onnx import TensorProto, helper, numpy_helper

    target = data.with_name(f"{data.name}.new")
    kept = [tensor for tensor in graph.initializer if changed.get(tensor.name, tensor) is not None]
    present = {tensor.name for tensor in kept}
    for name, values in changed.items():
        if values is not None and name not in present:
            kept.append(TensorProto(name=name, data_location=TensorProto.EXTERNAL))
    with data.open("rb") as old, target.open("wb") as new:
        for tensor in kept:
            values = changed.get(tensor.name)
            if values is None and tensor.data_location != TensorProto.EXTERNAL:
                continue
            start = new.tell()
            if values is not None and values.nbytes <= _SMALL_BYTES:
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
                continue
            if values is not None:
                flat = values.reshape(-1)
                for first in range(0, flat.size, _BLOCK):
                    new.write(np.ascontiguousarray(flat[first : first + _BLOCK]).tobytes())
                name = tensor.name
                tensor.Clear()
                tensor.name, tensor.data_location = name, TensorProto.EXTERNAL
                tensor.data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
                tensor.dims.extend(values.shape)
            else:
                place = {entry.key: entry.value for entry in tensor.external_data}
                old.seek(int(place["offset"]))
                left = int(place["length"])
                while left:
                    block = old.read(min(left, _BLOCK))
                    if not block:
                        raise InputError(f"all data of {tensor.name}", f"{left} bytes are missing", "build it again")
                    new.write(block)
                    left -= len(block)
            del tensor.external_data[:]
            for key, value in (("location", data.name), ("offset", start), ("length", new.tell() - start)):
                tensor.external_data.add(key=key, value=str(value))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    target.replace(data)


def read_values(tensor: Any, directory: Path) -> npt.NDArray[Any]:
    """A constant of the graph: external data as a memory map, read only."""
    from onnx import TensorProto, helper, numpy_helper

    if tensor.data_location != TensorProto.EXTERNAL:
        return np.asarray(numpy_helper.to_array(tensor))
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    found: npt.NDArray[Any] = np.memmap(
        directory / place["location"], dtype, "r", int(place.get("offset", 0)), tuple(tensor.dims)
    )
    return found


def check_graph(model: Any, out: Path, *, hidden_states: bool) -> None:
    """Raise what is wrong with the structure: data out of range, nodes of no known form, a missing input or output."""
    import onnx

    read_tensors(out / MODEL)
    relabelled = onnx.ModelProto()
    relabelled.CopyFrom(model)
    for node in relabelled.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = (
                "com.microsoft"  # ONNX Runtime's own operation, in the domain of ONNX, where no checker knows it
            )
    probe = out / "check.onnx"
    try:
        probe.write_bytes(relabelled.SerializeToString())
        onnx.checker.check_model(str(probe))
    finally:
        probe.unlink(missing_ok=True)
    inputs = {value.name for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    wanted = {"logits"} | ({"hidden_states"} if hidden_states else set())
    if lacking := {"input_ids", "attention_mask"} - inputs or wanted - outputs:
        raise InputError("the inputs and outputs of a decoder", f"no {min(lacking)}", "choose another recipe")
