"""PyTorch through transformers: the engine whose arithmetic the others are compared with, in float32."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.engine import Capabilities, Closing, EngineOptions, Entry, FloatArray, StepOutput
from edgekit.engines._tokenizer import Tokenizer
from edgekit.errors import InputError, ToolError

DISTRIBUTION = "torch"
RUNS = ("checkpoint", "checkpoint[gptq]", "checkpoint[awq]", "checkpoint[bnb]")
NEEDS = "a CUDA GPU or a desktop processor: PyTorch itself takes hundreds of MiB"
KV_TYPES = ("f32",)

_UNQUANTIZED = {"f32", "f16"}


def open_model(path: Path, options: EngineOptions) -> TorchReference:
    """Load a checkpoint's directory: safetensors, `tokenizer.json`, no code of the publisher's.

    What is not quantized is computed in float32, and so is the KV cache: `f16` is taken for "not quantized" here.
    The number of threads is torch's, one for the whole process.

    Raises:
        InputError: a file is missing, damaged or unsafe, or the options ask for what it cannot do.
        ToolError: torch, transformers or what the checkpoint's quantization needs is not installed.
    """
    return TorchReference(path, options)


def build_info() -> dict[str, str]:
    """Versions of torch and transformers, and the accelerator that torch sees."""
    torch = _library()
    return {
        "engine": "torch_reference",
        "version": importlib.metadata.version(DISTRIBUTION),
        "transformers": importlib.metadata.version("transformers"),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


class TorchReference(Closing):
    """An open model with one cache per sequence.

    A step computes its sequences one after the other: `batch` is false, and taking several together saves nothing.
    Tensors of a cache are never written to, so that a fork shares its parent's past.
    """

    def __init__(self, path: Path, options: EngineOptions) -> None:
        _check_options(options)
        torch = self._torch = _library()
        self._path = path
        self._tokenizer = Tokenizer(path)
        self._device = "cuda" if options.accelerate and torch.cuda.is_available() else "cpu"
        torch.set_num_threads(options.cpu_threads)
        self._network: Any = _load(path, self._device)
        self._size = int(self._network.get_output_embeddings().weight.shape[0])
        self._embedding_size = int(self._network.get_input_embeddings().embedding_dim)
        self._last_hidden: Any = None
        # the trunk ends with the final norm; the head, which may scale or cap, is the class's around it
        self._network.base_model.register_forward_hook(self._keep_hidden)
        self._caches: dict[int, Any] = {}
        self._free = list(range(options.sequences - 1, -1, -1))
        self._capabilities = Capabilities(
            fork=True,
            rewind=True,
            batch=False,
            hidden_states=True,
            input_embeddings=True,
            context_tokens=options.context_tokens,
            sequences=options.sequences,
            batch_tokens=options.batch_tokens,
        )

    def _keep_hidden(self, trunk: Any, inputs: Any, output: Any) -> None:
        self._last_hidden = output.last_hidden_state

    @property
    def capabilities(self) -> Capabilities:
        """What it can do with this model."""
        return self._capabilities

    @property
    def loaded(self) -> dict[str, str]:
        """The device that computes."""
        return {"device": self._device}

    @property
    def vocabulary_size(self) -> int:
        """Width of a row of logits, padding of the vocabulary included."""
        return self._size

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a generation."""
        return frozenset(token for token in self._tokenizer.end_tokens if token < self._size)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Encode text; `special` parses control tokens in it and adds the BOS where the tokenizer does."""
        self._open()
        return self._tokenizer.tokenize(text, special=special)

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """Decode tokens to bytes, piece by piece. Control tokens give nothing."""
        self._open()
        for token in tokens:
            self._check_token(token)
        return self._tokenizer.detokenize(tokens)

    def start(self) -> int:
        """Return a new empty sequence. Raises InputError when all are in use."""
        self._open()
        if not self._free:
            found = f"all {self._capabilities.sequences} in use"
            raise InputError("a free sequence", found, "release one, or open the model with more `sequences`")
        sequence = self._free.pop()
        self._caches[sequence] = self._empty_cache()
        return sequence

    def fork(self, sequence: int) -> int:
        """Return a new sequence with the same past, which both share."""
        cache = self._cache(sequence)
        fork = self.start()
        self._caches[fork] = _shared(cache)
        return fork

    def truncate(self, sequence: int, length: int) -> None:
        """Forget everything after the first `length` positions."""
        cache, held = self._cache(sequence), self.length(sequence)
        if not 0 <= length <= held:
            raise InputError(f"a length from 0 to {held}", str(length), "truncate to a position that was stepped")
        if length == 0:
            self._caches[sequence] = self._empty_cache()
        else:
            cache.crop(length - held)

    def release(self, sequence: int) -> None:
        """Forget the sequence and free its slot."""
        self._cache(sequence)
        del self._caches[sequence]
        self._free.append(sequence)

    def length(self, sequence: int) -> int:
        """Positions that the sequence holds."""
        return int(self._cache(sequence).get_seq_length())

    def step(self, entries: Sequence[Entry], *, hidden_states: bool = False) -> StepOutput:
        """Compute entries (several of one sequence follow each other) and return copies of the wanted rows.

        A sequence's entries take one forward pass per `batch_tokens` of one kind, token or embedding. Nothing is
        computed when an entry is wrong.

        Raises:
            InputError: an entry is malformed, its sequence is not alive, or a sequence would outgrow the context.
            ToolError: torch failed; the sequence that it failed on is as it was before that pass.
        """
        self._open()
        self._check_entries(entries)
        numbered = list(itertools.accumulate((entry.wants_logits for entry in entries), initial=0))
        logits = np.empty((numbered[-1], self._size), np.float32)
        hidden = np.empty((numbered[-1], self._embedding_size), np.float32) if hidden_states else None
        by_sequence: dict[int, list[tuple[Entry, int]]] = {}
        for entry, row in zip(entries, numbered, strict=False):
            by_sequence.setdefault(entry.sequence, []).append((entry, row))
        for sequence, part in by_sequence.items():
            for chunk in _chunks(part, self._capabilities.batch_tokens):
                wanted = [index for index, (entry, _) in enumerate(chunk) if entry.wants_logits]
                rows = [chunk[index][1] for index in wanted]
                logits_here, hidden_here = self._forward(sequence, [entry for entry, _ in chunk], wanted)
                logits[rows] = logits_here
                if hidden is not None:
                    hidden[rows] = hidden_here
        return StepOutput(logits, hidden)

    def _forward(self, sequence: int, entries: Sequence[Entry], wanted: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        torch = self._torch
        # layers that succeeded before one that fails have grown
        cache = _shared(self._caches[sequence])
        inputs: dict[str, Any]
        if entries[0].token is not None:
            inputs = {"input_ids": torch.tensor([[entry.token for entry in entries]], device=self._device)}
        else:
            rows = torch.from_numpy(np.array([[entry.embedding for entry in entries]], np.float32))
            inputs = {"inputs_embeds": rows.to(self._device)}
        keep = torch.tensor(wanted, dtype=torch.long, device=self._device)
        try:
            with torch.inference_mode():
                output = self._network(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep)
                logits = output.logits[0].float().cpu().numpy()
                hidden = self._last_hidden[0, keep].float().cpu().numpy()
        except (RuntimeError, MemoryError) as error:
            reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
            raise ToolError(f"a step of {len(entries)} tokens", reason, "use a shorter context") from None
        finally:
            self._last_hidden = None
        self._caches[sequence] = cache
        return logits, hidden

    def _check_entries(self, entries: Sequence[Entry]) -> None:
        lengths: dict[int, int] = {}
        for entry in entries:
            length = lengths.get(entry.sequence)
            lengths[entry.sequence] = (self.length(entry.sequence) if length is None else length) + 1
            if (entry.token is None) == (entry.embedding is None):
                raise InputError("an entry with a token or an embedding", "both or neither", "give exactly one")
            if entry.token is not None:
                self._check_token(entry.token)
            elif entry.embedding is not None and entry.embedding.shape != (self._embedding_size,):
                wanted = f"an input embedding of shape ({self._embedding_size},)"
                raise InputError(wanted, str(entry.embedding.shape), "use this model's embedding width")
        most = self._capabilities.context_tokens
        for sequence, length in lengths.items():
            if length > most:
                found = f"{length} in sequence {sequence}"
                raise InputError(
                    f"a sequence of at most {most} tokens", found, "open the model with more `context_tokens`"
                )

    def _check_token(self, token: int) -> None:
        if not 0 <= token < self._size:
            raise InputError(f"a token from 0 to {self._size - 1}", str(token), "use this model's tokenizer")

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache

        # without the config every layer keeps all positions, those of a sliding window, too: a rewind finds them
        return DynamicCache()

    def _cache(self, sequence: int) -> Any:
        self._open()
        if sequence not in self._caches:
            raise InputError("a sequence from start() or fork()", f"{sequence}, which is not alive", "start one")
        return self._caches[sequence]

    def _open(self) -> None:
        if self._network is None:
            raise InputError("an open model", f"{self._path} was closed", "open it again")

    def close(self) -> None:
        """Free the model; later calls raise InputError."""
        self._network = None
        self._caches.clear()


def _library() -> Any:
    try:
        import torch
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ToolError(f"the package {error.name}", "it is not installed", "pip install 'edgekit[build]'") from None
    return torch


def _load(path: Path, device: str) -> Any:
    import torch

    from edgekit.huggingface import load_model

    placement: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}
    # GPTQModel, which transformers loads for its checkpoints, greets on stdout
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        network = load_model(path, **placement)
    # it says for every product of an int8 matrix that the input is cast
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in network.modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes dequantizes to it
            module.compute_dtype = torch.float32
    for parameter in network.parameters():
        # transformers leaves what bitsandbytes did not quantize in 16 bits
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return network.eval()


def _shared(cache: Any) -> Any:
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


def _chunks(part: Sequence[tuple[Entry, int]], most: int) -> Iterator[list[tuple[Entry, int]]]:
    for _, run in itertools.groupby(part, key=lambda pair: pair[0].token is None):
        while chunk := list(itertools.islice(run, most)):
            yield chunk


def _check_options(options: EngineOptions) -> None:
    options.check_counts()
    if options.kv_type not in _UNQUANTIZED:
        raise InputError("a KV cache that is not quantized", repr(options.kv_type), f"use {KV_TYPES[0]}")
