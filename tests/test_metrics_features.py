"""Extractors and what is gathered with them: one function for all batches and devices, identified and never mixed."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import metrics_kit
import numpy as np
import parity
import pytest
from flax import linen as nn

from lcm_jax.data import shapes
from lcm_jax.errors import LcmError
from lcm_jax.metrics import distances, features, statistics
from lcm_jax.metrics.features import load_extractor, make_extractor, to_bytes, weights_hash
from lcm_jax.metrics.networks.network import Network
from lcm_jax.metrics.networks.shapes import score

SIDE = shapes.RESOLUTION


class Means(nn.Module):
    """Mean colour times a matrix."""

    @nn.compact
    def __call__(self, x):
        return x.mean((1, 2)) @ self.param("m", nn.initializers.normal(), (3, 5))


def linear(scale=1.0, preprocessing="mean", name="linear/none"):
    matrix = scale * np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    return Network(name, 5, Means(), {"m": matrix}, lambda x: x.astype(np.float32) / 255, preprocessing)


@pytest.fixture(scope="module")
def extractor():
    return make_extractor(linear(), batch_size=4)


def test_extractor_of_shapes_is_the_scorer():
    images = shapes.render_batch([shapes.spec(i, "heldout") for i in range(7)])
    extractor = load_extractor("shapes", batch_size=4)
    got = extractor(images)
    assert got.shape == (7, extractor.dim) == (7, 64) and got.dtype == np.float32
    parity.close(got, score(images)[1], rtol=0, of_max=32 * parity.EPS)
    np.testing.assert_array_equal(got, extractor(images.astype(np.float32) / 255))
    with pytest.raises(LcmError, match=f"images of 32 x 64: the shapes scorer reads {SIDE} x {SIDE}"):
        extractor(images[:, ::2])


def test_second_extractor_compiles_nothing_and_a_dropped_one_is_freed(extractor):
    images = metrics_kit.images(3)
    first = extractor(images)
    program = features._program(extractor.mesh)
    compiled = program._cache_size()
    assert compiled > 0
    other = make_extractor(linear(scale=2.0), batch_size=4)
    assert other.hash != extractor.hash
    parity.close(other(images), 2 * first, rtol=1e-6)
    assert program._cache_size() == compiled
    weights = weakref.ref(jax.tree.leaves(other.network.params)[0])
    del other
    gc.collect()
    assert weights() is None


def test_to_bytes_rounds_like_saving(extractor):
    images = metrics_kit.images(3)
    np.testing.assert_array_equal(to_bytes(images / 255), images)
    np.testing.assert_array_equal(to_bytes(np.full((1, 2, 2, 3), 0.4999 / 255)), 0)
    for bad, why in (
        (images[0], "shape"),
        (images[:0], "n at least 1"),
        (images.astype(np.int32), "int32"),
        (images.astype(np.float32), "values from"),
        (images * np.float32("nan"), "values from nan"),
        (images / 127.5 - 1, "values from -"),
    ):
        with pytest.raises(LcmError, match=why):
            extractor(bad)


def test_any_count_and_batch_size_is_one_function(extractor):
    images = metrics_kit.images(11)
    whole = extractor(images)
    parity.close(whole, (images / 255).mean((1, 2)) @ linear().params["m"], rtol=0, of_max=16 * parity.EPS)
    parts = np.concatenate([extractor(images[:1]), extractor(images[1:6]), extractor(images[6:])])
    parity.close(parts, whole, rtol=1e-6)


def test_weights_hash_covers_weights_preprocessing_and_name():
    base = weights_hash(linear())
    assert base == weights_hash(linear()) and len(base) == 64
    others = [linear(scale=1.0000002), linear(preprocessing="max"), linear(name="linear/clean")]
    assert len({base, *map(weights_hash, others)}) == 4


def test_load_extractor_refuses_unknown_kinds_and_sizes():
    with pytest.raises(LcmError, match="'resnet' is unknown; choose one of inception, clip, dinov2, shapes"):
        load_extractor("resnet")
    with pytest.raises(LcmError, match="batch_size = 0"):
        load_extractor("shapes", batch_size=0)
    with pytest.raises(LcmError, match="resize='clean' must be left out"):
        load_extractor("shapes", resize="clean")


def test_gather_resumes_from_a_file(extractor, tmp_path):
    images = metrics_kit.images(40)
    once = distances.statistics(extractor(images))
    first = statistics.gather(extractor, (images[a:b] for a, b in ((0, 1), (1, 9), (9, 17))))
    statistics.save(tmp_path / "first.npz", first)
    loaded = statistics.load(tmp_path / "first.npz", extractor)
    whole = statistics.gather(extractor, [images[17:20], images[20:]], loaded)
    assert whole.count == 40 and whole.origin == first.origin
    parity.close(whole.stats.mean, once.mean, rtol=1e-10)
    parity.close(whole.stats.covariance, once.covariance, rtol=1e-7, atol=1e-12)
    other = metrics_kit.images(30, seed=1)
    want = distances.frechet_distance(extractor(images), extractor(other))
    assert want > 0
    parity.close(statistics.frechet_distance(whole, statistics.gather(extractor, [other])), want, rtol=1e-7)


def test_layout_of_a_file(extractor, tmp_path):
    images = metrics_kit.images(9, 40, 32)
    statistics.save(tmp_path / "s.npz", statistics.gather(extractor, [images]))
    with np.load(tmp_path / "s.npz", allow_pickle=False) as stored:  # mu and sigma as pytorch-fid's readers know them
        assert set(stored) == {"name", "hash", "resolution", "count", "mu", "sigma"}
        assert (str(stored["name"]), str(stored["hash"]), int(stored["count"])) == ("linear/none", extractor.hash, 9)
        assert stored["resolution"].tolist() == [40, 32]
        f = extractor(images).astype(np.float64)
        parity.close(stored["mu"], f.mean(0), rtol=1e-12)
        parity.close(stored["sigma"], np.cov(f.T), rtol=1e-6, atol=1e-14)


def test_feature_set_in_a_file(extractor, tmp_path):
    batches = [metrics_kit.images(5), metrics_kit.images(6, seed=1)]
    found = statistics.feature_set(extractor, batches[1:], statistics.feature_set(extractor, batches[:1]))
    statistics.save(tmp_path / "f.npz", found)
    again = statistics.load_features(tmp_path / "f.npz", extractor)
    assert again.origin == found.origin and again.count == found.count == 11
    np.testing.assert_array_equal(again.features, extractor(np.concatenate(batches)))
    both = statistics.load(tmp_path / "f.npz"), statistics.gather(extractor, batches)
    parity.close(both[0].stats.covariance, both[1].stats.covariance, rtol=1e-7, atol=1e-14)
    parity.close(distances.cmmd(found.features, again.features), 0, atol=1e-9)


def test_nothing_mixes(extractor, tmp_path):
    images = metrics_kit.images(8)
    here = statistics.gather(extractor, [images])
    statistics.save(tmp_path / "s.npz", here)
    half = images[:, ::2, ::2]
    for other, sizes, why in (
        (make_extractor(linear(scale=2.0), batch_size=4), images, "two different linear/none"),
        (make_extractor(linear(name="linear/clean"), batch_size=4), images, "linear/none and of linear/clean"),
        (extractor, half, "images of 40 x 40 and of 20 x 20 do not mix"),
    ):
        with pytest.raises(LcmError, match=why):
            statistics.frechet_distance(here, statistics.gather(other, [sizes]))
        with pytest.raises(LcmError, match=why):
            statistics.gather(other, [sizes], here)
        if other is not extractor:
            with pytest.raises(LcmError, match=rf"s.npz: .*{why}"):
                statistics.load(tmp_path / "s.npz", other)
    with pytest.raises(LcmError, match="40 x 40 and of 20 x 20"):
        statistics.feature_set(extractor, [images, half])


def test_too_few_images_and_unusable_files(extractor, tmp_path):
    images = metrics_kit.images(8)
    few, enough = (statistics.gather(extractor, [images[:n]]) for n in (5, 8))
    with pytest.raises(LcmError, match="5 images are too few .* 5 dimensions: give at least 6"):
        statistics.frechet_distance(enough, few)
    for gather in (statistics.gather, statistics.feature_set):
        with pytest.raises(LcmError, match="no images"):
            gather(extractor, [])
    with pytest.raises(LcmError, match="at least 2"):
        statistics.save(tmp_path / "one.npz", statistics.gather(extractor, [images[:1]]))
    assert not list(tmp_path.iterdir())
    with pytest.raises(LcmError, match="saved as .npz"):
        statistics.save(tmp_path / "stats", enough)
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(5), sigma=np.eye(5))
    statistics.save(tmp_path / "s.npz", enough)
    with pytest.raises(LcmError, match="statistics alone"):
        statistics.load_features(tmp_path / "s.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:-40])
    with (tmp_path / "array.npz").open("wb") as stream:
        np.save(stream, np.zeros(5))
    for name, why in (
        ("absent", "absent.npz does not exist"),
        ("foreign", "foreign.npz does not record which network"),
        ("cut", "cut.npz .* cannot be read"),
        ("array", "array.npz .* cannot be read as an .npz"),
    ):
        with pytest.raises(LcmError, match=why):
            statistics.load(tmp_path / f"{name}.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": [8]}, r"its resolution has the shape \[1\], \[2\] is expected"),
        ({"resolution": 8}, r"its resolution has the shape \[\]"),
        ({"sigma": np.eye(4)}, r"its sigma has the shape \[4, 4\], \[5, 5\] is expected"),
        ({"mu": np.float64(1)}, r"its mu has the shape \[\]"),
        ({"count": [8]}, r"its count has the shape \[1\]"),
        ({"mu": np.full(5, "a")}, r"its mu is of <U1"),
        ({"features": np.zeros(5, np.float32)}, r"its features has the shape \[5\]"),
    ],
)
def test_load_refuses_arrays_of_another_shape_or_kind(tmp_path, change, message):
    path = tmp_path / "s.npz"
    layout = {"name": "linear/none", "hash": "0", "resolution": [8, 8], "count": 8, "mu": np.zeros(5)}
    np.savez(path, **(layout | {"sigma": np.eye(5)} | change))
    with pytest.raises(LcmError, match=message):
        statistics.load(path)


EIGHT = """
import json
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from lcm_jax.data import shapes
from lcm_jax.metrics import statistics
from lcm_jax.metrics.features import load_extractor
from lcm_jax.runtime.mesh import make_mesh

images = shapes.render_batch([shapes.spec(i, "heldout") for i in range(90)])
mesh = make_mesh(data=2, fsdp=4)
shared = load_extractor("shapes", mesh=mesh, batch_size=9)
alone = load_extractor("shapes", batch_size=9)
assert mesh.size == 8 and shared.batch_size == 16 and alone.batch_size == 9
a = statistics.gather(shared, [images[:7], images[7:40], images[40:]])
b = statistics.gather(alone, [images])
apart = lambda x, y: float(np.abs(x - y).max() / np.abs(y).max())
print(json.dumps({
    "features": apart(shared(images), alone(images)),
    "mean": apart(a.stats.mean, b.stats.mean),
    "covariance": apart(a.stats.covariance, b.stats.covariance),
    "distance": statistics.frechet_distance(a, b), "count": a.count, "spread": b.stats.covariance.std()}))
"""


def test_eight_devices_equal_one():
    root = Path(__file__).parents[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", EIGHT], capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["count"] == 90 and found["spread"] > 0.01 and found["distance"] < 1e-3
    assert max(found["features"], found["mean"], found["covariance"]) < parity.NETWORK, found  # of the largest value
