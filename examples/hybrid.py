"""Trains a hybrid model, three linear-attention layers to one of softmax attention, under a plan for every step.

    heteromesh run --nproc-per-node 2 examples/hybrid.py --run-dir runs/hybrid

Linear layers (retention, arXiv 2307.08621) cost the same per token whatever the length, and what their ranks exchange
does not grow with it; softmax layers follow the method that the plan picks (LASP-2H, arXiv 2502.07563).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import nn

import heteromesh as hm
from heteromesh.parallel.attention.api import linear_attention
from heteromesh.runtime.data.documents import open_corpus
from heteromesh.runtime.data.tokenizer import load_tokenizer
from heteromesh.runtime.data.tokens import open_tokens
from llama import Block, LlamaConfig, rotate

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "heteromesh"


class Retention(nn.Module):
    """Linear attention with a fixed decay per head, normalised per head and gated."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.dim = config.heads, config.hidden // config.heads
        self.decay = [1.0 - 2.0 ** (-5.0 - 4.0 * h / config.heads) for h in range(config.heads)]
        self.qkvg = nn.Linear(config.hidden, 4 * config.hidden, bias=False)
        self.norm = nn.RMSNorm(self.dim, eps=1e-5)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        parts = self.qkvg(x).unflatten(-1, (4 * self.heads, self.dim)).transpose(1, 2)
        q, k, v, gate = parts.chunk(4, 1)
        mixed = linear_attention(rotate(q, cos, sin), rotate(k, cos, sin) / self.dim**0.5, v, decay=self.decay)
        return self.out((self.norm(mixed) * functional.silu(gate)).transpose(1, 2).flatten(2))


class Hybrid(nn.Module):
    """Maps token ids (B, S) and their positions in their own sequence (B, S) to logits (B, S, vocab).

    pattern: one letter a layer, L (linear) or N (softmax); repeated as often as there are layers.
    """

    def __init__(self, config: LlamaConfig, pattern: str = "LLLN") -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        for index, layer in enumerate(self.layers):
            if pattern[index % len(pattern)] == "L":
                layer.attention = Retention(config)
        self.norm = nn.RMSNorm(config.hidden, eps=1e-5)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        dim = self.config.hidden // self.config.heads
        step = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim
        angles = position_ids.unsqueeze(1).unsqueeze(-1) / self.config.rope_theta**step
        cos, sin = (t.to(self.embed.weight.dtype) for t in (angles.cos(), angles.sin()))
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="python-stdlib", help="folder, .txt, .jsonl or .parquet (default: Python's own)"
    )
    parser.add_argument("--max-length", type=int, default=8192, help="longest sequence, in tokens")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--run-dir", default="runs/hybrid")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--pattern", default="LLLN", help="L: linear, N: softmax; one letter a layer")
    return parser.parse_args()


def main() -> None:
    options = parse()
    store = open_tokens(
        open_corpus(options.data), load_tokenizer("bytes"), max_length=options.max_length, cache_dir=CACHE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab=store.vocab_size, layers=options.layers, hidden=options.hidden, heads=4, kv_heads=2, intermediate=352
    )
    settings = hm.TrainerConfig(
        batch_tokens=options.batch_tokens, max_steps=options.steps, run_dir=options.run_dir, learning_rate=3e-3
    )
    report = hm.Trainer(Hybrid(config, options.pattern), None, store, settings).fit()
    if os.environ.get("RANK", "0") == "0" and report.losses:
        print(
            f"loss {report.losses[0]:.3f} -> {report.losses[-1]:.3f} in steps {report.first_step} to {report.last_step}"
        )


if __name__ == "__main__":
    main()
