"Reward-weighted regression: its weights, its examples and loss, and how it differs from a policy gradient."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ddpo_nb.prompts import InputError
from ddpo_nb.rollout import rollout, sample_generator
from ddpo_nb.rwr import (NORMALIZERS, REWARDS, RWR, RWRSparse, TinyDiffusion, rwr_sparse_weights, rwr_weights,
                         x0_moments)

rewards = st.lists(st.floats(-5, 5), min_size=1, max_size=40).map(
    lambda o: torch.tensor(o, dtype=torch.float64)
)
betas = st.floats(0.05, 100)
few = settings(max_examples=50, deadline=None)

def gen(seed=0): return torch.Generator().manual_seed(seed)

@few
@given(rewards, betas, st.data())
def test_weights_are_positive_with_mean_one_for_every_prompt(r, beta, data):
    prompts = data.draw(st.lists(st.sampled_from("abc"), min_size=len(r), max_size=len(r)))
    whole, own = rwr_weights(r, beta), rwr_weights(r, beta, prompts)
    for w in (whole, own):
        assert w.shape == r.shape and (w >= 0).all() and w.mean().item() == pytest.approx(1, rel=1e-9)
    for p in set(prompts):
        i = [k for k, o in enumerate(prompts) if o == p]
        torch.testing.assert_close(own[i], rwr_weights(r[i], beta))

@few
@given(rewards, betas, st.floats(-100, 100))
def test_weights_do_not_see_a_shift_of_the_rewards(r, beta, shift):
    torch.testing.assert_close(rwr_weights(r + shift, beta), rwr_weights(r, beta), rtol=1e-7, atol=1e-9)

def test_weights_per_prompt_do_not_see_how_easy_a_prompt_is():
    r, prompts, easier = (
        torch.tensor([1.0, 2.0, 0.5, 0.9]), ["a", "a", "b", "b"], torch.tensor([10.0, 10.0, 0.0, 0.0])
    )
    torch.testing.assert_close(rwr_weights(r + easier, 1.0, prompts), rwr_weights(r, 1.0, prompts))
    assert rwr_weights(r + easier, 1.0)[2:].sum() < 0.01   # over the batch, the easy prompt takes it all

@few
@given(rewards, betas, st.floats(0.1, 10))
def test_weights_depend_on_beta_times_reward_only(r, beta, scale):
    torch.testing.assert_close(
        rwr_weights(r * scale, beta / scale), rwr_weights(r, beta), rtol=1e-7, atol=1e-9
    )

@few
@given(rewards)
def test_weights_become_uniform_as_beta_vanishes(r):
    torch.testing.assert_close(rwr_weights(r, 1e-9), torch.ones_like(r), rtol=1e-6, atol=0)

@few
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=40, unique=True))
def test_weights_become_the_argmax_as_beta_grows(r):
    r = torch.tensor(r, dtype=torch.float64)
    want = torch.zeros_like(r); want[r.argmax()] = len(r)
    torch.testing.assert_close(rwr_weights(r, 1e3), want)

def test_weights_are_the_papers():
    "exp(β·r)/Z with β = 0.2 an inverse temperature: a point of reward more is a factor of e^0.2, not of e^5."
    r = torch.tensor([5.0, 6.0, 4.0], dtype=torch.float64)
    w = rwr_weights(r)
    assert (w[1] / w[0]).item() == pytest.approx(math.exp(0.2)) and RWR().beta == 0.2
    torch.testing.assert_close(w, 3 * torch.exp(0.2 * r) / torch.exp(0.2 * r).sum())

@few
@given(rewards, st.floats(0.01, 1), st.data())
def test_sparse_weights_keep_the_best_share(r, fraction, data):
    w = rwr_sparse_weights(r, fraction)
    k = max(1, round(len(r) * fraction))
    assert (w > 0).sum() == k and w.unique().numel() <= 2
    assert w.mean().item() == pytest.approx(1)
    assert k == len(r) or r[w > 0].min() >= r[w == 0].max()
    prompts = data.draw(st.lists(st.sampled_from("abc"), min_size=len(r), max_size=len(r)))
    own = rwr_sparse_weights(r, fraction, prompts)
    assert own.mean().item() == pytest.approx(1) and own.unique().numel() <= 2
    for p in set(prompts):
        i = [k for k, o in enumerate(prompts) if o == p]
        assert torch.equal(own[i] > 0, rwr_sparse_weights(r[i], fraction) > 0)

def test_of_equal_rewards_the_first_are_kept():
    assert rwr_sparse_weights(torch.zeros(40), 0.1).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert rwr_sparse_weights(torch.zeros(6), 0.5, list("abcabc")).nonzero().flatten().tolist() == [0, 1, 2]

def test_a_prompt_with_few_samples_keeps_one():
    kept = rwr_sparse_weights(torch.arange(23.0), 0.1, ["often"] * 20 + ["twice"] * 2 + ["once"])
    assert kept.nonzero().flatten().tolist() == [18, 19, 21, 22]

@pytest.mark.parametrize("weigh", [rwr_weights, rwr_sparse_weights])
def test_prompts_must_name_the_samples(weigh):
    with pytest.raises(InputError, match="prompts: 2 prompts do not name 3 samples"):
        weigh(torch.zeros(3), 0.5, ["a", "b"])

@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("rewards", REWARDS)
def test_the_objective_weighs_what_it_is_told_to(normalizer, rewards):
    prompts, r, A = list("aabbb"), np.array([1.0, 2, 3, 4, 5]), np.array([-1.0, 1, -1, 0, 1])
    names = prompts if normalizer == "prompt" else None
    x = torch.tensor(r if rewards == "raw" else A)
    got = RWR(beta=0.7, normalizer=normalizer, rewards=rewards).weigh(prompts, r, A)
    torch.testing.assert_close(got, rwr_weights(x, 0.7, names))
    got = RWRSparse(fraction=0.4, normalizer=normalizer, rewards=rewards).weigh(prompts, r, A)
    torch.testing.assert_close(got, rwr_sparse_weights(x, 0.4, names))

def test_prompts_that_all_come_once_are_not_compared_in_silence():
    with pytest.warns(
        UserWarning,
        match="rwr_normalizer: each of 3 samples is the only one of its prompt, .* set samples_per_prompt",
    ):
        assert (RWR().weigh(list("abc"), [1.0, 2, 3], None) == 1).all()
    RWR().weigh(list("aab"), [1.0, 2, 3], None), RWR(normalizer="batch").weigh(list("abc"), [1.0, 2, 3], None)

def test_unknown_ways_of_weighing_are_named():
    with pytest.raises(InputError, match="normalizer: there is no 'sample'; choose from prompt, batch"):
        RWR(normalizer="sample")
    with pytest.raises(InputError, match="rewards: there is no 'clipped'; choose from raw, normalized"):
        RWRSparse(rewards="clipped")

@pytest.mark.parametrize(
    "make",
    [lambda: RWR(beta=200.0, normalizer="batch"), lambda: RWRSparse(normalizer="batch")],
    ids=["rwr", "sparse"],
)
def test_several_processes_share_one_weighted_mean(tiny, make):
    """Each takes the mean over its own examples, and their mean is that of one process; none is left
    without examples."""
    policy, batch = tiny
    objective, r = make(), np.arange(40.0)   # the best are all in the last process
    one = objective.weigh(["a"] * 40, r, r)
    many = objective.weigh(["a"] * 40, r, r, processes=4)
    assert (many - one).abs().max() < 1e-20
    def mean(weights, places):
        ex = objective.examples(
            policy, replace(batch, latents=batch.latents[places]), weights[places].float(), gen()
        )
        return (
            len(ex["sample"]), ex["weight"].mean(),
            (ex["weight"] * torch.tensor(r)[places][ex["sample"]]).mean()
        )
    shares = [mean(many, np.arange(10 * k, 10 * k + 10)) for k in range(4)]
    assert len({m for m, *_ in shares}) == 1
    (_, weight, value), n = mean(one, np.arange(40)), len(shares)
    assert sum(w for _, w, _ in shares) / n == pytest.approx(1, rel=1e-5) and weight == pytest.approx(
        1, rel=1e-5
    )
    assert sum(v for *_, v in shares) / n == pytest.approx(value.item(), rel=1e-5)

@pytest.mark.parametrize("beta", [0, -0.2, float("nan")])
def test_beta_must_be_positive(beta):
    for make in (
        lambda: RWR(beta=beta), lambda: rwr_weights(torch.zeros(3), beta), lambda: RWRSparse(beta=beta)
    ):
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

@pytest.mark.parametrize(
    "objective,m",
    [(RWR(), 40), (RWR(draws=3), 120), (RWRSparse(), 4), (RWRSparse(fraction=0.25, draws=2), 20)],
)
def test_examples_are_flat_with_mean_weight_one(tiny, objective, m):
    policy, batch = tiny
    ex = objective.examples(policy, batch, objective.weights(torch.randn(40, generator=gen(1))), gen(2))
    assert {k: len(v) for k, v in ex.items()} == dict(sample=m, weight=m, timestep=m, noise=m)
    assert ex["noise"].shape[1:] == batch.latents.shape[2:]
    assert ex["weight"].mean().item() == pytest.approx(1, rel=1e-5)
    assert 0 <= ex["timestep"].min() and ex["timestep"].max() < policy.most_steps

def test_examples_come_from_the_generator_alone(tiny):
    policy, batch = tiny
    one, two, other = (RWR().examples(policy, batch, torch.ones(40), gen(s)) for s in (5, 5, 6))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["noise"], other["noise"])

def test_sparse_examples_hold_only_the_best_samples(tiny):
    policy, batch = tiny
    objective = RWRSparse(fraction=0.1)
    ex = objective.examples(policy, batch, objective.weights(torch.arange(40.)), gen())
    assert sorted(ex["sample"].tolist()) == [36, 37, 38, 39]

def test_loss_is_the_weighted_denoising_error_spelled_out(tiny):
    policy, batch = tiny
    A = torch.randn(40, generator=gen(1)).double()
    ex = RWR(beta=0.5).examples(policy, batch, RWR(beta=0.5).weights(A), gen(2))
    loss, figures = RWR(beta=0.5).loss(policy, batch, ex)
    abar = policy.scheduler.alphas_cumprod[ex["timestep"]][:, None]
    x_t = abar.sqrt() * batch.latents[:, -1] + (1 - abar).sqrt() * ex["noise"]
    error = (policy.predict(x_t, ex["timestep"]) - ex["noise"]).pow(2).mean(1)
    torch.testing.assert_close(loss, torch.softmax(A * 0.5, 0) * 40 * error)
    torch.testing.assert_close(figures["denoising_loss"], error.detach())
    assert not figures["denoising_loss"].requires_grad and loss.requires_grad

def test_the_loss_sees_only_the_finished_samples(tiny):
    policy, batch = tiny
    ex = RWR().examples(policy, batch, torch.ones(40), gen(2))
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
        got = torch.stack(
            [torch.autograd.grad(o, getattr(policy, which), retain_graph=True)[0][0] for o in out]
        )
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-6)

def test_rwr_moves_the_model_even_when_every_reward_is_equal():
    """The denoising loss is not the likelihood: with nothing to learn it still narrows a model whose
    sampler is coarse."""
    policy = TinyDiffusion([0.], [0.7])
    pulls = []
    for seed in range(16):
        g = gen(seed); batch = policy.sample(2_000, g)
        ex = RWR().examples(policy, batch, torch.ones(2_000), g)
        pulls.append(torch.autograd.grad(RWR().loss(policy, batch, ex)[0].mean(), policy.log_std)[0])
    pulls = torch.cat(pulls)
    assert pulls.mean() > 10 * pulls.std() / 4
