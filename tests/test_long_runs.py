"""A thousand steps of the training loop, whose step is a counter: memory, files, threads and logs do not grow."""

import os
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_train_failures import Program, run  # noqa: F401  run: a fixture

STEPS, THIRD = 1200, 400


@pytest.mark.slow
def test_nothing_grows(run, monkeypatch):  # noqa: F811
    process, seen, step_of = psutil.Process(), [], Program.step

    def written() -> int:
        return sum(path.stat().st_size for path in Path(run.workdir).glob("*.jsonl"))

    def watched(self, *arguments):
        seen.append((process.memory_info().rss, process.num_fds(), process.num_threads(), written()))
        return step_of(self, *arguments)

    monkeypatch.setattr(Program, "step", watched)
    run(**{"train.steps": STEPS, "checkpoint.every": 20, "checkpoint.keep": 3})
    memory, descriptors, threads, logs = np.array(seen).T
    assert len(seen) == STEPS
    first, last = slice(THIRD // 2, THIRD), slice(STEPS - THIRD // 2, STEPS)  # caches fill in the very first steps
    grown = (memory[last].mean() - memory[first].mean()) / (STEPS - THIRD)
    print(f"{grown:.0f} bytes a step; files {descriptors[last].max()}, threads {threads[last].max()}")
    assert grown < 2**14, "bytes of memory a step"
    assert descriptors[last].max() <= descriptors[first].max() + 2
    assert threads[last].max() <= threads[first].max() + 2
    growth = np.diff(logs[[THIRD // 2, THIRD, STEPS - THIRD // 2, STEPS - 1]])[[0, 2]]
    assert growth[1] == pytest.approx(growth[0], rel=0.1), "bytes of logs"
    assert len(os.listdir(Path(run.workdir, "checkpoints"))) == 3
