import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from ddpo_nb.advantages import (BASELINES, PerPromptStatTracker, above_others, group_relative, leave_one_out,
                                normalize)

rewards = arrays(np.float64, st.integers(2, 40), elements=st.floats(-100, 100)).filter(
    lambda r: r.std() > 1e-2
)

@settings(max_examples=60, deadline=None)
@given(rewards, st.floats(.1, 1000), st.floats(-1000, 1000))
def test_normalize_ignores_shift_and_scale(r, scale, shift):
    np.testing.assert_allclose(normalize(scale*r + shift), normalize(r), rtol=2e-3, atol=1e-6)

@settings(max_examples=60, deadline=None)
@given(rewards)
def test_normalize_has_mean_0_and_std_1(r):
    a = normalize(r)
    assert abs(a.mean()) < 1e-8 and abs(a.std() - 1) < 1e-3
    assert (np.argsort(a, kind="stable") == np.argsort(r, kind="stable")).all() or len(set(a)) < len(a)

def test_equal_rewards_have_no_advantage():
    assert (normalize([.3]*7) == 0).all() or abs(normalize([.3]*7)).max() < 1e-9
    assert (PerPromptStatTracker(4, 1).update(["a"]*3, [2., 2., 2.]) == 0).all()

def test_takes_lists_and_keeps_inputs():
    r = [1, 2, 3]
    assert normalize(r).dtype == np.float64 and r == [1, 2, 3]

def test_per_prompt_by_hand():
    tracker = PerPromptStatTracker(buffer_size=3, min_count=2)
    a = tracker.update(["a", "b", "a"], [1., 10., 3.], eps=0)
    # b was seen once: the batch's statistics
    np.testing.assert_allclose(a, [-1, (10 - 14/3)/np.std([1, 10, 3]), 1])
    a = tracker.update(["a", "a"], [5., 7.], eps=0)                         # the buffer of 3 holds 3, 5, 7
    np.testing.assert_allclose(a, (np.array([5, 7]) - 5)/np.std([3, 5, 7]))

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-100, 100)), min_size=1, max_size=30))
def test_an_empty_memory_with_room_normalises_each_prompt_alone(pairs):
    prompts, r = [p for p, _ in pairs], np.array([v for _, v in pairs])
    a = PerPromptStatTracker(30, 1).update(prompts, r)
    for p in set(prompts):
        mine = np.array([o == p for o in prompts])
        np.testing.assert_allclose(a[mine], normalize(r[mine], eps=1e-6), atol=1e-9)

@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-100, 100)), min_size=1, max_size=20),
    st.integers(-50, 50),
)
def test_per_prompt_ignores_a_shift_of_one_prompt(pairs, shift):
    prompts, r = [p for p, _ in pairs], np.array([v for _, v in pairs], dtype=float)
    moved = r + shift*np.array([p == "a" for p in prompts])
    np.testing.assert_allclose(
        PerPromptStatTracker(20, 1).update(prompts, moved), PerPromptStatTracker(20, 1).update(prompts, r),
        atol=1e-6
    )

@settings(max_examples=30, deadline=None)
@given(rewards, st.randoms())
def test_order_within_the_batch_does_not_matter(r, random):
    prompts = [random.choice("ab") for _ in r]
    order = random.sample(range(len(r)), len(r))
    once = PerPromptStatTracker(len(r), min(3, len(r))).update(prompts, r)
    again = PerPromptStatTracker(len(r), min(3, len(r))).update([prompts[i] for i in order], r[order])
    np.testing.assert_allclose(again, once[order], atol=1e-8)

def test_buffer_forgets():
    tracker = PerPromptStatTracker(4, 1)
    for i in range(10): tracker.update(["a"], [float(i)])
    assert list(tracker.rewards["a"]) == [6, 7, 8, 9]

def test_bad_input():
    with pytest.raises(ValueError, match="as many rewards"): PerPromptStatTracker().update(["a", "b"], [1.])
    with pytest.raises(ValueError, match="buffer_size"): PerPromptStatTracker(0, 0)
    with pytest.warns(UserWarning, match="never holds"): PerPromptStatTracker(4, 8)

# Baselines from the same prompt's samples, and the floor

pairs = st.lists(st.tuples(st.sampled_from("abcd"), st.floats(-100, 100)), min_size=1, max_size=24).map(
    lambda o: ([p for p, _ in o], np.array([r for _, r in o]))
)
within = pytest.mark.parametrize(
    "advantages", [group_relative, leave_one_out], ids=["group", "leave-one-out"]
)
def mine(prompts, p): return np.array([o == p for o in prompts])

@within
@settings(max_examples=60, deadline=None)
@given(pairs)
def test_a_prompt_has_as_much_praise_as_blame(advantages, data):
    prompts, r = data
    a = advantages(prompts, r)
    assert a.shape == r.shape and a.dtype == np.float64 and np.isfinite(a).all()
    for p in set(prompts): assert abs(a[mine(prompts, p)].sum()) < 1e-6

@within
@settings(max_examples=60, deadline=None)
@given(pairs, st.dictionaries(st.sampled_from("abcd"), st.integers(-50, 50)))
def test_a_prompts_level_does_not_matter(advantages, data, levels):
    prompts, r = data
    r = r.round(2)  # differences that a shift does not round away
    moved = r + np.array([levels.get(p, 0) for p in prompts])
    np.testing.assert_allclose(advantages(prompts, moved), advantages(prompts, r), atol=1e-6)

@within
@settings(max_examples=60, deadline=None)
@given(pairs, st.randoms())
def test_the_samples_may_come_in_any_order(advantages, data, random):
    prompts, r = data
    order = random.sample(range(len(r)), len(r))
    np.testing.assert_allclose(
        advantages([prompts[i] for i in order], r[order]), advantages(prompts, r)[order], atol=1e-6
    )

@within
def test_nothing_to_compare_with_is_no_advantage(advantages):
    assert advantages(["a", "b", "c"], [1., 5., -3.]).tolist() == [0, 0, 0]
    assert advantages(["a", "a", "a", "b"], [.1, .1, .1, 9e8]).tolist() == pytest.approx([0] * 4, abs=1e-9)
    assert advantages(["a", "b", "a"], [1., 7., 3.])[1] == 0

@settings(max_examples=60, deadline=None)
@given(pairs)
def test_group_relative_is_each_prompt_normalised_by_itself(data):
    prompts, r = data
    for p in set(prompts):
        np.testing.assert_allclose(
            group_relative(prompts, r)[mine(prompts, p)], normalize(r[mine(prompts, p)]), atol=1e-6
        )

@settings(max_examples=60, deadline=None)
@given(pairs)
def test_the_others_mean_is_the_groups_but_for_a_factor(data):
    prompts, r = data
    above = above_others(prompts, r)
    for p in set(prompts):
        i, k = mine(prompts, p), prompts.count(p)
        if k == 1: assert np.isnan(above[i]).all()
        else: np.testing.assert_allclose(above[i], k / (k - 1) * (r[i] - r[i].mean()), atol=1e-9)

def test_leave_one_out_by_hand():
    a = leave_one_out(["a", "b", "a", "b", "c"], [1., 10., 3., 20., 99.])  # differences −2, −10, 2, 10
    np.testing.assert_allclose(a, np.array([-2, -10, 2, 10, 0]) / np.sqrt((4 + 100) / 2), rtol=1e-6)

@settings(max_examples=60, deadline=None)
@given(pairs)
def test_leave_one_out_has_one_scale_for_all(data):
    prompts, r = data
    above, a = above_others(prompts, r), leave_one_out(prompts, r)
    compared = ~np.isnan(above)
    assume(compared.any() and np.nanstd(above) > 1e-2)
    assert np.sqrt(np.mean(a[compared]**2)) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(a * np.sqrt(np.mean(above[compared]**2)), np.nan_to_num(above), rtol=1e-3)

@pytest.mark.parametrize("k", [2, 3, 8])
def test_leave_one_out_is_unbiased_and_the_group_mean_is_short(k):
    "N(0, 1) with reward (x − 2)² + the prompt's level: the gradient is −4"
    g, batches = np.random.default_rng(k), 60_000 // k
    x = g.normal(size=(batches, k))
    r, prompts = (x - 2)**2 + 10 * g.normal(size=(batches, 1)), np.repeat(np.arange(batches), k).tolist()
    gradients = (above_others(prompts, r.ravel()).reshape(x.shape) * x).mean(1)
    short = ((r - r.mean(1, keepdims=True)) * x).mean(1)
    error = lambda o: 4 * o.std() / batches**.5
    assert abs(gradients.mean() + 4) < error(gradients) and abs(short.mean() + 4 * (k - 1) / k) < error(short)
    assert abs(short.mean() + 4) > error(short)  # the test tells the two apart

floors = pytest.mark.parametrize(
    "advantages",
    [
        lambda p, r, m: normalize(r, min_std=m), group_relative, leave_one_out,
        lambda p, r, m: PerPromptStatTracker(30, 2, m).update(p, r)
    ],
    ids=["normalize", "group", "leave-one-out", "history"],
)

@floors
@settings(max_examples=60, deadline=None)
@given(pairs, st.floats(0, 50), st.floats(0, 50))
def test_a_higher_floor_never_makes_an_advantage_larger(advantages, data, low, high):
    low, high = sorted((low, high))
    a, b = (advantages(*data, m) for m in (low, high))
    assert (abs(b) <= abs(a) * (1 + 1e-12)).all() and (np.sign(a) * np.sign(b) >= 0).all()

@floors
def test_a_floor_bounds_what_noise_can_do(advantages):
    prompts, r = ["a"] * 4 + ["b"] * 4, 1 - 1e-3 * np.array([0, 1, 2, 3, 1, 0, 3, 2])
    assert abs(advantages(prompts, r, 0.)).max() > 1 and abs(advantages(prompts, r, .1)).max() < .03
    # a large spread does not meet it
    np.testing.assert_array_equal(advantages(prompts, 1000 * r, 0.), advantages(prompts, 1000 * r, .1))

@pytest.mark.parametrize("floor", [-1., float("nan"), float("inf")])
def test_a_bad_floor_is_refused(floor):
    for make in (
        lambda: normalize([1.0, 2.0], min_std=floor), lambda: group_relative(["a", "a"], [1.0, 2.0], floor),
        lambda: leave_one_out(["a", "a"], [1.0, 2.0], floor), lambda: PerPromptStatTracker(min_std=floor)
    ):
        with pytest.raises(ValueError, match="min_std must be 0 or more"): make()

@pytest.mark.parametrize("function", [group_relative, leave_one_out, above_others])
def test_baselines_want_one_reward_a_prompt(function):
    with pytest.raises(ValueError, match="as many rewards"): function(["a", "b"], [1.])
    with pytest.raises(ValueError, match="as many rewards"): function(["a", "b"], [[1., 2.]])
    assert len(function([], [])) == 0

def test_baselines_have_names():
    prompts, r = ["a", "a", "b", "b"], [1., 2., 5., 9.]
    assert list(BASELINES) == ["normalize", "group", "leave-one-out"]
    for name, f in dict(zip(BASELINES, (lambda p, r: normalize(r), group_relative, leave_one_out))).items():
        np.testing.assert_array_equal(BASELINES[name](prompts, r), f(prompts, r))

def test_what_stands_beside_the_spread_is_the_peers():
    """1e-8 under the batch's rewards, 1e-6 under a prompt's (ddpo-pytorch's train.py and
    stat_tracking.py, TRL 0.23.1)"""
    r = np.array([0.0, 1e-7, 2e-7])
    np.testing.assert_allclose(normalize(r), (r - r.mean()) / (r.std() + 1e-8), rtol=1e-9)
    for count in (1, 9):   # its own statistics, and the batch's
        tracker = PerPromptStatTracker(9, count)
        np.testing.assert_allclose(tracker.update(["a"] * 3, r), (r - r.mean()) / (r.std() + 1e-6), rtol=1e-9)

@pytest.mark.parametrize("value", [0.1, 1e9, -3e5])
def test_equal_rewards_have_no_advantage(value):
    assert (normalize([value] * 7) == 0).all() and (group_relative(["a"] * 7, [value] * 7) == 0).all()
