"""The libraries that we are compared with: their own few lines, as their documentation has them, each in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from edgekit.formats.onnx import read_tensors

_CLOCK = """
import json, sys, time
seconds, last = {}, time.perf_counter()
def lap(name):
    global last
    now = time.perf_counter()
    seconds[name], last = now - last, now
    open("seconds.json", "w").write(json.dumps(seconds))
"""
GPTQMODEL = """
import numpy as np, torch
from gptqmodel import BACKEND, AWQConfig, GPTQConfig, GPTQModel
lap("import")
method, model, out, settings = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
tokens = [{"input_ids": list(map(int, row)), "attention_mask": [1] * len(row)} for row in np.load("windows.npy")]
awq = method == "awq"
backend = BACKEND.AWQ_TORCH if awq else BACKEND.AUTO
config = (AWQConfig if awq else GPTQConfig)(**settings, device="cpu")
network = GPTQModel.load(model, config, dtype=torch.bfloat16 if awq else torch.float32, backend=backend)
lap("load")
network.quantize(tokens, batch_size=1, calibration_data_min_length=1, backend=backend)
lap("quantize")
network.save(out)
lap("save")
"""
AUTOROUND = """
import numpy as np, torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer
lap("import")
model, out, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
windows = torch.from_numpy(np.load("windows.npy").astype(np.int64))
tokens = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows]
network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(model)
lap("load")
rounding = AutoRound(network, tokenizer=tokenizer, **settings, dataset=tokens, nsamples=len(tokens),
                     seqlen=windows.shape[1], batch_size=min(8, len(tokens)), device_map="cpu")
rounding.quantize()
lap("quantize")
rounding.save_quantized(out, format="auto_gptq")
lap("save")
"""
BITSANDBYTES = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=sys.argv[3] == "1")
network = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.float16)
network.save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""
BUILDER = """
from onnxruntime_genai.models import builder
arguments = ("", sys.argv[1], sys.argv[2], sys.argv[3], "cpu", sys.argv[2] + "/cache")
builder.create_model(*arguments, **builder.parse_extra_options(*arguments, ["hf_token=false"]))
"""
ONNXRUNTIME = """
import shutil
import onnx
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
lap("import")
method, graph, out = sys.argv[1:]
shutil.copytree(graph, out, ignore=shutil.ignore_patterns("model.onnx*", "cache"), dirs_exist_ok=True)
model = onnx.load(graph + "/model.onnx")
lap("load")
config = {
    "rtn": lambda: nbits.DefaultWeightOnlyQuantConfig(block_size=32, accuracy_level=4),
    "hqq": lambda: nbits.HQQWeightOnlyQuantConfig(block_size=32),
}[method]()
quantizer = nbits.MatMulNBitsQuantizer(model, algo_config=config)
quantizer.process()
lap("quantize")
quantizer.model.save_model_to_file(out + "/model.onnx", use_external_data_format=True)
lap("save")
"""
EDGEKIT_GPTQ = """
import torch, transformers
from pathlib import Path
import edgekit.huggingface as texts
from edgekit.artifact import open_artifact
from edgekit.stage import StageContext, find_stage
from edgekit.store import Store
apart = 0.0
def timed(function):
    def call(*given, **named):
        global apart
        begun = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            apart += time.perf_counter() - begun
    return call
# the peers get a loaded network and token ids: neither loading nor tokenizing is rounding
texts.open_checkpoint, texts.calibration_windows = timed(texts.open_checkpoint), timed(texts.calibration_windows)
stage = find_stage("gptq")
lap("import")
model, out, settings = open_artifact(Path(sys.argv[1])), Path(sys.argv[2]), json.loads(sys.argv[3])
facts = stage.run(model, out, stage.params.model_validate(settings), StageContext(Store.default()))
lap("quantize")
seconds["quantize"] -= apart
seconds["load"] = apart
lap("save")
"""


@dataclass(frozen=True)
class Ran:
    """How long a script took, in seconds."""

    process_s: float
    """From starting the interpreter to its end."""
    laps: dict[str, float]
    """Of its parts (`import`, `load`, `quantize`, `save`), where it tells."""

    @property
    def rounding_s(self) -> float:
        """Quantizing, packing and writing, without imports, loading and tokenizing."""
        return self.laps["quantize"] + self.laps["save"]


def direct(script: str, directory: Path, *arguments: str) -> Ran:
    """Run a script of this module in a fresh process, in `directory`, with no hub; ends the benchmark if it fails."""
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
    told = directory / "seconds.json"
    told.unlink(missing_ok=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _CLOCK + script, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    process_s = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return Ran(process_s, json.loads(told.read_text()) if told.exists() else {})


def onnx_bytes(directory: Path) -> int:
    """Bytes of a graph and its data; a table of embeddings in float32 counts in half precision, as we store it."""
    table = sum(t.nbytes for t in read_tensors(directory / "model.onnx") if "embed" in t.name and t.type == "f32")
    return sum(file.stat().st_size for file in directory.glob("model.onnx*")) - table // 2


def build_onnx(checkpoint: Path, out: Path, precision: str) -> Ran:
    """Let onnxruntime-genai's builder write its default of a precision into `out`, a new directory."""
    out.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        return direct(BUILDER, Path(scratch), str(checkpoint), str(out), precision)
