"""What holds for every family: the same checks on a tiny pipeline of each one's real classes."""
import json
import math
from functools import cache

import pytest
import torch
from diffusers import FluxPipeline

from ddpo_nb.compare import compare
from ddpo_nb.ddpo import DDPO
from ddpo_nb.loading import FAMILIES, ModelError, family_of
from ddpo_nb.policy import load_policy
from ddpo_nb.prompts import InputError, PromptSource
from ddpo_nb.rewards import PromptAlignment
from ddpo_nb.rollout import rollout, sample_generator
from ddpo_nb.rwr import RWR
from ddpo_nb.tiny import TINY, tiny_pipeline
from ddpo_nb.trainer import DDPOConfig, RWRConfig, make_trainer

KINDS = ["sd", "sdxl", "sd3", "sd3-without-t5", "flux"]
FLOWS = [o for o in TINY if o.startswith(("sd3", "flux"))]
PROMPTS = ["a cat", "a dog on a red background", "a cat", "a fox"]

def make(kind, /, use_lora=True, seed=0, **settings):
    torch.manual_seed(seed)
    pipe = tiny_pipeline(kind)
    return family_of(pipe)(
        pipe, use_lora=use_lora, **dict(num_steps=4, guidance_scale=3.0, resolution=16) | settings
    )

def stirred(policy, by=0.1):
    "With weights that are not the pretrained ones."
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in policy.trainable_parameters(): w.add_(by * torch.randn(w.shape, generator=g))
    return policy

def generators(n, epoch=0): return [sample_generator(0, epoch, i) for i in range(n)]

def still(kind, /, **settings):
    "A policy without noise in its steps."
    own = dict(kind="ode") if kind in FLOWS else dict(eta=0.0)
    return make(kind, **settings | own)

@pytest.fixture(autouse=True)
def short_texts(request, monkeypatch):
    "T5's windows of 256 and 512 tokens cost time, and are looked at once."
    if "diffusers_own_call" in request.node.name: return
    for name in ("StableDiffusion3Pipeline", "FluxPipeline"):
        monkeypatch.setattr(family_of(name), "text_window", 16)

@pytest.mark.parametrize("kind", TINY)
def test_the_deterministic_limit_is_diffusers_own_call(kind):
    policy = still(kind)
    x = noise = policy.initial_latents(generators(2))
    with torch.no_grad():
        for t in policy.timesteps: x = policy.step(x, t.expand(2), policy.encode(PROMPTS[:2])).prev_sample
    flux = isinstance(policy.pipeline, FluxPipeline)
    given = FluxPipeline._pack_latents(noise, *noise.shape) if flux else noise
    theirs = policy.pipeline(PROMPTS[:2], num_inference_steps=4, guidance_scale=3.0, latents=given, height=16,
                             width=16, output_type="latent").images
    if flux: theirs = FluxPipeline._unpack_latents(theirs, 16, 16, policy.vae_scale)
    torch.testing.assert_close(x, theirs, atol=1e-5, rtol=0)
    pictures = policy.pipeline(
        PROMPTS[:2], num_inference_steps=4, guidance_scale=3.0, latents=given, height=16, width=16,
        output_type="pt"
    ).images
    torch.testing.assert_close(policy.decode(x), pictures, atol=1e-5, rtol=0)

@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_is_one_before_the_first_update_in_any_batch_split(kind):
    policy = stirred(make(kind))
    t = rollout(policy, PROMPTS, generators(4), batch_size=3)
    assert t.stochastic.any()
    for batch in ([0, 1, 2, 3], [2], [3, 0]):
        i = torch.tensor(batch).repeat_interleave(len(t.timesteps))
        k = torch.arange(len(t.timesteps)).repeat(len(batch))
        x, time, after, old = t.transitions(i, k)
        with torch.no_grad(): new = policy.step(x, time, t.conditioning[i], prev_sample=after).log_prob
        assert torch.equal(new, old), (new - old).abs().max()

@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_does_not_depend_on_the_micro_batch(kind):
    policy, objective = stirred(make(kind)), DDPO(kl_coef=0.5)
    t = rollout(policy, PROMPTS, generators(4))
    examples = objective.examples(
        policy, t, torch.tensor([1.0, -1, 0.5, -0.5]), torch.Generator().manual_seed(0)
    )
    def gradient(size):
        for p in policy.trainable_parameters(): p.grad = None
        m = len(examples["sample"])
        for i in range(0, m, size):
            loss, figures = objective.loss(policy, t, {k: v[i:i + size] for k, v in examples.items()})
            (loss.sum() / m).backward()
        assert figures["kl_pretrained"].min() > 0
        return torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])
    whole = gradient(100)
    assert whole.norm() > 0
    torch.testing.assert_close(gradient(3), whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-4)

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [True, False])
def test_the_price_on_leaving_has_a_gradient(kind, lora):
    "Flow-Factory's KL had none (its issue 122)."
    policy = make(kind, use_lora=lora)
    policy.keep_reference()
    stirred(policy, 0.02)
    t = rollout(policy, PROMPTS[:2], generators(2))
    k = int(t.stochastic.nonzero()[0])
    x, time, after, _ = t.transitions(torch.tensor([0, 1]), torch.tensor([k, k]))
    step = policy.step(x, time, t.conditioning, prev_sample=after)
    kl = DDPO().divergence(policy, step, x, time, t.conditioning)
    with policy.reference(), torch.no_grad():
        mean = policy.step(x, time, t.conditioning, prev_sample=after).mean
    by_hand = (step.mean - mean).square().flatten(1).mean(1) / (2 * step.std**2)
    torch.testing.assert_close(kl, by_hand, rtol=1e-4, atol=1e-8)
    kl.sum().backward()
    assert sum(p.grad.norm() for p in policy.trainable_parameters() if p.grad is not None) > 0

@pytest.mark.parametrize("kind", KINDS)
def test_the_denoising_loss_by_its_formula(kind):
    """RWR's loss: the network's answer at x_t against what it was trained to say, computed from the
    scheduler alone."""
    policy = stirred(make(kind))
    x0, noise = policy.latents_of(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))), \
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    cond, t = policy.encode(PROMPTS[:2]), policy.draw_levels(2, torch.Generator().manual_seed(5))
    if kind in FLOWS:
        sigma = (t / 1000).reshape(-1, 1, 1, 1)
        x, target = (1 - sigma) * x0 + sigma * noise, noise - x0
    else:
        a = policy.pipeline.scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        x, target = a**0.5 * x0 + (1 - a)**0.5 * noise, noise
    with torch.no_grad():
        said = policy.network(x, t, cond.prompt)
        if policy.two_passes:
            without = policy.network(x, t, cond.negative)
            said = without + 3.0 * (said - without)
        want = (said - target).square().flatten(1).mean(1)
        torch.testing.assert_close(policy.denoising_error(x0, t, noise, cond), want, rtol=1e-4, atol=1e-5)
    t = rollout(policy, PROMPTS, generators(4))
    examples = RWR(draws=2).examples(policy, t, torch.ones(4), torch.Generator().manual_seed(0))
    loss, _ = RWR(draws=2).loss(policy, t, examples)
    assert len(loss) == 8 and loss.isfinite().all() and loss.requires_grad

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [True, False])
def test_weights_are_saved_loaded_and_known_to_diffusers(kind, lora, tmp_path):
    policy = stirred(make(kind, use_lora=lora))
    policy.save_weights(tmp_path)
    again = make(kind, use_lora=lora)
    again.restore(tmp_path)
    for a, b in zip(policy.trainable_parameters(), again.trainable_parameters()): assert torch.equal(a, b)
    plain = make(kind).pipeline if not lora else (torch.manual_seed(0), tiny_pipeline(kind))[1]
    if lora: plain.load_lora_weights(tmp_path)
    else:
        network = type(policy.trained).from_pretrained(tmp_path/policy.network_name)
        plain.register_modules(**{policy.network_name: network.eval()})
    other = still(kind)
    other.hold(plain)
    other.configure(4, 3.0, resolution=16, **(dict(kind="ode") if kind in FLOWS else dict(eta=0.0)))
    policy.configure(4, 3.0, resolution=16, **(dict(kind="ode") if kind in FLOWS else dict(eta=0.0)))
    with torch.no_grad():
        x, cond, t = (
            policy.initial_latents(generators(2)), policy.encode(PROMPTS[:2]), policy.timesteps[1].expand(2)
        )
        torch.testing.assert_close(
            other.predict(x, t, cond), policy.predict(x, t, cond), atol=1e-4, rtol=1e-4
        )
    with pytest.raises(ModelError, match="not of this policy's shape"):
        (
            make(kind, lora_rank=2).restore(tmp_path)
            if lora
            else make("sdxl" if kind != "sdxl" else "sd", use_lora=False).restore(
                _renamed(tmp_path, policy.network_name)
            )
        )

def _renamed(folder, name):
    if not (folder/"unet").exists(): (folder/name).rename(folder/"unet")
    return folder

@cache
def folder_of(kind, base):
    torch.manual_seed(0)
    place = base/kind
    tiny_pipeline(kind).save_pretrained(place)
    return str(place)

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return lambda kind: folder_of(kind, base)

def brightness(images, prompts, metadata): return images.mean((1, 2, 3)), {}

def config(kind, out, algorithm="ddpo-is", **settings):
    cls = RWRConfig if algorithm.startswith("rwr") else DDPOConfig
    few = dict(
        algorithm=algorithm, logdir=str(out), mixed_precision="no", sample_num_steps=3, sample_batch_size=4,
        train_batch_size=2, num_epochs=2, sample_guidance_scale=3.0, sample_resolution=16,
        train_learning_rate=1e-2, samples_per_prompt=2, num_checkpoint_limit=9
    )
    return cls(**few | settings)

def train(kind, out, algorithm="ddpo-is", **settings):
    policy = make(kind)
    t = make_trainer(
        config(kind, out, algorithm, **settings), brightness, PromptSource(["a cat", "a fox"], 0), policy
    )
    rows = t.train(progress=False)
    return t, rows

def weights(t): return torch.cat([p.detach().flatten() for p in t.policy.trainable_parameters()])

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["ddpo-is", "rwr"])
def test_it_trains_and_resumes_to_the_same_bits(kind, algorithm, tmp_path):
    t, rows = train(kind, tmp_path/"a", algorithm)
    assert len(rows) == 2 and all(math.isfinite(r["loss"]) for r in rows)
    assert (weights(t) != weights_of_start(kind)).any()
    again = make_trainer(
        config(kind, tmp_path / "b", algorithm, resume_from=str(tmp_path / "a/checkpoints/checkpoint_1")),
        brightness, PromptSource(["a cat", "a fox"], 0), make(kind)
    )
    again.train(progress=False)
    assert torch.equal(weights(again), weights(t))

@cache
def weights_of_start(kind):
    return torch.cat([p.detach().flatten() for p in make(kind).trainable_parameters()])

@pytest.mark.parametrize("kind", ["sdxl", "sd3-without-t5", "flux"])
def test_compare_and_the_command_line(kind, folder, tmp_path, monkeypatch, capsys):
    from ddpo_nb.cli import main
    model = folder(kind)
    few = dict(
        sample_num_steps=2, sample_batch_size=2, train_batch_size=2, sample_resolution=16,
        mixed_precision="no", sample_num_batches_per_epoch=1, train_num_inner_epochs=1
    )
    c = compare("jpeg_compressibility", ("ddpo-is",), 2, (0,), model, evaluation_samples=2, progress=False,
                output=tmp_path/"out", prompts=_prompts(tmp_path), **few)
    assert c.evaluations["ddpo-is", 0].rewards["seen"] and (tmp_path/"out/report.html").exists()
    monkeypatch.chdir(tmp_path)
    trained = "out/weights/ddpo-is-seed0"
    line = [
        "sample", "--model", model, "--lora", trained, "--prompt", "a cat", "--steps", "2", "--output",
        "a.png", "--resolution", "16"
    ]
    assert main(line) == 0 and (tmp_path/"a.png").exists(), capsys.readouterr()
    line = [
        "evaluate", "--model", model, "--lora", trained, "--reward", "jpeg_compressibility", "--samples", "2",
        "--steps", "2", "--resolution", "16", "--prompts", str(_prompts(tmp_path))
    ]
    assert main(line) == 0, capsys.readouterr()

def _prompts(folder):
    (folder/"prompts.txt").write_text("a cat\na fox\n")
    return folder/"prompts.txt"

@pytest.mark.parametrize("kind", KINDS)
def test_alignment_is_judged_by_every_family(kind):
    torch.manual_seed(0)
    judge = PromptAlignment(tiny_pipeline(kind), num_levels=2)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = judge(x, ["a cat", "a fox"], [{}] * 2)[0]
    assert found.shape == (2,) and (found != 0).all()
    assert abs(judge(x, ["", ""], [{}] * 2)[0]).max() < 1e-7

# what a family does nothing with

@pytest.mark.parametrize(
    "kind,wrong,argument",
    [
        ("sd", dict(sample_noise_level=0.5), "sample_noise_level"),
        ("sdxl", dict(sample_sde="cps"), "sample_sde"), ("sd", dict(sample_window=2), "sample_window"),
        ("sd3", dict(sample_eta=0.5), "sample_eta"), ("flux", dict(sample_eta=0.5), "sample_eta"),
        ("flux", dict(train_cfg=False), "train_cfg"),
        ("flux", dict(negative_prompts="dog"), "negative_prompts"),
        ("flux", dict(mixed_precision="fp16"), "mixed_precision"),
        ("sd3", dict(sample_window_start=1), "window"), ("sd3", dict(sample_window=9), "window"),
        ("sd3", dict(sample_resolution=17), "resolution"), ("sd3", dict(sample_sde="ode"), "sample_sde"),
        ("sd3", dict(sample_noise_level=0.0), "sample_noise_level"),
    ("sd3", dict(sample_noise_level=0.2, sample_sde="ode"), "sample_noise_level")
    ],
)
def test_what_would_do_nothing_is_refused(kind, wrong, argument, tmp_path):
    with pytest.raises(InputError, match=argument) as e:
        make_trainer(config(kind, tmp_path, **wrong), brightness, PromptSource(["a cat"], 0), make(kind))
    assert len(str(e.value).splitlines()) == 1

def test_rwr_may_draw_by_the_ode(tmp_path):
    _, rows = train("sd3", tmp_path, "rwr", sample_sde="ode", num_epochs=1)
    assert math.isfinite(rows[0]["loss"])

def test_a_window_moves_with_the_epochs(tmp_path):
    seen = []
    policy = make("sd3")
    c = config("sd3", "", sample_num_steps=4, sample_window=2, sample_window_every=1, num_epochs=3)
    t = make_trainer(c, brightness, PromptSource(["a cat", "a fox"], 0), policy,
                     image_samples_hook=lambda *_: seen.append(policy.stochastic.tolist()))
    t.train(progress=False)
    assert seen == [[True, True, False, False], [False, True, True, False], [False, False, True, True]]

# traps of FLOW.md, sec. 4, that need a policy

@pytest.mark.parametrize("kind", FLOWS)
def test_trap_5_latents_in_half_precision_are_scored_as_they_are_stored(kind):
    policy = make(kind)
    policy.trained.to(torch.bfloat16)
    t = rollout(policy, PROMPTS, generators(4))
    i, k = torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4)
    x, time, after, old = t.transitions(i, k)
    with torch.no_grad(): new = policy.step(x, time, t.conditioning[i], prev_sample=after).log_prob
    assert t.latents.dtype == old.dtype == torch.float32 and torch.equal(new, old)
    rounded = after.bfloat16().float()  # what the peers stored: the ratio would not be 1
    with torch.no_grad(): off = policy.step(x, time, t.conditioning[i], prev_sample=rounded).log_prob
    assert (off - old).abs().max() > 1e-5

@pytest.mark.parametrize("kind", FLOWS)
def test_trap_7_noise_repeats_neither_across_prompts_nor_across_epochs(kind):
    policy = make(kind)
    a, b = (rollout(policy, ["a cat"] * 3, generators(3, epoch)).latents for epoch in (0, 1))
    both = torch.cat([a, b]).flatten(1)
    assert torch.pdist(both).min() > 1

@pytest.mark.parametrize(
    "kind,passes", [("sd", 2), ("sdxl", 2), ("sd3", 2), ("flux", 1), ("flux-schnell", 1)]
)
def test_trap_8_guidance_is_the_familys(kind, passes):
    policy = make(kind, num_steps=2)
    rows, forward = [], policy.forward
    policy.forward = lambda network, x, *o, **k: rows.append(len(x)) or forward(network, x, *o, **k)
    x = policy.initial_latents(generators(16))
    with torch.no_grad():
        cond, t = policy.encode(["a cat"] * 16), policy.timesteps[:1].expand(16)
        strong = policy.predict(x, t, cond)
        assert rows == [16 * passes]
        policy.guidance_scale = 6.0
        other = policy.predict(x, t, cond)
        assert torch.equal(strong, other) == (kind == "flux-schnell")
        if passes == 2:
            plain = policy.predict(x, t, cond, guidance=False)
            torch.testing.assert_close(other, plain + 2.5 * (strong - plain), atol=1e-3, rtol=1e-3)

@pytest.mark.parametrize("kind", FLOWS)
def test_trap_9_the_network_is_told_the_shifted_level(kind):
    told, policy = [], make(kind, num_steps=3)
    own = policy.trained.forward
    def forward(*args, **kwargs):
        told.append(float(kwargs.get("timestep", args[3] if len(args) > 3 else None)[0]))
        return own(*args, **kwargs)
    policy.trained.forward = forward
    rollout(policy, ["a cat"], generators(1))
    scale = 1 if kind.startswith("flux") else 1000
    assert told == pytest.approx([float(o) * scale for o in policy.process.sigmas[:-1]], rel=1e-5)
    assert policy.process.sigmas[1] != pytest.approx(2 / 3, abs=1e-3) or kind == "flux-schnell"

@pytest.mark.parametrize("kind", FLOWS)
def test_trap_12_packs_and_shift(kind):
    policy = make(kind)
    vae, x = policy.pipeline.vae, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
        torch.testing.assert_close(policy.decode(x), (raw / 2 + 0.5).clamp(0, 1))
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        found = (
            vae.encode(images * 2 - 1).latent_dist.mode() - vae.config.shift_factor
        ) * vae.config.scaling_factor
        torch.testing.assert_close(policy.latents_of(images), found)
    assert policy.latent_shape == (4, 8, 8)

def test_xl_is_told_zeros_for_no_prompt():
    policy = make("sdxl")
    cond = policy.encode(["a cat"])
    assert all(not o.any() for o in cond.negative.values()) and all(o.any() for o in cond.prompt.values())
    policy.configure(4, negative_prompt="a dog", resolution=16)
    policy._embeddings.clear()
    assert all(o.any() for o in policy.encode(["a cat"]).negative.values())

@pytest.mark.parametrize("half,kept", [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_a_vae_that_overflows_stays_in_full_precision(half, kept):
    policy = make("sdxl")
    policy.place(torch.device("cpu"), half)
    assert {p.dtype for p in policy.pipeline.vae.parameters()} == {kept}
    assert {p.dtype for p in policy.pipeline.text_encoder_2.parameters()} == {half}
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}

def test_a_family_is_found_by_its_pipelines_name(folder):
    for kind in KINDS: assert type(load_policy(folder(kind), resolution=16)) is family_of(tiny_pipeline(kind))
    assert len({family_of(o) for o in FAMILIES}) == len(FAMILIES)
    with pytest.raises(ModelError, match="no family"): family_of("KandinskyPipeline")

@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_text_encoders_wait_elsewhere_and_are_brought_for_new_prompts(kind):
    policy, plain = make(kind), make(kind)
    policy.place(torch.device("cpu"), None, True)
    policy.text_encoders[0].register_forward_pre_hook(lambda *_: asked.append(1))
    asked = []
    for prompts in (PROMPTS, PROMPTS, ["a bear"]):
        a, b = policy.encode(prompts).prompt, plain.encode(prompts).prompt
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert len(asked) == 2
    meta = make(kind)
    meta.place(torch.device("meta"), None, True)
    assert {o.device.type for o in meta.text_encoders} == {"cpu"} and meta.device.type == "meta"

def test_only_xls_vae_is_kept_from_half_precision():
    for kind, kept in (("sd", torch.float16), ("sdxl", torch.float32), ("sd3", torch.float16)):
        policy = make(kind)
        policy.pipeline.vae.register_to_config(force_upcast=True)
        policy.place(torch.device("cpu"), torch.float16)
        assert {p.dtype for p in policy.pipeline.vae.parameters()} == {kept}, kind

def test_an_xl_vae_in_full_precision_is_not_cast_down_while_it_decodes():
    policy, seen = make("sdxl"), []
    policy.pipeline.vae.decoder.conv_in.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.autocast("cpu", torch.bfloat16): policy.decode(policy.initial_latents(generators(1)))
    assert seen == [torch.float32]

def test_quantized_weights_stay_what_they_are():
    policy = make("sd3")
    whole = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    policy.trained.register_parameter("packed", whole)
    policy.place(torch.device("cpu"), torch.bfloat16)
    assert policy.trained.packed.dtype == torch.int8

def test_a_network_that_was_not_quantized_is_not_taken_for_one(tmp_path):
    with pytest.raises(InputError, match="^quantize: .*load_policy"):
        make_trainer(
            config("sd3", tmp_path, quantize="nf4"), brightness, PromptSource(["a cat"], 0), make("sd3")
        )
    with pytest.raises(InputError, match="^quantize: there is no 'int3'"):
        config("sd3", tmp_path, quantize="int3")

def test_pictures_for_clicks_say_how_they_were_drawn():
    from ddpo_nb.taste import draw_pool
    assert draw_pool(make("sd"), ["a cat"], 2).about["eta"] == 1.0
    about = draw_pool(make("flux", noise_level=0.5), ["a cat"], 2).about
    assert (about["kind"], about["noise_level"], about["window"]) == ("flow-sde", 0.5, None)

def test_guidance_that_a_model_does_not_take_is_told(capsys):
    for kind, told in (("flux", False), ("flux-schnell", True)):
        make_trainer(config(kind, ""), brightness, PromptSource(["a cat"], 0), make(kind))
        assert ("sample_guidance_scale does nothing" in capsys.readouterr().err) == told

@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_flow_is_examined_as_users_draw_however_it_is_trained(kind):
    from ddpo_nb.compare import Examiner
    items = [(p, {}) for p in PROMPTS]
    noisy, quiet = make(kind, noise_level=0.9, window=2), still(kind)
    examiner = Examiner(quiet, brightness, "brightness", items, 2)
    draw = lambda policy: examiner.draw(policy, items, generators(len(items)))
    drawn = draw(noisy)
    assert torch.equal(drawn.images, draw(quiet).images) and not drawn.stochastic.any()
    assert noisy.stochastic.sum() == 2 and noisy.process.kind == "flow-sde"
    with pytest.raises(RuntimeError), noisy.as_users_draw(): raise RuntimeError
    assert noisy.stochastic.any()

def test_others_are_examined_as_they_are_trained():
    policy = make("sd", eta=0.5)
    with policy.as_users_draw(): assert policy.process.eta == 0.5

def test_a_t5_that_reads_little_is_given_little():
    policy = make("sd3")
    policy.pipeline.text_encoder_3.config.n_positions = 1
    clip = policy.pipeline.tokenizer.model_max_length
    assert policy.embed(["a cat"])["text"].shape[1] == clip + 1 == policy.blank(1)["text"].shape[1]
    assert policy.reader == (policy.pipeline.tokenizer, clip)  # who reads the most
