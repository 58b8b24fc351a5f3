"""Export to ONNX by onnxruntime-genai's model builder: a directory that ONNX Runtime and onnxruntime-genai open."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from edgekit.artifact import Artifact
from edgekit.errors import InputError, ToolError
from edgekit.formats import safetensors
from edgekit.formats.onnx import read_tensors
from edgekit.model import ModelShape, read_config
from edgekit.stage import Facts, StageContext, StageParams, Tensor, stage
from edgekit.stages._onnx_graph import CONFIG, DATA, MODEL, check_graph, read_values, rewrite_data
from edgekit.target import Target

Provider = Literal["cpu", "cuda", "dml", "openvino", "qnn", "tensorrt", "webgpu"]
PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("fp32", "fp16", "int8", "int4"),
    "cuda": ("fp16", "int8", "int4"),
    "dml": ("fp16", "int4"),
    "openvino": ("fp32", "fp16", "int8", "int4"),
    "qnn": ("fp32", "fp16", "int8", "int4"),
    "tensorrt": ("fp16", "int4"),
    "webgpu": ("fp16", "int8", "int4"),
}
"""What the builder makes for an execution provider, as far as attention is GroupQueryAttention: only that reads and
writes one buffer of keys and values in place."""

_CPU_GRAPHS = {"openvino": "OpenVINO", "qnn": "QNN"}
"""Providers that take the processor's graph, by their names in the settings: ONNX Runtime gives each node that such a
provider has no kernel for to the processor. The builder knows neither."""
_BUILDER_NAMES = {"tensorrt": "NvTensorRtRtx"}
_HEAD_MULTIPLE = 16  # of GroupQueryAttention, which refuses others only when it runs
_BLOCKS = (16, 32, 64, 128, 256)  # of MatMulNBits
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "/lm_head/MatMul"
_HALF_MAX = 65504.0


class Params(StageParams):
    """Parameters of `onnx`."""

    precision: Literal["fp32", "fp16", "int8", "int4"] = "int4"
    """Type of the weights. `int8` and `int4` leave activations in float and keep norms and biases as they are."""
    provider: Provider | None = None
    """Execution provider that the graph is made for; None takes the target's `onnx_provider`."""
    hidden_states: bool = False
    """Give the hidden states after the last norm, too: a verifier reads them."""
    algorithm: Literal["default", "rtn", "k_quant", "rtn_last", "k_quant_last", "k_quant_mixed"] = "default"
    """How integer weights are rounded. `default` and `rtn` round to nearest, `k_quant` searches scale and zero point;
    `_last` gives the output head 8 bits, `_mixed` also the layers that suffer most."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights that share a scale, in `int8` and `int4`."""
    accuracy_level: Literal[0, 1, 4] | None = None
    """Arithmetic of integer matrices: 4 rounds activations to 8 bits (the CPU's default: fastest), 1 computes in
    float32; None leaves it to the provider."""

    @model_validator(mode="after")
    def _fits_together(self) -> Params:
        if self.precision == "int8" and self.algorithm.endswith(("_last", "_mixed")):
            raise ValueError(f"{self.algorithm} gives some matrices 8 bits, and int8 gives them to all")
        return self


@stage(
    version=1,
    takes=("checkpoint", "checkpoint[gptq]"),
    gives="onnx",
    tools=("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers"),
    target_fields=("onnx_provider",),
)
def run(model: Artifact, out: Path, params: Params, ctx: StageContext) -> Facts:
    """Write the graph of a decoder with its weights, tokenizer and settings, by onnxruntime-genai's builder."""
    named = _find_provider(params, ctx)
    provider = "cpu" if named in _CPU_GRAPHS else named
    config = read_config(model.path)
    _check_heads(config)
    if quantization := config.get("quantization_config"):
        _check_gptq(model.path, quantization, params)
    _build(model, out, params, provider, ctx)
    opset = _finish(out, params, provider, tied=bool(config.get("tie_word_embeddings")))
    if named in _CPU_GRAPHS:
        _name_provider(out, [{_CPU_GRAPHS[named]: {}}])
    tensors = read_tensors(out / MODEL)
    return {
        **model.facts,
        "precision": params.precision,
        "algorithm": "gptq" if quantization else params.algorithm if params.precision.startswith("int") else None,
        "provider": named,
        "opset": opset,
        "hidden_states": params.hidden_states,
        "kv_type": _io_type(params.precision, provider),
        "weight_bytes": sum(tensor.nbytes for tensor in tensors),
    }


def predict(
    tensors: Sequence[Tensor],
    params: Params,
    side: frozenset[str],
    *,
    shape: ModelShape | None = None,
    target: Target | None = None,
) -> tuple[Sequence[Tensor], Sequence[str]]:
    """What the builder stores for each tensor, in bytes, and the tables of rotary embeddings where `shape` is given."""
    named = params.provider or (target.onnx_provider if target else "cpu")
    provider = "cpu" if named in _CPU_GRAPHS else named
    real = _io_type(params.precision, provider)
    width = {"f32": 4, "f16": 2}[real]
    tied = not any(tensor.name == "output.weight" for tensor in tensors)
    integer = params.precision in ("int8", "int4")
    layers = 1 + max((int(t.name.split(".")[1]) for t in tensors if t.name.startswith("blk.")), default=-1)
    stored = []
    for tensor in tensors:
        name = tensor.name
        if name == "rope_freqs.weight":
            continue  # folded into the tables
        gptq = _planned_gptq(tensor, params)
        if len(tensor.shape) != 2 or not integer or (name == "token_embd.weight" and not tied):
            half = name == "token_embd.weight" and integer
            stored.append(replace(tensor, type="f16" if half else real, stored_bytes=None))
            continue
        bits, block = map(int, gptq.groups()) if gptq else (_bits(name, params, layers), params.block_size)
        zeros = gptq is not None or params.algorithm.startswith("k_quant")
        columns, rows = tensor.shape
        blocks = -(-columns // block)
        nbytes = rows * (blocks * block * bits // 8 + blocks * width + (-(-blocks * bits // 8) if zeros else 0))
        stored.append(replace(tensor, type=f"int{bits}-b{block}", stored_bytes=nbytes))
        if name == "token_embd.weight" and not _shares_head(columns, params, provider):
            # the table is there a second time
            stored.append(Tensor("token_embd.weight.lookup", tensor.shape, "f16"))
    if shape is not None:
        half_head = (shape.key_dim // 2, shape.context_tokens)
        stored += [Tensor(f"rope_{part}.weight", half_head, real) for part in ("cos", "sin")]
    return stored, ()


def host_bytes(shape: ModelShape, params: Params) -> int:
    """Peak of the builder: torch and its libraries, the checkpoint, and the graph, in float32 before it is rounded.

    Measured on a model of 135 million parameters: 4 bytes for each in float, 9.5 in integers.
    """
    return (800 << 20) + (12 if params.precision.startswith("int") else 6) * shape.parameters


def _bits(name: str, params: Params, layers: int) -> int:
    """Bits of a matrix that the builder rounds itself."""
    if params.precision == "int8":
        return 8
    last = params.algorithm.endswith(("_last", "_mixed"))
    if name in ("output.weight", "token_embd.weight"):
        return 8 if last else 4
    layer, part = int(name.split(".")[1]), name.split(".")[2]
    # llama.cpp's choice of the layers that suffer most, as the builder has it
    chosen = layer < layers / 8 or layer >= 7 * layers / 8 or (layer - round(layers / 8)) % 3 == 2
    packed = part in ("attn_q", "attn_k", "attn_v", "attn_qkv", "ffn_down")
    return 8 if params.algorithm == "k_quant_mixed" and chosen and packed else 4


def _io_type(precision: str, provider: str) -> str:
    """Type of activations, scales and the KV cache."""
    return "f32" if provider == "cpu" and precision != "fp16" else "f16"


def _shares_head(columns: int, params: Params, provider: str) -> bool:
    """Whether a tied embedding is looked up in the codes of the head."""
    if params.precision == "int4":
        return provider != "tensorrt"
    # the builder does not; `_shrink_embedding` does, where it can
    return provider == "cpu" and columns % params.block_size == 0 and not params.algorithm.startswith("k_quant")


def _planned_gptq(tensor: Tensor, params: Params) -> re.Match[str] | None:
    """Bits and group size of a planned GPTQ matrix; None for another. Raises InputError for one `run` would refuse."""
    if not tensor.type.startswith("gptq-"):
        return None
    found = re.fullmatch(r"gptq-int(\d+)-g(\d+)", tensor.type)
    if found is None or f"int{found[1]}" != params.precision or int(found[2]) not in _BLOCKS:
        raise InputError(
            f"GPTQ weights of {params.precision} for ONNX, in groups of {', '.join(map(str, _BLOCKS))}, no act-order",
            f"{tensor.type} for {tensor.name}",
            "--set gptq.bits=4 --set gptq.group_size=64 --set gptq.act_order=false",
        )
    return found


def refuses(params: Params, target: Target) -> str | None:
    """Why a target's execution provider does not run the precision."""
    provider = params.provider or target.onnx_provider
    # TensorRT runs where CUDA does, and WebGPU on whatever has a driver
    offered = {"cpu", "webgpu", target.onnx_provider} | ({"tensorrt"} if target.onnx_provider == "cuda" else set())
    if provider not in offered:
        return f"{target.name} runs ONNX by {target.onnx_provider}, not by {provider}"
    if params.precision in PRECISIONS[provider]:
        return None
    return f"ONNX for {provider} is made in {', '.join(PRECISIONS[provider])}"


def _find_provider(params: Params, ctx: StageContext) -> str:
    provider = params.provider or (ctx.target.onnx_provider if ctx.target else "cpu")
    if params.precision not in PRECISIONS[provider]:
        raise InputError(
            f"a precision of {provider} ({', '.join(PRECISIONS[provider])})",
            params.precision,
            f"--set onnx.precision={PRECISIONS[provider][-1]}",
        )
    return provider


def _check_heads(config: Mapping[str, Any]) -> None:
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim") or (hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None)
    if not isinstance(size, int) or size % _HEAD_MULTIPLE:
        raise InputError(
            f"attention heads of a multiple of {_HEAD_MULTIPLE}, as ONNX Runtime needs",
            f"a head size of {size}",
            "use a recipe for llama.cpp: --recipe gguf-q4",
        )


def _check_gptq(path: Path, quantization: Mapping[str, Any], params: Params) -> None:
    """Refuse what the builder reads wrongly or not at all; what remains it reads exactly.

    Held against our own unpacking of the same files: with act-order, the g_idx that the builder emits gives other
    logits (0.07 nats on a small model); the zero points of `gptq_v2` are off by one.
    """
    bits, group = quantization.get("bits"), quantization.get("group_size")
    precision = {4: "int4", 8: "int8"}.get(bits if type(bits) is int else 0)

    def refuse(wanted: str, found: str, fix: str) -> InputError:
        return InputError(f"{wanted} in {path / 'config.json'}, to go into ONNX", found, fix)

    if quantization.get("quant_method") != "gptq":
        found = str(quantization.get("quant_method"))
        raise refuse("no quantization, or GPTQ's", found, "leave the quantizing stage out of the recipe")
    if precision is None:
        raise refuse("4 or 8 bits", str(bits), "--set gptq.bits=4")
    if params.precision != precision:
        raise refuse(
            f"weights for onnx.precision={params.precision}", f"{bits} bits", f"--set onnx.precision={precision}"
        )
    if group not in _BLOCKS:
        raise refuse(f"a group size of {', '.join(map(str, _BLOCKS))}", str(group), "--set gptq.group_size=64")
    if quantization.get("checkpoint_format", "gptq") != "gptq":
        raise refuse("the format gptq", str(quantization["checkpoint_format"]), "save it in the format gptq")
    if quantization.get("dynamic") or quantization.get("lm_head"):
        raise refuse("one type for all layers", "other types for some, or for the head", "quantize all layers alike")
    if quantization.get("desc_act") or _reorders(path, group):
        raise refuse("desc_act=false, groups in the order of the columns,", "act-order", "--set gptq.act_order=false")


def _reorders(path: Path, group: int) -> bool:
    """Whether a `g_idx` says anything but column // group size."""
    for name, info in safetensors.read_checkpoint(path).items():
        if name.endswith(".g_idx"):
            found = np.memmap(path / info.file, np.dtype("<i4"), "r", info.offset, info.shape)
            if not np.array_equal(found, np.arange(found.size) // group):
                return True
    return False


def _build(model: Artifact, out: Path, params: Params, provider: str, ctx: StageContext) -> None:
    """Run the builder on local files, silenced."""
    # it makes this graph for accelerators only, but ONNX Runtime's CPU runs it as well
    half_on_cpu = provider == "cpu" and params.precision == "fp16"
    target = "cuda" if half_on_cpu else _BUILDER_NAMES.get(provider, provider)
    options: dict[str, str | int] = {
        "hf_token": False,
        "hf_remote": bool(model.facts["trust_remote_code"]),
        "include_hidden_states": params.hidden_states,
        # a cache that forgets what has left the window cannot be rewound
        "windowed_kv_cache": False,
    }
    if half_on_cpu:
        options["fuse_qk_norm_gqa"] = False
    if params.precision.startswith("int"):
        options |= {"algo_config": params.algorithm, "block_size": params.block_size}
        if params.accuracy_level is not None:
            options["accuracy_level"] = params.accuracy_level
        if provider == "tensorrt":
            options["shared_embeddings"] = False  # has no form in its format
    scratch = out / ".cache"
    layers = int(model.facts["layers"])
    said = _Listener(lambda layer: ctx.progress(layer, layers, "layers"))
    arguments = ("", str(model.path), str(out), params.precision, target, str(scratch))
    try:
        with said.silence():
            from onnxruntime_genai.models import builder

            parsed = builder.parse_extra_options(*arguments, [f"{key}={value}" for key, value in options.items()])
            builder.create_model(*arguments, **parsed)
    except MemoryError:
        raise
    except Exception as error:  # the builder raises any kind; its last words are the reason
        reason = f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2] or said.last}"
        raise ToolError(
            f"{params.precision} for {provider} from onnxruntime-genai's builder",
            reason[:300],
            "choose another --set onnx.precision= or recipe",
        ) from None
    shutil.rmtree(scratch, ignore_errors=True)
    if half_on_cpu:
        _name_provider(out, [])


def _name_provider(out: Path, options: list[dict[str, dict[str, str]]]) -> None:
    settings = json.loads((out / CONFIG).read_text())
    settings["model"]["decoder"]["session_options"]["provider_options"] = options
    (out / CONFIG).write_text(json.dumps(settings, indent=4))


class _Listener(io.TextIOBase):
    """Takes what the builder prints, and tells of its layers."""

    def __init__(self, on_layer: Callable[[int], None]) -> None:
        self._on_layer = on_layer
        self.last = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if found := re.match(r"Reading layer (\d+)", text):
            self._on_layer(int(found[1]) + 1)
        self.last = text.strip() or self.last
        return len(text)

    @contextlib.contextmanager
    def silence(self) -> Any:
        """Redirect standard output and error here; log lines are dropped."""
        disabled = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
                yield
        finally:
            logging.disable(disabled)


def _finish(out: Path, params: Params, provider: str, *, tied: bool) -> int:
    """Make the graph the same everywhere and its embedding small, check it, and return its opset."""
    import onnx
    import onnxruntime_genai

    path = out / MODEL
    model = onnx.load(str(path), load_external_data=False)
    # the builder appends the commit of whatever git repository it lies in
    model.producer_version = onnxruntime_genai.__version__
    if provider == "cpu" and params.precision in ("int8", "int4"):
        _shrink_embedding(model, out, params, tied)
    path.write_bytes(model.SerializeToString(deterministic=True))
    try:
        check_graph(model, out, hidden_states=params.hidden_states)
    except (InputError, onnx.checker.ValidationError) as error:
        found = error.found if isinstance(error, InputError) else str(error).strip().partition("\n")[0]
        raise ToolError(
            "a well-formed graph from onnxruntime-genai's builder", found, "choose another recipe"
        ) from None
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _shrink_embedding(model: Any, out: Path, params: Params, tied: bool) -> None:
    """Replace an embedding table that the builder left in float32 beside integer weights.

    Where it is tied to a head of 8 bits, tokens are looked up in the head's codes (GatherBlockQuantized, whose 8-bit
    form the builder does not use). Else the table is stored in float16, of which only the rows of the step's tokens
    are cast; no checkpoint has more than its own half precision there.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    table = next((t for t in graph.initializer if t.name == _EMBEDDING and t.data_type == TensorProto.FLOAT), None)
    if table is None:
        return
    gather = next(node for node in graph.node if _EMBEDDING in node.input)
    at = list(graph.node).index(gather)
    head = next((node for node in graph.node if node.name.startswith(_HEAD) and node.op_type == "MatMulNBits"), None)
    rows, columns = table.dims
    output, tokens = gather.output[0], gather.input[1]
    changed: dict[str, Any] = {}
    if tied and head is not None and params.precision == "int8" and _shares_head(columns, params, "cpu"):
        basename = "/model/embed_tokens"
        name = f"{basename}/rows"
        graph.initializer.append(numpy_helper.from_array(np.array([rows, columns], np.int64), name))
        reshape = helper.make_node(
            "Reshape", [head.input[1], name], [f"{name}/output_0"], "/model/embed_tokens/Reshape"
        )
        look_up = helper.make_node(
            "GatherBlockQuantized",
            [f"{name}/output_0", tokens, head.input[2]],
            [output],
            f"{basename}/GatherBlockQuantized",
            domain="com.microsoft",
            bits=8,
            block_size=params.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        new = [reshape, look_up]
        changed[_EMBEDDING] = None
    else:
        values = read_values(table, out)
        if not np.abs(values).max() <= _HALF_MAX:
            return
        half = f"{output}/half"
        look_up = helper.make_node("Gather", [_EMBEDDING, tokens], [half], gather.name)
        cast = helper.make_node("Cast", [half], [output], "/model/embed_tokens/Cast", to=TensorProto.FLOAT)
        new = [look_up, cast]
        changed[_EMBEDDING] = values.astype(np.float16)
    del graph.node[at]
    for offset, node in enumerate(new):
        graph.node.insert(at + offset, node)
    # shapes of values are hints only, and those of the table's are wrong now
    stale = [value for value in graph.value_info if value.name == _EMBEDDING]
    for value in stale:
        graph.value_info.remove(value)
    rewrite_data(graph, out / DATA, changed)
