import io
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, JpegImagePlugin
from ddpo_nb.prompts import InputError
from ddpo_nb.rewards import (REWARDS, PromptAlignment, WeightedSum, check_rewards,
                             get_reward, jpeg_compressibility, jpeg_incompressibility, jpeg_size, parse_sum,
                             reward, to_uint8)

def images(n=3, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))

def test_to_uint8_rounds_and_cuts():
    x = torch.tensor([-1., 0., .4/255, .6/255, 1., 2.]).reshape(2, 3, 1, 1)
    assert to_uint8(x).tolist() == [[[[0, 0, 0]]], [[[1, 255, 255]]]]
    assert to_uint8(images(2, 4).half()).dtype == np.uint8

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_images_are_not_scored(value):
    x = images()
    x[1, 0, 0, 0] = value
    with pytest.raises(InputError, match="1 of 3"): jpeg_compressibility(x, ["a"]*3, [{}]*3)

def test_jpeg_size_is_the_size_of_the_file(tmp_path):
    x = images(2, 64)
    for i, o in enumerate((x*255).round().byte()):
        Image.fromarray(o.permute(1, 2, 0).numpy()).save(tmp_path/f"{i}.jpg", quality=95)
        assert jpeg_size(x)[i] == (tmp_path/f"{i}.jpg").stat().st_size/1000
    assert JpegImagePlugin.get_sampling(Image.open(tmp_path/"0.jpg")) == 2   # 4:2:0, as the docstring says
    assert (jpeg_size(x, quality=50) < jpeg_size(x)).all()

def test_jpeg_rewards_have_opposite_signs_and_go_by_name():
    x, prompts = images(), ["a"]*3
    more, less = (
        get_reward(o)(x, prompts, [{}] * 3)[0] for o in ("jpeg_incompressibility", "jpeg_compressibility")
    )
    assert (more == -less).all() and (more > 0).all() and more.shape == (3,) and more.dtype == np.float64

def test_unknown_reward_lists_the_names():
    with pytest.raises(InputError) as e: get_reward("beauty")
    assert all(name in str(e.value) for name in REWARDS) and "--reward" in str(e.value)

@pytest.mark.parametrize(
    "rewards",
    [
        [1, 2.5, 3], (1, 2.5, 3), np.float32([1, 2.5, 3]), torch.tensor([1, 2.5, 3]),
        torch.tensor([1, 2.5, 3]).bfloat16(), [torch.tensor(1), torch.tensor([2.5]), np.float64(3)],
        torch.tensor([1, 2.5, 3], requires_grad=True)
    ],
)
def test_check_rewards_takes_what_rewards_return(rewards):
    out = check_rewards(rewards, 3, "r")
    assert out.dtype == np.float64 and out.tolist() == [1, 2.5, 3]

@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(), min_size=1, max_size=10))
def test_check_rewards_finds_every_bad_value(values):
    bad = [i for i, v in enumerate(values) if not np.isfinite(v)]
    if not bad:
        assert check_rewards(values, len(values), "r").tolist() == values
    else:
        with pytest.raises(
            InputError, match=rf"reward r: returned {len(bad)} of {len(values)} .* prompt {bad[0]} "
        ):
            check_rewards(values, len(values), "r")

@pytest.mark.parametrize(
    "rewards,says",
    [
        ([1, 2], "returned 2 rewards for 3 images"), ([], "returned 0 rewards"),
        (np.ones((3, 2)), r"shape \(3, 2\)"), (1.0, r"shape \(\)"), (["1", "2", "3"], "not numbers"),
        ([1, None, 2], "not numbers"), (None, "not numbers"), ([[1], [1, 2], [3]], "not numbers"),
        ([1j, 2, 3], "not numbers"), ({"a": 1}, "not numbers")
    ],
)
def test_check_rewards_names_the_function_and_the_problem(rewards, says):
    with pytest.raises(InputError, match=says) as e: check_rewards(rewards, 3, "my_reward")
    assert "my_reward" in str(e.value) and "\n" not in str(e.value)

@pytest.mark.cuda
def test_check_rewards_from_the_gpu():
    assert check_rewards(torch.tensor([1., 2.], device="cuda"), 2, "r").tolist() == [1, 2]
    assert check_rewards([torch.tensor(1., device="cuda"), 2], 2, "r").tolist() == [1, 2]

@pytest.fixture(scope="module")
def pipe():
    from ddpo_nb.policy import load_pipeline
    return load_pipeline()

def test_alignment_does_not_depend_on_the_batch(pipe):
    x, prompts = images(3, 64), ["cat", "frog", "cat"]
    reward = PromptAlignment(pipe, num_levels=2)
    together, info = reward(x, prompts, [{}]*3)
    alone = [reward(x[i:i+1], prompts[i:i+1], [{}])[0][0] for i in range(3)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(
        PromptAlignment(pipe, 2, batch_size=2)(x, prompts, [{}] * 3)[0], together, atol=1e-5
    )
    assert info == {} and (reward(x, prompts, [{}]*3)[0] == together).all()
    assert (PromptAlignment(pipe, 2, seed=1)(x, prompts, [{}]*3)[0] != together).all()

def test_alignment_of_the_empty_prompt_is_zero(pipe):
    assert abs(PromptAlignment(pipe, 2)(images(2, 64), ["", ""], [{}]*2)[0]).max() < 1e-7

def test_alignment_by_its_formula(pipe):
    x, t = images(1, 64), 500
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x0 = pipe.vae.encode(x*2 - 1).latent_dist.mean*pipe.vae.config.scaling_factor
        a = pipe.scheduler.alphas_cumprod[t]
        text = pipe.encode_prompt(["cat"], "cpu", 1, True)   # with the prompt, and without
        e = [
            (pipe.unet(a**0.5 * x0 + (1 - a) ** 0.5 * noise, t, o).sample - noise).square().mean().item()
            for o in text
        ]
    assert PromptAlignment(pipe, 1)(x, ["cat"], [{}])[0][0] == pytest.approx(e[1] - e[0], abs=1e-5)

@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_alignment_finds_the_noise_for_every_prediction_type(kind):
    from diffusers import DDIMScheduler
    from ddpo_nb.mdp import DDIMProcess
    process = DDIMProcess(DDIMScheduler(prediction_type=kind, clip_sample=False), 10)
    x0, t = images(2, 8, 1), torch.tensor([300, 300])
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x, perfect = process.noised(x0, noise, t), process.target(x0, noise, t)
    torch.testing.assert_close(process.predicted_noise(perfect, x, t), noise, atol=1e-5, rtol=1e-5)

def test_alignment_refuses_the_policys_own_pipeline():
    from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
    policy = StableDiffusionPolicy(load_pipeline(), num_steps=2)
    with pytest.raises(ValueError, match="pipeline of its own"):
        PromptAlignment(policy.pipeline)(images(1, 64), ["cat"], [{}])

def test_large_pictures_are_sized_as_small_ones_are():
    x = images(3, 256)
    assert (jpeg_size(x) == np.concatenate([jpeg_size(o[None]) for o in x])).all()

names = st.sampled_from(["a", "b_2", "clip_alignment", "C"])
weights = st.floats(0.001, 100).map(lambda w: float(f"{w:.4g}"))
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(names, weights, st.booleans()), min_size=2, max_size=4, unique_by=lambda o: o[0]),
    st.sampled_from(["", " "]),
)
def test_a_written_sum_is_read_as_written(terms, space):
    text = "".join(
        ("-" if minus else "+") + f"{space}{w:g}{space}*{space}{name}{space}" for name, w, minus in terms
    )
    assert parse_sum(text.removeprefix("+")) == {name: -w if minus else w for name, w, minus in terms}

@pytest.mark.parametrize("text", ["a", "a b", "a++b", "a*2", "2a+b", "a+", "*a", "", "1+2", "a+b.c"])
def test_what_is_no_sum(text): assert parse_sum(text) == {}

def test_a_weighted_sum_keeps_its_parts():
    x = images()
    total, info = get_reward("2*jpeg_incompressibility - 0.5*jpeg_compressibility")(x, ["a"]*3, [{}]*3)
    np.testing.assert_allclose(total, 2.5 * jpeg_size(x))
    assert (info["reward/jpeg_compressibility"] == -jpeg_size(x)).all() and (
        info["reward/jpeg_incompressibility"] == jpeg_size(x)
    ).all()

def test_a_part_that_breaks_is_named():
    broken = WeightedSum(
        dict(fine=(1.0, jpeg_compressibility), broken=(0.0, lambda *_: ([float("nan")] * 3, {})))
    )
    with pytest.raises(InputError, match="reward broken"): broken(images(), ["a"]*3, [{}]*3)

def test_unknown_parts_of_a_sum_and_parts_given_twice():
    with pytest.raises(InputError, match="no reward named 'beauty'"):
        get_reward("jpeg_compressibility+2*beauty")
    with pytest.raises(InputError, match="stands twice"):
        get_reward("jpeg_compressibility+2*jpeg_compressibility")

def test_a_reward_of_ones_own_by_name():
    seen = []
    try:

        @reward("my_own")
        def mine(images, prompts, metadata):
            seen.append((prompts, metadata))
            return [float(m["count"]) for m in metadata], dict(note="x")

        assert get_reward("my_own") is mine
        assert get_reward("my_own")(images(2), ["a", "b"], [dict(count=1), dict(count=2)])[0] == [
            1, 2
        ] and seen == [(["a", "b"], [dict(count=1), dict(count=2)])]
        reward("my_own")(jpeg_compressibility)  # a cell that is run again
        assert get_reward("my_own") is jpeg_compressibility
    finally:
        REWARDS.pop("my_own", None)

@pytest.mark.parametrize(
    "name,says",
    [
        ("clip_alignment", "package's own"), ("two words", "no name"), ("", "no name"), ("1st", "no name"),
        ("a+b", "no name")
    ],
)
def test_names_that_a_reward_cannot_have(name, says):
    with pytest.raises(InputError, match=says): reward(name)
