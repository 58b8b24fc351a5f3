"""Predicted decode and prefill rates beside published ones: `published_rates.py ROWS.csv`.

The file has the columns device, model, params_b, quant, file_gb, runtime, prefill_tps, decode_tps, context and
peak_bw_gbs, as in published tables; none is part of the project. Every row is predicted with the catalog as it stands,
with the pooled constants of its class, with constants fitted to all rows of its target and engine (in sample), and with
constants fitted to a few rows of other models there (held out). The class's constants are where a fit starts, and were
themselves chosen with a sample of such rows in view; `strict` takes them from the other targets' rows alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit.model import ModelShape
from edgekit.predict.fit import Constants, Point, fit_constants, spread
from edgekit.predict.latency import RANGE_Z, device_class, engine_rates, predict_latency, token_traffic
from edgekit.stage import Tensor
from edgekit.target import Compute, Figure, Memory, Target, find_target

# device text -> target of the catalog, the first that matches
DEVICES = (
    (r"orin nano.*pre-?super", "jetson-orin-nano-super@15W"),
    (r"orin nano", "jetson-orin-nano-super"),
    (r"orin nx", "jetson-orin-nx-16gb"),
    (r"agx orin", "jetson-agx-orin-64gb"),
    (r"thor", "jetson-agx-thor"),
    (r"rk3588|orange pi 5|rock 5", "rk3588"),
    (r"(raspberry )?pi 5.*16 ?gb", "raspberry-pi-5-16gb"),
    (r"raspberry pi 5|\bpi 5\b", "raspberry-pi-5"),
    (r"raspberry pi (4|400)|\bpi 4", "raspberry-pi-4-8gb"),
    (r"\bn100\b", "intel-n100"),
    (r"\bn150\b", "intel-n150"),
    (r"258v|lunar lake", "intel-lunar-lake"),
    (r"hx ?370", "amd-ryzen-ai-hx370"),
    (r"framework 13|ryzen ai 5 340|ddr5-5600", "generic-x86-ddr5"),
    (r"snapdragon 8 elite|oneplus 13|s25", "snapdragon-8-elite"),
    (r"snapdragon 8 gen ?3|oneplus 12|s24", "snapdragon-8-gen-3"),
    (r"snapdragon x elite|x1e|surface laptop 7", "snapdragon-x-elite"),
    (r"mac mini m2$|apple m2 (8|10)-gpu|apple m2$", "mac-mini-m2"),
    (r"mac mini m4\b(?! pro)|apple m4 10-gpu|apple m4$", "mac-mini-m4"),
    (r"rtx 3060", "rtx-3060"),
    (r"rtx 4090", "rtx-4090"),
    (r"\bl4\b", "l4"),
)
RUNTIMES = (
    (r"llama\.?cpp|ollama|llamafile|lm studio", "llama_cpp"),
    (r"tensorrt.?edge", "tensorrt-edge-llm"),
    (r"tensorrt|trt", "tensorrt-llm"),
    (r"vllm", "vllm"),
    (r"openvino", "openvino"),
    (r"genie|qnn|qualcomm", "qnn"),
    (r"executorch", "executorch"),
)
# name -> layers, hidden, feed-forward, heads, KV heads, head size, vocabulary, tied embedding
SHAPES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"tinyllama", (22, 2048, 5632, 32, 4, 64, 32000, 0)),
    (r"smollm2?.?135m", (30, 576, 1536, 9, 3, 64, 49152, 1)),
    (r"smollm2?.?360m", (32, 960, 2560, 15, 5, 64, 49152, 1)),
    (r"smollm2?.?1\.7b", (24, 2048, 8192, 32, 32, 64, 49152, 1)),
    (r"llama.?3\.2.?1b", (16, 2048, 8192, 32, 8, 64, 128256, 1)),
    (r"llama.?3\.2.?3b", (28, 3072, 8192, 24, 8, 128, 128256, 1)),
    (r"(code)?llama.?2?.?7b|vicuna.?7b", (32, 4096, 11008, 32, 32, 128, 32000, 0)),
    (r"(code)?llama.?2?.?13b|vicuna.?13b", (40, 5120, 13824, 40, 40, 128, 32000, 0)),
    (r"llama.?3(\.[013])?.?(instruct.?)?8b|deepseek.*llama.?8b", (32, 4096, 14336, 32, 8, 128, 128256, 0)),
    (r"llama.?3(\.[0-9])?.?70b|deepseek.*llama.?70b", (80, 8192, 28672, 64, 8, 128, 128256, 0)),
    (r"mistral.?7b", (32, 4096, 14336, 32, 8, 128, 32768, 0)),
    (r"qwen2\.?5?.*0\.?5b", (24, 896, 4864, 14, 2, 64, 151936, 1)),
    (r"(qwen2\.?5?|deepseek).*1\.5b", (28, 1536, 8960, 12, 2, 128, 151936, 1)),
    (r"qwen2\.5.*3b", (36, 2048, 11008, 16, 2, 128, 151936, 1)),
    (r"(qwen2(\.5)?|deepseek).*\b7b", (28, 3584, 18944, 28, 4, 128, 152064, 0)),
    (r"(qwen2\.5|deepseek).*14b", (48, 5120, 13824, 40, 8, 128, 152064, 0)),
    (r"(qwen2\.5|deepseek).*32b", (64, 5120, 27648, 40, 8, 128, 152064, 0)),
    (r"qwen.?3.*0?6b", (28, 1024, 3072, 16, 8, 128, 151936, 1)),
    (r"qwen.?3.*1\.7b", (28, 2048, 6144, 16, 8, 128, 151936, 1)),
    (r"qwen.?3[^.]*\b4b", (36, 2560, 9728, 32, 8, 128, 151936, 1)),
    (r"qwen.?3[^.]*\b8b", (36, 4096, 12288, 32, 8, 128, 151936, 0)),
    (r"qwen.?3[^.]*14b", (40, 5120, 17408, 40, 8, 128, 151936, 0)),
    (r"qwen.?3[^.]*32b", (64, 5120, 25600, 64, 8, 128, 151936, 0)),
    (r"gemma.?2.*2b", (26, 2304, 9216, 8, 4, 256, 256000, 1)),
    (r"gemma.?2.*9b", (42, 3584, 14336, 16, 8, 256, 256000, 1)),
    (r"gemma.?(3n|4).*e2b", (30, 2048, 8192, 8, 2, 256, 262144, 1)),
    (r"gemma.?(3n|4).*e4b", (35, 2048, 16384, 8, 2, 256, 262144, 1)),
    (r"gemma.?3.*\b1b", (26, 1152, 6912, 4, 1, 256, 262144, 1)),
    (r"gemma.?3.*\b4b", (34, 2560, 10240, 8, 4, 256, 262144, 1)),
    (r"gemma.?3.*12b", (48, 3840, 15360, 16, 8, 256, 262144, 1)),
    (r"gemma.?3.*27b", (62, 5376, 21504, 32, 16, 128, 262144, 1)),
    (r"phi.?3(\.5)?.?mini", (32, 3072, 8192, 32, 32, 96, 32064, 0)),
    (r"phi.?4(?!.?mini)", (40, 5120, 17920, 40, 10, 128, 100352, 0)),
    (r"phi.?4.?mini", (32, 3072, 8192, 24, 8, 128, 200064, 1)),
)
# name -> experts, used per token, feed-forward size of one; the rest as in SHAPES with that feed-forward size 0
EXPERTS: tuple[tuple[str, tuple[int, ...], tuple[int, int, int]], ...] = (
    (r"gpt.?oss.*20b", (24, 2880, 0, 64, 8, 64, 201088, 0), (32, 4, 2880)),
    (r"gpt.?oss.*120b", (36, 2880, 0, 64, 8, 64, 201088, 0), (128, 4, 2880)),
    (r"qwen.?3.*30b.?a3b", (48, 2048, 0, 32, 4, 128, 151936, 0), (128, 8, 768)),
    (r"mixtral", (32, 4096, 0, 32, 8, 128, 32000, 0), (8, 2, 14336)),
)
# quantization -> bits per weight of matrices, of the output head, of an embedding that is not the head
BITS: tuple[tuple[str, tuple[float, float, float]], ...] = (
    (r"q2_k", (3.0, 6.56, 2.63)),
    (r"q3_k", (3.8, 6.56, 3.44)),
    (r"q4_k_s", (4.6, 6.56, 4.5)),
    (r"q4_k", (4.81, 6.56, 4.5)),
    (r"q5_k", (5.67, 6.56, 5.5)),
    (r"q6_k", (6.56, 6.56, 6.56)),
    (r"q4_0.*pure", (4.5, 4.5, 4.5)),
    (r"q4_0|iq4", (4.5, 6.56, 4.5)),
    (r"q4_1|q5_0|q5_1", (5.5, 6.56, 5.5)),
    (r"q8_0", (8.5, 8.5, 8.5)),
    (r"q4f16", (4.5, 4.5, 4.5)),
    (r"mxfp4", (4.25, 16, 16)),
    (r"nvfp4", (4.5, 8, 16)),
    (r"w4a16|awq|gptq|w4", (4.16, 16, 16)),
    (r"8da4w", (4.5, 8, 8)),
    (r"fp8", (8.0, 16, 16)),
    (r"w8a8|w8|int8", (8.0, 8.0, 16)),
    (r"w2|2.?bit", (2.5, 6.56, 4.5)),
    (r"int4|4.?bit", (4.5, 8.0, 8.0)),
    (r"f16|fp16|bf16", (16, 16, 16)),
)


K_QUANTS = {2.63: 4.5, 3.0: 4.5, 3.44: 4.5, 3.8: 4.5, 4.5: 4.5, 4.6: 5.0, 4.81: 5.5, 5.5: 5.5, 5.67: 6.0, 6.56: 8.5}
ANYTHING = Constants(0.6, 0.002)
"""Where a class starts from of which no other target has a row."""


@dataclass(frozen=True)
class Row:
    """A published run, and what the predictor needs to know of it."""

    target: Target
    engine: str
    listed: bool
    """Whether the catalog has the device."""
    model: str
    dense: bool
    shape: ModelShape
    expert_share: float
    cached_tokens: int
    decode: float
    prefill: float | None

    @property
    def group(self) -> tuple[str, str]:
        """What constants are fitted for."""
        return self.target.title, self.engine

    @property
    def bandwidth(self) -> float:
        """Peak bytes per second."""
        return self.target.memory.bandwidth_bytes_per_s.value

    @property
    def point(self) -> Point:
        """Traffic and rate."""
        traffic = token_traffic(self.shape, self.shape.tensors, self.cached_tokens, expert_share=self.expert_share)
        return Point(traffic, self.decode)

    @property
    def prior(self) -> Constants:
        """The pooled constants, as the predictor takes them where the profile has none of its own."""
        bare = self.target.model_copy(update={"runtimes": {}, "engines": ("none",)})
        return engine_rates(bare, self.engine).decode


def look_up(table: Sequence[tuple[Any, ...]], text: str) -> tuple[Any, ...]:
    """What stands behind the first pattern that the text holds; empty where none does."""
    return next((tuple(values) for pattern, *values in table if re.search(pattern, text.lower())), ())


def read_row(fields: dict[str, str]) -> Row | str:
    """A row of the file, or why it cannot be predicted."""

    def number(name: str) -> float | None:
        found = re.search(r"\d+(\.\d+)?", fields.get(name) or "")
        return float(found[0]) if found else None

    decode = number("decode_tps")
    if not decode:
        return "no decode rate"
    parameters, size = (number("params_b") or 0) * 1e9, (number("file_gb") or 0) * 1e9
    quant = look_up(BITS, fields["quant"])
    if not quant and size and parameters:
        quant = ((8 * size / parameters,) * 3,)
    if not quant:
        return f"unknown quantization {fields['quant']!r}"
    moe, plain = look_up(EXPERTS, fields["model"]), look_up(SHAPES, fields["model"])
    active = re.search(r"(\d+(?:\.\d+)?)b.?a(\d+(?:\.\d+)?)b", fields["model"].lower())
    if active and not moe:
        # a mixture that is not in the table: of its bytes, those of the weights that its name calls active
        share = float(active[2]) / float(active[1])
        plain, parameters, size = (), (parameters or float(active[1]) * 1e9) * share, size * share
    if not (moe or plain or size or parameters):
        return f"unknown model {fields['model']!r}"
    if re.search(r"\bmoe\b", fields["model"].lower()) and not (moe or active):
        return f"unknown mixture {fields['model']!r}"
    # a GPU behind a board is not the board
    device = re.sub(r"\([^)]*\bhost\b[^)]*\)", "", fields["device"])
    found = look_up(DEVICES, device)
    listed = found[0] if found else None
    mode = re.search(r"\b(\d+) ?W\b", device)
    engine, backend = runtime_of(fields["runtime"], device)
    target = None
    if listed:
        target = find_target(listed)
        if mode and f"{mode[1]}W" in target.power.mode_rates:
            target = find_target(f"{target.name}@{mode[1]}W")
    else:
        bandwidth = number("peak_bw_gbs")
        if bandwidth is None:
            return f"unknown device {fields['device']!r}"
        target = unlisted(device, backend or ("gpu" if "gpu" in fields["runtime"].lower() else ""), bandwidth * 1e9)
    if backend and backend != target.compute.accelerator.replace("none", "cpu"):
        engine = f"{engine}/{backend}"
    experts = moe[1] if moe else (1, 1, 0)
    shape = make_shape(moe[0] if moe else plain[0] if plain else None, experts, quant[0], parameters, size)
    return Row(
        target=target,
        engine=engine,
        listed=bool(listed),
        model=fields["model"],
        dense=not (moe or active),
        shape=shape,
        expert_share=experts[1] / experts[0],
        cached_tokens=cached_tokens(fields.get("context") or ""),
        decode=decode,
        prefill=number("prefill_tps"),
    )


def runtime_of(runtime: str, device: str) -> tuple[str, str]:
    """Engine and back end (empty: the device's own) of the text of a row."""
    text = f"{runtime} {device}".lower()
    engine = look_up(RUNTIMES, runtime)
    backend = next((name for name in ("cuda", "vulkan", "metal", "sycl", "npu", "cpu") if f" {name}" in f" {text}"), "")
    if re.search(r"\(cpu\)|\bcpu\b", text):
        backend = "cpu"
    name = engine[0] if engine else re.sub(r"[^a-z0-9]+", "-", runtime.lower().split(" ")[0]).strip("-")
    return name, "npu" if name in ("rkllm", "qnn") else backend


def cached_tokens(context: str) -> int:
    """Tokens in the cache halfway through the decode; benchmarks of llama.cpp start it empty."""
    if found := re.search(r"isl ?(\d+)/osl ?(\d+)|(\d+) in/(\d+) out", context.lower()):
        before, after = (int(part) for part in found.groups() if part)
        return before + after // 2
    found = re.search(r"tg ?(\d+)", context)
    return int(found[1]) // 2 if found else 256


def make_shape(
    sizes: tuple[int, ...] | None,
    experts: tuple[int, int, int],
    bits: tuple[float, ...],
    parameters: float,
    size: float,
) -> ModelShape:
    """A shape with its real tensors, or for a model that is not in the table one tensor of its bytes."""
    body, head, looked_up = bits

    def tensor(name: str, shape: tuple[int, ...], width: float) -> Tensor:
        # k-quants need rows of whole blocks of 256; llama.cpp takes the next larger type of blocks of 32
        if shape[0] % 256 and width in K_QUANTS:
            width = K_QUANTS[width]
        return Tensor(name, shape, "f16", stored_bytes=round(math.prod(shape) * width / 8))

    if sizes is None:
        elements = round(parameters or size * 8 / body)
        stored = round(size or elements * body / 8)
        tensors = [Tensor("blk.0.weight", (1, elements), "f16", stored_bytes=stored)]
        return ModelShape("unknown", 32, 4096, 1, 32, 8, 128, 128, 1, 1 << 17, tuple(tensors))
    layers, hidden, forward, heads, kv_heads, width, vocabulary, tied = sizes
    count, _, expert = experts
    tensors = []
    for layer in range(layers):
        for part, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            tensors.append(tensor(f"blk.{layer}.attn_{part}.weight", (hidden, rows * width), body))
        tensors.append(tensor(f"blk.{layer}.attn_output.weight", (heads * width, hidden), body))
        inside, suffix, stack = (expert, "_exps", (count,)) if count > 1 else (forward, "", ())
        for part in ("gate", "up"):
            tensors.append(tensor(f"blk.{layer}.ffn_{part}{suffix}.weight", (hidden, inside, *stack), body))
        tensors.append(tensor(f"blk.{layer}.ffn_down{suffix}.weight", (inside, hidden, *stack), body))
    inner = sum(math.prod(t.shape) for t in tensors)
    # some files repeat a tied table as a head of their own; their count of weights tells
    repeated = parameters > inner + 1.6 * vocabulary * hidden
    if tied and not repeated:
        tensors.append(tensor("token_embd.weight", (hidden, vocabulary), head))
    else:
        tensors.append(tensor("token_embd.weight", (hidden, vocabulary), looked_up))
        tensors.append(tensor("output.weight", (hidden, vocabulary), head))
    total = sum(t.nbytes for t in tensors)
    if size:
        tensors = [replace(t, stored_bytes=round(t.nbytes * size / total)) for t in tensors]
    return ModelShape(
        "known", layers, hidden, forward, heads, kv_heads, width, width, vocabulary, 1 << 17, tuple(tensors)
    )


def unlisted(device: str, backend: str, bandwidth: float) -> Target:
    """A target for a device that the catalog does not have: its class and its bandwidth, nothing else."""
    text = device.lower()
    apple = re.search(r"apple|macbook|\bmac (mini|studio|pro)\b", text)
    phone = re.search(r"phone|galaxy|pixel|oneplus|xiaomi", text)
    card = re.search(
        r"rtx|gtx|geforce|\b[ahl]\d{2,3}\b|tesla|quadro|\brx ?\d{4}|radeon (pro|rx)|\bw7\d00|arc [ab]\d", text
    )
    cuda = card or re.search(r"nvidia|jetson|gb10", text)
    board = re.search(r"jetson|gb10|\bpi\b|rock|radxa|rk35|\barm\b|snapdragon|ampere|graviton", text)
    accelerator = "metal" if apple else "cuda" if cuda else "vulkan" if backend in ("gpu", "vulkan", "sycl") else "none"
    unknown = Figure[float](value=1.0, estimate="not known")
    counted = Figure[int](value=1 << 40, estimate="not known")
    return Target(
        name="unlisted",
        title=device,
        arch="aarch64" if apple or phone or board else "x86_64",
        os="android" if phone else "linux",
        engines=("none",),
        default_recipe="gguf-q4",
        default_recipe_reason="none",
        memory=Memory(
            total_bytes=counted,
            usable_bytes=counted,
            bandwidth_bytes_per_s=Figure(value=bandwidth, estimate="as the row states it"),
            unified=not card,
        ),
        compute=Compute(
            accelerator="none" if backend == "cpu" else accelerator,
            threads=1,
            dense_flops_per_s=unknown,
            decode_efficiency=unknown,
            prefill_efficiency=unknown,
            token_overhead_s=unknown,
        ),
    )


@dataclass(frozen=True)
class Outcome:
    """A row with its prediction and the number of runs that its constants were fitted to."""

    row: Row
    predicted: float
    points: int

    @property
    def error(self) -> float:
        """Relative to the published rate, absolute."""
        return abs(self.predicted / self.row.decode - 1)

    @property
    def inside(self) -> bool:
        """Whether the published rate lies in the stated range."""
        return abs(math.log(self.predicted / self.row.decode)) <= RANGE_Z * spread(self.points)


def by_catalog(rows: Sequence[Row]) -> list[Outcome]:
    """The predictor as it stands."""
    found = []
    for row in rows:
        decode, _ = predict_latency(
            row.target, row.shape, row.shape.tensors, 2 * row.cached_tokens, "f16", row.engine, row.expert_share
        )
        found.append(Outcome(row, decode.value, engine_rates(row.target, row.engine).points))
    return found


def fitted(row: Row, others: Sequence[Row], prior: Constants | None = None) -> Outcome:
    """A row by constants fitted to others of its group."""
    constants = fit_constants([other.point for other in others], row.bandwidth, prior or row.prior)
    return Outcome(row, constants.tokens_per_s(row.point.traffic_bytes, row.bandwidth), len(others))


def in_sample(rows: Sequence[Row]) -> list[Outcome]:
    """Every group fitted to all of its rows."""
    return [fitted(row, group) for group in groups(rows).values() for row in group]


def held_out(rows: Sequence[Row], most: int, seed: int, *, strict: bool = False) -> list[Outcome]:
    """Every row of a group that has others, by constants fitted to at most so many of other models, at random.

    `strict` starts from what the rows of other targets in its class say, not from the predictor's own constants.
    """
    draw, found = random.Random(seed), []
    for group in groups(rows).values():
        prior = class_without(group[0], rows) if strict else None
        for row in group:
            others = [other for other in group if other.model != row.model]
            if others:
                found.append(fitted(row, draw.sample(others, min(most, len(others))), prior))
    return found


def class_without(row: Row, rows: Sequence[Row]) -> Constants:
    """Constants of the row's class from the other targets in it; traffic over bandwidth makes them comparable."""
    wanted = device_class(row.target, row.engine)
    others = [
        Point(other.point.traffic_bytes / other.bandwidth, other.decode)
        for other in rows
        if other.target.title != row.target.title and device_class(other.target, other.engine) == wanted
    ]
    return fit_constants(others, 1.0, ANYTHING)


def pooled(rows: Sequence[Row]) -> list[Outcome]:
    """Every row by the constants of its class alone."""
    return [fitted(row, ()) for row in rows]


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by target and engine."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row.group].append(row)
    return dict(sorted(found.items()))


def quantile(errors: Sequence[float], share: float) -> float:
    """Linear between order statistics."""
    ordered = sorted(errors)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def summary(outcomes: Sequence[Outcome], resamples: int = 2000) -> dict[str, Any]:
    """Median and 90th percentile of the errors with 95% bootstrap intervals over groups, and the coverage."""
    draw = random.Random(0)
    by_group = defaultdict(list)
    for outcome in outcomes:
        by_group[outcome.row.group].append(outcome.error)
    clusters = list(by_group.values())
    drawn = [[e for errors in draw.choices(clusters, k=len(clusters)) for e in errors] for _ in range(resamples)]
    errors = [outcome.error for outcome in outcomes]
    figures: dict[str, Any] = {"rows": len(errors), "groups": len(clusters)}
    for name, share in (("median", 0.5), ("p90", 0.9)):
        resampled = [quantile(sample, share) for sample in drawn]
        figures[name] = round(quantile(errors, share), 4)
        figures[f"{name}_interval"] = [round(quantile(resampled, 0.025), 4), round(quantile(resampled, 0.975), 4)]
    figures["coverage"] = round(statistics.fmean(outcome.inside for outcome in outcomes), 4)
    return figures


def prefill_summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Errors of the catalog's prefill rates where it has the device."""
    errors, inside = [], []
    for row in rows:
        if row.listed and row.prefill:
            _, prefill = predict_latency(
                row.target, row.shape, row.shape.tensors, 512, "f16", row.engine, row.expert_share
            )
            errors.append(abs(prefill.value / row.prefill - 1))
            assert prefill.ci_low is not None
            assert prefill.ci_high is not None
            inside.append(prefill.ci_low <= row.prefill <= prefill.ci_high)
    if not errors:
        return {"rows": 0}
    return {
        "rows": len(errors),
        "median": round(quantile(errors, 0.5), 4),
        "p90": round(quantile(errors, 0.9), 4),
        "coverage": round(statistics.fmean(inside), 4),
    }


def main() -> None:
    """Read the rows, print a table per target and engine, the summaries, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--points", type=int, default=3, help="rows of other models that a held-out fit takes at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--constants", action="store_true", help="print the constants fitted to each group")
    parser.add_argument("--all-rows", action="store_true", help="print every row with its prediction")
    asked = parser.parse_args()
    with asked.rows.open(newline="", encoding="utf-8") as file:
        read = [read_row(fields) for fields in csv.DictReader(file)]
    left_out = [why for why in read if isinstance(why, str)]
    rows = [row for row in read if isinstance(row, Row)]
    dense = [row for row in rows if row.dense]
    ways = {
        "catalog": by_catalog(dense),
        "class": pooled(dense),
        "in sample": in_sample(dense),
        "held out": held_out(dense, asked.points, asked.seed),
        "strict": held_out(dense, asked.points, asked.seed, strict=True),
    }
    print(f"{'target':<42} {'engine':<18} {'rows':>4}" + "".join(f" {way + ' med':>14} {'p90':>5}" for way in ways))
    for group in groups(dense):
        cells = []
        for outcomes in ways.values():
            errors = [outcome.error for outcome in outcomes if outcome.row.group == group]
            cells.append(
                f" {quantile(errors, 0.5):>14.1%} {quantile(errors, 0.9):>5.0%}" if errors else f" {'-':>14} {'-':>5}"
            )
        print(f"{group[0][:42]:<42} {group[1]:<18} {len(groups(dense)[group]):>4}" + "".join(cells))
        if asked.constants:
            members = groups(dense)[group]
            found = fit_constants([row.point for row in members], members[0].bandwidth, members[0].prior)
            print(f"  efficiency {found.efficiency:.3f}, overhead {found.overhead_s * 1e3:.2f} ms")
    if asked.all_rows:
        for outcome in ways["catalog"]:
            row = outcome.row
            error = outcome.predicted / row.decode - 1
            print(
                f"{row.target.title[:30]:<30} {row.engine:<18} {row.model[:26]:<26} "
                f"{row.point.traffic_bytes / 1e9:7.2f} GB {row.decode:8.2f} published {outcome.predicted:8.2f} "
                f"predicted {error:+.0%}"
            )
    summaries = {way: summary(outcomes) for way, outcomes in ways.items() if outcomes}
    mixtures = [row for row in rows if not row.dense]
    if mixtures:
        summaries["catalog, mixtures"] = summary(by_catalog(mixtures))
    for way, figures in summaries.items():
        print(
            f"{way:<18} {figures['rows']:>4} rows: median {figures['median']:.1%} {figures['median_interval']}, "
            f"p90 {figures['p90']:.1%} {figures['p90_interval']}, inside the range {figures['coverage']:.0%}"
        )
    prefill = prefill_summary(dense)
    print("prefill by the catalog:", prefill)
    print("left out:", "; ".join(left_out) or "none")
    print(json.dumps({"benchmark": "published_rates", "decode": summaries, "prefill": prefill, "left_out": left_out}))


if __name__ == "__main__":
    main()
