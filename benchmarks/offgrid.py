"""The same model off its grid: the residual stream turned by a random orthogonal matrix, the function unchanged.

A checkpoint made of a quantized GGUF lies on that format's grid and flatters every format of the same block size.
Rotation (QuaRot, arXiv:2404.00456, without its Hadamard structure) spreads each weight over all columns.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def rotate(source: Path, out: Path, seed: int = 0) -> None:
    """Write the rotated twin of a llama-like checkpoint, in float16 with an untied head.

    Every RMSNorm weight is folded into the linears that read it; then embedding and head take Q on their columns,
    readers (q, k, v, gate, up) Q on theirs, and writers (o, down) the transpose on their rows.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    generator = torch.Generator().manual_seed(seed)
    size = model.config.hidden_size
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    q = q * torch.sign(torch.diagonal(r))

    def turn(weight: torch.Tensor) -> torch.Tensor:
        return (weight.double() @ q).float()

    with torch.no_grad():
        body, head = model.model, torch.nn.Linear(size, model.config.vocab_size, bias=False)
        head.weight.copy_(turn(model.lm_head.weight * body.norm.weight))
        body.embed_tokens.weight = torch.nn.Parameter(turn(body.embed_tokens.weight))
        body.norm.weight.fill_(1)
        for layer in body.layers:
            readers = {
                layer.input_layernorm: [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"],
                layer.post_attention_layernorm: [layer.mlp.gate_proj, layer.mlp.up_proj],
            }
            for norm, linears in readers.items():
                for linear in linears:
                    linear.weight.copy_(turn(linear.weight * norm.weight))
                norm.weight.fill_(1)
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(turn(writer.weight.T).T)
    model.config.tie_word_embeddings = False
    model.lm_head = head
    model.half().save_pretrained(out)
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(out)
    # older tools read only the top-level field
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Rotate the checkpoint at SOURCE into OUT and say how far the logits moved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    rotate(arguments.source, arguments.out)
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
