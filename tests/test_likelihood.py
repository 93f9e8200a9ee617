"The Gaussian's log-density against `torch.distributions`, in every precision, and its refusals."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from ddpo_nb.likelihood import gaussian_kl, gaussian_log_prob

quick = settings(max_examples=40, deadline=None)

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)
seeds = st.integers(0, 2**32)
log10_std = st.floats(-4, 4)

def batch(seed, shape, dtype=torch.float64, samples=3):
    "x, mean and one std a sample"
    g = torch.Generator().manual_seed(seed)
    x, mean = torch.randn(2, samples, *shape, generator=g, dtype=dtype)
    return x, mean, torch.rand(samples, generator=g, dtype=dtype) + 0.1

def reference(x, mean, std):
    "The exact log-density, by torch.distributions"
    std = std.reshape(-1, *(1,) * (x.ndim - 1)).expand_as(x)
    return Independent(Normal(mean, std), x.ndim - 1).log_prob(x)

@quick
@given(seeds, shapes, log10_std)
def test_equals_torch_distributions(seed, shape, scale):
    x, mean, std = batch(seed, shape)
    std = std * 10**scale
    torch.testing.assert_close(
        gaussian_log_prob(x, mean, std, "sum"), reference(x, mean, std), rtol=1e-6, atol=1e-9
    )

@quick
@given(seeds, shapes)
def test_trap_1_sum_is_n_times_mean(seed, shape):
    x, mean, std = batch(seed, shape)
    torch.testing.assert_close(
        gaussian_log_prob(x, mean, std, "sum"), math.prod(shape) * gaussian_log_prob(x, mean, std, "mean")
    )

def test_trap_1_the_published_reduction_is_the_default():
    x, mean, std = batch(0, (8, 8, 8))
    assert torch.equal(gaussian_log_prob(x, mean, std), gaussian_log_prob(x, mean, std, "mean"))

@pytest.mark.parametrize("n", [512, 16_384])
def test_trap_1_exact_ratio_overflows_where_the_mean_stays_near_one(n):
    "A draw that sits one standard deviation nearer to the new mean in each dimension"
    x, old, new = torch.ones(1, n), torch.zeros(1, n), torch.ones(1, n)
    ratio = {
        r: (gaussian_log_prob(x, new, 1.0, r) - gaussian_log_prob(x, old, 1.0, r)).exp().item()
        for r in ("sum", "mean")
    }
    assert math.isinf(ratio["sum"])
    assert ratio["mean"] == pytest.approx(math.exp(0.5), rel=1e-6)

@quick
@given(seeds, st.floats(0.01, 100))
def test_one_std_for_all_is_one_std_each(seed, std):
    x, mean, _ = batch(seed, (2, 3))
    one, each = gaussian_log_prob(x, mean, std), gaussian_log_prob(
        x, mean, torch.full((3,), std, dtype=x.dtype)
    )
    assert torch.equal(one, each)
    assert torch.equal(one, gaussian_log_prob(x, mean, torch.tensor(std, dtype=x.dtype)))

@quick
@given(seeds)
def test_samples_do_not_see_each_other(seed):
    x, mean, std = batch(seed, (4, 3))
    alone = torch.cat([gaussian_log_prob(x[i:i+1], mean[i:i+1], std[i:i+1]) for i in range(3)])
    torch.testing.assert_close(gaussian_log_prob(x, mean, std), alone, rtol=1e-12, atol=1e-12)

@quick
@given(seeds, st.sampled_from([torch.float16, torch.bfloat16]), st.sampled_from(["mean", "sum"]))
def test_half_precision_is_scored_in_fp32(seed, dtype, reduction):
    x, mean, std = (o.to(dtype) for o in batch(seed, (8, 8, 8), torch.float32))
    scored = gaussian_log_prob(x, mean, std, reduction)
    assert scored.dtype == torch.float32
    assert torch.equal(scored, gaussian_log_prob(x.float(), mean.float(), std.float(), reduction))

def test_half_precision_latents_against_fp32_means():
    "The mean keeps its own precision: it must not be rounded to the latent's"
    x, mean, std = batch(0, (8, 8, 8), torch.float32)
    assert torch.equal(gaussian_log_prob(x.half(), mean, std), gaussian_log_prob(x.half().float(), mean, std))
    assert not torch.equal(
        gaussian_log_prob(x.half(), mean, std), gaussian_log_prob(x.half(), mean.half(), std)
    )

def test_fp64_stays_fp64():
    x, mean, std = batch(0, (4,))
    assert gaussian_log_prob(x, mean, std).dtype == torch.float64
    assert gaussian_log_prob(x, mean, std.float()).dtype == torch.float64

def test_autocast_does_not_lower_precision():
    x, mean, std = batch(0, (8, 8, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16): inside = gaussian_log_prob(x, mean, std)
    assert torch.equal(inside, gaussian_log_prob(x, mean, std))

@quick
@given(seeds)
def test_gradient_is_the_pull_towards_the_point(seed):
    x, mean, std = batch(seed, (5,))
    mean.requires_grad_()
    gaussian_log_prob(x, mean, std, "sum").sum().backward()
    torch.testing.assert_close(mean.grad, (x - mean.detach()) / std[:, None]**2)

def test_highest_at_the_mean():
    _, mean, std = batch(0, (6,))
    torch.testing.assert_close(gaussian_log_prob(mean, mean, std), -std.log() - 0.5 * math.log(2 * math.pi))

def test_density_integrates_to_one():
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    p = gaussian_log_prob(x, torch.full_like(x, 0.7), 1.3, "sum").exp()
    assert torch.trapezoid(p, x).item() == pytest.approx(1, abs=1e-9)

def test_no_samples(): assert gaussian_log_prob(torch.zeros(0, 4), torch.zeros(0, 4), 1.).shape == (0,)

x, mean, std = batch(0, (2, 2))
@pytest.mark.parametrize("args, message", [
    ((x, mean[:1], std), r"one shape.*\(3, 2, 2\) and \(1, 2, 2\)"),
    ((x[0, 0, 0], mean[0, 0, 0], 1.), "samples first"),
    ((x, mean, std[:2]), r"one per sample \(3\), not 2"),
    ((x, mean, 0.), "std must be positive, not 0"),
    ((x, mean, -1), "std must be positive, not -1"),
    ((x, mean, torch.tensor([1., 0., 1.])), "std must be positive, not 0"),
    ((x, mean, float("nan")), "std must be positive, not nan"),
    ((x, mean, std, "average"), "'mean' or 'sum', not 'average'"),
])
def test_bad_input(args, message):
    with pytest.raises(ValueError, match=message): gaussian_log_prob(*args)

@quick
@given(seeds, shapes)
def test_the_divergence_is_that_of_torch(seed, shape):
    mean, other, std = batch(seed, shape)
    scale = std.reshape(-1, *(1,) * len(shape)).expand_as(mean)
    exact = kl_divergence(*(Independent(Normal(m, scale), len(shape)) for m in (mean, other)))
    torch.testing.assert_close(gaussian_kl(mean, other, std, "sum"), exact)
    torch.testing.assert_close(gaussian_kl(mean, other, std), exact / math.prod(shape))
    assert (gaussian_kl(mean, mean, std) == 0).all()

def test_a_small_divergence_is_not_lost_in_rounding():
    "As a difference of two log-densities in fp32 it would be."
    mean, other = torch.zeros(1, 512), torch.full((1, 512), 1e-4)
    assert gaussian_kl(mean, other, 1.).item() == pytest.approx(0.5e-8, rel=1e-5)

@pytest.mark.parametrize(
    "args,says",
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4), 1.0), "one shape"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), 0.0), "std must be positive"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), 1.0, "max"), "reduction"),
    ],
)
def test_divergence_of_what_does_not_fit(args, says):
    with pytest.raises(ValueError, match=says): gaussian_kl(*args)
