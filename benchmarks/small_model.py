"""Train a small llama on the text that comes with Python, so that a benchmark has weights on no grid at all.

Hidden size 512, so that k-quants of 256 weights apply. Only the calibration splits are read: what a benchmark judges on
stays unseen. It writes prose and code that look right from afar, which is all that rounding its weights needs.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from edgekit.calibration import pieces
from edgekit.huggingface import load_tokenizer

VOCABULARY, HIDDEN, LAYERS, LENGTH, BATCH = 4096, 512, 6, 256, 8
TEXTS = ("python-docs", "python-code")


def write_tokenizer(out: Path) -> None:
    """Train a byte-pair vocabulary on the text."""
    import sentencepiece
    import transformers

    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            line for text in TEXTS for piece in pieces(text, "calibration") for line in piece.split("\n")
        ),
        model_writer=stream,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        input_sentence_size=200_000,
        shuffle_input_sentence=True,
        num_threads=1,
        minloglevel=2,
    )
    (out / "tokenizer.model").write_bytes(stream.getvalue())
    transformers.LlamaTokenizer.from_pretrained(out, legacy=False, add_bos_token=True).save_pretrained(out)
    settings = out / "tokenizer_config.json"
    # the plain class takes tokenizer.json as it is
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))


def main() -> None:
    """Train for some minutes and write the checkpoint."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="directory for the checkpoint")
    parser.add_argument("--minutes", type=float, default=15)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(arguments.out)
    tokenizer = load_tokenizer(arguments.out)
    text = [tokenizer(piece)["input_ids"] for name in TEXTS for piece in pieces(name, "calibration")]
    order = np.random.default_rng(0).permutation(len(text))
    tokens = torch.from_numpy(np.concatenate([text[index] for index in order]).astype(np.int64))
    print(f"{len(tokens)} tokens of text", file=sys.stderr)
    torch.manual_seed(0)
    # by bfloat16 where the processor has units for that
    torch.set_float32_matmul_precision("medium")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.05)
    begun, step = time.monotonic(), 0
    while (share := (time.monotonic() - begun) / (60 * arguments.minutes)) < 1:
        # a short rise, then a cosine over the time that is left
        rate = 1.5e-3 * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,))
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"{step} steps, {share:.0%}: {loss.item():.3f} nats a token", file=sys.stderr)
    model.to(torch.float16).save_pretrained(arguments.out)
    print(f"{step} steps of {BATCH * LENGTH} tokens; last loss {loss.item():.3f} nats a token")


if __name__ == "__main__":
    main()
