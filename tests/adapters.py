"""Adapters of every kind, trained for a few steps on a tiny model: enough to change what it says."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny

LINEARS = ["q_proj", "v_proj", "down_proj"]
MERGEABLE = ("lora", "dora", "rslora", "adalora", "ia3", "loha", "lokr", "oft", "vera")
PROMPTS = ("prompt", "ptuning", "prefix")
VIRTUAL_TOKENS = 5


def config_of(method: str, **changes: Any) -> Any:
    """PEFT's configuration of a method."""
    import peft

    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    linears = {**common, "target_modules": LINEARS}
    lora = {**linears, "r": 4, "lora_alpha": 8}
    tokens = {**common, "num_virtual_tokens": VIRTUAL_TOKENS}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "lora": (peft.LoraConfig, lora),
        "dora": (peft.LoraConfig, {**lora, "use_dora": True}),
        "rslora": (peft.LoraConfig, {**lora, "use_rslora": True}),
        "adalora": (
            peft.AdaLoraConfig,
            {**linears, "init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 4},
        ),
        "ia3": (peft.IA3Config, {**linears, "feedforward_modules": ["down_proj"]}),
        "loha": (peft.LoHaConfig, {**linears, "r": 4, "alpha": 4}),
        "lokr": (peft.LoKrConfig, {**linears, "r": 4, "alpha": 4}),
        "oft": (peft.OFTConfig, {**linears, "oft_block_size": 16}),
        "boft": (peft.BOFTConfig, {**linears, "boft_block_size": 4}),
        "vera": (peft.VeraConfig, {**linears, "r": 16, "save_projection": True}),
        "prompt": (peft.PromptTuningConfig, tokens),
        "ptuning": (peft.PromptEncoderConfig, {**tokens, "encoder_hidden_size": 32}),
        "prefix": (peft.PrefixTuningConfig, tokens),
        "projected": (peft.PrefixTuningConfig, {**tokens, "prefix_projection": True, "encoder_hidden_size": 32}),
    }
    kind, fields = kinds[method]
    return kind(**{**fields, **changes})


def train(
    base: Path,
    out: Path,
    config: Any,
    *,
    steps: int = 4,
    rate: float = 0.02,
    rows: int = 1,
    quantization: Any = None,
    seed: int = 1,
) -> Path:
    """Train on `rows` pieces of `tiny.TEXT` and save as PEFT does; equal arguments give equal weights."""
    import peft
    import torch
    import transformers

    with quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, quantization_config=quantization
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokens = torch.tensor(tokenizer(tiny.TEXT)["input_ids"][: 48 * rows]).reshape(rows, 48)
        model = peft.get_peft_model(network, config)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate)
        for step in range(1, steps + 1):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            if config.peft_type == "ADALORA":
                model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        model.eval().save_pretrained(out)
    return out


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
