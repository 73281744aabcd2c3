"""DINOv2's vision transformer (Oquab et al. 2023, arXiv:2304.07193): transformers' Dinov2Model, class token as feature.

    x   = [class token, patches of p x p projected] + position embedding, resized to the image's grid
    x  += lambda1 * MHA(LN1(x));  x += lambda2 * MLP(LN2(x))        per layer; MLP with GELU, or SwiGLU in the giant
    feature = LN(x) at the class token

FD-DINOv2 is the Frechet distance between features of the large network (Stein et al. 2023, arXiv:2306.04675, who resize
the whole image to 224 x 224). Position embeddings are resized from their 37 x 37 grid by torch's bicubic (a = -0.75,
pixel centres, no antialiasing) to the exact grid, as in transformers. Meta's own code adds 0.1 to the grid before it
divides, which changes features slightly.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lcm_jax.foreign import read_json
from lcm_jax.metrics import resizing
from lcm_jax.metrics.networks import weights
from lcm_jax.metrics.networks.network import Network, resize_variant
from lcm_jax.models import clip
from lcm_jax.models.config import RUN_FIELDS, Channels, Epsilon, Layers, module_fields, to_config
from lcm_jax.models.layers import LayerNorm, Run, multi_head_attention
from lcm_jax.pretrained.safetensors_io import TRANSFORMERS_NAME, open_weights
from lcm_jax.typed import Range, config_of

SIDE = 224
RESIZES = ("square", "processor")

# Published files -> names of today's transformers, after which the modules here are named.
_RENAMED = (
    (re.compile(r"^dinov2\."), ""),
    (re.compile(r"\.attention\.attention\.(query|key|value)\."), r".attention.\1_proj."),
    (re.compile(r"\.(query|key|value)_proj\."), lambda m: f".{m[1][0]}_proj."),
    (re.compile(r"\.attention\.output\.dense\."), ".attention.o_proj."),
    (re.compile(r"\.mlp\.weights_out\."), ".mlp.down_proj."),
)


def cubic_weights(size: int, grid: int) -> np.ndarray:
    """Matrix [size grid], float64, that resizes a line of `grid` values as torch's bicubic without antialiasing.

    Cubic convolution (Keys 1981) with a = -0.75; values beyond the border repeat it.
    """
    a, out = -0.75, np.zeros((size, grid))
    for i in range(size):
        at = (i + 0.5) * grid / size - 0.5
        low = int(np.floor(at))
        for tap in range(low - 1, low + 3):
            d = abs(at - tap)
            near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((d - 5) * d + 8) * d * a - 4 * a
            out[i, min(max(tap, 0), grid - 1)] += near if d <= 1 else far
    return out


class Embeddings(nn.Module):
    """Images [b h w 3] -> class token and patches, row by row, with their positions: [b 1 + (h/p)(w/p) d]."""

    hidden_size: int
    grid: int  # of the position embeddings
    patch_size: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        b, d, patch = images.shape[0], self.hidden_size, (self.patch_size, self.patch_size)
        x = PatchEmbeddings(d, patch, name="patch_embeddings")(images)
        h, w = x.shape[1:3]
        token = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, d))
        positions = self.param("position_embeddings", nn.initializers.normal(0.02), (1, self.grid**2 + 1, d))
        table = positions[0, 1:].reshape(self.grid, self.grid, d)
        if (h, w) != (self.grid, self.grid):
            rows, columns = (jnp.asarray(cubic_weights(n, self.grid), jnp.float32) for n in (h, w))
            table = jnp.einsum("hi,wj,ijd->hwd", rows, columns, table)
        first = jnp.broadcast_to(token + positions[:, :1], (b, 1, d))
        return jnp.concatenate([first, (x + table).reshape(b, h * w, d)], axis=1)


class PatchEmbeddings(nn.Module):
    """Images [b h w 3] -> patches [b h/p w/p d]."""

    hidden_size: int
    patch: tuple[int, int]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        return nn.Conv(self.hidden_size, self.patch, strides=self.patch, padding="VALID", name="projection")(images)


class SelfAttention(nn.Module):
    heads: int
    qkv_bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return multi_head_attention(
            x,
            x,
            heads=self.heads,
            qkv_bias=self.qkv_bias,
            run=Run(),
            names=("q_proj", "k_proj", "v_proj", "o_proj"),
        )


class LayerScale(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.param("lambda1", nn.initializers.ones, (x.shape[-1],))


class MLP(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.gelu(nn.Dense(self.hidden, name="fc1")(x), approximate=False)
        return nn.Dense(x.shape[-1], name="fc2")(y)


class SwiGLU(nn.Module):
    """silu(gate) * up, projected back; two thirds of `hidden`, rounded up to a multiple of 8."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = (int(self.hidden * 2 / 3) + 7) // 8 * 8
        gate, up = nn.Dense(width, name="gate_proj")(x), nn.Dense(width, name="up_proj")(x)
        return nn.Dense(x.shape[-1], name="down_proj")(nn.silu(gate) * up)


class Layer(nn.Module):
    """x [b s d] -> [b s d]; hidden: width of the MLP."""

    heads: int
    hidden: int
    epsilon: float
    qkv_bias: bool
    swiglu: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = SelfAttention(self.heads, self.qkv_bias, name="attention")(LayerNorm(self.epsilon, name="norm1")(x))
        x = x + LayerScale(name="layer_scale1")(y)
        mlp = (SwiGLU if self.swiglu else MLP)(self.hidden, name="mlp")
        return x + LayerScale(name="layer_scale2")(mlp(LayerNorm(self.epsilon, name="norm2")(x)))


class Encoder(nn.Module):
    num_layers: int
    layer: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.num_layers):
            x = Layer(**self.layer, name=f"layer_{i}")(x)
        return x


class Dinov2Model(nn.Module):
    """Normalised images [b h w 3] -> class token features [b d]. Fields: transformers' Dinov2Config."""

    hidden_size: Channels = 768
    num_hidden_layers: Layers = 12
    num_attention_heads: Channels = 12
    mlp_ratio: Annotated[float, Range(0.1, 16)] = 4
    layer_norm_eps: Epsilon = 1e-6
    image_size: Channels = 224
    patch_size: Channels = 14
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False

    FIXED: ClassVar[Mapping[str, tuple]] = {"hidden_act": ("gelu",), "num_channels": (3,), "model_type": ("dinov2",)}

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        grid = self.image_size // self.patch_size
        layer = dict(
            heads=self.num_attention_heads,
            hidden=int(self.hidden_size * self.mlp_ratio),
            epsilon=self.layer_norm_eps,
            qkv_bias=self.qkv_bias,
            swiglu=self.use_swiglu_ffn,
        )
        x = Embeddings(self.hidden_size, grid, self.patch_size, name="embeddings")(images)
        x = Encoder(self.num_hidden_layers, layer, name="encoder")(x)
        return LayerNorm(self.layer_norm_eps, name="layernorm")(x[:, 0])


def from_config(config: Mapping[str, Any]) -> Dinov2Model:
    """The network of a `config.json`. Raises UnsupportedConfig if it is not a DINOv2 of the kind built here."""
    known = {f.name for f in dataclasses.fields(Dinov2Model)} - RUN_FIELDS | Dinov2Model.FIXED.keys()
    kept = {key: value for key, value in config.items() if key in known}
    model = Dinov2Model(**module_fields(Dinov2Model, kept, Dinov2Model.FIXED))
    clip.check_heads(model)
    clip.check_patches(model)
    return model


def load(path: str | Path | None, resize: str | None = None) -> Network:
    """The network in a folder of transformers' format, with `resize` "square" (default) or "processor".

    Raises:
      LcmError: no such folder or variant, files missing or damaged, or another network's.
    """
    resize = resize_variant("dinov2", resize, RESIZES)
    folder = weights.existing("dinov2", path)
    with config_of(folder / "config.json"):
        module = from_config(read_json(folder / "config.json"))
    processor = resizing.Processor((SIDE, SIDE), None, resizing.IMAGENET_MEAN, resizing.IMAGENET_STD)
    if resize == "processor":
        processor = resizing.read_processor(folder)
    with open_weights(folder, TRANSFORMERS_NAME) as stored:
        params = read(module, stored.shapes, stored.read, str(stored.source))
    name = f"dinov2-{module.num_hidden_layers}x{module.hidden_size}/{resize}-bicubic"
    return Network(name, module.hidden_size, module, params, processor, f"{processor!r} {to_config(module)}")


def read(
    module: Dinov2Model, shapes: Mapping[str, tuple], read_tensor: Callable[[str], np.ndarray], what: str
) -> dict[str, Any]:
    """The parameter tree from published keys, or from those of today's transformers."""
    found = {}  # name here -> (key in the file, which half of its rows or None)
    for key in shapes:
        name = key
        for pattern, new in _RENAMED:
            name = pattern.sub(new, name)
        if ".mlp.weights_in." in name:
            for half, part in enumerate(("gate_proj", "up_proj")):
                found[name.replace("weights_in", part)] = key, half
        elif not name.endswith("mask_token"):  # stands for hidden patches in training
            found[name] = key, None

    def shape(key: str, half: int | None) -> tuple[int, ...]:
        return shapes[key] if half is None else (shapes[key][0] // 2, *shapes[key][1:])

    def tensor(name: str) -> np.ndarray:
        key, half = found[name]
        value = read_tensor(key)
        return value if half is None else np.split(value, 2)[half]

    side = module.image_size // module.patch_size * module.patch_size
    table = weights.torch_table(module, (1, side, side, 3))
    return weights.read_params(table, {name: shape(*entry) for name, entry in found.items()}, tensor, what)
