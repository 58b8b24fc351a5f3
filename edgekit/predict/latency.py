"""Decode and prefill rates by a roofline: memory traffic bounds decode, arithmetic bounds prefill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.measure.strategies import StrategyRow
from edgekit.measurement import Measurement
from edgekit.model import ModelShape, elements
from edgekit.predict.fit import Constants, spread
from edgekit.predict.memory import kv_cache_bytes
from edgekit.stage import Tensor
from edgekit.target import Runtime, Target

RANGE_Z = 1.645
"""Standard deviations to each side of a predicted rate: nine runs in ten should lie within."""
PREFILL_SPREAD = 0.35
"""Standard deviation of the log of a prefill rate: kernels of different types reach different shares of the peak."""


@dataclass(frozen=True)
class ClassRates:
    """Pooled constants of the devices of a class, for a device and engine that nobody published a rate of.

    Rounded by hand from the shares that published runs of such devices reach; they are also where a fit starts.
    """

    title: str
    decode: Constants
    prefill_efficiency: float


GPU_CARD = ClassRates("GPU cards", Constants(0.8, 0.0006), 0.4)
GPU_BOARD = ClassRates("boards with a CUDA GPU", Constants(0.7, 0.0015), 0.25)
APPLE = ClassRates("Apple GPUs", Constants(0.84, 0.001), 0.6)
INTEGRATED = ClassRates("integrated GPUs", Constants(0.5, 0.002), 0.15)
NPU = ClassRates("NPUs", Constants(0.62, 0.002), 0.2)
PHONE = ClassRates("CPUs of phones", Constants(0.62, 0.002), 0.2)
X86 = ClassRates("x86 CPUs", Constants(0.62, 0.0005), 0.5)
JETSON_CPU = ClassRates("CPUs of Jetson boards", Constants(0.15, 0.004), 0.02)
ARM_BOARD = ClassRates("Arm CPUs of boards", Constants(0.5, 0.004), 0.3)
COPY_SHARE = 0.8
"""Of the traffic of a memory copy, what decode on a CPU reaches: 0.63 to 0.96 on published boards."""


@dataclass(frozen=True)
class Rates:
    """What bounds an engine on a target."""

    decode: Constants
    bandwidth_bytes_per_s: float
    prefill_efficiency: float
    dense_flops_per_s: float
    points: int
    note: str
    """Where the constants come from, for the reader of a prediction."""


def device_class(target: Target, engine: str) -> ClassRates:
    """The class whose constants hold where none of the target's own do.

    An engine may name the back end it runs on instead of the target's own: `llama_cpp/cpu`, `llama_cpp/vulkan`.
    """
    name, _, backend = engine.partition("/")
    if name == "onnxruntime" and target.onnx_provider in ("cpu", "qnn"):
        backend = backend or target.onnx_provider
    accelerator = backend or target.compute.accelerator
    if accelerator in ("npu", "qnn"):
        return NPU
    if accelerator == "cuda" or (accelerator == "vulkan" and target.compute.accelerator == "cuda"):
        return GPU_BOARD if target.memory.unified else GPU_CARD
    if accelerator == "metal":
        return APPLE
    if accelerator in ("vulkan", "sycl"):
        return INTEGRATED
    if target.os == "android":
        return PHONE
    if target.compute.accelerator == "cuda" and target.memory.unified:
        return JETSON_CPU
    return X86 if target.arch == "x86_64" else ARM_BOARD


def engine_rates(target: Target, engine: str | None = None) -> Rates:
    """The constants of an engine on a target: the profile's where it has them, else those of its class.

    `compute` in a profile is about the first of `engines`, `runtimes` about others. On a CPU of the class whose copy
    bandwidth is known, that stands for the share of the peak.
    """
    engine = engine or target.engines[0]
    bandwidth, flops = target.memory.bandwidth_bytes_per_s.value, target.compute.dense_flops_per_s.value
    pooled = device_class(target, engine)
    own = target.compute if engine == target.engines[0] else target.runtimes.get(engine)
    if own is not None:
        constants = Constants(own.decode_efficiency.value, own.token_overhead_s.value)
        prefill = own.prefill_efficiency.value if own.prefill_efficiency else pooled.prefill_efficiency
        if isinstance(own, Runtime) and own.peak_flops_per_s:
            flops = own.peak_flops_per_s.value
        runs = f"{own.points} published run{'s' if own.points > 1 else ''}"
        note = f"constants fitted to {runs}" if own.points else "constants estimated: no published run"
        return Rates(constants, bandwidth, prefill, flops, own.points, f"{note} of {engine} on this target")
    constants = pooled.decode
    copy = target.memory.copy_bytes_per_s
    if copy is not None and pooled in (PHONE, X86, ARM_BOARD):
        constants = Constants(min(COPY_SHARE * copy.value / bandwidth, 1.0), constants.overhead_s)
    note = f"no published run of {engine} on this target: constants pooled over {pooled.title}"
    return Rates(constants, bandwidth, pooled.prefill_efficiency, flops, 0, note)


def streamed_bytes(tensors: Sequence[Tensor], expert_share: float = 1.0) -> float:
    """Bytes of weights read for one token.

    All but an embedding table that is only looked up, and of stacked experts (`*_exps`) the share that a token takes.
    """
    return sum(tensor.nbytes * (expert_share if _is_expert(tensor) else 1) for tensor in _read(tensors))


def token_traffic(
    shape: ModelShape, tensors: Sequence[Tensor], cached_tokens: int, kv_type: str = "f16", expert_share: float = 1.0
) -> float:
    """Bytes read for one token with so many in the cache: weights, and every key and value."""
    return streamed_bytes(tensors, expert_share) + kv_cache_bytes(shape, cached_tokens, kv_type)


def multiplied_parameters(tensors: Sequence[Tensor], expert_share: float = 1.0) -> float:
    """Weights that a token of a prompt is multiplied with: neither embedding nor head, which only its end needs."""
    return sum(
        elements(tensor.shape) * (expert_share if _is_expert(tensor) else 1)
        for tensor in tensors
        if len(tensor.shape) > 1 and tensor.name not in ("token_embd.weight", "output.weight")
    )


def predict_latency(
    target: Target,
    shape: ModelShape,
    tensors: Sequence[Tensor],
    context_tokens: int,
    kv_type: str = "f16",
    engine: str | None = None,
    expert_share: float = 1.0,
) -> list[Measurement]:
    """Predict decode and prefill tokens/s of an engine on a target, each with the range nine runs in ten lie in.

    Decode: 1 / (bytes / (efficiency * bandwidth) + overhead), with the KV cache half full. Prefill:
    efficiency * FLOP/s / (2 * parameters), the parameters being those multiplied per token. `engine` is the target's
    first where none is named; `expert_share` is the share of a mixture's experts that a token takes.
    """
    rates = engine_rates(target, engine)
    traffic = token_traffic(shape, tensors, context_tokens // 2, kv_type, expert_share)
    decode = rates.decode.tokens_per_s(traffic, rates.bandwidth_bytes_per_s)
    flops = rates.prefill_efficiency * rates.dense_flops_per_s
    prefill = flops / (2 * multiplied_parameters(tensors, expert_share))
    return [
        _predicted("decode_tokens_per_s", decode, "tokens/s", target, spread(rates.points), rates.note),
        _predicted("prefill_tokens_per_s", prefill, "tokens/s", target, PREFILL_SPREAD, rates.note),
    ]


def predict_answer(
    target: Target, rates: Sequence[Measurement], row: StrategyRow, engine: str | None = None
) -> Measurement:
    """Predict the seconds of one answer by a strategy on a target, from what it moved and computed.

    Traffic over bandwidth, or arithmetic where a batch makes that the longer, and the overhead of every step.
    """
    bound = engine_rates(target, engine)
    moving = row.bytes_moved / (bound.decode.efficiency * bound.bandwidth_bytes_per_s)
    prefill = next(rate.value for rate in rates if rate.name == "prefill_tokens_per_s")
    # a trunk of its own takes a step for every partial answer
    steps = row.steps + (row.verifier_calls if row.verifier_tokens else 0)
    computing = (row.tokens_forward + row.verifier_tokens) / prefill
    seconds = max(moving, computing) + steps * bound.decode.overhead_s
    return _predicted("answer_s", seconds, "s", target, spread(bound.points), None)


def _read(tensors: Sequence[Tensor]) -> list[Tensor]:
    untied = any(tensor.name == "output.weight" for tensor in tensors)
    return [tensor for tensor in tensors if not (untied and tensor.name == "token_embd.weight")]


def _is_expert(tensor: Tensor) -> bool:
    return "_exps." in tensor.name


def _predicted(name: str, value: float, unit: str, target: Target, deviation: float, note: str | None) -> Measurement:
    factor = math.exp(RANGE_Z * deviation)
    return Measurement(
        name=name,
        value=value,
        unit=unit,
        kind="predicted",
        ci_low=value / factor,
        ci_high=value * factor,
        device=target.name,
        note=note,
    )
