"""Memory that a bundle needs on its target, part by part, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.formats.gguf import tensor_bytes
from edgekit.model import ModelShape

_CELL_PADDING = 256


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
