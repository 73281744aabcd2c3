"""What is rematerialised changes no number, keeps less, and fetches its weights inside: by gradients and jaxprs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr
from tiny_configs import CLIPS, TINY_VAES, VAES

from lcm_jax.models import attention, clip, layers, lora
from lcm_jax.models import layers as remat
from lcm_jax.models import unet as unet_lib
from lcm_jax.models import vae as vae_lib

CONFIG = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
    "mid_block_type": "UNetMidBlock2D",
    "time_cond_proj_dim": 6,
}
UNET = unet_lib.from_config(CONFIG)
# One level: half the time to compile.
SMALL = unet_lib.from_config(
    CONFIG
    | {
        "block_out_channels": [8],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "mid_block_type": None,
    }
)
TAG = "fetched"


def fetch(tree, after=None):
    """A `weights_fn` that leaves a mark on every weight, and doubles nothing."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, TAG), tree)


@functools.cache
def arguments(side: int = 8) -> tuple:
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(x, jnp.float32)
        for x in (
            rng.standard_normal((2, side, side, 4)),
            [3, 500],
            rng.standard_normal((2, 7, 8)),
            rng.standard_normal((2, 6)),
        )
    )


@functools.cache
def params(unet=UNET) -> dict:
    base = jax.jit(unet.init)(jax.random.key(0), *arguments())["params"]
    targets = [name for name in lora.DEFAULT_TARGETS if unet is UNET or "samplers" not in name]
    return {"base": base, "lora": jax.tree.map(lambda a: a + 0.02, lora.init(jax.random.key(1), base, 2, targets))}


def loss(unet, params: dict) -> jax.Array:
    return jnp.square(lora.Adapted(unet, 0.7).apply({"params": params}, *arguments())).mean()


@functools.cache
def gradients(choice: str, weights_fn=None) -> dict:
    unet = SMALL.clone(remat=choice, weights_fn=weights_fn)
    return jax.jit(jax.grad(functools.partial(loss, unet)))(params(SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["block", "attention"])
def test_gradients_of_weights_and_adapters_are_the_same(choice):
    want = jax.tree.leaves_with_path(gradients("none"))
    got = jax.tree.leaves(gradients(choice, fetch))
    assert len(got) == len(want) > 100
    norms = np.array([float(jnp.linalg.norm(leaf)) for _, leaf in want])
    errors = np.array([float(jnp.linalg.norm(a - b)) for (_, a), b in zip(want, got, strict=True)])
    parity.close(np.linalg.norm(errors), 0, atol=3e-6 * np.linalg.norm(norms))  # other fusions round otherwise
    # Some are zero but for rounding: a softmax's gradient by its keys' common share.
    worst = np.argmax(errors / np.maximum(norms, 1e-4 * norms.max()))
    bound = 2e-5 * max(norms[worst], 1e-4 * norms.max())
    parity.close(errors[worst], 0, atol=bound, what=jax.tree_util.keystr(want[worst][0]))


def kept(choice: str) -> int:
    """Bytes that the forward pass leaves for the backward pass, beyond the weights and the inputs."""
    unet, args = UNET.clone(remat=choice), arguments(32)
    base = params()["base"]
    _, backward = jax.eval_shape(lambda p: jax.vjp(lambda p: unet.apply({"params": p}, *args), p), base)
    nbytes = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    return nbytes(backward) - nbytes(base) - nbytes(args)


@pytest.mark.slow
def test_less_is_kept():
    everything, attention, block = kept("none"), kept("attention"), kept("block")
    tokens = 2 * (32 * 32) * 8 * 4  # bytes of one activation at the upper level
    logits = 2 * 2 * 1024 * 1024 * 4
    transformers = 3
    assert everything > transformers * logits
    assert block < 40 * tokens
    assert attention == block + transformers * 2 * tokens  # what self- and cross-attention return


def count(jaxpr: Jaxpr, inside: bool = False) -> dict[bool, int]:
    """Marks of `fetch` in a jaxpr: {inside a rematerialised region: n, outside: m}."""
    found = {True: 0, False: 0}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name" and equation.params["name"] == TAG:
            found[inside] += 1
        below = inside or equation.primitive.name in ("checkpoint", "remat2", "remat")
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: isinstance(v, ClosedJaxpr)):
            inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
            if isinstance(inner, Jaxpr):
                for key, n in count(inner, below).items():
                    found[key] += n
    return found


def in_a_block(path: tuple) -> bool:
    """All but the embedding of the time, the first convolution and the downsamplers."""
    return not any(part in jax.tree_util.keystr(path) for part in ("time_embedding", "conv_in", "downsamplers"))


def test_weights_are_fetched_once_where_they_are_used():
    weights = jax.tree.leaves_with_path(params())
    blocks = [leaf for path, leaf in weights if in_a_block(path)]
    trace = lambda choice, f: jax.make_jaxpr(f(functools.partial(loss, UNET.clone(remat=choice, weights_fn=fetch))))  # noqa: E731
    forward = lambda f: f  # noqa: E731
    assert count(trace("none", forward)(params()).jaxpr) == {True: 0, False: len(weights)}
    assert count(trace("block", forward)(params()).jaxpr) == {True: len(blocks), False: len(weights) - len(blocks)}
    again = count(trace("block", jax.grad)(params()).jaxpr)
    assert again[True] >= sum(leaf.ndim > 1 for leaf in blocks)  # once more in the backward pass; biases need not be


@pytest.mark.parametrize("choice", ["none", "block", "attention"])
def test_names_and_first_values_stay(choice):
    init = lambda unet: jax.eval_shape(unet.init, jax.random.key(0), *arguments())  # noqa: E731
    want, got = init(UNET), init(UNET.clone(remat=choice, weights_fn=fetch))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert jax.tree.leaves(got) == jax.tree.leaves(want)


def test_unknown_choice():
    with pytest.raises(ValueError, match="'full'; known"):
        remat.remat(lambda x: x, "full")


OTHERS = {
    "vae": (vae_lib.from_config(VAES["sd"]), (jnp.zeros((1, 16, 16, 3)),)),
    "taesd": (vae_lib.from_config(TINY_VAES["taesd"]), (jnp.zeros((1, 16, 16, 3)),)),
    "clip": (clip.from_config(CLIPS["bigg"]), (jnp.zeros((1, 5), jnp.int32),)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_networks_fetch_each_weight_once(name):
    module, args = OTHERS[name]
    weights = jax.eval_shape(module.init, jax.random.key(0), *args)
    marked = module.clone(weights_fn=fetch)
    assert jax.tree.structure(jax.eval_shape(marked.init, jax.random.key(0), *args)) == jax.tree.structure(weights)
    jaxpr = jax.make_jaxpr(lambda w: marked.apply(w, *args))(weights).jaxpr
    assert count(jaxpr) == {True: 0, False: len(jax.tree.leaves(weights))}


PICTURE, TOKENS = jnp.zeros((1, 8, 8, 32)), jnp.zeros((1, 64, 32))
BLOCKS = {
    "resnet": (layers.ResnetBlock2D(32, 8, 1e-5), (PICTURE, jnp.zeros((1, 128)), PICTURE)),
    "down": (layers.Downsample2D(32), (PICTURE,)),
    "up": (layers.Upsample2D(32), (PICTURE,)),
    "transformer": (attention.BasicTransformerBlock(2), (TOKENS, jnp.zeros((1, 5, 16)))),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_blocks_weights_wait_for_its_input(name):
    block, args = BLOCKS[name]
    waited_for = []

    def record(tree, after=None):
        waited_for.append(after)
        return tree

    def run(weights, *args):
        block.clone(weights_fn=record).apply(weights, *args)
        assert waited_for and all(after is args[0] for after in waited_for)

    jax.eval_shape(run, jax.eval_shape(block.init, jax.random.key(0), *args), *args)
