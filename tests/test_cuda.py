"""A GPU's own: what has to be seen on one, at a size that matters. `pytest -m cuda` runs it, with the tests
of other files that take a device.

Each body runs on the CPU too, with Emoji SD where the GPU takes Stable Diffusion 1.5's size, so that it is
known to be right before it meets a GPU."""
import gc, json
from functools import partial
import numpy as np, pytest, torch
from ddpo_nb.compare import compare
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import PromptSource
from ddpo_nb.recipes import model_numbers, plan
from ddpo_nb.rewards import get_reward, jpeg_compressibility
from ddpo_nb.rollout import rollout, sample_generator
from ddpo_nb.trainer import ALGORITHMS, make_config, make_trainer
from test_precision import overflow, trainer as precise

CUDA = partial(pytest.param, marks=pytest.mark.cuda)
GiB = 2**30
# what other files test on the CPU anyway: there the twin runs when asked for
rarely = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA("cuda")], indirect=True
)

def brightness(images, prompts, metadata):
    return images.float().mean((1, 2, 3)), {"contrast": images.float().std((1, 2, 3))}

@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    "A folder with a model of Stable Diffusion 1.5's size and random weights"
    from test_sd15_size import random_sd15
    with torch.device("cuda"): pipe = random_sd15()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder): part.half().cpu()
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("sd15"))
    return str(folder)

def sized(device, request, lora=True, **kw):
    "A trainer of a model that suits the device, and what the dry run knows of that model"
    gc.collect()  # an earlier trainer, which its own methods refer to
    name = "emoji-sd" if device.type == "cpu" else "stable-diffusion-v1-5/stable-diffusion-v1-5"
    usual = dict(
        mixed_precision="no" if device.type == "cpu" else "bf16", logdir="", sample_num_steps=2,
        sample_batch_size=2, sample_num_batches_per_epoch=2, train_batch_size=4, micro_batch_size=1,
        train_learning_rate=1e-5, allow_tf32=False
    )
    c = make_config("ddpo-is", name, **usual | kw)
    model = "emoji-sd" if device.type == "cpu" else request.getfixturevalue("sd15")
    policy = StableDiffusionPolicy(
        load_pipeline(model, dtype=torch.float32), use_lora=lora, lora_rank=c.lora_rank
    )
    return make_trainer(c, brightness, PromptSource(["cat", "dog"], 0), policy), model_numbers(name)

# ---- the same numbers as on a CPU ----

@torch.no_grad()
def scored(device, precision="no"):
    "Pictures, and log-probabilities of actions that are given: what a CPU sampled"
    policy = StableDiffusionPolicy(load_pipeline(), num_steps=4)
    generators = [sample_generator(0, 0, i) for i in range(3)]
    t = rollout(policy, ["cat", "dog", "bear"], generators)
    sample, step = torch.arange(3).repeat_interleave(4), torch.arange(4).repeat(3)
    x, when, action, old = t.transitions(sample, step)
    policy.pipeline.to(device)
    again = policy.step(
        x.to(device), when.to(device), policy.encode(t.prompts)[sample.to(device)],
        prev_sample=action.to(device)
    )
    drawn = rollout(policy, ["cat", "dog", "bear"], [sample_generator(0, 0, i) for i in range(3)])
    return old, again.log_prob.cpu(), t.images, drawn.images.cpu(), t.latents[:, 0], drawn.latents[:, 0].cpu()

def test_log_probabilities_and_pictures_are_the_cpus(device):
    """fp32 without TF32. Noise to the bit; log-probabilities to 1e-4 of themselves, pictures to a
    thousandth of white"""
    from ddpo_nb.prepare import _tf32
    _tf32(False)
    old, new, here, there, noise, own = scored(device)
    assert torch.equal(noise, own)
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)
    assert (here - there).abs().mean() < 1e-3

@pytest.mark.parametrize(
    "device,algorithm", [("cpu", "rwr"), *(CUDA("cuda", o) for o in ALGORITHMS)], indirect=["device"]
)
def test_the_gradient_is_the_cpus(device, algorithm):
    "Of one update in fp32, weight by weight: the direction, and the size to a hundredth"
    def gradient(kind):
        from conftest import on_device
        on_device(kind)
        t = precise(
            "no", allow_tf32=False, algorithm=algorithm, sample_num_steps=3, sample_num_batches_per_epoch=1,
            train_batch_size=4
        )
        found = []
        flat = lambda: torch.cat([p.grad.detach().flatten().cpu() for p in t.policy.trainable_parameters()])
        t.optimizer.optimizer.register_step_pre_hook(lambda *_: found.append(flat()))
        t.epoch()
        return found[0]
    here, there = gradient("cpu"), gradient(device.type)
    assert torch.cosine_similarity(here, there, 0) > 0.9999 and float(
        there.norm() / here.norm()
    ) == pytest.approx(1, rel=1e-2)

# ---- fp16's scaler ----

@pytest.mark.cuda
def test_fp16_skips_what_overflowed_and_goes_on(tmp_path):
    "The real one: test_precision.py does the same on a CPU with a scaler put in by hand"
    small = dict(
        sample_num_steps=3, sample_num_batches_per_epoch=1, train_batch_size=2, micro_batch_size=99,
        logdir=str(tmp_path)
    )
    t = precise("fp16", **small)
    scale = t.accelerator.scaler.get_scale()
    overflow(t, 0)
    row = t.epoch()
    assert row["updates"] == 2 and row["skipped_updates"] >= 1 and t.accelerator.scaler.get_scale() < scale
    assert all(p.isfinite().all() for p in t.policy.trainable_parameters())
    json.dumps(row, allow_nan=False, default=float)
    t.save_checkpoint()
    again = precise("fp16", **small | dict(resume_from=str(tmp_path)))
    assert again.accelerator.scaler.get_scale() == t.accelerator.scaler.get_scale()

# ---- memory ----

def peak(t):
    "Most bytes in use in an epoch, weights and what was there before it included"
    if torch.cuda.is_available(): torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
    t.epoch()
    return torch.cuda.max_memory_allocated() if t.accelerator.device.type == "cuda" else None

def within(measured, expected, share):
    return measured is None or expected * (1 - share) - GiB / 4 < measured < expected * (1 + share) + GiB / 4

SETTINGS = {
    "micro-batch 1": (True, {}), "micro-batch 4": (True, dict(micro_batch_size=4)),
    "offloaded": (True, dict(offload_trajectories=True)),
    "checkpointing": (True, dict(gradient_checkpointing=True, micro_batch_size=4)),
    "whole": (False, {}),
}

@pytest.mark.parametrize(
    "device,name", [("cpu", "offloaded"), *(CUDA("cuda", o) for o in SETTINGS)], indirect=["device"]
)
def test_a_dry_run_knows_the_memory(device, request, name):
    "To a fifth, and a quarter of a GiB for what CUDA's libraries take"
    lora, kw = SETTINGS[name]
    t, numbers = sized(device, request, lora, **kw)
    t.epoch()  # the optimizer's state is made in the first update
    estimate = plan(t.config, numbers, lora).memory.peak
    assert estimate > 0 and within(peak(t), estimate, 0.2)

@rarely
def test_gradient_checkpointing_and_offloading_take_less(device, request):
    def of(**kw):
        t, _ = sized(
            device, request, sample_num_batches_per_epoch=4, train_batch_size=8, sample_num_steps=3,
            micro_batch_size=4, **kw
        )
        return peak(t)
    plain, checkpointed, offloaded = of(), of(gradient_checkpointing=True), of(offload_trajectories=True)
    assert plain is None or (checkpointed < 0.8 * plain and offloaded <= plain)

@rarely
def test_8_bit_adam_takes_a_quarter_of_the_state(device, request):
    pytest.importorskip("bitsandbytes")
    state = lambda t: sum(
        v.numel() * v.element_size()
        for s in t.optimizer.state.values()
        for v in s.values()
        if isinstance(v, torch.Tensor)
    )
    def of(eight_bit):
        t, _ = sized(device, request, lora=False, train_use_8bit_adam=eight_bit)
        t.epoch()
        return state(t), [p.dtype for p in t.policy.trainable_parameters()]
    (small, kinds), (large, _) = of(True), of(False)
    assert small < 0.35 * large and set(kinds) == {torch.float32}

# ---- around the training ----

@rarely
@pytest.mark.parametrize("pool", ["thread", "process"])
def test_rewards_found_meanwhile_are_the_same(device, pool):
    small = dict(
        sample_num_steps=2, sample_batch_size=2, sample_num_batches_per_epoch=2, train_batch_size=4,
        offload_trajectories=True
    )
    def rewards(**kw):
        t = precise("no", **small, **kw)
        t.reward_function = jpeg_compressibility
        try: return t.collect().row["reward_by_prompt"]
        finally:
            if t.pool: t.pool.close()
    assert rewards() == pytest.approx(rewards(async_reward_computation=True, reward_pool=pool), rel=1e-3)

def test_a_reward_with_a_model_is_scored_where_the_pictures_are(device):
    t = precise(
        "no", sample_num_steps=2, sample_batch_size=2, sample_num_batches_per_epoch=1, train_batch_size=2,
        watch_reward="prompt_alignment"
    )
    t.reward_function = get_reward("clip_alignment").to(device)
    row = t.epoch()
    assert np.isfinite([row["reward_mean"], row["watch_mean"]]).all()

@rarely
def test_compare_from_the_prompts_to_the_report(device, tmp_path):
    found = compare(
        "jpeg_compressibility", ("ddpo-is",), queries=4, output=tmp_path, evaluation_samples=2,
        progress=False, sample_num_steps=2, sample_batch_size=2, sample_num_batches_per_epoch=1,
        train_batch_size=2
    )
    report = found.report(tmp_path/"report.html")
    text = (tmp_path/"report.html").read_text(encoding="utf-8")
    assert report is None or report
    assert (
        len(found.rows) == 2
        and not found.missing
        and "<html" in text
        and (tmp_path / "weights/ddpo-is-seed0/pytorch_lora_weights.safetensors").is_file()
    )
    assert found.settings["machine"].endswith("cores") == (device.type == "cpu")
