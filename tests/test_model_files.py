"Models as people have them: variants, shards, one file; and which cannot be trained here, told in one line."
import json
import shlex
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from ddpo_nb.cli import main
from ddpo_nb.loading import check_pipeline
from ddpo_nb import DefaultDDPOStableDiffusionPipeline
from ddpo_nb.policy import ModelError, StableDiffusionPolicy, load_pipeline
from ddpo_nb.rewards import PromptAlignment
from tiny_sd import NOISE, checkpoint, tiny_sd

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}

@pytest.fixture(scope="module")
def pipe(): return tiny_sd()

@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return folder

@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path/"m")
    return tmp_path/"m"

def weights(pipe): return {f"{p}.{k}": v for p in WEIGHTS for k, v in getattr(pipe, p).state_dict().items()}

def same(got, want, atol=0.):
    a, b = weights(got), weights(want)
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], atol=atol, rtol=0)

def refused(place, *words):
    with pytest.raises(ModelError) as e: load_pipeline(str(place))
    text = str(e.value)
    assert (
        text.startswith("--model: cannot load")
        and len(text.splitlines()) == 1
        and all(w in text for w in words)
    ), text

# folders

def to_variant(folder, part, name="fp16", shards=0):
    "A part's weights in a variant alone, in one file or in several."
    old, stem = folder/part/f"{WEIGHTS[part]}.safetensors", folder/part/WEIGHTS[part]
    tensors = load_file(old); old.unlink()
    if not shards: return save_file(tensors, f"{stem}.{name}.safetensors", metadata=dict(format="pt"))
    dot, keys, index = f".{name}" if name else "", sorted(tensors), {}
    for i in range(shards):
        file = f"{WEIGHTS[part]}{dot}-{i+1:05}-of-{shards:05}.safetensors"
        save_file({k: tensors[k] for k in keys[i::shards]}, folder/part/file, metadata=dict(format="pt"))
        index |= {k: file for k in keys[i::shards]}
    end = f"index.{name}.json" if name else "index.json"
    (folder / part / f"{WEIGHTS[part]}.safetensors.{end}").write_text(
        json.dumps(dict(metadata={}, weight_map=index))
    )

@pytest.mark.parametrize(
    "how",
    [
        dict(unet={}, vae={}, text_encoder={}), dict(unet={}), dict(text_encoder={}),
        dict(unet=dict(shards=2)), dict(unet=dict(shards=2, name="")),
        dict(unet=dict(name="bf16"), vae=dict(name="bf16")),
        dict(unet=dict(shards=3), vae={}, text_encoder={})
    ],
)
def test_variants_and_shards(folder, pipe, how):
    for part, given in how.items(): to_variant(folder, part, **given)
    same(load_pipeline(str(folder)), pipe)

def test_a_unet_in_a_variant(folder, whole, pipe, tmp_path):
    to_variant(folder, "unet")
    same(load_pipeline(str(whole), network=str(folder/"unet")), pipe)
    same(load_pipeline(str(whole), network=str(folder)), pipe)

def test_what_a_folder_lacks(folder, tmp_path):
    def without(*places, then=lambda d: None):
        d = tmp_path/f"x{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, d)
        for o in places: shutil.rmtree(d/o) if (d/o).is_dir() else (d/o).unlink()
        then(d)
        return d
    refused(without("vae"), "vae/config.json")
    refused(without("tokenizer"), "tokenizer")
    refused(without("scheduler"), "scheduler")
    refused(without("unet/diffusion_pytorch_model.safetensors"), "unet", "no weights")
    refused(without("model_index.json"), "model_index.json")
    for part, name in dict(unet="diffusion_pytorch_model", text_encoder="pytorch_model").items():
        refused(
            without(
                f"{part}/{WEIGHTS[part]}.safetensors",
                then=lambda d: (d / part / f"{name}.bin").write_bytes(b"x")
            ),
            part, f"{name}.bin", "pickle", "save_pretrained"
        )
    refused(
        without(
            then=lambda d: (
                to_variant(d, "unet", shards=2),
                (d / "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors").unlink(),
            )
        ),
        "00002-of-00002", "missing"
    )
    refused(
        without(then=lambda d: (to_variant(d, "unet", "fp16"), to_variant(d, "vae", "ema"))), "ema", "fp16"
    )
    index = json.loads((folder/"model_index.json").read_text())
    for kind in ("StableDiffusionXLPipeline", "FluxPipeline", "LatentConsistencyModelPipeline"):
        refused(
            without(
                then=lambda d: (d / "model_index.json").write_text(json.dumps(index | dict(_class_name=kind)))
            ),
            kind,
        )

@pytest.mark.parametrize(
    "part,key",
    [
        ("unet", "conv_in.weight"), ("vae", "decoder.conv_in.bias"),
        ("text_encoder", "final_layer_norm.weight")
    ],
)
def test_files_with_weights_missing(folder, part, key):
    file = folder/part/f"{WEIGHTS[part]}.safetensors"
    save_file(
        {k: v for k, v in load_file(file).items() if not k.endswith(key)}, file, metadata=dict(format="pt")
    )
    refused(folder, key, "lack")

# one file

@pytest.fixture(scope="module")
def file(pipe, whole, tmp_path_factory):
    "A checkpoint, and beside it a folder of its name with no more than configurations."
    home = tmp_path_factory.mktemp("file")
    save_file(checkpoint(pipe), home/"tiny.v1.safetensors")
    shutil.copytree(whole, home/"tiny.v1", ignore=shutil.ignore_patterns("*.safetensors"))
    return home/"tiny.v1.safetensors"

def test_a_checkpoint_in_one_file(file, pipe):
    got = load_pipeline(str(file))
    same(got, pipe)
    assert got.scheduler.config.beta_end == NOISE["beta_end"] and not got.safety_checker
    StableDiffusionPolicy(got, num_steps=2)
    assert len(DefaultDDPOStableDiffusionPipeline(str(file)).timesteps) == 50

def test_its_configuration_may_lie_around_it(file, pipe, whole, tmp_path):
    shutil.copytree(whole, tmp_path/"d", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(file, tmp_path/"d/any.safetensors")
    same(load_pipeline(str(tmp_path/"d/any.safetensors")), pipe)

def test_files_that_are_no_checkpoint(file, whole, tmp_path):
    alone = tmp_path/"alone.safetensors"
    shutil.copy(file, alone)
    refused(alone, "configuration", "beside", "save_pretrained")
    (tmp_path / "a.ckpt").write_bytes(b"x"), (tmp_path / "a.txt").write_text("x"), (
        tmp_path / "broken.safetensors"
    ).write_bytes(b"x")
    refused(tmp_path/"a.ckpt", "pickle")
    refused(tmp_path/"a.txt", ".safetensors")
    refused(tmp_path/"broken.safetensors")
    refused(whole/"unet/diffusion_pytorch_model.safetensors", "part")
    def no(tensors, *words):
        save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "b.safetensors"), refused(
            tmp_path / "b.safetensors", *words
        )
    one = torch.ones(1)
    no({"unet.a.lora_A.weight": one}, "--lora")
    no({"conditioner.embedders.0.a": one, "model.diffusion_model.a": one}, "another family")
    no({"double_blocks.0.a": one}, "another family")
    no({k: v for k, v in load_file(file).items() if "first_stage" not in k}, "VAE")

# kinds of models

@pytest.mark.parametrize(
    "given,words",
    [
        (dict(time_cond_proj_dim=8), "latent consistency"), (dict(in_channels=9), "inpaints"),
        (dict(in_channels=8), "edits"), (dict(in_channels=5), "depth"), (dict(num_class_embeds=3), "class"),
        (dict(class_embed_type="timestep"), "class"), (dict(attention_type="gated"), "GLIGEN"),
        (dict(out_channels=8), "variance"),
        (
            dict(
                addition_embed_type="text_time", projection_class_embeddings_input_dim=8,
                addition_time_embed_dim=2
            ),
            "XL",
        ),
        (dict(cross_attention_dim=24), "24"),
        (dict(encoder_hid_dim=8, encoder_hid_dim_type="text_proj"), "embeddings"),
    ],
)
def test_networks_that_want_more(given, words, whole, tmp_path):
    pipe = tiny_sd(unet=given)
    with pytest.raises(ModelError, match=words): StableDiffusionPolicy(pipe)
    pipe.unet.save_pretrained(tmp_path/"unet")
    with pytest.raises(ModelError, match=words) as e: load_pipeline(str(whole), network=str(tmp_path))
    assert str(e.value).startswith("--network") and len(str(e.value).splitlines()) == 1

def test_noise_that_leaves_nothing(pipe, folder):
    "Zero terminal SNR: the step divides by zero if the network predicts the noise, not if it predicts v"
    zero = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    for kind in ("epsilon", "v_prediction", "sample"):
        DDIMScheduler(**NOISE | zero, prediction_type=kind).save_pretrained(folder/"scheduler")
        if kind == "epsilon":
            refused(folder, "zero terminal SNR")
            with pytest.raises(ModelError, match="zero terminal SNR"):
                StableDiffusionPolicy(tiny_sd(scheduler=zero))
            continue
        policy = StableDiffusionPolicy(load_pipeline(str(folder)), num_steps=4, guidance_scale=3)
        assert policy.timesteps[0] == 999 and policy.stochastic.all()
        x, cond = policy.initial_latents([torch.Generator().manual_seed(0)]), policy.encode(["cat"])
        theirs = policy.pipeline(
            prompt_embeds=cond.prompt, negative_prompt_embeds=cond.negative, num_inference_steps=4, eta=1.0,
            guidance_scale=3.0, output_type="pt", generator=[torch.Generator().manual_seed(0)]
        ).images
        g = [torch.Generator().manual_seed(0)]
        x = policy.initial_latents(g)
        with torch.no_grad():
            for t in policy.timesteps:
                step = policy.step(x, t[None], cond, generator=g)
                assert step.log_prob.isfinite().all() and step.prev_sample.isfinite().all()
                x = step.prev_sample
        torch.testing.assert_close(policy.decode(x), theirs, atol=1e-4, rtol=0)

def test_a_scheduler_of_another_kind(folder):
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder/"scheduler")
    index = json.loads((folder/"model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]})
    )
    refused(folder, "FlowMatchEulerDiscreteScheduler")

def test_the_bundled_model_passes(): check_pipeline(load_pipeline())

# words of one's own

@pytest.fixture
def inverted(folder):
    "A pipeline that has learned <it>, three vectors long, and was saved and loaded again."
    pipe = load_pipeline(str(folder))
    pipe.load_textual_inversion(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), token="<it>")
    pipe.save_pretrained(folder/"again")
    return load_pipeline(str(folder/"again"))

def test_textual_inversion(inverted):
    "A word that stands for several vectors: all of them count, in a policy and in `prompt_alignment`"
    policy, pipe = StableDiffusionPolicy(inverted, num_steps=2), inverted
    spelt = "a <it> <it>_1 <it>_2"
    ids = pipe.tokenizer(
        spelt, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    with torch.no_grad(): want = pipe.text_encoder(ids)[0][0]
    torch.testing.assert_close(policy.encode(["a <it>"]).prompt[0], want)
    judge = PromptAlignment(load_pipeline(pipe.config._name_or_path))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(judge.judge.encode(["a <it>"]).prompt[0], want)
    assert (judge(images, ["a <it>"] * 2, [{}] * 2)[0] != judge(images, ["a"] * 2, [{}] * 2)[0]).any()

# the command line

@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def go(line):
        capsys.readouterr()
        return main(shlex.split(line)), *capsys.readouterr()
    return go

def test_one_file_on_the_command_line(run, file, whole, tmp_path):
    for name, model in dict(a=file, b=whole).items():
        assert run(f"sample --model '{model}' --prompt cat --steps 2 --output {name}.png")[0] == 0
    assert (tmp_path/"a.png").read_bytes() == (tmp_path/"b.png").read_bytes()
    status, out, err = run(f"train --model '{file}' --mixed-precision no --dry-run")
    assert status == 0 and not err

@pytest.mark.parametrize(
    "name,words",
    [
        ("a.ckpt", "pickle"), ("a.txt", ".safetensors"), ("l.safetensors", "--lora"),
        ("nowhere.safetensors", "nowhere.safetensors"), ("lcm", "consistency")
    ],
)
@pytest.mark.parametrize(
    "command",
    ["sample --prompt cat --output x.png", "train --evaluation-samples 2 --mixed-precision no --output out"],
)
def test_files_refused_on_the_command_line(run, folder, tmp_path, command, name, words):
    (tmp_path/"a.ckpt").write_bytes(b"x"), (tmp_path/"a.txt").write_text("x")
    save_file({"unet.a.lora_A.weight": torch.ones(1)}, tmp_path/"l.safetensors")
    folder.rename(tmp_path/"lcm")
    UNet2DConditionModel.from_config(
        dict(UNet2DConditionModel.load_config(tmp_path / "lcm/unet"), time_cond_proj_dim=8)
    ).save_pretrained(tmp_path / "lcm/unet")
    status, out, err = run(f"{command} --model {name}")
    assert status == 2 and not out and err.count("\n") == 1 and "--model" in err and words in err, err
    assert not (tmp_path/"out").exists() and not (tmp_path/"x.png").exists()
