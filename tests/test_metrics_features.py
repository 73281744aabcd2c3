"""Extractors and what is gathered with them: one function whatever the batches and devices, named and never mixed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import metrics_kit
import numpy as np
import parity
import pytest

from lcm_jax.data import shapes
from lcm_jax.errors import LcmError
from lcm_jax.metrics import distances as frechet
from lcm_jax.metrics import features
from lcm_jax.metrics import statistics as statistics_files
from lcm_jax.metrics.networks import shapes as shapes_scorer

SIDE = shapes.RESOLUTION


def linear(scale=1.0, preprocessing="mean"):
    """A network that is a matrix: features of any picture in microseconds."""
    matrix = scale * np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    return features.Network(
        "linear/none",
        5,
        lambda x: x.astype(np.float32) / 255,
        lambda p, x: x.mean((1, 2)) @ p["m"],
        {"m": matrix},
        preprocessing,
    )


@pytest.fixture(scope="module")
def extractor():
    return features.make_extractor(linear(), batch_size=4)


def test_shapes_extractor_is_the_scorer():
    images = shapes.render_batch([shapes.spec(i, "heldout") for i in range(7)])
    extractor = features.load_extractor("shapes", batch_size=4)
    got = extractor(images)
    assert got.shape == (7, extractor.dim) == (7, 64) and got.dtype == np.float32
    parity.close(got, shapes_scorer.score(images)[1], rtol=0, of_max=32 * parity.EPS)
    np.testing.assert_array_equal(got, extractor(images.astype(np.float32) / 255))
    with pytest.raises(LcmError, match=f"pictures of 32 x 64: the shapes scorer reads {SIDE} x {SIDE}"):
        extractor(images[:, ::2])


def test_pictures_as_floats_are_rounded_as_files_would(extractor):
    images = metrics_kit.pictures(3)
    np.testing.assert_array_equal(features.to_bytes(images / 255), images)
    np.testing.assert_array_equal(features.to_bytes(np.full((1, 2, 2, 3), 0.4999 / 255)), 0)
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
    images = metrics_kit.pictures(11)
    whole = extractor(images)
    parity.close(whole, (images / 255).mean((1, 2)) @ linear().params["m"], rtol=0, of_max=16 * parity.EPS)
    parts = np.concatenate([extractor(images[:1]), extractor(images[1:6]), extractor(images[6:])])
    parity.close(parts, whole, rtol=1e-6)


def test_hash_covers_weights_preprocessing_and_name():
    base = features.weights_hash(linear())
    assert base == features.weights_hash(linear()) and len(base) == 64
    others = [
        linear(scale=1.0000002),
        linear(preprocessing="max"),
        features.dataclasses.replace(linear(), name="linear/clean"),
    ]
    assert len({base, *map(features.weights_hash, others)}) == 4


def test_unknown_kinds_and_sizes():
    with pytest.raises(LcmError, match="'resnet' is unknown; choose one of inception, clip, dinov2, shapes"):
        features.load_extractor("resnet")
    with pytest.raises(LcmError, match="batch_size = 0"):
        features.load_extractor("shapes", batch_size=0)
    with pytest.raises(LcmError, match="resize='clean' must be left out"):
        features.load_extractor("shapes", resize="clean")


def test_streaming_equals_one_pass_and_files_keep_it(extractor, tmp_path):
    images = metrics_kit.pictures(40)
    once = frechet.statistics(extractor(images))
    first = statistics_files.gather(extractor, (images[a:b] for a, b in ((0, 1), (1, 9), (9, 17))))
    statistics_files.save(tmp_path / "first.npz", first)
    loaded = statistics_files.load(tmp_path / "first.npz", extractor)  # a run that stopped goes on from its file
    rest = statistics_files.gather(extractor, [images[17:20]], loaded)
    whole = statistics_files.merge(rest, statistics_files.gather(extractor, [images[20:]]))
    assert whole.count == 40 and whole.origin == first.origin
    parity.close(whole.stats.mean, once.mean, rtol=1e-10)
    parity.close(whole.stats.covariance, once.covariance, rtol=1e-7, atol=1e-12)
    other = metrics_kit.pictures(30, seed=1)
    want = frechet.frechet_distance(extractor(images), extractor(other))
    got = statistics_files.frechet_distance(whole, statistics_files.gather(extractor, [other]))
    assert got == pytest.approx(want, rel=1e-7) and want > 0


def test_what_a_file_says(extractor, tmp_path):
    images = metrics_kit.pictures(9, 40, 32)
    found = statistics_files.gather(extractor, [images])
    statistics_files.save(tmp_path / "s.npz", found)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as stored:  # mu and sigma as pytorch-fid's readers know them
        assert (str(stored["name"]), str(stored["hash"]), int(stored["count"])) == ("linear/none", extractor.hash, 9)
        assert stored["resolution"].tolist() == [40, 32]
        f = extractor(images).astype(np.float64)
        parity.close(stored["mu"], f.mean(0), rtol=1e-12)
        parity.close(stored["sigma"], np.cov(f.T), rtol=1e-6, atol=1e-14)


def test_feature_sets(extractor, tmp_path):
    batches = [metrics_kit.pictures(5), metrics_kit.pictures(6, seed=1)]
    found = statistics_files.feature_set(extractor, batches)
    statistics_files.save(tmp_path / "f.npz", found)
    again = statistics_files.load_features(tmp_path / "f.npz", extractor)
    assert again.origin == found.origin and again.count == 11
    np.testing.assert_array_equal(again.features, found.features)
    both = statistics_files.load(tmp_path / "f.npz"), statistics_files.gather(extractor, batches)
    parity.close(both[0].stats.covariance, both[1].stats.covariance, rtol=1e-7, atol=1e-14)
    assert statistics_files.cmmd(found, again) == pytest.approx(0, abs=1e-9)


def test_nothing_mixes(extractor, tmp_path):
    images = metrics_kit.pictures(8)
    here = statistics_files.gather(extractor, [images])
    same_name = features.make_extractor(linear(scale=2.0), batch_size=4)
    renamed = features.make_extractor(features.dataclasses.replace(linear(), name="linear/clean"), batch_size=4)
    small = statistics_files.gather(extractor, [images[:, ::2, ::2]])
    weights, names = "two different linear/none", "linear/none and of linear/clean"
    for other, why in (
        (statistics_files.gather(same_name, [images]), weights),
        (statistics_files.gather(renamed, [images]), names),
        (small, "pictures of 40 x 40 and of 20 x 20 do not mix"),
    ):
        for act in (statistics_files.merge, statistics_files.frechet_distance):
            with pytest.raises(LcmError, match=why):
                act(here, other)
    with pytest.raises(LcmError, match="40 x 40 and of 20 x 20"):
        statistics_files.gather(extractor, [images, images[:, ::2, ::2]])
    with pytest.raises(LcmError, match="40 x 40 and of 20 x 20"):
        statistics_files.feature_set(extractor, [images, images[:, ::2, ::2]])
    with pytest.raises(LcmError, match="two different"):
        statistics_files.gather(same_name, [images], here)
    statistics_files.save(tmp_path / "s.npz", here)
    for other, why in ((same_name, weights), (renamed, names)):
        with pytest.raises(LcmError, match=rf"s.npz: .*{why}"):
            statistics_files.load(tmp_path / "s.npz", other)


def test_too_few_pictures_and_unusable_files(extractor, tmp_path):
    images = metrics_kit.pictures(8)
    few, enough = (statistics_files.gather(extractor, [images[:n]]) for n in (5, 8))
    with pytest.raises(LcmError, match="5 pictures are too few .* linear/none, whose features have 5 .* at least 6"):
        statistics_files.frechet_distance(enough, few)
    for gather in (statistics_files.gather, statistics_files.feature_set):
        with pytest.raises(LcmError, match="no pictures"):
            gather(extractor, [])
    with pytest.raises(LcmError, match="at least 2"):
        statistics_files.save(tmp_path / "one.npz", statistics_files.gather(extractor, [images[:1]]))
    assert not list(tmp_path.iterdir())
    with pytest.raises(LcmError, match="saved as .npz"):
        statistics_files.save(tmp_path / "stats", enough)
    with pytest.raises(LcmError, match="absent.npz does not exist"):
        statistics_files.load(tmp_path / "absent.npz")
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(LcmError, match="foreign.npz does not say which network"):
        statistics_files.load(tmp_path / "foreign.npz")
    statistics_files.save(tmp_path / "s.npz", enough)
    with pytest.raises(LcmError, match="statistics alone"):
        statistics_files.load_features(tmp_path / "s.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:-40])
    with pytest.raises(LcmError, match="cut.npz cannot be read"):
        statistics_files.load(tmp_path / "cut.npz")
    with (tmp_path / "array.npz").open("wb") as stream:
        np.save(stream, np.zeros(5))
    with pytest.raises(LcmError, match="array.npz cannot be read as .npz .it holds one array alone"):
        statistics_files.load(tmp_path / "array.npz")


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
def test_arrays_of_another_shape_or_kind_are_refused(extractor, tmp_path, change, message):
    path = tmp_path / "s.npz"
    statistics_files.save(path, statistics_files.gather(extractor, [metrics_kit.pictures(8)]))
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **(arrays | change))
    with pytest.raises(LcmError, match=message):
        statistics_files.load(path)


EIGHT = """
import json, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, "tests")
from lcm_jax.data import shapes
from lcm_jax.metrics import statistics as statistics_files
from lcm_jax.metrics import features
from lcm_jax.runtime import mesh as mesh_lib

images = shapes.render_batch([shapes.spec(i, "heldout") for i in range(90)])
mesh = mesh_lib.make_mesh(data=2, fsdp=4)
shared = features.load_extractor("shapes", mesh=mesh, batch_size=9)
alone = features.load_extractor("shapes", batch_size=9)
assert mesh.size == 8 and shared.batch_size == 16 and alone.batch_size == 9
a = statistics_files.gather(shared, [images[:7], images[7:40], images[40:]])
b = statistics_files.gather(alone, [images])
np.testing.assert_allclose(shared(images), alone(images), atol=1e-5)
print(json.dumps({
    "mean": np.abs(a.stats.mean - b.stats.mean).max(),
    "covariance": np.abs(a.stats.covariance - b.stats.covariance).max(),
    "distance": statistics_files.frechet_distance(a, b), "count": a.count, "spread": b.stats.covariance.std()}))
"""


def test_eight_devices_equal_one():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", EIGHT],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["count"] == 90 and told["spread"] > 0.01
    assert told["mean"] < 1e-5 and told["covariance"] < 1e-4 and told["distance"] < 1e-3
