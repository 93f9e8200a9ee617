"""Gradients through sampling, decoding and the reward: against autograd over the whole graph, against finite
differences, and against what is known exactly; in the loop, resumed to the same bits."""
import itertools
import json
import math
from types import FunctionType

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from hypothesis import given, settings, strategies as st
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipImageProcessor

from ddpo_nb import scenes as scenes_module
from ddpo_nb.aesthetic import AestheticReward, aesthetic
from ddpo_nb.clip import (CLIPAlignment, Embedder, clip_alignment, clip_score, differentiable_pixels,
                          load_embedder)
from ddpo_nb.cli import main
from ddpo_nb.config import DDPOConfig, make_config
from ddpo_nb.direct import AlignProp, DRaFT, uphill, walk_back
from ddpo_nb.mdp import Trajectories
from ddpo_nb.nft import TinyFlow
from ddpo_nb.preference import ImageReward, PickScore
from ddpo_nb.prompts import InputError, PromptSource
from ddpo_nb.reward_files import Guarded, guarded_file
from ddpo_nb.rewards import (PromptAlignment, WeightedSum, as_column, check_differentiable, depends_on,
                             differentiable, jpeg_compressibility, jpeg_incompressibility, to_uint8)
from ddpo_nb.rollout import rollout, sample_generator
from ddpo_nb.rwr import TinyDiffusion, x0_moments
from ddpo_nb.scenes import SceneLogProb, SceneReward, scenes_logprob
from ddpo_nb.tiny import TINY
from ddpo_nb.trainer import make_trainer
from stopping import stop_after
from tiny_policy import tiny_policy, weights

KINDS = [k for k in TINY if k != "sd3"]  # T5 takes longest, and makes no difference here
PROMPTS = ["a cat", "a fox", "a bear"]

def brightness(images, prompts, metadata):
    "Of the red channel most, so that no direction is like another."
    return (images * images.new_tensor([3.0, 1.0, -0.5]).view(3, 1, 1)).mean((1, 2, 3)), {}

def make(family, lora=True, steps=3, guidance=3.0, **how):
    policy = tiny_policy(family, lora, num_steps=steps, guidance_scale=guidance, resolution=16, **how)
    torch.manual_seed(1)
    for p in policy.trainable_parameters():
        if lora: p.data += 0.1 * torch.randn(p.shape).to(p)  # or one of LoRA's two factors has no gradient
    return policy

def generators(n=3): return [sample_generator(0, 0, i) for i in range(n)]
def grads(policy): return torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])

def sampled(policy, objective, reward=brightness):
    "Trajectories with the reward's gradient, as the trainer's `collect` makes them."
    up = []
    def paint(x0, *about):
        def judge(images):
            found = reward(images, *about)
            return found, as_column(found[0], images, "reward").sum()
        images, found, gradient = uphill(policy, x0, judge)
        up.append(gradient)
        return images
    t = rollout(
        policy, PROMPTS, generators(), only_last=objective.states_kept(len(policy.timesteps)), decode=paint)
    t.uphill = torch.cat(up)
    return t

def by_walking(policy, objective, generator=None):
    "The gradient of the summed rewards, by the objective's loss."
    t = sampled(policy, objective)
    examples = objective.examples(policy, t, torch.zeros(len(PROMPTS)), generator)
    for p in policy.trainable_parameters(): p.grad = None
    objective.loss(policy, t, examples)[0].sum().backward()
    return -grads(policy), examples["passed"]

def by_autograd(policy, passed):
    "The same by one graph of the whole: `passed` (N, T) says whose prediction is differentiated."
    x, cond = policy.initial_latents(noise := generators()), policy.encode(PROMPTS)
    for i, t in enumerate(policy.timesteps):
        times = t.expand(len(x))
        output = policy.predict(x, times, cond)
        output = torch.where(passed[:, i].reshape(-1, 1, 1, 1), output, output.detach())
        x = policy.process.step(output, x, times, generator=noise).prev_sample
    for p in policy.trainable_parameters(): p.grad = None
    brightness(policy.paint(x), PROMPTS, None)[0].sum().backward()
    return grads(policy)

# ---- the gradient ----

ODE = dict(kind="ode", noise_level=0.0)
# noise makes no difference to what is trained
HOW = [(k, lora, how) for k in KINDS for lora in (True, False)
       for how in ([ODE, {}] if "sd3" in k or "flux" in k else [dict(eta=0.0), dict(eta=1.0)])[:1 + lora]]

@pytest.mark.parametrize("kind,lora,how", HOW)
def test_of_every_family_it_is_autograd_s_over_the_whole_graph(kind, lora, how):
    "Every K, deterministic sampling and stochastic, LoRA and the whole network"
    policy = make(kind, lora, **how)
    for k in (1, 2, 0):
        found, passed = by_walking(policy, DRaFT(steps=k))
        assert passed.sum().item() == 3 * (k or 3)
        whole = by_autograd(policy, passed)
        assert whole.norm() > 0
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item())

@pytest.mark.parametrize("draw", ["chain", "step"])
@pytest.mark.parametrize("kind", ["sd-v", "sd3-without-t5"])
def test_whatever_is_left_out_by_chance_it_is_autograd_s(kind, draw):
    "Rows of one batch end at different steps; in a step that is left out, x's own path goes on"
    policy, objective = make(kind, steps=4), AlignProp(fewest=0, draw=draw)
    for seed in range(4):
        found, passed = by_walking(policy, objective, torch.Generator().manual_seed(seed))
        whole = by_autograd(policy, passed)
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4 * max(whole.abs().max().item(), 1e-6))

@pytest.fixture
def in_double(monkeypatch):
    "Where the library asks for fp32 at least, it gets twice that."
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

@pytest.mark.parametrize("kind,how", [
    ("sd", dict(eta=1.0)), ("sd-v", dict(eta=0.0)), ("sd3-without-t5", ODE), ("sd3-without-t5", {}),
    ("flux", ODE)])
def test_it_is_what_finite_differences_say(kind, how, in_double):
    """In float64, along a direction of all weights: with K steps, the difference is that of a sampler whose
    first steps keep their old weights"""
    policy, T = make(kind, **how), 3
    for part in policy.parts: part.double()
    states = policy.initial_latents(generators()).double()
    policy.initial_latents = lambda _: states
    g = torch.Generator().manual_seed(5)
    direction = [
        torch.randn(p.shape, generator=g, dtype=torch.float64) for p in policy.trainable_parameters()]
    flat = torch.cat([d.flatten() for d in direction])
    @torch.no_grad()
    def moved(by):
        for p, d in zip(policy.trainable_parameters(), direction): p.add_(by * d)
    @torch.no_grad()
    def reward(h, k):
        x, cond, noise = states, policy.encode(PROMPTS), generators()
        for i, t in enumerate(policy.timesteps):
            if i >= T - k: moved(h)
            x = policy.step(x, t.expand(3), cond, generator=noise).prev_sample
            if i >= T - k: moved(-h)
        return brightness(policy.paint(x), PROMPTS, None)[0].sum().item()
    slopes = []
    for k in (1, 2, 3):
        found, h = by_walking(policy, DRaFT(steps=k))[0], 1e-5
        assert found.dtype == torch.float64
        slopes.append((found @ flat).item())
        assert slopes[-1] == pytest.approx((reward(h, k) - reward(-h, k)) / (2 * h), rel=1e-5, abs=1e-9)
    assert abs(slopes[0] - slopes[2]) > 1e-3 * abs(slopes[2])  # K does make a difference

def test_one_step_asks_the_network_once_and_keeps_two_states():
    policy, objective = make("sd"), DRaFT()
    t = sampled(policy, objective)
    assert t.latents.shape[1] == 2 and t.log_probs.shape == (3, 0)
    calls, predict = [], policy.predict
    policy.predict = lambda x, times, *a: calls.append(times) or predict(x, times, *a)
    objective.loss(policy, t, objective.examples(policy, t, torch.zeros(3), None))[0].sum().backward()
    assert [o.tolist() for o in calls] == [[policy.timesteps[-1].item()] * 3]

def test_the_loss_is_the_rewards_and_micro_batches_make_no_difference():
    policy, objective = make("sd3-without-t5", **ODE), DRaFT(steps=2)
    t = sampled(policy, objective)
    rewards = brightness(t.images, PROMPTS, None)[0]
    examples = objective.examples(policy, t, rewards.double(), None)
    def gradient(parts):
        for p in policy.trainable_parameters(): p.grad = None
        for i in parts:
            loss, figures = objective.loss(policy, t, {k: v[i] for k, v in examples.items()})
            torch.testing.assert_close(loss.detach(), -rewards[i])
            assert figures["steps_passed"].tolist() == [2.0] * len(i)
            loss.sum().backward()
        return grads(policy)
    whole = gradient([torch.arange(3)])
    parts = gradient([torch.tensor([2]), torch.tensor([0, 1])])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)

def test_a_tiny_pull_passes_a_decoder_in_half_precision():
    "1e-9 a pixel is nothing in fp16; the gradient of a reward a thousand million times as large is its like"
    policy = make("sd")
    policy.pipeline.vae.half()
    x0 = 0.5 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    size = lambda c: uphill(policy, x0, lambda images: (None, c * brightness(images, None, None)[0].sum()))[2]
    small, large = size(1e-9), size(1.0)
    assert large.abs().max() > 0
    torch.testing.assert_close(small * 1e9, large, rtol=1e-3, atol=1e-6)

# ---- what is known exactly ----

goal, care = torch.tensor([0.5, 2.0]).double(), torch.tensor([2.0, 0.25]).double()
def closeness(x, *_): return -(care * (x - goal)**2).sum(-1), {}

def exact_gradient(policy, k):
    "Of E[r] in the weights of the last k steps alone: a linear-Gaussian chain, walked in closed form."
    T = len(policy.timesteps)
    if isinstance(policy, TinyFlow):
        slope, offset = torch.ones(2).double(), torch.zeros(2).double()
        levels = policy.process.sigmas.double()
        for i, (s, after) in enumerate(zip(levels, levels[1:])):
            at = lambda x: x + (after - s) * policy.predict(x[None], 1000 * s[None])[0]
            zero = at(torch.zeros(2).double())
            grown = at(torch.ones(2).double()) - zero
            if i < T - k: zero, grown = zero.detach(), grown.detach()
            slope, offset = grown * slope, grown * offset + zero
        mean, var = offset, slope**2
    else:
        frozen = TinyDiffusion(policy.mean.tolist(), policy.log_std.exp().tolist(), T)
        mean, var = x0_moments([frozen] * (T - k) + [policy] * k)
    value = closeness(mean)[0] - (care * var).sum()
    return torch.cat(torch.autograd.grad(value, policy.trainable_parameters()))

TOYS = dict(
    flow=lambda: TinyFlow([0., 0.], [0.7, 0.7], 5), ddim=lambda: TinyDiffusion([0., 0.], [0.7, 0.7], 5))

@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_on_a_model_that_is_known_it_is_the_exact_gradient(toy, k):
    "40 batches of 4000 samples: the mean within 4 standard errors of what a linear chain's gradient is"
    policy, objective, g, found = TOYS[toy](), DRaFT(steps=k), torch.Generator().manual_seed(3), []
    exact = exact_gradient(policy, k)
    for _ in range(40):
        t = policy.sample(4000, g)
        _, values, t.uphill = uphill(
            policy, t.latents[:, -1], lambda x: (closeness(x)[0].detach(), closeness(x)[0].sum()))
        t = Trajectories(
            t.latents[:, -k - 1:], t.timesteps, t.log_probs, t.stochastic, t.conditioning, t.prompts,
            t.metadata, uphill=t.uphill)
        for p in policy.trainable_parameters(): p.grad = None
        objective.loss(policy, t, objective.examples(policy, t, values, g))[0].mean().backward()
        found.append(-grads(policy))
    found = torch.stack(found)
    error = found.std(0) / len(found)**0.5
    assert ((found.mean(0) - exact).abs() < 4 * error).all()
    assert (exact.abs() > 8 * error).any()  # so that there was something to see

def test_random_k_gives_every_step_its_share():
    "P(K ≥ steps that are left) for a chain and for a step alike; a chain is cut once"
    g = torch.Generator().manual_seed(0)
    for draw in ("chain", "step"):
        passed = AlignProp(fewest=1, draw=draw).passed(20_000, 10, g)
        share = passed.double().mean(0)
        torch.testing.assert_close(share, torch.arange(1, 11) / 10.0, atol=0.02, rtol=0, check_dtype=False)
        cuts = (passed[:, 1:] != passed[:, :-1]).sum(1)
        assert (cuts.max() <= 1) == (draw == "chain")
    assert AlignProp(fewest=2, most=4).passed(999, 10, g).sum(1).unique().tolist() == [2, 3, 4]
    assert AlignProp(fewest=-40, most=10).passed(999, 10, g).sum(1).min() == 0

# ---- in the loop ----

def config(algorithm="draft", kind="sd", out="", **settings):
    few = dict(
        logdir=str(out), mixed_precision="no", sample_num_steps=3, sample_batch_size=2, num_epochs=2,
        sample_num_batches_per_epoch=2, train_batch_size=4, sample_guidance_scale=3.0, sample_resolution=16,
        train_learning_rate=1e-2, num_checkpoint_limit=9
    ) | ({} if "flux" in kind or "sd3" in kind else dict(sample_eta=0.5))
    return make_config(algorithm, **few | settings)

def trainer(algorithm="draft", kind="sd", out="", lora=True, reward=brightness, **settings):
    c, prompts = config(algorithm, kind, out, **settings), PromptSource(["a cat", "a fox"], 0)
    return make_trainer(c, reward, prompts, tiny_policy(kind, lora))

FEW = [("draft", "sd", True), ("draft", "sdxl", False), ("alignprop", "sd3-without-t5", True),
       ("alignprop", "flux", False)]

@pytest.mark.parametrize("algorithm,kind,lora", FEW)
def test_it_trains_and_resumes_to_the_same_bits(algorithm, kind, lora, tmp_path):
    "Stopped within the second epoch's update; the reward is not asked again, and each picture is one query"
    asked = []
    def reward(images, *about):
        asked.append(len(images))
        return brightness(images, *about)
    own = dict(train_learning_rate=1e-2 if lora else 1e-4, micro_batch_size=1)
    own |= dict(draft_steps=2) if algorithm == "draft" else {}
    whole = trainer(algorithm, kind, tmp_path/"whole", lora, reward, **own)
    count, start = stop_after(whole, -1), weights(whole).clone()
    rows = whole.train(progress=False)
    assert asked == [2] * 4 and [r["queries"] for r in rows] == [4, 8]
    assert all(math.isfinite(r["loss"]) and r["loss"] == pytest.approx(-r["reward_mean"]) for r in rows)
    assert (weights(whole) != start).any() and all(r["updates"] == 1 for r in rows)
    cut = trainer(algorithm, kind, tmp_path/"cut", lora, reward, **own)
    stop_after(cut, count[0] - 2)
    cut.train(progress=False)
    assert cut.epochs_done == 1 and cut.work.done == 0
    asked.clear()
    again = trainer(algorithm, kind, tmp_path/"cut", lora, reward, **own, resume_from=str(tmp_path/"cut"))
    again.train(progress=False)
    assert torch.equal(weights(again), weights(whole)) and not asked

def test_it_climbs():
    t = trainer(num_epochs=8, train_learning_rate=3e-2, draft_steps=0)
    rows = t.train(progress=False)
    assert rows[-1]["reward_mean"] > rows[0]["reward_mean"] + 0.05

@pytest.mark.parametrize("settings", [
    dict(offload_trajectories=True), dict(gradient_checkpointing=True), dict(micro_batch_size=1),
    dict(vae_slicing=True), dict(sample_batch_size=4, sample_num_batches_per_epoch=1)])
def test_memory_and_speed_are_not_the_result(settings):
    usual, other = trainer(draft_steps=2), trainer(draft_steps=2, **settings)
    for t in (usual, other): t.epoch()
    torch.testing.assert_close(weights(usual), weights(other), rtol=1e-3, atol=2e-4)

def test_in_half_precision_the_walk_is_cast_as_the_sampling_was():
    t, seen = trainer(mixed_precision="bf16", draft_steps=2), []
    t.policy.trained.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    row = t.epoch()
    assert all(seen) and len(seen) >= 5 and math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0

@pytest.mark.parametrize("passed", [[[0, 1, 1, 0]], [[1, 0, 1, 0]], [[1, 1, 1, 0], [1, 1, 0, 0]]])
def test_casts_of_a_step_without_a_gradient_are_not_taken_for_the_next_one_s(passed, monkeypatch):
    "as autocast of older torch, which is allowed, hands them out"
    linear, forget, casts = torch.nn.functional.linear, torch.clear_autocast_cache, {}
    def cast(x, w, b=None):
        if w not in casts: casts[w] = w * 1.0
        return linear(x, casts[w], b)
    policy, objective = make("sd", steps=4, eta=0.0), AlignProp(fewest=0)
    passed = torch.tensor(passed).bool().repeat(3, 1)[:3]
    monkeypatch.setattr(AlignProp, "passed", lambda *_: passed)
    usual = by_walking(policy, objective)[0]
    monkeypatch.setattr(torch.nn.functional, "linear", cast)
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (casts.clear(), forget()))
    t = sampled(policy, objective)
    casts.clear()
    examples = objective.examples(policy, t, torch.zeros(len(PROMPTS)), None)
    for p in policy.trainable_parameters(): p.grad = None
    objective.loss(policy, t, examples)[0].sum().backward()
    torch.testing.assert_close(-grads(policy), usual, rtol=1e-3, atol=1e-4 * usual.abs().max().item())

def test_what_is_watched_has_no_part_in_the_gradient():
    a, b = trainer(), trainer(watch_reward="jpeg_compressibility")
    for t in (a, b): row = t.epoch()
    assert row["watch_mean"] < 0 and torch.equal(weights(a), weights(b))

# ---- what is refused ----

class Says:
    def __init__(self, said): self.differentiable = said
    def __call__(self, images, prompts, metadata): return brightness(images, prompts, metadata)

def numbers(images, prompts, metadata): return brightness(images, prompts, metadata)[0].detach(), {}

HALF = WeightedSum({"own": (1, brightness), "jpeg": (1, jpeg_compressibility)})

@pytest.mark.parametrize("reward", [jpeg_compressibility, Says(False), HALF])
def test_a_reward_without_a_gradient_is_refused_before_anything_is_painted(reward):
    with pytest.raises(InputError, match="^reward_function: .*has no gradient, and draft") as e:
        trainer(reward=reward)
    assert "\n" not in str(e.value)

def test_a_user_s_reward_that_says_nothing_is_taken_at_its_answer():
    assert differentiable(numbers) is None and differentiable(Says(True)) is True
    t = trainer(reward=numbers)
    before = weights(t).clone()
    with pytest.raises(InputError, match="^reward numbers: its answer has no gradient") as e: t.epoch()
    assert "\n" not in str(e.value) and torch.equal(weights(t), before)

weight = torch.nn.Parameter(torch.ones(()))

def cut_off(images, prompts, metadata):
    "The usual mistake: bytes on the way to a scorer whose own weights have a gradient."
    return (images * 255).round().byte().float().mean((1, 2, 3)) * weight, {}

@pytest.mark.parametrize("reward,name", [
    (cut_off, "cut_off"), (WeightedSum({"whole": (1, brightness), "bytes": (5, cut_off)}), "bytes")])
def test_a_gradient_in_the_scorers_weights_alone_is_none_in_the_pictures(reward, name):
    t = trainer(reward=reward)
    refusal = f"^reward {name}: its answer has no gradient in the pictures"
    with pytest.raises(InputError, match=refusal) as e: t.epoch()
    assert "\n" not in str(e.value)

def test_an_answer_depends_on_what_it_is_computed_from():
    x, other = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    inner = other * 2
    for way in (True, False): assert depends_on(checkpoint(torch.sin, x, use_reentrant=way) + other, x)
    assert depends_on(x.clone().mean(), x) and depends_on(inner.sum(), inner) and depends_on(x, x)
    for y in (other.sum(), (x.detach() * other).sum(), torch.ones(3), inner): assert not depends_on(y, x)
    assert not depends_on(other * 3, inner)

def test_a_judge_that_ignores_the_pictures_is_refused_by_name():
    policy = make("sd", steps=1)
    with pytest.raises(InputError, match="^reward: it does not depend on the pictures"):
        uphill(policy, torch.zeros(1, *policy.latent_shape), lambda images: (None, weight * 2))

def test_a_file_s_reward_says_what_its_function_says(tmp_path):
    (tmp_path/"r.py").write_text(
        "def silent(images, prompts, metadata): return images.mean((1, 2, 3)), {}\n"
        "def flat(images, prompts, metadata): return [0.0] * len(images), {}\n"
        "flat.differentiable = False\n")
    silent, flat = (guarded_file(tmp_path/"r.py", o) for o in ("silent", "flat"))
    assert differentiable(silent) is None and differentiable(flat) is False
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    assert as_column(silent(images, ["a", "b"], [{}, {}])[0], images, "silent").requires_grad
    summed = Guarded(WeightedSum({"silent": (1, silent), "flat": (1, flat)}), "silent+flat")
    with pytest.raises(InputError, match="^--reward: flat has no gradient"):
        check_differentiable(summed, "draft")

def test_a_sum_has_the_sum_of_the_gradients():
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    both = WeightedSum({"a": (2.0, Says(True)), "b": (-1.0, Says(True))})
    assert both.differentiable and check_differentiable(both, "draft") is None
    rewards, info = both(images, ["a", "b"], [{}, {}])
    one, = torch.autograd.grad(brightness(images, None, None)[0].sum(), images)
    torch.testing.assert_close(torch.autograd.grad(rewards.sum(), images)[0], one)
    assert info["reward/a"].shape == (2,)

def test_a_gradient_that_is_not_finite_is_refused_by_name():
    bad = lambda images, *_: ((images.mean((1, 2, 3)) - images.mean((1, 2, 3))).sqrt(), {})
    with pytest.raises(InputError, match="^reward: its gradient is not finite"): trainer(reward=bad).epoch()

@pytest.mark.parametrize("algorithm,settings,message", [
    ("draft", dict(draft_steps=11), "draft_steps: 11 is more than the 10 steps"),
    ("draft", dict(draft_steps=-1), "draft_steps: -1 is out of range"),
    ("draft", dict(kl_coef=0.1), "kl_coef: draft does nothing"),
    ("draft", dict(train_clip_range=0.1), "train_clip_range: draft does nothing"),
    ("draft", dict(baseline="group", samples_per_prompt=2), "baseline: draft follows"),
    ("draft", dict(per_prompt_stat_tracking=True), "per_prompt_stat_tracking: draft follows"),
    ("draft", dict(advantage_min_std=1.0), "advantage_min_std: draft follows"),
    ("draft", dict(async_reward_computation=True), "async_reward_computation: draft needs"),
    ("draft", dict(train_num_inner_epochs=2), "algorithm: draft's gradient holds only"),
    ("draft", dict(alignprop_most=2), "alignprop_most: draft does nothing"),
    ("alignprop", dict(draft_steps=2), "draft_steps: alignprop does nothing"),
    ("alignprop", dict(alignprop_draw="often"), "alignprop_draw: there is no 'often'; choose from"),
    ("alignprop", dict(alignprop_most=11), "alignprop_most: 11 is more than the 10"),
    ("alignprop", dict(alignprop_fewest=5, alignprop_most=3), "alignprop_most: 3 is below"),
])
def test_what_has_no_effect_or_cannot_work_is_refused_in_one_line(algorithm, settings, message):
    few = dict(sample_num_steps=10, sample_batch_size=4, sample_num_batches_per_epoch=1, train_batch_size=4)
    with pytest.raises(InputError, match=f"^{message}") as e:
        DDPOConfig(algorithm=algorithm, **few | settings)
    assert "\n" not in str(e.value)

# ---- rewards that have a gradient ----

def picture(n=3, size=80, seed=0):
    "Smooth pictures, as a decoder paints them."
    small = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, (size, size), mode="bicubic").clamp(0, 1)

PROCESSORS = dict(
    clip=lambda: CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    siglip=lambda: SiglipImageProcessor(size={"height": 48, "width": 48}),
    bilinear=lambda: CLIPImageProcessor(
        size={"shortest_edge": 100}, crop_size={"height": 96, "width": 96}, resample=2),
    plain=lambda: CLIPImageProcessor(do_resize=False, do_center_crop=False, do_normalize=False))

@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("shape", [(80, 80), (90, 64)])
def test_the_way_with_a_gradient_leads_to_the_processor_s_pixels(name, shape):
    "Within a 255th of the range, for smaller and larger pictures and those that are no squares"
    processor, images = PROCESSORS[name](), picture(size=90)[..., :shape[0], :shape[1]]
    want = processor(images=list(to_uint8(images)), return_tensors="pt").pixel_values
    found = differentiable_pixels(processor, images)
    spread = min(processor.image_std) if processor.do_normalize else 1
    assert found.shape == want.shape and (found - want).abs().max() < 1.6 / 255 / spread

def test_an_interpolation_that_torch_lacks_is_refused():
    with pytest.raises(InputError, match="^reward: its image processor interpolates as PIL's 1"):
        differentiable_pixels(CLIPImageProcessor(resample=1), picture())

def small_clip():
    torch.manual_seed(0)
    embedder = load_embedder()
    vision, text = (
        getattr(embedder.model.config, k).to_dict() | dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        for k in ("vision_config", "text_config"))
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
    return Embedder(model, embedder.image_processor, embedder.tokenizer)

JUDGES = dict(
    clip_alignment=lambda: clip_alignment(), clip_score=lambda: clip_score(), aesthetic=lambda: aesthetic(),
    pickscore=lambda: PickScore(small_clip()), scenes_logprob=lambda: scenes_logprob())
ASKED = ["a cat", "two cats on red", "a pig above a dog"]

@pytest.mark.parametrize("name", JUDGES)
def test_a_reward_says_the_same_with_a_gradient_and_the_gradient_is_its_slope(name):
    """The value within what rounding to 8 bits moves it; the gradient against differences along itself (an
    ordinary answer has no graph)"""
    judge, images = JUDGES[name](), picture(size=64)
    assert differentiable(judge) is True
    plain, _ = judge(images, ASKED, [{}] * 3)
    assert isinstance(plain, np.ndarray)
    seen = images.clone().requires_grad_()
    found, info = judge(seen, ASKED, [{}] * 3)
    scale = max(1.0, float(np.abs(plain).max()))
    np.testing.assert_allclose(found.detach().numpy(), plain, atol=0.01 * scale)
    pull, = torch.autograd.grad(found.sum(), seen)
    size = pull.flatten(1).norm(dim=1)
    # a CLIPScore is 0, and flat, where the cosine is below
    assert pull.isfinite().all() and size.any() and (size > 0).tolist() == (plain != 0).tolist()
    step = 0.02 * pull / size.clamp(min=1e-9).view(-1, 1, 1, 1)
    with torch.enable_grad():
        up, down = (judge((images + s * step).requires_grad_(), ASKED, [{}] * 3)[0].detach() for s in (1, -1))
    torch.testing.assert_close((up - down) / 2, (pull * step).flatten(1).sum(1), rtol=0.15, atol=1e-4)
    with torch.no_grad(): assert isinstance(judge(seen, ASKED, [{}] * 3)[0], np.ndarray)

def test_all_that_the_package_names_says_whether_it_has_one():
    "By name, without its weights: the class or function that a name stands for"
    made_of = dict(
        jpeg_compressibility=jpeg_compressibility, jpeg_incompressibility=jpeg_incompressibility,
        clip_alignment=CLIPAlignment, clip_score=CLIPAlignment, hps_v2=CLIPAlignment, pickscore=PickScore,
        aesthetic=AestheticReward, scenes_logprob=SceneLogProb, scenes=SceneReward, scenes_strict=SceneReward,
        prompt_alignment=PromptAlignment, image_reward=ImageReward)
    said = {name: differentiable(o if isinstance(o, FunctionType) else object.__new__(o))
            for name, o in made_of.items()}
    yes = {name for name, o in said.items() if o}
    assert yes == {"clip_alignment", "clip_score", "hps_v2", "pickscore", "aesthetic", "scenes_logprob"}
    assert {o for n, o in said.items() if n not in yes} == {False}

# ---- the reader's log-probability ----

def brute(odds, fine):
    "The sum of the chances of all outcomes, of independent things, that are `fine`."
    p = odds.double().sigmoid()
    total = 0.0
    for o in itertools.product((0, 1), repeat=len(p)):
        o = torch.tensor(o)
        if fine(o): total += torch.where(o == 1, p, 1 - p).prod().item()
    return total

@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-8, 6), min_size=4, max_size=7), st.integers(0, 4))
def test_exactly_so_many_by_counting_all_cases(odds, count):
    odds = torch.tensor(odds)
    found = scenes_module.log_exactly(odds, count).exp().item()
    assert found == pytest.approx(brute(odds, lambda o: o.sum() == count), rel=1e-3, abs=1e-9)

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, "left of", "right of", "above", "below"]))
def test_two_things_that_stand_so_by_counting_all_cases(seed, relation):
    g = torch.Generator().manual_seed(seed)
    a, b = 3 * torch.randn(4, generator=g), 3 * torch.randn(4, generator=g)
    x, y = 64 * torch.rand(4, generator=g), 64 * torch.rand(4, generator=g)
    def fine(o):
        first, second = o[:4].nonzero().flatten().tolist(), o[4:].nonzero().flatten().tolist()
        if len(first) != 1 or len(second) != 1: return False
        at = lambda i: scenes_module.Found("cat", x[i].item(), y[i].item(), 20, 1)
        return relation is None or scenes_module.stands(at(first[0]), relation, at(second[0]))
    found = scenes_module.log_arranged(a, b, x, y, relation).exp().item()
    assert found == pytest.approx(brute(torch.cat([a, b]), fine), rel=1e-3, abs=1e-9)

def test_of_a_picture_it_is_highest_for_what_is_there():
    from ddpo_nb.emoji_sd3 import paint
    try: painted, _ = paint([("cat", 18, 20, 28), ("cat", 46, 44, 28)], "blue")
    except InputError: pytest.skip("the font is not here")
    image = torch.tensor(np.asarray(painted)).permute(2, 0, 1)[None] / 255
    asked = ["two cats on a blue background", "three cats on a blue background", "a dog on blue", "a cat",
             "two cats on a red background"]
    found, info = scenes_logprob()(image.expand(5, -1, -1, -1), asked, [{}] * 5)
    assert info["right"].tolist() == [1, 0, 0, 0, 0] and found[0] > -0.5 and (found[1:] < found[0] - 1).all()

# ---- from the command line ----

FEW_WORDS = ("--queries 8 --sample-num-steps 2 --sample-batch-size 4 --sample-num-batches-per-epoch 1"
             " --train-batch-size 4 --evaluation-samples 2 --samples-per-prompt 1 --no-progress").split()

@pytest.mark.usefixtures("small_unet")
def test_compare_has_it_beside_the_others_and_the_report_is_complete(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["ddpo-is", "nft", "draft", "rwr"]
    line = ["compare", "--algorithms", ",".join(names), "--reward", "aesthetic", "--output", "out"]
    assert main([*line, *FEW_WORDS]) == 0
    rows = [json.loads(o) for o in (tmp_path/"out/metrics.jsonl").read_text().splitlines()]
    spent = {name: max(r["queries"] for r in rows if r["algorithm"] == name) for name in names}
    assert set(spent.values()) == {8}
    report, told = (tmp_path/"out/report.html").read_text(), capsys.readouterr().out
    for label in ("DDPO-IS", "DiffusionNFT", "DRaFT", "RWR"): assert label in report and label in told
    for name in names:
        assert (tmp_path/f"out/weights/{name}-seed0/pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path/"out/curves.png").is_file() and (tmp_path/"out/before_after.png").is_file()

@pytest.mark.parametrize("line,names", [
    ("compare --algorithms ddpo-is,draft --reward jpeg_incompressibility", "incompressibility has no"),
    ("train --algorithm draft", "jpeg_compressibility has no gradient"),
    ("train --algorithm alignprop --reward aesthetic+0.1*jpeg_compressibility", "jpeg_compressibility has"),
    ("train --algorithm draft --reward scenes --prompts scenes", "scenes has no gradient"),
    ("train --algorithm draft --reward aesthetic --draft-steps 11", "--draft-steps: 11 is more than the 10"),
    ("train --algorithm draft --reward aesthetic --baseline group", "--baseline: draft follows"),
])
def test_the_command_line_refuses_it_and_writes_nothing(line, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*line.split(), *FEW_WORDS[:2]]) == 2
    err = capsys.readouterr().err
    assert names in err and err.count("\n") == 1 and not [*tmp_path.iterdir()]

def test_a_dry_run_knows_the_walk_back(capsys):
    "Three steps of sixteen pictures, twice for guidance: 96 rows in an update, with one step's activations"
    line = "train --algorithm draft --reward aesthetic --dry-run --micro-batch-size 8 --draft-steps 3"
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    row = next(o for o in out.splitlines() if "training (forward and backward)" in o)
    samples = int(next(o for o in out.splitlines() if "samples per epoch" in o).split()[-1])
    assert int(row.split()[-1].replace(",", "")) == 3 * 2 * samples and "decoding its images" in out
