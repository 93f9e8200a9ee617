"Embeddings of pictures and texts, and the rewards made of them."
from importlib import resources
import ast, json, shutil
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (BertConfig, BertModel, CLIPModel, CLIPProcessor, AutoImageProcessor, AutoTokenizer,
                          PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel)
from ddpo_nb.clip import (CLIPAlignment, EMOJI_CLIP, Embedder, OPENAI_CLIP, clip_alignment, clip_score,
                          default_embedder, load_embedder)
from ddpo_nb.policy import ModelError
from ddpo_nb.prompts import InputError
from ddpo_nb.rewards import get_reward

EMOJI = resources.files("ddpo_nb")/"weights"/EMOJI_CLIP
prompts = [
    "a fox on a blue background", "a frog", "", "a fox on a blue background",
    "two whales and a bee on a pink background"
]
def images(n=5, size=64, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))

@pytest.fixture(scope="module")
def embedder(): return load_embedder()

def test_rows_have_length_one(embedder):
    for rows in (embedder.images(images()), embedder.texts(prompts)):
        assert rows.shape == (5, embedder.dim) and rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))

@settings(max_examples=12, deadline=None)
@given(st.integers(1, 7), st.permutations(range(5)))
def test_the_batch_and_the_order_change_nothing(embedder, size, order):
    order = list(order)
    other = Embedder(embedder.model, embedder.image_processor, embedder.tokenizer, batch_size=size)
    torch.testing.assert_close(
        other.images(images()[order]), embedder.images(images())[order], atol=2e-5, rtol=0
    )
    torch.testing.assert_close(
        other.texts([prompts[i] for i in order]), embedder.texts(prompts)[order], atol=2e-5, rtol=0
    )

def test_each_distinct_text_is_embedded_once(embedder, monkeypatch):
    sizes, inner = [], embedder.model.get_text_features
    monkeypatch.setattr(
        embedder.model, "get_text_features", lambda **kw: (sizes.append(len(kw["input_ids"])), inner(**kw))[1]
    )
    rows = embedder.texts(["a fox", "a frog", "a fox", "a fox"])
    assert (
        sizes == [2]
        and torch.equal(rows[0], rows[2])
        and torch.equal(rows[0], rows[3])
        and not torch.equal(rows[0], rows[1])
    )

def test_padding_is_no_part_of_a_text(embedder):
    "CLIP looks only back, from the end of the text: shorter padding, or none, gives the same vector"
    for text in prompts:
        tokens = embedder.tokenizer(text, return_tensors="pt", padding=False)
        with torch.no_grad():
            bare = embedder.model.get_text_features(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
        bare = getattr(bare, "pooler_output", bare)
        torch.testing.assert_close(bare / bare.norm(), embedder.texts([text]), atol=1e-5, rtol=0)

@pytest.mark.filterwarnings("ignore:. of . prompts are longer")
def test_long_texts_are_cut_off(embedder):
    torch.testing.assert_close(embedder.texts(["a fox " * 40]), embedder.texts(["a fox " * 60]))

def test_pictures_of_other_sizes_pass_the_processor(embedder):
    flat = torch.tensor([.2, .5, .9]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(
        embedder.images(flat.expand(1, 3, 200, 200)), embedder.images(flat.expand(1, 3, 64, 64)), atol=1e-4,
        rtol=0
    )
    assert embedder.images(images(2, 96)).shape == (2, embedder.dim)
    with pytest.raises(InputError, match="1 of 1"): embedder.images(torch.full((1, 3, 8, 8), float("nan")))

def test_weights_do_not_train(embedder):
    assert not embedder.model.training and not any(p.requires_grad for p in embedder.model.parameters())
    assert not embedder.images(images(1)).requires_grad
    embedder.images(pictures := images(1).requires_grad_()).sum().backward()
    assert pictures.grad.any() and all(p.grad is None for p in embedder.model.parameters())

# The reward

def test_alignment_is_transformers_own_logit_without_its_temperature():
    own = CLIPModel.from_pretrained(EMOJI, dtype=torch.float32).eval()
    processor = CLIPProcessor(AutoImageProcessor.from_pretrained(EMOJI), AutoTokenizer.from_pretrained(EMOJI))
    x = images()
    given = processor(
        text=prompts,
        images=[o for o in (x * 255).round().byte().permute(0, 2, 3, 1).numpy()],
        return_tensors="pt", padding="max_length", max_length=16
    )
    with torch.no_grad():
        expected = (
            own(**{k: given[k] for k in ("input_ids", "attention_mask", "pixel_values")}).logits_per_image
            / own.logit_scale.exp()
        )
    rewards, info = clip_alignment()(x, prompts, [{}]*5)
    np.testing.assert_allclose(rewards, expected.diagonal().numpy(), atol=2e-5)
    assert info == {} and rewards.dtype == np.float64 and abs(rewards).max() <= 1

@pytest.mark.filterwarnings("ignore:. of . prompts are longer")
def test_clip_score_is_its_formula(embedder):
    x, p = images(12, seed=3), [prompts[i % 5] for i in range(12)]
    cosine = CLIPAlignment(embedder)(x, ["A photo depicts " + o for o in p], [{}]*12)[0]
    np.testing.assert_allclose(clip_score()(x, p, [{}]*12)[0], 2.5 * np.maximum(cosine, 0), atol=1e-6)
    assert CLIPAlignment(embedder, scale=2.5)(x, p, [{}]*12)[0].min() >= 0

def test_pictures_fit_their_own_prompts(embedder):
    from ddpo_nb.policy import load_pipeline
    p = ["a fox on a blue background", "a frog on a pink background", "a whale on a yellow background"]
    x = load_pipeline()(
        p, num_inference_steps=10, guidance_scale=5.0, eta=1.0,
        generator=[torch.Generator().manual_seed(i) for i in range(3)], output_type="pt"
    ).images
    own, other = (CLIPAlignment(embedder)(x, q, [{}]*3)[0] for q in (p, p[1:] + p[:1]))
    assert (own > other + .2).all()

def test_it_moves(embedder):
    reward = clip_alignment()
    before = reward(images(), prompts, [{}]*5)[0]
    assert reward.to("cpu") is reward and reward.embedder.device.type == "cpu"
    half = reward.embedder.model.half().float()   # what the rounding to fp16 changes
    np.testing.assert_allclose(
        CLIPAlignment(Embedder(half, embedder.image_processor, embedder.tokenizer))(
            images(), prompts, [{}] * 5
        )[0],
        before, atol=1e-2
    )

def test_to_moves_the_network():
    reward = clip_alignment()
    reward.to("meta")
    assert reward.embedder.device.type == "meta"

@pytest.mark.cuda
def test_it_scores_on_the_gpu():
    reward = clip_alignment()
    before = reward(images(), prompts, [{}]*5)[0]
    np.testing.assert_allclose(reward.to("cuda")(images().cuda(), prompts, [{}]*5)[0], before, atol=1e-3)

@pytest.mark.filterwarnings("ignore:. of . prompts are longer")
def test_by_name(embedder):
    for name, own in (("clip_alignment", clip_alignment), ("clip_score", clip_score)):
        assert (get_reward(name)(images(), prompts, [{}]*5)[0] == own()(images(), prompts, [{}]*5)[0]).all()
    total, info = get_reward("clip_alignment - 0.5*jpeg_incompressibility")(images(), prompts, [{}]*5)
    np.testing.assert_allclose(
        total, info["reward/clip_alignment"] - 0.5 * info["reward/jpeg_incompressibility"]
    )

def test_each_model_has_its_judge():
    assert (
        default_embedder("emoji-sd") == EMOJI_CLIP
        and default_embedder("stable-diffusion-v1-5/stable-diffusion-v1-5") == OPENAI_CLIP
    )

# Other models

def tokenizer():
    words = {
        w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "fox", "frog", "on", "blue", "background"])
    }
    t = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")

@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder, size = tmp_path_factory.mktemp("siglip"), dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    SiglipModel(
        SiglipConfig(
            text_config=dict(
                **size, vocab_size=9, max_position_embeddings=12, projection_size=32, pad_token_id=0,
                bos_token_id=1, eos_token_id=1
            ),
            vision_config=dict(**size, image_size=32, patch_size=8),
        )
    ).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    SiglipImageProcessor(size=dict(height=32, width=32)).save_pretrained(folder)
    return folder

def test_a_siglip_works(siglip):
    found, texts = load_embedder(str(siglip)), [
        "a fox on a blue background", "a frog", "a fox on a blue background"
    ]
    u, v = found.images(images(3)), found.texts(texts)
    assert isinstance(found.model, SiglipModel) and u.shape == v.shape == (3, 32)
    # as SigLIP was trained
    tokens = found.tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt")
    assert "attention_mask" in tokens
    with torch.no_grad():
        out = found.model(
            input_ids=tokens.input_ids,
            pixel_values=found.image_processor(
                images=list((images(3) * 255).round().byte().permute(0, 2, 3, 1).numpy()), return_tensors="pt"
            ).pixel_values,
        )
    torch.testing.assert_close(u @ v.T, out.image_embeds @ out.text_embeds.T, atol=1e-5, rtol=0)
    np.testing.assert_allclose(
        clip_alignment(clip=str(siglip))(images(3), texts, [{}] * 3)[0], (u * v).sum(1).numpy(), atol=1e-5
    )

def fails(place, says, **kw):
    with pytest.raises(ModelError, match=says) as e: load_embedder(str(place), **kw)
    assert (
        "\n" not in str(e.value)
        and str(place) in str(e.value)
        and str(e.value).startswith(kw.get("argument", "--clip") + ": cannot load")
    )

@pytest.mark.parametrize("place", ["/nowhere/clip", "./nowhere", "~/nowhere"])
def test_a_missing_folder_is_one_line(place):
    fails(place, "there is no such folder", argument="--reward-clip")

def test_pickles_are_not_read(tmp_path):
    shutil.copytree(EMOJI, tmp_path/"clip")
    (tmp_path/"clip/model.safetensors").unlink()
    torch.save(CLIPModel.from_pretrained(EMOJI).state_dict(), tmp_path/"clip/pytorch_model.bin")
    fails(tmp_path/"clip", "safetensors")

def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    CLIPModel.from_pretrained(EMOJI).save_pretrained(tmp_path)
    fails(tmp_path, "cannot load")
    assert load_embedder(str(tmp_path), processor=EMOJI_CLIP).texts(["a fox"]).shape == (1, 128)

def test_a_model_without_pictures_is_refused(tmp_path):
    BertModel(
        BertConfig(
            vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    ).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    fails(tmp_path, "BertModel does not embed both")

def test_an_empty_folder_is_one_line(tmp_path): fails(tmp_path, "cannot load")

# Strangers' folders

EVIL = """open({trap!r}, "w").write("gone off")
from transformers import CLIPModel, PretrainedConfig
class Model(CLIPModel): pass
class Config(PretrainedConfig): model_type = "evil"
class Part: pass
"""
CODE = {
    "config.json": dict(model_type="evil", auto_map=dict(AutoConfig="evil.Config", AutoModel="evil.Model")),
    "preprocessor_config.json": dict(
        image_processor_type="Part", auto_map=dict(AutoImageProcessor="evil.Part")
    ),
}

def stranger(tmp_path, file, change):
    "A copy of the bundled model with a change, and a module beside it that must not be run"
    shutil.copytree(str(EMOJI), folder := tmp_path/"clip")
    (folder/"evil.py").write_text(EVIL.format(trap=str(tmp_path/"trap")))
    (folder/file).write_text(json.dumps(json.loads((folder/file).read_text()) | change))
    return str(folder)

@pytest.mark.parametrize("file", CODE)
def test_code_in_a_folder_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch, capfd, file):
    def asked(*_): pytest.fail("somebody is asked")
    monkeypatch.setattr("builtins.input", asked)
    folder = stranger(tmp_path, file, CODE[file])
    with pytest.raises(ModelError, match="--clip: .*code of its own, and no model's code is run") as e:
        load_embedder(folder)
    assert (
        "\n" not in str(e.value)
        and not (tmp_path / "trap").exists()
        and "[y/N]" not in "".join(capfd.readouterr())
    )

def test_code_for_text_models_is_not_run_either(tmp_path, monkeypatch):
    from ddpo_nb.vlm import make_similarity
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = stranger(tmp_path, "config.json", CODE["config.json"])
    for name in (folder, f"bertscore:{folder}", f"clip:{folder}"):
        with pytest.raises(ModelError, match="--vlm-similarity: .*code of its own"): make_similarity(name)
    assert not (tmp_path/"trap").exists()

def test_no_loader_is_left_to_ask_whether_it_may_run_code():
    "Whatever could run a model's own code is told not to: transformers' Auto classes, and pipelines"
    package, seen = resources.files("ddpo_nb"), 0
    for file in (o for o in package.iterdir() if o.name.endswith(".py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        autos = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names
                 if a.name.startswith("Auto") and n.module == "transformers" or a.name.endswith("Pipeline")}
        for n in ast.walk(tree):
            if not (
                isinstance(n, ast.Call)
                and isinstance(n.func, ast.Attribute)
                and n.func.attr == "from_pretrained"
            ):
                continue
            kind = n.func.value.id if isinstance(n.func.value, ast.Name) else "?"
            if kind in autos or len(kind) == 1:  # a loop's variable may be any of them
                seen += 1
                given = {k.arg: k.value.value for k in n.keywords if isinstance(k.value, ast.Constant)}
                ours = file.name == "emoji_sd.py"  # the package's own files
                assert given.get("trust_remote_code") is False or ours, f"{file.name}:{n.lineno}"
    assert seen >= 6

LONG = "a very large and very friendly brown bear that is standing in the middle of a green meadow"

@pytest.mark.parametrize("name", ["clip_alignment", "clip_score", "prompt_alignment"])
def test_a_reward_that_reads_less_than_the_prompt_says_so_once(name):
    reward, x = get_reward(name), torch.rand(5, 3, 64, 64)
    prompts = ["a bear", LONG, LONG + " at night", LONG, "a cat"]
    with pytest.warns(UserWarning) as w: rewards, _ = reward(x, prompts, [{}] * 5)
    said = str(w[0].message)
    assert len(w) == 1 and "2 of 4 prompts are longer than the 16 tokens that" in said and "\n" not in said
    assert "1 cannot be told from another then, such as" in said
    reader = "prompt_alignment reads" if name == "prompt_alignment" else "emoji-clip reads"
    assert reader in said
    # told already; and what was cut makes no difference
    assert np.allclose(reward(x[[1]], [prompts[2]], [{}])[0], rewards[1], atol=1e-5)

def test_an_embedder_says_it_too():
    e = load_embedder()
    assert e.texts(["a bear", "a cat"]).shape[0] == 2
    with pytest.warns(UserWarning, match="^1 of 2 prompts are longer"): e.texts(["a bear", LONG])
    e.texts([LONG])

def test_no_module_asks_transformers_for_what_it_hides_without_torchvision():
    "transformers 5.15 (Colab's) exports AutoImageProcessor only beside torchvision; its own module does not"
    from pathlib import Path
    import ddpo_nb
    for file in sorted(Path(ddpo_nb.__file__).parent.glob("*.py")):
        found = [o for o in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                 if isinstance(o, ast.ImportFrom) and o.module == "transformers"]
        assert "AutoImageProcessor" not in {a.name for o in found for a in o.names}, file.name
