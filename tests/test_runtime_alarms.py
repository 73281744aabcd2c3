"""NaN, Inf and spikes of the loss."""

import json

import numpy as np
import pytest

from lcm_jax.runtime import telemetry as alarms


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(value):
    assert alarms.not_finite(3, 1.0, 2.0) is None and alarms.not_finite(3, 1.0) is None
    assert alarms.not_finite(3, value, 1.0) == f"loss of step 3 is {value}"
    assert alarms.not_finite(3, 1.0, value) == f"gradient norm of step 3 is {value}"


def test_the_running_mean():
    """A plain mean of the first losses; then a constant's step response is 1 - (1 - 1 / HORIZON)^n."""
    losses = np.random.default_rng(0).uniform(1, 2, alarms.HORIZON)
    spikes = alarms.Spikes(10.0)
    for n, loss in enumerate(losses, 1):
        assert spikes.check(n, loss) is None
        assert spikes.mean == pytest.approx(losses[:n].mean())
    before = spikes.mean
    for n in range(50):
        spikes.check(alarms.HORIZON + n, 3.0)
    assert spikes.mean - before == pytest.approx((3.0 - before) * (1 - (1 - 1 / alarms.HORIZON) ** 50))


def test_a_spike_is_told_after_the_warm_up_and_does_not_count():
    spikes = alarms.Spikes(3.0)
    for n in range(alarms.WARMUP):
        assert spikes.check(n, 1.0) is None
    assert spikes.check(20, 3.0) is None  # not more than three times the mean
    mean = spikes.mean
    assert "loss of step 21 is 3.5, 3.2 times" in spikes.check(21, 3.5) and spikes.mean == mean
    early = alarms.Spikes(3.0)
    assert [early.check(n, loss) for n, loss in enumerate([1.0, 100.0])] == [None, None]
    assert alarms.Spikes(0.0, [1.0] * 50).check(51, 1e9) is None
    assert alarms.Spikes(3.0, [1.0] * 50).check(51, 4.0)


def test_only_one_process_writes_the_list(tmp_path):
    keys = [("shard", "key")]
    error = alarms.stop(tmp_path, 7, "loss of step 7 is nan", keys, write=False)
    assert str(error).startswith("loss of step 7 is nan; training stopped") and not any(tmp_path.iterdir())
    alarms.stop(tmp_path, 7, "loss of step 7 is nan", keys, write=True)
    found = json.loads((tmp_path / alarms.BAD_BATCH_FILE).read_text())
    assert found == {"step": 7, "reason": "loss of step 7 is nan", "records": [{"shard": "shard", "key": "key"}]}
    assert "bad_batch" not in str(alarms.stop(tmp_path, 7, "x", None, write=True))
