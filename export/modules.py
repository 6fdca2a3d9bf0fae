"""The four networks of Stable Diffusion v1 as they are traced.

diffusers and transformers define the layers; the forward passes are written out here, because an exported graph has to
hold for every latent size, every batch and both precisions, which the originals' Python branches do not.

Inputs and outputs are float32 in every precision. In float16 the graph is strongly typed: convolutions and matrix
multiplications run in float16, softmax, normalisation, the SiLU after one and the timestep embedding in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .checkpoint import Part
    from .ldm import PartName


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, the softmax in float32 (Vaswani et al. 2017, eq. 1).

    Parameters
    ----------
    query, key, value
        [batch, heads, tokens, width of a head].
    mask
        float32, added to the scores.

    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    wide = scores.float()
    if mask is not None:
        wide = wide + mask
    mixed: Tensor = wide.softmax(dim=-1).to(value.dtype) @ value
    return mixed


class _AttentionProcessor:
    """`attend` in the place where diffusers' Attention expects its arithmetic."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None, "Stable Diffusion v1 masks nothing in its attention"
        del temb  # the autoencoder's blocks pass it, its attention has no use for it
        residual = hidden_states
        spatial = hidden_states.ndim == 4
        if spatial:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        mixed: Tensor = attn.to_out[0](attend(query, key, value).transpose(1, 2).flatten(2))
        if spatial:
            mixed = mixed.transpose(-1, -2).reshape(residual.shape)
        return mixed + residual if attn.residual_connection else mixed


class _Float32Norm(nn.Module):
    """A normalisation computed in float32, whatever the dtype around it; `wide` leaves its output in float32."""

    def __init__(self, norm: nn.Module, *, wide: bool) -> None:
        super().__init__()
        self.norm = norm
        self.wide = wide

    def forward(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.norm(hidden.float())
        return normed if self.wide else normed.to(hidden.dtype)


class _Narrowing(nn.Module):
    """An activation computed in the dtype of its input, its output in the dtype of the layers that follow."""

    def __init__(self, activation: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = activation
        self.dtype = dtype

    def forward(self, hidden: Tensor) -> Tensor:
        activated: Tensor = self.activation(hidden)
        return activated.to(self.dtype)


class _Gated(nn.Module):
    """GEGLU (Shazeer 2020, eq. 6) with a product for the values and one for the gates.

    On a CPU that spares a pass over the widest activations there are, to tell the two apart. TensorRT has one kernel
    for the GEGLU of a single product, so that float16 keeps that.
    """

    def __init__(self, whole: GEGLU) -> None:
        super().__init__()
        projections = []
        for weight, bias in zip(whole.proj.weight.chunk(2), whole.proj.bias.chunk(2), strict=True):
            projection = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            projection.weight, projection.bias = nn.Parameter(weight), nn.Parameter(bias)
            projections.append(projection)
        self.values, self.gates = projections

    def forward(self, hidden: Tensor) -> Tensor:
        gated: Tensor = self.values(hidden) * functional.gelu(self.gates(hidden))
        return gated


class _Upsample(nn.Module):
    """Nearest-neighbour upsampling, to twice the size or to the size of the skip connection, then a convolution.

    A latent side that is no multiple of 8 comes down to an odd one, so that "twice" is not always right on the way up.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            hidden = functional.interpolate(hidden, scale_factor=2.0, mode="nearest")
        else:
            hidden = functional.interpolate(hidden, size=size, mode="nearest")
        out: Tensor = self.conv(hidden)
        return out


def _prepare(model: nn.Module, dtype: torch.dtype) -> None:
    """Put in the layers of this module and set the dtypes, in place: float32 where it must be, `dtype` elsewhere."""
    exact: list[nn.Module] = []
    for parent in list(model.modules()):
        children = dict(parent.named_children())
        # With a cast between the two TensorRT makes two kernels of GroupNorm and SiLU, behind both it makes one.
        activated = {type(child) for child in children.values()} >= {nn.GroupNorm, nn.SiLU}
        for name, child in children.items():
            if isinstance(child, (nn.GroupNorm, nn.LayerNorm)):
                exact.append(child)
                setattr(parent, name, _Float32Norm(child, wide=activated))
            elif isinstance(child, nn.SiLU) and activated:
                setattr(parent, name, _Narrowing(child, dtype))
            elif isinstance(child, GEGLU) and dtype == torch.float32:
                setattr(parent, name, _Gated(child))
            elif isinstance(child, TimestepEmbedding):
                exact.append(child)
            elif isinstance(child, Upsample2D):
                setattr(parent, name, _Upsample(child.conv))
    if hasattr(model, "set_attn_processor"):
        cast("Any", model).set_attn_processor(_AttentionProcessor())
    kept = {id(parameter) for module in exact for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if id(parameter) in kept else dtype)


class TextEncoder(nn.Module):
    """CLIP's text transformer up to the embeddings that cross-attention reads (Radford et al. 2021)."""

    causal: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        positions = model.embeddings.position_embedding.weight.shape[0]
        causal = torch.full((positions, positions), float("-inf")).triu(1)
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, input_ids: Tensor, clip_skip: Tensor) -> Tensor:
        """Embed prompts.

        Parameters
        ----------
        input_ids
            int64 [batch, 77].
        clip_skip
            int64 [1]: how many of the last layers to leave out, 0 for none.

        Returns
        -------
        Tensor
            float32 [batch, 77, width].

        """
        embeddings = self.model.embeddings
        hidden = embeddings.token_embedding(input_ids) + embeddings.position_embedding.weight
        layers = []
        for layer in self.model.encoder.layers:
            attention = layer.self_attn
            normed = layer.layer_norm1(hidden)
            query, key, value = (
                project(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            mixed = attend(query, key, value, self.causal).transpose(1, 2).flatten(2)
            hidden = hidden + attention.out_proj(mixed)
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
            layers.append(hidden)
        chosen = torch.stack(layers).index_select(0, len(layers) - 1 - clip_skip).squeeze(0)
        out: Tensor = self.model.final_layer_norm(chosen)
        return out.float()


class UNet(nn.Module):
    """The noise predictor (Rombach et al. 2022), its one timestep shared by the whole batch.

    Beside the prediction it gives what its last layer takes from below, the deep features: with them the outermost
    blocks alone can predict for the next steps (Ma et al. 2023, DeepCache, arXiv:2312.00858).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, timestep: Tensor, text_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Predict.

        Parameters
        ----------
        latents
            float32 [batch, 4, height / 8, width / 8].
        timestep
            float32 [1], between 0 and 999, fractions allowed.
        text_embeddings
            float32 [batch, 77, width].

        Returns
        -------
        Tensor
            float32, the shape of `latents`: epsilon, v or x0, as the model was trained.
        Tensor
            float32 [batch, channels of the first level, height / 8, width / 8]: the deep features.

        """
        model = self.model
        dtype = model.conv_in.weight.dtype
        time = model.time_embedding(model.time_proj(timestep)).to(dtype)
        context = text_embeddings.to(dtype)
        hidden = model.conv_in(latents.to(dtype))
        skips = [hidden]
        for block in model.down_blocks:
            if hasattr(block, "attentions"):
                hidden, outputs = block(hidden, temb=time, encoder_hidden_states=context)
            else:
                hidden, outputs = block(hidden, temb=time)
            skips.extend(outputs)
        hidden = model.mid_block(hidden, time, encoder_hidden_states=context)
        for block in model.up_blocks[:-1]:
            mine = tuple(skips[-len(block.resnets) :])
            del skips[-len(block.resnets) :]
            size = skips[-1].shape[2:]
            if hasattr(block, "attentions"):
                hidden = block(hidden, mine, temb=time, encoder_hidden_states=context, upsample_size=size)
            else:
                hidden = block(hidden, mine, temb=time, upsample_size=size)
        # Layer by layer, as diffusers' block does it, for what comes before the last one.
        last = model.up_blocks[-1]
        for index, resnet in enumerate(last.resnets):
            features = hidden
            hidden = resnet(torch.cat([hidden, skips.pop()], dim=1), time)
            if hasattr(last, "attentions"):
                hidden = last.attentions[index](hidden, encoder_hidden_states=context, return_dict=False)[0]
        out: Tensor = model.conv_out(model.conv_act(model.conv_norm_out(hidden)))
        return out.float(), features.float()


class VaeDecoder(nn.Module):
    """Latents to images (Kingma & Welling 2014; the KL-regularised autoencoder of Rombach et al. 2022)."""

    def __init__(self, model: Any, scaling_factor: float) -> None:
        super().__init__()
        self.post_quant_conv = model.post_quant_conv
        self.decoder = model.decoder
        self.scaling_factor = scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        """Decode float32 [batch, 4, h, w], as the sampler leaves them, to float32 [batch, 3, 8h, 8w] around [-1, 1]."""
        decoder = self.decoder
        hidden = (latents / self.scaling_factor).to(decoder.conv_in.weight.dtype)
        hidden = decoder.conv_in(self.post_quant_conv(hidden))
        hidden = decoder.mid_block(hidden)
        for block in decoder.up_blocks:
            hidden = block(hidden)
        out: Tensor = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(hidden)))
        return out.float()


class VaeEncoder(nn.Module):
    """Images to the mean and standard deviation of their latents."""

    def __init__(self, model: Any, scaling_factor: float) -> None:
        super().__init__()
        self.quant_conv = model.quant_conv
        self.encoder = model.encoder
        self.scaling_factor = scaling_factor

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Encode float32 [batch, 3, 8h, 8w] in [-1, 1] to mean and deviation, both float32 [batch, 4, h, w], scaled."""
        encoder = self.encoder
        hidden = encoder.conv_in(image.to(encoder.conv_in.weight.dtype))
        for block in encoder.down_blocks:
            hidden = block(hidden)
        hidden = encoder.mid_block(hidden)
        hidden = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(hidden)))
        mean, log_variance = self.quant_conv(hidden).float().chunk(2, dim=1)
        # The clamp is the training code's: without it exp() overflows on pictures unlike any it was trained on.
        deviation = (0.5 * log_variance.clamp(-30.0, 20.0)).exp()
        return mean * self.scaling_factor, deviation * self.scaling_factor


def load_model(name: PartName, part: Part) -> nn.Module:
    """Make diffusers' or transformers' own network of a checkpoint's part, in the dtypes that the part has.

    It never holds weights of its own: the part's tensors become its parameters, mapped files staying mapped.
    """
    with torch.device("meta"):
        model = _build(name, part.config)
    model.load_state_dict(part.weights, strict=True, assign=True)
    if name == "text_encoder":
        # The one buffer that no checkpoint holds: it counts the positions.
        embeddings: Any = model.embeddings
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return model.eval().requires_grad_(requires_grad=False)


def _build(name: PartName, config: Mapping[str, Any]) -> nn.Module:
    model: nn.Module
    if name == "text_encoder":
        model = CLIPTextModel(CLIPTextConfig(**config))
    elif name == "unet":
        model = UNet2DConditionModel.from_config(dict(config))
    else:
        model = AutoencoderKL.from_config(dict(config))
    return model


def text_encoder(part: Part, dtype: torch.dtype) -> TextEncoder:
    """Make the text encoder of a checkpoint in `dtype`."""
    model = load_model("text_encoder", part)
    _prepare(model, dtype)
    return TextEncoder(model)


def unet(part: Part, dtype: torch.dtype) -> UNet:
    """Make the U-Net of a checkpoint in `dtype`."""
    model = load_model("unet", part)
    _prepare(model, dtype)
    return UNet(model)


def autoencoder(part: Part, dtype: torch.dtype, stream_scale: float = 1.0) -> tuple[VaeDecoder, VaeEncoder]:
    """Make decoder and encoder of a checkpoint in `dtype`.

    Parameters
    ----------
    part
        The checkpoint's autoencoder.
    dtype
        float32 or float16.
    stream_scale
        What everything between two normalisations is multiplied by: see `scale_stream`.

    """
    model: Any = load_model("vae", part)
    if stream_scale != 1.0:
        scale_stream(model.float(), stream_scale)
    factor = float(model.config["scaling_factor"])
    _prepare(model, dtype)
    return VaeDecoder(model, factor), VaeEncoder(model, factor)


def scale_stream(model: Any, scale: float) -> None:
    """Multiply an autoencoder's activations by `scale` without changing what it computes.

    Every path from one normalisation to the next is linear, and a normalisation undoes a factor if its epsilon is
    scaled along. So the factor goes into the weights and biases that write to a path, and a network whose
    activations pass 65504 fits into float16. `scale` must be a power of two: then no weight is rounded.
    """
    writers = [model.decoder.conv_in, model.encoder.conv_in]
    carriers = []
    norms = [model.decoder.conv_norm_out, model.encoder.conv_norm_out]
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            writers += [module.conv1, module.conv2]
            norms += [module.norm1, module.norm2]
            carriers += [module.conv_shortcut] if module.conv_shortcut is not None else []
        elif isinstance(module, Attention):
            writers.append(module.to_out[0])
            norms.append(module.group_norm)
        elif isinstance(module, (Upsample2D, Downsample2D)):
            carriers.append(module.conv)
    for layer in writers:
        layer.weight = nn.Parameter(layer.weight * scale, requires_grad=False)
    for layer in writers + carriers:
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias * scale, requires_grad=False)
    for norm in norms:
        norm.eps *= scale**2
