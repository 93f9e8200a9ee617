"""A Stable Diffusion with random weights that is made in a blink: the real classes, a few thousand weights,
the bundled tokenizer."""
from importlib import resources

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

NOISE = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
    set_alpha_to_one=False, steps_offset=1
)

def tiny_sd(unet=None, vae=None, scheduler=None, seed=0):
    "The pipeline; further settings of its parts as dictionaries."
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(str(resources.files("ddpo_nb")/"weights/emoji-sd/tokenizer"))
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length, projection_dim=16,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id
        )
    )
    blocks = dict(block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4)
    net = UNet2DConditionModel(
        **dict(
            sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=16, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **blocks
        )
        | (unet or {})
    )
    coder = AutoencoderKL(
        **dict(
            sample_size=16, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, **blocks
        )
        | (vae or {})
    )
    pipe = StableDiffusionPipeline(
        vae=coder, text_encoder=text, tokenizer=tokenizer, unet=net,
        scheduler=DDIMScheduler(**NOISE | (scheduler or {})), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False
    )
    for part in (pipe.unet, pipe.vae, pipe.text_encoder): part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe

def _resnet(name):
    for new, old in dict(
        norm1="in_layers.0", conv1="in_layers.2", time_emb_proj="emb_layers.1", norm2="out_layers.0",
        conv2="out_layers.3", conv_shortcut="skip_connection"
    ).items():
        name = name.replace(f".{new}.", f".{old}.")
    return name

def _unet_name(k, layers):
    "The name that a UNet's weight has in a checkpoint of one file."
    for new, old in {
        "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
        "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2."
    }.items():
        if k.startswith(new): return old + k.removeprefix(new)
    w = k.split(".")
    if w[0] == "mid_block":
        rest = ".".join(w[3:])
        return (
            f"middle_block.1.{rest}"
            if w[1] == "attentions"
            else _resnet(f"middle_block.{2 * int(w[2])}.{rest}")
        )
    block, kind, i, rest = int(w[1]), w[2], int(w[3]), ".".join(w[4:])
    if kind == "downsamplers": return f"input_blocks.{1 + block * (layers + 1) + layers}.0.op.{w[-1]}"
    place = (
        f"input_blocks.{1 + block * (layers + 1) + i}"
        if w[0] == "down_blocks"
        else f"output_blocks.{block * (layers + 1) + i}"
    )
    # no attention in the block that grows
    if kind == "upsamplers": return f"output_blocks.{block * (layers + 1) + layers}.1.conv.{w[-1]}"
    return f"{place}.1.{rest}" if kind == "attentions" else _resnet(f"{place}.0.{rest}")

def _vae_name(k, blocks):
    w = k.split(".")
    if w[1] in ("down_blocks", "up_blocks"):
        b = w[2] if w[1] == "down_blocks" else str(blocks - 1 - int(w[2]))
        inner = (
            f"block.{w[4]}.{'.'.join(w[5:])}"
            if w[3] == "resnets"
            else f"{w[3].removesuffix('rs')}.{'.'.join(w[5:])}"
        )
        return f"{w[0]}.{w[1][:-7]}.{b}.{inner}".replace("conv_shortcut", "nin_shortcut")
    if w[1] == "mid_block" and w[2] == "resnets": return f"{w[0]}.mid.block_{int(w[3]) + 1}.{'.'.join(w[4:])}"
    if w[1] == "mid_block":
        for new, old in dict(group_norm="norm", to_q="q", to_k="k", to_v="v").items():
            k = k.replace(f".{new}.", f".{old}.")
        return f"{w[0]}.mid.attn_1." + k.split("attentions.0.")[1].replace("to_out.0.", "proj_out.")
    return k.replace("conv_norm_out", "norm_out")

def checkpoint(pipe):
    "The weights of a tiny pipeline under the names that they have in a checkpoint of one file."
    unet, vae, text = pipe.unet, pipe.vae, pipe.text_encoder
    out = {
        f"model.diffusion_model.{_unet_name(k, unet.config.layers_per_block)}": v
        for k, v in unet.state_dict().items()
    }
    for k, v in vae.state_dict().items():
        flat = "mid_block.attentions" in k and k.endswith(
            ("q.weight", "k.weight", "v.weight", "out.0.weight")
        )
        out[f"first_stage_model.{_vae_name(k, len(vae.config.block_out_channels))}"] = (
            v[..., None, None] if flat else v
        )
    out |= {
        f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v
        for k, v in text.state_dict().items()
    }
    return {k: v.contiguous().clone() for k, v in out.items()}
