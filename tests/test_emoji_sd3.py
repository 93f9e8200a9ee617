"Emoji SD3: its pictures of scenes, its training from the font, and the pipeline that comes out of it."
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers import StableDiffusion3Pipeline
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from ddpo_nb import emoji_sd3
from ddpo_nb.emoji_sd import COLOURS, GLYPHS
from ddpo_nb.emoji_sd3 import base_scene, completed, draw, told
from ddpo_nb.policy import load_policy
from ddpo_nb.prompts import plural
from ddpo_nb.recipes import model_numbers
from ddpo_nb.scenes import GROUNDS, NOUNS, RELATIONS, Scene, parse, shown, turned, wordings
from scene_world import pairs, scenes

quick = settings(deadline=None, max_examples=60)

def test_the_font_has_every_noun_and_every_ground_a_colour():
    assert {*NOUNS} <= {*GLYPHS} and {*GROUNDS} == {*COLOURS}

@quick
@given(scenes, st.integers(0, 2**32))
def test_a_picture_shows_its_scene(scene, seed):
    image, boxes = draw(scene, np.random.default_rng(seed))
    again, _ = draw(scene, np.random.default_rng(seed))
    assert image.size == (64, 64) and image == again
    assert Counter(noun for noun, *_ in boxes) == {noun: scene.count for noun in scene.nouns}
    assert all(0 <= left < right <= 64 and 0 <= top < bottom <= 64 for _, left, top, right, bottom in boxes)
    size = {right - left for _, left, top, right, bottom in boxes}
    assert (44 <= min(size) <= max(size) <= 56) if len(boxes) == 1 else (26 <= min(size) <= max(size) <= 30)
    if scene.ground: assert COLOURS[scene.ground] in {c for _, c in image.getcolors(4096)}

@quick
@given(pairs, st.sampled_from([*RELATIONS]), st.integers(0, 2**32))
def test_objects_stand_where_the_relation_says(pair, relation, seed):
    _, boxes = draw(Scene(pair, relation=relation), np.random.default_rng(seed))
    assert [noun for noun, *_ in boxes] == list(pair)
    (x, y), (u, v) = [((left + right) / 2, (top + bottom) / 2) for _, left, top, right, bottom in boxes]
    apart = {"left of": u - x, "right of": x - u, "above": v - y, "below": y - v}[relation]
    assert apart > 25 and apart > 2 * min(abs(u - x), abs(v - y))

@quick
@given(st.sampled_from(NOUNS), st.integers(2, 4), st.integers(0, 2**32))
def test_objects_of_one_kind_do_not_cover_each_other(noun, count, seed):
    _, boxes = draw(Scene((noun,), count), np.random.default_rng(seed))
    for i, (_, left, top, right, bottom) in enumerate(boxes):
        for _, l, t, r, b in boxes[:i]:
            common = max(0, min(right, r) - max(left, l)) * max(0, min(bottom, b) - max(top, t))
            assert common <= 0.15 * (right - left) * (bottom - top)

def test_base_training_never_sees_what_is_kept_from_it():
    rng = np.random.default_rng(0)
    drawn = [base_scene(rng) for _ in range(3000)]
    assert {shown(o) for o in drawn} == {"both", "base"}
    assert all(o.ground and (o.relation or len(o.nouns) == 1) for o in drawn)
    assert {o.kind for o in drawn} == {"colour", "counting", "position"}

def test_an_open_relation_is_drawn_among_those_that_may_be_seen():
    rng = np.random.default_rng(0)
    kept = [Scene((a, b), relation="left of") for a in NOUNS for b in NOUNS if a != b]
    kept = [o for o in kept if shown(o) == "neither" != shown(replace(o, relation=None))][:20]
    for scene in kept:
        found = {completed(replace(scene, relation=None), rng).relation for _ in range(30)}
        assert found and all(shown(replace(scene, relation=r)) != "neither" for r in found)
    aside = next(Scene((a, b)) for a in NOUNS for b in NOUNS if a != b and shown(Scene((a, b))) == "neither")
    assert {completed(aside, rng).relation for _ in range(60)} == {*RELATIONS}  # asked for, it can be drawn

def test_what_is_told_is_true():
    rng, kinds = np.random.default_rng(0), Counter()
    for _ in range(500):
        scene = base_scene(rng)
        heard = parse(told(scene, rng))
        seen = scene if heard.nouns == scene.nouns else turned(scene)
        assert heard.nouns == seen.nouns and heard.count == seen.count
        assert heard.ground in (None, seen.ground) and heard.relation in (None, seen.relation)
        kinds[heard.kind] += 1
    assert len(kinds) == 5 and min(kinds.values()) > 25

@pytest.fixture(scope="module", autouse=True)
def looks_at_little():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(emoji_sd3, "_looked_at", ["a cat"])
        yield

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The whole command on a world so small that it takes seconds; with what is in the folder"
    out = tmp_path_factory.mktemp("emoji_sd3")
    arguments = ["--vae-steps", "2", "--steps", "2", "--pictures", "8", "--batch", "4", "--device", "cpu"]
    assert emoji_sd3.main(["--output", str(out), *arguments]) == 0
    return out

@pytest.fixture(scope="module")
def pipe(folder):
    pipe = StableDiffusion3Pipeline.from_pretrained(str(folder/"pipeline"))
    pipe.set_progress_bar_config(disable=True)
    return pipe

def test_it_is_made_of_stable_diffusion_3s_classes(pipe):
    kinds = dict(vae=AutoencoderKL, transformer=SD3Transformer2DModel,
                 scheduler=FlowMatchEulerDiscreteScheduler, text_encoder=CLIPTextModelWithProjection,
                 text_encoder_2=CLIPTextModelWithProjection, tokenizer=CLIPTokenizer,
                 tokenizer_2=CLIPTokenizer)
    assert {name: type(getattr(pipe, name)) for name in kinds} == kinds

def test_it_paints_when_called_as_any_other(pipe):
    noise = torch.Generator().manual_seed(0)
    assert pipe("a cat above a dog", num_inference_steps=1, generator=noise).images[0].size == (64, 64)

def test_the_third_text_encoder_says_nothing(pipe, caplog):
    prompts = ["a cat", "three apples on a blue background"]
    given, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False,
                                             max_sequence_length=3)
    assert given.shape == (2, 16 + 3, 192) and pooled.shape == (2, 192)
    assert not given[:, 16:].any() and given[:, :16].any(-1).all() and "truncated" not in caplog.text

def test_a_policy_gives_it_one_token(folder):
    policy = load_policy(str(folder/"pipeline"), use_lora=False)
    assert policy.embed(["a cat"])["text"].shape == (1, 16 + 1, 192)
    assert model_numbers(str(folder/"pipeline")).text["text"] == (17, 192)

def test_weights_are_half_precision_safetensors_of_a_small_package(folder):
    files = [f for f in (folder/"pipeline").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 20e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".txt"}
    for f in files:
        if f.suffix == ".safetensors":
            with safe_open(f, "pt") as tensors:
                assert {tensors.get_tensor(k).dtype for k in tensors.keys()} <= {torch.float16, torch.int64}

def test_latents_have_mean_0_and_variance_1(folder, pipe):
    latents = emoji_sd3.encode_scenes(folder/"transformer", pipe.vae, 8)
    assert latents.mean().abs() < 1e-3 and abs(latents.std() - 1) < 1e-3
    assert latents.shape == (8, 4, 16, 16)

def test_every_word_of_the_world_is_one_token(pipe):
    words = {*NOUNS, *map(plural, NOUNS), *GROUNDS, "two", "three", "four", "left", "above"}
    assert {len(pipe.tokenizer(w).input_ids) for w in words} == {3} and pipe.tokenizer.model_max_length == 16
    texts = [t for r in RELATIONS for t in wordings(Scene(("owl", "umbrella"), relation=r, ground="red"))]
    assert max(len(pipe.tokenizer(t).input_ids) for t in texts) <= 16

def test_the_log_says_how_far_it_is(folder):
    for part in ("vae", "transformer"):
        lines = [json.loads(line) for line in (folder/part/"log.jsonl").read_text().splitlines()]
        assert lines[0]["step"] == 0 and lines[0]["loss"] > 0 and lines[0]["seconds"] >= 0

def test_a_missing_font_and_wrong_numbers_are_named(capsys, tmp_path):
    out = ["--output", str(tmp_path/"o")]
    wrong_values = {"--font": "/no/such.ttf", "--steps": "0", "--vae-steps": "-1", "--batch": "3"}
    for wrong, value in wrong_values.items():
        assert emoji_sd3.main([*out, wrong, value]) == 2
        error = capsys.readouterr().err
        assert wrong in error and error.count("\n") == 1
    assert not (tmp_path/"o").exists()

def test_attention_alone_is_in_single_precision():
    q, w = torch.randn(1, 2, 4, 8), torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16), emoji_sd3.SingleAttention():
        out = torch.nn.functional.scaled_dot_product_attention(q.bfloat16(), q.bfloat16(), value=q.bfloat16())
        assert (q @ w).dtype == torch.bfloat16 and out.dtype == torch.float32
    expected = torch.nn.functional.scaled_dot_product_attention(*[q.bfloat16().float()] * 3)
    assert torch.equal(out, expected)

class Stop(Exception): pass

def test_a_stopped_training_goes_on_as_if_never_stopped(monkeypatch, tmp_path, pipe):
    train = lambda f: emoji_sd3.train_transformer(tmp_path/f, pipe.vae, 4, batch=4, pictures=8, save_every=2)
    # built anew, the tokenizer's ties could fall otherwise
    for f in "ab": pipe.tokenizer.save_pretrained(tmp_path/f/"tokenizer")
    whole, calls, real = train("a"), [], emoji_sd3.velocity_loss
    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3: raise Stop
        return real(*args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(emoji_sd3, "velocity_loss", stop)
        with pytest.raises(Stop): train("b")
    again = train("b")
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        one, other = (getattr(p, name).state_dict() for p in (whole, again))
        assert all(torch.equal(one[k], other[k]) for k in one)

