"""LoRA files as other programs write them: applied as they mean it, or refused in one line; what is in them
never runs."""
import copy
import json
import shlex
import time
import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from ddpo_nb.cli import main
from ddpo_nb.loading import load_lora
from ddpo_nb.policy import ModelError, StableDiffusionPolicy, load_pipeline
from tiny_sd import tiny_sd

FILE = "pytorch_lora_weights.safetensors"
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")

@pytest.fixture(scope="module")
def pipe(): return tiny_sd()

@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return str(folder)

def targets(part, ends=PROJECTIONS, few=None):
    names = [n for n, m in part.named_modules() if n.endswith(ends) and hasattr(m, "weight")]
    return names[:few]

def random_lora(part, names, rank=3, alpha=None, std=.15, seed=0):
    "{layer: (down, up, α)} for the named layers; `rank` and `alpha` may be functions of the place."
    g, out = torch.Generator().manual_seed(seed), {}
    at = lambda v, i, usual: usual if v is None else v(i) if callable(v) else v
    for i, name in enumerate(names):
        w, r = part.get_submodule(name).weight, at(rank, i, 3)
        draw = lambda *shape: std * torch.randn(*shape, generator=g)
        kernel = w.shape[2:]
        up = draw(w.shape[0], r, *([1] * len(kernel)))
        out[name] = draw(r, w.shape[1], *kernel), up, at(alpha, i, r)
    return out

def again(pipe):
    "The same pipeline once more, to put adapters in."
    return StableDiffusionPipeline(
        **pipe.components
        | dict(unet=copy.deepcopy(pipe.unet), text_encoder=copy.deepcopy(pipe.text_encoder)),
        requires_safety_checker=False,
    )

def fused(pipe, unet={}, text={}):
    "UNet and text encoder with the weights W + (α/r)·BA, worked out here."
    parts = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.text_encoder)
    for part, lora in zip(parts, (unet, text)):
        for name, (down, up, alpha) in lora.items():
            w, r = part.get_submodule(name).weight, len(down)
            w.data += alpha / r * (up.flatten(1) @ down.flatten(1)).reshape(w.shape)
    return parts

@torch.no_grad()
def says(unet, text_encoder):
    "What a UNet and a text encoder answer to a fixed question."
    g = torch.Generator().manual_seed(0)
    text = text_encoder(torch.randint(0, 90, (2, 16), generator=g))[0]
    return unet(torch.randn(2, 4, 8, 8, generator=g), torch.tensor([801, 21]), text).sample

def draw(pipe):
    return pipe(
        ["cat"], num_inference_steps=2, eta=1.0, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images

def peft(lora, prefix=""):
    return {f"{prefix}{n}.lora_{x}.weight": t for n, (a, b, _) in lora.items() for x, t in zip("AB", (a, b))}
def diffusers_form(lora):
    return {
        f"unet.{n}.lora.{x}.weight": t
        for n, (a, b, _) in lora.items()
        for x, t in zip(("down", "up"), (a, b))
    }
def attn_procs(lora, prefix=""):
    def place(name):
        layer, _, part = name.rpartition(".to_")
        return f"{prefix}{layer}.processor.to_{part.removesuffix('.0')}_lora"
    return {
        f"{place(n)}.{x}.weight": t for n, (a, b, _) in lora.items() for x, t in zip(("down", "up"), (a, b))
    }
def kohya(lora, prefix="lora_unet_", alphas=True):
    place = lambda n: prefix + n.replace(".", "_")
    tensors = {
        f"{place(n)}.lora_{x}.weight": t
        for n, (a, b, _) in lora.items()
        for x, t in zip(("down", "up"), (a, b))
    }
    return tensors | (
        {f"{place(n)}.alpha": torch.tensor(float(v[2])) for n, v in lora.items()} if alphas else {}
    )
def text_names(lora): return {f"text_model.{n}": v for n, v in lora.items()}

def write(folder, tensors, name=FILE, metadata=None, config=None):
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder/name, metadata=metadata)
    if config is not None: (folder/"adapter_config.json").write_text(json.dumps(config))
    return str(folder)

def header(config, part="unet"):
    return {"lora_adapter_metadata": json.dumps({f"{part}.{k}" if part else k: v for k, v in config.items()})}

def same(pipe, lora, unet={}, text={}):
    "What `lora` does is what the fused weights do, and it does something; not a word is said."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lora(got := again(pipe), lora)
    want = says(*fused(pipe, unet, text))
    torch.testing.assert_close(says(got.unet, got.text_encoder), want, atol=1e-4, rtol=1e-4)
    assert (want - says(pipe.unet, pipe.text_encoder)).abs().mean() > 1e-3
    return got

def refused(lora, *words, pipe=tiny_sd()):
    "A LoRA that is refused in a line that has these words, and of which nothing stays behind."
    with pytest.raises(Exception) as e: load_lora(pipe, lora)
    text = str(e.value).splitlines()[0]
    assert (
        len(text) < 400
        and not getattr(pipe.unet, "peft_config", None)
        and not getattr(pipe.text_encoder, "peft_config", None)
    )
    for w in words: assert w in text, text

# the same adapter, as everybody writes it

FORMS = {
    "diffusers": diffusers_form, "peft with unet.": lambda o: peft(o, "unet."), "save_lora_adapter": peft,
    "save_attn_procs": attn_procs, "attn procs with unet.": lambda o: attn_procs(o, "unet."),
    "adapter's name": lambda o: {
        k.replace(".weight", ".default.weight"): v for k, v in peft(o, "unet.").items()
    },
    "wrapped": lambda o: peft(o, "module."), "kohya": kohya,
    "kohya without alphas": lambda o: kohya(o, alphas=False)
}

@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_applied(pipe, tmp_path, form):
    lora = random_lora(pipe.unet, targets(pipe.unet), rank=3)
    same(pipe, write(tmp_path/"l", FORMS[form](lora)), lora)

def test_what_diffusers_and_peft_write_themselves(pipe, tmp_path):
    "α is not r, so that a file read without its settings would show"
    lora = random_lora(pipe.unet, targets(pipe.unet), rank=2, alpha=5)
    load_lora(first := again(pipe), write(tmp_path/"kohya", kohya(lora)))
    StableDiffusionPolicy(first).save_pretrained(tmp_path/"ours")
    first.unet.save_lora_adapter(tmp_path/"adapter", adapter_name="default")
    for o in ("ours", "adapter"): same(pipe, tmp_path/o, lora)
    wrapped = get_peft_model(
        copy.deepcopy(pipe.unet), LoraConfig(r=2, lora_alpha=5, target_modules=list(PROJECTIONS))
    )
    for n, (a, b, _) in lora.items():
        m = wrapped.get_submodule(f"base_model.model.{n}")
        m.lora_A["default"].weight.data.copy_(a), m.lora_B["default"].weight.data.copy_(b)
    wrapped.save_pretrained(tmp_path/"peft")
    same(pipe, tmp_path/"peft", lora)
    (tmp_path/"peft/adapter_config.json").unlink()
    refused(tmp_path/"peft", "adapter_config.json", "strength")

@pytest.mark.parametrize("extra", [dict(use_dora=True), dict(lora_bias=True)])
def test_dora_and_biases_come_back(pipe, tmp_path, extra):
    (first := again(pipe)).unet.add_adapter(
        LoraConfig(r=2, lora_alpha=3, target_modules=["to_out.0"], **extra)
    )
    torch.manual_seed(0)
    for n, p in first.unet.named_parameters():
        if "lora_" in n: p.data += .1 * torch.randn_like(p)
    StableDiffusionPolicy(first).save_pretrained(tmp_path)
    load_lora(second := again(pipe), tmp_path)
    torch.testing.assert_close(
        says(second.unet, second.text_encoder), says(first.unet, first.text_encoder), atol=1e-5, rtol=1e-5
    )

def test_strengths_of_single_layers(pipe, tmp_path):
    "Ranks and alphas may differ from layer to layer, and a name of one layer may end another's"
    names = targets(pipe.unet)
    lora = random_lora(pipe.unet, names, rank=lambda i: 1 + i % 3, alpha=lambda i: (.5, 2, 3, 5)[i % 4])
    same(pipe, write(tmp_path/"kohya", kohya(lora)), lora)
    pattern = {"^" + n.replace(".", r"\."): v[2] for n, v in lora.items()}
    same(
        pipe,
        write(
            tmp_path / "escaped", peft(lora, "unet."),
            metadata=header(dict(r=1, lora_alpha=7, alpha_pattern=pattern))
        ),
        lora,
    )
    same(
        pipe,
        write(
            tmp_path / "plain", peft(lora),
            metadata=header(dict(r=1, alpha_pattern={n: v[2] for n, v in lora.items()}), ""),
        ),
        lora,
    )
    half = {n: v for n, v in lora.items() if "up_blocks" in n}
    by_ending = {n: (a, b, 6 if n.endswith("to_q") else 4) for n, (a, b, _) in half.items()}
    config = dict(peft_type="LORA", r=1, lora_alpha=4, alpha_pattern={"to_q": 6})
    same(
        pipe,
        write(tmp_path / "peft", peft(half, "base_model.model."), "adapter_model.safetensors", config=config),
        by_ending,
    )
    stabilised = {n: (a, b, 4 * len(a)**.5) for n, (a, b, _) in half.items()}
    config = dict(peft_type="LORA", r=1, lora_alpha=4, use_rslora=True)
    same(
        pipe,
        write(tmp_path / "rs", peft(half, "base_model.model."), "adapter_model.safetensors", config=config),
        stabilised,
    )

def test_layers_other_than_attention(pipe, tmp_path):
    "Convolutions, feed-forward and time layers; a 1×1 convolution's matrices may come as matrices"
    ends = ("conv1", "proj_in", "proj_out", "ff.net.2", "time_emb_proj", "conv_in", "to_k")
    lora = random_lora(pipe.unet, targets(pipe.unet, ends), rank=2, std=.1)
    same(pipe, write(tmp_path/"peft", peft(lora, "unet.")), lora)
    same(pipe, write(tmp_path/"kohya", kohya(lora)), lora)
    flat = {
        k: v.squeeze(-1).squeeze(-1) if v.ndim == 4 and v.shape[2:] == (1, 1) else v
        for k, v in kohya(lora).items()
    }
    same(pipe, write(tmp_path/"flat", flat), lora)

@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "diffusion_lora.safetensors", "add_detail.v2.safetensors"]
)
def test_other_names_and_a_file_itself(pipe, tmp_path, name):
    lora = random_lora(pipe.unet, targets(pipe.unet))
    folder = write(tmp_path/"l", peft(lora), name, header(dict(r=3, lora_alpha=3), ""))
    same(pipe, folder, lora)
    same(pipe, tmp_path/"l"/name, lora)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(pipe, tmp_path, dtype):
    lora = {
        n: (a.to(dtype), b.to(dtype), s)
        for n, (a, b, s) in random_lora(pipe.unet, targets(pipe.unet)).items()
    }
    got = same(
        pipe, write(tmp_path / "l", peft(lora)),
        {n: (a.float(), b.float(), s) for n, (a, b, s) in lora.items()}
    )
    assert {p.dtype for p in got.unet.parameters()} == {torch.float32}

# the text encoder's part

TEXT = ("q_proj", "v_proj", "out_proj", "fc1")
TEXT_FORMS = {
    "kohya": lambda u, t: kohya(u) | kohya(text_names(t), "lora_te_"),
    "kohya te1": lambda u, t: kohya(u) | kohya(text_names(t), "lora_te1_"),
    "peft": lambda u, t: peft(u, "unet.") | peft(text_names(t), "text_encoder."),
    "flat": lambda u, t: peft(u, "unet.") | peft(t, "text_encoder."),
    "diffusers": (
        lambda u, t: diffusers_form(u) | {
            k.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"): v
            for k, v in peft(text_names(t), "text_encoder.").items()
        }
    ),
    "alone": lambda u, t: peft(text_names(t), "text_encoder."),
}

@pytest.mark.parametrize("form", TEXT_FORMS)
def test_a_text_encoders_part_is_applied(pipe, tmp_path, form):
    unet = random_lora(pipe.unet, targets(pipe.unet), rank=2)
    text = random_lora(pipe.text_encoder, targets(pipe.text_encoder, TEXT), rank=4, alpha=4, seed=1, std=.3)
    got = same(pipe, write(tmp_path/"l", TEXT_FORMS[form](unet, text)), {} if form == "alone" else unet, text)
    for lora in (True, False):
        with pytest.raises(ModelError, match="text encoder"): StableDiffusionPolicy(got, use_lora=lora)

# what is no LoRA for this model

def test_what_does_not_fit_is_refused(pipe, tmp_path):
    lora, at = random_lora(pipe.unet, targets(pipe.unet)), iter(range(99))
    no = lambda tensors, *words, **how: refused(write(tmp_path/f"l{next(at)}", tensors, **how), *words)
    first = min(lora)
    wide = {n: (torch.randn(3, a.shape[1] + 8), b, s) for n, (a, b, s) in lora.items()}
    no(peft(wide), first, "another model")
    no(diffusers_form({n.replace("blocks.0", "blocks.7"): v for n, v in lora.items()}), "blocks.7")
    no({f"transformer.{k}": v for k, v in peft(lora).items()}, "transformer")
    no(
        kohya(lora) | kohya({"text_model_encoder_layers_0_mlp_fc1": lora[first]}, "lora_te2_"),
        "Stable Diffusion XL",
    )
    no(peft(lora) | {"extra.weight": torch.ones(2)}, "extra.weight")
    no({k: v for k, v in peft(lora).items() if k != f"{first}.lora_B.weight"}, first)
    no(peft({n: (a, torch.cat([b, b], 1), s) for n, (a, b, s) in lora.items()}), first)
    no(peft({n: (a * float("nan"), b, s) for n, (a, b, s) in lora.items()}), "finite")
    no(kohya({n: (a, b, float("nan")) for n, (a, b, s) in lora.items()}), "alpha")
    no({f"{n}.hada_w1_a": v[0] for n, v in lora.items()}, "LoHa")
    no({f"lora_unet_{n.replace('.', '_')}.lokr_w1": v[0] for n, v in lora.items()}, "LoKr")
    no(kohya(lora) | {f"lora_unet_{first.replace('.', '_')}.dora_scale": torch.ones(2)}, "DoRA")
    no(peft(lora) | peft(lora, "unet."), "twice")
    no(pipe.unet.state_dict(), "--network")
    no({f"model.diffusion_model.{k}": v for k, v in pipe.unet.state_dict().items()}, "--model")
    no({"emb_params": torch.ones(2, 64)}, "textual inversion")
    no({}, "no tensors")
    no({f"{n}.alpha": torch.tensor(1.) for n in lora}, first)
    no(
        peft(lora, "base_model.model."), "LOHA", name="adapter_model.safetensors",
        config=dict(peft_type="LOHA")
    )
    no(peft(lora, "base_model.model."), "adapter_config.json", name="adapter_model.safetensors", config=[1])
    no({"x" * 100_000: torch.ones(2)}, "xxx")
    no({k: v.to(torch.int64) for k, v in peft(lora).items()}, "int64")

def test_folders_and_files_without_weights(pipe, tmp_path):
    (tmp_path/"none").mkdir()
    refused(tmp_path/"none", "holds no .safetensors")
    refused(tmp_path/"missing", "no such")
    (tmp_path/"bin").mkdir(); (tmp_path/"bin/pytorch_lora_weights.bin").write_bytes(b"x")
    refused(tmp_path/"bin", "pickle")
    refused(tmp_path/"bin/pytorch_lora_weights.bin", "pickle")
    (tmp_path/"two").mkdir(); [(tmp_path/"two"/f"{o}.safetensors").write_bytes(b"") for o in "ab"]
    refused(tmp_path/"two", "a.safetensors", "b.safetensors")
    refused(tmp_path/"two/a.safetensors")
    (tmp_path/"text.txt").write_text("hello")
    refused(tmp_path/"text.txt", ".safetensors")
    pipe.unet.save_pretrained(tmp_path/"whole/unet")
    refused(tmp_path/"whole", "--network")
    refused(tmp_path/"whole/unet", "--network")

# what is in a file never decides how long it takes, or what runs

SLOW = "(([a-z_.0-9]+)+)+!"

@pytest.mark.parametrize(
    "field",
    [
        "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern",
        "modules_to_save"
    ],
)
def test_a_pattern_that_never_ends(pipe, tmp_path, field):
    lora = random_lora(pipe.unet, targets(pipe.unet, few=8))
    value = (
        {SLOW: 2}
        if field in ("rank_pattern", "alpha_pattern")
        else [SLOW] if field == "modules_to_save" else SLOW
    )
    config = dict(peft_type="LORA", r=3, lora_alpha=3) | {field: value}
    folders = [
        write(tmp_path / "a", peft(lora, "unet."), metadata=header(config)),
        write(tmp_path / "b", peft(lora), metadata=header(config, "")),
        write(tmp_path / "c", peft(lora, "base_model.model."), "adapter_model.safetensors", config=config),
    ]
    began = time.process_time()
    for folder in folders:
        # how strong the layers are cannot be known
        if field == "alpha_pattern": refused(folder, "alpha_pattern")
        else: same(pipe, folder, lora)
    assert time.process_time() - began < 20

@pytest.mark.parametrize(
    "text",
    [
        "[" * 50_000, "{", '"x"', '{"unet.r": 3, "unet.lora_alpha": NaN}', '{"unet.lora_alpha": "8"}',
        '{"unet.lora_alpha": -1}', '{"unet.lora_alpha": 0}', '{"unet.lora_alpha": true}',
        '{"unet.alpha_pattern": [1]}', '{"unet.alpha_pattern": {"to_q": null}}'
    ],
)
def test_nonsense_in_the_header(pipe, tmp_path, text):
    lora = random_lora(pipe.unet, targets(pipe.unet, few=2))
    refused(write(tmp_path/"l", peft(lora, "unet."), metadata={"lora_adapter_metadata": text}))

# through the doors that people use

@pytest.fixture
def some(pipe, tmp_path):
    return random_lora(pipe.unet, targets(pipe.unet), rank=lambda i: 1 + i % 2, alpha=lambda i: (3, 5)[i % 2])

def test_training_goes_on_with_that_adapter(pipe, folder, some, tmp_path):
    policy = StableDiffusionPolicy(load_pipeline(folder, write(tmp_path/"l", kohya(some))), lora_rank=7)
    own = dict(policy.pipeline.unet.named_parameters())
    assert len(policy.trainable_parameters()) == 2 * len(some)
    for n, (a, b, _) in some.items():
        assert torch.equal(own[f"{n}.lora_A.default.weight"], a) and torch.equal(
            own[f"{n}.lora_B.default.weight"], b
        )
    for p in policy.trainable_parameters(): p.data *= 1.1
    policy.save_pretrained(tmp_path/"on")
    trained = {n: (1.1 * a, 1.1 * b, s) for n, (a, b, s) in some.items()}
    same(pipe, tmp_path/"on", trained)
    # diffusers by itself
    (plain := again(pipe)).unet.load_lora_adapter(tmp_path/"on", prefix="unet", weight_name=FILE)
    torch.testing.assert_close(
        says(plain.unet, plain.text_encoder), says(*fused(pipe, trained)), atol=1e-4, rtol=1e-4
    )
    policy.restore(tmp_path/"on")

def test_pictures_are_those_of_the_fused_model(pipe, folder, some, tmp_path):
    text = random_lora(pipe.text_encoder, targets(pipe.text_encoder, TEXT), rank=4, seed=1, std=.3)
    place = write(tmp_path/"l", kohya(some) | kohya(text_names(text), "lora_te_"))
    got, want = load_pipeline(folder, place), load_pipeline(folder)
    before = draw(want)
    unet, text_encoder = fused(pipe, some, text)
    want.unet.load_state_dict(unet.state_dict()), want.text_encoder.load_state_dict(text_encoder.state_dict())
    torch.testing.assert_close(draw(got), draw(want), atol=1e-4, rtol=0)
    assert (draw(got) - before).abs().mean() > 1e-3
    with pytest.raises(ModelError) as e:
        load_pipeline(folder, write(tmp_path / "no", {f"transformer.{k}": v for k, v in peft(some).items()}))
    assert (
        str(e.value).startswith("--lora: cannot load")
        and "transformer" in str(e.value)
        and len(str(e.value).splitlines()) == 1
    )

# the command line

@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def go(line):
        capsys.readouterr()
        status = main(shlex.split(line))
        return status, *capsys.readouterr()
    return go

TINY = (
    "--queries 2 --evaluation-samples 2 --sample-num-steps 2 --train-batch-size 2 --sample-batch-size 2"
    " --sample-num-batches-per-epoch 1 --mixed-precision no --no-progress"
)

def test_the_command_line_applies_it(run, folder, some, tmp_path, pipe):
    text = random_lora(pipe.text_encoder, targets(pipe.text_encoder, TEXT), rank=4, seed=1, std=.3)
    write(tmp_path/"l", attn_procs(some))
    write(tmp_path/"t", kohya(some) | kohya(text_names(text), "lora_te_"))
    pictures = []
    for flags in ("", "--lora l", f"--lora l/{FILE}", f"--lora t/{FILE}"):
        assert run(f"sample --model {folder} {flags} --prompt cat --steps 2 --output a.png")[0] == 0
        pictures.append((tmp_path/"a.png").read_bytes())
    assert len({*pictures}) == 3 and pictures[1] == pictures[2]
    assert run(f"evaluate --model {folder} --lora t --samples 2 --steps 2")[0] == 0

@pytest.mark.parametrize(
    "line,words",
    [
        ("sample --prompt cat --output a.png --lora x", "--lora: transformer"),
        ("evaluate --lora x", "--lora: transformer"), ("train {} --init-lora x", "--init-lora: transformer"),
        ("train {} --init-lora t", "--init-lora: text encoder"),
        ("train {} --no-lora --init-lora t", "--init-lora: text encoder"),
        ("train {} --init-lora l --lora-rank 9", "--lora-rank: 9 rank"),
        ("train {} --init-lora ./nowhere", "--init-lora: nowhere"),
        ("sample --prompt cat --output a.png --lora no/where", "--lora: no/where hub"),
        ("train {} --init-lora no/where", "--init-lora: no/where hub"),
        ("train --dry-run --init-lora ./nowhere", "--init-lora: nowhere"),
        ("evaluate --network l", "--network:")
    ],
)
def test_the_command_line_refuses_it(run, folder, some, tmp_path, pipe, line, words):
    write(tmp_path/"x", {f"transformer.{k}": v for k, v in peft(some).items()})
    write(tmp_path/"l", kohya(some))
    write(
        tmp_path / "t",
        kohya(text_names(random_lora(pipe.text_encoder, targets(pipe.text_encoder, TEXT))), "lora_te_"),
    )
    status, out, err = run(line.format(TINY) + ("" if "dry-run" in line else f" --model {folder}"))
    assert status == 2 and not out and err.count("\n") == 1 and all(w in err for w in words.split()), err
    assert not (tmp_path/"runs").exists() and not (tmp_path/"a.png").exists()

def test_training_from_the_command_line_goes_on_with_it(run, folder, some, tmp_path, pipe):
    write(tmp_path/"l", attn_procs({n: (a[:1], b[:, :1], 1) for n, (a, b, _) in some.items()}))
    assert (
        run(f"train {TINY} --model {folder} --init-lora l/{FILE} --train-learning-rate 1e-9 --output out")[0]
        == 0
    )
    same(
        pipe, tmp_path / "out/weights/ddpo-is-seed0",
        {n: (a[:1], b[:, :1], 1) for n, (a, b, _) in some.items()}
    )
    assert json.loads((tmp_path/"out/config.json").read_text())["configs"]["ddpo-is"]["lora_rank"] == 1

def test_a_lora_from_the_hub(pipe, some, tmp_path, monkeypatch):
    "By its id, as the model card tells other programs to"
    import ddpo_nb.loading as loading
    asked = []
    class Api:
        def list_repo_files(self, repo_id):
            return ["README.md", "curves.png", FILE, "other/model.safetensors"]
    def snapshot(repo_id, **how): asked.append((repo_id, how)); return str(tmp_path/"l")
    monkeypatch.setattr(loading, "HfApi", Api); monkeypatch.setattr(loading, "snapshot_download", snapshot)
    write(tmp_path/"l", kohya(some))
    same(pipe, "ada/tidy-emoji", some)
    assert asked == [("ada/tidy-emoji", dict(allow_patterns=[FILE, "adapter_config.json"]))]
