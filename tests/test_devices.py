"""What is on the GPU meets only what is on the GPU. On a machine without one, it is a pretended one
(pretend.py); `-m cuda` takes a real one."""
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
import numpy as np, pytest, torch
from conftest import on_device
from ddpo_nb.advantages import BASELINES, PerPromptStatTracker
from ddpo_nb.aesthetic import calibration_pictures, clip_pixels
from ddpo_nb.clip import load_embedder
from ddpo_nb.compare import Examiner
from ddpo_nb.mdp import ddim_step
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import PromptSource
from ddpo_nb.rewards import ParallelReward, check_rewards, get_reward, jpeg_compressibility
from ddpo_nb.rollout import sample_generator
from ddpo_nb.taste import SimulatedRater, TasteReward, TasteSession, draw_pool, warm_and_bold
from ddpo_nb.trainer import make_config, make_trainer

# before the first backward pass, which counts the devices that torch knows
if not torch.cuda.is_available(): from pretend import pretend_gpu

def trainer(home="", algorithm="ddpo-is", lora=True, reward=jpeg_compressibility, **kw):
    settings = dict(
        mixed_precision="no", logdir=str(home), sample_num_steps=2, sample_batch_size=2,
        sample_num_batches_per_epoch=2, train_batch_size=4, train_num_inner_epochs=1,
        train_learning_rate=1e-3 if lora else 1e-5, rwr_fraction=0.5, rwr_draws=1, num_epochs=2,
        allow_tf32=False
    )
    c = make_config(algorithm, **settings | kw)
    pipeline = load_pipeline()
    torch.manual_seed(0)
    return make_trainer(
        c, reward, PromptSource(["cat", "dog"], 0), StableDiffusionPolicy(pipeline, use_lora=lora)
    )

def brightness(images, prompts, metadata):
    "A reward without steps: the last bit of a pixel may make a JPEG file three bytes longer."
    return images.mean((1, 2, 3)), {}
brightness.differentiable = True

def weights(t): return torch.cat([p.detach().cpu().flatten() for p in t.policy.trainable_parameters()])

@contextmanager
def placed(kind):
    "Everything inside runs on this kind of device."
    if kind != "pretended": yield on_device(kind)
    elif torch.cuda.is_available(): pytest.skip("there is a real GPU: take -m cuda")
    else:
        with pretend_gpu() as device: yield device

KINDS = ["pretended", pytest.param("cuda", marks=pytest.mark.cuda)]

@pytest.fixture(params=KINDS)
def gpu(request):
    with placed(request.param) as device: yield device

# ---- the pretence itself ----

def refused(run, match):
    with pytest.raises((RuntimeError, TypeError), match=match): run()

def test_both_refuse_a_mixture(gpu):
    there, here = torch.ones(3, device=gpu), torch.ones(3)
    mixtures = (
        lambda: there + here, lambda: torch.cat([there, here]), lambda: torch.where(there > 0, there, here),
        lambda: torch.stack([there[0], here[0]]), lambda: torch.nn.functional.mse_loss(there, here),
        lambda: torch.nn.functional.linear(there[None], here[None])
    )
    for run in mixtures: refused(run, "same device|on cpu")
    refused(lambda: here[there.long()], "indices should be")
    refused(lambda: there.numpy(), "Tensor.cpu")
    refused(lambda: np.asarray(there), "Tensor.cpu")
    refused(lambda: torch.randn(2, device=gpu, generator=torch.Generator()), "device type for generator")
    # a copy from device to device, which is allowed
    def write(): there[:] = torch.ones(3, dtype=torch.double)
    write()
    assert (
        (there * 2 + here[0]).device.type == gpu.type
        and there[torch.tensor([0, 2])].tolist() == [1, 1]
        and there.cpu().numpy().sum() == 3
    )

def test_the_device_is_there_in_other_threads_too(gpu):
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(lambda: torch.ones(3, device=gpu) * torch.tensor(2, device=gpu)).result()
        assert there.device.type == gpu.type and there.tolist() == [2, 2, 2]
        refused(lambda: pool.submit(torch.add, there, torch.ones(3)).result(), "same device")

def test_what_has_no_values_stays_without_them(gpu):
    with torch.device("meta"): net, x = torch.nn.Linear(3, 4), torch.empty(2, 3)
    assert net(x.to("meta")).device.type == torch.ones(2, device="meta").device.type == "meta"
    refused(lambda: net(torch.ones(2, 3, device=gpu)), "device")

def test_autocast_is_understood(gpu):
    net, x = torch.nn.Linear(3, 4).to(gpu), torch.ones(2, 3, device=gpu)
    with torch.autocast(gpu.type, torch.bfloat16):
        cast = net(x)
        with torch.autocast(gpu.type, enabled=False): assert net(x).dtype == torch.float32
    assert torch.allclose(cast.float().cpu(), net(x).cpu(), atol=0.05)

def test_a_small_network_trains_as_on_the_cpu(gpu):
    def trained(device):
        torch.manual_seed(0)
        net, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 1)).to(
            device
        ), torch.arange(6.0).view(2, 3)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            net(x.to(device)).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().cpu().flatten() for p in net.parameters()])
    assert torch.allclose(trained(gpu), trained("cpu"), atol=1e-5)

# ---- training ----

def same(here, there, keys=("loss", "diversity", "grad_norm", "reward_mean"), rel=1e-4):
    return [there[k] for k in keys] == pytest.approx([here[k] for k in keys], rel=rel)

EPOCHS = [("ddpo-is", True), ("rwr", True), ("nft", True), ("draft", False)]
MORE = [("ddpo-is", False), ("rwr-sparse", False), ("ddpo-sf", True), ("nft", False), ("alignprop", False)]

@pytest.mark.parametrize("kind,algorithm,offload", [
    *(pytest.param("pretended", *o) for o in EPOCHS),
    *(pytest.param("pretended", *o, marks=pytest.mark.slow) for o in MORE),
    *(pytest.param("cuda", *o, marks=pytest.mark.cuda) for o in EPOCHS + MORE)])
def test_an_epoch_is_the_cpus(kind, algorithm, offload):
    "Rollout, advantages, examples, loss, updates. A GPU's own rounding of the gradient: a thousandth"
    with placed("cpu"): here = trainer(algorithm=algorithm, reward=brightness).epoch()
    with placed(kind) as device:
        t = trainer(algorithm=algorithm, reward=brightness, offload_trajectories=offload)
        t.work = work = t.collect()
        assert (
            t.policy.device.type
            == work.trajectories.device.type
            == work.advantages.device.type
            == device.type
        )
        waits = "cpu" if offload else device.type
        assert work.trajectories.latents.device.type == work.trajectories.images.device.type == waits
        assert same(here, t.epoch(), rel=1e-4 if kind == "pretended" else 1e-2)

def test_on_meta_latents_that_wait_meet_nothing_but_their_own():
    "There is no number on `meta`, and no way back from it"
    from ddpo_nb import recipes as R
    from ddpo_nb.trainer import make_objective
    for algorithm in ("ddpo-is", "rwr"):
        c, numbers, mode = (
            make_config(algorithm, mixed_precision="no", micro_batch_size=3), R.model_numbers(),
            R._LikeCuda()
        )
        policy, (t, ex) = R._skeleton(c, numbers, True, mode), R._micro_batch(c, numbers, torch.float32)
        zeros = lambda o: torch.zeros(o.shape, dtype=o.dtype)  # on the CPU
        t.latents, ex = zeros(t.latents), ex | {k: zeros(ex[k]) for k in ("sample", "step", "noise")}
        with mode: loss, _ = make_objective(c).loss(policy, t, ex)
        assert loss.shape == (3,) and loss.device.type == "meta"

@pytest.mark.parametrize("offload", [False, True], ids=["stays", "offloaded"])
def test_an_epoch_taken_up_in_the_middle_ends_in_the_same_bits(gpu, exact, offload, tmp_path):
    t = trainer(tmp_path, offload_trajectories=offload)
    t.work = t.collect()
    kept = t.save_checkpoint()
    row = t.epoch()
    again = trainer(tmp_path/"again", offload_trajectories=offload, resume_from=str(kept))
    assert again.work.trajectories.latents.device.type == ("cpu" if offload else t.policy.device.type)
    assert same(row, again.epoch(), rel=0) and torch.equal(weights(t), weights(again))
    assert {v.device for s in again.optimizer.state.values() for v in s.values()} == {
        again.policy.trainable_parameters()[0].device
    }

@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_the_cpu_goes_on_on_the_gpu_and_comes_back(kind, tmp_path):
    with placed("cpu"):
        t = trainer(tmp_path/"cpu")
        t.work = t.collect()
        kept = t.save_checkpoint()
        here = t.epoch()
    with placed(kind):
        t = trainer(tmp_path/"gpu", resume_from=str(kept))
        there = t.epoch()
        back = t.save_checkpoint()
        trained = weights(t)
    with placed("cpu"): assert torch.equal(weights(trainer(tmp_path/"back", resume_from=str(back))), trained)
    assert same(here, there, rel=1e-4 if kind == "pretended" else 1e-2)

def test_noise_is_the_same_on_any_device(gpu):
    "A generator of the CPU: the same numbers, whoever computes with them"
    policy = StableDiffusionPolicy(load_pipeline(), num_steps=2)
    here = policy.initial_latents([sample_generator(0, 0, i) for i in range(2)])
    policy.pipeline.to(gpu)
    x = policy.initial_latents([sample_generator(0, 0, i) for i in range(2)])
    assert x.device.type == gpu.type and torch.equal(x.cpu(), here)
    generators = lambda: [sample_generator(1, 0, i) for i in range(2)]
    t, out = policy.timesteps[:1].expand(2), torch.zeros_like(x)
    step = ddim_step(policy.scheduler, out, t, x, 1., generator=generators())
    own = ddim_step(policy.scheduler, out.cpu(), t.cpu(), here, 1., generator=generators())
    assert step.prev_sample.device.type == gpu.type and torch.allclose(
        step.prev_sample.cpu(), own.prev_sample, atol=1e-6
    )

# ---- beside training ----

def test_the_examination(gpu):
    "Rewards, alignment and variety of a policy on the device; the untouched model makes room afterwards"
    base = StableDiffusionPolicy(load_pipeline(), use_lora=False, num_steps=2)
    examiner = Examiner(
        base, jpeg_compressibility, "jpeg_compressibility", PromptSource(["cat", "dog"], 0).items, 2, copies=2
    )
    found = examiner(base, "base", 0)
    assert (
        {len(v) for v in found.rewards.values()} == {2}
        and all(np.isfinite(list(found.diversity.values())))
        and base.device.type == "cpu"
    )

@pytest.mark.parametrize(
    "name", ["clip_alignment", "aesthetic", "prompt_alignment", "jpeg_incompressibility"]
)
def test_a_reward_whose_model_is_there(gpu, name):
    "Asked about pictures on either device, in threads too"
    pictures, prompts = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), ["cat", "dog"]
    reward = get_reward(name)
    before = check_rewards(reward(pictures, prompts, [{}] * 2)[0], 2, name)
    if hasattr(reward, "to"): reward.to(gpu)
    for images in (pictures, pictures.to(gpu)):
        np.testing.assert_allclose(
            check_rewards(reward(images, prompts, [{}] * 2)[0], 2, name), before, atol=2e-3
        )

def test_rewards_and_pictures_of_the_gpu_are_read(gpu):
    rewards, prompts = torch.tensor([1., 2., 4., 5.], device=gpu), ["a", "a", "b", "b"]
    for baseline in BASELINES.values():
        np.testing.assert_array_equal(baseline(prompts, rewards), baseline(prompts, rewards.tolist()))
    tracker, other = PerPromptStatTracker(4, 1), PerPromptStatTracker(4, 1)
    np.testing.assert_array_equal(tracker.update(prompts, rewards), other.update(prompts, rewards.tolist()))
    assert torch.equal(clip_pixels(calibration_pictures().to(gpu)), clip_pixels(calibration_pictures()))
    with ParallelReward(lambda images, prompts, metadata: (images.mean((1, 2, 3)), {}), 2) as pool:
        assert (
            check_rewards(pool(torch.ones(4, 3, 2, 2, device=gpu), prompts, [{}] * 4)[0], 4, "mean").tolist()
            == [1] * 4
        )

def test_a_taste_learned_from_pictures_of_the_gpu(gpu):
    policy, embedder = StableDiffusionPolicy(load_pipeline(), num_steps=2), load_embedder().to(gpu)
    policy.pipeline.to(gpu)
    pool = draw_pool(policy, ["cat", "dog"], copies=2)
    session, rater = TasteSession(pool, embedder), SimulatedRater(warm_and_bold, pool.images.to(gpu))
    for _ in range(2): session.choose(rater(pool.images[list(session.pair)].to(gpu)))
    rewards, info = TasteReward(embedder, session.head)(pool.images.to(gpu), pool.prompts, [{}] * 4)
    assert len(rewards) == len(info["taste_std"]) == 4 and np.isfinite(rewards).all()
