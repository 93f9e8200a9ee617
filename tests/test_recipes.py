"Recipes and plans: what was published, what the trainer really does, and memory against a real network's."
import json
import resource
import sys
import time
from dataclasses import fields, replace
from importlib import resources
from shutil import copytree, ignore_patterns

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ddpo_nb import prepare, recipes as R
from ddpo_nb.batches import saved_bytes
from ddpo_nb.direct import uphill
from ddpo_nb.loading import BUNDLED, EMOJI_SD3, family_of, quantized_parts
from ddpo_nb.mdp import Trajectories
from ddpo_nb.objectives import get_objective, takes
from ddpo_nb.policy import EMOJI_SD, StableDiffusionPolicy, load_pipeline
from ddpo_nb.speed import SmallLora
from ddpo_nb.prompts import PROMPT_SETS, InputError, PromptSource
from ddpo_nb.recipes import (RECIPES, estimate_memory, get_recipe, list_recipes, model_numbers, peak_bytes,
                             plan, what_fits)
from ddpo_nb.rewards import REWARDS
from ddpo_nb.rwr import NORMALIZERS, rwr_sparse_weights
from ddpo_nb.tiny import TINY, tiny_pipeline
from ddpo_nb.trainer import (ALGORITHMS, DDPOConfig, RWRConfig, configure_policy, make_config, make_objective,
                             make_trainer)

SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"

@pytest.fixture(scope="module")
def sd(): return model_numbers(SD)
@pytest.fixture(scope="module")
def emoji(): return model_numbers()

def with_(config, **switches):
    "A config with fields set that it may not have yet"
    for k, v in switches.items(): setattr(config, k, v)
    return config

# Recipes

LARGE = ("sdxl-aesthetic-lora", "sd35-medium-flow-grpo", "flux-flow-grpo")  # half a minute each

@pytest.mark.parametrize("name", LARGE)
def test_recipes_of_large_models_count_as_they_were_published(name, monkeypatch):
    monkeypatch.setattr(R, "estimate_memory", lambda *a: None)
    r = RECIPES[name]
    c, p = r.config(), plan(r.config(), model_numbers(r.model))
    assert "unmeasured" in r.needs and r.source
    if name == "sdxl-aesthetic-lora":
        assert (p.samples_per_epoch, p.updates_per_epoch, c.sample_num_steps) == (256, 2, 50)
        return
    # flow_grpo's config/grpo.py: 48 groups of 24 pictures, two updates, the last of the steps left out
    assert (p.samples_per_epoch, p.updates_per_epoch, c.samples_per_prompt, c.sample_resolution) == (
        1152, 2, 24, 512)
    assert (c.sample_sde, c.train_clip_range, c.train_learning_rate, c.baseline) == (
        "flow-sde", 1e-4, 3e-4, "group")
    steps, passes = (10, 2) if "sd35" in name else (6, 1)
    assert p.sampling_rows == 1152 * steps * passes and p.training_rows == 1152 * (steps - 1) * passes
    own = (c.sample_guidance_scale, c.sample_noise_level, c.kl_coef, c.lora_rank)
    assert own == ((4.5, 0.7, 0.04, 32) if "sd35" in name else (3.5, 0.9, 0, 64))

@pytest.mark.slow
@pytest.mark.parametrize("name,card", [*zip(LARGE, (16, 24, 80))])
def test_recipes_of_large_models_fit_on_the_card_that_they_name(name, card):
    r = RECIPES[name]
    p = plan(r.config(), model_numbers(r.model))
    assert f"{card} GB" in r.needs and p.fits[0][f"{card} GB"] == "yes" and f"{card} GB" in str(p)

def test_every_model_whose_class_is_known_has_its_configuration_and_the_other_way_round():
    from ddpo_nb.loading import KNOWN_KINDS
    from ddpo_nb.recipes import _known
    assert KNOWN_KINDS.keys() == _known.keys()

@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_and_plans(name, sd):
    r = get_recipe(name)
    assert (
        r is RECIPES[name] and r.prompts in PROMPT_SETS and r.algorithm in ALGORITHMS and "\n" not in r.about
    )
    assert {*r.settings} <= {f.name for f in fields(DDPOConfig)} - {"algorithm", "num_epochs", "seed"}
    assert r.reward in REWARDS
    c = r.config()
    assert c == make_config(r.algorithm, r.model, num_epochs=r.epochs, **r.settings)
    if name in LARGE: return
    p = plan(c, model_numbers(r.model) if r.model in BUNDLED else sd, r.lora)
    assert p.queries == c.samples_per_epoch * r.epochs and p.updates == p.updates_per_epoch * r.epochs
    limit = dict(a100=40e9, emoji=1e9).get(name.partition("-")[0], 24e9)
    assert 1e8 < p.memory.peak < limit - (0 if "emoji" in name else 1e9)  # with a gigabyte for CUDA itself

@pytest.mark.parametrize("memory", [3 * 10**8, 10**9])
def test_a_plan_has_the_micro_batch_that_the_trainer_takes(memory, monkeypatch, emoji):
    """On a device whose memory is the limit, what stays there counts: gradients and AdamW's means of a
    whole UNet too"""
    for module in (R, prepare): monkeypatch.setattr(module, "device_memory", lambda device: memory)
    c = make_config("ddpo-is", lora=False, logdir="", mixed_precision="no", micro_batch_size=0)
    t = make_trainer(
        c, lambda *a: 0, PromptSource(["cat"]), StableDiffusionPolicy(load_pipeline(), use_lora=False)
    )
    assert 1 < t.micro_batch_size == R._sized(c, emoji, False).micro_batch_size < 90

def test_the_walk_on_one_a100_is_as_published():
    r, c = RECIPES["a100-aesthetic-lora"], RECIPES["a100-aesthetic-lora"].config()
    assert (r.epochs, r.lora, r.algorithm, r.model, r.reward, r.prompts) == (
        200, True, "ddpo-is", SD, "aesthetic", "simple_animals"
    )
    assert (
        c.num_epochs, c.sample_batch_size, c.train_batch_size, c.sample_num_batches_per_epoch,
        c.train_gradient_accumulation_steps
    ) == (200, 6, 3, 4, 1)
    assert (
        c.sample_num_steps, c.sample_eta, c.sample_guidance_scale, c.train_learning_rate, c.mixed_precision
    ) == (50, 1, 5, 3e-4, "fp16")
    assert (
        c.per_prompt_stat_tracking, c.per_prompt_stat_tracking_buffer_size, c.train_clip_range,
        c.train_adam_weight_decay
    ) == (True, 32, 1e-4, 1e-4)
    full = RECIPES["a100-aesthetic-full"]
    assert (
        not full.lora and full.config().train_learning_rate == 1e-5 and full.config().mixed_precision == "no"
    )
    changed = {"train_learning_rate", "mixed_precision"}
    assert all(
        getattr(c, f.name) == getattr(full.config(), f.name) for f in fields(c) if f.name not in changed
    )

@pytest.mark.parametrize(
    "name,epochs,samples,update,buffer,prompts",
    [
        ("compressibility", 100, 256, 64, 16, "imagenet_animals"),
        ("incompressibility", 100, 256, 64, 16, "imagenet_animals"),
        ("aesthetic", 200, 256, 128, 32, "simple_animals"),
        ("alignment", 200, 288, 144, 32, "animal_activities")
    ],
)
def test_the_paper_s_tasks(name, epochs, samples, update, buffer, prompts):
    r, c = RECIPES[name], RECIPES[name].config()
    assert (
        c.num_epochs, c.samples_per_epoch, c.samples_per_update, c.per_prompt_stat_tracking_buffer_size,
        r.prompts
    ) == (epochs, samples, update, buffer, prompts)
    assert (
        c.sample_num_steps, c.train_learning_rate, c.train_clip_range, c.train_adv_clip_max,
        c.per_prompt_stat_tracking
    ) == (50, 3e-4, 1e-4, 5, True)

def test_emoji_recipes_are_for_a_laptop():
    emoji = {k: r for k, r in RECIPES.items() if k.startswith("emoji-")}
    assert len(emoji) >= 2
    queries = {EMOJI_SD: 1024, EMOJI_SD3: 3200}
    for r in emoji.values():
        c = r.config()
        assert c.mixed_precision == "no" and c.samples_per_epoch * r.epochs == queries[r.model]

def test_the_recipe_for_scenes_fits_its_model():
    recipe = get_recipe("emoji-scenes")
    c, numbers = recipe.config(), model_numbers(recipe.model)
    assert (recipe.model, recipe.reward, recipe.prompts) == (EMOJI_SD3, "scenes", "scenes")
    assert numbers.text["text"][0] == 17 and c.samples_per_epoch % c.samples_per_prompt == 0

def test_override():
    c = get_recipe("emoji-rwr").config(num_epochs=3, rwr_beta=.5)
    assert (c.num_epochs, c.rwr_beta, c.algorithm) == (3, .5, "rwr")
    with pytest.raises(InputError): get_recipe("emoji-rwr").config(train_batch_size=7)
    assert RECIPES["emoji-rwr"].config().num_epochs == 8  # nothing was changed in place

@pytest.mark.parametrize(
    "baseline,tracked", [("group", False), ("leave-one-out", False), ("normalize", True)]
)
def test_a_baseline_of_one_s_own_needs_no_statistics_per_prompt(baseline, tracked):
    many = 1 if tracked else 4
    c = get_recipe("compressibility").config(baseline=baseline, samples_per_prompt=many)
    assert (c.baseline, c.per_prompt_stat_tracking) == (baseline, tracked)

def test_two_baselines_asked_for_by_name_are_refused():
    with pytest.raises(InputError):
        get_recipe("compressibility").config(
            baseline="group", samples_per_prompt=4, per_prompt_stat_tracking=True
        )

@pytest.mark.parametrize(
    "wrong,right",
    [
        ("emoji-compresibility", "emoji-compressibility"), ("a100-aesthetic", "a100-aesthetic-lora"),
        ("Alignment", "alignment"), ("zzz", None)
    ],
)
def test_unknown_recipe(wrong, right):
    with pytest.raises(InputError) as e: get_recipe(wrong)
    assert (
        e.value.argument == "--recipe"
        and e.value.problem == f"there is no {wrong!r}"
        and "\n" not in str(e.value)
    )
    assert all(o in e.value.remedy for o in RECIPES)
    assert (f"did you mean {right!r}?" in e.value.remedy) if right else "did you mean" not in e.value.remedy

def test_list():
    text = str(list_recipes())
    assert len(text.splitlines()) == len(RECIPES) + 1 and all(
        k in text and r.about in text and r.needs in text for k, r in RECIPES.items()
    )

# Models

@pytest.mark.parametrize(
    "model,sizes,text,pixels",
    [
        (SD, (859.5, 83.7, 123.1), (77, 768), 512),
        ("CompVis/stable-diffusion-v1-4", (859.5, 83.7, 123.1), (77, 768), 512),
        ("stabilityai/stable-diffusion-2-1-base", (865.9, 83.7, 340.4), (77, 1024), 512),
        ("stabilityai/stable-diffusion-2-1", (865.9, 83.7, 340.4), (77, 1024), 768),
    ],
)
def test_published_sizes(model, sizes, text, pixels):
    n = model_numbers(model)
    assert tuple(round(o / 1e6, 1) for o in (n.unet, n.vae, n.text_encoder)) == sizes
    assert n.text == text and n.image == (3, pixels, pixels) and n.latent == (4, pixels // 8, pixels // 8)

@pytest.fixture
def folder(tmp_path):
    "The bundled model without its weights"
    return copytree(
        resources.files("ddpo_nb") / "weights/emoji-sd", tmp_path / "model",
        ignore=ignore_patterns("*.safetensors")
    )

def test_folder_without_weights(folder, emoji):
    n, pipe = model_numbers(str(folder)), load_pipeline()
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (
        (n.unet, n.vae, n.text_encoder)
        == (count(pipe.unet), count(pipe.vae), count(pipe.text_encoder))
        == (emoji.unet, emoji.vae, emoji.text_encoder)
    )
    assert n.latent == (8, 8, 8) and n.image == (3, 64, 64) and model_numbers(folder).unet == n.unet

def test_models_that_cannot_be_read(folder):
    for model in ("./nowhere", "nowhere", "/no/such/folder", "someone/no-such-model", str(folder.parent)):
        with pytest.raises(InputError) as e: model_numbers(model)
        assert e.value.argument == "--model" and model in e.value.problem and "\n" not in str(e.value)
    config = json.loads((folder/"unet/config.json").read_text())
    (folder/"unet/config.json").write_text(json.dumps(config | dict(addition_embed_type="text_time")))
    with pytest.raises(InputError, match="1.x or 2.x family"): model_numbers(str(folder))

# parameters as published, in millions: of the papers, of the model cards, or of the files' own sizes
PUBLISHED = {
    "stabilityai/stable-diffusion-xl-base-1.0": dict(
        unet=2567, vae=83.7, text_encoder=123, text_encoder_2=695),
    "stabilityai/stable-diffusion-3-medium-diffusers": dict(
        transformer=2085, vae=83.8, text_encoder=124, text_encoder_2=695, text_encoder_3=4762),
    "stabilityai/stable-diffusion-3.5-medium": dict(transformer=2470, text_encoder_3=4762),
    "stabilityai/stable-diffusion-3.5-large": dict(transformer=8146, text_encoder_3=4762),
    "black-forest-labs/FLUX.1-dev": dict(transformer=11901, vae=83.8, text_encoder=123, text_encoder_2=4762),
    "black-forest-labs/FLUX.1-schnell": dict(transformer=11891, text_encoder_2=4762),
}

@pytest.mark.parametrize("model", PUBLISHED)
def test_published_sizes(model):
    n = model_numbers(model)
    for part, millions in PUBLISHED[model].items():
        assert getattr(n, part) / 1e6 == pytest.approx(millions, rel=0.01), part
    channels = 4 if "xl" in model else 16
    assert n.latent == (channels, 128, 128) and n.image == (3, 1024, 1024)
    words, width = (77, 2048) if "xl" in model else (512, 4096) if "FLUX" in model else (333, 4096)
    assert n.text["text"] == (words, width)
    assert not hasattr(n, "unet" if "transformer" in n.parts else "transformer")

def test_tables_of_positions_are_counted_apart_from_what_is_trained():
    "SD3.5-medium's 2.24 billion parameters and a fixed table of 384 x 384 positions are its 2.47 billion"
    n = model_numbers("stabilityai/stable-diffusion-3.5-medium")
    weights = sum(p.numel() for p in n.view.trained.parameters())
    assert weights == pytest.approx(2.24e9, rel=0.01) and n.transformer == weights + 384**2 * 1536

@pytest.fixture(scope="module")
def families(tmp_path_factory):
    "A folder of a tiny pipeline, by its name"
    made = {}
    def folder(kind):
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = str(tmp_path_factory.mktemp(kind))
            tiny_pipeline(kind).save_pretrained(made[kind])
        return made[kind]
    return folder

# 16 rows or more: a CPU computes no fewer (02_policy)
SMALL = dict(mixed_precision="no", micro_batch_size=16, sample_batch_size=16, sample_num_batches_per_epoch=1,
             train_batch_size=16, sample_num_steps=4, lora_rank=4, sample_resolution=16)

def small(algorithm="ddpo-is", **more): return make_config(algorithm, "tiny", **SMALL | more)

@pytest.mark.parametrize("kind", TINY)
def test_a_folder_of_every_family_is_counted_as_it_is(kind, families):
    n, pipe = model_numbers(families(kind)), tiny_pipeline(kind)
    policy = family_of(pipe)(pipe)
    held = lambda m: sum(o.numel() for o in (*m.parameters(), *m.buffers()) if o.is_floating_point())
    own = {o: held(getattr(tiny_pipeline(kind), o)) for o in n.parts}
    assert n.parts == own and len(own) == len(policy.parts) and n.latent == policy.latent_shape
    text = policy.encode(["a cat"]).prompt
    assert n.text == (tuple(text.shape[1:]) if isinstance(text, torch.Tensor) else
                      {k: tuple(v.shape[1:]) for k, v in text.items()})

@pytest.mark.parametrize("algorithm,kl", [("ddpo-is", 0.1), ("rwr", 0.0)])
@pytest.mark.parametrize("kind", ["sdxl", "sd3", "sd3-without-t5", "flux"])
def test_saved_bytes_of_every_family_are_a_real_network_s(kind, algorithm, kl, families):
    n, c = model_numbers(families(kind)), small(algorithm, **dict(kl_coef=kl) if kl else {})
    mode, objective = R._LikeCuda(), make_objective(c)
    ghost, batch = R._skeleton(c, n, True, mode), R._micro_batch(c, n, torch.float32)
    def imagined():
        with mode: return objective.loss(ghost, *batch)[0].sum()
    pipe = load_pipeline(families(kind))
    real = family_of(pipe)(pipe, lora_rank=c.lora_rank)
    configure_policy(c, real)
    m, steps = R._micro(c, n), real.stochastic.nonzero().flatten()
    draw, latent = torch.arange(m), real.latent_shape
    t = Trajectories(
        torch.randn(2, 5, *latent), real.timesteps, torch.zeros(2, 4), real.stochastic,
        real.encode(["a cat", "an owl"]), ["a cat", "an owl"], [{}] * 2)
    e = dict(sample=draw % 2, step=steps[draw % len(steps)], advantage=torch.ones(m), weight=torch.ones(m),
             timestep=real.draw_levels(m, torch.Generator().manual_seed(0)), noise=torch.randn(m, *latent))
    seen = saved_bytes(lambda: objective.loss(real, t, e)[0].sum(), real.trained.parameters())
    assert seen > 1e6 and saved_bytes(imagined, ghost.trained.parameters()) == pytest.approx(seen, rel=0.02)

@pytest.mark.parametrize("kind", TINY)
def test_a_plan_of_every_family(kind, families):
    n, precision = model_numbers(families(kind)), "bf16"
    p = plan(small(mixed_precision=precision, micro_batch_size=1), n)
    text, passes = str(p), 1 if "flux" in kind else 2
    assert p.sampling_rows == 16 * 4 * passes and p.fits is None
    assert ("transformer rows" if "transformer" in n.parts else "UNet rows") in text
    for part, count in n.parts.items():
        assert f"{count:,}" in text and (part.replace("_", " ") in text or part in ("unet", "vae"))
    encoders = [o for o in n.parts if "text" in o]
    assert p.memory.text_encoder == 2 * sum(n.parts[o] for o in encoders)
    assert ("text encoders " in text) == (len(encoders) > 1)

def test_a_vae_that_overflows_in_fp16_is_counted_in_fp32(families):
    n = model_numbers(families("sdxl"))
    full, half, other = (estimate_memory(small(mixed_precision=o), n) for o in ("no", "fp16", "bf16"))
    alone = lambda m: m.decoding - (m.joining - m.trajectories)  # without what autocast holds
    assert alone(half) == alone(full) > 1.3 * alone(other)
    assert half.frozen == other.frozen + 2 * n.vae

def test_settings_that_a_family_cannot_work_with_are_refused_in_a_plan(families):
    flux, sdxl = model_numbers(families("flux")), model_numbers(families("sdxl"))
    for numbers, settings, name in (
        (flux, dict(sample_eta=0.5), "sample_eta"), (flux, dict(mixed_precision="fp16"), "mixed_precision"),
        (sdxl, dict(sample_sde="cps"), "sample_sde"), (flux, dict(sample_resolution=18), "resolution"),
        (flux, dict(sample_num_steps=1001), "sample_num_steps"),
    ):
        with pytest.raises(InputError, match=name): plan(small(**settings), numbers)

def test_a_model_index_cannot_name_any_class(families, tmp_path):
    copytree(families("sd3"), tmp_path/"m", ignore=ignore_patterns("*.safetensors"))
    index = json.loads((tmp_path/"m/model_index.json").read_text())
    for library, name in (("os", "system"), ("transformers", "pipeline"), ("diffusers", "os")):
        changed = index | dict(transformer=[library, name])
        (tmp_path/"m/model_index.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match="--model.*no network") as e: model_numbers(str(tmp_path/"m"))
        assert "\n" not in str(e.value)

# Levers, and cards

@pytest.mark.parametrize("lora", [True, False])
def test_levers_are_the_estimate_s_own(lora, families):
    n, c = model_numbers(families("sd3")), small()
    plain = estimate_memory(c, n, lora)
    off = estimate_memory(c, n, lora, text_encoders_off=True)
    assert plain.encoding == off.text_encoder == 0 and off.encoding == plain.text_encoder
    assert off.resident == plain.resident - plain.text_encoder and off.phases["encoding"] == off.encoding
    if not lora:
        with pytest.raises(InputError, match="quantize: a network that is trained whole"):
            estimate_memory(c, n, False, quantize="nf4")
        return
    eight, four = (estimate_memory(c, n, quantize=o) for o in ("int8", "nf4"))
    assert four.frozen < eight.frozen < plain.frozen and four.unpacking == eight.unpacking > 0
    assert (four.activations, four.trainable) == (plain.activations, plain.trainable)
    with pytest.raises(InputError, match="there is no 'int3'"): estimate_memory(c, n, quantize="int3")

def test_quantized_sizes_by_hand():
    "FLUX's 57 blocks in NF4: half a byte a weight, and a little for the scales; T5's embedding stays"
    n = model_numbers("black-forest-labs/FLUX.1-dev")
    assert quantized_parts(n.classes) == ("transformer", "text_encoder_2")
    network, t5 = (getattr(n.pipeline(), o) for o in ("transformer", "text_encoder_2"))
    for o in (network, t5): o.to(torch.bfloat16).requires_grad_(False)
    assert R._weights(network, "int8") == pytest.approx(11.9e9, rel=0.01)
    assert R._weights(network, "nf4") == pytest.approx(11.9e9 * (0.5 + 1 / 64 + 4 / 64 / 256), rel=0.01)
    table = 32128 * 4096
    assert R._weights(t5, "nf4") == pytest.approx((4.762e9 - table) * 0.516 + 2 * table, rel=0.01)
    assert R._weights(network) == 2 * n.transformer

def test_what_fits_is_what_the_estimate_says(families, monkeypatch):
    n, c = model_numbers(families("sd3")), small(sample_num_steps=6)
    monkeypatch.setattr(R, "_OWN", 0)
    rows = what_fits(c, n)
    assert rows[0]["settings"] == "as they are" and rows[0]["peak"] == R._size(estimate_memory(c, n).peak)
    assert [*rows[0]][2:] == ["16 GB", "24 GB", "40 GB", "80 GB"]
    half, one = (with_(small(sample_num_steps=6, **o), mixed_precision="bf16")
                 for o in ({}, dict(micro_batch_size=1)))
    assert rows[1] == rows[1] | dict(settings="+ bf16 for what is frozen",
                                     peak=R._size(estimate_memory(half, n).peak))
    assert rows[2] == rows[2] | dict(settings="+ one example at a time",
                                     peak=R._size(estimate_memory(one, n).peak))
    for own, fits in ((0, "yes"), (16 * 10**9, "no")):
        monkeypatch.setattr(R, "_OWN", own)
        found = what_fits(c, n, lora=False)
        assert {o["16 GB"] for o in found} == {fits} and {o["24 GB"] for o in found} == {"yes"}
        assert not [o for o in found if "int8" in o["settings"] or "NF4" in o["settings"]]

# Counting, against the trainer itself

@pytest.fixture(scope="module")
def counted():
    "A policy whose network counts its rows and costs nothing"
    policy, w = StableDiffusionPolicy(load_pipeline()), torch.nn.Parameter(torch.ones(()))
    policy.pipeline.unet.register_parameter("counted", w)  # a trainer trains the UNet's weights only
    policy.rows = {True: 0, False: 0}
    def network(latents, t, text, kept=None):
        policy.rows[torch.is_grad_enabled()] += len(latents)
        return latents * w
    policy.network, policy.decode, policy.trainable_parameters = (
        network, lambda x: 0 * x[:, :3], lambda: [w]
    )
    return policy

@settings(max_examples=20, deadline=None)
@given(st.data())
def test_plan_counts_what_the_trainer_does(counted, emoji, data):
    draw = lambda *o: data.draw(st.sampled_from(o))
    exact = [o for o in ALGORITHMS if o != "alignprop"]  # how far that one walks is drawn as it goes
    algorithm, batch, batches = draw(*exact), draw(1, 2, 3, 4), draw(1, 2, 3)
    n = batch * batches
    of = get_objective(algorithm)
    update = n if of.on_policy else draw(*(o for o in range(1, n + 1) if n % o == 0))
    kind = RWRConfig if algorithm.startswith("rwr") else DDPOConfig
    if algorithm.startswith("rwr"): own = dict(rwr_draws=draw(1, 3), rwr_normalizer=draw(*NORMALIZERS))
    elif takes(algorithm, "train_timestep_fraction"): own = dict(train_timestep_fraction=draw(.3, .5, 1.))
    elif algorithm == "draft": own = dict(draft_steps=draw(0, 1))
    else: own = {}
    if algorithm == "rwr-sparse": own["rwr_fraction"] = draw(.1, .5, 1.)
    config = kind(algorithm=algorithm, sample_batch_size=batch, sample_num_batches_per_epoch=batches,
                  train_batch_size=update, sample_num_steps=draw(1, 2, 3, 7),
                  train_num_inner_epochs=1 if of.on_policy else draw(1, 2),
                  sample_guidance_scale=draw(1., 5.), train_cfg=draw(True, False),
                  micro_batch_size=draw(1, 4, 64), mixed_precision="no", **own)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(R, "estimate_memory", lambda *a: None)
        p = plan(config, emoji, epochs=4)
    counted.rows = {True: 0, False: 0}
    def rewards(images, prompts, metadata):
        return images.flatten(1).sum(1) if of.of_gradients else np.arange(len(images), dtype=float), {}
    row = make_trainer(config, rewards, lambda: ("a cat", {}), counted).epoch()
    assert (
        p.samples_per_epoch, p.updates_per_epoch, p.sampling_rows + p.beside_rows, p.training_rows
    ) == (row["queries"], row["updates"], counted.rows[False], counted.rows[True])
    assert (p.updates, p.queries) == (4 * row["updates"], 4 * n)

@pytest.mark.parametrize("prompts,of_each", [(45, 1), (8, 1), (45, 8)])
def test_plan_knows_that_rwr_sparse_keeps_some_of_every_prompt(emoji, prompts, of_each):
    c = RWRConfig(
        algorithm="rwr-sparse", sample_batch_size=64, sample_num_batches_per_epoch=4, train_batch_size=64,
        samples_per_prompt=of_each, mixed_precision="no"
    )
    g, kept = torch.Generator().manual_seed(0), []
    for _ in range(20):
        drawn = torch.randint(prompts, (256 // of_each,), generator=g).repeat_interleave(of_each).tolist()
        kept.append(int((rwr_sparse_weights(torch.randn(256, generator=g), 0.1, drawn) > 0).sum()))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(R, "estimate_memory", lambda *a: None)
        rows = plan(c, emoji, prompts=prompts).training_rows / 2   # guidance
    assert rows == pytest.approx(sum(kept) / 20, rel=0.12)

def test_processes_share_the_work(emoji):
    c = make_config("ddpo-is", mixed_precision="no")
    one, three = plan(c, emoji), plan(c, emoji, processes=3)
    for name in ("samples_per_epoch", "sampling_rows", "training_rows", "queries"):
        assert getattr(three, name) == 3 * getattr(one, name)
    assert three.updates == one.updates and three.memory.gradients == 2 * one.memory.gradients

def test_more_steps_than_the_model_has(emoji):
    with pytest.raises(InputError, match="sample_num_steps: 1001 is more"):
        plan(make_config("ddpo-is", sample_num_steps=1001), emoji)

def test_more_samples_of_a_prompt_than_an_epoch_has_places_for(emoji):
    c = make_config("ddpo-is", samples_per_prompt=24)  # 64 samples of one process, 192 of three
    with pytest.raises(InputError, match="samples_per_prompt: 24 does not divide the 64 samples"):
        plan(c, emoji)
    assert plan(c, emoji, processes=3).samples_per_epoch == 192

# Memory

@pytest.fixture(autouse=True)
# an estimate is about peft's own layers
def as_on_a_gpu(monkeypatch): monkeypatch.setattr(SmallLora, "most", 0)

def losses(config, numbers, lora):
    "The loss of one micro-batch, on `meta` and on this CPU, with the UNets' parameters"
    mode, half = R._LikeCuda(), torch.float32
    ghost, objective = R._skeleton(config, numbers, lora, mode), make_objective(config)
    batch = R._micro_batch(config, numbers, half)
    def imagined():
        with mode: return objective.loss(ghost, *batch)[0].sum()
    real, m, T = (
        StableDiffusionPolicy(load_pipeline(), lora, config.lora_rank, config.sample_num_steps),
        R._micro(config, numbers), config.sample_num_steps
    )
    if config.gradient_checkpointing: real.trained.enable_gradient_checkpointing()
    kept, draw = objective.states_kept(T) or T + 1, torch.arange(m)
    t = Trajectories(
        torch.randn(2, kept, *numbers.latent), real.timesteps, torch.zeros(2, T), real.stochastic,
        real.encode(["a cat", "an owl"]), ["a cat", "an owl"], [{}] * 2, uphill=torch.ones(2, *numbers.latent)
    )
    e = dict(
        sample=draw % 2, step=draw % T, timestep=draw * 9, advantage=torch.ones(m), weight=torch.ones(m),
        noise=torch.randn(m, *numbers.latent), reward=torch.ones(m),
        passed=torch.ones(m, T, dtype=torch.bool)
    )
    return (
        imagined, list(ghost.pipeline.unet.parameters()), lambda: objective.loss(real, t, e)[0].sum(),
        list(real.trained.parameters())
    )

@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("algorithm", ["ddpo-is", "rwr"])
def test_saved_bytes_are_a_real_network_s(lora, checkpointing, algorithm, emoji):
    config = with_(
        make_config(algorithm, mixed_precision="no", micro_batch_size=24, lora_rank=8),
        gradient_checkpointing=checkpointing,
    )
    imagined, ghosts, real, weights = losses(config, emoji, lora)
    estimate, seen = saved_bytes(imagined, ghosts), saved_bytes(real, weights)
    assert seen > 5e6 and estimate == pytest.approx(seen, rel=.1)
    assert saved_bytes(real) > seen  # without `but`, weights count

def allocator_peak(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        run()
    live = peak = 0
    for e in sorted(
        (e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += e.nbytes()
        peak = max(peak, live)
    return peak

@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_peak_is_the_allocator_s(lora, checkpointing, emoji):
    config = with_(
        make_config("ddpo-is", mixed_precision="no", micro_batch_size=24, lora_rank=8),
        gradient_checkpointing=checkpointing,
    )
    imagined, ghosts, real, weights = losses(config, emoji, lora)
    for p in weights:
        if p.requires_grad: p.grad = torch.zeros_like(p)
    assert estimate_memory(config, emoji, lora).activations == pytest.approx(
        allocator_peak(lambda: torch.autograd.backward(real())), rel=0.1
    )

@pytest.mark.parametrize("steps", [1, 3])
def test_a_walk_back_has_the_memory_of_one_step(steps, emoji):
    "However many steps the gradient goes through; and what comes back through the decoder is counted"
    config = make_config("draft", micro_batch_size=8, sample_num_steps=3, draft_steps=steps, lora_rank=8)
    imagined, ghosts, real, weights = losses(config, emoji, True)
    for p in weights:
        if p.requires_grad: p.grad = torch.zeros_like(p)
    m = estimate_memory(config, emoji, True)
    assert m.activations == pytest.approx(allocator_peak(lambda: torch.autograd.backward(real())), rel=0.1)
    if steps > 1:
        one = replace(config, draft_steps=1)
        assert m.activations < 1.15 * estimate_memory(one, emoji, True).activations
    policy, x = StableDiffusionPolicy(load_pipeline()), torch.randn(16, *emoji.latent)
    judge = lambda images: (None, images.sum())
    assert m.decoding == pytest.approx(allocator_peak(lambda: uphill(policy, x, judge)), rel=0.1)

@pytest.mark.parametrize("slicing", [True, False])
def test_sampling_peaks_are_the_allocator_s(slicing, emoji):
    config = with_(
        make_config(
            "ddpo-is", mixed_precision="no", sample_batch_size=16, sample_num_batches_per_epoch=4,
            train_batch_size=64, micro_batch_size=16
        ),
        vae_slicing=slicing,
    )
    m, policy = estimate_memory(config, emoji), StableDiffusionPolicy(load_pipeline(), num_steps=10)
    if slicing: policy.pipeline.vae.enable_slicing()
    x, cond = torch.randn(16, *emoji.latent), policy.encode(["a cat"] * 16)
    with torch.no_grad():
        assert m.sampling == pytest.approx(
            allocator_peak(lambda: policy.step(x, torch.full((16,), 500), cond)), rel=0.1
        )
        # a convolution's scratch
        assert m.decoding == pytest.approx(allocator_peak(lambda: policy.decode(x)), rel=.1, abs=6e5)

def test_peak_bytes_counts_what_is_alive():
    def run():
        a = torch.zeros(100)          # 400 bytes
        b = a + 1                     # 800
        a.add_(1); b.view(10, 10)     # nothing new
        del a
        c = torch.cat([b, b, b])      # 400 + 1200
        return c
    assert peak_bytes(run) == 1600

def test_resident_parts_by_hand(sd):
    c = RECIPES["a100-aesthetic-lora"].config()
    m, full = estimate_memory(c, sd), estimate_memory(c, sd, lora=False)
    adapters = 797_184  # of rank 4 in SD 1.5's 128 attention projections
    assert m.trainable == m.gradients == 4 * adapters and m.optimizer == 8 * adapters
    assert m.frozen == 2 * (sd.unet + sd.vae) and m.text_encoder == 2 * sd.text_encoder
    assert m.trajectories == 24 * (4 * (51 * 4 * 64 * 64 + 50 + 3 * 512 * 512) + 2 * 77 * 768)
    assert (
        full.frozen == 2 * sd.vae
        and full.trainable == full.gradients == 4 * sd.unet
        and full.optimizer == 8 * sd.unet
    )
    assert m.peak == m.resident + max(m.phases.values()) and m.base == 0
    assert estimate_memory(c, sd, base=True).peak == m.peak + 4 * (sd.unet + sd.vae + sd.text_encoder)

def test_goals(sd):
    "LoRA under 6 GB, full fine-tuning with 8-bit AdamW under 16 GB: bf16, micro-batch 1"
    c = with_(
        RECIPES["a100-aesthetic-lora"].config(
            mixed_precision="bf16", micro_batch_size=1, sample_batch_size=1, sample_num_batches_per_epoch=24
        ),
        gradient_checkpointing=True,
    )
    assert estimate_memory(c, sd).peak < 6e9
    with_(c, train_use_8bit_adam=True)
    m = estimate_memory(c, sd, lora=False)
    assert m.peak < 16e9 and 2 * sd.unet < m.optimizer < 2.1 * sd.unet

base = dict(
    mixed_precision="no", sample_batch_size=4, sample_num_batches_per_epoch=4, train_batch_size=8,
    micro_batch_size=4
)

@settings(max_examples=4, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 16), st.integers(1, 16))
def test_more_examples_and_higher_rank_need_more(emoji, micro, more, rank, higher):
    get = lambda **o: estimate_memory(
        make_config("ddpo-is", **(base | dict(micro_batch_size=micro, lora_rank=rank) | o)), emoji
    )
    m, wide, high = get(), get(micro_batch_size=micro + more), get(lora_rank=rank + higher)
    assert wide.activations >= m.activations and wide.peak >= m.peak and wide.resident == m.resident
    assert (
        high.trainable * rank == m.trainable * (rank + higher)
        and high.optimizer > m.optimizer
        and high.activations > m.activations
        and high.peak > m.peak
    )

@pytest.mark.parametrize("lora", [True, False])
def test_each_switch_gives_something_back(lora, emoji):
    get = lambda **o: estimate_memory(with_(make_config("ddpo-is", **base), **o), emoji, lora)
    m = get()
    twice, eight = get(gradient_checkpointing=True), get(train_use_8bit_adam=True)
    assert twice.activations < m.activations and twice.peak < m.peak
    assert eight.optimizer <= m.optimizer * (1 if lora else .3) and eight.scratch == 0
    assert get(vae_slicing=True).decoding < m.decoding
    off = get(offload_trajectories=True)
    assert (
        off.trajectories == m.trajectories / 4
        and off.host == m.trajectories
        and off.joining == 0
        and off.peak < m.peak
    )
    half = estimate_memory(make_config("ddpo-is", **base | dict(mixed_precision="bf16")), emoji, lora)
    assert half.frozen * 2 == m.frozen and half.trainable == m.trainable
    assert not lora or half.activations < m.activations
    assert (
        estimate_memory(make_config("ddpo-is", **base, train_cfg=False), emoji, lora).activations
        < 0.6 * m.activations
    )

def test_no_weights_are_touched(sd):
    "A plan of Stable Diffusion 1.5 opens no weights, allocates a small part of their 4 GB, and takes seconds"
    opened, watching = [], True
    def hook(event, args):
        if watching and event == "open" and isinstance(args[0], str): opened.append(args[0])
    sys.addaudithook(hook)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    text = str(plan(RECIPES["a100-aesthetic-full"].config(), model_numbers(SD), lora=False))
    seconds, grown = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    watching = False
    assert "4,800" in text and seconds < 20 and grown < 300_000  # kB
    assert not [o for o in opened if o.endswith((".safetensors", ".bin"))]

def test_plan_s_text(emoji):
    c = with_(
        make_config("ddpo-is", num_epochs=7, **base), offload_trajectories=True, gradient_checkpointing=True
    )
    text = str(plan(c, emoji, base=True))
    for part in (
        "ddpo-is on emoji-sd, LoRA of rank 16, precision no", "reward queries in all", "112",
        "untouched model", "peak, while training", ", checkpointing", "trajectories in main memory"
    ):
        assert part in text
    assert "untouched model" not in str(plan(make_config("ddpo-is", **base), emoji))

def test_sizes_in_words():
    assert [R._size(n) for n in (0, 999, 1234, 56_789, 999_600, 7_000_000_000, 65e9)] == [
        "0 B", "999 B", "1.23 kB", "56.8 kB", "1.00 MB", "7.00 GB", "65.0 GB"
    ]

def test_a_price_on_leaving_keeps_a_second_unet_beside_one_that_is_trained_whole():
    n = model_numbers("emoji-sd")
    def memory(lora, kl):
        return estimate_memory(make_config("ddpo-is", lora=lora, kl_coef=kl, logdir=""), n, lora=lora)
    assert (memory(False, 0.1).base, memory(False, 0.).base, memory(True, 0.1).base) == (4 * n.unet, 0, 0)
    assert (
        memory(False, 0.1).peak >= memory(False, 0.0).peak + 4 * n.unet
        and memory(True, 0.1).peak >= memory(True, 0.0).peak
    )
