"""ControlNetModel (Zhang et al. 2023): a copy of a UNet's encoder that reads an image, too.

    x             = conv_in(z_t) + embedding(image), then the way down and the middle as in a UNet
    residuals     = zero_conv_n(skip_n) for every skip, and zero_conv(middle)

A UNet adds them, scaled, to its skips after the whole way down and to its middle (`UNet2DConditionModel.residuals`).
The image has values in [0, 1]. No net is conditioned on the guidance weight w, even beside a UNet that is.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from lcm_jax.errors import UnsupportedConfig
from lcm_jax.models.config import Levels, class_name, module_fields
from lcm_jax.models.layers import Run, conv1x1, conv3x3
from lcm_jax.models.unet import Encoder, UNet2DConditionModel, check_encoder
from lcm_jax.typed import Range

_Depth = Annotated[int, Range(0, 32)]  # 0: a transformer of projections alone, as in SDXL's "mid" nets
_ORDERS = ("rgb", "bgr")
_zeros = {"kernel_init": nn.initializers.zeros}


class ControlNetConditioningEmbedding(nn.Module):
    """Image [b H W c] -> [b h w channels]: 3x3 convolutions and SiLU, of which every second halves the sides."""

    channels: int
    widths: tuple[int, ...]
    run: Run = Run()

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        x = nn.silu(conv3x3(self.widths[0], "conv_in", self.run)(image))
        for i, (width, wider) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            x = nn.silu(conv3x3(width, f"blocks_{2 * i}", self.run)(x))
            x = nn.silu(conv3x3(wider, f"blocks_{2 * i + 1}", self.run, strides=(2, 2))(x))
        return conv3x3(self.channels, "conv_out", self.run, **_zeros)(x)


class ControlNetModel(Encoder):
    """Residuals for a UNet's skips and middle from an image. Fields: those of diffusers' ControlNetModel."""

    transformer_layers_per_block: _Depth | tuple[_Depth, ...] = 1
    conditioning_embedding_out_channels: Levels = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    FIXED: ClassVar[Mapping[str, tuple]] = {
        key: UNet2DConditionModel.FIXED[key]
        for key in (
            "act_fn",
            "addition_embed_type_num_heads",
            "class_embed_type",
            "downsample_padding",
            "encoder_hid_dim",
            "encoder_hid_dim_type",
            "mid_block_scale_factor",
            "num_attention_heads",
            "num_class_embeds",
            "only_cross_attention",
            "resnet_time_scale_shift",
            "_diffusers_version",
        )
    } | {"_class_name": ("ControlNetModel",), "conditioning_channels": (3,)}

    @property
    def factor(self) -> int:
        """Pixels of the image on a side of one latent."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array,
        image: jax.Array,
        added_cond_kwargs: Mapping[str, jax.Array] | None = None,
    ) -> list[jax.Array]:
        """The residuals of one evaluation, unscaled.

        Args:
          sample: the UNet's noisy latents [b h w in_channels].
          timesteps, encoder_hidden_states, added_cond_kwargs: as the UNet's.
          image: [b H W 3] or [1 H W 3], values in [0, 1], H = factor * h; RGB, whatever order the net was trained on.

        Returns:
          One for each skip (see `skip_widths`), [b h w c] of its level, and the middle's; [b 1 1 c], the means, with
          `global_pool_conditions`.
        """
        x, run = sample.astype(self.dtype), self.run
        context, image = encoder_hidden_states.astype(self.dtype), image.astype(self.dtype)
        temb = self._time(jnp.broadcast_to(timesteps, x.shape[:1]), None, added_cond_kwargs)
        image = image[..., ::-1] if self.controlnet_conditioning_channel_order == "bgr" else image
        width, widths = self.block_out_channels[0], self.conditioning_embedding_out_channels
        embedding = ControlNetConditioningEmbedding(width, widths, run, name="controlnet_cond_embedding")
        x, skips = self._down(conv3x3(width, "conv_in", run)(x) + embedding(image), temb, context)
        middle = self._middle(x, temb, context)
        found = [
            conv1x1(skip.shape[-1], f"controlnet_down_blocks_{n}", run, **_zeros)(skip) for n, skip in enumerate(skips)
        ]
        found.append(conv1x1(middle.shape[-1], "controlnet_mid_block", run, **_zeros)(middle))
        return [one.mean((1, 2), keepdims=True) for one in found] if self.global_pool_conditions else found


def from_config(config: Mapping[str, Any], dtype: DTypeLike = jnp.float32) -> ControlNetModel:
    """The module that a ControlNet's `config.json` describes; missing keys have diffusers' defaults.

    Raises:
      UnsupportedConfig: a field has a value outside the Stable Diffusion family; it names the field and the value.
    """
    kind = class_name(config, "ControlNetModel")
    if kind != "ControlNetModel":
        raise UnsupportedConfig("_class_name", kind, supported=("ControlNetModel",))
    fields = module_fields(ControlNetModel, config, ControlNetModel.FIXED, keep_null=frozenset({"mid_block_type"}))
    net = ControlNetModel(**fields, dtype=jnp.dtype(dtype))
    if net.controlnet_conditioning_channel_order not in _ORDERS:
        order = net.controlnet_conditioning_channel_order
        raise UnsupportedConfig("controlnet_conditioning_channel_order", order, supported=_ORDERS)
    check_encoder(net)
    return net
