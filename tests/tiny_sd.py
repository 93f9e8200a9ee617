"A Stable Diffusion with random weights that is made in a blink: the real classes, a few thousand weights, the bundled tokenizer."
from importlib import resources

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

NOISE = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)

def tiny_sd(unet=None, vae=None, scheduler=None, seed=0):
    "The pipeline; further settings of its parts as dictionaries."
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(str(resources.files("ddpo_nb")/"weights/emoji-sd/tokenizer"))
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                        max_position_embeddings=tokenizer.model_max_length, projection_dim=16, eos_token_id=tokenizer.eos_token_id,
                                        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id))
    blocks = dict(block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4)
    net = UNet2DConditionModel(**dict(sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **blocks) | (unet or {}))
    coder = AutoencoderKL(**dict(sample_size=16, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
                                 up_block_types=("UpDecoderBlock2D",) * 2, **blocks) | (vae or {}))
    pipe = StableDiffusionPipeline(vae=coder, text_encoder=text, tokenizer=tokenizer, unet=net, scheduler=DDIMScheduler(**NOISE | (scheduler or {})),
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder): part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe
