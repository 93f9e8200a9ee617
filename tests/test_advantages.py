import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from ddpo_nb.advantages import PerPromptStatTracker, normalize

rewards = arrays(np.float64, st.integers(2, 40), elements=st.floats(-100, 100)).filter(lambda r: r.std() > 1e-2)

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
    np.testing.assert_allclose(a, [-1, (10 - 14/3)/np.std([1, 10, 3]), 1])   # b was seen once: the batch's statistics
    a = tracker.update(["a", "a"], [5., 7.], eps=0)                         # the buffer of 3 holds 3, 5, 7
    np.testing.assert_allclose(a, (np.array([5, 7]) - 5)/np.std([3, 5, 7]))

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-100, 100)), min_size=1, max_size=30))
def test_an_empty_memory_with_room_normalises_each_prompt_alone(pairs):
    prompts, r = [p for p, _ in pairs], np.array([v for _, v in pairs])
    a = PerPromptStatTracker(30, 1).update(prompts, r)
    for p in set(prompts):
        mine = np.array([o == p for o in prompts])
        np.testing.assert_allclose(a[mine], normalize(r[mine]), atol=1e-9)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-100, 100)), min_size=1, max_size=20), st.integers(-50, 50))
def test_per_prompt_ignores_a_shift_of_one_prompt(pairs, shift):
    prompts, r = [p for p, _ in pairs], np.array([v for _, v in pairs], dtype=float)
    moved = r + shift*np.array([p == "a" for p in prompts])
    np.testing.assert_allclose(PerPromptStatTracker(20, 1).update(prompts, moved), PerPromptStatTracker(20, 1).update(prompts, r), atol=1e-6)

@settings(max_examples=30, deadline=None)
@given(rewards, st.randoms())
def test_order_within_the_batch_does_not_matter(r, random):
    prompts = [random.choice("ab") for _ in r]
    order = random.sample(range(len(r)), len(r))
    once = PerPromptStatTracker(len(r), 3).update(prompts, r)
    again = PerPromptStatTracker(len(r), 3).update([prompts[i] for i in order], r[order])
    np.testing.assert_allclose(again, once[order], atol=1e-8)

def test_buffer_forgets():
    tracker = PerPromptStatTracker(4, 1)
    for i in range(10): tracker.update(["a"], [float(i)])
    assert list(tracker.rewards["a"]) == [6, 7, 8, 9]

def test_bad_input():
    with pytest.raises(ValueError, match="as many rewards"): PerPromptStatTracker().update(["a", "b"], [1.])
    with pytest.raises(ValueError, match="buffer_size"): PerPromptStatTracker(0, 0)
    with pytest.warns(UserWarning, match="never holds"): PerPromptStatTracker(4, 8)
