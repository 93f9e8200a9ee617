"Reward-weighted regression: its weights, its examples and loss, and how it differs from a policy gradient."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ddpo_nb.prompts import InputError
from ddpo_nb.rollout import rollout, sample_generator
from ddpo_nb.rwr import RWR, RWRSparse, TinyDiffusion, rwr_sparse_weights, rwr_weights, x0_moments

rewards = st.lists(st.floats(-5, 5), min_size=1, max_size=40).map(lambda o: torch.tensor(o, dtype=torch.float64))
betas = st.floats(0.05, 100)
few = settings(max_examples=50, deadline=None)

def gen(seed=0): return torch.Generator().manual_seed(seed)

@few
@given(rewards, betas)
def test_weights_are_positive_with_mean_one(r, beta):
    w = rwr_weights(r, beta)
    assert w.shape == r.shape and (w >= 0).all()
    assert w.mean().item() == pytest.approx(1, rel=1e-9)

@few
@given(rewards, betas, st.floats(-100, 100))
def test_weights_do_not_see_a_shift_of_the_rewards(r, beta, shift):
    torch.testing.assert_close(rwr_weights(r + shift, beta), rwr_weights(r, beta), rtol=1e-8, atol=1e-10)

@few
@given(rewards, betas, st.floats(0.1, 10))
def test_weights_depend_on_reward_over_beta_only(r, beta, scale):
    torch.testing.assert_close(rwr_weights(r * scale, beta * scale), rwr_weights(r, beta), rtol=1e-8, atol=1e-10)

@few
@given(rewards)
def test_weights_become_uniform_as_beta_grows(r):
    torch.testing.assert_close(rwr_weights(r, 1e9), torch.ones_like(r), rtol=1e-6, atol=0)

@few
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=40, unique=True))
def test_weights_become_the_argmax_as_beta_vanishes(r):
    r = torch.tensor(r, dtype=torch.float64)
    want = torch.zeros_like(r); want[r.argmax()] = len(r)
    torch.testing.assert_close(rwr_weights(r, 1e-3), want)

def test_weights_follow_the_formula():
    r, beta = torch.tensor([0.3, -1.2, 0.7]), 0.2
    w = rwr_weights(r, beta)
    assert (w[2] / w[0]).log().item() == pytest.approx((0.7 - 0.3) / 0.2, rel=1e-5)

@few
@given(rewards, st.floats(0.01, 1))
def test_sparse_weights_keep_the_best_share(r, fraction):
    w = rwr_sparse_weights(r, fraction)
    k = max(1, round(len(r) * fraction))
    assert (w > 0).sum() == k and w.unique().numel() <= 2
    assert w.mean().item() == pytest.approx(1)
    assert k == len(r) or r[w > 0].min() >= r[w == 0].max()

@pytest.mark.parametrize("beta", [0, -0.2, float("nan")])
def test_beta_must_be_positive(beta):
    for make in (lambda: RWR(beta=beta), lambda: rwr_weights(torch.zeros(3), beta), lambda: RWRSparse(beta=beta)):
        with pytest.raises(InputError, match="beta: .* is not positive; give"): make()

@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_fraction_must_be_a_share(fraction):
    for make in (lambda: RWRSparse(fraction=fraction), lambda: rwr_sparse_weights(torch.zeros(3), fraction)):
        with pytest.raises(InputError, match=r"fraction: .* is not in \(0, 1\]; give"): make()

def test_draws_must_be_positive():
    with pytest.raises(InputError, match="draws"): RWR(draws=0)

@pytest.fixture(scope="module")
def tiny():
    policy = TinyDiffusion([0.2, -0.3], [0.7, 0.5])
    return policy, policy.sample(40, gen())

@pytest.mark.parametrize("objective,m", [(RWR(), 40), (RWR(draws=3), 120), (RWRSparse(), 4), (RWRSparse(fraction=0.25, draws=2), 20)])
def test_examples_are_flat_with_mean_weight_one(tiny, objective, m):
    policy, batch = tiny
    ex = objective.examples(policy, batch, torch.randn(40, generator=gen(1)), gen(2))
    assert {k: len(v) for k, v in ex.items()} == dict(sample=m, weight=m, timestep=m, noise=m)
    assert ex["noise"].shape[1:] == batch.latents.shape[2:]
    assert ex["weight"].mean().item() == pytest.approx(1, rel=1e-5)
    assert 0 <= ex["timestep"].min() and ex["timestep"].max() < policy.num_train_timesteps

def test_examples_come_from_the_generator_alone(tiny):
    policy, batch = tiny
    A = torch.randn(40, generator=gen(1))
    one, two, other = (RWR().examples(policy, batch, A, gen(s)) for s in (5, 5, 6))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["noise"], other["noise"])

def test_sparse_examples_hold_only_the_best_samples(tiny):
    policy, batch = tiny
    ex = RWRSparse(fraction=0.1).examples(policy, batch, torch.arange(40.), gen())
    assert sorted(ex["sample"].tolist()) == [36, 37, 38, 39]

def test_loss_is_the_weighted_denoising_error_spelled_out(tiny):
    policy, batch = tiny
    A = torch.randn(40, generator=gen(1)).double()
    ex = RWR(beta=0.5).examples(policy, batch, A, gen(2))
    loss, figures = RWR(beta=0.5).loss(policy, batch, ex)
    abar = policy.scheduler.alphas_cumprod[ex["timestep"]][:, None]
    x_t = abar.sqrt() * batch.latents[:, -1] + (1 - abar).sqrt() * ex["noise"]
    error = (policy.predict(x_t, ex["timestep"]) - ex["noise"]).pow(2).mean(1)
    torch.testing.assert_close(loss, torch.softmax(A / 0.5, 0) * 40 * error)
    torch.testing.assert_close(figures["denoising_loss"], error.detach())
    assert not figures["denoising_loss"].requires_grad and loss.requires_grad

def test_the_loss_sees_only_the_finished_samples(tiny):
    policy, batch = tiny
    ex = RWR().examples(policy, batch, torch.zeros(40), gen(2))
    before = RWR().loss(policy, batch, ex)[0]
    other = policy.sample(40, gen(9))
    other.latents[:, -1] = batch.latents[:, -1]
    torch.testing.assert_close(RWR().loss(policy, other, ex)[0], before)

def test_tiny_diffusion_runs_through_rollout_and_matches_its_closed_form():
    policy = TinyDiffusion([0.4, -1.], [0.7, 0.3], num_steps=7)
    batch = rollout(policy, [""] * 6, [sample_generator(0, 0, i) for i in range(6)], batch_size=4)
    assert batch.latents.shape == (6, 8, 2) and batch.log_probs.shape == (6, 7) and batch.stochastic.all()
    n = 100_000
    x0 = policy.sample(n, gen()).latents[:, -1]
    mean, var = (v.detach() for v in x0_moments([policy] * 7))
    assert ((x0.mean(0) - mean).abs() < 4 * (var / n).sqrt()).all()
    assert ((x0.var(0) - var).abs() < 4 * var * (2 / n) ** 0.5).all()

def test_closed_form_gradient_agrees_with_finite_differences():
    def moments(m, s): return torch.cat(x0_moments([TinyDiffusion([m], [s])] * 5))
    policy = TinyDiffusion([0.3], [0.6])
    out = torch.cat(x0_moments([policy] * 5))
    for which in ("mean", "log_std"):
        up, down = ((0.3 + h, 0.6) if which == "mean" else (0.3, 0.6 * math.exp(h)) for h in (1e-5, -1e-5))
        want = (moments(*up) - moments(*down)) / 2e-5
        got = torch.stack([torch.autograd.grad(o, getattr(policy, which), retain_graph=True)[0][0] for o in out])
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-6)

def test_rwr_moves_the_model_even_when_every_reward_is_equal():
    "The denoising loss is not the likelihood: with nothing to learn it still narrows a model whose sampler is coarse."
    policy = TinyDiffusion([0.], [0.7])
    pulls = []
    for seed in range(16):
        g = gen(seed); batch = policy.sample(2_000, g)
        ex = RWR().examples(policy, batch, torch.zeros(2_000), g)
        pulls.append(torch.autograd.grad(RWR().loss(policy, batch, ex)[0].mean(), policy.log_std)[0])
    pulls = torch.cat(pulls)
    assert pulls.mean() > 10 * pulls.std() / 4
