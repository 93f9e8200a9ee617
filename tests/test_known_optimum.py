"""The proof that the estimators are right: on a diffusion whose exact policy gradient is known in closed
form, DDPO's Monte-Carlo gradients are unbiased and converge at rate 1/√N, through the package's own objective
classes; RWR's direction stays elsewhere."""
import math

import pytest
import torch

from ddpo_nb.ddpo import DDPO, DDPOSF
from ddpo_nb.mdp import step_std
from ddpo_nb.rwr import RWR, RWRSparse, TinyDiffusion, x0_moments

T = 5
goal, care = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([2.0, 0.25], dtype=torch.float64)
estimators = pytest.mark.parametrize(
    "objective",
    [DDPOSF(adv_clip_max=math.inf), DDPO(adv_clip_max=math.inf, clip_range=math.inf)],
    ids=["sf", "is"],
)

def gen(seed=0): return torch.Generator().manual_seed(seed)
def reward(x): return -(care * (x - goal)**2).sum(-1)
def flat_grad(y, policy): return torch.cat(torch.autograd.grad(y, policy.trainable_parameters()))

def expected_reward(policies):
    "E[r(x_0)] when the k-th policy takes the k-th step: a quadratic's mean under a Gaussian."
    mean, var = x0_moments(policies)
    return reward(mean) - (care * var).sum()

def make(mean=0.0, std=0.7): return TinyDiffusion([mean, mean], [std, std], num_steps=T)

@pytest.fixture(scope="module")
def policy(): return make()
@pytest.fixture(scope="module")
def exact(policy): return flat_grad(expected_reward([policy] * T), policy)

def estimate(policy, objective, n, g, sampler=None):
    "∇J from n trajectories: the loss is a mean over the n·T transitions, hence the factor -T."
    sampler = sampler or policy
    batch = sampler.sample(n, g)
    A = reward(batch.latents[:, -1]) - expected_reward([sampler] * T).detach()
    loss, _ = objective.loss(policy, batch, objective.examples(policy, batch, A, g))
    return -T * flat_grad(loss.mean(), policy)

def rwr_direction(policy, objective, n, g):
    "Minus RWR's gradient."
    batch = policy.sample(n, g); r = reward(batch.latents[:, -1])
    weights = objective.weights((r - r.mean()) / r.std())
    loss, _ = objective.loss(policy, batch, objective.examples(policy, batch, weights, g))
    return -flat_grad(loss.mean(), policy)

def z_scores(estimates, target):
    "How many standard errors the mean of independent estimates (K, D) is away from the target (D,)."
    return (estimates.mean(0) - target) / (estimates.std(0) / len(estimates)**0.5)

def sine(a, b):
    "Of the angle between two vectors: the relative error that the best rescaling leaves."
    return (1 - torch.cosine_similarity(a, b, 0)**2).clamp(min=0).sqrt().item()

def test_the_exact_gradient_agrees_with_backpropagation_through_the_sampler(policy, exact):
    g, out = gen(), []
    for _ in range(20):
        x = torch.randn(5_000, 2, generator=g, dtype=torch.float64)
        for t in policy.timesteps: x = policy.step(x, t.expand(len(x)), generator=g).prev_sample
        out.append(flat_grad(reward(x).mean(), policy))
    assert z_scores(torch.stack(out), exact).abs().max() < 4

@estimators
def test_ddpo_gradient_is_unbiased(policy, exact, objective):
    g = gen(1)
    estimates = torch.stack([estimate(policy, objective, 4_000, g) for _ in range(40)])
    assert z_scores(estimates, exact).abs().max() < 4
    # and the errors are small enough to mean something
    assert ((estimates.mean(0) - exact).norm() / exact.norm()) < 0.1

@estimators
def test_ddpo_error_shrinks_as_one_over_root_n(policy, exact, objective):
    def rms(n, k=40):
        g = gen(2)
        return (
            torch.stack([(estimate(policy, objective, n, g) - exact).norm() ** 2 for _ in range(k)])
            .mean()
            .sqrt()
            .item()
        )
    # 16 times the samples: 4 times less, within the noise of 40 repeats
    assert 3 < rms(200) / rms(3_200) < 5.3

@pytest.mark.parametrize("weighting,power", [("variance", 2), ("ratio-norm", 1)])
@pytest.mark.parametrize("cls", [DDPOSF, DDPO])
def test_weighing_steps_weighs_the_exact_gradient_through_each(policy, cls, weighting, power):
    """E[r] with only step t by the policy is E[r] as a function of that step's weights: its gradient,
    times a power of σ_t, summed over t."""
    fixed, g = make(), gen(8)
    weights = step_std(policy.scheduler, policy.timesteps, 1.0)**power
    target = flat_grad(
        sum(
            w * expected_reward([policy if k == t else fixed for k in range(T)])
            for t, w in enumerate(weights)
        ),
        policy,
    )
    objective = cls(adv_clip_max=math.inf, clip_range=math.inf, step_weighting=weighting)
    estimates = torch.stack([estimate(policy, objective, 4_000, g) for _ in range(40)])
    assert z_scores(estimates, target).abs().max() < 4
    # another direction, not only another length
    assert sine(target, flat_grad(expected_reward([policy] * T), policy)) > 0.05

def test_both_estimators_are_one_at_ratio_one(policy):
    sf, is_ = (
        estimate(policy, o, 500, gen(3))
        for o in (DDPOSF(adv_clip_max=math.inf), DDPO(adv_clip_max=math.inf, clip_range=math.inf))
    )
    torch.testing.assert_close(sf, is_, rtol=1e-9, atol=1e-9)

def surrogate_gradient(policy, old):
    """Exact gradient of Σ_t E[r | step t by `policy`, all others by `old`], which DDPO-IS estimates from
    samples of `old`."""
    return flat_grad(
        sum(expected_reward([policy if k == t else old for k in range(T)]) for t in range(T)), policy
    )

def test_importance_sampling_from_an_older_policy_is_unbiased_for_the_surrogate(policy):
    old, g, objective = make(-0.05, 0.72), gen(4), DDPO(adv_clip_max=math.inf, clip_range=math.inf)
    estimates = torch.stack([estimate(policy, objective, 4_000, g, sampler=old) for _ in range(40)])
    assert z_scores(estimates, surrogate_gradient(policy, old)).abs().max() < 4

def test_score_function_from_an_older_policy_is_not(policy):
    "Without the ratio the samples' age goes uncorrected: one update a batch is not a mere convention."
    old, g = make(-0.05, 0.72), gen(4)
    estimates = torch.stack(
        [estimate(policy, DDPOSF(adv_clip_max=math.inf), 4_000, g, sampler=old) for _ in range(40)]
    )
    assert z_scores(estimates, surrogate_gradient(policy, old)).abs().max() > 8

def test_the_surrogate_departs_from_the_truth_in_proportion_to_the_drift(policy, exact):
    gaps = [
        (surrogate_gradient(policy, make(-d, 0.7 * math.exp(d / 2))) - exact).norm().item()
        for d in (0, 1e-3, 2e-3, 4e-3)
    ]
    assert gaps[0] < 1e-9
    assert gaps[2] / gaps[1] == pytest.approx(2, rel=0.05) and gaps[3] / gaps[2] == pytest.approx(2, rel=0.05)

@pytest.mark.parametrize(
    "objective", [RWR(), RWR(beta=1.0), RWR(beta=5.0), RWRSparse()],
    ids=["rwr", "rwr-beta-1", "rwr-beta-5", "rwr-sparse"]
)
def test_rwr_does_not_point_along_the_gradient_and_more_samples_do_not_help(policy, exact, objective):
    g = gen(5)
    directions = torch.stack([rwr_direction(policy, objective, 4_000, g) for _ in range(32)])
    # what no rescaling removes
    across = directions - (directions @ exact)[:, None] * exact / (exact @ exact)
    assert z_scores(across, torch.zeros(4)).abs().max() > 10
    few, many = (sine(rwr_direction(policy, objective, n, gen(6)), exact) for n in (10_000, 160_000))
    assert few > 0.3 and many > 0.8 * few

@estimators
def test_ddpo_does_point_along_the_gradient(policy, exact, objective):
    assert sine(estimate(policy, objective, 160_000, gen(6)), exact) < 0.08

@pytest.mark.parametrize("objective,inner", [(DDPOSF(), 1), (DDPO(clip_range=0.2), 2)], ids=["sf", "is"])
def test_ddpo_walks_to_the_known_optimum(objective, inner):
    policy, g = make(), gen(7)
    with torch.no_grad(): best = -(care * x0_moments([make(0.0, 1e-6)] * T)[1]).sum().item()
    start = expected_reward([policy] * T).item()
    opt = torch.optim.Adam(policy.trainable_parameters(), lr=0.03)
    for _ in range(150):
        batch = policy.sample(128, g); r = reward(batch.latents[:, -1])
        examples = objective.examples(policy, batch, (r - r.mean()) / r.std(), g)
        for _ in range(inner):
            opt.zero_grad(); objective.loss(policy, batch, examples)[0].mean().backward(); opt.step()
    assert start < -1.5 and best - 0.05 < expected_reward([policy] * T).item() < best
