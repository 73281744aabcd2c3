"""experiments/overhead: the three kinds of step that are timed are the same step."""

import jax
import numpy as np
import parity
import pytest

from experiments.overhead import run
from lcm_jax.runtime.mesh import make_mesh


@pytest.mark.slow
def test_kinds_are_one_step(tmp_path, monkeypatch):
    """The step without metrics ends where the bare one does; the loop's has other rows of the same data."""
    monkeypatch.setattr(run, "EXAMPLES", 8)
    monkeypatch.setattr(run.mesh_lib, "make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
    read = run.stage.read_config

    def small(path):
        config = read(path)
        config.data.batch_size = 2
        return config

    monkeypatch.setattr(run.stage, "read_config", small)
    config = run.make_config(tmp_path)
    (tmp_path / "run").mkdir()
    with run.opened(config, tmp_path / "run", 2) as (state, step_of):
        assert set(step_of) == set(run.KINDS)
        begun = jax.tree.map(np.array, state)
        ends = {kind: jax.tree.map(np.array, step_of[kind](jax.tree.map(jax.numpy.array, begun))) for kind in run.KINDS}
    for kind in ("lean", "loop"):
        for got, want in zip(*(jax.tree.leaves(ends[name].ema_params) for name in (kind, "bare")), strict=True):
            assert got.shape == want.shape and np.isfinite(got).all()
            if kind == "lean":
                parity.close(got, want, rtol=0, of_max=parity.NETWORK)
    moved = jax.tree.map(lambda end, begin: np.abs(end - begin).max(), ends["bare"].ema_params, begun.ema_params)
    assert max(jax.tree.leaves(moved)) > 0
    found = run.summary({kind: [1.0, 2.0, 3.0] for kind in run.KINDS}, 2)
    assert found["overhead"] == 0 and found["metrics"] == 0
