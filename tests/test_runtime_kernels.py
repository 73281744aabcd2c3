"""Attention in blocks and by kernels against XLA's; what is chosen where; what is refused, by layer."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import gpu_kit
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from gpu_kit import A100, B200, CPU, H100, TPU

from lcm_jax.errors import LcmError
from lcm_jax.models import attention as model_attention
from lcm_jax.models import unet as unet_lib
from lcm_jax.runtime import kernels as attention
from lcm_jax.runtime import mesh as mesh_lib

SD15 = unet_lib.from_config({"cross_attention_dim": 768, "attention_head_dim": 8})
SD21 = unet_lib.from_config({"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]})


def draw(b: int, s: int, length: int, n: int, d: int, dtype=jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(d + s)
    q, k, v = (rng.standard_normal((b, tokens, n, d)) for tokens in (s, length, length))
    return [jnp.asarray(x, dtype) for x in (2 * q, k, v)]


def output_and_gradients(fn, qkv, positive: bool = False) -> list[np.ndarray]:
    """The output, and its gradients by q, k and v against a fixed cotangent; positive: all of one sign."""
    weight = np.random.default_rng(1).standard_normal(qkv[0].shape)
    weight = np.abs(weight) if positive else weight

    def run(*qkv):
        return jnp.sum(fn(*qkv).astype(jnp.float32) * weight), fn(*qkv)

    gradients, out = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))(*qkv)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def assert_close(got: list[np.ndarray], want: list[np.ndarray], bound: float) -> None:
    for a, b in zip(got, want, strict=True):
        parity.near(a, b, bound)


@pytest.mark.parametrize(("s", "length", "rows"), [(96, 96, 32), (70, 77, 32), (70, 13, 1000), (5, 9, 1)])
def test_blocks_of_queries_are_exact(s, length, rows):
    qkv = draw(2, s, length, 3, 20)
    blocks = functools.partial(model_attention.chunked_attention, rows=rows)
    want = output_and_gradients(model_attention.dot_product_attention, qkv)
    assert_close(output_and_gradients(blocks, qkv), want, 1e-6)


def test_blocks_sum_the_gradients_of_keys_in_float32():
    """A sum in bfloat16 stands still once it is 256 times what is added: here at an eighth."""
    qkv = draw(1, 2048, 32, 1, 8, jnp.bfloat16)
    exact = output_and_gradients(model_attention.dot_product_attention, [x.astype(jnp.float32) for x in qkv], True)
    many = output_and_gradients(functools.partial(model_attention.chunked_attention, rows=1), qkv, True)
    assert_close(many[::-1], exact[::-1], 2 * parity.BFLOAT16)  # v first, whose gradient is all of one sign


def test_blocks_keep_no_logits():
    qkv = draw(1, 512, 512, 2, 8)
    _, backward = jax.eval_shape(
        lambda *qkv: jax.vjp(functools.partial(model_attention.chunked_attention, rows=64), *qkv), *qkv
    )
    kept = sum(leaf.size for leaf in jax.tree.leaves(backward))
    assert kept <= 4 * qkv[0].size


@pytest.mark.parametrize("d", [40, 64, 160])
def test_splash_is_xlas(d):
    qkv = draw(1, 256, 256, 2, d)
    splash = functools.partial(attention.splash_attention, interpret=True)
    want = output_and_gradients(model_attention.dot_product_attention, qkv)
    assert_close(output_and_gradients(splash, qkv), want, 5e-6)  # the softmax is rescaled block by block


def test_splash_can_be_made_where_transfers_are_disallowed():
    """The first trace of a step is under the training loop's guard."""
    qkv = draw(1, 128, 128, 1, 8)
    attention._splash_kernel.cache_clear()
    with jax.transfer_guard("disallow"):
        jax.jit(functools.partial(attention.splash_attention, interpret=True)).lower(*qkv)


def test_splash_is_made_once_for_a_shape_and_tiles_it():
    assert attention._splash_kernel(8, 4096, 4096, False) is attention._splash_kernel(8, 4096, 4096, False)
    assert [attention._splash_block(s) for s in (128, 384, 1024, 1152, 4096, 9216)] == [128, 384, 1024, 384, 1024, 1024]


def test_of_a_rematerialised_splash_its_output_and_log_sums_can_be_kept():
    """What the kernel's backward pass needs of its forward one, so that it need not run twice."""
    qkv = draw(1, 128, 128, 2, 8)
    names = jax.checkpoint_policies.save_only_these_names(model_attention.ATTENTION_OUTPUT)

    def kept(policy):
        fn = jax.checkpoint(functools.partial(attention.splash_attention, interpret=True), policy=policy)
        _, backward = jax.eval_shape(lambda *qkv: jax.vjp(fn, *qkv), *qkv)
        return sum(leaf.size for leaf in jax.tree.leaves(backward) if leaf.dtype == qkv[0].dtype)  # not the mask's int8

    assert kept(names) - kept(None) == qkv[0].size + qkv[0].size // 8


def chosen(implementation: str, mesh, q, length=None, dtype=jnp.bfloat16) -> str:
    k = (q[0], length or q[1], *q[2:])
    return attention.choose(implementation, dtype, mesh).kind(q, k)


CASES = [
    ("auto", TPU, (8, 4096, 8, 40), None, "splash"),
    ("auto", TPU, (8, 4096, 8, 40), 77, "xla"),
    ("auto", TPU, (8, 256, 8, 160), None, "xla"),
    ("auto", TPU, (8, 9216, 5, 64), None, "splash"),
    ("auto", TPU, (6, 4096, 8, 40), None, "chunked"),  # 6 images do not split over 4 devices
    ("auto", TPU, (8, 4000, 8, 40), None, "chunked"),  # no tile divides it
    ("auto", TPU, (8, 16384, 1, 512), None, "chunked"),  # the VAE's at 1024 px
    ("splash", TPU, (8, 256, 8, 160), None, "splash"),
    ("splash", TPU, (8, 4096, 8, 40), 77, "xla"),
    ("xla", TPU, (8, 256, 8, 160), None, None),
    ("auto", A100, (2, 4096, 8, 40), None, "cudnn"),
    ("auto", A100, (2, 4096, 8, 40), 77, "cudnn"),
    ("auto", A100, (2, 4095, 8, 40), None, "chunked"),  # an odd number of queries has no gradient in jax's cuDNN
    ("cudnn", H100, (2, 247, 8, 40), 77, "xla"),
    ("auto", A100, (2, 256, 8, 160), None, "xla"),
    ("auto", A100, (2, 16384, 1, 512), None, "chunked"),
    ("auto", H100, (2, 256, 8, 160), None, "cudnn"),
    ("cudnn", H100, (2, 256, 8, 160), None, "cudnn"),
    ("auto", B200, (2, 256, 8, 160), None, "xla"),  # Blackwell has no gradient of it
    ("auto", B200, (2, 1024, 8, 80), 77, "cudnn"),
    ("auto", CPU, (1, 1024, 8, 40), None, "xla"),
    ("auto", CPU, (1, 4096, 8, 40), None, "chunked"),
    ("chunked", CPU, (1, 64, 8, 40), None, "chunked"),
]


@pytest.mark.parametrize(("implementation", "mesh", "q", "length", "want"), CASES)
def test_choice(implementation, mesh, q, length, want):
    if want is None:
        assert attention.choose(implementation, jnp.bfloat16, mesh) is model_attention.dot_product_attention
    else:
        assert chosen(implementation, mesh, q, length) == want


@pytest.mark.parametrize(("platform", "want"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_auto_is_bfloat16_but_on_a_cpu(monkeypatch, platform, want):
    assert attention.auto_dtype(platform) == want
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert attention.auto_dtype() == want


def test_float32_never_meets_cudnn():
    assert chosen("auto", H100, (2, 4096, 8, 40), dtype=jnp.float32) == "chunked"
    assert chosen("auto", H100, (2, 256, 8, 40), dtype=jnp.float32) == "xla"


def test_a_chosen_attention_runs_compares_and_leaves_the_causal_one_to_xla():
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    fn = attention.choose("chunked", jnp.float32, mesh)
    assert fn == attention.choose("chunked", jnp.float32, mesh) != attention.choose("auto", jnp.float32, mesh)
    q, k, v = draw(2, 40, 40, 2, 8)
    for causal in (False, True):
        want = model_attention.dot_product_attention(q, k, v, causal)
        parity.close(fn(q, k, v, causal=causal), want, rtol=0, atol=1e-6)


def test_cudnn_names_the_layer_it_cannot_run():
    attention.check(SD21.clone(dtype=jnp.bfloat16), "cudnn", A100)
    attention.check(SD15.clone(dtype=jnp.bfloat16), "cudnn", H100)
    for mesh in (A100, B200):
        with pytest.raises(
            LcmError, match=r"down_blocks_2\.attentions_0 \(head size 160\) and 5 more layers: .* to 128"
        ):
            attention.check(SD15.clone(dtype=jnp.bfloat16), "cudnn", mesh)
    with pytest.raises(LcmError, match="bfloat16 or float16, not float32"):
        attention.check(SD21, "cudnn", A100)


@pytest.mark.parametrize(
    ("implementation", "mesh", "message"),
    [
        ("splash", A100, "splash runs on TPUs alone, these devices are gpu"),
        ("cudnn", TPU, "cudnn runs on NVIDIA GPUs alone, these devices are tpu"),
        ("flash", CPU, "model.attention=flash: known are auto, xla, chunked, cudnn, splash"),
    ],
)
def test_wrong_devices_and_names_are_refused(implementation, mesh, message):
    for refuse in (functools.partial(attention.check, SD15), lambda i, m: attention.choose(i, jnp.bfloat16, m)):
        with pytest.raises(LcmError, match=message) as caught:
            refuse(implementation, mesh)
        assert "\n" not in str(caught.value)


def test_every_layer_of_a_unet_has_its_head_size():
    sizes = attention.head_sizes(SD15)
    assert sizes["down_blocks_0.attentions_1"] == 40 and sizes["up_blocks_3.attentions_2"] == 40
    assert sizes["mid_block.attentions_0"] == sizes["up_blocks_1.attentions_0"] == 160
    args = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros((1, 7, 768))
    params = jax.eval_shape(SD15.init, jax.random.key(0), *args)["params"]
    layers = {".".join(key.key for key in path[:2]) for path, _ in jax.tree.leaves_with_path(params)}
    assert set(sizes) == {layer for layer in layers if "attentions" in layer}


LENGTHS = [
    (4096, 4096, 40),
    (4096, 77, 40),
    (1024, 77, 80),
    (256, 256, 160),
    (64, 77, 160),
    (4095, 4095, 40),
    (4096, 77, 64),
]


@pytest.mark.parametrize("mesh", [A100, H100], ids=["A100", "H100"])
@pytest.mark.parametrize(("queries", "keys", "d"), LENGTHS)
def test_gradient_of_auto_lowers_for_cuda(mesh, queries, keys, d):
    """Every length and head size of SD 1.x, 2.x and XL, and an odd one; no GPU, CUDA plugin or cuDNN is needed."""
    fn = attention.choose("auto", jnp.bfloat16, mesh)
    q, k = (jax.ShapeDtypeStruct((2, tokens, 8, d), jnp.bfloat16) for tokens in (queries, keys))
    gradient = jax.jit(jax.grad(lambda *qkv: fn(*qkv).astype(jnp.float32).sum(), (0, 1, 2)))
    with gpu_kit.tracing_for(mesh):
        text = gpu_kit.lowered(gradient.trace(q, k, k))
    assert ("__cudnn$fmhaSoftmaxBackward" in text) == (fn.kind(q.shape, k.shape) == "cudnn")


def test_the_key_beside_those_of_a_caption_is_hidden(monkeypatch):
    """The padded form that cuDNN gets is the plain attention, forward and backward."""
    qkv = draw(2, 64, 77, 2, 40)
    plain = jax.nn.dot_product_attention

    def by_xla(*args, implementation, **kwargs):
        assert implementation == "cudnn" and args[1].shape[1] % 2 == 0
        return plain(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    want = output_and_gradients(model_attention.dot_product_attention, qkv)
    assert_close(output_and_gradients(attention.cudnn_attention, qkv), want, 1e-6)


SHARDED = """
import functools, jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, numpy as np
from lcm_jax.models.attention import dot_product_attention
from lcm_jax.runtime import kernels as attention
from lcm_jax.runtime import mesh as mesh_lib
mesh = mesh_lib.make_mesh(data=2, fsdp=2)
fn = attention._Attention("splash", jnp.dtype(jnp.float32), mesh)
assert fn.kind((4, 128, 2, 8), (4, 128, 2, 8)) == "splash"
q, k, v = (jnp.asarray(np.random.default_rng(i).standard_normal((4, 128, 2, 8)), jnp.float32) for i in range(3))
rows = mesh_lib.batch_sharding(mesh)
run = jax.jit(fn._on_each_device(functools.partial(attention.splash_attention, interpret=True)), in_shardings=rows)
compiled = run.lower(q, k, v).compile()
out = compiled(*jax.device_put((q, k, v), rows))
assert out.sharding.is_equivalent_to(rows, 4), out.sharding
np.testing.assert_allclose(out, dot_product_attention(q, k, v), rtol=0, atol=1e-5)
assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
"""


def test_each_device_attends_to_its_own_images():
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "d"), [(512, 40), (77, 64), (256, 80)])
def test_cudnn_is_xlas(length, d):
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    qkv = draw(2, 512, length, 4, d, jnp.bfloat16)
    fn = attention.choose("cudnn", jnp.bfloat16, mesh)
    want = output_and_gradients(model_attention.dot_product_attention, [x.astype(jnp.float32) for x in qkv])
    assert_close(output_and_gradients(fn, qkv), want, 0.02)
