import json
import os
import pickle
import shutil
import warnings
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from ddpo_nb import DefaultDDPOStableDiffusionPipeline
from ddpo_nb.policy import Conditioning, ModelError, StableDiffusionPolicy, load_pipeline

def draw(pipe, prompts=("cat", "frog"), scale=3., steps=3):
    return pipe(list(prompts), num_inference_steps=steps, eta=1., guidance_scale=scale, output_type="pt",
                generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))]).images

def shake(policy, std=.1):
    "Stands for training: every trainable weight moves."
    g = torch.Generator().manual_seed(0)
    for p in policy.trainable_parameters(): p.data += std*torch.randn(p.shape, generator=g)
    return policy

def inputs(n=2, seed=0):
    return torch.randn(n, 8, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.tensor(
        [801, 21, 500][:n]
    )

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    load_pipeline().save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return folder

@pytest.fixture(scope="module")
def policy(): return StableDiffusionPolicy(load_pipeline(), num_steps=4, guidance_scale=3)

# loading

def test_load_pipeline_from_a_folder_is_the_same_model(folder):
    pipe = load_pipeline(str(folder))
    assert isinstance(pipe.scheduler, DDIMScheduler)
    torch.testing.assert_close(draw(pipe), draw(load_pipeline()), atol=1e-5, rtol=0)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_pipeline_in_one_precision(folder, dtype):
    pipe = load_pipeline(str(folder), dtype=dtype)
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {
        dtype
    }

@pytest.mark.parametrize(
    "kwargs,argument",
    [
        (dict(model="./missing"), "--model"), (dict(model="/missing/folder"), "--model"),
        (dict(model="not an id"), "--model"), (dict(model="nobody/nothing-here"), "--model"),
        (dict(model=""), "--model"), (dict(lora="/missing"), "--lora"),
        (dict(network="missing/unet"), "--network")
    ],
)
def test_what_cannot_be_loaded_is_one_line(kwargs, argument):
    with pytest.raises(ModelError) as e: load_pipeline(**kwargs)
    assert (
        str(e.value).startswith(argument)
        and len(str(e.value).splitlines()) == 1
        and next(iter(kwargs.values())) in str(e.value)
    )

def test_empty_folders_are_one_line(tmp_path):
    for argument in ("model", "lora", "network"):
        with pytest.raises(ModelError, match=f"^--{argument}: .*{tmp_path.name}") as e:
            load_pipeline(**{argument: str(tmp_path)})
        assert len(str(e.value).splitlines()) == 1

def test_broken_weights_are_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"m")
    (tmp_path/"m/unet/diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    (tmp_path/"pytorch_lora_weights.safetensors").write_bytes(b"broken")
    for kwargs in (dict(model=str(tmp_path/"m")), dict(lora=str(tmp_path))):
        with pytest.raises(ModelError) as e: load_pipeline(**kwargs)
        assert len(str(e.value).splitlines()) == 1

@pytest.mark.parametrize(
    "part,old,new",
    [
        ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_a_pickle_is_never_opened(folder, tmp_path, part, old, new):
    shutil.copytree(folder, tmp_path/"m")
    (tmp_path/"m"/part/old).unlink()
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"exploded"),)
    (tmp_path/"m"/part/new).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError): load_pipeline(str(tmp_path/"m"))
    assert not (tmp_path/"exploded").exists()
    (tmp_path/"pytorch_lora_weights.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError): load_pipeline(lora=str(tmp_path))
    assert not (tmp_path/"exploded").exists()

def test_another_scheduler_becomes_ddim_without_clipping(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"m")
    PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    ).save_pretrained(tmp_path / "m/scheduler")
    index = json.loads((tmp_path/"m/model_index.json").read_text())
    (tmp_path / "m/model_index.json").write_text(
        json.dumps(index | {"scheduler": ["diffusers", "PNDMScheduler"]})
    )
    scheduler = load_pipeline(str(tmp_path/"m")).scheduler
    assert (
        isinstance(scheduler, DDIMScheduler)
        and not scheduler.config.clip_sample
        and scheduler.config.beta_end == 0.012
    )

def test_another_family_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"m")
    # as inpainting models have: latent + mask + picture
    config = dict(json.loads((tmp_path/"m/unet/config.json").read_text()), in_channels=17)
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path/"m/unet")
    with pytest.raises(ModelError, match="Stable Diffusion 1.x or 2.x"): load_pipeline(str(tmp_path/"m"))

# the policy

def test_lora_starts_as_the_pretrained_model():
    pipe = load_pipeline()
    # as a policy has it: other kernels, and rounding of their own
    pipe.unet.to(memory_format=torch.channels_last)
    # 16 rows: none are filled up
    x, t = torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16)*60
    text = pipe.encode_prompt(["cat", "frog"]*8, "cpu", 1, False)[0]
    with torch.no_grad():
        before = pipe.unet(x, t, text).sample
        after = StableDiffusionPolicy(pipe, guidance_scale=1, num_steps=4).predict(
            x, t, Conditioning(text, text)
        )
    assert torch.equal(before, after)

def test_what_is_trained(policy):
    names = [n for n, p in policy.pipeline.unet.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n for n in names) and len(names) == len(policy.trainable_parameters())
    attentions = sum("to_q.lora_A" in n for n in names)
    assert len(names) == attentions*4*2   # q, k, v, out; A and B
    whole = StableDiffusionPolicy(load_pipeline(), use_lora=False, num_steps=4)
    assert len(whole.trainable_parameters()) == len(list(whole.pipeline.unet.parameters()))
    for o in (policy, whole):
        assert not any(
            p.requires_grad for m in (o.pipeline.vae, o.pipeline.text_encoder) for p in m.parameters()
        )

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_lora", [True, False])
def test_field_trap_6_trainable_weights_are_fp32_in_a_half_precision_pipeline(dtype, use_lora):
    policy = StableDiffusionPolicy(
        load_pipeline(dtype=dtype), use_lora=use_lora, num_steps=4, guidance_scale=3
    )
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    assert policy.pipeline.vae.dtype == dtype and (policy.pipeline.unet.dtype == dtype) == use_lora
    x, t = inputs()
    out = policy.predict(x, t, policy.encode(["cat", "frog"]))
    out.square().mean().backward()
    assert out.dtype == torch.float32 and out.isfinite().all()
    assert {p.grad.dtype for p in policy.trainable_parameters() if p.grad is not None} == {torch.float32}

@pytest.mark.parametrize("use_lora", [True, False])
def test_a_loaded_lora_in_half_precision_trains_in_fp32(tmp_path, use_lora):
    shake(StableDiffusionPolicy(load_pipeline(), num_steps=4)).save_pretrained(tmp_path)
    policy = StableDiffusionPolicy(
        load_pipeline(lora=str(tmp_path), dtype=torch.bfloat16), use_lora=use_lora, num_steps=4
    )
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}

def test_each_distinct_prompt_is_encoded_once(policy):
    policy = StableDiffusionPolicy(load_pipeline(), num_steps=4)
    seen, encoder = [], policy.pipeline.text_encoder
    hook = encoder.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    for prompts in (["cat", "dog", "cat"], ["dog", "cat"], ["fox", "cat", "fox"]): policy.encode(prompts)
    hook.remove()
    assert seen == [4, 4]   # cat, dog and the negative prompt; then fox: filled up to four on a CPU
    policy.configure(4, negative_prompt="bee")
    theirs = policy.pipeline.encode_prompt(["fox", "cat"], "cpu", 1, True, negative_prompt=["bee", "bee"])
    ours = policy.encode(["fox", "cat"])
    torch.testing.assert_close((ours.prompt, ours.negative), theirs[:2], atol=1e-5, rtol=0)
    assert len(ours) == 2 and torch.equal(ours[[1]].prompt[0], ours.prompt[1])

@pytest.mark.parametrize("scale", [1., 3., 7.5])
def test_predict_is_diffusers_formula(policy, scale):
    policy.configure(4, guidance_scale=scale)
    x, t = inputs()
    text, empty = policy.pipeline.encode_prompt(["cat", "frog"], "cpu", 1, True)
    with torch.no_grad():
        given, without = (policy.pipeline.unet(x, t, c).sample for c in (text, empty))
        ours, plain = (
            policy.predict(x, t, policy.encode(["cat", "frog"]), guidance) for guidance in (True, False)
        )
    torch.testing.assert_close(ours, without + scale*(given - without), atol=1e-4, rtol=0)
    torch.testing.assert_close(plain, given, atol=1e-4, rtol=0)

def test_configure(policy):
    policy.configure(7, eta=.5, guidance_scale=2)
    assert (
        len(policy.timesteps) == len(policy.stochastic) == 7 and policy.stochastic.all() and policy.eta == 0.5
    )
    timesteps = policy.timesteps
    policy.pipeline("cat", num_inference_steps=3)
    # the pipeline's own sampling does not move the policy's steps
    assert torch.equal(policy.timesteps, timesteps)
    for wrong in (
        dict(num_steps=0), dict(num_steps=1001), dict(eta=-0.1), dict(eta=1.1), dict(reduction="max")
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))): policy.configure(**wrong)
    assert (
        len(policy.timesteps) == 7 and policy.latent_shape == (8, 8, 8) and policy.most_steps == 1000
    )

@pytest.mark.parametrize("guidance", [True, False])
def test_a_row_does_not_depend_on_its_batch(policy, guidance):
    policy.configure(4, guidance_scale=5)
    x, t, cond = (
        torch.randn(40, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) * 20,
        policy.encode(["cat", "frog"] * 20)
    )
    with torch.no_grad():
        whole, *cut = (
            torch.cat(
                [
                    policy.predict(x[i : i + n], t[i : i + n], cond[i : i + n], guidance)
                    for i in range(0, 40, n)
                ]
            )
            for n in (40, 1, 7, 16)
        )
    for o in cut: torch.testing.assert_close(o, whole, atol=2e-6, rtol=0)

@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_denoising_error_of_a_perfect_network_is_zero(kind):
    policy = StableDiffusionPolicy(load_pipeline(), num_steps=4)
    policy.scheduler.register_to_config(prediction_type=kind)
    (x0, t), (noise, _) = inputs(2), inputs(2, 1)
    policy.predict = lambda x, *_: dict(
        epsilon=noise, sample=x0, v_prediction=policy.scheduler.get_velocity(x0, noise, t)
    )[kind]
    assert policy.denoising_error(x0, t, noise, None).abs().max() < 1e-9
    policy.predict = lambda x, *_: torch.zeros_like(x)
    want = (
        dict(epsilon=noise, sample=x0, v_prediction=policy.scheduler.get_velocity(x0, noise, t))[kind]
        .square()
        .mean((1, 2, 3))
    )
    torch.testing.assert_close(policy.denoising_error(x0, t, noise, None), want)

# saving

def test_field_trap_8_lora_roundtrip_in_plain_diffusers(tmp_path, folder):
    policy = shake(StableDiffusionPolicy(load_pipeline(), num_steps=3))
    policy.save_pretrained(tmp_path)
    assert [o.name for o in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    plain = StableDiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    before = draw(plain)
    plain.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(plain), draw(policy.pipeline), atol=1e-4, rtol=0)
    assert (draw(plain) - before).abs().mean() > 1e-3
    torch.testing.assert_close(
        draw(load_pipeline(lora=str(tmp_path))), draw(policy.pipeline), atol=1e-4, rtol=0
    )

@pytest.mark.parametrize("with_lora", [False, True])
def test_field_trap_8_whole_unet_roundtrip_in_plain_diffusers(tmp_path, with_lora):
    if with_lora: shake(StableDiffusionPolicy(load_pipeline(), num_steps=3)).save_pretrained(tmp_path/"lora")
    pipe = load_pipeline(lora=str(tmp_path/"lora") if with_lora else None)
    before = draw(pipe)
    policy = StableDiffusionPolicy(pipe, use_lora=False, num_steps=3)
    torch.testing.assert_close(draw(policy.pipeline), before, atol=1e-4, rtol=0)   # a LoRA is fused, not lost
    shake(policy, .01).save_pretrained(tmp_path)
    plain = load_pipeline()
    # as the policy's: the same kernels
    plain.unet = UNet2DConditionModel.from_pretrained(tmp_path/"unet").to(memory_format=torch.channels_last)
    torch.testing.assert_close(draw(plain), draw(policy.pipeline), atol=1e-4, rtol=0)
    for o in (tmp_path, tmp_path / "unet"):
        torch.testing.assert_close(draw(load_pipeline(network=str(o))), draw(plain), atol=1e-4, rtol=0)

def test_a_loaded_lora_goes_on_training_and_keeps_its_strength(tmp_path):
    from peft import LoraConfig
    pipe = load_pipeline()
    # alpha is not r
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"]), adapter_name="mine")
    first = shake(StableDiffusionPolicy(pipe, num_steps=3))
    first.save_pretrained(tmp_path/"1")
    second = StableDiffusionPolicy(load_pipeline(lora=str(tmp_path/"1")), num_steps=3, lora_rank=8)
    torch.testing.assert_close(draw(second.pipeline), draw(first.pipeline), atol=1e-5, rtol=0)
    assert len(second.trainable_parameters()) == len(first.trainable_parameters()) > 0
    assert all(2 in p.shape for p in second.trainable_parameters())
    shake(second).save_pretrained(tmp_path/"2")
    third = load_pipeline(lora=str(tmp_path/"2"))
    # a policy's layers round otherwise than peft's
    torch.testing.assert_close(draw(third), draw(second.pipeline), atol=1e-4, rtol=0)
    assert (draw(third) - draw(first.pipeline)).abs().mean() > 1e-4

@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_several_loras_are_refused():
    from peft import LoraConfig
    pipe = load_pipeline()
    for name in "ab": pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name=name)
    with pytest.raises(ModelError, match="several LoRAs"): StableDiffusionPolicy(pipe)

def test_trl_constructor(folder):
    policy = DefaultDDPOStableDiffusionPipeline(str(folder), pretrained_model_revision="main", use_lora=False)
    assert not policy.use_lora and len(policy.timesteps) == 50 and policy.guidance_scale == 5
    with pytest.raises(ModelError): DefaultDDPOStableDiffusionPipeline("/missing")

def test_a_lora_merges_into_the_unet(tmp_path):
    policy = StableDiffusionPolicy(load_pipeline())
    torch.manual_seed(0)
    for name, p in policy.trained.named_parameters():
        if "lora_B" in name: p.data.normal_(std=0.1)
    policy.save_pretrained(tmp_path)
    apart, merged = load_pipeline(lora=str(tmp_path)), load_pipeline(lora=str(tmp_path))
    merged.fuse_lora(); merged.unload_lora_weights()
    assert not [k for k in merged.unet.state_dict() if "lora" in k]
    merged.unet.save_pretrained(tmp_path/"unet")
    draw = lambda pipe: pipe(
        ["a cat"], num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    again = load_pipeline(network=str(tmp_path))
    assert (
        (draw(apart) - draw(merged)).abs().max() < 1e-3
        and (draw(again) - draw(merged)).abs().max() == 0
        and (draw(apart) - draw(load_pipeline())).abs().max() > 0.01
    )

def test_restore_is_exact_and_refuses_other_shapes(tmp_path):
    a, b = StableDiffusionPolicy(load_pipeline()), StableDiffusionPolicy(load_pipeline())
    for p in a.trainable_parameters(): p.data.normal_()
    a.save_pretrained(tmp_path); b.restore(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(a.trainable_parameters(), b.trainable_parameters()))
    with pytest.raises(ModelError, match="not of this policy's shape"):
        StableDiffusionPolicy(load_pipeline(), lora_rank=8).restore(tmp_path)

# as fast as the network allows, and still the same

def test_a_small_lora_says_and_learns_what_pefts_does():
    from ddpo_nb.speed import SmallLora
    from peft.tuners import lora
    policy = shake(StableDiffusionPolicy(load_pipeline(), num_steps=4))
    layers = [m for m in policy.pipeline.unet.modules() if isinstance(m, SmallLora)]
    x, t = torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) * 60
    def said_and_learned():
        policy.pipeline.unet.zero_grad()
        out = policy.predict(x, t, policy.encode(["cat", "frog"] * 8))
        out.square().mean().backward()
        return out.detach(), torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])
    ours = said_and_learned()
    for m in layers: m.__class__ = lora.Linear
    theirs = said_and_learned()
    assert len(layers) == 56
    for a, b in zip(ours, theirs): assert (a - b).norm() < 1e-5 * b.norm()

@pytest.mark.parametrize("guidance", [True, False])
def test_what_attention_keeps_is_what_it_would_find(guidance):
    """Once per text in a steady context, anew outside of it, never for other texts, another guidance,
    other weights, or where gradients are wanted"""
    policy, calls = shake(StableDiffusionPolicy(load_pipeline(), num_steps=4)), []
    hooks = [
        m.register_forward_hook(lambda *o: calls.append(1))
        for n, m in policy.pipeline.unet.named_modules()
        if n.endswith("attn2.to_k")
    ]
    x, t = torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) * 60
    cats, dogs = policy.encode(["cat"] * 16), policy.encode(["dog"] * 16)
    def predict(cond):
        calls.clear()
        return policy.predict(x, t, cond, guidance), len(calls) // len(hooks)
    with torch.no_grad():
        plain = {k: predict(v)[0] for k, v in dict(cats=cats, dogs=dogs).items()}
        with policy.reference(): untouched, _ = predict(cats)
        with policy.steady():
            for cond, name, found in (
                (cats, "cats", 1), (cats, "cats", 0), (dogs, "dogs", 1), (cats, "cats", 1)
            ):
                out, n = predict(cond)
                assert n == found and torch.equal(out, plain[name])
            with policy.reference(): out, n = predict(cats)
            assert n == 1 and torch.equal(out, untouched)
            with torch.enable_grad(): assert predict(cats)[1] == 1
        assert predict(cats)[1] == 1

# Prompts that are longer than what the text encoder reads

LONG = "a very large and very friendly brown bear that is standing in the middle of a green meadow"

def test_long_prompts_are_told_once_with_their_number_and_which_become_the_same():
    p = StableDiffusionPolicy(load_pipeline(), num_steps=2)
    with pytest.warns(UserWarning) as w:
        p.warn_cut(["a bear", LONG, LONG + " at night", LONG + " at noon", "a cat"])
    assert (
        len(w) == 1
        and "3 of 5 prompts are longer than the 16 tokens" in str(w[0].message)
        and "2 cannot be told from another then, such as 'a very large" in str(w[0].message)
    )
    assert "\n" not in str(w[0].message) and len(str(w[0].message)) < 500
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b = p.encode([LONG + " at night", LONG + " at noon"]).prompt   # told already, and by nobody else
        p.encode(["something else " * 30])
    assert torch.equal(a, b)

def test_what_nobody_announced_is_told_when_it_is_first_encoded(caplog):
    p = StableDiffusionPolicy(load_pipeline(), num_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # the same tokens, and nothing is cut
        p.encode(["a bear", "A bear", "a  bear"]); p.warn_cut(["A BEAR", "a bear", ""])
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer") as w:
        p.encode(["a bear", "a cat", LONG])
    assert len(w) == 1 and not caplog.records
    q = StableDiffusionPolicy(load_pipeline(), num_steps=2, negative_prompt=LONG)
    with pytest.warns(UserWarning, match="1 of 2 prompts"): q.encode(["a bear"])

def test_a_cut_prompt_is_read_as_the_pipeline_reads_it():
    "What counts as the same is what the text encoder is given"
    from ddpo_nb.loading import _read_part
    tokenizer = load_pipeline().tokenizer
    texts = ["", "a bear", LONG, LONG + " at night", "bear " * 200]
    parts, cut = _read_part(tokenizer, texts, tokenizer.model_max_length)
    given = tokenizer(texts, truncation=True, max_length=tokenizer.model_max_length).input_ids
    assert [list(o) for o in parts] == given and cut == [False, False, True, True, True]

def test_a_run_tells_it_once(monkeypatch, recwarn):
    "compare's base model does, and none of its algorithms' policies"
    from ddpo_nb.compare import Comparison, compare
    def race(self, examiner, base, make_prompts, reward, progress):
        for algorithm in self.settings["algorithms"]:
            self._trainer(algorithm, 0, make_prompts, reward).sample()
    monkeypatch.setattr(Comparison, "_race", race)
    compare(
        algorithms=("ddpo-is", "rwr"), prompts=["a bear", LONG, LONG + " at night"], queries=4,
        progress=False, sample_num_steps=1, train_batch_size=2, sample_batch_size=2,
        sample_num_batches_per_epoch=1
    )
    told = [str(o.message) for o in recwarn if "text encoder reads" in str(o.message)]
    assert len(told) == 1 and "2 of 3 prompts" in told[0] and "1 cannot be told" in told[0]
