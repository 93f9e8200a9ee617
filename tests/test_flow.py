"Flow matching as a policy: published formulas, exact marginals, and the traps that live in a step."
import copy
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from hypothesis import given, settings, strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from ddpo_nb.ddpo import DDPO, DDPOSF
from ddpo_nb.flow import KINDS, FlowProcess, flow_step, noise_exchange, window_at
from ddpo_nb.likelihood import gaussian_kl, gaussian_log_prob
from ddpo_nb.mdp import Trajectories

quick = settings(max_examples=60, deadline=None)
noisy, double = KINDS[:3], torch.float64
usual = {"flow-sde": 0.7, "dance-sde": 0.3, "cps": 0.8, "ode": 0.}
each_kind, each_noisy = pytest.mark.parametrize("kind", KINDS), pytest.mark.parametrize("kind", noisy)
half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])

def rng(seed=0): return torch.Generator().manual_seed(seed)

def data(seed=0, shape=(3, 4, 4, 4), dtype=torch.float32):
    "x and the network's velocity"
    x, v = torch.randn(2, *shape, generator=rng(seed))
    return x.to(dtype), v.to(dtype)

def make(**kw):
    "SD3's scheduler; `kw` replaces parts of its configuration"
    return FlowMatchEulerDiscreteScheduler(**dict(shift=3.) | kw)

def process(kind="flow-sde", num_steps=10, scheduler=None, **kw):
    kw.setdefault("noise_level", usual[kind])
    return FlowProcess(scheduler or make(), kind, num_steps=num_steps, **kw)

# --- the formulas, written out as FLOW.md has them, in doubles ---

def by_the_book(kind, v, s, s_next, x, a, s_max):
    dt, x0, x1 = s_next - s, x - s * v, x + (1 - s) * v
    if kind == "ode": return x + v * dt, 0.
    if kind == "flow-sde":
        strength = a * math.sqrt(s / (1 - (s_max if s == 1 else s)))
        mean = x * (1 + strength**2 * dt / (2 * s)) + v * (1 + strength**2 * (1 - s) / (2 * s)) * dt
        return mean, strength * math.sqrt(-dt)
    if kind == "dance-sde":
        score = -(x - (1 - s) * x0) / s**2
        return x + (v - 0.5 * a**2 * score) * dt, a * math.sqrt(-dt)
    std = s_next * math.sin(a * math.pi / 2)
    return (1 - s_next) * x0 + math.sqrt(s_next**2 - std**2) * x1, std

@st.composite
def steps(draw):
    "kind, σ, σ', a, σ_max"
    kind = draw(st.sampled_from(KINDS))
    s = draw(st.one_of(st.just(1.), st.floats(0.01, 0.99)))
    s_next = draw(st.one_of(st.just(0.), st.floats(1e-3, 0.98 * s)))
    return kind, s, s_next, draw(st.floats(0.05, 0.95)), draw(st.floats(0.5, 0.98))

@quick
@given(steps(), st.integers(0, 2**32), st.sampled_from([torch.float32, torch.float64]))
def test_flow_step_is_the_published_formulas(drawn, seed, dtype):
    kind, s, s_next, a, s_max = drawn
    x, v = data(seed)
    mean, std = by_the_book(kind, v.double(), s, s_next, x.double(), a, s_max)
    action = (mean + std * torch.randn(x.shape, generator=rng(seed), dtype=double)).to(dtype)
    step = flow_step(kind, v.to(dtype), s, s_next, x.to(dtype), a, prev_sample=action, sigma_max=s_max)
    assert step.mean.dtype == step.std.dtype == step.log_prob.dtype == dtype
    size = max(1., mean.abs().max().item(), x.abs().max().item())
    assert (step.mean - mean).abs().max() <= 1e-6 * size
    assert (step.std - std).abs().max() <= 1e-6 * std
    assert (step.pred_original_sample - (x.double() - s * v.double())).abs().max() <= 1e-6 * size
    if not std: assert not step.log_prob.any()
    else:
        expected = Normal(mean, std).log_prob(action.double()).flatten(1).mean(1)
        # what is scored are differences of fp32 numbers of this size, in units of std
        allowed = 1e-6 * (1 + expected.abs() + 4 * size / std)
        assert ((step.log_prob - expected).abs() <= allowed).all()

@quick
@given(steps(), st.integers(0, 2**32))
def test_without_noise_every_kind_is_euler_to_the_last_bit(drawn, seed):
    kind, s, s_next, _, _ = drawn
    x, v = data(seed)
    step = flow_step(kind, v, s, s_next, x, 0., generator=rng(seed))
    euler = flow_step("ode", v, s, s_next, x, 0.)
    assert torch.equal(step.prev_sample, euler.prev_sample) and not step.std.any() and not step.log_prob.any()

@pytest.mark.parametrize("kwargs", [
    dict(shift=1.), dict(shift=3.), dict(use_dynamic_shifting=True), dict(shift=5., shift_terminal=0.1),
    dict(use_dynamic_shifting=True, time_shift_type="linear"), dict(use_karras_sigmas=True),
])
def test_the_ode_is_the_schedulers_own_walk(kwargs):
    "Static and dynamic shift, a terminal level, another spacing: by the scheduler's own code, bit for bit"
    theirs, mu = make(**kwargs), 0.8 if kwargs.get("use_dynamic_shifting") else None
    theirs.set_timesteps(7, mu=mu)
    p = FlowProcess(make(**kwargs), "ode", 0., 7, mu=mu)
    assert torch.equal(p.times, theirs.timesteps) and torch.equal(p.sigmas, theirs.sigmas)
    assert not p.stochastic.any() and p.init_scale == 1
    (a, v), b = data(), data()[0]
    for t in theirs.timesteps:
        a, b = p.step(v * a, a, t).prev_sample, theirs.step(v * b, t, b).prev_sample
        assert torch.equal(a, b)

def test_levels_as_fluxs_pipeline_passes_them():
    flux, listed = make(use_dynamic_shifting=True), np.linspace(1, 0.1, 10)
    theirs = copy.deepcopy(flux)
    theirs.set_timesteps(sigmas=listed, mu=0.63)
    p = process(scheduler=flux, mu=0.63, sigmas=listed)
    assert torch.equal(p.times, theirs.timesteps)
    expected = math.exp(0.63) / (math.exp(0.63) + 1 / listed - 1)
    np.testing.assert_allclose(p.times / 1000, expected, rtol=1e-6)
    assert not torch.equal(p.times, process(scheduler=flux, mu=0.63).times)   # the list does matter

def test_the_process_leaves_the_schedulers_state_alone():
    scheduler = make()
    before = copy.deepcopy(scheduler.__dict__)
    p = process(scheduler=scheduler)
    p.draw_levels(5, rng())
    for name in ("timesteps", "sigmas"): assert torch.equal(getattr(scheduler, name), before[name])
    assert len(p.times) == 10

def test_a_shift_that_was_set_later_counts():
    scheduler = make()
    scheduler.set_shift(6.)
    assert (process(scheduler=scheduler).times[1:-1] > process().times[1:-1]).all()

# --- marginals ---

class Mixture:
    "Data on a line, and the exact velocity of the flow to it"
    w, m, s = (torch.tensor(o, dtype=double) for o in ([0.3, 0.7], [-1.5, 1.], [0.25, 0.5]))

    def marginal(self, sigma):
        parts = Normal((1 - sigma) * self.m, ((1 - sigma)**2 * self.s**2 + sigma**2)**0.5)
        return MixtureSameFamily(Categorical(self.w), parts)

    def velocity(self, x, sigma):
        parts = self.marginal(sigma).component_distribution
        belongs = (parts.log_prob(x[:, None]) + self.w.log()).softmax(1)
        gain = (1 - sigma) * self.s**2 / parts.variance
        return (x - (belongs * (self.m + gain * (x[:, None] - parts.mean))).sum(1)) / sigma

def distance(x, mixture=Mixture()):
    "Wasserstein-1, from the mixture's quantiles"
    grid = torch.linspace(-5, 5, 10_001, dtype=double)
    cdf = mixture.marginal(torch.tensor(0., dtype=double)).cdf(grid)
    return np.abs(np.sort(x.numpy()) - np.interp((np.arange(len(x)) + 0.5) / len(x), cdf, grid)).mean()

def walked(kind, a, n, N=4_000, mixture=Mixture()):
    "N points by n even steps, from starts that are spread evenly, so that only the dice add chance"
    g, sigmas = rng(1), torch.linspace(1, 0, n + 1, dtype=double)
    x = Normal(torch.tensor(0., dtype=double), 1.).icdf((torch.arange(N, dtype=double) + 0.5) / N)
    for s, s_next in zip(sigmas, sigmas[1:]):
        x = flow_step(kind, mixture.velocity(x, s), s, s_next, x, a, None, g, sigmas[1]).prev_sample
    return x

@pytest.mark.parametrize("kind, a", [("ode", 0.), ("flow-sde", 0.3), ("flow-sde", 0.7), ("dance-sde", 0.3),
                                     ("dance-sde", 0.7)])
def test_samples_have_the_exact_marginal(kind, a):
    x, exact = walked(kind, a, 80), Mixture().marginal(torch.tensor(0., dtype=double))
    assert distance(x) < 0.05
    assert abs(x.mean() - exact.mean) < 5 * exact.stddev / len(x)**0.5 and abs(x.std() - exact.stddev) < 0.04
    share = (x < -0.5).double().mean()
    assert abs(share - exact.cdf(torch.tensor(-0.5, dtype=double))) < 0.03
    assert distance(walked(kind, a, 8)) > 1.7 * distance(x)   # and it is the steps' size that counts

def test_cps_at_many_steps_has_another_marginal():
    "It keeps coefficients, not marginals: variance is lost at each trade of a fixed share of the noise"
    few, many = walked("cps", 0.8, 10), walked("cps", 0.8, 80)
    assert distance(few) > 0.15 and distance(many) > 0.15 and distance(walked("cps", 0.05, 80)) < 0.03

def moments(kind, a, n, mean=1., std=0.5, start=1.):
    "Exact mean and std of x_0, if data are one Gaussian: `flow_step` is affine in x, and two points tell all"
    sigmas = torch.linspace(start, 0, n + 1, dtype=double)
    m, var = (1 - sigmas[0]) * mean, (1 - sigmas[0])**2 * std**2 + sigmas[0]**2
    for s, s_next in zip(sigmas, sigmas[1:]):
        x = torch.tensor([0., 1.], dtype=double)
        x0 = mean + (1 - s) * std**2 / ((1 - s)**2 * std**2 + s**2) * (x - (1 - s) * mean)
        step = flow_step(kind, (x - x0) / s, s, s_next, x, a, prev_sample=x, sigma_max=sigmas[1])
        slope = step.mean[1] - step.mean[0]
        m, var = step.mean[0] + slope * m, slope**2 * var + step.std[0]**2
    return m.item(), var.item()**0.5

@pytest.mark.parametrize("kind, a, start", [
    ("ode", 0., 1.), ("dance-sde", 0.3, 1.), ("dance-sde", 0.7, 1.),
    ("flow-sde", 0.3, 0.9), ("flow-sde", 0.7, 0.9), ("flow-sde", 1., 0.9),
])
def test_errors_are_of_first_order(kind, a, start):
    (m, few), (_, many) = moments(kind, a, 100, start=start), moments(kind, a, 200, start=start)
    assert m == pytest.approx(1, abs=1e-9) and 1.9 < (few - 0.5) / (many - 0.5) < 2.1

def test_cps_has_an_error_of_order_zero():
    errors = [moments("cps", 0.8, n)[1] - 0.5 for n in (100, 200)]
    assert errors[0] / errors[1] == pytest.approx(1, abs=0.05) and errors[1] < -0.09

@quick
@given(st.floats(0.05, 0.99), st.floats(0.05, 0.95), st.floats(0.05, 1.))
def test_cps_keeps_the_coefficients_and_the_sdes_leave_too_much_noise(s, share, a):
    s, s_next, a = (torch.tensor([o], dtype=double) for o in (s, s * share, a))
    for kind in noisy:
        k, d = noise_exchange(kind, s, s_next, a, s)
        surplus = (s_next - k)**2 + d**2 - s_next**2
        expected = 0 if kind == "cps" else d**2 * (s - s_next) / s + d**4 / (4 * s**2)
        torch.testing.assert_close(surplus, expected + torch.zeros_like(s), rtol=1e-9, atol=1e-12)

def test_flow_sde_is_dance_sde_with_a_noise_level_that_depends_on_sigma():
    x, v = data(dtype=double)
    for s in (0.2, 0.5, 0.9):
        one = flow_step("flow-sde", v, s, s - 0.1, x, 0.7, generator=rng())
        two = flow_step("dance-sde", v, s, s - 0.1, x, 0.7 * math.sqrt(s / (1 - s)), generator=rng())
        torch.testing.assert_close(one.prev_sample, two.prev_sample, rtol=1e-12, atol=1e-12)

# --- FLOW.md's traps ---

@each_noisy
def test_trap_1_sigma_of_one_is_finite(kind):
    p = process(kind)
    assert p.sigmas[0] == 1
    x, v = data()
    v.requires_grad_()
    step = p.step(v, x, p.times[0], generator=rng())
    grad, = torch.autograd.grad(step.log_prob.sum(), v)
    for o in (step.mean, step.std, step.prev_sample, step.log_prob, grad): assert o.isfinite().all()
    if kind == "flow-sde":   # the next level stands in the denominator, and is what flow_step takes by itself
        expected = 0.7 * ((1 - p.sigmas[1]) / (1 - p.sigmas[1]))**0.5
        torch.testing.assert_close(step.std, expected.expand(3))
        assert torch.equal(flow_step(kind, v, 1., p.sigmas[1], x, 0.7, generator=rng()).std, step.std)
        assert flow_step(kind, v, 1., p.sigmas[1], x, 0.7, sigma_max=0.5).std[0] < step.std[0]

@pytest.mark.parametrize("n", [1, 2, 10])
@each_noisy
def test_trap_1_whole_walks_are_finite(kind, n):
    p, (x, v) = process(kind, n), data()
    for t in p.times: x = p.step(v, x, t, generator=rng()).prev_sample
    assert x.isfinite().all()

def test_trap_2_the_last_step_of_cps_is_deterministic_and_left_out():
    assert process("cps").stochastic.tolist() == [True] * 9 + [False]
    for kind in ("flow-sde", "dance-sde"): assert process(kind).stochastic.all()
    p, (x, v) = process("cps"), data()
    v.requires_grad_()
    step = p.step(v, x, p.times[-1], generator=rng())
    grad, = torch.autograd.grad(step.log_prob.sum(), v)
    assert not step.std.any() and not step.log_prob.any() and not grad.any()
    # with σ' = 0 nothing but x̂₀ is left
    torch.testing.assert_close(step.prev_sample, step.pred_original_sample, rtol=0, atol=1e-6)

@each_kind
def test_trap_2_stochastic_is_where_the_step_has_a_likelihood(kind):
    for n, kw in ((1, {}), (10, {}), (10, dict(noise_level=0.))):
        p = process(kind, n, **kw)
        x, v = data(shape=(n, 2, 2))
        assert torch.equal(p.step(v, x, p.times, generator=rng()).std > 0, p.stochastic)

@each_noisy
def test_trap_3_exact_kl_has_the_steps_own_variance(kind):
    "Also by drawing: the mean log-ratio of draws from one Gaussian"
    x, (v, other) = data()[0].double(), data(1, dtype=double)
    s, s_next = 0.6, 0.5
    one, two = (flow_step(kind, o, s, s_next, x, 0.5, prev_sample=x) for o in (v, v + 0.1 * other))
    exact = kl_divergence(*(Independent(Normal(o.mean, o.std.reshape(-1, 1, 1, 1)), 3) for o in (one, two)))
    kl = gaussian_kl(one.mean, two.mean, one.std, "sum")
    torch.testing.assert_close(kl, exact)
    first = lambda o: o[:1].expand(4_000, *o.shape[1:])
    y = flow_step(kind, first(v), s, s_next, first(x), 0.5, generator=rng(2)).prev_sample
    scores = [gaussian_log_prob(y, first(o.mean), o.std[:1], "sum") for o in (one, two)]
    ratio = scores[0] - scores[1]
    assert (ratio.mean() - exact[0]).abs() < 5 * ratio.std() / len(ratio)**0.5
    # by velocities alone: the mean moves by δv times this
    k = noise_exchange(kind, *(torch.tensor([o], dtype=double) for o in (s, s_next, 0.5, s)))[0]
    moved = (s - s_next) + k * (1 - s)
    torch.testing.assert_close(kl, (moved * 0.1 * other).square().flatten(1).sum(1) / (2 * one.std**2))

@each_noisy
def test_trap_4_the_kl_of_steps_has_a_gradient(kind):
    x, v = data()
    v.requires_grad_()
    reference = flow_step(kind, v.detach() + 0.1, 0.6, 0.5, x, 0.5, prev_sample=x)
    step = flow_step(kind, v, 0.6, 0.5, x, 0.5, prev_sample=x)
    grad, = torch.autograd.grad(gaussian_kl(step.mean, reference.mean, step.std).sum(), v)
    assert (grad < 0).all()   # the velocity is below the reference everywhere: more of it, less divergence

@half
@each_kind
def test_trap_5_half_latents_are_rounded_before_they_are_scored(kind, dtype):
    p = process(kind)
    x, v = data(shape=(10, 4, 4, 4), dtype=dtype)
    drawn = p.step(v, x, p.times, generator=rng())
    again = p.step(v, x, p.times, drawn.prev_sample)
    assert drawn.prev_sample.dtype == dtype
    assert torch.equal(again.log_prob, drawn.log_prob) and torch.equal(again.prev_sample, drawn.prev_sample)
    if kind != "ode":   # the trap is real: scored before rounding, the ratio is another
        fine = p.step(v.float(), x.float(), p.times, generator=rng())
        assert (fine.log_prob - drawn.log_prob).abs().max() > 1e-6

@half
@each_kind
def test_trap_5_arithmetic_is_in_fp32(kind, dtype):
    p, (x, v) = process(kind), data(dtype=dtype)
    t = p.times[torch.tensor([0, 4, 9])]
    halves, floats = p.step(v, x, t, generator=rng()), p.step(v.float(), x.float(), t, generator=rng())
    assert halves.mean.dtype == halves.std.dtype == halves.log_prob.dtype == torch.float32
    for name in ("mean", "std", "pred_original_sample"):
        assert torch.equal(getattr(halves, name), getattr(floats, name))
    assert torch.equal(halves.prev_sample, floats.prev_sample.to(dtype))   # the dice are the same, too

@each_kind
def test_trap_6_a_row_does_not_depend_on_its_batch(kind):
    "Alone, among others, in another order: the same bits, drawn and scored, at ten different times"
    p = process(kind)
    x, v = data(shape=(10, 4, 8, 8))
    together = p.step(v, x, p.times, generator=[rng(i) for i in range(10)])
    order = torch.randperm(10, generator=rng(5))
    scored = p.step(v[order], x[order], p.times[order], together.prev_sample[order])
    for i in range(10):
        alone = p.step(v[i:i+1], x[i:i+1], p.times[i], generator=[rng(i)])
        for name in ("mean", "std", "prev_sample", "log_prob", "pred_original_sample"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i])
    assert torch.equal(scored.log_prob, together.log_prob[order])

def test_trap_6_a_window_does_not_change_a_rows_dice():
    p, (x, v) = process(), data(shape=(10, 2, 4))
    everywhere = p.step(v, x, p.times, generator=[rng(i) for i in range(10)])
    p.move_window((3, 2))
    inside = p.step(v, x, p.times, generator=[rng(i) for i in range(10)])
    assert torch.equal(inside.prev_sample[3:5], everywhere.prev_sample[3:5])

@each_noisy
def test_trap_7_noise_does_not_repeat(kind):
    "Not from step to step, from row to row, from call to call; and the same seeds give the same noise"
    p, x = process(kind), torch.zeros(2, 4, 4)
    def dice(n, generator):
        steps = [p.step(x, x, p.times[i], generator=generator) for i in range(n)]
        return torch.cat([(o.prev_sample - o.mean) / o.std.reshape(-1, 1, 1) for o in steps]).flatten(1)
    for generator in (rng(), [rng(1), rng(2)], None):
        z = dice(4, generator)
        likeness = torch.corrcoef(torch.cat([z, dice(4, generator)])).fill_diagonal_(0)
        assert likeness.abs().max() < 0.95
    torch.testing.assert_close(dice(4, rng()), dice(4, rng()))

def test_trap_9_times_are_a_thousand_sigma_after_the_shift():
    p = process(num_steps=5)
    torch.testing.assert_close(p.times, 1000 * p.sigmas[:-1])
    even = torch.linspace(1, 3 / 1002, 5)   # the scheduler starts from its smallest level, which is shifted
    torch.testing.assert_close(p.sigmas[:-1], 3 * even / (1 + 2 * even), rtol=1e-4, atol=0)
    x, v = data()
    step = p.step(v, x, p.times[2], generator=rng())
    by_sigma = flow_step("flow-sde", v, p.sigmas[2], p.sigmas[3], x, 0.7, generator=rng())
    assert torch.equal(step.prev_sample, by_sigma.prev_sample)
    with pytest.raises(ValueError, match=r"sigma must be in \(0, 1\].*timestep / 1000"):
        flow_step("cps", v, p.times[2], 0., x, 0.7)
    for t in (p.sigmas[2], p.times.bfloat16()[2], p.times[2] + 0.01):
        with pytest.raises(ValueError, match="t must be one of the scheduler's timesteps"): p.step(v, x, t)

def test_trap_10_the_mean_is_the_default_and_the_sum_is_n_times_it():
    p, (x, v) = process(), data()
    mean = p.step(v, x, p.times[3], generator=rng()).log_prob
    torch.testing.assert_close(p.step(v, x, p.times[3], None, rng(), "sum").log_prob, 64 * mean)
    step = flow_step("flow-sde", v, 0.6, 0.5, x, 0.7, generator=rng())
    assert torch.equal(step.log_prob, gaussian_log_prob(step.prev_sample, step.mean, step.std, "mean"))

# --- what a step promises besides ---

def test_a_drawn_action_is_data():
    x, v = data()
    grads = []
    for given_ in (False, True):
        o = v.clone().requires_grad_()
        step = flow_step("flow-sde", o, 0.6, 0.5, x, 0.7, generator=rng())
        if given_: step = flow_step("flow-sde", o, 0.6, 0.5, x, 0.7, step.prev_sample.detach())
        else: assert step.prev_sample.requires_grad
        grads.append(torch.autograd.grad(step.log_prob.sum(), o)[0])
    assert grads[0].abs().max() > 0 and torch.equal(*grads)

@each_noisy
def test_draws_have_the_stated_mean_and_std(kind):
    x, v = (o.expand(20_000, -1) for o in data(shape=(1, 2)))
    step = flow_step(kind, v, 0.6, 0.5, x, 0.7, generator=rng())
    z = (step.prev_sample - step.mean) / step.std[0]
    assert z.mean().abs() < 5 / 200 and (z.std() - 1).abs() < 5 / 283

@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 16, 64), (3, 4, 2, 8, 8)])
def test_latents_of_any_shape(shape):
    "Packed, as Flux's, or with frames"
    x, v = data(shape=shape)
    levels = torch.tensor([[0.9, 0.5, 0.2], [0.8, 0.4, 0.]])
    step = flow_step("cps", v, *levels, x, 0.8, generator=rng())
    assert step.mean.shape == shape and step.std.shape == step.log_prob.shape == (3,)

good = dict(kind="flow-sde", velocity=data()[1], sample=data()[0], sigma=0.6, sigma_next=0.5, noise_level=0.7)
@pytest.mark.parametrize("change, message", [
    (dict(kind="sde"), "kind must be one of flow-sde, dance-sde, cps, ode, not 'sde'"),
    (dict(velocity=data()[1][:, :2]), "velocity and sample must have one shape"),
    (dict(sigma=0.), r"sigma must be in \(0, 1\]"), (dict(sigma=1.1), "sigma must be in"),
    (dict(sigma=math.nan), "sigma must be in"), (dict(sigma_next=-0.1), "sigma_next must be"),
    (dict(sigma_next=0.6), "sigma_next must be 0 or more and below sigma"),
    (dict(sigma=torch.tensor([0.6, 0.5])), r"sigma must be one number or one per sample \(3\), not 2"),
    (dict(sigma_next=torch.tensor([0.1, 0.2])), r"sigma_next must be one number or one per sample"),
    (dict(noise_level=-0.1), "noise_level must be 0 or more"),
    (dict(noise_level=math.inf), "noise_level must be 0 or more"),
    (dict(kind="cps", noise_level=1.1), "noise_level must be between 0 and 1 for cps"),
    (dict(noise_level=torch.tensor([0.1, 0.2])), "noise_level must be one number or one per sample"),
    (dict(sigma=1., sigma_max=1.), "sigma_max must be 0 or more and below 1"),
    (dict(prev_sample=data()[0], generator=rng()), "not both"),
    (dict(prev_sample=data()[0][:1]), "one shape"), (dict(reduction="average"), "'mean' or 'sum'"),
])
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message) as e: flow_step(**{**good, **change})
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("change, message", [
    (dict(scheduler=DDIMScheduler()), "must be a FlowMatchEulerDiscreteScheduler .*not DDIMScheduler"),
    (dict(scheduler=make(stochastic_sampling=True)), "stochastic_sampling=False"),
    (dict(scheduler=make(invert_sigmas=True)), "invert_sigmas=False"),
    (dict(scheduler=make(use_dynamic_shifting=True)), "mu must be given"),
    (dict(kind="euler"), "kind must be one of"), (dict(noise_level=-1.), "noise_level must be 0 or more"),
    (dict(num_steps=0), "num_steps must be a whole number above 0"),
    (dict(num_steps=2.5), "num_steps must be"),
    (dict(sigmas=[1., 0.5]), "sigmas must be 10 numbers"),
    (dict(window=(9, 2)), r"window must be \(first, count\) within the 10 steps, not \(9, 2\)"),
    (dict(window=(-1, 2)), "window must be"), (dict(window=(2, 0)), "window must be"),
    (dict(window=3), "window must be"), (dict(window=(1, 2, 3)), "window must be"),
    (dict(window=(0.5, 2)), "window must be"),
    (dict(window=(0, 2), kind="ode"), "window has no effect"),
    (dict(window=(0, 2), noise_level=0.), "window has no effect"),
    (dict(window=(9, 1), kind="cps"), "no stochastic step"),
])
def test_bad_process(change, message):
    with pytest.raises(ValueError, match=message) as e: FlowProcess(**{**dict(scheduler=make()), **change})
    assert "\n" not in str(e.value)

@pytest.mark.cuda
@each_kind
def test_a_process_follows_its_latents_to_the_gpu(kind):
    "Wherever it was made: the same steps, and one generator a sample gives the same dice there"
    here, there, (x, v) = process(kind), process(kind), data(shape=(10, 4, 4))
    one = here.step(v, x, here.times, generator=[rng(i) for i in range(10)])
    two = there.step(v.cuda(), x.cuda(), there.times, generator=[rng(i) for i in range(10)])
    assert there.times.is_cuda and there.stochastic.is_cuda and two.log_prob.is_cuda
    for name in ("mean", "std", "prev_sample", "log_prob"):
        torch.testing.assert_close(getattr(two, name).cpu(), getattr(one, name), rtol=1e-5, atol=1e-5)
    assert there.draw_levels(4, rng()).is_cuda

def test_a_process_follows_its_latents_to_another_device():
    "`meta` stands for a GPU: everything that the step asks for is there"
    p, x = process(), torch.empty(3, 4, 4, device="meta")
    step = p.step(x, x, p.times[:3], prev_sample=x)
    moved = (p.times, p.sigmas, p.levels, p.stochastic, step.mean, step.log_prob)
    assert {o.device.type for o in moved} == {"meta"}

# --- windows ---

@each_noisy
def test_a_window_is_stochastic_inside_and_euler_outside(kind):
    p = process(kind, window=(2, 3))
    assert p.stochastic.nonzero().flatten().tolist() == [2, 3, 4]
    x, v = data(shape=(10, 4, 4))
    step, euler = p.step(v, x, p.times, generator=rng()), process("ode").step(v, x, p.times)
    whole = process(kind).step(v, x, p.times, generator=rng())
    assert torch.equal(step.prev_sample[~p.stochastic], euler.prev_sample[~p.stochastic])
    assert torch.equal(step.prev_sample[p.stochastic], whole.prev_sample[p.stochastic])
    assert torch.equal(step.log_prob, torch.where(p.stochastic, whole.log_prob, 0.))

def test_a_window_moves():
    p = process(window=(0, 2))
    p.move_window((4, 2))
    assert p.stochastic.nonzero().flatten().tolist() == [4, 5] and p.window == (4, 2)
    p.move_window(None)
    assert p.stochastic.all()

@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(1, 3))
@quick
def test_window_at_stays_within_the_steps_and_reaches_both_ends(iteration, num_steps, count, every, stride):
    count = min(count, num_steps)
    first, size = window_at(iteration, num_steps, count, every, stride)
    assert size == count and 0 <= first <= num_steps - count
    seen = {window_at(i * every, num_steps, count, every, 1)[0] for i in range(num_steps)}
    assert seen == set(range(num_steps - count + 1))

@pytest.mark.parametrize("change", [dict(count=0), dict(count=11), dict(every=0), dict(stride=0),
                                    dict(iteration=-1)])
def test_window_at_refuses(change):
    usual = dict(iteration=0, num_steps=10, count=2)
    with pytest.raises(ValueError, match="cannot move"): window_at(**usual | change)

# --- the forward direction ---

def test_noised_is_the_schedulers_and_target_is_the_velocity():
    p, (x0, noise) = process(), data()
    t = p.times[torch.tensor([1, 5, 9])]
    x = p.noised(x0, noise, t)
    torch.testing.assert_close(x, p.scheduler.scale_noise(x0, t, noise))
    v = p.target(x0, noise, t)
    step = p.step(v, x, t, prev_sample=x)
    torch.testing.assert_close(step.pred_original_sample, x0)   # who knows the velocity knows the picture
    assert p.noised(x0.bfloat16(), noise, t).dtype == torch.bfloat16
    for bad in (0., 1001.):
        with pytest.raises(ValueError, match="t must be above 0"): p.noised(x0, noise, torch.tensor([bad]))

@pytest.mark.parametrize("kw", [dict(), dict(scheduler=make(use_dynamic_shifting=True), mu=0.63),
                                dict(scheduler=make(shift=1.))])
def test_levels_are_drawn_as_sd3_was_trained_and_never_zero(kw):
    p, n = process(**kw), 20_000
    drawn = p.draw_levels(n, rng())
    assert drawn.shape == (n,) and drawn.dtype == p.times.dtype
    assert (drawn > 0).all() and (drawn <= 1000).all()
    assert torch.equal(drawn, p.draw_levels(n, rng())) and not torch.equal(drawn, p.draw_levels(n, rng(1)))
    # against diffusers' own density, which is of the level before the shift
    u = compute_density_for_timestep_sampling("logit_normal", n, 0., 1., generator=rng(2)).sort().values
    c = math.exp(0.63) if kw.get("mu") else p.scheduler.config.shift
    expected = 1000 * c * u / (1 + (c - 1) * u)
    at = torch.linspace(0.02, 0.98, 25)
    assert ((drawn.sort().values - expected).abs()[(at * n).long()] < 20).all()

def test_extreme_draws_stay_on_the_list():
    "A sigmoid that rounds to 1 must not ask for the level after the last"
    p = process()
    class Far:
        device = torch.device("cpu")
    for far in (-60., 60.):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(torch, "randn", lambda n, **kw: torch.full((n,), far))
            t = p.draw_levels(3, Far())
        assert (t > 0).all() and (t <= 1000).all()

# --- the exact policy gradient ---

goal, care = torch.tensor([0.5, 2.], dtype=double), torch.tensor([2., 0.25], dtype=double)
def reward(x): return -(care * (x - goal)**2).sum(-1)

class TinyFlow:
    "A policy whose velocity is the exact one for N(mean, std²), in two dimensions"
    reduction = "sum"

    def __init__(self, process, mean=0., std=0.7):
        self.process = process
        weights = [torch.full((2,), o, dtype=double) for o in (mean, math.log(std))]
        self.mean, self.log_std = (o.requires_grad_() for o in weights)

    def trainable_parameters(self): return [self.mean, self.log_std]

    def beliefs(self, s):
        "x̂₀ and x̂₁, each as slope and offset of x"
        var = (2 * self.log_std).exp()
        gain = (1 - s) * var / ((1 - s)**2 * var + s**2)
        offset = self.mean * (1 - gain * (1 - s))
        return (gain, offset), ((1 - (1 - s) * gain) / s, -(1 - s) * offset / s)

    def step(self, x, t, cond=None, prev_sample=None, generator=None, guidance=True):
        (a0, b0), (a1, b1) = self.beliefs(t.double()[:, None] / 1000)
        return self.process.step((a1 - a0) * x + b1 - b0, x, t, prev_sample, generator, self.reduction)

    @torch.no_grad()
    def sample(self, n, generator):
        states, scores = [torch.randn((n, 2), generator=generator, dtype=double)], []
        for t in self.process.times:
            step = self.step(states[-1], t.expand(n), generator=generator)
            states.append(step.prev_sample); scores.append(step.log_prob)
        return Trajectories(torch.stack(states, 1), self.process.times, torch.stack(scores, 1),
                            self.process.stochastic, torch.zeros(n, 0), [""] * n, [{}] * n)

def expected_reward(policies):
    "E[r(x_0)], exact, when the k-th policy takes the k-th step"
    p, mean, var = policies[0].process, torch.zeros(2, dtype=double), torch.ones(2, dtype=double)
    for i, policy in enumerate(policies):
        s, s_next = p.sigmas[i:i+2].double()
        k, d = noise_exchange(p.kind, s, s_next, p.levels[i], p.sigmas[1].double())
        (a0, b0), (a1, b1) = policy.beliefs(s)
        slope = (1 - s_next) * a0 + (s_next - k) * a1
        mean, var = slope * mean + (1 - s_next) * b0 + (s_next - k) * b1, slope**2 * var + d**2
    return reward(mean) - (care * var).sum()

def flat_grad(y, policy): return torch.cat(torch.autograd.grad(y, policy.trainable_parameters()))

def estimate(policy, objective, n, g):
    "∇J from n trajectories; the loss is a mean over transitions, hence minus their number a trajectory"
    batch = policy.sample(n, g)
    A = reward(batch.latents[:, -1]) - expected_reward([policy] * 5).detach()
    loss, _ = objective.loss(policy, batch, objective.examples(policy, batch, A, g))
    return -int(policy.process.stochastic.sum()) * flat_grad(loss.mean(), policy)

def tiny(kind="flow-sde", a=0.7, window=None):
    return TinyFlow(FlowProcess(make(shift=1.), kind, a, 5, window, sigmas=np.linspace(1, 0.2, 5)))

def exact_gradient(policy):
    "Through the stochastic steps: a score is blind to weights where there are no dice"
    held = TinyFlow(policy.process)
    return flat_grad(expected_reward([policy if o else held for o in policy.process.stochastic]), policy)

score_function = DDPOSF(adv_clip_max=math.inf)
importance = DDPO(adv_clip_max=math.inf, clip_range=math.inf)

@pytest.mark.parametrize("kind, a, window", [
    ("flow-sde", 0.7, None), ("dance-sde", 0.5, None), ("cps", 0.8, None),
    ("flow-sde", 0.7, (1, 2)), ("cps", 0.5, (2, 1)),
])
@pytest.mark.parametrize("objective", [score_function, importance], ids=["sf", "is"])
def test_the_policy_gradient_is_unbiased(kind, a, window, objective):
    policy, g = tiny(kind, a, window), rng(3)
    exact = exact_gradient(policy)
    estimates = torch.stack([estimate(policy, objective, 2_000, g) for _ in range(24)])
    z = (estimates.mean(0) - exact) / (estimates.std(0) / len(estimates)**0.5)
    assert z.abs().max() < 4
    assert (estimates.mean(0) - exact).norm() / exact.norm() < 0.12   # small enough to mean something

def test_a_window_changes_what_is_estimated():
    whole, part = tiny(), tiny(window=(1, 2))
    assert torch.cosine_similarity(exact_gradient(whole), exact_gradient(part), 0) < 0.999

@pytest.mark.parametrize("kind, a", [("flow-sde", 0.7), ("cps", 0.8)])
def test_its_error_falls_as_one_over_root_n(kind, a):
    policy, exact = tiny(kind, a), exact_gradient(tiny(kind, a))
    def rms(n, k=40):
        g = rng(2)
        off = [estimate(policy, score_function, n, g) - exact for _ in range(k)]
        return torch.stack(off).square().sum(1).mean().sqrt().item()
    # 16 times the samples: 4 times less, within the noise of 40 repeats
    assert 3 < rms(100) / rms(1_600) < 5.3

@each_noisy
def test_the_ratio_is_one_before_the_first_update_in_any_split(kind):
    policy = tiny(kind, 0.6)
    batch = policy.sample(7, rng())
    examples = importance.examples(policy, batch, torch.randn(7, dtype=double), rng())
    for size in (1, 3, 100):
        for start in range(0, len(examples["sample"]), size):
            part = {k: v[start:start + size] for k, v in examples.items()}
            assert (importance.loss(policy, batch, part)[1]["ratio"] == 1).all()
