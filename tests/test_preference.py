"""Judges of human preference: conversions lose nothing, scores belong to a picture and its prompt, and what
cannot be loaded says so in one line."""
from importlib import resources
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from transformers import (BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPConfig,
                          CLIPModel)
from ddpo_nb.clip import CLIPAlignment, load_embedder
from ddpo_nb.policy import ModelError
from ddpo_nb.preference import (BLIP_TEXT, BLIP_VISION, ImageReward, PickScore, VIT_H, build, fold,
                                from_image_reward, from_open_clip, hps_v2, image_reward, load_open_clip,
                                pickscore, read_weights)
from ddpo_nb.prompts import InputError
from ddpo_nb.rewards import REWARDS, get_reward

EMOJI = str(resources.files("ddpo_nb")/"weights/emoji-clip")
prompts = ["a fox on a blue background", "a frog", "a fox on a blue background", "two whales and a bee"]
def images(n=4, size=64, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))

@pytest.fixture(scope="module")
def clip(): return load_embedder()

def to_open_clip(state):
    "transformers' names into open_clip's, written out the other way round"
    out, name = {}, lambda k, p, tower: k.replace(f"{p}.encoder.layers.", f"{tower}.resblocks.").replace(
        "layer_norm1", "ln_1"
    ).replace("layer_norm2", "ln_2").replace("self_attn.out_proj", "attn.out_proj").replace(
        "mlp.fc1", "mlp.c_fc"
    ).replace(
        "mlp.fc2", "mlp.c_proj"
    )
    single = {
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "logit_scale": "logit_scale",
    }
    single |= {
        f"{a}.{w}": f"{b}.{w}"
        for w in ("weight", "bias")
        for a, b in (
            ("vision_model.pre_layrnorm", "visual.ln_pre"), ("vision_model.post_layernorm", "visual.ln_post"),
            ("text_model.final_layer_norm", "ln_final")
        )
    }
    for k, v in state.items():
        if k == "visual_projection.weight":
            out["visual.proj"] = v.T
        elif k == "text_projection.weight":
            out["text_projection"] = v.T
        elif k in single:
            out[single[k]] = v
        elif ".k_proj." in k or ".v_proj." in k:
            pass
        else:
            k2 = (
                name(k, "vision_model", "visual.transformer")
                if k.startswith("vision")
                else name(k, "text_model", "transformer")
            )
            if ".q_proj." in k:
                out[k2.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(
                    [state[k.replace("q_proj", f"{p}_proj")] for p in "qkv"]
                )
            else:
                out[k2] = v
    return {k: v.clone().contiguous() for k, v in out.items()}

# PickScore

def test_pickscore_is_the_logit_of_transformers(clip):
    x = images()
    tokens = clip.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        out = clip.model(
            pixel_values=clip.image_processor(
                images=list((x * 255).round().byte().permute(0, 2, 3, 1).numpy()), return_tensors="pt"
            ).pixel_values,
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        )
    rewards, info = PickScore(clip)(x, prompts, [{}]*4)
    np.testing.assert_allclose(rewards, out.logits_per_image.diagonal().numpy(), atol=1e-4)
    assert info == {} and rewards.shape == (4,) and rewards.dtype == np.float64

def test_pickscore_ranks_as_the_cosine_does_and_keeps_negative_ones(clip):
    x, p = images(16, seed=1), ["a frog"]*16
    score, cosine = PickScore(clip)(x, p, [{}]*16)[0], CLIPAlignment(clip)(x, p, [{}]*16)[0]
    np.testing.assert_allclose(score, cosine * clip.model.logit_scale.exp().item(), rtol=1e-6)
    assert cosine.min() < 0 or (score > 0).all()

def test_pickscore_takes_weights_and_processor_from_different_places(clip, tmp_path):
    clip.model.save_pretrained(tmp_path)   # weights alone
    with pytest.raises(ModelError, match="^pickscore: cannot load") as e:
        pickscore(weights=str(tmp_path), processor=str(tmp_path))
    assert "\n" not in str(e.value)
    found = pickscore(weights=str(tmp_path), processor="emoji-clip")
    assert (
        found.to("cpu")(images(), prompts, [{}] * 4)[0] == PickScore(clip)(images(), prompts, [{}] * 4)[0]
    ).all()

# HPSv2

@pytest.mark.parametrize("kind", ["pt", "wrapped", "several processes", "safetensors"])
def test_open_clips_weights_give_the_same_scores(clip, tmp_path, kind):
    state = to_open_clip(clip.model.state_dict())
    file = tmp_path/("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save(
            (
                dict(
                    epoch=3,
                    state_dict={
                        ("module." if kind == "several processes" else "") + k: v for k, v in state.items()
                    },
                )
                if kind != "pt"
                else state
            ),
            file,
        )
    found = CLIPAlignment(
        load_open_clip(str(file), processor="emoji-clip", config=clip.model.config.to_dict())
    )
    assert (found(images(), prompts, [{}]*4)[0] == CLIPAlignment(clip)(images(), prompts, [{}]*4)[0]).all()

def test_conversion_places_every_weight(clip):
    theirs = to_open_clip(clip.model.state_dict())
    mine = from_open_clip(theirs)
    assert len(theirs) < len(mine) and set(mine) == set(clip.model.state_dict())
    assert all(torch.equal(mine[k], v) for k, v in clip.model.state_dict().items())

def test_hps_v2_reads_the_file_of_its_version(clip, tmp_path):
    a, b = clip.model.state_dict(), {k: v.clone() for k, v in clip.model.state_dict().items()}
    b["visual_projection.weight"] *= -1
    for name, state in (("HPS_v2_compressed.pt", a), ("HPS_v2.1_compressed.pt", b)):
        torch.save(dict(state_dict=to_open_clip(state)), tmp_path / name)
    old, new = (
        hps_v2(version=v, weights=str(tmp_path), processor="emoji-clip", config=clip.model.config.to_dict())(
            images(), prompts, [{}] * 4
        )[0]
        for v in ("v2.0", "v2.1")
    )
    np.testing.assert_allclose(old, -new, atol=1e-6)
    assert (abs(old) <= 1).all() and abs(old).max() > .01

def test_hps_v2_knows_its_versions():
    with pytest.raises(InputError, match="v2.0, v2.1") as e: hps_v2(version="v3")
    assert "\n" not in str(e.value)

@pytest.mark.parametrize(
    "change,says",
    [
        (lambda s: s.pop("ln_final.bias"), r"1 missing \(first: text_model.final_layer_norm.bias\)"),
        (lambda s: s.update(extra=torch.ones(1)), r"1 unknown \(first: extra\)"),
        (
            lambda s: s.update(text_projection=torch.ones(3, 3)),
            r"1 of another shape \(first: text_projection.weight\)"
        ),
    ],
)
def test_open_clips_weights_must_fit(clip, tmp_path, change, says):
    state = to_open_clip(clip.model.state_dict())
    change(state)
    torch.save(state, tmp_path/"w.pt")
    with pytest.raises(ModelError, match=says) as e:
        load_open_clip(
            str(tmp_path / "w.pt"), processor="emoji-clip", config=clip.model.config.to_dict(),
            argument="hps_v2"
        )
    assert str(e.value).startswith("hps_v2: cannot load") and "\n" not in str(e.value)

class Danger:
    def __reduce__(self): return (open, ("touched", "w"))

def test_a_file_that_holds_more_than_tensors_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict={"a": torch.ones(1), "b": Danger()}), tmp_path/"w.pt")
    with pytest.raises(ModelError, match="could run code") as e: load_open_clip("w.pt")
    assert "\n" not in str(e.value) and not (tmp_path/"touched").exists()

@pytest.mark.parametrize("place", ["/nowhere/w.pt", "./nowhere", "~/nowhere.safetensors", "w.pt"])
def test_a_missing_file_is_one_line(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (load_open_clip, lambda p: image_reward(weights=p)):
        with pytest.raises(ModelError, match="there is no such file") as e: load(place)
        assert "\n" not in str(e.value) and place in str(e.value)

def test_read_weights_looks_into_a_folder(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path/"x.pt")
    assert read_weights(str(tmp_path), "x.pt")["a"].tolist() == [1, 1]
    with pytest.raises(OSError): read_weights(str(tmp_path), "y.pt")

# ImageReward

V = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=64,
    patch_size=16, layer_norm_eps=1e-6, initializer_range=0.2
)
T = dict(
    vocab_size=482, hidden_size=24, encoder_hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=40, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    pad_token_id=1, sep_token_id=1
)

@pytest.fixture(scope="module")
def blip():
    torch.manual_seed(0)
    return (
        BlipVisionModel(BlipVisionConfig(**V)).eval(),
        BlipTextModel(BlipTextConfig(**T), add_pooling_layer=False).eval()
    )

@pytest.fixture(scope="module")
def theirs(blip):
    "The same weights by ImageReward's names, with all that its file holds besides"
    vision, text = blip
    names = {
        "embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding.": "patch_embed.proj.", "post_layernorm.": "norm.",
        "encoder.layers.": "blocks.", "layer_norm": "norm", "self_attn.projection.": "attn.proj.",
        "self_attn.qkv.": "attn.qkv."
    }
    out = {}
    for k, v in vision.state_dict().items():
        for a, b in names.items(): k = k.replace(a, b)
        out["blip.visual_encoder." + k] = v
    out |= {"blip.text_encoder." + k: v for k, v in text.state_dict().items()}
    out |= {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]} | {
        f"blip.{k}_proj.{w}": torch.ones(1) for k in ("vision", "text") for w in ("weight", "bias")
    }
    g, sizes = torch.Generator().manual_seed(1), (24, 16, 8, 4, 2, 1)
    for place, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
        out |= {
            f"mlp.layers.{place}.weight": torch.randn(b, a, generator=g),
            f"mlp.layers.{place}.bias": torch.randn(b, generator=g)
        }
    return out

def load_small(path):
    return image_reward(
        weights=str(path), tokenizer=EMOJI, processor="emoji-clip", vision_config=V, text_config=T
    )

@pytest.fixture(scope="module")
def reader(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("ir")/"ImageReward.pt"
    torch.save(theirs, path)
    return load_small(path.parent)

def test_image_reward_by_its_formula(blip, theirs, reader, clip):
    vision, text = blip
    x = images()
    tokens = clip.tokenizer(prompts, padding="max_length", max_length=35, return_tensors="pt")
    with torch.no_grad():
        seen = vision(
            clip.image_processor(
                images=list((x * 255).round().byte().permute(0, 2, 3, 1).numpy()), return_tensors="pt"
            ).pixel_values
        ).last_hidden_state
        h = text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2])
        ).last_hidden_state[:, 0]
        for i in (0, 2, 4, 6, 7): h = h @ theirs[f"mlp.layers.{i}.weight"].T + theirs[f"mlp.layers.{i}.bias"]
    rewards, info = reader(x, prompts, [{}]*4)
    np.testing.assert_allclose(
        rewards, ((h[:, 0] - 0.16717362830052426) / 1.0333394966054072).numpy(), rtol=1e-4, atol=1e-4
    )
    assert info == {} and rewards.shape == (4,) and rewards.dtype == np.float64 and rewards.std() > .01

@settings(max_examples=15, deadline=None)
@given(st.permutations(range(4)), st.integers(1, 5))
def test_image_reward_belongs_to_picture_and_prompt(reader, order, batch):
    x, order = images(), list(order)
    whole = reader(x, prompts, [{}]*4)[0]
    other = ImageReward(
        reader.vision, reader.text, reader.head, reader.image_processor, reader.tokenizer, batch_size=batch
    )
    np.testing.assert_allclose(
        other(x[order], [prompts[i] for i in order], [{}] * 4)[0], whole[order], atol=1e-4
    )

def test_image_reward_reads_the_prompt_and_looks_at_the_picture(reader):
    x = images(1).expand(2, -1, -1, -1)
    by_prompt = reader(x, ["a frog", "a whale"], [{}]*2)[0]
    by_picture = reader(images(2), ["a frog"]*2, [{}]*2)[0]
    assert abs(by_prompt[0] - by_prompt[1]) > 1e-3 and abs(by_picture[0] - by_picture[1]) > 1e-3
    long = "a frog and a whale " * 30
    # cut off, without an error
    reader.told_cut = False
    with pytest.warns(UserWarning, match="^1 of 1 prompts .* the 35 tokens that ImageReward reads"):
        cut = reader(x[:1], [long], [{}])[0]
    assert cut == pytest.approx(reader(x[:1], [long + "bee"], [{}])[0])

def test_image_reward_does_not_score_broken_pictures(reader):
    x = images(2)
    x[1, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="1 of 2"): reader(x, prompts[:2], [{}]*2)

@pytest.mark.parametrize(
    "change,says",
    [
        (lambda s: s.pop("blip.visual_encoder.norm.bias"), r"1 missing \(first: post_layernorm.bias\)"),
        (
            lambda s: s.update({"blip.itm_head.bias": torch.ones(2)}),
            r"1 weights are unknown \(first: blip.itm_head.bias\)"
        ),
        (
            lambda s: s.update({"blip.text_encoder.embeddings.LayerNorm.bias": torch.ones(5)}),
            r"1 of another shape \(first: embeddings.LayerNorm.bias\)",
        ),
        (lambda s: [s.pop(k) for k in [*s] if k.startswith("mlp.")], "no weights of its head"),
    ],
)
def test_image_rewards_weights_must_fit(theirs, tmp_path, change, says):
    state = dict(theirs)
    change(state)
    torch.save(state, tmp_path/"ImageReward.pt")
    with pytest.raises(ModelError, match=says) as e: load_small(tmp_path)
    assert str(e.value).startswith("image_reward: cannot load") and "\n" not in str(e.value)

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 1000))
def test_linear_layers_without_activations_are_one(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    layers = [(torch.randn(b, a, generator=g), torch.randn(b, generator=g)) for a, b in zip(sizes, sizes[1:])]
    x = y = torch.randn(3, sizes[0], generator=g)
    for w, b in layers: y = y @ w.T + b
    torch.testing.assert_close(fold(layers)(x), y, rtol=1e-3, atol=1e-3 * max(1., y.abs().max().item()))

# The published sizes, by shapes alone

def test_sizes_are_the_published_ones():
    "open_clip lists 986.11 million parameters for ViT-H/14; BLIP's two networks are counted here by hand."
    count = lambda m: sum(p.numel() for p in m.parameters())
    with torch.device("meta"):
        assert round(count(CLIPModel(CLIPConfig(**VIT_H))) / 1e6, 2) == 986.11
        assert (
            count(BlipVisionModel(BlipVisionConfig(**BLIP_VISION)))
            == 1024 * (3 * 16 * 16 + 1) + 1024 * (197 + 1) + 24 * (12 * 1024**2 + 13 * 1024) + 2 * 1024
        )
        text = BlipTextModel(BlipTextConfig(**BLIP_TEXT), add_pooling_layer=False)
        own, cross, feed = (
            4 * (768**2 + 768) + 2 * 768, 2 * (768**2 + 768) + 2 * (1024 * 768 + 768) + 2 * 768,
            2 * 768 * 3072 + 3072 + 768 + 2 * 768
        )
        assert count(text) == (30524 + 512)*768 + 2*768 + 12*(own + cross + feed)

@pytest.mark.parametrize("name", ["pickscore", "hps_v2", "image_reward"])
def test_by_name_without_a_network_is_one_line(name, monkeypatch, tmp_path):
    assert name in REWARDS
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=f"^{name}: cannot load") as e: get_reward(name)
    assert "\n" not in str(e.value)
