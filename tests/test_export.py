"""The adapter for other programs: the names and numbers that ComfyUI and A1111 look for, and the same
pictures."""
import shlex

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ddpo_nb.cli import main
from ddpo_nb.loading import load_lora
from ddpo_nb.policy import StableDiffusionPolicy
from test_lora_files import (FILE, PROJECTIONS, TEXT, again, attn_procs, fused, header, kohya, peft,
                             random_lora, says, targets, text_names, tiny_sd, write)

@pytest.fixture(scope="module")
def pipe(): return tiny_sd()

@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def go(line):
        status = main(shlex.split(line))
        return status, *capsys.readouterr()
    return go

def read_back(pipe, file):
    "By diffusers alone, by ours, and by kohya's own rule: W + (α/r)·up·down at the layer of that name."
    (theirs := again(pipe)).load_lora_weights(str(file))
    load_lora(ours := again(pipe), file)
    plain, tensors = again(pipe), load_file(file)
    for part, prefix, inner in (
        (plain.unet, "lora_unet_", ""), (plain.text_encoder, "lora_te_", "text_model.")
    ):
        for name, m in part.named_modules():
            key = prefix + (inner + name).replace(".", "_")
            if f"{key}.alpha" in tensors:
                up, down, alpha = (
                    tensors.pop(f"{key}.{o}") for o in ("lora_up.weight", "lora_down.weight", "alpha")
                )
                m.weight.data += alpha / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(m.weight.shape)
    assert not tensors
    return [says(o.unet, o.text_encoder) for o in (theirs, ours, plain)]

varied, strengths = (lambda i: 1 + i % 3), (lambda i: (1, 4, 6)[i % 3])

@pytest.mark.parametrize(
    "form,rank,alpha",
    [
        (lambda o: peft(o, "unet."), 4, None), (lambda o: peft(o, "unet."), varied, strengths),
        (attn_procs, varied, None), (attn_procs, 2, strengths), (kohya, 2, 5), (kohya, varied, strengths)
    ],
)
def test_pictures_stay_the_same(run, pipe, tmp_path, form, rank, alpha):
    lora = random_lora(pipe.unet, targets(pipe.unet), rank=rank, alpha=alpha)
    settings = (
        None
        if form is kohya
        else header(dict(r=1, lora_alpha=9, alpha_pattern={n: v[2] for n, v in lora.items()}))
    )
    write(tmp_path/"l", form(lora), metadata=settings)
    status, out, err = run("export --lora l --format kohya --output out/tidy.safetensors")
    assert status == 0 and "tidy.safetensors" in out and not err
    want = says(*fused(pipe, lora))
    for got in read_back(pipe, tmp_path / "out/tidy.safetensors"):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (want - says(pipe.unet, pipe.text_encoder)).abs().mean() > 1e-3

def test_names_numbers_and_header(run, pipe, tmp_path):
    "As https://github.com/kohya-ss/sd-scripts writes them"
    StableDiffusionPolicy(again(pipe), lora_rank=4).save_pretrained(tmp_path/"l")
    assert run("export --lora l --output a.safetensors")[0] == 0
    with safe_open(tmp_path/"a.safetensors", "pt") as f: keys, about = {*f.keys()}, f.metadata()
    first = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {f"{first}.lora_down.weight", f"{first}.lora_up.weight", f"{first}.alpha",
            "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0.alpha"} <= keys
    assert len(keys) == 3 * len(targets(pipe.unet)) and all(k.startswith("lora_unet_") for k in keys)
    assert (
        about["ss_network_dim"] == about["ss_network_alpha"] == "4"
        and about["ss_network_module"] == "networks.lora"
    )
    assert str(tmp_path) not in str(about) and {k for k in about if not k.startswith("ss_")} == {"software"}
    tensors = load_file(tmp_path/"a.safetensors")
    assert all(v.item() == 4 for k, v in tensors.items() if k.endswith(".alpha"))

def test_text_encoder_and_convolutions(run, pipe, tmp_path):
    lora = random_lora(
        pipe.unet, targets(pipe.unet, PROJECTIONS + ("conv1", "ff.net.2", "proj_in")), rank=2, alpha=3
    )
    text = random_lora(pipe.text_encoder, targets(pipe.text_encoder, TEXT), rank=2, alpha=3, seed=1, std=.3)
    write(tmp_path/"l", peft(lora, "unet.") | peft(text_names(text), "text_encoder."),
          metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 3, "text_encoder.lora_alpha": 3}'})
    assert run("export --lora l --output a.safetensors")[0] == 0
    for got in read_back(pipe, tmp_path / "a.safetensors"):
        torch.testing.assert_close(got, says(*fused(pipe, lora, text)), atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize(
    "flags,words",
    [
        ("--lora l --format comfy", "--format comfy kohya"), ("--lora nowhere", "--lora nowhere"),
        ("--lora whole", "--lora --network"), ("--lora bin", "--lora pickle"),
        ("--lora l --output a.ckpt", "--output .safetensors"),
        ("--lora l --output there.safetensors", "--output there.safetensors already"),
        ("", "--lora required"), ("--lora model", "--lora model"),
        ("--lora l --output f/a.safetensors", "--output"), ("--lora dora", "--lora DoRA"),
        ("--lora l --output l", "--output .safetensors")
    ],
)
def test_what_cannot_be_exported(run, pipe, tmp_path, flags, words):
    lora = random_lora(pipe.unet, targets(pipe.unet, few=2))
    write(tmp_path / "l", peft(lora)), (tmp_path / "there.safetensors").write_text("mine"), (
        tmp_path / "f"
    ).write_text("")
    write(tmp_path/"dora", peft(lora) | {f"{n}.lora_magnitude_vector": torch.ones(8) for n in lora})
    write(tmp_path/"whole", pipe.unet.state_dict(), "diffusion_pytorch_model.safetensors")
    (tmp_path/"bin").mkdir(), (tmp_path/"bin/pytorch_lora_weights.bin").write_bytes(b"x")
    (tmp_path/"model").mkdir(), (tmp_path/"model/model_index.json").write_text("{}")
    before = {o: o.read_bytes() for o in tmp_path.rglob("*") if o.is_file()}
    status, out, err = run(f"export {flags}" + ("" if "--output" in flags else " --output a.safetensors"))
    assert status == 2 and not out and err.count("\n") == 1 and all(w in err for w in words.split()), err
    assert before == {o: o.read_bytes() for o in tmp_path.rglob("*") if o.is_file()}
