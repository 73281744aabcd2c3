"""AutoencoderKL, the VAE of all Stable Diffusion models; images [b H W 3] in [-1, 1], latents [b h w c] unscaled.

    encode: conv_in, down blocks, mid (resnet, attention, resnet), GN SiLU conv_out, quant_conv -> mean, log-variance
    decode: post_quant_conv, conv_in, mid, up blocks, GN SiLU conv_out

Diffusion works on z = scaling_factor * (mean + exp(logvar / 2) noise).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.models import taesd, tiling
from lcm_jax.models.attention import AttentionFn, dot_product_attention
from lcm_jax.models.config import DIFFUSERS_VERSION, Channels, Depth, Levels, class_name, module_fields
from lcm_jax.models.layers import (
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Run,
    Upsample2D,
    WeightsFn,
    conv1x1,
    conv3x3,
    multi_head_attention,
)
from lcm_jax.typed import Offset, Positive

EPSILON = 1e-6  # of every norm, in every file
LOGVAR_RANGE = (-30.0, 20.0)


class VAEAttention(nn.Module):
    """Single-head self-attention over all h*w tokens, projections with bias, residual."""

    groups: int
    run: Run

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = GroupNorm(self.groups, EPSILON, self.run, name="group_norm")(x).reshape(b, h * w, c)
        return x + multi_head_attention(y, y, heads=1, qkv_bias=True, run=self.run).reshape(x.shape)


class VAEMidBlock(nn.Module):
    """resnet[, attention], resnet."""

    channels: int
    groups: int
    add_attention: bool
    run: Run

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResnetBlock2D(self.channels, self.groups, EPSILON, self.run, name="resnets_0")(x)
        if self.add_attention:
            x = VAEAttention(self.groups, self.run, name="attentions_0")(x)
        return ResnetBlock2D(self.channels, self.groups, EPSILON, self.run, name="resnets_1")(x)


class VAEBlock(nn.Module):
    """`num_layers` resnets of one width, then the level's down- or upsampler ("down", "up" or None)."""

    channels: int
    num_layers: int
    groups: int
    resample: str | None
    run: Run

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for j in range(self.num_layers):
            x = ResnetBlock2D(self.channels, self.groups, EPSILON, self.run, name=f"resnets_{j}")(x)
        if self.resample == "down":
            return Downsample2D(self.channels, asymmetric=True, run=self.run, name="downsamplers_0")(x)
        if self.resample == "up":
            return Upsample2D(self.channels, self.run, name="upsamplers_0")(x)
        return x


class Encoder(nn.Module):
    widths: tuple[int, ...]
    layers_per_block: int
    out_channels: int
    groups: int
    mid_attention: bool
    run: Run

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        last = len(self.widths) - 1
        x = conv3x3(self.widths[0], "conv_in", self.run)(x)
        for i, width in enumerate(self.widths):
            resample = "down" if i < last else None
            x = VAEBlock(width, self.layers_per_block, self.groups, resample, self.run, name=f"down_blocks_{i}")(x)
        x = VAEMidBlock(self.widths[-1], self.groups, self.mid_attention, self.run, name="mid_block")(x)
        x = nn.silu(GroupNorm(self.groups, EPSILON, self.run, name="conv_norm_out")(x))
        return conv3x3(self.out_channels, "conv_out", self.run)(x)


class Decoder(nn.Module):
    widths: tuple[int, ...]  # in the encoder's order; the decoder starts from the last
    layers_per_block: int
    out_channels: int
    groups: int
    mid_attention: bool
    run: Run

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        widths, last = self.widths[::-1], len(self.widths) - 1
        x = conv3x3(widths[0], "conv_in", self.run)(z)
        x = VAEMidBlock(widths[0], self.groups, self.mid_attention, self.run, name="mid_block")(x)
        for i, width in enumerate(widths):
            resample = "up" if i < last else None
            x = VAEBlock(width, self.layers_per_block + 1, self.groups, resample, self.run, name=f"up_blocks_{i}")(x)
        x = nn.silu(GroupNorm(self.groups, EPSILON, self.run, name="conv_norm_out")(x))
        return conv3x3(self.out_channels, "conv_out", self.run)(x)


class AutoencoderKL(nn.Module):
    """Fields: those of diffusers' AutoencoderKL with its defaults; the last three: see `layers.Run`."""

    in_channels: Channels = 3
    out_channels: Channels = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: Levels = (64,)
    layers_per_block: Depth = 1
    latent_channels: Channels = 4
    norm_num_groups: Channels = 32
    sample_size: Channels | tuple[Channels, Channels] = 32
    scaling_factor: Positive = 0.18215
    shift_factor: Offset | None = None
    latents_mean: tuple[Offset, ...] | None = None
    latents_std: tuple[Positive, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: DTypeLike = jnp.float32
    attention_fn: AttentionFn = dot_product_attention
    weights_fn: WeightsFn | None = None

    FIXED: ClassVar[Mapping[str, tuple]] = {
        "act_fn": ("silu", "swish", None),
        "_class_name": ("AutoencoderKL",),
        "_diffusers_version": (DIFFUSERS_VERSION,),
    }

    def setup(self):
        run = Run(self.dtype, self.attention_fn, self.weights_fn)
        half = dict(
            widths=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            groups=self.norm_num_groups,
            mid_attention=self.mid_block_add_attention,
            run=run,
        )
        self.encoder = Encoder(out_channels=2 * self.latent_channels, **half)
        self.decoder = Decoder(out_channels=self.out_channels, **half)
        if self.use_quant_conv:
            self.quant_conv = conv1x1(2 * self.latent_channels, None, run)
        if self.use_post_quant_conv:
            self.post_quant_conv = conv1x1(self.latent_channels, None, run)

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """images [b H W 3] in [-1, 1] -> mean, log-variance [b h w c] of the posterior, unscaled, float32."""
        moments = self.encoder(images.astype(self.dtype))
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, z: jax.Array) -> jax.Array:
        """z [b h w c], already divided by `scaling_factor` -> images [b H W 3] in about [-1, 1], compute dtype."""
        z = z.astype(self.dtype)
        if self.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstruction from the posterior's mean; `init` sees every parameter here."""
        return self.decode(self.encode(images)[0])


def from_config(config: Mapping[str, Any], dtype: DTypeLike = jnp.float32) -> AutoencoderKL | taesd.AutoencoderTiny:
    """The VAE that a `config.json` describes; `_class_name` says which of the two.

    Raises:
      UnsupportedConfig: the class or a field's value is outside the Stable Diffusion family.
    """
    kind = class_name(config, "AutoencoderKL")
    if kind == "AutoencoderTiny":
        return taesd.from_config(config, dtype)
    if kind != "AutoencoderKL":
        raise UnsupportedConfig("_class_name", kind, supported=("AutoencoderKL", "AutoencoderTiny"))
    vae = AutoencoderKL(**module_fields(AutoencoderKL, config, AutoencoderKL.FIXED), dtype=dtype)
    for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        kinds = getattr(vae, key)
        if set(kinds) != {block} or len(kinds) != len(vae.block_out_channels):
            raise UnsupportedConfig(
                key, kinds, supported=f"{len(vae.block_out_channels)} entries {block}, like block_out_channels"
            )
    for width in vae.block_out_channels:
        if width % vae.norm_num_groups:
            raise UnsupportedConfig(
                "block_out_channels", width, supported=f"multiples of norm_num_groups={vae.norm_num_groups}"
            )
    taesd.check_images(vae)
    for key in ("latents_mean", "latents_std"):
        if len(getattr(vae, key) or range(vae.latent_channels)) != vae.latent_channels:
            raise UnsupportedConfig(
                key, getattr(vae, key), supported=f"{vae.latent_channels} entries, as latent_channels, or null"
            )
    if tiling.tile_size(vae) < 2 * vae.factor:
        raise UnsupportedConfig("sample_size", vae.sample_size, supported=f"{2 * vae.factor} or more")
    return vae
