"""GPTQModel, which `awq` runs in a process of its own.

The library patches transformers on import, keeps threads and files of its own and prints as it likes. A process
that ends takes all of that with it: `quantize` starts one on this file, in a directory that is removed afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import edgekit
from edgekit.artifact import Artifact
from edgekit.errors import ToolError
from edgekit.formats.safetensors import read_checkpoint
from edgekit.huggingface import calibration_windows, load_tokenizer, open_checkpoint
from edgekit.model import ModelShape, elements, read_config
from edgekit.stage import CalibratedParams, Facts, Progress, StageContext
from edgekit.stages._quantized import (
    copy_side_files,
    is_matrix,
    store_weights,
    stored_dtype,
    write_config,
    write_json,
)

_META = ("quantizer", "uri", "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "mse",
         "act_group_aware")  # fmt: skip
"""What GPTQModel's `meta` says of the weights; the rest is about the machine, with paths of it."""


def quantize(
    model: Artifact,
    out: Path,
    params: CalibratedParams,
    ctx: StageContext,
    *,
    group_size: int,
    settings: Mapping[str, Any],
) -> Facts:
    """Quantize every matrix of the layers, and write the checkpoint as transformers and vLLM read it.

    Weights are computed in float32 and calibrated on `params.windows` token windows, on the GPU where torch has
    one: which machine computes is not in the key, as for every stage. What is not quantized keeps 16 bits; all
    files but weights and config are the source's.

    Args:
        group_size: From `find_group_size`.
        settings: Further arguments of GPTQModel's `AWQConfig`.

    Raises ToolError with the library's last line when it fails.
    """
    tokenizer = load_tokenizer(model.path, trust_remote_code=bool(model.facts["trust_remote_code"]))
    windows = calibration_windows(
        tokenizer, lambda: open_checkpoint(model)[1], params.text, params.windows, params.window_tokens, ctx.progress
    )
    copy_side_files(model, out)
    config = read_config(model.path)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        np.save(Path(scratch) / "windows.npy", windows)
        job = {
            "model": str(model.path.absolute()),
            "out": str(out.absolute()),
            "dtype": stored_dtype(config),
            "tied": bool(config.get("tie_word_embeddings", False)),
            "trust_remote_code": bool(model.facts["trust_remote_code"]),
            "settings": {**settings, "group_size": group_size},
        }
        described = _run(job, Path(scratch), int(model.facts["layers"]), ctx.progress)
    quantization = described["quantization_config"]
    write_config(out, config, described["dtype"], quantization)
    write_json(out / "quantize_config.json", quantization)
    return {
        **model.facts,
        "quantization": "awq",
        "bits": quantization["bits"],
        "group_size": group_size,
        "tokens": int(windows.size),
        "text": params.text,
        "weight_bytes": sum(tensor.nbytes for tensor in read_checkpoint(out).values()),
    }


def calibrated_host_bytes(shape: ModelShape, params: CalibratedParams, kept: int) -> int:
    """Peak host memory in bytes: two processes with torch, and in the worker embedding and head, two layers with
    their second moments and a working copy of each, and the calibration's activations, all in float32.

    `kept` counts the activations of a token that are held at once.
    """
    matrices = [tensor for tensor in shape.tensors if is_matrix(tensor)]
    ends = sum(elements(tensor.shape) for tensor in shape.tensors if not tensor.name.startswith("blk."))
    layer = sum(elements(tensor.shape) + tensor.shape[0] ** 2 for tensor in matrices) // max(1, shape.layers)
    activations = params.windows * params.window_tokens * kept
    return (2 << 30) + 4 * (2 * ends + 4 * layer + activations)


def _run(job: Mapping[str, Any], scratch: Path, layers: int, progress: Progress) -> dict[str, Any]:
    """Run the job in a process, report its layers, and return what it says of the result."""
    (scratch / "job.json").write_text(json.dumps(job))
    log = scratch / "log"
    command = [sys.executable, "-P", "-m", __name__]
    result: dict[str, Any] = {}
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command, cwd=scratch, env=_environment(scratch), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                message = json.loads(line)
                if "layer" in message:
                    progress(message["layer"] + 1, layers, "layers")
                else:
                    result = message
        except BaseException:
            process.kill()
            raise
    if process.returncode or not result:
        raise ToolError(
            "an AWQ checkpoint from GPTQModel",
            "it was killed, perhaps for lack of memory" if process.returncode == -9 else _last_line(log),
            "give more or other calibration text, or fewer windows",
        )
    return result


def _environment(scratch: Path) -> dict[str, str]:
    package_root = str(Path(edgekit.__file__).parents[1])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")])),
        # one worker is fewer than the two that it asks its own pool for, and it fails
        "GPTQMODEL_CPU_WORKERS": str(max(2, min(8, cores // 2))),
        "GPTQMODEL_TORCH_EXTENSIONS_DIR": str(scratch / "extensions"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(scratch),
    }


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no message")


def main() -> None:
    """The process: read job.json and windows.npy of this directory, quantize, write the weights to their place."""
    # the library prints to stdout; what this process has to say goes out under another number
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(Path("job.json").read_text())

    import torch
    from gptqmodel import BACKEND, AWQConfig, GPTQModel

    backend = BACKEND.AWQ_TORCH
    let_awq_run_in_float32()
    settings = AWQConfig(
        **job["settings"],
        device="cuda:0" if torch.cuda.is_available() else "cpu",
        offload_to_disk=True,
        offload_to_disk_path="offload",
        pack_impl="original",  # the others compile code on first use, for the same bits
    )
    model = GPTQModel.load(
        job["model"], settings, dtype=torch.float32, backend=backend, trust_remote_code=job["trust_remote_code"]
    )

    def on_layer(layer_idx: int, submodule_finalized: bool) -> None:
        if not submodule_finalized:
            channel.write(json.dumps({"layer": layer_idx}) + "\n")

    model.layer_callback = on_layer
    windows = torch.from_numpy(np.load("windows.npy").astype(np.int64))
    batches = [{"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]} for window in windows]
    model.quantize(batches, batch_size=1, calibration_sort=None, calibration_data_min_length=1, backend=backend)
    model.save("saved")
    quantization = json.loads(Path("saved/config.json").read_text())["quantization_config"]
    quantization["meta"] = {key: value for key, value in quantization["meta"].items() if key in _META}
    dtype = store_weights(Path("saved"), Path(job["out"]), job["dtype"], drop=["lm_head.weight"] if job["tied"] else ())
    channel.write(json.dumps({"quantization_config": quantization, "dtype": dtype}) + "\n")


def let_awq_run_in_float32() -> None:
    """Let GPTQModel 7.6.0 search AWQ's scales in float32: a third of the CPU time of its half types, and no overflow.

    Its packing refuses float32, for no reason in it. Its search keeps the weights that it restores after each trial
    as `.to(float32).cpu().contiguous()`, which for float32 on the CPU are the weights under trial themselves.
    """
    import torch
    from gptqmodel.looper.awq_processor import AWQProcessor
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    search = AWQProcessor._compute_best_scale

    def copied(tensor: Any, memory_format: Any = torch.contiguous_format) -> Any:
        return tensor.clone(memory_format=memory_format)

    def search_on_copies(*arguments: Any, **named: Any) -> Any:
        with mock.patch.object(torch.Tensor, "contiguous", copied):
            return search(*arguments, **named)

    AWQProcessor._compute_best_scale = search_on_copies
    AwqTorchLinear.SUPPORTS_DTYPES = [*AwqTorchLinear.SUPPORTS_DTYPES, torch.float32]


if __name__ == "__main__":
    main()
