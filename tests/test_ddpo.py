"DDPO's objectives: the clip, the flat transitions, and what must hold before the first update, on Emoji SD."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from ddpo_nb.ddpo import DDPO, DDPOSF, clipped_surrogate
from ddpo_nb.mdp import ddim_step
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import InputError
from ddpo_nb.rollout import rollout, sample_generator
from ddpo_nb.rwr import TinyDiffusion

few = settings(max_examples=60, deadline=None)
finite, ratios, clips = st.floats(-10, 10), st.floats(0.01, 5), st.floats(1e-4, 0.9)

def gen(seed=0): return torch.Generator().manual_seed(seed)

def grads(policy, objective, batch, examples, micro=None):
    "Gradient of the mean loss, in micro-batches, as one flat vector."
    m, total = len(examples["sample"]), 0
    for i in range(0, m, micro or m):
        loss, _ = objective.loss(policy, batch, {k: v[i:i + (micro or m)] for k, v in examples.items()})
        total = total + torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss.sum() / m, policy.trainable_parameters())]
        )
    return total

def difference(a, b): return ((a - b).norm() / b.norm()).item()

# ---- the clip ----

@few
@given(finite, ratios, clips)
def test_surrogate_is_the_pessimists_choice(A, ratio, clip):
    A, ratio = torch.tensor([A], dtype=torch.float64), torch.tensor([ratio], dtype=torch.float64)
    loss, plain, cut = clipped_surrogate(A, ratio, clip), -A * ratio, -A * ratio.clamp(1 - clip, 1 + clip)
    assert loss >= plain and loss >= cut and (loss == plain or loss == cut)

@few
@given(finite.filter(lambda a: abs(a) > 1e-3), ratios, clips)
def test_clipped_examples_have_no_gradient_and_the_others_all_of_it(A, ratio, clip):
    rho = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(
        clipped_surrogate(torch.tensor([A], dtype=torch.float64), rho, clip).sum(), rho
    )
    cut = (A > 0 and ratio > 1 + clip) or (A < 0 and ratio < 1 - clip)
    if min(abs(ratio - 1 - clip), abs(ratio - 1 + clip)) > 1e-9: assert slope.item() == (0 if cut else -A)

@few
@given(finite, clips)
def test_at_ratio_one_the_surrogate_is_minus_the_advantage(A, clip):
    assert clipped_surrogate(torch.tensor([A]), torch.ones(1), clip).item() == pytest.approx(-A, rel=1e-6)

# ---- settings ----

@pytest.mark.parametrize("cls", [DDPO, DDPOSF])
@pytest.mark.parametrize(
    "name,bad",
    [
        ("clip_range", 0), ("clip_range", -1e-4), ("clip_range", math.nan), ("adv_clip_max", 0),
        ("adv_clip_max", -5), ("timestep_fraction", 0), ("timestep_fraction", -0.5),
        ("timestep_fraction", 1.1), ("timestep_fraction", math.nan)
    ],
)
def test_bad_settings_fail_at_once_and_say_why(cls, name, bad):
    with pytest.raises(InputError, match=f"^{name}: .*; give "): cls(**{name: bad})

@pytest.mark.parametrize("cls", [DDPO, DDPOSF])
def test_an_unknown_step_weighting_is_named(cls):
    with pytest.raises(InputError, match="^step_weighting: there is no 'late'; choose from equal, variance"):
        cls(step_weighting="late")

def test_only_the_score_function_is_on_policy(): assert DDPOSF().on_policy and not DDPO().on_policy

# ---- log-ratios that do not lean (GRPO-Guard) ----

@pytest.mark.parametrize("reduction", ["mean", "sum"])
@few
@given(st.floats(-0.3, 0.3), st.floats(-0.3, 0.3), st.integers(0, 2**16))
def test_the_normalised_log_ratio_is_the_noise_along_the_way_that_the_mean_went(reduction, m, s, seed):
    old = TinyDiffusion([0.2, -0.3], [0.7, 0.5], num_steps=6, reduction=reduction)
    new = TinyDiffusion([0.2 + m, -0.3], [0.7, 0.5 * math.exp(s)], num_steps=6, reduction=reduction)
    batch, objective = old.sample(8, gen(seed)), DDPO(step_weighting="ratio-norm")
    ex = objective.examples(new, batch, torch.ones(8), gen())
    i, k = ex["sample"], ex["step"]
    with torch.no_grad():
        ratio = objective.loss(new, batch, ex)[1]["ratio"]
        x, t, prev, _ = batch.transitions(i, k)
        was, now = old.step(x, t, prev_sample=prev), new.step(x, t, prev_sample=prev)
    noise = (prev - was.mean) / was.std[:, None]
    along = (noise * (now.mean - was.mean)).sum(1) / (2 if reduction == "mean" else 1)
    torch.testing.assert_close(ratio.log(), along, rtol=1e-6, atol=1e-9)

def test_the_plain_log_ratio_leans_and_the_normalised_one_does_not():
    old, new = (TinyDiffusion([m, -0.3], [0.7, 0.5], num_steps=6) for m in (0.2, 0.4))
    batch, z = old.sample(20_000, gen()), {}
    for weighting in ("equal", "ratio-norm"):
        objective = DDPO(step_weighting=weighting)
        ex = objective.examples(new, batch, torch.ones(20_000), gen())
        with torch.no_grad(): log = objective.loss(new, batch, ex)[1]["ratio"].log()
        z[weighting] = (log.mean() / log.std() * len(log)**0.5).item()
    assert z["equal"] < -10 and abs(z["ratio-norm"]) < 4

def test_means_take_room_in_a_plan_and_only_where_they_are_kept():
    states, both = (DDPO(step_weighting=o).latents_kept(10) for o in ("variance", "ratio-norm"))
    assert (states, both) == (11, 21)
    assert DDPOSF(step_weighting="ratio-norm").latents_kept(10) == 11

def test_means_that_are_not_there_are_asked_for():
    policy = TinyDiffusion([0.2, -0.3], [0.7, 0.5], num_steps=6)
    batch, objective = policy.sample(4, gen()), DDPO(step_weighting="ratio-norm")
    batch.means = None
    ex = objective.examples(policy, batch, torch.ones(4), gen())
    with pytest.raises(InputError, match="^step_weighting: 'ratio-norm' needs the mean"):
        objective.loss(policy, batch, ex)
    DDPOSF(step_weighting="ratio-norm").loss(policy, batch, ex)  # has no ratio, and needs none

# ---- examples ----

@pytest.fixture(scope="module")
def tiny():
    policy = TinyDiffusion([0.2, -0.3], [0.7, 0.5], num_steps=10)
    return policy, policy.sample(6, gen())

@pytest.mark.parametrize("fraction,keep", [(1.0, 10), (0.5, 5), (0.29, 2), (0.01, 1)])
def test_timestep_fraction_keeps_distinct_steps_of_every_sample(tiny, fraction, keep):
    policy, batch = tiny
    ex = DDPO(timestep_fraction=fraction).examples(policy, batch, torch.arange(6.), gen())
    assert ex["sample"].tolist() == [i for i in range(6) for _ in range(keep)]
    for i in range(6): assert ex["step"][ex["sample"] == i].unique().numel() == keep

def test_each_sample_draws_its_own_steps(tiny):
    policy, batch = tiny
    steps = (
        DDPO(timestep_fraction=0.5)
        .examples(policy, batch, torch.zeros(6), gen())["step"]
        .reshape(6, 5)
        .sort(1)
        .values
    )
    assert len({tuple(o) for o in steps.tolist()}) > 1

def test_examples_come_from_the_generator_alone(tiny):
    policy, batch = tiny
    one, two, other = (
        DDPO(timestep_fraction=0.5).examples(policy, batch, torch.zeros(6), gen(s))["step"] for s in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)

def test_advantages_are_cut_and_belong_to_their_sample(tiny):
    policy, batch = tiny
    A = torch.tensor([-9., -1., 0., 1., 2., 9.])
    ex = DDPO(adv_clip_max=3.).examples(policy, batch, A, gen())
    assert torch.equal(ex["advantage"], A.clamp(-3, 3)[ex["sample"]])

def ends_on_zero(policy):
    "The same policy with a scheduler that lands exactly on t = 0: its last step has no noise."
    from diffusers import DDIMScheduler
    old = policy.scheduler
    policy.scheduler = DDIMScheduler.from_config(old.config, steps_offset=0, set_alpha_to_one=True)
    policy.scheduler.set_timesteps(old.num_inference_steps)
    policy.timesteps = policy.scheduler.timesteps
    policy.stochastic = torch.ones(len(policy.timesteps), dtype=torch.bool); policy.stochastic[-1] = False
    return policy

@pytest.mark.parametrize("cls", [DDPO, DDPOSF])
def test_trap_2_zero_variance_at_the_last_step_is_left_out(cls):
    policy = ends_on_zero(TinyDiffusion([0.2], [0.7], num_steps=5))
    batch = policy.sample(4, gen())
    assert policy.step(batch.latents[:, -2], policy.timesteps[-1:].expand(4)).std.eq(0).all()
    ex = cls().examples(policy, batch, torch.randn(4, generator=gen()), gen())
    assert len(ex["step"]) == 4 * 4 and 4 not in ex["step"]
    loss, figures = cls().loss(policy, batch, ex)
    assert loss.isfinite().all() and all(v.isfinite().all() for v in figures.values())
    assert grads(policy, cls(), batch, ex).isfinite().all()

def test_trap_2_a_wholly_deterministic_sampler_has_no_policy_gradient(tiny):
    policy, batch = tiny
    batch = type(batch)(
        batch.latents, batch.timesteps, batch.log_probs, torch.zeros(10, dtype=torch.bool),
        batch.conditioning, batch.prompts, batch.metadata
    )
    with pytest.raises(ValueError, match="no step .* is stochastic"):
        DDPO().examples(policy, batch, torch.zeros(6), gen())

# ---- on Emoji SD ----

@pytest.fixture(scope="module")
def emoji():
    torch.manual_seed(0)  # LoRA's first weights
    policy = StableDiffusionPolicy(load_pipeline(), num_steps=20, guidance_scale=3.)
    batch = rollout(
        policy, ["a cat", "a dog on a red background"], [sample_generator(0, 0, i) for i in range(2)]
    )
    return policy, batch, torch.tensor([0.8, -1.2])

@pytest.fixture
def restored(emoji):
    "The weights that sampled come back after the test."
    before = [p.detach().clone() for p in emoji[0].trainable_parameters()]
    yield emoji
    with torch.no_grad():
        for p, b in zip(emoji[0].trainable_parameters(), before): p.copy_(b)

@pytest.mark.parametrize("micro", [3, 40])
def test_trap_3_ratio_is_one_and_nothing_is_clipped_before_an_update(emoji, micro):
    policy, batch, A = emoji
    ex, seen = DDPO().examples(policy, batch, A, gen()), []
    for i in range(0, 40, micro):
        with torch.no_grad():
            seen.append(DDPO().loss(policy, batch, {k: v[i : i + micro] for k, v in ex.items()})[1])
    ratio, clipped, kl = (torch.cat([s[k] for s in seen]) for k in ("ratio", "clip_fraction", "approx_kl"))
    assert (ratio - 1).abs().max() < 1e-6 and clipped.sum() == 0 and kl.max() < 1e-12

def test_without_guidance_in_training_the_ratio_compares_two_policies(emoji):
    policy, batch, A = emoji
    unguided = DDPO(guidance=False)
    with torch.no_grad():
        ratio = unguided.loss(policy, batch, unguided.examples(policy, batch, A, gen()))[1]["ratio"]
    assert (ratio - 1).abs().max() > 1e-4

@pytest.mark.parametrize("objective,micro", [(DDPO(), 6), (DDPO(timestep_fraction=0.3), 1), (DDPOSF(), 16)])
def test_summed_gradient_does_not_depend_on_the_micro_batch(emoji, objective, micro):
    policy, batch, A = emoji
    ex = objective.examples(policy, batch, A, gen())
    assert difference(grads(policy, objective, batch, ex, micro), grads(policy, objective, batch, ex)) < 1e-5

@pytest.mark.parametrize("objective", [DDPO(), DDPOSF(), DDPO(timestep_fraction=0.6)])
def test_in_float64_the_micro_batch_changes_nothing_at_all(tiny, objective):
    policy, batch = tiny
    ex = objective.examples(policy, batch, torch.randn(6, generator=gen()).double(), gen())
    for micro in (1, 7):
        assert (
            difference(grads(policy, objective, batch, ex, micro), grads(policy, objective, batch, ex))
            < 1e-12
        )

def test_score_function_and_importance_sampling_agree_at_ratio_one(emoji):
    policy, batch, A = emoji
    ex = DDPO().examples(policy, batch, A, gen())
    assert difference(grads(policy, DDPO(), batch, ex), grads(policy, DDPOSF(), batch, ex)) < 1e-5

def test_an_update_makes_good_actions_likelier_and_bad_ones_less(restored):
    policy, batch, A = restored
    ex = DDPO().examples(policy, batch, A, gen())
    loss, _ = DDPO().loss(policy, batch, ex)
    step = torch.autograd.grad(loss.mean(), policy.trainable_parameters())
    size = torch.cat([g.flatten() for g in step]).norm()
    with torch.no_grad():
        for p, g in zip(policy.trainable_parameters(), step): p -= 0.01 * g / size
        log_ratio = DDPO().loss(policy, batch, ex)[1]["ratio"].log()
    assert (log_ratio * ex["advantage"]).mean() > 0

def test_trap_1_mean_or_sum_decides_what_a_clip_of_1e_4_means(restored):
    """A move well inside a clip of the per-dimension mean puts nearly every exact ratio outside, with n =
    512 dimensions."""
    policy, batch, A = restored
    clip, weights = DDPO(clip_range=1e-4), policy.trainable_parameters()
    before, moves = [p.detach().clone() for p in weights], [
        torch.randn(p.shape, generator=gen(5)) for p in weights
    ]
    def figures(batch, size):
        with torch.no_grad():
            for p, b, m in zip(weights, before, moves): p.copy_(b + size * m)
            return clip.loss(policy, batch, clip.examples(policy, batch, A, gen()))[1]
    size = 3e-4
    # the median mean log-ratio becomes about 3e-5
    size *= 3e-5 / figures(batch, size)["ratio"].double().log().abs().median().item()
    mean = figures(batch, size)
    policy.configure(num_steps=20, guidance_scale=3., reduction="sum")
    try:
        figures(batch, 0.)
        again = rollout(policy, batch.prompts, [sample_generator(0, 0, i) for i in range(2)])
        sum_ = figures(again, size)
    finally: policy.configure(num_steps=20, guidance_scale=3.)
    assert torch.equal(again.latents, batch.latents) and math.prod(policy.latent_shape) == 512
    torch.testing.assert_close(
        sum_["ratio"].double().log(), 512 * mean["ratio"].double().log(), rtol=0.02, atol=512 * 5e-7
    )
    assert mean["clip_fraction"].mean() < 0.4 and sum_["clip_fraction"].mean() > 0.9

# ---- figures ----

def test_figures_are_what_their_names_say(tiny):
    policy, batch = tiny
    objective = DDPO(clip_range=0.1)
    ex = objective.examples(policy, batch, torch.randn(6, generator=gen()), gen())
    other = TinyDiffusion([0.3, -0.3], [0.7, 0.5], num_steps=10)
    loss, f = objective.loss(other, batch, ex)
    x, t, prev, old = batch.transitions(ex["sample"], ex["step"])
    dist = torch.distributions.Normal(other.step(x, t).mean, other.step(x, t).std[:, None])
    log_ratio = dist.log_prob(prev).sum(1) - old
    torch.testing.assert_close(f["ratio"].log(), log_ratio.detach())
    # TRL's figure, of the ratio as it is reduced
    torch.testing.assert_close(f["approx_kl"], 0.5 * log_ratio.detach()**2)
    # of a sum: the divergence itself
    torch.testing.assert_close(f["kl_step"], f["approx_kl"])
    assert (
        torch.equal(f["clip_fraction"], ((f["ratio"] - 1).abs() > 0.1).float())
        and 0 < f["clip_fraction"].mean() < 1
    )
    assert loss.requires_grad and not any(v.requires_grad for v in f.values())

@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_step_is_the_divergence_in_nats_whatever_the_reduction(reduction):
    "A mean over D dimensions makes the log-ratio D times smaller, and its square D²: the figure undoes it."
    D, n = 6, 40_000
    sampler, moved = (
        TinyDiffusion([m] * D, [0.7] * D, num_steps=3, reduction=reduction) for m in (0.0, 0.02)
    )
    batch = sampler.sample(n, gen())
    for step in range(3):
        ex = dict(sample=torch.arange(n), step=torch.full((n,), step), advantage=torch.zeros(n))
        with torch.no_grad():
            f = DDPO().loss(moved, batch, ex)[1]
            x, t, prev, _ = batch.transitions(ex["sample"], ex["step"])
            one, other = (p.step(x, t, prev_sample=prev) for p in (sampler, moved))
        exact = ((one.mean - other.mean)**2).sum(1).div(2 * one.std**2).mean().item()
        spread = f["kl_step"].std().item() / n**0.5
        assert abs(f["kl_step"].mean().item() - (exact + exact**2 / 2)) < 4 * spread and exact > 20 * spread
        assert (f["kl_step"] / f["approx_kl"]).mean().item() == pytest.approx(
            D**2 if reduction == "mean" else 1
        )

def test_the_simple_loss_drops_the_factor_that_turns_noise_into_divergence():
    """Ho et al. 2020, eq. 12: β²/(2σ²α(1−ᾱ)) ‖ε−ε_θ‖² is the divergence of two steps at η = 1, from
    noises ε and ε_θ."""
    policy = TinyDiffusion([0.0] * 5, [1.0] * 5, num_steps=10)
    s, g = policy.scheduler, gen()
    abar = s.alphas_cumprod[policy.timesteps]
    alpha = abar / torch.cat([abar[1:], s.final_alpha_cumprod[None].double()])
    x, eps, other = (torch.randn(10, 5, generator=g, dtype=torch.float64) for _ in range(3))
    a, b = (ddim_step(s, e, policy.timesteps, x, 1.0, prev_sample=x) for e in (eps, other))
    kl = torch.distributions.kl_divergence(
        *(torch.distributions.Normal(o.mean, o.std[:, None]) for o in (a, b))
    ).sum(1)
    factor = (1 - alpha)**2 / (2 * a.std**2 * alpha * (1 - abar))
    torch.testing.assert_close(kl, factor * ((eps - other)**2).sum(1), rtol=1e-6, atol=0)
    assert ((factor * 2 * a.std**2).log().diff().abs() > 0.01).any()   # so the factor is not 1/2σ² alone
