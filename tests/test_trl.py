"A script written for TRL 0.23 runs with only its import line changed."
import dataclasses, inspect, json, warnings
import numpy as np, pytest, torch
from ddpo_nb import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from ddpo_nb.policy import ModelError, load_pipeline

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

# TRL 0.23.1's fields and defaults, all of them
TRL = dict(
    run_name="", seed=0, log_with=None, tracker_kwargs={}, accelerator_kwargs={}, project_kwargs={},
    tracker_project_name="trl", logdir="logs", num_epochs=100, save_freq=1, num_checkpoint_limit=5,
    mixed_precision="fp16", allow_tf32=True, resume_from="", sample_num_steps=50, sample_eta=1.0,
    sample_guidance_scale=5.0, sample_batch_size=1, sample_num_batches_per_epoch=2, train_batch_size=1,
    train_use_8bit_adam=False, train_learning_rate=3e-4, train_adam_beta1=0.9, train_adam_beta2=0.999,
    train_adam_weight_decay=1e-4, train_adam_epsilon=1e-8, train_gradient_accumulation_steps=1,
    train_max_grad_norm=1.0, train_num_inner_epochs=1, train_cfg=True, train_adv_clip_max=5.0,
    train_clip_range=1e-4, train_timestep_fraction=1.0, per_prompt_stat_tracking=False,
    per_prompt_stat_tracking_buffer_size=16, per_prompt_stat_tracking_min_count=16,
    async_reward_computation=False, max_workers=2, negative_prompts="", push_to_hub=False
)

def test_config_has_trls_fields_and_defaults():
    c = DDPOConfig()
    assert {k: getattr(c, k) for k in TRL} == TRL and isinstance(c.exp_name, str)
    assert [f.name for f in dataclasses.fields(c)][0] == "exp_name" and set(TRL) | {"exp_name"} <= set(
        c.to_dict()
    ) | {"tracker_kwargs", "accelerator_kwargs", "project_kwargs"}

def test_constructor_and_methods():
    assert list(inspect.signature(DDPOTrainer.__init__).parameters)[1:] == [
        "config", "reward_function", "prompt_function", "sd_pipeline", "image_samples_hook"
    ]
    assert all(callable(getattr(DDPOTrainer, k)) for k in ("train", "save_pretrained", "push_to_hub"))
    assert list(inspect.signature(DDPOTrainer.train).parameters)[1] == "epochs"

# What a user of TRL would have in a file

class Warmth(torch.nn.Module):
    "A reward with a model of its own, as aesthetic scorers are"
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1, bias=False)
        self.layer.weight.data = torch.tensor([[1.0, 0.0, -1.0]])
    @torch.no_grad()
    def __call__(self, images): return self.layer(images.mean((2, 3))).squeeze(1)

def warmth_scorer():
    scorer = Warmth()
    def _fn(images, prompts, metadata):
        assert (
            isinstance(images, torch.Tensor)
            and images.shape[1] == 3
            and len(images) == len(prompts) == len(metadata)
        )
        return scorer(images.float()), {}
    return _fn

animals = ["cat", "dog", "horse"]
def prompt_fn(): return np.random.choice(animals), {}

def image_outputs_logger(image_data, global_step, accelerate_logger):
    images, prompts, _, rewards, _ = image_data[-1]
    result = {
        f"{prompts[i]:.25} | {rewards[i].item():.2f}": image.unsqueeze(0).float().cpu().numpy()
        for i, image in enumerate(images)
    }
    accelerate_logger.log_images(result, step=global_step)

@pytest.mark.parametrize("use_lora", [True, False])
@pytest.mark.filterwarnings("ignore:mixed_precision. fp16 needs a GPU:UserWarning")
def test_a_trl_script_runs(tmp_path, use_lora, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    config = DDPOConfig(
        num_epochs=2, train_gradient_accumulation_steps=1, sample_num_steps=4, sample_batch_size=6,
        train_batch_size=3, sample_num_batches_per_epoch=2, per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=32, tracker_project_name="stable_diffusion_training",
        log_with="tensorboard", train_learning_rate=3e-4 if use_lora else 1e-5,
        project_kwargs={
            "logging_dir": "./logs", "automatic_checkpoint_naming": True, "total_limit": 5,
            "project_dir": "./save"
        },
    )
    pipeline = DefaultDDPOStableDiffusionPipeline(
        "emoji-sd", pretrained_model_revision="main", use_lora=use_lora
    )
    trainer = DDPOTrainer(
        config, warmth_scorer(), prompt_fn, pipeline, image_samples_hook=image_outputs_logger
    )
    trainer.train()
    trainer.save_pretrained("out")
    assert (
        tmp_path
        / "out"
        / ("pytorch_lora_weights.safetensors" if use_lora else "unet/diffusion_pytorch_model.safetensors")
    ).is_file()
    assert (
        len((tmp_path / "save/metrics.jsonl").read_text().splitlines()) == 2
        and (tmp_path / "save/checkpoints/checkpoint_2/files.json").is_file()
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    seen = [
        EventAccumulator(str(o.parent)).Reload().Tags()
        for o in (tmp_path / "logs").rglob("events.out.tfevents.*")
    ]
    scalars, images = ({t for tags in seen for t in tags[k]} for k in ("scalars", "images"))
    assert {
        "reward_mean", "reward_q50", "loss", "approx_kl", "clip_fraction", "grad_norm", "learning_rate",
        "images_per_second", "peak_memory_gb", "reward/cat"
    } <= scalars
    assert any(" | " in o for o in images)

def small(**kw):
    c = DDPOConfig(
        **dict(
            sample_num_steps=2, sample_batch_size=2, sample_num_batches_per_epoch=3, train_batch_size=2,
            num_epochs=1, mixed_precision="no", logdir=""
        )
        | kw
    )
    torch.manual_seed(0)
    return DDPOTrainer(
        c, warmth_scorer(), lambda: ("cat", {}), DefaultDDPOStableDiffusionPipeline("emoji-sd")
    )

def test_fp16_on_a_cpu_is_one_line_of_warning():
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t = small(mixed_precision="fp16")
    assert [str(w.message) for w in caught if "mixed_precision" in str(w.message)] == [
        "mixed_precision: fp16 needs a GPU; training in fp32 (mixed_precision='no')"
    ]
    assert t.accelerator.mixed_precision == "no" and t.config.mixed_precision == "fp16"

def test_the_hook_gets_one_entry_a_batch_and_the_reward_sees_batches():
    sizes, seen, t = [], [], small()
    inner = t.reward_function
    t.reward_function = lambda images, prompts, metadata: (
        sizes.append(len(images)), inner(images, prompts, metadata)
    )[1]
    t.hook = lambda *args: seen.append(args)
    t.epoch()
    (batches, step, accelerator), = seen
    assert sizes == [2, 2, 2] and len(batches) == 3 and step == 0 and accelerator is t.accelerator
    images, prompts, metadata, rewards, info = batches[0]
    assert (
        images.shape == (2, 3, 64, 64)
        and isinstance(rewards, torch.Tensor)
        and len(prompts) == len(metadata) == 2
        and info == {}
    )
    accelerator.log_images({"a": images[:1]}, step=0)  # with no tracker, a no-op

def test_trap_9_rewards_in_threads_are_awaited_once_and_give_the_same():
    a, b = small(), small(async_reward_computation=True, max_workers=3)
    drop = lambda row: {k: v for k, v in row.items() if not k.startswith(("seconds", "images_per", "peak"))}
    assert [drop(r) for r in a.train(progress=False)] == [drop(r) for r in b.train(progress=False)]

def test_trap_9_a_reward_that_raises_in_a_thread_is_the_users_own_error():
    t = small(async_reward_computation=True)
    t.reward_function = lambda *a: 1 / 0
    with pytest.raises(ZeroDivisionError): t.epoch()

def test_trap_9_nothing_is_logged_before_there_is_a_logger(monkeypatch):
    "TRL's module-level logger raised if used before `Accelerator()` existed."
    from accelerate.state import AcceleratorState, PartialState
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    small().epoch()

def test_trap_8_a_unet_saved_with_a_lora_inside_is_named(tmp_path):
    "TRL's `save_pretrained` wrote such folders."
    small().policy.pipeline.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="files lack 70 of its weights"):
        DefaultDDPOStableDiffusionPipeline(str(tmp_path))

def test_epochs_are_counted_in_all():
    t = small(num_epochs=3)
    assert (
        len(t.train(1, progress=False)) == 1
        and len(t.train(2, progress=False)) == 2
        and len(t.train(progress=False)) == 3
    )
    assert t.queries == 18 and t.global_step == 9

def test_saved_weights_are_found_again_by_name(tmp_path):
    t = small()
    t.train(progress=False); t.save_pretrained(tmp_path)
    load_pipeline().save_pretrained(tmp_path)  # beside the base model
    again = DefaultDDPOStableDiffusionPipeline(str(tmp_path), use_lora=True)
    own = {k: v for k, v in t.policy.unet.state_dict().items() if "lora" in k}
    assert own and all(torch.equal(again.unet.state_dict()[k], v) for k, v in own.items())
