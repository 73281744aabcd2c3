"""Feature networks against torch with random weights, in files like the published ones; what their readers refuse."""

import pickle
import struct
import zipfile

import jax
import metrics_kit
import numpy as np
import parity
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lcm_jax.errors import LcmError
from lcm_jax.metrics.features import load_extractor, weights_hash
from lcm_jax.metrics.networks import clip, dinov2, inception, torch_file, weights
from lcm_jax.models.clip import vision_from_config

ATOL = 1e-4


def torch_inception(state, x):
    """pool_3 of the 2015 graph in torch functions, x [b 3 h w]; written from the architecture, not from our module."""

    def conv(name, x, stride=1, padding=0):
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding)
        stats = (state[f"{name}.bn.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *stats, eps=0.001))

    def pool(name, x, kind):
        border = dict(kernel_size=3, stride=1, padding=1)
        mean = kind == "mean"
        return conv(
            f"{name}.branch_pool",
            F.avg_pool2d(x, **border, count_include_pad=False) if mean else F.max_pool2d(x, **border),
        )

    x = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, 2))
    x = F.max_pool2d(conv("Conv2d_2b_3x3", x, padding=1), 3, 2)
    x = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x)), 3, 2)
    for n in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        five = conv(f"{n}.branch5x5_2", conv(f"{n}.branch5x5_1", x), padding=2)
        three = conv(f"{n}.branch3x3dbl_2", conv(f"{n}.branch3x3dbl_1", x), padding=1)
        three = conv(f"{n}.branch3x3dbl_3", three, padding=1)
        x = torch.cat([conv(f"{n}.branch1x1", x), five, three, pool(n, x, "mean")], 1)
    three = conv("Mixed_6a.branch3x3dbl_2", conv("Mixed_6a.branch3x3dbl_1", x), padding=1)
    x = torch.cat(
        [conv("Mixed_6a.branch3x3", x, 2), conv("Mixed_6a.branch3x3dbl_3", three, 2), F.max_pool2d(x, 3, 2)], 1
    )
    for n in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        seven = conv(f"{n}.branch7x7_2", conv(f"{n}.branch7x7_1", x), padding=(0, 3))
        seven = conv(f"{n}.branch7x7_3", seven, padding=(3, 0))
        double = conv(f"{n}.branch7x7dbl_1", x)
        for i, padding in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            double = conv(f"{n}.branch7x7dbl_{i}", double, padding=padding)
        x = torch.cat([conv(f"{n}.branch1x1", x), seven, double, pool(n, x, "mean")], 1)
    seven = conv("Mixed_7a.branch7x7x3_2", conv("Mixed_7a.branch7x7x3_1", x), padding=(0, 3))
    seven = conv("Mixed_7a.branch7x7x3_4", conv("Mixed_7a.branch7x7x3_3", seven, padding=(3, 0)), 2)
    x = torch.cat([conv("Mixed_7a.branch3x3_2", conv("Mixed_7a.branch3x3_1", x), 2), seven, F.max_pool2d(x, 3, 2)], 1)
    for n, kind in (("Mixed_7b", "mean"), ("Mixed_7c", "max")):
        three = conv(f"{n}.branch3x3_1", x)
        double = conv(f"{n}.branch3x3dbl_2", conv(f"{n}.branch3x3dbl_1", x), padding=1)
        heads = [
            conv(f"{n}.{b}{h}", y, padding=p)
            for b, y in (("branch3x3_2", three), ("branch3x3dbl_3", double))
            for h, p in (("a", (0, 1)), ("b", (1, 0)))
        ]
        x = torch.cat([conv(f"{n}.branch1x1", x), *heads, pool(n, x, kind)], 1)
    return x.mean((2, 3))


@pytest.fixture(scope="module")
def inception_state():
    """Random weights that keep the activations' scale, in the order and with the extras of the published file."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, parameter in weights.torch_table(inception.FIDInception(), (1, 75, 75, 3)).items():
        noise = torch.randn(parameter.torch_shape, generator=generator)
        if noise.ndim == 4:
            state[key] = noise * (2 / noise[0].numel()) ** 0.5
        elif key.endswith("running_var"):
            state[key] = 0.5 + noise.abs()
        else:
            state[key] = 0.2 * noise + float(key.endswith(".weight"))
    state["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)
    return state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def inception_file(inception_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(inception_state, path)
    return path


def test_inception_matches_torch(inception_state, inception_file):
    params = inception.read(inception_file)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == 21_785_568 + 2 * 17_216  # torchvision's Inception-v3 without its heads, and the norms' statistics
    x = np.random.default_rng(1).uniform(-1, 1, (2, 107, 91, 3)).astype(np.float32)
    want = torch_inception(inception_state, torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    got = jax.jit(lambda p, x: inception.FIDInception().apply({"params": p}, x))(params, x)
    assert want.shape == (2, 2048) and np.abs(want).mean() > 0.05
    parity.close(got, want, rtol=0, atol=ATOL * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("resize", inception.RESIZES)
def test_inception_features_of_images(resize, inception_state, inception_file):
    extractor = load_extractor("inception", inception_file, resize=resize, batch_size=2)
    images = metrics_kit.images(3, 120, 160)
    x = inception.RESIZES[resize][1](images).transpose(0, 3, 1, 2)
    want = torch_inception(inception_state, torch.from_numpy(np.ascontiguousarray(x))).numpy()
    parity.close(extractor(images / 255), want, rtol=0, atol=ATOL * np.abs(want).max())


def test_inception_variants_have_names_and_hashes_of_their_own(inception_file):
    networks = [inception.load(inception_file, resize) for resize in inception.RESIZES]
    assert [n.name for n in networks] == [
        "inception-2015/tf1-bilinear-299",
        "inception-2015/pytorch-bilinear-299",
        "inception-2015/clean-bicubic-299",
    ]
    images = metrics_kit.images(1, 330, 310)
    inputs = [n.prepare(images) for n in networks]
    assert all(x.shape == (1, 299, 299, 3) and x.dtype == np.float32 and -1 <= x.min() < x.max() <= 1 for x in inputs)
    assert len({weights_hash(n) for n in networks}) == 3
    white = [n.prepare(np.full((1, 20, 20, 3), 255, np.uint8)).max() for n in networks]
    parity.close(white, [127 / 128, 1.0, 127 / 128], rtol=1e-6)


def test_inception_reads_safetensors_alike(inception_state, inception_file, tmp_path):
    save_file({k: v for k, v in inception_state.items() if not k.startswith("fc.")}, tmp_path / "w.safetensors")
    a, b = inception.read(inception_file), inception.read(tmp_path / "w.safetensors")
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_refuses_more_than_tensors(zipped, tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    for name, value, why in (
        ("evil", {"a": torch.zeros(2), "b": Evil()}, r"it names \w+.print, more than"),
        ("module", torch.nn.Linear(2, 2), "more than a state dict"),
        ("list", [torch.zeros(2)], "cannot be read"),
    ):
        path = tmp_path / f"{name}.pth"
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(LcmError, match=why):
            torch_file.read(path)
    good = tmp_path / "good.pth"
    torch.save({"a": torch.zeros(200)}, good, _use_new_zipfile_serialization=zipped)
    good.write_bytes(good.read_bytes()[:-300])
    with pytest.raises(LcmError, match=r"good.pth .* cannot be read as a file of torch.save"):
        torch_file.read(good)
    (tmp_path / "other.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(LcmError, match="other.pth"):
        torch_file.read(tmp_path / "other.pth")


def op_name(module, name):
    return f"c{module}\n{name}\n".encode()


def op_text(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def op_value(value):
    """A number, None, or a list of them as a tuple; bytes are operations already."""
    if value is None or isinstance(value, bytes | bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}.get(value, value)
    if isinstance(value, list | tuple):
        return b"(" + b"".join(map(op_value, value)) + b"t"
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<I", len(raw)) + raw


def op_storage(count=4, key=b"X\x01\x00\x00\x000", view=()):
    return op_value([op_text("storage"), op_name("torch", "FloatStorage"), key, op_text("cpu"), count, *view]) + b"Q"


def op_tensor(sizes, strides, offset=0, storage=None):
    arguments = [op_storage() if storage is None else storage, offset, sizes, strides, False, b"}"]
    return op_name("torch._utils", "_rebuild_tensor_v2") + op_value(arguments) + b"R"


def write_state(path, tensor, numbers=4, key=b"X\x01\x00\x00\x00w", zipped=True, declared=None):
    """A file of torch.save whose one entry these operations make, and whose storage "0" is 0, 1, 2, ..."""
    state, values = b"\x80\x02}(" + key + tensor + b"u.", np.arange(numbers, dtype=np.float32).tobytes()
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", state)
            archive.writestr("a/data/0", values)
    else:
        start = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
        count = struct.pack("<q", numbers if declared is None else declared)
        path.write_bytes(start + state + pickle.dumps(["0"], 2) + count + values)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_tensor_lies_inside_its_storage(zipped, tmp_path):
    rng, outcomes = np.random.default_rng(0), []
    for _ in range(250):
        dims = rng.integers(0, 4)
        sizes, strides = rng.integers(-1 if rng.random() < 0.1 else 0, 5, dims), rng.integers(-2, 9, dims)
        strides = abs(strides) if rng.random() < 0.8 else strides
        offset, numbers = int(rng.integers(-1, 12)), int(rng.integers(0, 40))
        path = write_state(
            tmp_path / "w.pth",
            op_tensor(sizes.tolist(), strides.tolist(), offset, op_storage(numbers)),
            numbers,
            zipped=zipped,
        )
        good = offset >= 0 and (sizes >= 0).all() and (strides >= 0).all()
        if good:  # every one of its indices
            indices = offset + sum((np.indices(sizes)[d] * strides[d] for d in range(dims)), np.zeros(sizes, int))
            good = ((indices >= 0) & (indices < numbers)).all() and indices.nbytes // 2 <= path.stat().st_size
        outcomes.append(good)
        if good:
            np.testing.assert_array_equal(torch_file.read(path)["w"], indices.astype(np.float32), strict=True)
        else:
            with pytest.raises(LcmError, match="cannot be read as a file of torch.save"):
                torch_file.read(path)
    assert 60 < sum(outcomes) < 190


@pytest.mark.parametrize(
    "tensor, why",
    [
        (op_tensor([2, 2], [1000, -1000]), "below 0"),  # its last element is its first, the others lie elsewhere
        (op_tensor([-2, -2], [1, 1]), "below 0"),
        (op_tensor([2], [-1], 3), "below 0"),
        (op_tensor([2], [1], -1), "below 0"),
        (op_tensor([2], [1], 3), "ends at number 4 in a storage of 4"),
        (op_tensor([2, 2], [2**62, 2**62]), "ends at number"),
        (op_tensor([2**63], [0]), "above 2.63"),
        (op_tensor([10**5000], [0]), "above 2.63"),
        (op_tensor([1] * 65, [1] * 65), "too many"),
        (op_tensor([10**12], [0]), "too often"),
        (op_tensor([2**32, 2**32], [0, 0]), "too often"),
        (op_tensor([True, 4], [1, 1]), "only int"),
        (op_tensor([2.0], [1]), "only int"),
        (op_tensor([None], [1]), "only int"),
        (op_tensor([[2]], [1]), "only int"),
        (op_tensor([2], [1], False), "only int"),
        (op_tensor([2, 2], [1]), "argument 2 is shorter"),
        (op_tensor([2], [1], 0, op_storage(100)), "16 bytes, 100 numbers"),
        (op_tensor([2], [1], 0, op_storage(3)), "16 bytes, 3 numbers"),
        (op_tensor([2], [1], 0, op_storage(-1)), "below 0"),
        (op_tensor([2], [1], 0, op_storage(4.0)), "only int"),
        (op_tensor([2], [1], 0, op_storage(4, 0)), "only str"),
        (op_tensor([2], [1], 0, op_storage(4, view=[[op_text("0"), 0, 4]])), "other than a whole storage"),
        (op_tensor([2], [1], 0, op_value(5)), "only Storage"),
        (op_tensor([2], [1]) + b"}(" + op_text("strides") + op_value([2**40]) + b"ub", "only dict"),  # set later
        (op_name("torch._utils", "_rebuild_tensor_v2") + b"}b", "only dict"),
        (op_value(1) + b")R", "cannot be called"),
        (op_name("collections", "OrderedDict") + b")\x81", "NEWOBJ"),
        (b"\x96" + struct.pack("<Q", 2**40), "bytearray8"),
    ],
)
def test_torch_file_refuses_impossible_numbers(tensor, why, tmp_path):
    with pytest.raises(LcmError, match=why) as caught:
        torch_file.read(write_state(tmp_path / "w.pth", tensor))
    assert str(tmp_path / "w.pth") in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_torch_file_of_deep_nesting(tmp_path):
    deep = b")" + b"\x85" * 100_000  # ((((...)))): hashing or printing it would overflow C's stack
    wide = b")" + b"q\x01h\x01h\x01\x86" * 60  # a pair of pairs of pairs ...: 2^60 nodes for whoever walks through it
    for number, bad in enumerate((deep, wide)):
        of = op_tensor([2], [1], 0, op_storage(key=bad))
        for tensor, key in ((bad + b"Q", op_text("w")), (of, op_text("w")), (bad, op_text("w")), (op_value(1), bad)):
            with pytest.raises(LcmError, match=f"{number}.pth"):
                torch_file.read(write_state(tmp_path / f"{number}.pth", tensor, key=key))
    far = b"r\xff\xff\xff\xff"  # kept under number 2^32 - 1, for which pickle makes room
    path = write_state(tmp_path / "far.pth", op_tensor([2], [1]) + far)
    np.testing.assert_array_equal(torch_file.read(path)["w"], [0, 1])


def test_torch_file_counts_and_names(tmp_path):
    for declared in (-1, 3, 5, 2**62):
        with pytest.raises(LcmError, match="does not have the 4 numbers"):
            torch_file.read(write_state(tmp_path / "w.pth", op_tensor([2], [1]), zipped=False, declared=declared))
    path = write_state(tmp_path / "w.pth", op_tensor([2], [1]))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data/0", bytes(16))
    with pytest.raises(LcmError, match="two of its members have one name"):
        torch_file.read(path)
    path.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(1 << 20))
    with pytest.raises(LcmError, match="declare .* bytes, at most"):
        torch_file.read(path)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_in_every_protocol(protocol, zipped, tmp_path):
    state = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 2), torch.nn.BatchNorm2d(5)).state_dict()
    state["tied"], state["past its end"] = state["0.weight"].permute(2, 0, 3, 1), state["0.bias"][5:]
    state["repeated"], state["row"] = torch.ones(1).expand(3, 4), state["0.weight"][1:2, :, ::2]
    state["half"], state["count"], state["empty"] = state["0.weight"].half(), torch.tensor(3), torch.zeros(0, 2)
    torch.save(state, tmp_path / "w.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    read = torch_file.read(tmp_path / "w.pth")
    assert list(read) == list(state)
    for key, value in state.items():
        np.testing.assert_array_equal(read[key], value.numpy(), strict=True)


@pytest.mark.parametrize("kind", weights.SOURCES)
def test_missing_weights_are_reported_with_source_and_hash(kind, tmp_path):
    source, digest = weights.SOURCES[kind]
    for path, what in ((None, "no weights are given"), (tmp_path / "none", "none does not exist")):
        with pytest.raises(LcmError) as caught:
            weights.existing(kind, path)
        assert what in str(caught.value) and source in str(caught.value) and digest in str(caught.value)
        assert "\n" not in str(caught.value)


def test_inception_refuses_other_files(inception_state, tmp_path):
    named = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({"a": torch.zeros(1)}, named)
    with pytest.raises(LcmError, match="its name says 6726825d.*damaged"):
        inception.read(named)
    torch.save({k: v for k, v in inception_state.items() if not k.startswith("Mixed_7c")}, tmp_path / "cut.pth")
    with pytest.raises(LcmError, match=r"cut.pth holds another network: 45 missing \(Mixed_7c.branch1x1.bn.bias"):
        inception.read(tmp_path / "cut.pth")
    with pytest.raises(LcmError, match="resize='lanczos'.*tf1, pytorch, clean"):
        inception.load(named, "lanczos")


@pytest.mark.parametrize(
    ("changes", "published"),
    [({}, True), ({}, False), ({"use_swiglu_ffn": True}, True), ({"use_swiglu_ffn": True, "qkv_bias": False}, False)],
)
def test_dinov2_matches_transformers(changes, published, tmp_path):
    model = metrics_kit.torch_dinov2(**changes)
    network = dinov2.load(metrics_kit.write_dinov2(tmp_path, model, published))
    for height, width in ((70, 70), (42, 98)):  # the embeddings' own grid, and one to resize to
        x = np.random.default_rng(2).standard_normal((2, height, width, 3)).astype(np.float32)
        with torch.no_grad():
            want = model(torch.from_numpy(x.transpose(0, 3, 1, 2))).pooler_output.numpy()
        got = jax.jit(network.module.apply)({"params": network.params}, x)
        assert want.std() > 0.3
        parity.close(got, want, rtol=0, atol=ATOL)


def test_a_dinov2_with_a_number_of_its_own_is_refused():
    module = dinov2.Dinov2Model(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28)
    with pytest.raises(LcmError, match=r"file holds another network: \d+ missing .*, 1 unexpected \(logit_scale\)"):
        dinov2.read(module, {"logit_scale": ()}, {}.__getitem__, "file")


@pytest.mark.slow
def test_published_networks_have_their_size():
    """Numbers of parameters of facebook/dinov2-large (its mask token apart) and of openai/clip-vit-large-patch14."""
    large = {
        "model_type": "dinov2",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "mlp_ratio": 4,
        "image_size": 518,
        "patch_size": 14,
        "hidden_act": "gelu",
    }
    table = weights.torch_table(dinov2.from_config(large), (1, 518, 518, 3))
    assert sum(np.prod(p.shape) for p in table.values()) + 1024 == 304_368_640
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    config = {"model_type": "clip", "projection_dim": 768, "vision_config": vision}
    table = clip._vision_table(vision_from_config(config))
    texts = 123_060_480 + 768 * 768  # text tower and its projection; the last number is the logit scale
    assert sum(np.prod(p.shape) for p in table.values()) + texts + 1 == 427_616_513


def test_dinov2_resizes(tmp_path):
    folder = metrics_kit.write_dinov2(tmp_path, metrics_kit.torch_dinov2())
    square, processor = dinov2.load(folder), dinov2.load(folder, "processor")
    images = metrics_kit.images(1, 50, 60)
    assert square.prepare(images).shape == (1, 224, 224, 3) and processor.prepare(images).shape == (1, 28, 28, 3)
    assert square.name == "dinov2-2x32/square-bicubic" and processor.name == "dinov2-2x32/processor-bicubic"
    with pytest.raises(LcmError, match="resize='clean'.*square, processor"):
        dinov2.load(folder, "clean")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_attention_heads": 4', '"num_attention_heads": 2'))
    assert weights_hash(dinov2.load(folder)) != weights_hash(square), "what the weights do not show"


@pytest.mark.parametrize(("size", "grid"), [(16, 37), (37, 37), (5, 3)])
def test_cubic_weights_are_torchs(size, grid):
    line = torch.randn(1, 1, grid, grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = F.interpolate(line, (size, size), mode="bicubic", align_corners=False)[0, 0].numpy()
    matrix = dinov2.cubic_weights(size, grid)
    parity.close(matrix @ line[0, 0].numpy() @ matrix.T, want, atol=1e-12)
