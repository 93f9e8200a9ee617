"""Stable Diffusion computes what it computed before there were other families: numbers recorded on 27
November 2026, when its policy was one class (2 cores of an AMD EPYC, PyTorch 2.13), where the split gave the
same bits. Another processor rounds in another order, so here they are held to a few parts in ten thousand."""
import pytest
import torch

from ddpo_nb.ddpo import DDPO
from ddpo_nb.loading import load_pipeline
from ddpo_nb.rollout import rollout, sample_generator
from ddpo_nb.rwr import RWR
from ddpo_nb.sd import StableDiffusionPolicy

PROMPTS = ["a cat", "a dog", "a fox", "a cat", "a bear on a red background", "x"]

RECORDED = {
    True: {
        "images": 183.51638042212838,
        "latents": 239.0372264852479,
        "log_probs": 9.422242775992611,
        "ddpo loss": 3.6878514463844247,
        "ddpo gradient": 0.09363176033178794,
        "kl": 0.0985958847887533,
        "rwr loss": 0.7726916897605871,
        "rwr gradient": 4.417270008024531,
    },
    False: {
        "images": 185.39263717360672,
        "latents": 237.27545337944858,
        "log_probs": 9.42224299902561,
        "ddpo loss": 3.691951857711968,
        "ddpo gradient": 1.4904622893001171,
        "kl": 12.003812526277077,
        "rwr loss": 1.2639716621229695,
        "rwr gradient": 39.97140218545033,
    },
}

def numbers(lora):
    "Size of everything that a policy computes: images, log-probabilities, losses, KL, gradients."
    torch.manual_seed(0)
    policy = StableDiffusionPolicy(
        load_pipeline(), use_lora=lora, num_steps=10, eta=1.0, guidance_scale=3.0, negative_prompt="a dog")
    if not lora: policy.keep_reference()
    with torch.no_grad():
        for w in policy.trainable_parameters(): w.add_(0.01 * torch.randn_like(w))
    generators = [sample_generator(0, 0, i) for i in range(6)]
    t = rollout(policy, PROMPTS, generators, batch_size=4)
    found = dict(images=t.images, latents=t.latents, log_probs=t.log_probs)
    ddpo, rwr = DDPO(kl_coef=0.1, step_weighting="variance"), RWR(draws=2)
    for name, objective, counts in (
        ("ddpo", ddpo, torch.linspace(-1, 1, 6)), ("rwr", rwr, torch.linspace(0.5, 1.5, 6))
    ):
        examples = objective.examples(policy, t, counts, torch.Generator().manual_seed(1))
        loss, figures = objective.loss(policy, t, {k: v[:20] for k, v in examples.items()})
        loss.sum().backward()
        gradient = torch.cat([w.grad.flatten() for w in policy.trainable_parameters()])
        found |= {f"{name} loss": loss.detach(), f"{name} gradient": gradient}
        if "kl_pretrained" in figures: found["kl"] = figures["kl_pretrained"]
        for w in policy.trainable_parameters(): w.grad = None
    return {k: v.double().norm().item() for k, v in found.items()}

@pytest.mark.parametrize("lora", [True, False])
def test_stable_diffusion_computes_what_it_did(lora):
    for name, value in numbers(lora).items():
        assert value == pytest.approx(RECORDED[lora][name], rel=5e-4), name
