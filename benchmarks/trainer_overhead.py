"""A Trainer step against a bare PyTorch loop's on the same batch, in one process.

    python benchmarks/trainer_overhead.py [--steps 30]

After each of the Trainer's steps the bare loop makes the same step, from the same weights, on one thread: what disturbs
the machine for longer than a few seconds disturbs both. Reported is the median over the steps, without the first two,
of the ratio of each step's CPU seconds and of its wall seconds. The Trainer does all that it does otherwise: planning,
metrics, trace, clipping.
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
RATE = 1e-3
Seconds = tuple[float, float]


class Turns(torch.optim.AdamW):
    """The Trainer's optimizer: at the end of each of its updates the bare loop has its turn at the same step."""

    def __init__(self, model: Llama, bare: BareLoop) -> None:
        super().__init__(model.parameters(), lr=RATE)
        self._bare = bare
        self._mark = clocks()
        self.ours: list[Seconds] = []
        self.theirs: list[Seconds] = []

    def step(self, closure: None = None) -> None:
        super().step(closure)
        start = clocks()
        self.ours.append(difference(self._mark, start))
        self._bare.step()
        self._mark = clocks()
        self.theirs.append(difference(start, self._mark))


class BareLoop:
    """The loop that one would write by hand: sequence by sequence, loss by all valid tokens, clip, step."""

    def __init__(self, model: Llama, data: list[torch.Tensor]) -> None:
        self._model, self._data = model, data
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        self._sampler = Sampler([len(s) for s in data], batch_tokens=BATCH_TOKENS, seed=0)
        self.losses: list[float] = []

    def step(self) -> None:
        batch = [self._data[i] for i in self._sampler.next_batch().sequences]
        valid = sum(len(s) - 1 for s in batch)
        self._optimizer.zero_grad()
        loss = 0.0
        for tokens in batch:
            logits = self._model(tokens[None])[0]
            part = functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum") / valid
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self.losses.append(loss)


def clocks() -> Seconds:
    """(wall, CPU time of this process)"""
    return time.perf_counter(), time.process_time()


def difference(start: Seconds, end: Seconds) -> Seconds:
    return end[0] - start[0], end[1] - start[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Llama(LlamaConfig())
    data = [torch.randint(256, (n,)) for n in LENGTHS * 4]
    bare = BareLoop(copy.deepcopy(model), data)
    turns = Turns(model, bare)
    with tempfile.TemporaryDirectory() as folder:
        config = hm.TrainerConfig(batch_tokens=BATCH_TOKENS, max_steps=chosen.steps, run_dir=Path(folder) / "run")
        report = hm.Trainer(model, turns, data, config).fit()
    for ours, theirs in zip(report.losses, bare.losses, strict=True):
        assert abs(ours - theirs) < 1e-3 * theirs, (ours, theirs)
    pairs = list(zip(turns.ours, turns.theirs, strict=True))[WARM:]
    for name, i in (("wall", 0), ("CPU time", 1)):
        ratios = sorted(ours[i] / theirs[i] for ours, theirs in pairs)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        whole = sum(ours[i] for ours, _ in pairs) / sum(theirs[i] for _, theirs in pairs)
        middle = f"median of {len(ratios)} steps {statistics.median(ratios):.3f}x"
        print(f"{name}: {middle} (quartiles {low:.3f}x to {high:.3f}x), sum {whole:.3f}x")


if __name__ == "__main__":
    main()
