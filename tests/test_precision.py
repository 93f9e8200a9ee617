"""Half precision: what is trained and scored stays in fp32, and the ratio is 1 before the first update
(FIELD's traps 3 and 6)."""
import contextlib, itertools, json
import pytest, torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import InputError, PromptSource
from ddpo_nb.rewards import jpeg_compressibility
from ddpo_nb.trainer import make_config, make_trainer, processes

on_cuda = lambda precision: pytest.param("cuda", precision, marks=pytest.mark.cuda)
HALF = [("cpu", "bf16"), on_cuda("bf16"), on_cuda("fp16")]  # a CPU knows no fp16
placed = lambda places: pytest.mark.parametrize("device,precision", places, indirect=["device"])

@pytest.fixture(autouse=True)
def afterwards():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)

def trainer(precision, lora=True, algorithm="ddpo-is", **kw):
    c = make_config(
        algorithm,
        **(
            dict(
                mixed_precision=precision, logdir="", sample_num_steps=10, sample_batch_size=4,
                sample_num_batches_per_epoch=2, train_batch_size=8, train_timestep_fraction=1.0,
                train_clip_range=1e-4, step_weighting="equal", micro_batch_size=7,
                train_learning_rate=1e-3 if lora else 1e-5
            )
            | kw
        ),
    )
    pipeline = load_pipeline()
    torch.manual_seed(0)
    return make_trainer(
        c, jpeg_compressibility, PromptSource(["cat", "dog"]), StableDiffusionPolicy(pipeline, use_lora=lora)
    )

def ratios(t):
    work = t.collect()
    ex = t.objective.examples(t.policy, work.trajectories, work.advantages, torch.Generator().manual_seed(0))
    parts = [
        {k: v[i : i + t.config.micro_batch_size] for k, v in ex.items()}
        for i in range(0, len(ex["sample"]), t.config.micro_batch_size)
    ]
    with t.accelerator.autocast():
        return torch.cat([t.objective.loss(t.policy, work.trajectories, p)[1]["ratio"] for p in parts])

@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_trap_3_ratio_in_fp32(device, lora):
    assert (ratios(trainer("no", lora, allow_tf32=False)) - 1).abs().max() < (
        1e-6 if device.type == "cpu" else 1e-5
    )

@pytest.mark.slow
def test_trap_3_ratio_of_a_compiled_network():
    assert (
        ratios(trainer("no", compile=True, sample_num_steps=4, micro_batch_size=8)) - 1
    ).abs().max() < 1e-6

@placed(HALF)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_trap_3_nothing_is_clipped_before_the_first_update(device, precision, lora):
    r = ratios(trainer(precision, lora))
    assert r.dtype == torch.float32 and (r - 1).abs().max() < 1e-4

@placed([("cpu", "no"), on_cuda("no"), *HALF])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_trap_6_trained_weights_are_fp32_and_frozen_ones_half(device, precision, lora):
    t = trainer(precision, lora)
    half = dict(no=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[precision]
    unet = t.policy.pipeline.unet
    assert {p.dtype for p in unet.parameters() if p.requires_grad} == {torch.float32}
    assert {
        p.dtype
        for m in (unet, t.policy.pipeline.vae, t.policy.pipeline.text_encoder)
        for p in m.parameters()
        if not p.requires_grad
    } == {half}

@placed(HALF)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_trap_6_an_epoch_trains(device, precision, lora):
    t = trainer(precision, lora, sample_num_steps=3)
    before = [p.detach().clone() for p in t.policy.trainable_parameters()]
    row = t.epoch()
    assert any((a != b).any() for a, b in zip(before, t.policy.trainable_parameters())) and 0 < row[
        "grad_norm"
    ] < float("inf")

def overflow(t, *updates):
    "Make the gradients of these updates, counted from 0, infinite"
    seen = itertools.count()
    t.policy.trainable_parameters()[0].register_hook(
        lambda g: g * (float("inf") if next(seen) in updates else 1)
    )

# two updates of one pass each
few = dict(sample_num_steps=3, sample_num_batches_per_epoch=1, train_batch_size=2, micro_batch_size=99)

def test_fp16_skips_an_update_whose_gradient_overflowed(tmp_path, monkeypatch):
    """What accelerate does with fp16 on a GPU, done on a CPU: a scaled loss, and an optimizer that asks
    the scaler"""
    def scaled(**kw):
        t = trainer("no", logdir=str(tmp_path), **few, **kw)
        a = t.accelerator
        a.scaler, a.native_amp, a._optimizers[:] = torch.amp.GradScaler("cpu", init_scale=256.), True, []
        t.optimizer = AcceleratedOptimizer(t.optimizer.optimizer, scaler=a.scaler)
        a._optimizers.append(t.optimizer)
        monkeypatch.setattr(AcceleratorState(), "_mixed_precision", "fp16")
        monkeypatch.setattr(a, "autocast", contextlib.nullcontext)
        return t
    t = scaled()
    overflow(t, 0)
    weights = lambda: [p.detach().clone() for p in t.policy.trainable_parameters()]
    seen, step = [weights()], t.optimizer.step
    monkeypatch.setattr(t.optimizer, "step", lambda: (step(), seen.append(weights())))
    row = t.epoch()
    same = [all(map(torch.equal, a, b)) for a, b in zip(seen, seen[1:])]
    assert (
        same == [True, False]
        and row["updates"] == 2
        and row["skipped_updates"] == 1
        and t.accelerator.scaler.get_scale() == 128
    )
    plain = trainer("no", **few).epoch()
    # of the other update, and not of the scaled loss
    assert row["grad_norm"] == pytest.approx(plain["grad_norm"], rel=.5) and plain["skipped_updates"] == 0
    json.dumps(row, allow_nan=False, default=float)
    t.save_checkpoint()
    AcceleratorState._reset_state()
    again = scaled()
    again.load_checkpoint(tmp_path)
    assert again.accelerator.scaler.get_scale() == 128

def test_elsewhere_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    t = trainer("no", logdir=str(tmp_path), **few)
    overflow(t, 3)  # the second epoch's last update
    with pytest.raises(
        InputError, match="train_learning_rate: a gradient of epoch 2 is not finite, .*last checkpoint"
    ):
        t.train(3, progress=False)
    (kept,) = (tmp_path/"checkpoints").iterdir()
    again = trainer("no", logdir=str(tmp_path), **few)
    again.load_checkpoint(tmp_path)
    assert (
        kept.name == "checkpoint_1"
        and all(p.isfinite().all() for p in again.policy.trainable_parameters())
        and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    )

def test_an_apple_gpu_stays_idle(monkeypatch):
    "It knows no float64, in which figures are summed up"
    AcceleratorState._reset_state(reset_partial_state=True)
    for o in ("is_available", "is_built"): monkeypatch.setattr(torch.backends.mps, o, lambda: True)
    assert PartialState().device.type == "mps"  # what would be without us
    AcceleratorState._reset_state(reset_partial_state=True)
    assert processes().device.type == "cpu" and Accelerator().device.type == "cpu"

@pytest.mark.parametrize("setting", ["gradient_checkpointing", "vae_slicing", "offload_trajectories"])
def test_memory_savers_do_not_change_the_result(device, setting):
    drop = lambda row: {
        k: v
        for k, v in row.items()
        if not k.startswith(("seconds", "images_per", "peak")) and isinstance(v, (int, float))
    }
    small = dict(sample_num_steps=3, sample_batch_size=4, sample_num_batches_per_epoch=1, train_batch_size=4)
    plain, saved = (
        drop(trainer("no", allow_tf32=False, **small, **kw).epoch()) for kw in ({}, {setting: True})
    )
    assert plain.keys() == saved.keys() and all(
        saved[k] == pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in plain.items()
    )

def test_gradient_checkpointing_keeps_less_for_the_backward_pass():
    def kept(**kw):
        t, blocks = (
            trainer("no", sample_num_steps=2, sample_batch_size=8, sample_num_batches_per_epoch=1, **kw),
            {},
        )
        work = t.collect()
        ex = t.objective.examples(
            t.policy, work.trajectories, work.advantages, torch.Generator().manual_seed(0)
        )
        def pack(x): blocks[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(); return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            t.objective.loss(t.policy, work.trajectories, ex)
        return sum(blocks.values())
    assert kept(gradient_checkpointing=True) < 0.5 * kept()

def test_schedule_reaches_zero_and_is_logged():
    t = trainer(
        "no", sample_num_steps=2, sample_batch_size=4, sample_num_batches_per_epoch=1, train_batch_size=4,
        lr_scheduler="linear", num_epochs=2
    )
    rates = [r["learning_rate"] for r in t.train(progress=False)]
    assert rates == pytest.approx([0.5e-3, 0], abs=1e-9)

def test_8bit_adam_trains_or_says_what_to_install(device):
    from ddpo_nb.prompts import InputError
    small = dict(
        sample_num_steps=2, sample_batch_size=4, sample_num_batches_per_epoch=1, train_batch_size=4,
        train_use_8bit_adam=True
    )
    try:
        import bitsandbytes
    except ImportError:
        with pytest.raises(
            InputError, match="train_use_8bit_adam: bitsandbytes is not installed; pip install bitsandbytes"
        ):
            trainer("no", **small)
    else:
        t = trainer("no", **small)
        before = [p.detach().clone() for p in t.policy.trainable_parameters()]
        t.epoch()
        assert any((a != b).any() for a, b in zip(before, t.policy.trainable_parameters()))
