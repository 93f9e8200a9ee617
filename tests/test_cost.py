"""What an epoch costs, counted and not timed: passes of the networks and their rows, and places where the CPU
waits for the device."""
import sys
from collections import Counter
from contextlib import contextmanager
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch.overrides import TorchFunctionMode
from ddpo_nb import recipes as R
from ddpo_nb.batches import Cost, ENOUGH, SHARE, device_memory, example_cost, micro_batch
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import PromptSource
from ddpo_nb.recipes import model_numbers
from ddpo_nb.trainer import ALGORITHMS, make_config, make_objective, make_trainer

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

TRL = dict(
    logdir="", mixed_precision="no", sample_num_steps=4, sample_guidance_scale=5.0, sample_batch_size=6,
    sample_num_batches_per_epoch=4, train_batch_size=3, train_timestep_fraction=1.0, micro_batch_size=0
)

def brightness(images, prompts, metadata): return images.mean((1, 2, 3)), {}

def trainer(**kw):
    return make_trainer(
        make_config("ddpo-is", **(TRL | kw)), brightness, PromptSource(["cat", "dog", "bear"], 0),
        StableDiffusionPolicy(load_pipeline())
    )

@contextmanager
def counted(t):
    "Rows of every pass: of the UNet without and with gradients, of the text encoder, of the decoder"
    pipe, seen = t.policy.pipeline, dict(sampling=[], training=[], text=[], decoded=[])
    decode = pipe.vae.decode
    pipe.vae.decode = lambda x, **kw: (seen["decoded"].append(len(x)), decode(x, **kw))[1]
    hooks = [
        pipe.unet.register_forward_hook(
            lambda m, args, out: seen["training" if torch.is_grad_enabled() else "sampling"].append(
                len(args[0])
            )
        ),
        pipe.text_encoder.register_forward_pre_hook(
            lambda m, args, kw: seen["text"].append(len(kw.get("input_ids", args[0] if args else ()))),
            with_kwargs=True,
        ),
    ]
    try: yield seen
    finally:
        for h in hooks: h.remove()
        pipe.vae.decode = decode

def test_passes_of_an_epoch():
    "TRL's recommended 4 × 6 samples and updates of 3: all denoised together, and an update in one pass"
    t = trainer()
    with counted(t) as seen: t.epoch()
    steps, updates = int(t.policy.stochastic.sum()), 8
    assert seen["sampling"] == [2 * 24] * 4
    assert seen["training"] == [2 * 3 * steps] * updates
    assert seen["decoded"] == [6] * 4
    assert seen["text"] == [4]  # three prompts and the empty one, together

def test_a_prompt_is_encoded_once_in_a_run():
    t = trainer()
    t.epoch()
    with counted(t) as seen: t.epoch()
    assert seen["text"] == []

@pytest.mark.parametrize("micro,sampling,training", [(1, [12], [2]), (8, [12], [6, 8]), (13, [24], [10, 12])])
def test_a_chosen_micro_batch_is_not_exceeded(micro, sampling, training):
    "An update of 12 transitions in equal parts; whole batches of 6 are denoised together, never fewer"
    t = trainer(micro_batch_size=micro)
    steps = int(t.policy.stochastic.sum())
    with counted(t) as seen: t.epoch()
    m = 3 * steps
    parts = np.diff(np.linspace(0, m, -(-m // micro) + 1).astype(int))
    # the network fills up to 16 rows
    assert set(seen["sampling"]) == {max(16, o) for o in [2 * 6 * max(1, micro // 6)]}
    assert sum(seen["sampling"]) == 4 * max(16, 2 * 6 * max(1, micro // 6)) * -(-4 // max(1, micro // 6))
    assert (
        seen["training"] == [max(16, 2 * o) for o in parts] * 8
        and parts.max() <= micro
        and parts.max() - parts.min() <= 1
    )

def test_rewards_found_meanwhile_want_small_batches():
    t = trainer(async_reward_computation=True)
    with counted(t) as seen: t.epoch()
    assert seen["sampling"] == [16] * 4 * 4

# ---- waiting ----

WAITS = {
    "item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__", "nonzero", "unique",
    "equal", "masked_select"
}

# look only at numbers that are on the CPU in any case: on a GPU, they leave their question out
ON_THE_HOST = {"_timesteps", "_stds", "_alpha_bars"}

class Waits(TorchFunctionMode):
    "Counts what would make a CPU wait for its GPU, by the function of ours that asked for it."
    def __init__(self): super().__init__(); self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITS: self.seen[f"{self.caller()}: {name}"] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def caller():
        f = sys._getframe(2)
        while f and not f.f_globals.get("__name__", "").startswith("ddpo_nb"): f = f.f_back
        return f.f_code.co_name if f else "elsewhere"

def waits(**kw):
    t = trainer(**(dict(sample_num_steps=3, sample_batch_size=3, sample_num_batches_per_epoch=2) | kw))
    t.epoch()  # whatever happens once in a run
    with Waits() as w: t.epoch()
    return {k: n for k, n in w.seen.items() if k.partition(":")[0] not in ON_THE_HOST}

def test_waiting_does_not_grow_with_steps_updates_or_micro_batches():
    few = waits()
    assert few == waits(sample_num_steps=6) == waits(train_batch_size=1) == waits(micro_batch_size=2)
    assert 0 < sum(few.values()) < 40 and "numbers: tolist" in few  # the counter sees something

@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_loss_reads_nothing_from_the_device(algorithm):
    "On `meta` there is nothing to read, and whoever tries gets an error"
    c, numbers, mode = (
        make_config(algorithm, mixed_precision="no", micro_batch_size=3), model_numbers(), R._LikeCuda()
    )
    policy, batch = R._skeleton(c, numbers, True, mode), R._micro_batch(c, numbers, torch.float32)
    with mode: loss, figures = make_objective(c).loss(policy, *batch)
    assert loss.shape == (3,) and loss.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"): loss.sum().item()

# ---- the size of a micro-batch ----

@given(
    st.integers(1, 10**13), st.integers(1, 10**11), st.integers(1, 10**12), st.integers(0, 10**12),
    st.sampled_from(["cpu", "cuda"])
)
@settings(max_examples=300, deadline=None)
def test_a_micro_batch_fits_and_is_at_least_one(flops, size, memory, taken, kind):
    n = micro_batch(Cost(flops, size), kind, memory, taken)
    assert (
        n >= 1
        and (n == 1 or n * size + taken <= SHARE * memory)
        and (n == 1 or (n - 1) * flops <= ENOUGH[kind])
    )
    assert (
        micro_batch(Cost(flops, size), kind, 2 * memory, taken)
        >= n
        >= micro_batch(Cost(2 * flops, 2 * size), kind, memory, taken)
    )

def test_counting_is_the_same_every_time_and_needs_no_gradient():
    a, b = (example_cost(StableDiffusionPolicy(load_pipeline())) for _ in range(2))
    policy = StableDiffusionPolicy(load_pipeline())
    assert a == b and 1e7 < a.flops < 1e8 and all(p.grad is None for p in policy.trainable_parameters())
    # BA is added to W once, however many rows there are
    assert example_cost(policy, guidance=False).flops * 2 == pytest.approx(a.flops, rel=0.02)

def test_memory_is_this_machines(): assert 1e9 < device_memory(torch.device("cpu")) < 1e14
