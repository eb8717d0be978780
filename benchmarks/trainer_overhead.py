"""A Trainer step against a bare PyTorch loop's on the same batches, in one process.

    python benchmarks/trainer_overhead.py [--pairs 5] [--steps 12]

Runs take turns in one process, on one thread; both sides train from the same weights. Reported are seconds of a step
by the wall clock and by the process's CPU clock (which a busy machine disturbs less), without each run's first two
steps. The Trainer does all that it does otherwise: planning, metrics, trace, clipping, checkpoint at the end.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as functional

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import heteromesh as hm
from heteromesh.runtime.work.sampler import Sampler
from llama import Llama, LlamaConfig

WARM = 2
LENGTHS = (2048, 96, 700, 1500, 333, 1024, 64, 2000)
BATCH_TOKENS = 4096


class Clock(torch.optim.AdamW):
    """AdamW that notes the clocks at the end of each update: the same mark on both sides."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        self.marks: list[tuple[float, float]] = []

    def step(self, closure: None = None) -> None:
        super().step(closure)
        self.marks.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> tuple[float, float]:
        """(wall, CPU) of a step, without the first steps."""
        first, last = self.marks[WARM - 1], self.marks[-1]
        steps = len(self.marks) - WARM
        return (last[0] - first[0]) / steps, (last[1] - first[1]) / steps


def trainer_run(model: Llama, data: list[torch.Tensor], steps: int) -> tuple[tuple[float, float], float]:
    """((wall, CPU) seconds of a step, last loss)."""
    optimizer = Clock(model.parameters(), lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        config = hm.TrainerConfig(batch_tokens=BATCH_TOKENS, max_steps=steps, run_dir=Path(folder) / "run")
        report = hm.Trainer(model, optimizer, data, config).fit()
    return optimizer.seconds(), report.losses[-1]


def bare_run(model: Llama, data: list[torch.Tensor], steps: int) -> tuple[tuple[float, float], float]:
    """The loop that one would write by hand: sequence by sequence, loss by all valid tokens, clip, step."""
    optimizer = Clock(model.parameters(), lr=1e-3)
    sampler = Sampler([len(s) for s in data], batch_tokens=BATCH_TOKENS, seed=0)
    loss = 0.0
    for _ in range(steps):
        batch = [data[i] for i in sampler.next_batch().sequences]
        valid = sum(len(s) - 1 for s in batch)
        optimizer.zero_grad()
        loss = 0.0
        for tokens in batch:
            logits = model(tokens[None])[0]
            part = functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum") / valid
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return optimizer.seconds(), loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = Llama(LlamaConfig())
    data = [torch.randint(256, (n,)) for n in LENGTHS * 4]
    ratios: list[tuple[float, float]] = []
    for pair in range(chosen.pairs):
        sides = [trainer_run, bare_run] if pair % 2 else [bare_run, trainer_run]
        results = {side: side(copy.deepcopy(start), data, chosen.steps) for side in sides}
        (ours, our_loss), (theirs, their_loss) = results[trainer_run], results[bare_run]
        assert abs(our_loss - their_loss) < 1e-3 * their_loss, (our_loss, their_loss)
        ratios.append((ours[0] / theirs[0], ours[1] / theirs[1]))
        print(
            f"pair {pair}: Trainer {ours[0] * 1e3:.1f} ms, bare loop {theirs[0] * 1e3:.1f} ms a step "
            f"({ratios[-1][0]:.3f}x by the wall, {ratios[-1][1]:.3f}x by CPU time)",
            flush=True,
        )
    for name, values in zip(("wall", "CPU time"), zip(*ratios, strict=True), strict=True):
        print(f"{name}: median {statistics.median(values):.3f}x, {min(values):.3f}x to {max(values):.3f}x")


if __name__ == "__main__":
    main()
