"""The part of trl_agreement.py that runs inside TRL's own environment: `python -I trl_side.py FOLDER`.

FOLDER holds what trl_agreement.py wrote: cases.json, the transitions and the LoRA. Everything that is
computed here is computed by TRL's code: its trainer, its pipeline, its loop over batches and timesteps, its
loss. This script only listens.
"""
import json, sys, warnings
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

PartialState()  # TRL's imports log, and accelerate's logger wants a state
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import set_peft_model_state_dict
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

class Pipeline(DefaultDDPOStableDiffusionPipeline):
    "TRL's pipeline, which also remembers the log-probabilities of its steps."
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def scheduler_step(self, *args, **kwargs):
        out = super().scheduler_step(*args, **kwargs)
        self.seen.append(out.log_probs.detach())
        return out

@contextmanager
def default_dtype(name):
    """Numbers that TRL and transformers write without a type (2π, the causal mask's lowest value) get
    this one."""
    torch.set_default_dtype(getattr(torch, name))
    try: yield
    finally: torch.set_default_dtype(torch.float32)

def load_lora(unet, folder):
    "Put the weights of a LoRA file into the adapter that TRL made."
    state = {
        k.removeprefix("unet."): v for k, v in load_file(folder / "pytorch_lora_weights.safetensors").items()
    }
    result = set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(state), "default")
    missing = [k for k in result.missing_keys if "lora_" in k]
    if missing or result.unexpected_keys:
        raise SystemExit(f"the LoRA does not fit TRL's: {missing[:2]} {result.unexpected_keys[:2]}")

def make_trainer(case, samples, prompts, folder):
    """TRL's trainer as its constructor makes it, with weights in the case's precision; an update takes
    the whole epoch and changes nothing."""
    draw = iter(prompts)
    config = DDPOConfig(
        mixed_precision="no", allow_tf32=False, sample_num_steps=case["steps"], sample_eta=1.0,
        sample_guidance_scale=case["guidance"], sample_batch_size=samples, sample_num_batches_per_epoch=1,
        train_batch_size=case["batch"], train_gradient_accumulation_steps=samples // case["batch"],
        train_cfg=case["cfg"], train_clip_range=case["clip"], train_adv_clip_max=case["adv_clip_max"],
        train_learning_rate=0.0, train_adam_weight_decay=0.0, train_max_grad_norm=1e30
    )
    pipeline = Pipeline(case["model"], use_lora=True)
    trainer = DDPOTrainer(
        config, lambda *args: None, lambda: (next(draw), {}), pipeline, image_samples_hook=lambda *args: None
    )
    load_lora(pipeline.unet, folder)
    dtype, scheduler = getattr(torch, case["dtype"]), pipeline.scheduler
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder): part.to(dtype)
    trainer.neg_prompt_embed, scheduler.alphas_cumprod = trainer.neg_prompt_embed.to(
        dtype
    ), scheduler.alphas_cumprod.to(dtype)
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.to(dtype)
    return trainer

def batched(data, case):
    "The epoch as `DDPOTrainer.step` hands it to `_train_batched_samples`: one dictionary a batch."
    n, dtype, latents = len(data["advantages"]), getattr(torch, case["dtype"]), data["latents"]
    values = dict(
        timesteps=data["timesteps"].repeat(n, 1), latents=latents[:, :-1], next_latents=latents[:, 1:],
        log_probs=data["old_cfg" if case["cfg"] else "old_plain"], advantages=data["advantages"],
        prompt_embeds=data["prompt_embeds"], negative_prompt_embeds=data["negative_prompt_embeds"]
    )
    values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}
    return [{k: v[i:i + case["batch"]] for k, v in values.items()} for i in range(0, n, case["batch"])]

def run_loss(case, data, prompts, folder):
    "Loss, figures, log-probabilities and gradients of one epoch."
    trainer, logged, grads = make_trainer(case, len(prompts), prompts, folder), [], []
    unet, parameters = trainer.sd_pipeline.unet, dict(trainer.sd_pipeline.unet.named_parameters())
    trainer.accelerator.log = lambda values, step=None: logged.append(values)
    trainer.optimizer.optimizer.register_step_pre_hook(
        lambda *args: grads.append({k: p.grad.clone() for k, p in parameters.items() if p.requires_grad})
    )
    trainer.sd_pipeline.scheduler.set_timesteps(case["steps"])  # as sampling would have done
    if not torch.equal(trainer.sd_pipeline.scheduler.timesteps, data["timesteps"]):
        raise SystemExit("TRL samples at other timesteps")
    unet.train()
    with default_dtype(case["dtype"]): trainer._train_batched_samples(0, 0, 0, batched(data, case))
    if len(grads) != 1 or len(logged) != 1: raise SystemExit(f"{len(grads)} updates where one was expected")
    seen = (
        torch.stack(trainer.sd_pipeline.seen)
        .reshape(-1, case["steps"], case["batch"])
        .transpose(1, 2)
        .reshape(-1, case["steps"])
    )
    figures = {k: logged[0][k].detach() for k in ("loss", "approx_kl", "clipfrac")}
    return dict(log_probs=seen.contiguous(), **figures, **{"grad." + k: v for k, v in grads[0].items()})

def run_sampler(case, prompts, folder):
    "An epoch that TRL samples itself, with the log-probabilities that it records."
    trainer = make_trainer(case, len(prompts), prompts, folder)
    torch.manual_seed(1)
    with default_dtype(case["dtype"]): (samples,), _ = trainer._generate_samples(1, len(prompts))
    latents = torch.cat([samples["latents"], samples["next_latents"][:, -1:]], 1)
    return dict(
        latents=latents, timesteps=samples["timesteps"][0].clone(), log_probs=samples["log_probs"],
        prompt_embeds=samples["prompt_embeds"],
        negative_prompt_embeds=samples["negative_prompt_embeds"].contiguous(),
    )

def main(folder):
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)  # sums in one order, however many cores there are
    plan = json.loads((folder / "cases.json").read_text())
    for i, case in enumerate(plan["cases"]):
        if case["kind"] == "sampler":
            out = run_sampler(case, plan["prompts"], folder)
        else:
            out = run_loss(
                case, load_file(folder / f"epoch_{case['steps']}.safetensors"), plan["prompts"], folder
            )
        save_file(out, folder / f"trl_{i}.safetensors")
    versions = {k: version(k) for k in ("trl", "torch", "diffusers", "transformers", "peft", "accelerate")}
    (folder / "versions.json").write_text(json.dumps(versions))

if __name__ == "__main__": main(Path(sys.argv[1]))
