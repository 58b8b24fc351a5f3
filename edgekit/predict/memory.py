"""Memory that a bundle needs on its target, part by part, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.formats.gguf import tensor_bytes
from edgekit.measurement import Measurement
from edgekit.model import ModelShape
from edgekit.stage import Tensor
from edgekit.target import Target

_CELL_PADDING = 256
_MOST_AT_ONCE = 512
"""Tokens that llama.cpp computes at once, whatever the batch."""
PROCESS_BYTES = 58 << 20
"""Python, numpy and llama.cpp's libraries in the process that measures, with no model open."""
_VOCABULARY_ENTRY_BYTES = 430
"""A token in llama.cpp's tables and in the file, merges included."""
REPACKED = ("q4_0", "q4_K", "iq4_nl")
"""Types that llama.cpp copies into another order for the CPU's vector instructions; the file stays mapped."""
_REPACKED_ROWS = 8
PEAK_RANGE = 0.05
"""Half-width of the range of a predicted peak, relative."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the target. `margin_bytes` is kept free for what the formulas do not see."""

    weight_bytes: int
    companion_bytes: int
    """Weights of the verifier, and what a trunk of its own needs beside them."""
    kv_cache_bytes: int
    compute_buffer_bytes: int
    margin_bytes: int
    usable_bytes: int

    @property
    def required_bytes(self) -> int:
        """Everything the bundle occupies, margin included."""
        model = self.weight_bytes + self.kv_cache_bytes + self.compute_buffer_bytes
        return model + self.companion_bytes + self.margin_bytes

    @property
    def fits(self) -> bool:
        """Whether the target's usable memory holds it."""
        return self.required_bytes <= self.usable_bytes


def kv_cache_bytes(shape: ModelShape, context_tokens: int, kv_type: str = "f16", sequences: int = 1) -> int:
    """Bytes of the KV cache: per layer and cell one key and one value row per KV head.

    Cells are padded to a multiple of 256, as llama.cpp does with flash attention.
    """
    cells = -(-context_tokens // _CELL_PADDING) * _CELL_PADDING * sequences
    key = tensor_bytes(kv_type, (shape.key_dim * shape.kv_heads, cells))
    value = tensor_bytes(kv_type, (shape.value_dim * shape.kv_heads, cells))
    return shape.layers * (key + value)


def compute_buffer_bytes(shape: ModelShape, context_tokens: int, batch_tokens: int = 512) -> int:
    """Bytes of activations (f32) for one batch: two copies of the hidden states and the widest result beside them.

    llama.cpp reserves the worst case, logits at every position of the batch, and lets results that are not alive at
    the same time share memory.
    """
    rows = min(batch_tokens, context_tokens)
    attention = 3 * shape.heads * shape.key_dim
    return 4 * rows * (2 * shape.hidden + max(attention, 2 * shape.feed_forward, shape.vocabulary))


def repacked_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the copies that llama.cpp makes on a CPU for faster kernels: matrices of whole groups of eight rows."""
    return sum(
        tensor.nbytes
        for tensor in tensors
        if tensor.type in REPACKED
        and tensor.name not in ("token_embd.weight", "output.weight")
        and len(tensor.shape) > 1
        and tensor.shape[1] % _REPACKED_ROWS == 0
    )


def peak_rss_bytes(
    shape: ModelShape,
    tensors: Sequence[Tensor],
    context_tokens: int,
    kv_type: str = "f16",
    *,
    sequences: int = 1,
    batch_tokens: int = 512,
    prompt_tokens: int = 128,
    copies: bool = True,
) -> int:
    """Peak resident bytes of a process that opens the model with llama.cpp on the CPU and reads one prompt.

    More than `required_bytes` in what the process itself takes and in the repacked copies (left out without `copies`);
    less in the compute buffers, of which only what the prompt needs becomes resident, with logits at its end alone.
    """
    rows = min(batch_tokens, _MOST_AT_ONCE, prompt_tokens)
    attention = 3 * shape.heads * shape.key_dim
    cells = -(-prompt_tokens // _CELL_PADDING) * _CELL_PADDING
    # the attention mask is made in f32 and used in f16
    touched = rows * (4 * (2 * shape.hidden + max(attention, 2 * shape.feed_forward)) + 6 * cells)
    fixed = PROCESS_BYTES + _VOCABULARY_ENTRY_BYTES * shape.vocabulary + 8 * shape.vocabulary
    weights = sum(tensor.nbytes for tensor in tensors) + (repacked_bytes(tensors) if copies else 0)
    return fixed + weights + kv_cache_bytes(shape, context_tokens, kv_type, sequences) + touched


def plan_memory(
    shape: ModelShape,
    weight_bytes: int,
    usable_bytes: int,
    context_tokens: int,
    kv_type: str = "f16",
    companion_bytes: int = 0,
) -> MemoryPlan:
    """Add up what one sequence of `context_tokens` needs, beside a companion.

    The margin is 5% of the usable memory, at most 1 GiB: llama.cpp's own `--fit` keeps 1 GiB.
    """
    return MemoryPlan(
        weight_bytes=weight_bytes,
        companion_bytes=companion_bytes,
        kv_cache_bytes=kv_cache_bytes(shape, context_tokens, kv_type),
        compute_buffer_bytes=compute_buffer_bytes(shape, context_tokens),
        margin_bytes=min(usable_bytes // 20, 1 << 30),
        usable_bytes=usable_bytes,
    )


def predict_peak(
    target: Target, shape: ModelShape, tensors: Sequence[Tensor], context_tokens: int, kv_type: str, engine: str
) -> list[Measurement]:
    """Predict the peak that a latency measurement of one sequence shows, as `peak_rss_bytes`.

    Only for llama.cpp on a CPU: elsewhere the weights are not in the memory of the process. Which types an Arm
    processor has copied depends on its instructions and the build, so the range there begins without copies.
    """
    if engine != "llama_cpp" or target.compute.accelerator != "none":
        return []
    peak, least = (peak_rss_bytes(shape, tensors, context_tokens, kv_type, copies=copies) for copies in (True, False))
    if target.arch == "x86_64":
        least = peak
    return [
        Measurement(
            name="peak_rss_bytes",
            value=peak,
            unit="bytes",
            kind="predicted",
            ci_low=least * (1 - PEAK_RANGE),
            ci_high=peak * (1 + PEAK_RANGE),
            device=target.name,
            note=f"{repacked_bytes(tensors) / 2**20:,.0f} MiB of it copies of weights for faster kernels",
        )
    ]
