"""Trains while ranks die: lost ranks cost the others a fraction of a step, and come back.

heteromesh run --fault-tolerance --nproc-per-node 3 examples/elastic.py --run-dir runs/elastic
heteromesh run --fault-tolerance --nproc-per-node 3 --max-restarts 9 examples/elastic.py --lose-every 9 --run-dir runs/b

The second one kills a rank every nine seconds (on average). At the end it checks its own files: every sequence of every
batch was trained once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import torch

import heteromesh as hm
from heteromesh.runtime.data.documents import open_corpus
from heteromesh.runtime.data.tokenizer import load_tokenizer
from heteromesh.runtime.data.tokens import TokenStore, open_tokens
from heteromesh.runtime.work.sampler import Sampler
from llama import Llama, LlamaConfig

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "heteromesh"
NAME = os.environ.get("HETEROMESH_MEMBER_NAME", "this process")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", default="runs/elastic")
    parser.add_argument("--resume", action="store_true", help="continue the run in --run-dir")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens of a step")
    parser.add_argument("--max-length", type=int, default=4096, help="longest sequence, in tokens")
    parser.add_argument("--checkpoint-every", type=int, default=10, help="steps")
    parser.add_argument(
        "--shard-weights", action="store_true", help="each rank has a part of the weights, and a second"
    )
    parser.add_argument("--lose-every", type=float, default=0.0, help="seconds between two losses of a rank; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of the losses")
    return parser.parse_args()


def main() -> None:
    options = parse()
    store = open_tokens(open_corpus(), load_tokenizer(), max_length=options.max_length, cache_dir=CACHE)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab=store.vocab_size, layers=2, hidden=128, heads=4, kv_heads=2, intermediate=352))
    config = hm.TrainerConfig(
        batch_tokens=options.batch_tokens,
        max_steps=options.steps,
        run_dir=options.run_dir,
        resume=options.resume,
        checkpoint_every=options.checkpoint_every,
        fault_tolerance=True,
        shard_weights=options.shard_weights,
    )
    if options.lose_every and os.environ.get("LOCAL_RANK", "0") != "0":
        # the first rank stays: somebody must hold the state
        threading.Thread(target=lose, args=(options.lose_every, options.seed), daemon=True).start()
    report = hm.Trainer(model, None, store, config).fit()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(report.summary())
        print(check_ledger(Path(options.run_dir), store, options), flush=True)


def lose(seconds: float, seed: int) -> None:
    """Ends this process at a random moment, as if its machine had lost power."""
    others = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "2")) - 1)
    time.sleep(random.Random(hash((seed, NAME, time.monotonic_ns()))).expovariate(1 / (seconds * others)))
    os.kill(os.getpid(), signal.SIGKILL)


def check_ledger(folder: Path, store: TokenStore, options: argparse.Namespace) -> str:
    """What the run's own ledger says of its data."""
    sampler = Sampler(store.lengths, batch_tokens=options.batch_tokens, seed=0)
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    sequences, members = 0, set()
    for line in lines:
        trained = sorted(place for places in line["trained"].values() for place in places)
        batch = sampler.next_batch()
        assert trained == list(range(len(batch.lengths))), f"step {line['step']} trained {trained}"
        sequences += len(trained)
        members.update(member for together in line["trained"] for member in together.split("+"))
    return (
        f"{len(lines)} steps, {sequences} sequences: each was trained once, by {len(members)} ranks that came and went"
    )


if __name__ == "__main__":
    main()
