"The epoch loop: invariants that hold for every algorithm, and settings that cannot work."
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import InputError, PromptSource
from ddpo_nb.rewards import jpeg_compressibility
from ddpo_nb.trainer import ALGORITHMS, DDPOConfig, DDPOTrainer, RWRConfig, RWRTrainer, make_config, make_trainer

SMALL = dict(sample_num_steps=3, sample_batch_size=4, sample_num_batches_per_epoch=2, train_batch_size=8, micro_batch_size=5, train_learning_rate=1e-2, rwr_fraction=0.5)

def trainer(algorithm="ddpo-is", reward=jpeg_compressibility, lora=True, **overrides):
    config = make_config(algorithm, **(dict(logdir="") | SMALL | overrides))
    torch.manual_seed(config.seed)
    return make_trainer(config, reward, PromptSource(["cat", "dog", "bear"], config.seed), StableDiffusionPolicy(load_pipeline(), use_lora=lora))

def weights(t): return torch.cat([p.detach().flatten() for p in t.policy.trainable_parameters()])
def timeless(row): return {k: v for k, v in row.items() if not k.startswith(("seconds", "images_per_second", "peak_memory"))}

@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_an_epoch_trains(algorithm, lora):
    t = trainer(algorithm, lora=lora, train_learning_rate=1e-3 if lora else 1e-4)
    before, row = weights(t).clone(), t.epoch()
    assert (weights(t) != before).any() and all(np.isfinite(v) for v in timeless(row).values() if isinstance(v, (int, float)))
    assert row["queries"] == 8 and row["epoch"] == 1 and row["algorithm"] == algorithm and row["grad_norm"] > 0
    assert row["seconds"] == pytest.approx(sum(row[f"seconds_{s}"] for s in ("sampling", "reward", "training")))

@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_seed_one_result(algorithm):
    a, b = trainer(algorithm), trainer(algorithm)
    assert [timeless(r) for r in a.train(2, progress=False)] == [timeless(r) for r in b.train(2, progress=False)]
    assert torch.equal(weights(a), weights(b))

def test_another_seed_another_result(): assert timeless(trainer().epoch()) != timeless(trainer(seed=1).epoch())

@pytest.mark.parametrize("micro", [1, 7, 24])
def test_ratio_is_one_before_the_first_update(micro):
    t = trainer()
    trajectories = t.sample()
    examples = t.objective.examples(t.policy, trajectories, torch.randn(8), torch.Generator().manual_seed(0))
    for i in range(0, len(examples["sample"]), micro):
        ratio = t.objective.loss(t.policy, trajectories, {k: v[i:i+micro] for k, v in examples.items()})[1]["ratio"]
        assert (ratio - 1).abs().max() < 1e-6

@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_does_not_depend_on_micro_batch(algorithm):
    gradients = []
    for micro in (1, 7, 64):
        t = trainer(algorithm, micro_batch_size=micro)
        trajectories = t.sample()
        advantages = torch.linspace(-2, 2, 8)
        t.gradient(trajectories, t.objective.examples(t.policy, trajectories, advantages, torch.Generator().manual_seed(0)))
        gradients.append(torch.cat([p.grad.flatten() for p in t.policy.trainable_parameters()]))
    for g in gradients[1:]: assert (g - gradients[0]).norm() < 1e-5 * gradients[0].norm()

def test_images_do_not_depend_on_sample_batch():
    a = trainer(sample_batch_size=8, sample_num_batches_per_epoch=1).sample()
    b = trainer(sample_batch_size=2, sample_num_batches_per_epoch=4).sample()
    assert a.prompts == b.prompts and (a.images - b.images).abs().max() < 1e-4

def test_updates_share_the_examples():
    t = trainer(train_batch_size=2)
    t.config.train_num_inner_epochs = 3
    assert t.epoch()["updates"] == 4 * 3

def test_budget_counts_every_query_once():
    seen = []
    def reward(images, prompts, metadata): seen.append(len(images)); return jpeg_compressibility(images, prompts, metadata)
    rows = trainer(reward=reward).train(2, progress=False)
    assert sum(seen) == 16 == rows[-1]["queries"]

def test_the_hook_sees_images_prompts_and_rewards():
    calls, t = [], trainer()
    t.hook = lambda *args: calls.append(args)
    t.epoch()
    (batches, step, accelerator), = calls
    images, prompts, metadata, rewards, info = batches[1]
    assert len(batches) == 2 and images.shape == (4, 3, 64, 64) and len(prompts) == len(metadata) == len(rewards) == 4 and accelerator is t.accelerator

def test_progress_reaches_its_total():
    t, seen = trainer(), {}
    t.on_progress = lambda stage, done, total: seen.setdefault(stage, []).append((done, total))
    t.epoch()
    assert all(calls[-1][0] == calls[-1][1] == len(calls) for calls in seen.values()) and set(seen) == {"sampling", "training"}

@pytest.mark.parametrize("bad,says", [(lambda i, p, m: (np.full(len(i), np.nan), {}), "not finite"), (lambda i, p, m: (np.zeros(3), {}), "3")], ids=["nan", "length"])
def test_bad_rewards_are_named(bad, says):
    with pytest.raises(InputError, match=f"(?i){says}"): trainer(reward=bad).epoch()

def test_an_error_in_the_reward_function_is_the_users_own():
    def reward(images, prompts, metadata): return 1 / 0
    with pytest.raises(ZeroDivisionError): trainer(reward=reward).epoch()

def test_per_prompt_statistics_are_used():
    assert timeless(trainer(per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=1).epoch()) != timeless(trainer().epoch())

BAD = dict(sample_num_steps=0, sample_eta=0.0, sample_batch_size=-1, train_learning_rate=float("nan"), train_clip_range=0.0, algorithm="ppo",
           mixed_precision="fp8", rwr_fraction=1.5, rwr_beta=0.0, train_adam_beta1=1.0, train_batch_size=True, seed=-1, negative_prompts=3,
           log_prob_reduction="max", train_adam_weight_decay=-1.0, train_timestep_fraction=2, train_max_grad_norm=float("inf"))
@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_named(name):
    with pytest.raises(InputError, match=f"^{name}: "): DDPOConfig(**{name: BAD[name]})

@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_batches_that_do_not_divide_are_refused(size, batches, train, accumulation):
    make = lambda: DDPOConfig(sample_batch_size=size, sample_num_batches_per_epoch=batches, train_batch_size=train, train_gradient_accumulation_steps=accumulation)
    if (size * batches) % (train * accumulation) == 0: make()
    else:
        with pytest.raises(InputError, match="^train_batch_size: "): make()

def test_score_function_is_on_policy_only():
    with pytest.raises(InputError, match="policy that sampled"): make_config("ddpo-sf", train_num_inner_epochs=2)

def test_rwr_trainer_takes_rwr_only():
    assert RWRConfig().algorithm == "rwr"
    with pytest.raises(InputError, match="algorithm"): RWRTrainer(DDPOConfig(), None, None, None)
