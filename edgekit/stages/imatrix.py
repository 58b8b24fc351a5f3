"""The importance matrix: how strongly calibration text drives each input of each matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgekit.artifact import Artifact
from edgekit.huggingface import calibration_windows, open_checkpoint
from edgekit.model import gguf_names
from edgekit.stage import CalibratedParams, Facts, StageContext, stage

FILE_NAME = "imatrix.gguf"


class Params(CalibratedParams):
    """Parameters of `imatrix`."""


@stage(version=1, takes="checkpoint", gives="imatrix", tools=("torch", "transformers", "gguf"))
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Sum the squared inputs of every linear layer over the calibration text (llama.cpp's imatrix format).

    The same statistic as llama.cpp's `llama-imatrix` (sum over tokens of x_j^2 per input column j), taken
    with forward hooks on the source model.
    """
    import torch

    tokenizer, network = open_checkpoint(model)
    windows = calibration_windows(
        tokenizer, lambda: network, params.text, params.windows, params.window_tokens, ctx.progress
    )
    # llama.cpp leaves the head out, too: its matrix is often the embedding, which has no inputs of this kind
    head = network.get_output_embeddings()
    linears = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head
    }
    names = gguf_names(model.facts["architecture"], model.facts["layers"], [f"{name}.weight" for name in linears])
    sums: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(layer: Any, inputs: tuple[Any, ...]) -> None:
            squares = inputs[0].reshape(-1, inputs[0].shape[-1]).float().square().sum(dim=0, dtype=torch.float64)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    hooks = [
        layer.register_forward_pre_hook(watch(gguf_name))
        for name, layer in linears.items()
        if (gguf_name := names[f"{name}.weight"]) is not None
    ]
    with torch.inference_mode():
        for index, window in enumerate(windows):
            network(torch.from_numpy(window.astype(np.int64))[None], use_cache=False, logits_to_keep=1)
            ctx.progress(index + 1, len(windows), "windows")
    for hook in hooks:
        hook.remove()
    write_imatrix(out / FILE_NAME, {name: value.numpy() for name, value in sums.items()}, windows.size, params)
    return {"tokens": int(windows.size), "tensors": len(sums), "text": params.text}


def write_imatrix(path: Path, sums: dict[str, Any], tokens: int, params: Params) -> None:
    """Write llama.cpp's GGUF importance-matrix format: `NAME.in_sum2` (columns,) and `NAME.counts` (1,)."""
    import gguf

    writer = gguf.GGUFWriter(path, arch="")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [params.text])
    writer.add_uint32("imatrix.chunk_count", params.windows)
    writer.add_uint32("imatrix.chunk_size", params.window_tokens)
    for name in sorted(sums):
        writer.add_tensor(f"{name}.in_sum2", sums[name].astype(np.float32)[None, :])
        writer.add_tensor(f"{name}.counts", np.array([[tokens]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_imatrix(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Mean squared input per column for every tensor of an importance matrix."""
    import gguf

    values = {tensor.name: np.array(tensor.data).reshape(-1) for tensor in gguf.GGUFReader(path).tensors}
    return {
        name.removesuffix(".in_sum2"): value / values[name.replace(".in_sum2", ".counts")]
        for name, value in values.items()
        if name.endswith(".in_sum2")
    }
