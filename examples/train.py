"""Trains a small Llama-style model on real text, each step under a plan of its own.

heteromesh run --nproc-per-node 2 examples/train.py --run-dir runs/first
heteromesh run --nproc-per-node 2 examples/train.py --data notes/ --max-length 16384 --run-dir runs/notes
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

import heteromesh as hm
from heteromesh.runtime.data.documents import open_corpus
from heteromesh.runtime.data.tokenizer import load_tokenizer
from heteromesh.runtime.data.tokens import Progress, open_tokens
from llama import Llama, LlamaConfig

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "heteromesh"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="python-stdlib", help="folder, .txt, .jsonl or .parquet (default: Python's own)"
    )
    parser.add_argument("--field", default="text", help="of a JSON line or Parquet row")
    parser.add_argument("--tokenizer", default="bytes", help="'bytes' or a Hugging Face tokenizer.json")
    parser.add_argument("--max-length", type=int, default=8192, help="longest sequence, in tokens")
    parser.add_argument("--batch-tokens", type=int, default=24576, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--run-dir", default="runs/example")
    parser.add_argument("--resume", action="store_true", help="continue the run in --run-dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--meta", action="store_true", help="a model without weights at first, so it need fit no rank")
    parser.add_argument("--shard-weights", action="store_true", help="each rank keeps a part of the parameters")
    parser.add_argument("--shard-optimizer", action="store_true", help="each rank updates a part of the parameters")
    parser.add_argument("--fault-tolerance", action="store_true", help="go on without lost ranks (as `heteromesh run`)")
    parser.add_argument("--checkpoint-every", type=int, default=0, help="steps; 0: only at the end")
    parser.add_argument("--compare-batches", type=int, default=0, help="time so many batches under static layouts too")
    return parser.parse_args()


def show(progress: Progress) -> None:
    print(f"\rreading documents {progress.fraction:.0%}", end="", file=sys.stderr, flush=True)


def main() -> None:
    options = parse()
    first = hm.is_first()
    tokenizer = load_tokenizer(options.tokenizer)
    corpus = open_corpus(options.data, field=options.field)
    progress = show if first and sys.stderr.isatty() else None
    store = open_tokens(corpus, tokenizer, max_length=options.max_length, cache_dir=CACHE, progress=progress)
    model = build(options, store.vocab_size)
    if first:
        print(store.describe())
        print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, {model.config}", flush=True)
    config = hm.TrainerConfig(
        batch_tokens=options.batch_tokens,
        max_steps=options.steps,
        run_dir=options.run_dir,
        resume=options.resume,
        seed=options.seed,
        learning_rate=options.learning_rate,
        precision=options.precision,
        shard_optimizer=options.shard_optimizer,
        shard_weights=options.shard_weights or "auto",
        fault_tolerance=options.fault_tolerance,
        checkpoint_every=options.checkpoint_every,
        compare_batches=options.compare_batches,
    )
    report = hm.Trainer(model, None, store, config).fit()
    if first:
        print(report.summary())
        print(f"wrote {options.run_dir}: config.json, plan.jsonl, metrics.jsonl, trace.json, checkpoints/")


def build(options: argparse.Namespace, vocab: int) -> Llama:
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab=vocab,
        layers=options.layers,
        hidden=options.hidden,
        heads=options.heads,
        kv_heads=options.kv_heads,
        intermediate=-(-options.hidden * 8 // 3 // 16) * 16,
    )
    with torch.device("meta" if options.meta else "cpu"):
        return Llama(config)


if __name__ == "__main__":
    main()
