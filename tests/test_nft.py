"""DiffusionNFT against what it claims: on models that are known exactly its update is the improvement that
the paper derives, and the policy gradient up to the scale of each kind of weight; the averaged policy is the
one that samples, and comes back from a checkpoint to the same bits."""
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings, strategies as st

from ddpo_nb.checkpoints import load_state
from ddpo_nb.cli import main
from ddpo_nb.config import make_config
from ddpo_nb.flow import FlowProcess
from ddpo_nb.mdp import DDIMProcess
from ddpo_nb.nft import NFT, SPACES, TinyFlow
from ddpo_nb.prompts import InputError, PromptSource
from ddpo_nb.rwr import RWR, TinyDiffusion, x0_moments
from ddpo_nb.tiny import TINY, tiny_pipeline
from ddpo_nb.trainer import make_trainer
from stopping import stop_after
from tiny_policy import tiny_policy, weights

double = dict(dtype=torch.float64)
def gen(seed=0): return torch.Generator().manual_seed(seed)
def flow(): return FlowProcess(FlowMatchEulerDiscreteScheduler(), "ode", num_steps=10)

def ddim(kind="epsilon", **settings):
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        prediction_type=kind, **dict(clip_sample=False, set_alpha_to_one=False) | settings
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return DDIMProcess(scheduler, 10)

class Free:
    "A policy that predicts a number of its own for every example, whatever it is shown."
    def __init__(self, output, process):
        self.output, self.process, self.device = output.clone().requires_grad_(), process, output.device
    def trainable_parameters(self): return [self.output]
    def predict(self, x, t, cond=None, guidance=True): return self.output + 0  # as a network: no alias

def price(objective, policy, x0, t, noise, r): return objective.cost(policy, x0, t, noise, None, r)[0]

# ---- the formula ----

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1.5), st.floats(1, 9), st.sampled_from(SPACES))
def test_the_loss_is_a_policy_gradient_and_a_leash(seed, beta, most, space):
    """r·e⁺ + (1-r)·e⁻ = e_old + 2β(2r-1)⟨d, v_old - v⟩ + β²|d|², with d = v - v_old: the first of them
    moves along the advantage, the second holds on to the policy that sampled"""
    g, process = gen(seed), flow()
    x0, noise, old, new = (torch.randn(6, 3, generator=g, **double) for _ in range(4))
    t, r = process.times[torch.randint(10, (6,), generator=g)], torch.rand(6, generator=g, **double)
    o, policy = NFT(beta=beta, adv_clip_max=most, adaptive=False, space=space), Free(old, process)
    with o.sampling(policy): pass  # which is when the old policy is remembered
    policy.output.data = new
    sigma = t.double() / 1000
    v, d = noise - x0, new - old
    along = ((old - v) * d).mean(1)
    want = (old - v).square().mean(1) + 2 * beta * (2 * r - 1) * along + beta**2 * d.square().mean(1)
    got = price(o, policy, x0, t, noise, r)
    scale = sigma**2 if space == "clean" else 1.0
    torch.testing.assert_close(got, scale * want * most / beta, rtol=1e-6, atol=1e-9)

@pytest.mark.parametrize("adaptive", [True, False])
def test_where_nothing_is_good_or_bad_nothing_moves(adaptive):
    "r = 1/2 everywhere: no gradient at the old policy, example by example, and elsewhere back towards it"
    g, process = gen(), flow()
    x0, noise, old = (torch.randn(6, 3, generator=g, **double) for _ in range(3))
    t, half = process.times[:6], torch.full((6,), 0.5, **double)
    o, policy = NFT(adaptive=adaptive), Free(old, process)
    gradient, = torch.autograd.grad(price(o, policy, x0, t, noise, half).sum(), policy.output)
    assert gradient.abs().max() < 1e-12
    policy.output.data = old + 0.1 * torch.randn(6, 3, generator=g, **double)
    gradient, = torch.autograd.grad(price(o, policy, x0, t, noise, half).sum(), policy.output)
    back = (gradient * (policy.output - old)).sum(1)
    assert (back > 0).all()
    if not adaptive:  # the leash alone
        scale = 2 * o.beta * o.adv_clip_max * (t.double() / 1000)[:, None]**2 / 3
        torch.testing.assert_close(gradient, scale * (policy.output.detach() - old), rtol=1e-6, atol=1e-9)

def test_the_first_step_depends_on_neither_beta_nor_the_clip():
    "What the factor adv_clip_max / β is for: it is the gradient of mean advantage times denoising error"
    g, process = gen(), flow()
    x0, noise, old = (torch.randn(6, 3, generator=g, **double) for _ in range(3))
    t, A = process.times[:6], torch.randn(6, generator=g, **double).clamp(-0.9, 0.9)
    policy, sigma = Free(old, process), (process.times[:6].double() / 1000)
    error = (sigma[:, None] * (policy.output - noise + x0)).square().mean(1)
    want, = torch.autograd.grad((A * error).sum(), policy.output)
    for beta, most in ((1.0, 5.0), (0.1, 5.0), (0.3, 1.0)):
        o = NFT(beta=beta, adv_clip_max=most, adaptive=False)
        again = Free(old, process)
        cost = price(o, again, x0, t, noise, o.weigh([], None, A)).sum()
        torch.testing.assert_close(torch.autograd.grad(cost, again.output)[0], want, rtol=1e-6, atol=1e-9)

def test_optimality():
    o = NFT(adv_clip_max=2.0)
    assert o.weigh([], None, [-9, -2, -1, 0, 1, 2, 9]).tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]

PROCESSES = dict(flow=flow, **{k: lambda k=k: ddim(k) for k in ("epsilon", "sample", "v_prediction")})

@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("beta,space", [(1.0, "clean"), (0.25, "clean"), (0.5, "output")])
def test_the_optimum_is_the_improvement_that_the_paper_derives(kind, beta, space):
    """Four pictures, each good with a known probability, so that the model and its improvement
    Δ = α(v⁺ - v_old) = (1-α)(v_old - v⁻) are sums of four terms: the loss is smallest at v_old + (2/β)Δ,
    for every parametrisation (theorems 3.1 and 3.2 of the paper)"""
    process, g = PROCESSES[kind](), gen(3)
    pictures, r = 0.5 * torch.randn(4, 2, generator=g, **double), torch.tensor([0.9, 0.5, 0.2, 0.0], **double)
    for i in (1, 3, 5):
        t = process.times[i].expand(4)
        one, zero = torch.ones(4, 2, **double), torch.zeros(4, 2, **double)
        a, b = process.noised(one, zero, t)[0, 0], process.noised(zero, one, t)[0, 0]
        x = a * pictures[0] + b * torch.randn(2, generator=g, **double)
        posterior = torch.softmax(-((x - a * pictures) / b).square().sum(1) / 2, 0)
        noise = (x - a * pictures) / b
        target = process.target(pictures, noise, t)
        mean = lambda w: (w[:, None] * target).sum(0) / w.sum()
        old, good, bad = mean(posterior), mean(posterior * r), mean(posterior * (1 - r))
        alpha = posterior @ r
        better = alpha * (good - old)
        torch.testing.assert_close(better, (1 - alpha) * (old - bad))
        o, policy = NFT(beta=beta, adaptive=False, space=space), Shared(old, process)
        def gradient():
            cost = posterior @ price(o, policy, pictures, t, noise, r)
            return torch.autograd.grad(cost, policy.output)[0][0]
        first = gradient()
        assert torch.cosine_similarity(-first, better, 0) > 1 - 1e-9
        policy.output.data = (old + 2 / beta * better)[None]
        assert gradient().abs().max() < 1e-7 * first.abs().max()

class Shared(Free):
    "One prediction for all examples."
    def __init__(self, output, process): super().__init__(output[None], process)
    def predict(self, x, t, cond=None, guidance=True): return self.output.expand(len(x), -1) + 0

class Told:
    "`TinyDiffusion`, whose network says x_0 or v in place of the noise."
    def __init__(self, tiny, kind): self.tiny, self.process = tiny, ddim(kind)
    def trainable_parameters(self): return self.tiny.trainable_parameters()
    def predict(self, x, t, cond=None, guidance=True):
        noise = self.tiny.predict(x, t)
        return self.process.target(self.tiny.process.predicted_clean(noise, x, t), noise, t)

@pytest.mark.parametrize("adaptive", [True, False])
def test_the_loss_is_the_same_however_a_model_puts_it(adaptive):
    """Noise, x_0, v, or a flow's velocity where signal and noise are in the same proportion: one denoiser,
    one loss, one gradient"""
    g = gen(5)
    x0, noise = (torch.randn(64, 2, generator=g, **double) for _ in range(2))
    r, t = torch.rand(64, generator=g, **double), torch.randint(20, 980, (64,), generator=g)
    share = TinyDiffusion([0.], [1.]).scheduler.alphas_cumprod[t]
    sigma = (1 - share)**0.5 / (share**0.5 + (1 - share)**0.5)
    tinies = [TinyDiffusion([0.1, -0.2], [0.7, 0.9], 10) for _ in range(3)]
    policies = [(tinies[0], t), (Told(tinies[1], "sample"), t), (Told(tinies[2], "v_prediction"), t),
                (TinyFlow([0.1, -0.2], [0.7, 0.9]), 1000 * sigma)]
    found = []
    for policy, times in policies:
        o = NFT(beta=0.7, adaptive=adaptive)
        with o.sampling(policy): pass
        with torch.no_grad():
            for p in policy.trainable_parameters(): p.add_(torch.tensor([0.05, -0.1], **double))
        loss = price(o, policy, x0, times, noise, r)
        gradient = flat(torch.autograd.grad(loss.mean(), policy.trainable_parameters()))
        found.append((loss.detach(), gradient))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-5, atol=1e-9)

def test_in_its_own_output_a_noise_predictor_is_weighed_as_it_was_trained():
    """Near pure noise a small error of the noise is a large one of x_0, times √(1-ᾱ)/√ᾱ: errors of x_0 give
    nearly all say to the noisiest times, and errors of the noise give each time the same"""
    process, g = ddim(), gen()
    x0, noise = (torch.randn(10, 50, generator=g, **double) for _ in range(2))
    push = {}
    for space in SPACES:
        policy = Free(noise + 0.3 * torch.randn(10, 50, generator=g, **double), process)
        loss = price(NFT(space=space), policy, x0, process.times, noise, torch.ones(10, **double)).sum()
        push[space] = torch.autograd.grad(loss, policy.output)[0].norm(dim=1)
    assert push["clean"][0] > 20 * push["clean"][-1]
    assert push["output"].max() < 1.5 * push["output"].min()

def test_a_scheduler_that_clips_does_not_cut_the_gradient():
    process, g = ddim(clip_sample=True), gen()
    x0, noise, old = (3 * torch.randn(6, 3, generator=g, **double) for _ in range(3))
    policy = Free(old, process)
    loss = price(NFT(), policy, x0, process.times[:6], noise, torch.ones(6, **double)).sum()
    assert (torch.autograd.grad(loss, policy.output)[0] != 0).all()

# ---- the update against the exact policy gradient ----

goal, care = torch.tensor([0.5, 2.0], **double), torch.tensor([2.0, 0.25], **double)
def reward(x): return -(care * (x - goal)**2).sum(-1)

def flow_moments(policy):
    "Exact mean and variance of x_0 by the ODE: an affine map of the noise, walked level by level."
    slope, offset, s = torch.ones(2, **double), torch.zeros(2, **double), policy.process.sigmas.double()
    for a, b in zip(s, s[1:]):
        at = lambda x: x + (b - a) * policy.predict(x[None], 1000 * a[None])[0]
        zero = at(torch.zeros(2, **double))
        grown = at(torch.ones(2, **double)) - zero
        slope, offset = grown * slope, grown * offset + zero
    return offset, slope**2

def moments(policy):
    if isinstance(policy, TinyFlow): return flow_moments(policy)
    return x0_moments([policy] * len(policy.timesteps))

def expected_reward(policy):
    mean, var = moments(policy)
    return reward(mean) - (care * var).sum()

def flat(gradients): return torch.cat(gradients)
def exact_gradient(policy):
    return flat(torch.autograd.grad(expected_reward(policy), policy.trainable_parameters()))

def update(policy, objective, n, g):
    "Minus the gradient of NFT's loss on n of the policy's own samples, one time each."
    batch = policy.sample(n, g)
    x0 = batch.latents[:, -1]
    A = reward(x0) - expected_reward(policy).detach()
    t = policy.timesteps[torch.randint(len(policy.timesteps), (n,), generator=g)]
    noise = torch.randn(x0.shape, generator=g, **double)
    loss = price(objective, policy, x0, t, noise, objective.weigh([], None, A))
    return -flat(torch.autograd.grad(loss.mean(), policy.trainable_parameters()))

def z_scores(estimates, target=0.0):
    return (estimates.mean(0) - target) / (estimates.std(0) / len(estimates)**0.5)

TOYS = dict(
    flow=lambda: TinyFlow([0., 0.], [0.7, 0.7], 5), sde=lambda: TinyFlow([0., 0.], [0.7, 0.7], 5, "flow-sde"),
    ddim=lambda: TinyDiffusion([0., 0.], [0.7, 0.7], 5))

@pytest.mark.parametrize("toy,space", [*((o, "clean") for o in TOYS), ("ddim", "output")])
def test_the_update_is_the_policy_gradient_up_to_the_scale_of_each_kind_of_weight(toy, space):
    """Of the means, and of the spreads, whatever the sampler: parallel to the exact gradient of E[r], and
    along it. (How the two kinds are weighed against each other is the choice of noise levels.)"""
    policy, objective, g = TOYS[toy](), NFT(adaptive=False, adv_clip_max=1e6, space=space), gen(1)
    updates = torch.stack([update(policy, objective, 4_000, g) for _ in range(40)])
    exact = exact_gradient(policy)
    for own, true in zip(updates.split(2, 1), exact.split(2)):
        along = own @ true / true.norm()
        across = own @ torch.stack([-true[1], true[0]]) / true.norm()
        assert z_scores(along) > 15 and z_scores(across).abs() < 4
    assert torch.cosine_similarity(updates.mean(0), exact, 0) > 0.8

def test_the_check_of_directions_finds_what_it_looks_for():
    "RWR's weights are another question's: its means do not go along the gradient's"
    policy, g, found = TOYS["ddim"](), gen(1), []
    true = exact_gradient(policy)[:2]
    for _ in range(40):
        batch = policy.sample(4_000, g)
        o, r = RWR(beta=5.0), reward(batch.latents[:, -1])
        examples = o.examples(policy, batch, o.weights((r - r.mean()) / r.std()), g)
        found.append(-flat(torch.autograd.grad(o.loss(policy, batch, examples)[0].mean(), policy.mean)))
    across = torch.stack(found) @ torch.stack([-true[1], true[0]]) / true.norm()
    assert z_scores(across).abs() > 8

@pytest.mark.parametrize("toy", TOYS)
def test_with_the_authors_weighting_the_update_still_climbs(toy):
    policy, g = TOYS[toy](), gen(2)
    exact = exact_gradient(policy)
    for objective in (NFT(), NFT(beta=0.1), NFT(space="output")):
        found = torch.stack([update(policy, objective, 4_000, g) for _ in range(20)])
        assert torch.cosine_similarity(found.mean(0), exact, 0) > 0.7 and z_scores(found @ exact) > 15

@pytest.mark.parametrize("toy", TOYS)
def test_it_walks_to_the_known_optimum(toy):
    "Through the loop's own parts: sample with the averaged weights, weigh, examples, loss, average"
    policy, objective, g, updates = TOYS[toy](), NFT(decay_rate=0.01, beta=0.5), gen(7), 0
    start = expected_reward(policy).item()
    opt = torch.optim.Adam(policy.trainable_parameters(), lr=0.03)
    for _ in range(120):
        with objective.sampling(policy): batch = policy.sample(64, g)
        r = reward(batch.latents[:, -1])
        counts = objective.weigh([], r, (r - r.mean()) / r.std())
        opt.zero_grad()
        objective.loss(policy, batch, objective.examples(policy, batch, counts, g))[0].mean().backward()
        opt.step()
        objective.end_epoch(policy, updates := updates + 1)
    assert start < -1.5 and expected_reward(policy).item() > -0.15

# ---- the averaged policy ----

@pytest.mark.parametrize("schedule,published", [
    (dict(decay_max=0.0), lambda n: 0.0),
    (dict(), lambda n: min(0.001 * n, 0.5)),
    (dict(decay_rate=0.0075, decay_max=0.999, decay_delay=75),
     lambda n: 0.0 if n < 75 else min(0.0075 * (n - 75), 0.999)),
], ids=["type 0", "type 1", "type 2"])
def test_the_average_decays_as_published(schedule, published):
    "The three kinds of NVlabs/DiffusionNFT, `return_decay` in scripts/train_nft_sd3.py"
    for n in (0, 1, 74, 75, 76, 300, 499, 501, 10_000):
        assert NFT(**schedule).decay(n) == pytest.approx(published(n), abs=1e-12)

def test_old_weights_are_an_average_and_the_only_ones_that_sample():
    policy, o = TinyDiffusion([1., 2.], [0.5, 0.5]), NFT(decay_rate=0.1, decay_max=0.4)
    with o.sampling(policy): assert policy.mean.tolist() == [1, 2]
    average = policy.mean.detach().clone()
    for n in range(1, 7):
        with torch.no_grad(): policy.mean.add_(1.0)
        place = policy.mean.data_ptr()
        o.end_epoch(policy, n)
        d = min(0.1 * n, 0.4)
        average = d * average + (1 - d) * policy.mean.detach()
        with o.sampling(policy):
            torch.testing.assert_close(policy.mean.detach(), average)
            assert policy.predict(torch.zeros(1, 2, **double), torch.tensor([500])).requires_grad
        assert policy.mean.data_ptr() == place and policy.mean.tolist() == [1 + n, 2 + n]
    with pytest.raises(ZeroDivisionError), o.sampling(policy): 1 / 0
    assert policy.mean.data_ptr() == place  # whatever happens meanwhile

def test_at_no_decay_the_newest_weights_sample_to_the_last_bit():
    policy, o = TinyDiffusion([1 / 3, 2.], [0.5, 0.5]), NFT(decay_max=0.0)
    with o.sampling(policy): pass
    with torch.no_grad(): policy.mean.add_(math.pi)
    o.end_epoch(policy, 1)
    assert torch.equal(o.old[0], policy.mean) and o.old[0] is not policy.mean

# ---- in the loop ----

KINDS = [k for k in TINY if k != "sd3"]  # T5 takes longest, and makes no difference here
def brightness(images, prompts, metadata): return images.mean((1, 2, 3)), {}

def config(kind, out="", algorithm="nft", **settings):
    few = dict(
        logdir=str(out), mixed_precision="no", sample_num_steps=3, sample_batch_size=4, num_epochs=2,
        sample_num_batches_per_epoch=1, train_batch_size=2, sample_guidance_scale=3.0, sample_resolution=16,
        train_learning_rate=1e-2, train_cfg="flux" in kind, num_checkpoint_limit=9,
        train_timestep_fraction=1.0, nft_decay_rate=0.1
    )
    return make_config(algorithm, **few | settings)

def trainer(kind="sd", out="", lora=True, **settings):
    c, prompts = config(kind, out, **settings), PromptSource(["a cat", "a fox"], 0)
    return make_trainer(c, brightness, prompts, tiny_policy(kind, lora))

def averaged(t): return torch.cat([p.flatten() for p in t.objective.old])

@pytest.mark.parametrize(
    "kind,lora", [*((k, True) for k in KINDS), *((k, False) for k in ("sd", "sd3-without-t5", "flux"))])
def test_every_family_trains_and_resumes_to_the_same_bits(kind, lora, tmp_path):
    "Stopped among the second epoch's updates, when what samples and what is trained have parted"
    own = dict(kl_coef=0.1, train_learning_rate=1e-2 if lora else 1e-4)
    whole = trainer(kind, tmp_path/"whole", lora, **own)
    count = stop_after(whole, -1)
    start, rows = weights(whole).clone(), whole.train(progress=False)
    assert all(math.isfinite(r["loss"]) for r in rows)
    assert all(r["old_distance"] > 0 and r["kl_pretrained"] > 0 for r in rows[1:])
    assert (weights(whole) != start).any() and (averaged(whole) != weights(whole)).any()
    cut = trainer(kind, tmp_path/"cut", lora, **own)
    stop_after(cut, count[0] - 2)
    cut.train(progress=False)
    assert cut.epochs_done == 1 and cut.work.done == 1
    again = trainer(kind, tmp_path/"cut", lora, **own, resume_from=str(tmp_path/"cut"))
    assert torch.equal(averaged(again), averaged(cut)) and (averaged(again) != weights(again)).any()
    again.train(progress=False)
    assert torch.equal(weights(again), weights(whole)) and torch.equal(averaged(again), averaged(whole))

def test_a_checkpoint_without_the_average_or_with_another_is_refused(tmp_path, monkeypatch):
    trainer(out=tmp_path, num_epochs=1).train(progress=False)
    from ddpo_nb import resume
    def changed(change):
        def load(stem):
            state = load_state(stem)
            if stem.name == "trainer": change(state["objective"])
            return state
        monkeypatch.setattr(resume, "load_state", load)
        with pytest.raises(InputError, match="^resume_from: ") as e:
            trainer(out=tmp_path, num_epochs=2, resume_from=str(tmp_path))
        assert "\n" not in str(e.value)
    changed(lambda o: o.clear())
    changed(lambda o: o.update(old=o["old"][:-1]))
    changed(lambda o: o.update(old=[v[:1] for v in o["old"]]))

def test_only_finished_latents_are_kept_and_they_are_those_of_a_rollout():
    t = trainer()
    found = t.sample()
    assert found.latents.shape == (4, 1, *t.policy.latent_shape) and found.log_probs.shape == (4, 0)
    t.objective.likelihoods = True
    t.prompt_function = PromptSource(["a cat", "a fox"], 0)
    whole = t.sample()
    assert whole.latents.shape[1] == 4 and whole.log_probs.shape == (4, 3)
    assert torch.equal(found.latents[:, 0], whole.latents[:, -1]) and torch.equal(found.images, whole.images)

@pytest.mark.parametrize("kind,settings", [
    ("sd", dict(sample_eta=0.0)), ("sd3-without-t5", dict(sample_sde="ode")),
    ("flux", dict(sample_sde="ode")),
    ("sd3-without-t5", dict(sample_sde="cps", sample_noise_level=0.5))
])
def test_any_sampler_will_do(kind, settings):
    t = trainer(kind, **settings)
    assert bool(t.policy.stochastic.any()) == (settings.get("sample_sde") == "cps")
    start = weights(t).clone()
    row = t.epoch()
    assert math.isfinite(row["loss"]) and (weights(t) != start).any()

def test_pictures_are_the_averaged_policy_s():
    t = trainer(nft_decay_rate=10.0, nft_decay_max=0.9)
    t.train(progress=False)
    t.prompt_function = PromptSource(["a cat", "a fox"], 0)
    theirs = t.sample().images
    with t.objective.sampling(t.policy): assert torch.equal(weights(t), averaged(t))
    t.objective.old = [p.detach().clone() for p in t.policy.trainable_parameters()]
    t.prompt_function = PromptSource(["a cat", "a fox"], 0)
    assert not torch.equal(theirs, t.sample().images)

def test_who_returns_to_the_best_weights_samples_with_them():
    t = trainer(nft_decay_rate=10.0, nft_decay_max=0.9)
    t.train(progress=False)
    t.best = dict(weights=[p.detach() + 1 for p in t.policy.trainable_parameters()])
    t._take_best()
    best = weights(t).clone()
    with t.objective.sampling(t.policy): assert torch.equal(weights(t), best)

@pytest.mark.parametrize("algorithm", ["nft", "ddpo-is"])
def test_an_adapter_s_frozen_weights_stay_frozen_where_the_pretrained_model_is_asked(algorithm):
    policy = tiny_policy("sd")
    for p in policy.trainable_parameters()[::2]: p.requires_grad_(False)
    c = config("sd", algorithm=algorithm, kl_coef=0.1)
    t = make_trainer(c, brightness, PromptSource(["a cat", "a fox"], 0), policy)
    few = len(policy.trainable_parameters())
    t.epoch()
    assert len(policy.trainable_parameters()) == few == len(t.optimizer.param_groups[0]["params"])

@pytest.mark.parametrize("lora", [True, False])
def test_half_precision_does_not_take_the_old_weights_for_the_new(lora):
    """Autocast keeps the weights that it has rounded, by the parameter they were; here one parameter has two
    values within one pass"""
    t = trainer(lora=lora, mixed_precision="bf16", train_learning_rate=1e-4)
    trajectories = t.sample()
    with torch.no_grad():
        for p in t.policy.trainable_parameters(): p.add_(0.05 * torch.randn(p.shape, generator=gen()))
    examples = t.objective.examples(t.policy, trajectories, torch.ones(4), gen())
    figures = t.gradient(trajectories, examples)
    gradient = torch.cat([p.grad.flatten() for p in t.policy.trainable_parameters()])
    assert figures["old_distance"] > 1e-4 and gradient.isfinite().all() and gradient.norm() > 0
    t.optimizer.zero_grad()
    with t.autocast(): one = t.objective.loss(t.policy, trajectories, examples)[1]
    with t.autocast(): two = t.objective.loss(t.policy, trajectories, examples)[1]
    assert torch.equal(one["old_distance"], two["old_distance"])

def test_noise_belongs_to_the_example():
    "Whatever the micro-batch; and no two examples have the same"
    t = trainer()
    trajectories = t.sample()
    examples = t.objective.examples(t.policy, trajectories, torch.linspace(0, 1, 4), gen())
    assert len(set(examples["seed"].tolist())) == len(examples["seed"]) == 12
    assert sorted(examples["step"][:3].tolist()) == [0, 1, 2]
    with torch.no_grad():
        whole = t.objective.loss(t.policy, trajectories, examples)[0]
        parts = [t.objective.loss(t.policy, trajectories, {k: v[i:i + 1] for k, v in examples.items()})[0]
                 for i in range(12)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)

def test_distance_from_the_pretrained_model_has_a_gradient_and_a_price():
    t = trainer(kl_coef=0.5, sample_guidance_scale=1.0)
    trajectories = t.sample()
    with torch.no_grad():
        for p in t.policy.trainable_parameters(): p.add_(0.05)
    examples = t.objective.examples(t.policy, trajectories, torch.full((4,), 0.5), gen())
    def by_all(y):
        return flat([g.flatten() for g in torch.autograd.grad(y, t.policy.trainable_parameters())])
    def gradient(kl):
        t.objective.kl_coef = kl
        loss, figures = t.objective.loss(t.policy, trajectories, examples)
        return by_all(loss.sum()), figures
    (free, _), (priced, figures) = gradient(0.0), gradient(0.5)
    x, i = trajectories.clean(examples["sample"]), examples["sample"]
    noise = torch.stack([torch.randn(x.shape[1:], generator=gen(s)) for s in examples["seed"].tolist()])
    time = trajectories.timesteps[examples["step"]]
    noisy, cond = t.policy.process.noised(x, noise, time), trajectories.conditioning[i]
    with t.policy.reference(), torch.no_grad(): base = t.policy.predict(noisy, time, cond, False)
    by_hand = (t.policy.predict(noisy, time, cond, False) - base).square().flatten(1).mean(1)
    torch.testing.assert_close(figures["kl_pretrained"], by_hand.detach())
    torch.testing.assert_close(priced - free, by_all(0.5 * by_hand.sum()), rtol=1e-3, atol=1e-5)

def test_training_is_without_guidance_and_sampling_with_it():
    "`guidance` off: the loss sees the plain conditional model; on: the guided one, for all three predictions"
    for cfg in (False, True):
        t, rows = trainer(train_cfg=cfg, kl_coef=0.1), []
        t.policy.trained.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
        trajectories = t.sample()
        sampled, rows[:] = list(rows), []
        examples = t.objective.examples(t.policy, trajectories, torch.full((4,), 0.5), gen())
        whole = {k: v.repeat(3) for k, v in examples.items()}  # above the sixteen rows of the smallest pass
        t.objective.loss(t.policy, trajectories, whole)
        assert rows == [36 * (2 if cfg else 1)] * 3

@pytest.mark.parametrize("kind", ["sdxl", "sd3-without-t5"])
def test_a_text_is_embedded_alike_whatever_comes_with_it(kind):
    "Or a run that is taken up, which meets its prompts in other company, would end in other bits"
    flat = lambda o: o if isinstance(o, dict) else dict(text=o)
    found = [flat(tiny_policy(kind).encode(o)[[0]].prompt) for o in (
        ["a cat"], ["a cat", "a fox"], ["a cat"] + [f"a dog {i}" for i in range(9)])]
    assert all(torch.equal(o[k], found[0][k]) for o in found for k in o)
    policy = tiny_policy(kind)
    policy.encode(["a fox"])
    assert all(torch.equal(v, found[0][k]) for k, v in flat(policy.encode(["a cat"]).prompt).items())

# ---- what is refused ----

@pytest.mark.parametrize("settings,message", [
    (dict(train_clip_range=0.1), "train_clip_range: nft does nothing with it"),
    (dict(step_weighting="variance"), "step_weighting: nft does nothing"),
    (dict(rwr_beta=0.5), "rwr_beta: nft does nothing"),
    (dict(log_prob_reduction="sum"), "log_prob_reduction: nft does nothing"),
    (dict(nft_space="velocity"), "nft_space: there is no 'velocity'; choose from clean, output"),
    (dict(nft_beta=0.0), "nft_beta: 0.0 is not positive"),
    (dict(nft_decay_max=1.0), "nft_decay_max: 1.0 is not in"),
    (dict(nft_decay_rate=-1.0), "nft_decay_rate: -1.0 is out of range"),
    (dict(nft_decay_max=0.0, nft_decay_rate=0.1), "nft_decay_rate: nft_decay_max is 0"),
    (dict(nft_decay_max=0.0, nft_decay_delay=5), "nft_decay_delay: nft_decay_max is 0"),
    (dict(nft_decay_rate=0.0, nft_decay_max=0.9), "nft_decay_max: nft_decay_rate is 0"),
    (dict(nft_decay_rate=0.0, nft_decay_delay=5), "nft_decay_delay: nft_decay_rate is 0"),
    (dict(nft_decay_rate=0.0, nft_decay_max=0.0, nft_decay_delay=5), "nft_decay_delay: nft_decay_max is 0"),
    (dict(nft_beta="much"), "nft_beta: 'much' is not of type float"),
    (dict(nft_adaptive="maybe"), "nft_adaptive: 'maybe' is not of type bool"),
    (dict(algorithm="ddpo-is", nft_beta=0.5), "nft_beta: ddpo-is does nothing"),
    (dict(algorithm="rwr", log_prob_reduction="sum"), "log_prob_reduction: rwr does nothing"),
])
def test_what_has_no_effect_or_cannot_work_is_refused_in_one_line(settings, message):
    from ddpo_nb.config import DDPOConfig
    with pytest.raises(InputError, match=f"^{message}") as e: DDPOConfig(**dict(algorithm="nft") | settings)
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("line,names", [
    ("--train-clip-range 0.1", "--train-clip-range"), ("--nft-beta 0", "--nft-beta"),
    ("--nft-decay-max 1", "--nft-decay-max"), ("--log-prob-reduction sum", "--log-prob-reduction"),
])
def test_the_command_line_refuses_it_too(line, names, capsys):
    assert main(["train", "--algorithm", "nft", *line.split()]) == 2
    err = capsys.readouterr().err
    assert names in err and err.count("\n") == 1

def test_a_family_of_one_pass_keeps_its_guidance(tmp_path):
    "FLUX is told a number; there is no pass to leave out, and the usual settings do not ask for it"
    tiny_pipeline("flux").save_pretrained(tmp_path/"flux")
    tiny_pipeline("sd3-without-t5").save_pretrained(tmp_path/"sd3")
    assert make_config("nft", tmp_path/"flux").train_cfg and not make_config("nft", tmp_path/"sd3").train_cfg

# ---- what it costs ----

def test_the_plan_counts_one_latent_a_sample_and_a_copy_of_the_weights(monkeypatch):
    from ddpo_nb import recipes
    from ddpo_nb.recipes import model_numbers, plan
    numbers = model_numbers()
    own = dict(mixed_precision="no", micro_batch_size=8, sample_num_steps=10, train_timestep_fraction=1.0)
    nft, ddpo = (plan(make_config(a, **own), numbers) for a in ("nft", "ddpo-is"))
    latent = 4 * math.prod(numbers.latent)
    n = nft.samples_per_epoch
    assert n == ddpo.samples_per_epoch
    assert ddpo.memory.trajectories - nft.memory.trajectories == n * (10 * latent + 4 * 10)
    assert nft.memory.old == nft.memory.trainable and ddpo.memory.old == 0
    assert nft.beside_rows == nft.training_rows and ddpo.beside_rows == 0
    assert "weights that sample" in str(nft) and "training (forward only)" in str(nft)
    assert "weights that sample" not in str(ddpo) and "training (forward only)" not in str(ddpo)
    monkeypatch.setattr(recipes, "estimate_memory", lambda *a: None)
    priced = plan(make_config("nft", kl_coef=0.1, **own), numbers)
    assert priced.beside_rows == 2 * priced.training_rows
    assert plan(make_config("ddpo-is", kl_coef=0.1, **own), numbers).beside_rows == ddpo.training_rows
