"The DDIM step as a policy: the step is diffusers', the score is the Gaussian's, and FIELD's traps stay shut."
import dataclasses
import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings, strategies as st

from ddpo_nb.likelihood import gaussian_log_prob
from ddpo_nb.mdp import Trajectories, ddim_step, step_std

quick = settings(max_examples=60, deadline=None)
spacings, kinds = ("leading", "linspace", "trailing"), ("epsilon", "sample", "v_prediction")
SD = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
    set_alpha_to_one=False, steps_offset=1
)

def make(n=20, **kwargs):
    "Stable Diffusion's scheduler with `n` steps; `kwargs` replace parts of its configuration"
    scheduler = DDIMScheduler(**{**SD, **kwargs})
    scheduler.set_timesteps(n)
    return scheduler

def data(seed=0, shape=(3, 4, 4, 4), dtype=torch.float32):
    "x_t and the network's output"
    x, out = torch.randn(2, *shape, generator=rng(seed))
    return x.to(dtype), out.to(dtype)

def rng(seed=0): return torch.Generator().manual_seed(seed)

schedulers = (
    st.fixed_dictionaries(
        dict(
            n=st.sampled_from([1, 2, 5, 7, 20, 30, 50, 100, 999, 1000]),
            timestep_spacing=st.sampled_from(spacings), prediction_type=st.sampled_from(kinds),
            steps_offset=st.integers(0, 1), set_alpha_to_one=st.booleans(),
            beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
            clip_sample=st.booleans(), clip_sample_range=st.sampled_from([1.0, 2.5]),
            thresholding=st.booleans(), sample_max_value=st.sampled_from([1.0, 3.0]),
            # such a list asks for timestep 1000
        )
    ).filter(lambda o: o["n"] < 1000 or not (o["timestep_spacing"] == "leading" and o["steps_offset"])).map(
        lambda o: make(**o)
    )
)
etas = st.one_of(st.just(0.), st.just(1.), st.floats(1e-3, 1))
seeds = st.integers(0, 2**32)

def diffusers_step(scheduler, out, t, x, eta, **kwargs):
    return scheduler.step(out, int(t), x, eta=eta, **kwargs).prev_sample

def close(a, b, eps=1e-6):
    "Equal to `eps`, relative to the largest element where that is above 1"
    assert ((a - b).abs() <= eps * b.abs().max().clamp(min=1)).all(), (a - b).abs().max()

# --- the step is diffusers' ---

@quick
@given(schedulers, etas, seeds, st.data())
def test_trap_4_prev_sample_is_the_samplers(scheduler, eta, seed, draw):
    t = draw.draw(st.sampled_from(scheduler.timesteps.tolist()))
    x, out = data(seed)
    ours = ddim_step(scheduler, out, t, x, eta, generator=rng(seed)).prev_sample
    theirs = diffusers_step(scheduler, out, t, x, eta, generator=rng(seed))
    assert ours.isfinite().all()
    # with n=1 on the cosine schedule its root meets a rounding error below zero
    if theirs.isfinite().all(): close(ours, theirs)
    else: assert 1 - scheduler.alphas_cumprod[t] > 0.999

@quick
@given(schedulers, etas, seeds, st.data())
def test_trap_4_mean_is_the_samplers_without_noise(scheduler, eta, seed, draw):
    t = draw.draw(st.sampled_from(scheduler.timesteps.tolist()))
    x, out = data(seed, dtype=torch.float64)
    theirs = diffusers_step(scheduler, out, t, x, eta, variance_noise=torch.zeros_like(x))
    if theirs.isfinite().all(): close(ddim_step(scheduler, out, t, x, eta).mean, theirs)

@pytest.mark.parametrize("n", [7, 30])
@pytest.mark.parametrize("spacing", spacings)
@pytest.mark.parametrize("kind", kinds)
def test_trap_4_whole_trajectories_when_steps_do_not_divide_1000(n, spacing, kind):
    scheduler = make(n, timestep_spacing=spacing, prediction_type=kind)
    ours, out = data()
    theirs, g1, g2 = ours, rng(1), rng(1)
    for t in scheduler.timesteps:
        ours = ddim_step(scheduler, 0.5 * out, t, ours, 1., generator=g1).prev_sample
        theirs = diffusers_step(scheduler, 0.5 * out, t, theirs, 1., generator=g2)
    close(ours, theirs, 1e-5)

def test_trap_4_the_step_goes_one_stride_not_to_the_next_timestep():
    scheduler = make(7, timestep_spacing="linspace")
    t, following = scheduler.timesteps[:2]
    a, prev = scheduler.alphas_cumprod, t - 1000 // 7
    assert prev != following
    expected = ((1 - a[prev]) / (1 - a[t]) * (1 - a[t] / a[prev]))**0.5
    torch.testing.assert_close(step_std(scheduler, t, 1.), expected.reshape(1))

@quick
@given(schedulers, seeds)
def test_one_generator_a_sample(scheduler, seed):
    x, out = data(seed)
    t = scheduler.timesteps[0]
    together = ddim_step(scheduler, out, t, x, 1., generator=[rng(i) for i in range(3)])
    alone = [ddim_step(scheduler, out[i:i+1], t, x[i:i+1], 1., generator=[rng(i)]) for i in range(3)]
    close(together.prev_sample, torch.cat([o.prev_sample for o in alone]))

@quick
@given(schedulers, etas, seeds, st.data())
def test_per_sample_timesteps_equal_one_at_a_time(scheduler, eta, seed, draw):
    ts = torch.tensor(
        draw.draw(st.lists(st.sampled_from(scheduler.timesteps.tolist()), min_size=3, max_size=3))
    )
    x, out = data(seed)
    action = x + 0.1 * torch.randn(x.shape, generator=rng(seed))
    def steps(**kwargs):
        together = ddim_step(scheduler, out, ts, x, eta, **{k: f(slice(None)) for k, f in kwargs.items()})
        alone = [
            ddim_step(
                scheduler, out[i : i + 1], ts[i], x[i : i + 1], eta,
                **{k: f(slice(i, i + 1)) for k, f in kwargs.items()}
            )
            for i in range(3)
        ]
        for name in ("mean", "std", "prev_sample", "log_prob", "pred_original_sample"):
            close(getattr(together, name), torch.cat([getattr(o, name) for o in alone]))
    steps(prev_sample=lambda s: action[s])
    steps(generator=lambda s: [rng(i) for i in range(3)][s])

@quick
@given(schedulers, etas)
def test_step_std_is_the_steps(scheduler, eta):
    ts = scheduler.timesteps
    x, out = data(shape=(len(ts), 1, 2, 2))
    assert torch.equal(ddim_step(scheduler, out, ts, x, eta).std, step_std(scheduler, ts, eta))
    assert torch.equal(step_std(scheduler, int(ts[0]), eta), step_std(scheduler, ts[:1], eta))

# --- the score is the Gaussian's ---

@quick
@given(
    schedulers, etas, seeds, st.sampled_from(["mean", "sum"]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_trap_3_drawn_and_scored_again_bit_for_bit(scheduler, eta, seed, reduction, dtype):
    "Whatever the latents' precision: the stored action is the one that was scored"
    t = scheduler.timesteps[torch.arange(3) % len(scheduler.timesteps)]
    x, out = data(seed, dtype=dtype)
    drawn = ddim_step(scheduler, out, t, x, eta, generator=rng(seed), reduction=reduction)
    again = ddim_step(scheduler, out, t, x, eta, prev_sample=drawn.prev_sample, reduction=reduction)
    assert drawn.prev_sample.dtype == dtype
    assert torch.equal(drawn.log_prob, again.log_prob)
    assert torch.equal(again.prev_sample, drawn.prev_sample)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trap_3_half_latents_are_scored_in_fp32(dtype):
    "fp32 network output over half latents, at the last step, where rounding weighs most"
    scheduler, (x, out) = make(50), data()
    step = ddim_step(scheduler, out, 1, x.to(dtype), 1., generator=rng())
    assert step.mean.dtype == step.log_prob.dtype == torch.float32
    assert torch.equal(step.log_prob, gaussian_log_prob(step.prev_sample.float(), step.mean, step.std))
    unrounded = ddim_step(scheduler, out, 1, x.to(dtype).float(), 1., generator=rng())
    # the trap is real: scoring before rounding gives another number
    assert (unrounded.log_prob - step.log_prob).abs().max() > 1e-6

@quick
@given(schedulers, seeds)
def test_log_prob_is_the_gaussians(scheduler, seed):
    t = scheduler.timesteps[0]
    x, out = data(seed)
    step = ddim_step(scheduler, out, t, x, 1., generator=rng(seed), reduction="sum")
    if step.std[0] > 0:
        torch.testing.assert_close(
            step.log_prob, gaussian_log_prob(step.prev_sample, step.mean, step.std, "sum")
        )
    else:
        assert not step.log_prob.any()

def test_trap_1_mean_is_the_default_and_sum_is_n_times_it():
    scheduler, (x, out) = make(), data()
    mean, sum_ = (
        ddim_step(scheduler, out, 501, x, 1.0, generator=rng(), **kw).log_prob
        for kw in ({}, dict(reduction="sum"))
    )
    torch.testing.assert_close(sum_, 64 * mean)

def test_draws_have_the_stated_mean_and_std():
    scheduler = make()
    x, out = (o.expand(20_000, -1, -1, -1) for o in data(shape=(1, 1, 1, 2)))
    step = ddim_step(scheduler, out, 501, x, 0.7, generator=rng())
    z = (step.prev_sample - step.mean) / step.std[0]
    assert z.mean().abs() < 5 / 200 and (z.std() - 1).abs() < 5 / 283  # five standard errors of 40,000 draws

def test_a_drawn_action_is_data():
    "The score's gradient is that of the same action scored later, and the draw itself stays differentiable"
    scheduler, (x, out) = make(), data()
    grads = []
    for given in (False, True):
        o = out.clone().requires_grad_()
        step = ddim_step(scheduler, o, 501, x, 1., generator=rng())
        if given: step = ddim_step(scheduler, o, 501, x, 1., prev_sample=step.prev_sample.detach())
        grads.append(torch.autograd.grad(step.log_prob.sum(), o, retain_graph=True)[0])
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)
    o = out.clone().requires_grad_()
    assert ddim_step(scheduler, o, 501, x, 1., generator=rng()).prev_sample.requires_grad

# --- deterministic steps ---

@pytest.mark.parametrize("spacing, offset, one, expected", [
    ("leading", 1, False, True),   # Stable Diffusion's own
    ("leading", 1, True, False), ("leading", 0, False, False), ("leading", 0, True, False),
    ("linspace", 0, False, False), ("linspace", 0, True, False),
    ("trailing", 0, False, True), ("trailing", 0, True, False),
])
def test_trap_2_which_last_steps_are_deterministic(spacing, offset, one, expected):
    scheduler = make(20, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=one)
    stochastic = step_std(scheduler, scheduler.timesteps, 1.) > 0
    assert stochastic[:-1].all() and stochastic[-1] == expected
    assert not (step_std(scheduler, scheduler.timesteps, 0.) > 0).any()

@quick
@given(schedulers, etas, seeds, st.sampled_from(["mean", "sum"]))
def test_trap_2_never_nan(scheduler, eta, seed, reduction):
    "Over whole trajectories, values and gradients are finite; deterministic steps score 0 with gradient 0"
    ts = scheduler.timesteps if len(scheduler.timesteps) < 60 else scheduler.timesteps[-20:]
    x, out = data(seed, (len(ts), 1, 2, 2))
    out.requires_grad_()
    for kwargs in (dict(generator=rng(seed)), dict(prev_sample=x)):
        step = ddim_step(scheduler, out, ts, x, eta, reduction=reduction, **kwargs)
        grad, = torch.autograd.grad(step.log_prob.sum(), out)
        for value in (step.mean, step.std, step.prev_sample, step.log_prob, grad):
            assert value.isfinite().all()
        certain = step.std == 0
        assert not step.log_prob[certain].any() and not grad[certain].any()

def test_trap_2_deterministic_steps_still_denoise():
    scheduler, (x, out) = make(20, timestep_spacing="linspace"), data()
    step = ddim_step(scheduler, out, 0, x, 1., generator=rng())
    assert torch.equal(step.prev_sample, step.mean)
    close(step.prev_sample, diffusers_step(scheduler, out, 0, x, 1., generator=rng()))

@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("n", [5, 7, 20, 30])
def test_zero_terminal_snr_has_no_nan(schedule, n):
    """At ᾱ = 0 the root in the step's mean is zero up to rounding; diffusers takes it of a negative
    number and returns NaN"""
    scheduler = make(
        n, beta_schedule=schedule, rescale_betas_zero_snr=True, prediction_type="v_prediction",
        timestep_spacing="trailing"
    )
    x, out = data()
    step = ddim_step(scheduler, out, 999, x, 1., generator=rng())
    assert step.prev_sample.isfinite().all() and step.log_prob.isfinite().all()
    theirs = diffusers_step(scheduler, out, 999, x, 1., generator=rng())
    if theirs.isfinite().all(): close(step.prev_sample, theirs, 1e-4)  # a root of 1e-8 may be 1e-4

# --- refusals ---

good = dict(zip(("sample", "model_output"), data())) | dict(scheduler=make(), timestep=501, eta=1.)
@pytest.mark.parametrize("change, message", [
    (dict(scheduler=DDIMScheduler(**SD)), "set_timesteps"),
    (dict(scheduler=EulerDiscreteScheduler()), "must be a DDIMScheduler.*EulerDiscreteScheduler"),
    (dict(scheduler=make(prediction_type="score")), "prediction_type must be .*'score'"),
    (dict(eta=-0.1), "eta must be between 0 and 1, not -0.1"),
    (dict(eta=1.1), "eta must be between 0 and 1, not 1.1"),
    (dict(eta=math.nan), "eta must be"),
    (dict(timestep=1000), "timestep must be between 0 and 999"),
    (dict(timestep=-1), "timestep must be between 0 and 999"),
    (dict(timestep=torch.tensor([1, 51])), r"one per sample \(3\), not 2"),
    (dict(model_output=data()[1][:, :2]), "model_output and sample must have one shape"),
    (dict(prev_sample=data()[0], generator=rng()), "not both"),
    (dict(prev_sample=data()[0][:1]), "one shape"),
    (dict(reduction="average"), "'mean' or 'sum'"),
])
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message): ddim_step(**{**good, **change})

def test_trailing_with_61_steps_is_refused():
    "Its list ends on timestep -1, which diffusers reads as 999"
    scheduler = make(61, timestep_spacing="trailing")
    assert scheduler.timesteps[-1] == -1
    with pytest.raises(ValueError, match="another number of steps"):
        step_std(scheduler, scheduler.timesteps, 1.0)

# --- Trajectories ---

def trajectories(N=3, T=5):
    g = rng()
    return Trajectories(
        torch.randn(N, T + 1, 2, 4, 4, generator=g), torch.arange(T).flip(0) * 50 + 1,
        torch.randn(N, T, generator=g), torch.ones(T, dtype=torch.bool), torch.arange(N), ["cat"] * N,
        [{}] * N
    )

@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=20))
@quick
def test_transitions(pairs):
    o = trajectories()
    samples, steps = torch.tensor(pairs).T
    x, t, action, log_prob = o.transitions(samples, steps)
    for m, (i, k) in enumerate(pairs):
        assert torch.equal(x[m], o.latents[i, k]) and torch.equal(action[m], o.latents[i, k + 1])
        assert t[m] == o.timesteps[k] and log_prob[m] == o.log_probs[i, k]

def test_trajectories_is_a_dataclass():
    o = trajectories()
    assert len(o) == 3 and o.images is None
    assert len(dataclasses.replace(o, latents=o.latents[:2])) == 2
