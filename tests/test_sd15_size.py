"""The same code on a pipeline of Stable Diffusion 1.5's size, with random weights and two denoising steps.
Needs 6 GB of memory and a minute; where there is a GPU, measures it."""
import resource, sys
import pytest, torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import PromptSource
from ddpo_nb.recipes import model_numbers, plan
from ddpo_nb.rewards import jpeg_compressibility
from ddpo_nb.trainer import make_config, make_trainer

pytestmark = pytest.mark.slow
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"

def random_sd15():
    configs, tokenizer = model_numbers(SD15).configs, load_pipeline().tokenizer
    tokenizer.model_max_length = 77
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel.from_config(configs["unet"]), vae=AutoencoderKL.from_config(configs["vae"]),
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(**configs["text_encoder"] | dict(eos_token_id=tokenizer.eos_token_id))
        ),
        scheduler=DDIMScheduler.from_config(configs["scheduler"], clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )

def test_an_epoch_of_lora_in_bf16(tmp_path):
    c = make_config(
        "ddpo-is", SD15, mixed_precision="bf16", sample_num_steps=2, sample_batch_size=1,
        sample_num_batches_per_epoch=2, train_batch_size=2, micro_batch_size=1, gradient_checkpointing=True,
        vae_slicing=True, offload_trajectories=True, num_epochs=1, logdir=str(tmp_path)
    )
    t = make_trainer(
        c, jpeg_compressibility, PromptSource(["cat", "dog"]), StableDiffusionPolicy(random_sd15())
    )
    before = [p.detach().clone() for p in t.policy.trainable_parameters()]
    row, = t.train(progress=False)
    assert (
        any((a != b).any() for a, b in zip(before, t.policy.trainable_parameters()))
        and row["ratio_max"] < 1 + 1e-4
    )
    assert (tmp_path/"checkpoints/checkpoint_1/pytorch_lora_weights.safetensors").stat().st_size > 3e6
    estimate = plan(c, model_numbers(SD15)).memory.peak / 1e9
    print(
        f"\n{row['seconds_sampling']:.0f} s sampling, {row['seconds_training']:.0f} s training; estimated"
        f" {estimate:.2f} GB on a device, peak of this process so far {row['peak_memory_gb']:.2f} GB"
    )
    assert estimate < 6
    if torch.cuda.is_available(): assert row["peak_memory_gb"] < 6
