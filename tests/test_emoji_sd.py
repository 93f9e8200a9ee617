"Emoji SD: its world, its training, and whether its pictures show what they were asked for."
import json, os
from collections import Counter
import numpy as np, pytest, torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer
from ddpo_nb import emoji_clip, emoji_sd, emoji_sd3
from ddpo_nb.clip import load_embedder
from ddpo_nb.emoji_clip import retrieval
from ddpo_nb.emoji_sd import (ANIMALS, COLOUR_NAMES, COLOURS, FONT, NOUNS, OBJECTS, UNSEEN_ANIMALS, captions,
                              scene)
from ddpo_nb.prompts import PROMPT_SETS, InputError
from judge import accuracy, pictures, train_judge, unseen_renders

def test_the_world_is_as_large_as_promised():
    assert len(ANIMALS) == 45 and len(UNSEEN_ANIMALS) >= 25 and len(OBJECTS) >= 40 and len(COLOURS) >= 8
    assert len({*ANIMALS, *UNSEEN_ANIMALS, *OBJECTS}) == len(NOUNS) == len(set(emoji_sd.GLYPHS.values()))

@pytest.mark.parametrize(
    "name,nouns",
    [("simple_animals", ANIMALS), ("unseen_animals", UNSEEN_ANIMALS), ("everyday_objects", OBJECTS)],
)
def test_the_model_knows_the_prompt_sets(name, nouns):
    assert sorted(PROMPT_SETS[name]()) == sorted(nouns)

@given(st.sampled_from(NOUNS), st.sampled_from(COLOUR_NAMES), st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_a_scene_is_a_glyph_on_its_colour(noun, colour, seed):
    image = scene(noun, colour, np.random.default_rng(seed))
    assert image.size == (64, 64) and image == scene(noun, colour, np.random.default_rng(seed))
    assert np.any(np.asarray(image) != COLOURS[colour]) and COLOURS[colour] in {
        image.getpixel(p) for p in ((0, 0), (63, 0), (0, 63), (63, 63))
    }

@given(st.sampled_from(NOUNS), st.sampled_from(COLOUR_NAMES))
@settings(deadline=None, max_examples=50)
def test_captions_name_the_scene_with_the_right_article(noun, colour):
    for text in captions(noun, colour):
        tokens = text.split()
        assert noun in tokens and all(
            (follows[0] in "aeiou") == (word == "an")
            for word, follows in zip(tokens, tokens[1:])
            if word in ("a", "an")
        )

def test_a_missing_font_is_named(capsys, tmp_path):
    with pytest.raises(InputError, match="--font.*fonts-noto-color-emoji"):
        emoji_sd.glyph("cat", "/no/such.ttf")
    assert emoji_sd.main(["--output", str(tmp_path / "o"), "--font", "/no/such.ttf"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "o").exists()

@pytest.fixture(scope="module")
def pipe(): return emoji_sd.load()

def test_it_is_made_of_stable_diffusions_classes(pipe):
    kinds = dict(
        vae=AutoencoderKL, unet=UNet2DConditionModel, text_encoder=CLIPTextModel, tokenizer=CLIPTokenizer,
        scheduler=DDIMScheduler
    )
    assert {name: type(getattr(pipe, name)) for name in kinds} == kinds and type(
        pipe
    ) is StableDiffusionPipeline

def folder():
    from importlib import resources
    return resources.files("ddpo_nb") / emoji_sd.WEIGHTS

def test_diffusers_loads_it_without_our_code():
    plain = StableDiffusionPipeline.from_pretrained(str(folder()))
    plain.set_progress_bar_config(disable=True)
    image = plain(
        "a cat on a blue background", num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert image.size == (64, 64)

def test_weights_are_half_precision_safetensors_under_15_mb():
    files = [f for f in folder().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 15e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".txt"}
    for f in files:
        if f.suffix == ".safetensors":
            with safe_open(f, "pt") as tensors:
                assert {tensors.get_tensor(k).dtype for k in tensors.keys()} <= {torch.float16, torch.int64}

def test_every_word_of_the_world_is_one_token(pipe):
    assert Counter(len(pipe.tokenizer(w).input_ids) for w in [*NOUNS, *COLOURS]) == {
        3: len(NOUNS) + len(COLOURS)
    }
    assert pipe.tokenizer.model_max_length == 16

@pytest.mark.parametrize(
    "prompt", ["", "a bear washing dishes", "Ünïcode 熊 🐻", "word " * 50],
    ids=["empty", "activity", "unicode", "long"]
)
def test_any_prompt_makes_a_picture(pipe, prompt):
    image = pipe(
        prompt, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all()

class Stop(Exception): pass

def interrupted(monkeypatch, name, train, after):
    "Run `train`, stopped at the call number `after` of the module's function `name`."
    calls, real = [], getattr(emoji_sd, name)
    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) > after: raise Stop
        return real(*args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(emoji_sd, name, stop)
        with pytest.raises(Stop): train()

def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))

def test_a_stopped_autoencoder_training_goes_on_as_if_never_stopped(monkeypatch, tmp_path):
    train = lambda f: emoji_sd.train_vae(tmp_path / f, 4, batch=2, save_every=2)
    whole = train("a")
    interrupted(monkeypatch, "random_scenes", lambda: train("b"), 3)
    assert same(whole, train("b"))

def test_a_stopped_unet_training_goes_on_as_if_never_stopped(monkeypatch, tmp_path, pipe):
    monkeypatch.setattr(emoji_sd, "NOUNS", NOUNS[:4])
    tokenizer = emoji_sd.build_tokenizer()
    # ties among its merges fall differently each time it is built
    monkeypatch.setattr(emoji_sd, "build_tokenizer", lambda: tokenizer)
    train = lambda f: emoji_sd.train_unet(
        tmp_path / f, emoji_sd.load().vae, 4, batch=4, save_every=2, repeats=2
    )
    whole = train("a")
    interrupted(monkeypatch, "unet_loss", lambda: train("b"), 3)
    # going on, the tokenizer is that of the first part
    monkeypatch.setattr(emoji_sd, "build_tokenizer", None)
    again = train("b")
    assert same(whole.unet, again.unet) and same(whole.text_encoder, again.text_encoder)
    assert whole.vae.config.scaling_factor == pytest.approx(again.vae.config.scaling_factor)

def test_pictures_show_what_was_asked_for(pipe):
    """In the eyes of the bundled CLIP, which never saw one of this model's pictures: each finds its own
    caption among all"""
    pairs = [(n, n % len(COLOUR_NAMES)) for n in range(len(NOUNS))]
    texts = [captions(NOUNS[n], COLOUR_NAMES[c])[2] for n, c in pairs]
    assert min(retrieval(load_embedder(), pictures(pipe, pairs, 10) / 2 + 0.5, texts)) >= 0.9

@pytest.mark.slow
def test_pictures_show_what_was_asked_for_to_a_judge_of_their_own(pipe):
    """The full measurement, all nouns on all colours, is `python tests/judge.py`; here each noun stands
    on one colour."""
    judge = train_judge(steps=600)
    assert min(unseen_renders(judge)) >= 0.97
    pairs = [(n, n % len(COLOUR_NAMES)) for n in range(len(NOUNS))]
    seen_object, seen_colour = accuracy(judge, pictures(pipe, pairs, 20), *zip(*pairs))
    assert seen_object >= 0.85 and seen_colour >= 0.95

@pytest.mark.parametrize("write", [
    lambda folder: emoji_sd.save(emoji_sd.load(), folder),
    lambda folder: emoji_sd3.save(emoji_sd3.load(), folder),
    lambda folder: emoji_clip.save_clip(load_embedder("emoji-clip"), folder),
])
def test_who_may_read_a_trained_model_is_for_the_umask_to_say(tmp_path, write):
    usual = os.umask(0o027)
    try: write(tmp_path/"model")
    finally: os.umask(usual)
    weights = [*(tmp_path/"model").rglob("*.safetensors")]
    assert weights and {o.stat().st_mode & 0o777 for o in weights} == {0o640}
