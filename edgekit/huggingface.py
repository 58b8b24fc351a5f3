"""Loading a checkpoint with transformers, the same safe way everywhere: local files, safetensors, no remote code."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.artifact import Artifact
from edgekit.calibration import Generated, Split, find_text_set, generate_windows, token_windows
from edgekit.errors import InputError

# read by tqdm when it is imported; some of transformers' bars ignore its own switch
os.environ.setdefault("TQDM_DISABLE", "1")
# torchao registers enums with torch and is warned of it, which no user can change
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
# they warn of GPU kernels that a processor has no use for
for _name in ("torchao", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars and warnings: stages report progress themselves."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as messages

    verbosity = messages.get_verbosity()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
        messages.enable_progress_bar()


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Return the tokenizer of a checkpoint. Raises InputError when it cannot be read."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code, **options
            )
    except Exception as error:  # transformers raises any kind for a damaged tokenizer; all are the file's fault
        raise InputError(f"a tokenizer in {directory}", _first_line(error), "fetch the model's files again") from None


def load_model(directory: Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Return the causal language model of a checkpoint in float32, ready for inference on the CPU.

    Raises InputError when transformers refuses it or tensors are missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=None if "gguf_file" in options else True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise InputError(
            f"a model that transformers loads from {directory}", _first_line(error), "check the model's files"
        ) from None
    if missing := info.get("missing_keys"):
        raise InputError(f"every tensor of the model in {directory}", f"{min(missing)} missing", "fetch it again")
    return model.eval()


def open_checkpoint(model: Artifact) -> tuple[Any, Any]:
    """Return tokenizer and model of a checkpoint artifact."""
    trust = bool(model.facts["trust_remote_code"])
    return (
        load_tokenizer(model.path, trust_remote_code=trust),
        load_model(model.path, trust_remote_code=trust),
    )


def text_windows(tokenizer: Any, text: str, split: Split, count: int, length: int) -> npt.NDArray[np.int32]:
    """Windows of a text set, shape (count, length), begun with BOS where the tokenizer does so by itself."""
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = tokenizer.bos_token_id if begins else None
    return token_windows(text, split, count, length, lambda t: tokenizer(t, add_special_tokens=False)["input_ids"], bos)


def calibration_windows(
    tokenizer: Any,
    open_network: Callable[[], Any],
    text: str,
    count: int,
    length: int,
    progress: Callable[[int, int], None],
) -> npt.NDArray[np.int32]:
    """Windows of a calibration set, shape (count, length); `open_network` is called where the model writes its own."""
    source = find_text_set(text).source
    if not isinstance(source, Generated):
        return text_windows(tokenizer, text, "calibration", count, length)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return generate_windows(source, open_network(), count, length, bos, progress)


def _first_line(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
