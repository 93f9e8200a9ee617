"What is on the GPU meets only what is on the GPU. On a machine without one, it is a pretended one (pretend.py); with one, tests marked `cuda` repeat it."
import numpy as np, pytest, torch
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import PromptSource
from ddpo_nb.rewards import jpeg_compressibility
from ddpo_nb.trainer import make_config, make_trainer
from pretend import pretend_gpu

def trainer(home="", algorithm="ddpo-is", lora=True, reward=jpeg_compressibility, **kw):
    settings = dict(mixed_precision="no", logdir=str(home), sample_num_steps=2, sample_batch_size=2, sample_num_batches_per_epoch=2, train_batch_size=4,
                    train_num_inner_epochs=1, train_learning_rate=1e-3 if lora else 1e-5, rwr_fraction=.5, rwr_draws=1, num_epochs=2)
    c = make_config(algorithm, **settings | kw)
    pipeline = load_pipeline()
    torch.manual_seed(0)
    return make_trainer(c, reward, PromptSource(["cat", "dog"], 0), StableDiffusionPolicy(pipeline, use_lora=lora))

def weights(t): return torch.cat([p.detach().cpu().flatten() for p in t.policy.trainable_parameters()])

@pytest.fixture
def gpu():
    with pretend_gpu() as device: yield device

# ---- the pretence itself ----

def refused(run, match):
    with pytest.raises((RuntimeError, TypeError), match=match): run()

def test_the_pretended_gpu_refuses_what_a_gpu_refuses(gpu):
    there, here = torch.ones(3, device=gpu), torch.ones(3)
    for run in (lambda: there + here, lambda: torch.cat([there, here]), lambda: torch.where(there > 0, there, here), lambda: torch.stack([there[0], here[0]]),
                lambda: torch.nn.functional.mse_loss(there, here), lambda: torch.nn.functional.linear(there[None], here[None])): refused(run, "same device")
    refused(lambda: here[there.long()], "indices should be")
    refused(lambda: there.numpy(), "Use Tensor.cpu")
    refused(lambda: np.asarray(there), "Use Tensor.cpu")
    refused(lambda: torch.randn(2, device=gpu, generator=torch.Generator()), "device type for generator")
    def write(): there[:] = torch.ones(3, dtype=torch.double)  # a copy from device to device, which is allowed
    write()
    assert (there * 2 + here[0]).device == gpu and there[torch.tensor([0, 2])].tolist() == [1, 1] and there.cpu().numpy().sum() == 3

def test_the_pretended_gpu_trains_as_the_cpu_does(gpu):
    def trained(device):
        torch.manual_seed(0)
        net, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 1)).to(device), torch.arange(6.).view(2, 3)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        for _ in range(3): optimizer.zero_grad(); net(x.to(device)).square().mean().backward(); optimizer.step()
        assert {p.device for p in net.parameters()} == {torch.device(device)}
        return torch.cat([p.detach().cpu().flatten() for p in net.parameters()])
    assert torch.equal(trained(gpu), trained("cpu"))

# ---- training ----

@pytest.mark.parametrize("algorithm,offload", [("ddpo-is", False), ("ddpo-is", True), ("rwr", True), ("rwr-sparse", False), ("ddpo-sf", True)])
def test_an_epoch_is_the_cpus(algorithm, offload):
    "Rollout, advantages, examples, loss, updates"
    here = trainer(algorithm=algorithm).epoch()
    with pretend_gpu() as device:
        t = trainer(algorithm=algorithm, offload_trajectories=offload)
        t.work = work = t.collect()
        assert t.policy.device == work.trajectories.device == work.advantages.device == device
        assert work.trajectories.latents.device.type == work.trajectories.images.device.type == ("cpu" if offload else device.type)
        there = t.epoch()
    same = [k for k in here if k.startswith("reward_q")] + ["loss", "diversity", "updates", "grad_norm"]
    assert [there[k] for k in same] == pytest.approx([here[k] for k in same], rel=1e-4)
