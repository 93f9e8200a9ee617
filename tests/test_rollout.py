import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.rollout import rollout, sample_generator

PROMPTS = ["cat", "frog", "cat", "whale", ""]

@pytest.fixture(scope="module")
def policy():
    policy = StableDiffusionPolicy(load_pipeline(), num_steps=6, guidance_scale=4)
    torch.manual_seed(0)
    for p in policy.trainable_parameters(): p.data += .05*torch.randn_like(p)
    return policy

def generators(n=5, epoch=0): return [sample_generator(0, epoch, i) for i in range(n)]

@pytest.fixture(scope="module")
def trajectories(policy): return rollout(policy, PROMPTS, generators())

@settings(max_examples=50, deadline=None)
@given(*[st.tuples(*[st.integers(0, 2**31)]*3)]*2)
def test_a_generator_is_its_samples_own(a, b):
    seeds = [sample_generator(*o).initial_seed() for o in (a, b)]
    assert (seeds[0] == seeds[1]) == (a == b)

def test_neighbours_in_seed_epoch_and_index_differ():
    seeds = {sample_generator(s, e, i).initial_seed() for s in range(4) for e in range(4) for i in range(20)}
    assert len(seeds) == 4*4*20

def test_shapes(policy, trajectories):
    t = trajectories
    assert (
        t.latents.shape == (5, 7, 8, 8, 8)
        and t.log_probs.shape == (5, 6)
        and t.timesteps.shape == t.stochastic.shape == (6,)
    )
    assert t.images.shape == (5, 3, 64, 64) and 0 <= t.images.min() and t.images.max() <= 1
    assert (
        len(t) == 5 and t.prompts == PROMPTS and t.metadata == [{}] * 5 and t.metadata[0] is not t.metadata[1]
    )
    assert t.latents.dtype == t.log_probs.dtype == torch.float32 and t.log_probs.isfinite().all()

@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_the_same_images_from_any_batch_size(policy, trajectories, size):
    calls = []
    again = rollout(policy, PROMPTS, generators(), batch_size=size, on_step=lambda: calls.append(1))
    torch.testing.assert_close(again.images, trajectories.images, atol=1e-4, rtol=0)
    torch.testing.assert_close(again.log_probs, trajectories.log_probs, atol=1e-4, rtol=0)
    assert len(calls) == 6*-(-5//size)

def test_a_sample_does_not_depend_on_the_others(policy, trajectories):
    alone = rollout(policy, ["whale"], [sample_generator(0, 0, 3)])
    beside = rollout(policy, ["bee", "whale"], [sample_generator(9, 0, 0), sample_generator(0, 0, 3)])
    for o in (alone.latents[0], beside.latents[1]):
        torch.testing.assert_close(o, trajectories.latents[3], atol=1e-4, rtol=0)
    assert (
        rollout(policy, ["whale"], [sample_generator(0, 1, 3)]).images[0] - trajectories.images[3]
    ).abs().mean() > 1e-3

@pytest.mark.parametrize("scale,negative", [(4., ""), (1., ""), (3., "dog")])
def test_the_images_are_those_of_diffusers_pipeline(policy, scale, negative):
    policy.configure(6, guidance_scale=scale, negative_prompt=negative)
    ours = rollout(policy, PROMPTS, generators())
    theirs = policy.pipeline(
        PROMPTS, num_inference_steps=6, eta=1.0, guidance_scale=scale, negative_prompt=[negative] * 5,
        generator=generators(), output_type="pt"
    ).images
    policy.configure(6, guidance_scale=4)
    torch.testing.assert_close(ours.images, theirs, atol=1e-4, rtol=0)

@torch.no_grad()
def deviation(policy, trajectories, size, order):
    sample, step = order // 6, order % 6
    out = []
    for s, k in zip(sample.split(size), step.split(size)):
        x, t, prev, old = trajectories.transitions(s, k)
        out.append(
            torch.exp(policy.step(x, t, trajectories.conditioning[s], prev_sample=prev).log_prob - old) - 1
        )
    return torch.cat(out).abs().max().item()

@pytest.fixture(scope="module", params=[1, 5])
def recorded(policy, request): return rollout(policy, PROMPTS, generators(), batch_size=request.param)

@pytest.mark.parametrize("size", [1, 7, 30])
def test_field_trap_3_the_ratio_is_1_before_the_first_update(policy, recorded, size):
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))   # shuffled, as training does
    assert deviation(policy, recorded, size, order) < 1e-6

def test_the_ratio_moves_with_the_weights(policy, trajectories):
    saved = [p.data.clone() for p in policy.trainable_parameters()]
    for p in policy.trainable_parameters(): p.data *= 1.1
    moved = deviation(policy, trajectories, 30, torch.arange(30))
    for p, o in zip(policy.trainable_parameters(), saved): p.data = o
    assert moved > 1e-4

def test_log_probs_are_those_of_the_noise(policy, trajectories):
    "log π per dimension = -z²/2 - log σ - ½ log 2π with z the noise that each sample's generator gave."
    from ddpo_nb.mdp import step_std
    std = step_std(policy.scheduler, policy.timesteps, policy.eta).double()
    for i, g in enumerate(generators()):
        # the first draw was x_T
        z = torch.stack([torch.randn(1, 8, 8, 8, generator=g).double() for _ in range(7)])[1:]
        want = -z.square().flatten(1).mean(1)/2 - std.log() - .5*np.log(2*np.pi)
        torch.testing.assert_close(trajectories.log_probs[i].double(), want, atol=1e-4, rtol=0)

@pytest.mark.parametrize("kwargs", [{}, dict(keep_on="cpu"), dict(batch_size=2, together=4)])
def test_means_are_kept_for_those_who_ask(policy, trajectories, kwargs):
    "An action is its mean, and σ times the noise that its sample's generator gave"
    from ddpo_nb.mdp import step_std
    t = rollout(policy, PROMPTS, generators(), keep_means=True, **kwargs)
    assert trajectories.means is None and t.means.dtype == torch.float32
    std = step_std(policy.scheduler, policy.timesteps, policy.eta).reshape(-1, 1, 1, 1)
    for i, g in enumerate(generators()):
        z = torch.stack([torch.randn(1, 8, 8, 8, generator=g)[0] for _ in range(7)])[1:]
        torch.testing.assert_close(t.means[i] + std * z, t.latents[i, 1:], atol=1e-5, rtol=0)

def test_metadata_travels(policy):
    meta = [{"n": 1}, {"n": 2}]
    assert rollout(policy, ["cat", "dog"], generators(2), meta).metadata == meta

@pytest.mark.parametrize(
    "kwargs",
    [
        dict(prompts=[], generators=[]), dict(prompts=["a"], generators=[]),
        dict(prompts=["a"], generators=[None], metadata=[]),
        dict(prompts=["a"], generators=[None], batch_size=0)
    ],
)
def test_bad_input(policy, kwargs):
    with pytest.raises(ValueError): rollout(policy, **kwargs)
