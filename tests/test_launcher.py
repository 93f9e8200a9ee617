"What accelerate's launcher and its arguments ask for: honoured, or refused in one line, never half of it."
import pytest, torch
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import InputError
from ddpo_nb.trainer import DDPOConfig, DDPOTrainer, check_launcher

def trainer(**kw):
    c = DDPOConfig(
        **dict(
            sample_num_steps=2, sample_batch_size=2, sample_num_batches_per_epoch=2, train_batch_size=1,
            mixed_precision="no", logdir="", train_gradient_accumulation_steps=4
        )
        | kw
    )
    torch.manual_seed(0)
    return DDPOTrainer(
        c, lambda images, *_: (images.mean((1, 2, 3)), {}), lambda: ("cat", {}),
        StableDiffusionPolicy(load_pipeline())
    )

def gradient_norm(): return trainer().epoch()["grad_norm"]

def test_the_gradient_is_divided_once_whatever_the_launcher_was_told(monkeypatch):
    usual = gradient_norm()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # as the config says: 4
    assert gradient_norm() == usual

REFUSED = dict(
    ACCELERATE_GRADIENT_ACCUMULATION_STEPS=("3", "train_gradient_accumulation_steps"),
    ACCELERATE_MIXED_PRECISION=("bf16", "mixed_precision"),
    ACCELERATE_USE_DEEPSPEED=("true", "ACCELERATE_USE_DEEPSPEED"),
    ACCELERATE_USE_FSDP=("true", "ACCELERATE_USE_FSDP"),
    ACCELERATE_USE_MEGATRON_LM=("true", "ACCELERATE_USE_MEGATRON_LM"),
    ACCELERATE_USE_PARALLELISM_CONFIG=("true", "ACCELERATE_USE_PARALLELISM_CONFIG"),
    ACCELERATE_DYNAMO_BACKEND=("inductor", "ACCELERATE_DYNAMO_BACKEND"),
)

@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_numbers_is_refused(name, monkeypatch):
    monkeypatch.setenv(name, REFUSED[name][0])
    # before anything is touched
    with pytest.raises(InputError, match=f"^{REFUSED[name][1]}: ") as e:
        DDPOTrainer(DDPOConfig(), None, None, None)
    assert "\n" not in str(e.value)

def test_what_a_plain_launch_sets_is_fine(monkeypatch):
    for k, v in dict(
        ACCELERATE_MIXED_PRECISION="no", ACCELERATE_DYNAMO_BACKEND="no", ACCELERATE_USE_DEEPSPEED="false",
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1", ACCELERATE_CPU_AFFINITY="0"
    ).items():
        monkeypatch.setenv(k, v)
    for precision in ("no", "fp16", "bf16"): check_launcher(DDPOConfig(mixed_precision=precision))

def test_no_precision_in_the_config_is_the_launchers(monkeypatch):
    assert DDPOConfig(mixed_precision=None).mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert DDPOConfig(mixed_precision=None).mixed_precision == "bf16"
    check_launcher(DDPOConfig(mixed_precision="bf16"))

@pytest.mark.parametrize(
    "kwargs,says",
    [
        (dict(gradient_accumulation_steps=4), "train_gradient_accumulation_steps"),
        (dict(mixed_precision="bf16"), "set mixed_precision"), (dict(log_with="wandb"), "set log_with"),
        (dict(project_dir="x"), "project_kwargs"), (dict(dynamo_backend="inductor"), "set compile"),
        (dict(split_batches=True), "does nothing with it"),
        (dict(dataloader_config=object()), "does nothing with it"),
        (dict(fsdp_plugin=object()), "does nothing with it"),
        (dict(step_scheduler_with_optimizer=False), "does nothing with it"),
        (dict(dispatch_batches=True), "no such argument"), (dict(bogus=1), "no such argument")
    ],
)
def test_accelerator_kwargs_are_passed_on_or_refused(kwargs, says):
    with pytest.raises(InputError, match=r"^accelerator_kwargs\['") as e:
        DDPOConfig(accelerator_kwargs=kwargs)
    assert says in str(e.value)

def test_those_that_mean_something_arrive():
    from accelerate.utils import AutocastKwargs
    t = trainer(
        accelerator_kwargs=dict(kwargs_handlers=[AutocastKwargs(enabled=False)], device_placement=True)
    )
    assert not t.accelerator.autocast_handler.enabled
