"""Decode and prefill rates by a roofline: memory traffic bounds decode, arithmetic bounds prefill."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.measure.strategies import StrategyRow
from edgekit.measurement import Measurement
from edgekit.model import ModelShape, elements
from edgekit.predict.memory import kv_cache_bytes
from edgekit.stage import Tensor
from edgekit.target import Target

_UNCERTAINTY = 0.35
"""Half-width of the stated interval, relative: published rates of one board scatter about this much."""


def streamed_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of weights read for one token: all but an embedding table that is only looked up."""
    untied = any(t.name == "output.weight" for t in tensors)
    return sum(t.nbytes for t in tensors if not (untied and t.name == "token_embd.weight"))


def predict_latency(
    target: Target, shape: ModelShape, tensors: Sequence[Tensor], context_tokens: int, kv_type: str = "f16"
) -> list[Measurement]:
    """Predict decode and prefill tokens/s on a target, each with an interval.

    Decode: 1 / (bytes / (efficiency * bandwidth) + overhead), with the KV cache half full. Prefill:
    efficiency * FLOP/s / (2 * parameters), the parameters being those multiplied per token.
    """
    compute, memory = target.compute, target.memory
    traffic = streamed_bytes(tensors) + kv_cache_bytes(shape, context_tokens // 2, kv_type)
    bandwidth = compute.decode_efficiency.value * memory.bandwidth_bytes_per_s.value
    decode = 1 / (traffic / bandwidth + compute.token_overhead_s.value)
    tied = all(t.name != "output.weight" for t in tensors)
    multiplied = sum(elements(t.shape) for t in tensors if len(t.shape) > 1 and (tied or t.name != "token_embd.weight"))
    prefill = compute.prefill_efficiency.value * compute.dense_flops_per_s.value / (2 * multiplied)
    return [
        _predicted("decode_tokens_per_s", decode, target.name),
        _predicted("prefill_tokens_per_s", prefill, target.name),
    ]


def predict_answer(target: Target, rates: Sequence[Measurement], row: StrategyRow) -> Measurement:
    """Predict the seconds of one answer by a strategy on a target, from what it moved and computed.

    Traffic over bandwidth, or arithmetic where a batch makes that the longer, and the overhead of every step.
    """
    compute = target.compute
    moving = row.bytes_moved / (compute.decode_efficiency.value * target.memory.bandwidth_bytes_per_s.value)
    prefill = next(rate.value for rate in rates if rate.name == "prefill_tokens_per_s")
    # a trunk of its own takes a step for every partial answer
    steps = row.steps + (row.verifier_calls if row.verifier_tokens else 0)
    computing = (row.tokens_forward + row.verifier_tokens) / prefill
    seconds = max(moving, computing) + steps * compute.token_overhead_s.value
    return Measurement(
        name="answer_s",
        value=seconds,
        unit="s",
        kind="predicted",
        ci_low=seconds / (1 + _UNCERTAINTY),
        ci_high=seconds / (1 - _UNCERTAINTY),
        device=target.name,
    )


def _predicted(name: str, value: float, device: str) -> Measurement:
    return Measurement(
        name=name,
        value=value,
        unit="tokens/s",
        kind="predicted",
        ci_low=value * (1 - _UNCERTAINTY),
        ci_high=value * (1 + _UNCERTAINTY),
        device=device,
    )
