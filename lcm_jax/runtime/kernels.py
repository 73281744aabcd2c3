"""Which attention runs where: `choose` gives the networks one function that picks a kernel for each shape it meets.

    splash   TPU; q and k equally long, a multiple of 128          no logits in memory, forward or backward
    cudnn    GPU; bfloat16 or float16; head sizes it knows;        no logits in memory, forward or backward
             an even number of queries
    chunked  anywhere; blocks of queries                           the logits of one block
    xla      anywhere                                              all logits, float32: b n s l * 4 bytes
    auto     splash or cudnn where they run (and the queries are many), chunked where the logits of one device would
             take more than LOGITS_LIMIT, else xla

Causal attention, that of the text encoders over 77 tokens, is always XLA's.

How the networks of a pipeline run on a mesh: which attention, where weights are gathered, what is rematerialised.

Models know none of it; they take functions. None of it changes what they compute.

Options of XLA's compiler by platform: `compiler_options` of `jax.jit`.

On a CPU, XLA hands whole subgraphs to YNNPACK, whose convolutions and exponentials are slower than XLA's own, its sums
of gradients faster. Our side of the workloads of experiments/speed on 2 cores, by these options' value: sampling the
embedded model in 4 steps takes 54 ms with YNNPACK, 43 without; a pass of Stable Diffusion 1.5 at 512 pixels 8.1 s, 4.9
without; a training step 301 ms, 269 without, 243 with its sums alone.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh

from lcm_jax.errors import LcmError
from lcm_jax.models.attention import (
    ATTENTION_OUTPUT,
    AttentionFn,
    chunked_attention,
    dot_product_attention,
    tag_attention,
)
from lcm_jax.models.int8 import Dequantise
from lcm_jax.models.lora import Adapted
from lcm_jax.models.unet import UNet2DConditionModel
from lcm_jax.pretrained import Pipeline
from lcm_jax.runtime import mesh as mesh_lib

CHOICES = ("auto", "xla", "chunked", "cudnn", "splash")
FORWARD_MODE = ("xla", "chunked")  # those that `jax.jvp` can differentiate; "auto" may choose another

LOGITS_LIMIT = 2**28  # bytes of float32 logits on one device above which "auto" works in blocks of queries
CHUNK_LOGITS = 2**26  # bytes that the logits of one such block take
SPLASH_TOKENS = 1024  # below this many "auto" leaves a TPU's attention to XLA
SPLASH_HEAD = 256  # and larger heads, the VAE's one of 512, too
SPLASH_LANES = 128  # sequences and their tiles are multiples of this
CUDNN_HEAD, CUDNN_HEAD_HOPPER = 128, 256  # the largest head size with a gradient, and on Hopper (9.0) alone
CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)


def choose(implementation: str, dtype: Any, mesh: Mesh) -> AttentionFn:
    """Attention of [b s n d] over [b l n d] on a mesh whose devices split b among them.

    Args:
      implementation: one of CHOICES.
      dtype: compute dtype of the network that calls it.
      mesh: of real devices, or of those of an ahead-of-time topology.

    Raises:
      LcmError: no such implementation, or the mesh's devices cannot run it.
    """
    _check_platform(implementation, dtype, mesh)
    if implementation == "xla":
        return dot_product_attention
    return _Attention(implementation, jnp.dtype(dtype), mesh)


def check(unet: UNet2DConditionModel, implementation: str, mesh: Mesh) -> None:
    """Refuses an implementation that cannot run every layer of a UNet, before anything is compiled.

    Raises:
      LcmError: as `choose`, or cuDNN does not know the head size of a layer, which is named.
    """
    _check_platform(implementation, unet.dtype, mesh)
    if implementation != "cudnn":
        return
    largest = _largest_cudnn_head(mesh)
    wrong = {layer: size for layer, size in head_sizes(unet).items() if not _cudnn_knows(size, largest)}
    if wrong:
        layer, size = next(iter(wrong.items()))
        more = f" and {len(wrong) - 1} more layers" if len(wrong) > 1 else ""
        raise LcmError(
            f"model.attention=cudnn cannot run {layer} (head size {size}){more}: here it knows multiples of 8 up to "
            f"{largest}; take auto, which leaves such layers to XLA"
        )


def head_sizes(unet: UNet2DConditionModel) -> dict[str, int]:
    """Path of each transformer of a UNet -> the head size of its attention, from the input to the output."""
    sizes = [
        width // heads
        for width, heads in zip(unet.block_out_channels, unet.per_level("attention_head_dim"), strict=True)
    ]
    found = {}
    for i, size in enumerate(sizes):
        found |= {f"down_blocks_{i}.attentions_{j}": size for j in range(len(unet.down_depths(i)))}
    if unet.mid_block_type == "UNetMidBlock2DCrossAttn":
        found["mid_block.attentions_0"] = sizes[-1]
    for i, size in enumerate(reversed(sizes)):
        found |= {f"up_blocks_{i}.attentions_{j}": size for j in range(len(unet.up_depths(i)))}
    return found


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """The TPU's flash attention kernel on the arrays of one device: [b s n d] over [b s n d], s a multiple of 128.

    Logits and softmax are float32. What its backward pass needs of the forward one has the tag ATTENTION_OUTPUT.
    """
    kernel = _splash_kernel(q.shape[2], q.shape[1], k.shape[1], interpret)
    heads_first = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))  # the kernel does not scale
    return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's flash attention: [b s n d] over [b l n d], s even, bfloat16 or float16.

    jax differentiates it for even lengths alone (`check_is_flash_attention`, jax 0.10 to 0.12; cuDNN itself can do odd
    ones), so a 78th key, which the lengths hide, goes beside the 77 of a caption.
    """
    lengths = None
    if k.shape[1] % 2:
        lengths = jnp.full(k.shape[:1], k.shape[1], jnp.int32)
        k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (k, v))
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", key_value_seq_lengths=lengths)
    return tag_attention(out)


@functools.lru_cache
def _splash_kernel(heads: int, queries: int, keys: int, interpret: bool) -> Any:
    block_q, block_k = _splash_block(queries), _splash_block(keys)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_kv_compute=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=block_k,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((queries, keys))] * heads)
    # The kernel outlives the trace that asks for it first, which the training loop begins under a transfer guard.
    with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
        return splash_attention_kernel.make_splash_mha(
            mask,
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENTION_OUTPUT,
            interpret=interpret,
        )


def _splash_block(length: int, most: int = 1024) -> int:
    """The largest tile that divides a sequence."""
    return max(size for size in range(SPLASH_LANES, most + 1, SPLASH_LANES) if length % size == 0)


@dataclasses.dataclass(frozen=True)
class _Attention:
    """An AttentionFn that decides by shape; equal choices are equal, so that modules stay comparable."""

    implementation: str
    dtype: Any
    mesh: Mesh

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
        kind = "xla" if causal else self.kind(q.shape, k.shape)
        if kind == "splash":
            return self._on_each_device(splash_attention)(q, k, v)
        if kind == "cudnn":
            return cudnn_attention(q, k, v)
        if kind == "chunked":
            return chunked_attention(q, k, v, self._rows(q.shape, k.shape))
        return dot_product_attention(q, k, v, causal)

    def kind(self, q: tuple[int, ...], k: tuple[int, ...]) -> str:
        """What runs queries of shape q [b s n d] over keys of shape k [b l n d], not causal."""
        batch, queries, _, size = q
        keys = k[1]
        splash = batch % self.mesh.size == 0 and queries == keys and queries % SPLASH_LANES == 0
        if self.implementation == "splash":
            return "splash" if splash else self._plain(q, k)
        if self.implementation == "chunked":
            return "chunked"
        platform = self.mesh.devices.flat[0].platform
        if platform == "tpu" and splash and queries >= SPLASH_TOKENS and size <= SPLASH_HEAD:
            return "splash"
        cudnn = platform == "gpu" and self.dtype in CUDNN_DTYPES and queries % 2 == 0
        if cudnn and _cudnn_knows(size, _largest_cudnn_head(self.mesh)):
            return "cudnn"  # asked for by name or not: `check` has refused UNets that it cannot run
        return self._plain(q, k)

    def _plain(self, q: tuple[int, ...], k: tuple[int, ...]) -> str:
        return "chunked" if q[1] * self._row_bytes(q, k) > LOGITS_LIMIT else "xla"

    def _row_bytes(self, q: tuple[int, ...], k: tuple[int, ...]) -> int:
        """Bytes of one query position's float32 logits on one device, all its images and heads."""
        return math.ceil(q[0] / self.mesh.size) * q[2] * k[1] * 4

    def _rows(self, q: tuple[int, ...], k: tuple[int, ...]) -> int:
        return max(1, CHUNK_LOGITS // self._row_bytes(q, k))

    def _on_each_device(self, kernel: AttentionFn) -> AttentionFn:
        """A kernel that XLA cannot split, run by every device on its share of the batch."""
        if self.mesh.size == 1:
            return kernel
        rows = mesh_lib.batch_sharding(self.mesh).spec
        return jax.shard_map(kernel, mesh=self.mesh, in_specs=rows, out_specs=rows, check_vma=False)


def _check_platform(implementation: str, dtype: Any, mesh: Mesh) -> None:
    platform = mesh.devices.flat[0].platform
    if implementation not in CHOICES:
        raise LcmError(f"model.attention={implementation}: known are {', '.join(CHOICES)}")
    if implementation == "splash" and platform != "tpu":
        raise LcmError(f"model.attention=splash runs on TPUs alone, these devices are {platform}; take auto")
    if implementation == "cudnn" and platform != "gpu":
        raise LcmError(f"model.attention=cudnn runs on NVIDIA GPUs alone, these devices are {platform}; take auto")
    if implementation == "cudnn" and jnp.dtype(dtype) not in CUDNN_DTYPES:
        raise LcmError(
            f"model.attention=cudnn computes in bfloat16 or float16, not {jnp.dtype(dtype)}; set "
            "model.dtype=bfloat16 or take auto"
        )


def _cudnn_knows(head_size: int, largest: int) -> bool:
    return head_size % 8 == 0 and head_size <= largest


def _largest_cudnn_head(mesh: Mesh) -> int:
    """0 where cuDNN has no such attention: before NVIDIA's Ampere, and on other makes, whose capability is a name.

    Of others, what cuDNN 9.28 itself can differentiate (tests/test_cudnn.py). jax takes Blackwell (10.0 and more) for
    Hopper's equal, but there cuDNN refuses the gradient of larger heads, such as SD 1.x's 160.
    """
    try:
        capability = float(mesh.devices.flat[0].compute_capability)
    except ValueError:
        return 0
    return CUDNN_HEAD_HOPPER if 9 <= capability < 10 else CUDNN_HEAD if capability >= 8 else 0


def on_mesh(pipeline: Pipeline, mesh: Mesh, unet_attention: str = "auto", remat: str = "none") -> Pipeline:
    """The pipeline with networks for `mesh`, on which its weights lie by the rule of `runtime.mesh`.

    Args:
      unet_attention: one of CHOICES; the other networks choose by device and shape.
      remat: one of `layers.REMAT_CHOICES`, of the UNet.

    Raises:
      LcmError: the mesh's devices cannot run that attention, or not at the size of a head; the layer is named.
    """
    check(plain_module(pipeline.unet), unet_attention, mesh)
    others = {part: equipped(module, mesh) for part, module in pipeline.parts.items() if part != "unet"}
    return dataclasses.replace(pipeline, unet=equipped(pipeline.unet, mesh, unet_attention, remat=remat), **others)


def equipped(module: Any, mesh: Mesh, implementation: str = "auto", **fields: Any) -> Any:
    """A network for `mesh`: with weights gathered where a layer uses them, and attention, see `on_mesh`."""
    if isinstance(module, Adapted):
        return dataclasses.replace(module, module=equipped(module.module, mesh, implementation, **fields))
    fields["weights_fn"] = mesh_lib.gather_weights(mesh, module.dtype)
    if hasattr(module, "attention_fn"):
        fields["attention_fn"] = choose(implementation, module.dtype, mesh)
    return module.clone(**fields)


def dequantising(module: Any, platform: str | None = None) -> Any:
    """A network for weights in 8 bits, on devices of a platform; None: the default backend's."""
    barriers = (platform or jax.default_backend()) != "cpu"
    return module.clone(weights_fn=Dequantise(module.dtype, module.weights_fn, barriers))


def plain_module(unet: Any) -> Any:
    """The Linen module itself, of a UNet that may carry adapters."""
    return unet.module if isinstance(unet, Adapted) else unet


def auto_dtype(platform: str | None = None) -> str:
    """What "auto" computes in, in training and sampling: float32 on a CPU, else bfloat16; None: the default backend."""
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


Options = dict[str, str | int | bool]

_YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
# XLA would join products that share an operand, such as a layer's q, k and v, and then copy each part out of the joint
# result: 12 % of what a transformer block of Stable Diffusion 1.5 moves, 3 % with its gradient. A LoRA's thin products
# then stay apart as well: the embedded model's step moves 5 % less, in 2 % more kernels.
_SINGLE_PRODUCTS = {"xla_gpu_dot_merger_threshold_mb": 0}
_TRAINING: dict[str, Options] = {
    "cpu": {_YNNPACK: "LIBRARY_FUSION_TYPE_REDUCE"},
    "gpu": _SINGLE_PRODUCTS,
    # XLA would turn each reduction of a gradient to its shards into a loop around the ring that reads the activations
    # again in every turn; as one reduce-scatter the step moves far fewer bytes.
    "tpu": {
        "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
        "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
    },
}
_INFERENCE: dict[str, Options] = {"cpu": {_YNNPACK: ""}, "gpu": _SINGLE_PRODUCTS}
# Of several devices, besides: a collective begins early and ends where its result is read. NVIDIA's own jax sets it
# (docs.nvidia.com/jax-toolbox/environment-variables). For Hopper XLA does so anyway; for Ada no kernel runs beside a
# gradient's reduce-scatter without it, and one or more beside each with it.
_OVERLAP: dict[str, Options] = {"gpu": {"xla_gpu_enable_latency_hiding_scheduler": True}}


def training(platform: str, devices: int = 1) -> Options:
    """For a program with gradients, on this number of devices of a platform: "cpu", "gpu", "tpu"."""
    overlap = _OVERLAP.get(platform, {}) if devices > 1 else {}
    return _known(platform, _TRAINING.get(platform, {}) | overlap)


def inference(platform: str | None = None) -> Options:
    """For a program without; None: the default backend's."""
    platform = platform or jax.default_backend()
    return _known(platform, _INFERENCE.get(platform, {}))


def _known(platform: str, options: Options) -> Options:
    """Those of the options that this jaxlib has: they come and go, and none is worth an error."""
    if platform == "tpu":  # libtpu's, which the devices at hand may not know
        return dict(options)
    return {name: value for name, value in options.items() if _knows(name, value)}


@functools.cache
def _knows(name: str, value: str | int | bool) -> bool:
    """Whether the default backend takes an option: jaxlib's compilers for CPUs and GPUs have one list of them."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
