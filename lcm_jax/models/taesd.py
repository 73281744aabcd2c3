"""AutoencoderTiny (TAESD, TAESDXL): a distilled VAE with 1.2 M parameters in each half, usable wherever a VAE is.

    encode: x in [-1, 1] -> (x + 1) / 2 -> conv, blocks; (stride-2 conv, blocks) per further level; conv -> latents
    decode: 3 tanh(z / 3) -> conv, ReLU; (blocks, nearest upsampling, conv) per level; conv -> 2 y - 1
    block:  ReLU(x + conv ReLU conv ReLU conv x)

There is no posterior: `encode` returns the latents as the mean, with the smallest log-variance that AutoencoderKL has.
Diffusion works on these latents as they are, so published files have scaling_factor 1.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.models.config import DIFFUSERS_VERSION, Channels, Depth, Levels, module_fields
from lcm_jax.models.layers import Run, WeightsFn, conv3x3, nearest_resize
from lcm_jax.typed import Offset, Positive

NO_VARIANCE = -30.0  # log-variance of a latent without noise: the lower end of AutoencoderKL's range


class TinyBlock(nn.Module):
    """Names count convolutions and ReLUs, as torch's Sequential does."""

    channels: int
    run: Run

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.relu(conv3x3(self.channels, "conv_0", self.run)(x))
        h = nn.relu(conv3x3(self.channels, "conv_2", self.run)(h))
        return nn.relu(conv3x3(self.channels, "conv_4", self.run)(h) + x)


class TinyEncoder(nn.Module):
    """Images in [-1, 1] -> latents; `layers_N` counts convolutions and blocks, as torch's Sequential does."""

    widths: tuple[int, ...]
    num_blocks: tuple[int, ...]
    out_channels: int
    run: Run

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = (x + 1) / 2
        index = 0
        for level, (width, count) in enumerate(zip(self.widths, self.num_blocks, strict=True)):
            down = {} if level == 0 else {"strides": (2, 2), "use_bias": False}
            x = conv3x3(width, f"layers_{index}", self.run, **down)(x)
            for j in range(1, count + 1):
                x = TinyBlock(width, self.run, name=f"layers_{index + j}")(x)
            index += count + 1
        return conv3x3(self.out_channels, f"layers_{index}", self.run)(x)


class TinyDecoder(nn.Module):
    """Latents -> images in [-1, 1]; here `layers_N` counts ReLU and upsampling, too."""

    widths: tuple[int, ...]
    num_blocks: tuple[int, ...]
    out_channels: int
    upsampling: int
    run: Run

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = nn.relu(conv3x3(self.widths[0], "layers_0", self.run)(jnp.tanh(z / 3) * 3))
        index, last = 2, len(self.widths) - 1
        for level, (width, count) in enumerate(zip(self.widths, self.num_blocks, strict=True)):
            for j in range(count):
                x = TinyBlock(width, self.run, name=f"layers_{index + j}")(x)
            index += count
            if level < last:
                x = nearest_resize(x, self.upsampling * x.shape[1], self.upsampling * x.shape[2])
                x = conv3x3(width, f"layers_{index + 1}", self.run, use_bias=False)(x)
                index += 2
        return conv3x3(self.out_channels, f"layers_{index}", self.run)(x) * 2 - 1


class AutoencoderTiny(nn.Module):
    """Fields: those of diffusers' AutoencoderTiny with its defaults; the last two: see `layers.Run`."""

    in_channels: Channels = 3
    out_channels: Channels = 3
    encoder_block_out_channels: Levels = (64, 64, 64, 64)
    decoder_block_out_channels: Levels = (64, 64, 64, 64)
    latent_channels: Channels = 4
    upsampling_scaling_factor: Depth = 2
    num_encoder_blocks: tuple[Depth, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[Depth, ...] = (3, 3, 3, 1)
    latent_magnitude: Positive = 3
    latent_shift: Offset = 0.5
    scaling_factor: Positive = 1.0
    shift_factor: Offset = 0.0
    force_upcast: bool = False
    dtype: DTypeLike = jnp.float32
    weights_fn: WeightsFn | None = None

    # Fields of AutoencoderKL that users of either VAE read.
    sample_size: ClassVar[int] = 512  # edge of a tile: diffusers' default, as files do not have it
    latents_mean: ClassVar[None] = None
    latents_std: ClassVar[None] = None

    FIXED: ClassVar[Mapping[str, tuple]] = {
        "act_fn": ("relu", None),
        "upsample_fn": ("nearest", None),
        "_class_name": ("AutoencoderTiny",),
        "_diffusers_version": (DIFFUSERS_VERSION,),
    }

    def setup(self):
        run = Run(self.dtype, weights_fn=self.weights_fn)
        self.encoder = TinyEncoder(self.encoder_block_out_channels, self.num_encoder_blocks, self.latent_channels, run)
        self.decoder = TinyDecoder(
            self.decoder_block_out_channels,
            self.num_decoder_blocks,
            self.out_channels,
            self.upsampling_scaling_factor,
            run,
        )

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.num_encoder_blocks) - 1)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """images [b H W 3] in [-1, 1] -> the latents [b h w c] as mean, and their log-variance, -30; float32."""
        mean = self.encoder(images.astype(self.dtype)).astype(jnp.float32)
        return mean, jnp.full_like(mean, NO_VARIANCE)

    def decode(self, z: jax.Array) -> jax.Array:
        """z [b h w c], already divided by `scaling_factor` -> images [b H W 3] in about [-1, 1], compute dtype."""
        return self.decoder(z.astype(self.dtype))

    @nn.nowrap
    def scale_latents(self, z: jax.Array) -> jax.Array:
        """Latents -> [0, 1], to store them in an image file; values beyond `latent_magnitude` are clipped."""
        return jnp.clip(z / (2 * self.latent_magnitude) + self.latent_shift, 0, 1)

    @nn.nowrap
    def unscale_latents(self, x: jax.Array) -> jax.Array:
        """[0, 1] -> latents: the inverse of `scale_latents`."""
        return (x - self.latent_shift) * (2 * self.latent_magnitude)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstruction, without diffusers' rounding of the latents to bytes; `init` sees every parameter here."""
        return self.decode(self.encode(images)[0])


def check_images(vae: Any) -> None:
    """Raises UnsupportedConfig unless either kind of VAE takes and gives images of three channels."""
    for key in ("in_channels", "out_channels"):
        if getattr(vae, key) != 3:
            raise UnsupportedConfig(key, getattr(vae, key), supported="3, for images")


def from_config(config: Mapping[str, Any], dtype: DTypeLike = jnp.float32) -> AutoencoderTiny:
    """The module that an AutoencoderTiny's `config.json` describes.

    Raises:
      UnsupportedConfig: levels of different widths (diffusers cannot build them either), or settings that do not
        match each other.
    """
    # diffusers writes the decoder's widths a second time, under the name that its pipelines read.
    fields = module_fields(AutoencoderTiny, config, AutoencoderTiny.FIXED, ignored=frozenset({"block_out_channels"}))
    vae = AutoencoderTiny(**fields, dtype=dtype)
    check_images(vae)
    for widths_key, blocks_key in (
        ("encoder_block_out_channels", "num_encoder_blocks"),
        ("decoder_block_out_channels", "num_decoder_blocks"),
    ):
        widths, blocks = getattr(vae, widths_key), getattr(vae, blocks_key)
        if len(set(widths)) != 1:
            raise UnsupportedConfig(widths_key, widths, supported="one width for all levels")
        if len(widths) != len(blocks):
            raise UnsupportedConfig(blocks_key, blocks, supported=f"{len(widths)} entries, like {widths_key}")
    if vae.upsampling_scaling_factor ** (len(vae.num_decoder_blocks) - 1) != vae.factor:
        raise UnsupportedConfig(
            "upsampling_scaling_factor",
            vae.upsampling_scaling_factor,
            supported=f"a factor with which the decoder enlarges by {vae.factor}, as the encoder reduces",
        )
    return vae
