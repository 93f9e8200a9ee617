"""Gradients through sampling, decoding and the reward: against autograd over the whole graph, against finite
differences, and against what is known exactly; in the loop, resumed to the same bits."""
import math

import pytest
import torch
from ddpo_nb.config import DDPOConfig, make_config
from ddpo_nb.direct import AlignProp, DRaFT, uphill, walk_back
from ddpo_nb.loading import family_of
from ddpo_nb.mdp import Trajectories
from ddpo_nb.nft import TinyFlow
from ddpo_nb.prompts import InputError, PromptSource
from ddpo_nb.rewards import (WeightedSum, as_column, check_differentiable, differentiable,
                             jpeg_compressibility)
from ddpo_nb.rollout import rollout, sample_generator
from ddpo_nb.rwr import TinyDiffusion, x0_moments
from ddpo_nb.tiny import TINY, tiny_pipeline
from ddpo_nb.trainer import make_trainer
from stopping import stop_after

KINDS = [k for k in TINY if k != "sd3"]  # T5 takes longest, and makes no difference here
PROMPTS = ["a cat", "a fox", "a bear"]

def brightness(images, prompts, metadata):
    "Of the red channel most, so that no direction is like another."
    return (images * images.new_tensor([3.0, 1.0, -0.5]).view(3, 1, 1)).mean((1, 2, 3)), {}

def make(family, lora=True, steps=3, guidance=3.0, **how):
    torch.manual_seed(0)
    pipe = tiny_pipeline(family)
    of = family_of(pipe)
    if "flux" in family or "sd3" in family: of.text_window = 16
    policy = of(pipe, use_lora=lora, num_steps=steps, guidance_scale=guidance, resolution=16, **how)
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
            return found, as_column(found[0], "reward").sum()
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
    direction = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in policy.trainable_parameters()]
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
    torch.testing.assert_close(gradient([torch.tensor([2]), torch.tensor([0, 1])]), whole, rtol=1e-4, atol=1e-7)

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

TOYS = dict(flow=lambda: TinyFlow([0., 0.], [0.7, 0.7], 5), ddim=lambda: TinyDiffusion([0., 0.], [0.7, 0.7], 5))

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

def bare(kind, lora=True):
    torch.manual_seed(0)
    pipe = tiny_pipeline(kind)
    of = family_of(pipe)
    if "flux" in kind or "sd3" in kind: of.text_window = 16
    return of(pipe, use_lora=lora)

def trainer(algorithm="draft", kind="sd", out="", lora=True, reward=brightness, **settings):
    return make_trainer(
        config(algorithm, kind, out, **settings), reward, PromptSource(["a cat", "a fox"], 0), bare(kind, lora))

def weights(t): return torch.cat([p.detach().flatten() for p in t.policy.trainable_parameters()])

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

def test_what_is_watched_has_no_part_in_the_gradient():
    a, b = trainer(), trainer(watch_reward="jpeg_compressibility")
    for t in (a, b): row = t.epoch()
    assert row["watch_mean"] < 0 and torch.equal(weights(a), weights(b))

# ---- what is refused ----

class Says:
    def __init__(self, said): self.differentiable = said
    def __call__(self, images, prompts, metadata): return brightness(images, prompts, metadata)

def numbers(images, prompts, metadata): return brightness(images, prompts, metadata)[0].detach(), {}

@pytest.mark.parametrize("reward", [
    jpeg_compressibility, Says(False), WeightedSum({"own": (1, brightness), "jpeg": (1, jpeg_compressibility)})])
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
    ("alignprop", dict(alignprop_draw="often"), "alignprop_draw: there is no 'often'; choose from chain, step"),
    ("alignprop", dict(alignprop_most=11), "alignprop_most: 11 is more than the 10"),
    ("alignprop", dict(alignprop_fewest=5, alignprop_most=3), "alignprop_most: 3 is below"),
])
def test_what_has_no_effect_or_cannot_work_is_refused_in_one_line(algorithm, settings, message):
    few = dict(sample_num_steps=10, sample_batch_size=4, sample_num_batches_per_epoch=1, train_batch_size=4)
    with pytest.raises(InputError, match=f"^{message}") as e:
        DDPOConfig(algorithm=algorithm, **few | settings)
    assert "\n" not in str(e.value)
