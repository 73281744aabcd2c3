"""Rematerialisation changes no number, keeps less, and fetches weights inside its blocks: by gradients and jaxprs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr
from tiny_configs import CLIPS, TINY_VAES, VAES

from lcm_jax.models import clip, layers, lora, unet, vae

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
UNET = unet.from_config(CONFIG)
# One level, which takes half the time to compile.
SMALL = unet.from_config(
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
    """A `weights_fn` that marks every weight."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, TAG), tree)


@functools.cache
def arguments(side: int = 8) -> tuple:
    rng = np.random.default_rng(0)
    return tuple(
        np.asarray(x, np.float32)
        for x in (
            rng.standard_normal((2, side, side, 4)),
            [3, 500],
            rng.standard_normal((2, 7, 8)),
            rng.standard_normal((2, 6)),
        )
    )


def params(module) -> dict:
    base = module.init(jax.random.key(0), *arguments())["params"]
    targets = [name for name in lora.DEFAULT_TARGETS if module is UNET or "samplers" not in name]
    return {"base": base, "lora": jax.tree.map(lambda a: a + 0.02, lora.init(jax.random.key(1), base, 2, targets))}


@functools.cache
def shapes() -> dict:
    return jax.eval_shape(functools.partial(params, UNET))


def loss(module, params: dict) -> jax.Array:
    return jnp.square(lora.Adapted(module, 0.7).apply({"params": params}, *arguments())).mean()


@functools.cache
def gradients(choice: str, weights_fn=None) -> dict:
    module = SMALL.clone(remat=choice, weights_fn=weights_fn)
    return jax.jit(jax.grad(functools.partial(loss, module)))(jax.jit(functools.partial(params, SMALL))())


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["block", "attention"])
def test_gradients_of_weights_and_adapters_are_the_same(choice):
    want = jax.tree.leaves_with_path(gradients("none"))
    got = jax.tree.leaves(gradients(choice, fetch))
    assert len(got) == len(want) > 100
    norms = np.array([float(jnp.linalg.norm(leaf)) for _, leaf in want])
    errors = np.array([float(jnp.linalg.norm(a - b)) for (_, a), b in zip(want, got, strict=True)])
    parity.close(np.linalg.norm(errors), 0, atol=3e-6 * np.linalg.norm(norms))  # other fusions round differently
    # Some are zero up to rounding, such as the gradient of a softmax by the part that all its keys share.
    worst = np.argmax(errors / np.maximum(norms, 1e-4 * norms.max()))
    bound = 2e-5 * max(norms[worst], 1e-4 * norms.max())
    parity.close(errors[worst], 0, atol=bound, what=jax.tree_util.keystr(want[worst][0]))


def kept(choice: str) -> int:
    """Bytes that the forward pass keeps for the backward pass, beyond weights and inputs."""
    module, args = UNET.clone(remat=choice), arguments(32)
    base = shapes()["base"]
    _, backward = jax.eval_shape(lambda p: jax.vjp(lambda p: module.apply({"params": p}, *args), p), base)
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
    """Marks of `fetch` in a jaxpr: {True: number inside rematerialised regions, False: outside}."""
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
    """All but the time embedding, the first convolution and the downsamplers."""
    return not any(part in jax.tree_util.keystr(path) for part in ("time_embedding", "conv_in", "downsamplers"))


def test_weights_are_fetched_once_where_they_are_used():
    weights = jax.tree.leaves_with_path(shapes())
    blocks = [leaf for path, leaf in weights if in_a_block(path)]

    def marks(choice, transform=lambda f: f):
        f = functools.partial(loss, UNET.clone(remat=choice, weights_fn=fetch))
        return count(jax.make_jaxpr(transform(f))(shapes()).jaxpr)

    assert marks("none") == {True: 0, False: len(weights)}
    assert marks("block") == {True: len(blocks), False: len(weights) - len(blocks)}
    again = marks("block", jax.grad)
    assert again[True] >= sum(leaf.ndim > 1 for leaf in blocks)  # again in the backward pass, except biases


@pytest.mark.parametrize("choice", ["none", "block", "attention"])
def test_names_and_shapes_stay(choice):
    init = lambda module: jax.eval_shape(module.init, jax.random.key(0), *arguments())  # noqa: E731
    want, got = init(UNET), init(UNET.clone(remat=choice, weights_fn=fetch))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert jax.tree.leaves(got) == jax.tree.leaves(want)


def test_unknown_choice():
    with pytest.raises(ValueError, match="'full' is unknown; choose one of none, block, attention"):
        layers.remat(lambda x: x, "full")


OTHERS = {
    "vae": (vae.from_config(VAES["sd"]), (jnp.zeros((1, 16, 16, 3)),)),
    "taesd": (vae.from_config(TINY_VAES["taesd"]), (jnp.zeros((1, 16, 16, 3)),)),
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


IMAGE, TOKENS = jnp.zeros((1, 8, 8, 32)), jnp.zeros((1, 64, 32))
BLOCKS = {
    "resnet": (layers.ResnetBlock2D(32, 8, 1e-5), (IMAGE, jnp.zeros((1, 128)), IMAGE)),
    "down": (layers.Downsample2D(32), (IMAGE,)),
    "up": (layers.Upsample2D(32), (IMAGE,)),
    "transformer": (unet.BasicTransformerBlock(2), (TOKENS, jnp.zeros((1, 5, 16)))),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_blocks_weights_wait_for_its_input(name):
    block, args = BLOCKS[name]
    waited_for = []

    def record(tree, after=None):
        waited_for.append(after)
        return tree

    def run(weights, *args):
        block.clone(run=layers.Run(weights_fn=record)).apply(weights, *args)
        assert waited_for and all(after is args[0] for after in waited_for)

    jax.eval_shape(run, jax.eval_shape(block.init, jax.random.key(0), *args), *args)
