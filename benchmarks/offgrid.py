"""The same model off its grid: the residual stream turned by a random orthogonal matrix, the function unchanged.

A checkpoint made of a quantized GGUF lies on that format's grid and flatters every format of the same block size.
Rotation (QuaRot, arXiv:2404.00456, without its Hadamard structure) spreads each weight over all columns. With `--wide`,
the stream is turned into a space of more dimensions, a multiple of 256, so that k-quants apply to a model of 576.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def rotate(source: Path, out: Path, seed: int = 0, *, wide: bool = False) -> None:
    """Write the rotated twin of a llama-like checkpoint, in float16 with an untied head.

    Every RMSNorm weight is folded into the linears that read it; then embedding and head take Q on their columns,
    readers (q, k, v, gate, up) Q on theirs, and writers (o, down) the transpose on their rows. A wide Q has orthonormal
    rows; the mean square of a norm is then over more dimensions, of which the readers take the root.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    generator = torch.Generator().manual_seed(seed)
    size = model.config.hidden_size
    wider = -(-size // 256) * 256 if wide else size
    q, r = torch.linalg.qr(torch.randn(wider, wider, generator=generator, dtype=torch.float64))
    q = (q * torch.sign(torch.diagonal(r)))[:size]
    if wide:
        model = widen(model, wider, generator)

    def turn(weight: torch.Tensor) -> torch.Tensor:
        return (weight.double() @ q).float()

    with torch.no_grad():
        body, head = model.model, torch.nn.Linear(wider, model.config.vocab_size, bias=False)
        shrink = (size / wider) ** 0.5
        head.weight.copy_(turn(model.lm_head.weight * body.norm.weight) * shrink)
        body.embed_tokens.weight = torch.nn.Parameter(turn(body.embed_tokens.weight))
        body.norm.weight = ones(wider)
        for layer in body.layers:
            readers = {
                layer.input_layernorm: [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"],
                layer.post_attention_layernorm: [layer.mlp.gate_proj, layer.mlp.up_proj],
            }
            for norm, linears in readers.items():
                for linear in linears:
                    linear.weight = torch.nn.Parameter(turn(linear.weight * norm.weight) * shrink)
                norm.weight = ones(wider)
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight = torch.nn.Parameter(turn(writer.weight.T).T.contiguous())
    model.config.tie_word_embeddings = False
    model.lm_head = head
    model.half().save_pretrained(out)
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(out)
    # older tools read only the top-level field
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def ones(size: int) -> torch.nn.Parameter:
    """The weights of a norm that only divides."""
    return torch.nn.Parameter(torch.ones(size))


def widen(model: Any, hidden: int, generator: torch.Generator) -> Any:
    """A model with so many inputs of its output projections: the last head of each group becomes two.

    Both ask the same; what reads them is split between the two at random, so that their sum is what it was.
    """
    config = copy.deepcopy(model.config)
    groups, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    before, after = config.num_attention_heads // groups, hidden // size // groups
    if (after - before) * size * groups != hidden - config.hidden_size or after > 2 * before:
        raise SystemExit(
            f"a model of {config.num_attention_heads} heads in {groups} groups cannot become {hidden} wide"
        )
    with torch.no_grad():
        for layer in model.model.layers:
            q, o = layer.self_attn.q_proj, layer.self_attn.o_proj
            rows, columns = q.weight.view(groups, before, size, -1), o.weight.view(-1, groups, before, size)
            again = slice(2 * before - after, before)
            part = torch.rand(columns[:, :, again].shape, generator=generator) / 2 + 0.25
            kept, split = columns[:, :, : again.start], columns[:, :, again]
            rows = torch.cat([rows, rows[:, again]], 1)
            columns = torch.cat([kept, split * part, split * (1 - part)], 2)
            q.weight = torch.nn.Parameter(rows.reshape(hidden, -1))
            o.weight = torch.nn.Parameter(columns.reshape(-1, hidden))
    config.rms_norm_eps *= config.hidden_size / hidden
    config.update({"hidden_size": hidden, "num_attention_heads": after * groups, "head_dim": size})
    model.config = config
    return model


def main() -> None:
    """Rotate the checkpoint at SOURCE into OUT and say how far the logits moved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wide", action="store_true", help="turn it into more dimensions, a multiple of 256")
    arguments = parser.parse_args()
    rotate(arguments.source, arguments.out, wide=arguments.wide)
    tokens = torch.arange(1, 257)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)(tokens).logits[0]
        for path in (arguments.source, arguments.out)
    ]
    ours, theirs = (torch.log_softmax(part.double(), -1) for part in logits)
    divergence = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    print(f"KL divergence of the rotated model: {divergence:.2e} nats")
    print(json.dumps({"script": "offgrid", "kl_divergence_nats": divergence}))


if __name__ == "__main__":
    main()
