"The epoch loop: invariants that hold for every algorithm, and settings that cannot work."
from contextlib import nullcontext
from types import SimpleNamespace
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from ddpo_nb import resume as T
from ddpo_nb.advantages import BASELINES
from ddpo_nb.objectives import get_objective
from ddpo_nb.policy import EMOJI_SD, StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import InputError, PromptSource
from ddpo_nb.rewards import jpeg_compressibility
from ddpo_nb.rwr import rwr_weights
from ddpo_nb.trainer import (ALGORITHMS, DDPOConfig, DDPOTrainer, RWRConfig, RWRTrainer, check_repeats,
                             make_config, make_objective, make_trainer, split_updates)

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

SMALL = dict(
    sample_num_steps=3, sample_batch_size=4, sample_num_batches_per_epoch=2, train_batch_size=8,
    micro_batch_size=5, train_learning_rate=1e-2, rwr_fraction=0.5
)

def redness(images, prompts, metadata):
    "For those that learn from the reward's gradient."
    return images[:, 0].flatten(1).mean(1), {}

def trainer(algorithm="ddpo-is", reward=jpeg_compressibility, lora=True, **overrides):
    if get_objective(algorithm).of_gradients: reward = redness
    config = make_config(algorithm, **(dict(logdir="") | SMALL | overrides))
    torch.manual_seed(config.seed)
    return make_trainer(
        config, reward, PromptSource(["cat", "dog", "bear"], config.seed),
        StableDiffusionPolicy(load_pipeline(), use_lora=lora)
    )

def weights(t): return torch.cat([p.detach().flatten() for p in t.policy.trainable_parameters()])
def timeless(row):
    return {k: v for k, v in row.items() if not k.startswith(("seconds", "images_per_second", "peak_memory"))}

@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_an_epoch_trains(algorithm, lora):
    t = trainer(algorithm, lora=lora, train_learning_rate=1e-3 if lora else 1e-4)
    before, row = weights(t).clone(), t.epoch()
    assert (weights(t) != before).any() and all(
        np.isfinite(v) for v in timeless(row).values() if isinstance(v, (int, float))
    )
    assert (
        row["queries"] == 8 and row["epoch"] == 1 and row["algorithm"] == algorithm and row["grad_norm"] > 0
    )
    assert row["seconds"] == pytest.approx(
        sum(row[f"seconds_{s}"] for s in ("sampling", "reward", "training"))
    )

def test_what_others_import_from_the_trainer_is_there():
    "Wherever it is made: scripts go on as they are"
    from ddpo_nb import advantages, config, prepare, resume, trainer as module
    made_in = {
        advantages: "PerPromptStatTracker",
        config: "ALGORITHMS AlignPropConfig DDPOConfig RWRConfig check_config check_repeats idle_notes"
                " make_config make_objective",
        prepare: "check_family check_launcher configure_policy policy_settings processes usable_precision",
        resume: "RESULT_FREE STATE_FILES Work",
    }
    for home, names in made_in.items():
        for name in names.split(): assert getattr(module, name) is getattr(home, name)

@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_seed_one_result(algorithm):
    a, b = trainer(algorithm), trainer(algorithm)
    assert [timeless(r) for r in a.train(2, progress=False)] == [
        timeless(r) for r in b.train(2, progress=False)
    ]
    assert torch.equal(weights(a), weights(b))

def test_another_seed_another_result():
    assert timeless(trainer().epoch()) != timeless(trainer(seed=1).epoch())

@pytest.mark.parametrize("micro", [1, 7, 24])
def test_ratio_is_one_before_the_first_update(micro):
    t = trainer()
    trajectories = t.sample()
    examples = t.objective.examples(t.policy, trajectories, torch.randn(8), torch.Generator().manual_seed(0))
    for i in range(0, len(examples["sample"]), micro):
        ratio = t.objective.loss(t.policy, trajectories, {k: v[i : i + micro] for k, v in examples.items()})[
            1
        ]["ratio"]
        assert (ratio - 1).abs().max() < 1e-6

@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_does_not_depend_on_micro_batch(algorithm):
    gradients = []
    for micro in (1, 7, 64):
        t = trainer(algorithm, micro_batch_size=micro)
        of_gradients = t.objective.of_gradients
        trajectories = t.collect().trajectories if of_gradients else t.sample()
        # or weights
        advantages = torch.linspace(-2, 2, 8) if algorithm.startswith("ddpo") else torch.linspace(0, 2, 8)
        t.gradient(
            trajectories,
            t.objective.examples(t.policy, trajectories, advantages, torch.Generator().manual_seed(0)),
        )
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
    def reward(images, prompts, metadata):
        seen.append(len(images))
        return jpeg_compressibility(images, prompts, metadata)
    rows = trainer(reward=reward).train(2, progress=False)
    assert sum(seen) == 16 == rows[-1]["queries"]

def test_the_hook_sees_images_prompts_and_rewards():
    calls, t = [], trainer()
    t.hook = lambda *args: calls.append(args)
    t.epoch()
    (batches, step, accelerator), = calls
    images, prompts, metadata, rewards, info = batches[1]
    assert (
        len(batches) == 2
        and images.shape == (4, 3, 64, 64)
        and len(prompts) == len(metadata) == len(rewards) == 4
        and accelerator is t.accelerator
    )

def test_progress_reaches_its_total():
    t, seen = trainer(), {}
    t.on_progress = lambda stage, done, total: seen.setdefault(stage, []).append((done, total))
    t.epoch()
    assert all(calls[-1][0] == calls[-1][1] == len(calls) for calls in seen.values()) and set(seen) == {
        "sampling", "training"
    }

@pytest.mark.parametrize(
    "bad,says",
    [(lambda i, p, m: (np.full(len(i), np.nan), {}), "not finite"), (lambda i, p, m: (np.zeros(3), {}), "3")],
    ids=["nan", "length"],
)
def test_bad_rewards_are_named(bad, says):
    with pytest.raises(InputError, match=f"(?i){says}"): trainer(reward=bad).epoch()

def test_an_error_in_the_reward_function_is_the_users_own():
    def reward(images, prompts, metadata): return 1 / 0
    with pytest.raises(ZeroDivisionError): trainer(reward=reward).epoch()

def test_per_prompt_statistics_are_used():
    assert timeless(
        trainer(per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=1).epoch()
    ) != timeless(trainer().epoch())

BAD = dict(
    sample_num_steps=0, sample_eta=0.0, sample_batch_size=-1, train_learning_rate=float("nan"),
    train_clip_range=0.0, algorithm="ppo", mixed_precision="fp8", rwr_fraction=1.5, rwr_beta=0.0,
    train_adam_beta1=1.0, train_batch_size=True, seed=-1, negative_prompts=3, log_prob_reduction="max",
    train_adam_weight_decay=-1.0, train_timestep_fraction=2, train_max_grad_norm=float("inf"),
    baseline="mean", rwr_normalizer="sample", rwr_rewards="clipped", train_fresh_optimizer="yes",
    samples_per_prompt=0, advantage_min_std=-0.1, micro_batch_size=-1
)
@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_named(name):
    with pytest.raises(InputError, match=f"^{name}: "): DDPOConfig(**{name: BAD[name]})

@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_batches_that_do_not_divide_are_refused(size, batches, train, accumulation):
    make = lambda: DDPOConfig(
        sample_batch_size=size, sample_num_batches_per_epoch=batches, train_batch_size=train,
        train_gradient_accumulation_steps=accumulation
    )
    if (size * batches) % (train * accumulation) == 0: make()
    else:
        with pytest.raises(InputError, match="^train_batch_size: "): make()

def test_score_function_is_on_policy_only():
    with pytest.raises(InputError, match="policy that sampled"):
        make_config("ddpo-sf", train_num_inner_epochs=2)

def test_of_one_update_an_epoch_the_ratio_is_one_and_importance_sampling_is_the_score_function():
    "to the bit; from the second update on they differ"
    def trained(algorithm, **kw):
        t = trainer(algorithm=algorithm, num_epochs=2, **kw)
        t.train(progress=False)
        return weights(t)
    whole = dict(sample_batch_size=4, train_batch_size=4, sample_num_batches_per_epoch=1)
    assert torch.equal(trained("ddpo-is", **whole), trained("ddpo-sf", **whole))
    halves = whole | dict(train_batch_size=2)
    assert not torch.equal(trained("ddpo-is", **halves), trained("ddpo-sf", **whole))

def test_rwr_trainer_takes_rwr_only():
    assert RWRConfig().algorithm == "rwr"
    with pytest.raises(InputError, match="algorithm"): RWRTrainer(DDPOConfig(), None, None, None)

# Several samples of one prompt, and what rewards are measured against

def test_a_drawn_prompt_comes_several_times_in_a_row():
    once, t = trainer().sample(), trainer(samples_per_prompt=4)
    several = t.sample()
    assert several.prompts == [p for p in once.prompts[:2] for _ in range(4)]  # the same draws, fewer of them
    images = several.images.flatten(1)
    assert torch.pdist(images).min() > 0  # each from a noise of its own
    assert several.prompts[:1] == once.prompts[:1] and torch.equal(images[0], once.images[0].flatten())

def test_repeated_prompts_share_what_their_metadata_says_and_nothing_that_is_written_to_it():
    t = trainer(samples_per_prompt=2)
    t.prompt_function = iter(("cat", dict(number=i)) for i in range(9)).__next__
    drawn = t._draw(8)
    assert [m for _, m in drawn] == [dict(number=i // 2) for i in range(8)] and len(
        {id(m) for _, m in drawn}
    ) == 8

@pytest.mark.parametrize("k", [4, 12])
def test_two_processes_draw_what_one_draws(k):
    "Also where a prompt's samples lie on both sides of the border"
    one = trainer(
        sample_batch_size=12, sample_num_batches_per_epoch=1, train_batch_size=12, samples_per_prompt=k
    ).sample()
    def share(rank):
        t = trainer(
            sample_batch_size=6, sample_num_batches_per_epoch=1, train_batch_size=6, samples_per_prompt=1
        )
        t.config.samples_per_prompt, t._breathe = k, lambda: None
        t.accelerator = SimpleNamespace(
            process_index=rank, num_processes=2, autocast=nullcontext, device=torch.device("cpu")
        )
        return t.sample()
    two = [share(0), share(1)]
    assert two[0].prompts + two[1].prompts == one.prompts
    assert (torch.cat([o.images for o in two]) - one.images).abs().max() < 1e-4

def kept_rewards(t):
    "The prompts and rewards of an epoch as the trainer's hook sees them, and the work they are turned into"
    kept = []
    t.hook = lambda batches, *_: kept.extend(
        (p, float(r)) for _, prompts, _, rewards, _ in batches for p, r in zip(prompts, rewards)
    )
    work = t.collect()
    return *map(list, zip(*kept)), work

def trains(t, work):
    before, t.work = weights(t).clone(), work
    return np.isfinite(t.epoch()["loss"]) and (weights(t) != before).any()

@pytest.mark.parametrize("baseline", ["group", "leave-one-out"])
def test_baselines_reach_the_update(baseline):
    t = trainer(baseline=baseline, samples_per_prompt=4, advantage_min_std=0.01)
    prompts, rewards, work = kept_rewards(t)
    np.testing.assert_allclose(
        work.advantages, BASELINES[baseline](prompts, rewards, min_std=0.01), rtol=1e-5, atol=1e-6
    )
    for p in set(prompts):
        assert abs(work.advantages[[i for i, o in enumerate(prompts) if o == p]].sum()) < 1e-5
    assert work.advantages.abs().max() > 0.1 and trains(t, work)

@pytest.mark.parametrize("normalizer", ["prompt", "batch"])
def test_what_rwr_weighs_reaches_the_update(normalizer):
    """Raw rewards by the paper's formula, or the same advantages as DDPO's; two processes would see what
    one does"""
    for raw, kw in ((True, dict(rwr_rewards="raw", per_prompt_stat_tracking=False)),
                    (False, dict(rwr_rewards="normalized", baseline="group"))):
        t = trainer("rwr", rwr_normalizer=normalizer, rwr_beta=3.0, samples_per_prompt=4, **kw)
        prompts, rewards, work = kept_rewards(t)
        values = torch.tensor(rewards if raw else BASELINES["group"](prompts, rewards), dtype=torch.float64)
        want = rwr_weights(values, 3.0, prompts if normalizer == "prompt" else None)
        np.testing.assert_allclose(work.advantages, want, rtol=1e-4)
        assert work.advantages.mean().item() == pytest.approx(1, rel=1e-5) and work.advantages.std() > 0.01
    assert trains(t, work)

def test_a_fresh_optimizer_forgets_with_each_epoch_and_another_does_not():
    def steps(fresh):
        t = trainer("rwr", train_fresh_optimizer=fresh, train_num_inner_epochs=3)
        t.train(2, progress=False)
        return {int(s["step"]) for s in t.optimizer.state.values()}
    assert (steps(True), steps(False)) == ({3}, {6})

@pytest.mark.parametrize(
    "name,value", [("baseline", "group"), ("per_prompt_stat_tracking", True), ("advantage_min_std", 0.1)]
)
def test_raw_rewards_are_not_normalised_in_silence(name, value):
    with pytest.raises(
        InputError,
        match=f"^{name}: it normalises rewards, and rwr_rewards is 'raw'; set rwr_rewards to normalized",
    ):
        RWRConfig(samples_per_prompt=2, **{name: value})
    RWRConfig(samples_per_prompt=2, rwr_rewards="normalized", **{name: value})

# The paper's settings (arXiv 2305.13301 v4, app. D, and jannerm/ddpo), value by value

COMMON = dict(
    sample_num_steps=50, sample_eta=1.0, sample_guidance_scale=5.0, train_cfg=True,
    train_adam_weight_decay=1e-4, train_adam_beta1=0.9, train_adam_beta2=0.999, train_max_grad_norm=1.0,
    log_prob_reduction="mean", step_weighting="equal", kl_coef=0.0
)
TRACKED = COMMON | dict(
    per_prompt_stat_tracking=True, per_prompt_stat_tracking_buffer_size=32,
    per_prompt_stat_tracking_min_count=16, train_clip_range=1e-4, train_fresh_optimizer=False
)
WEIGHED = COMMON | dict(
    rwr_beta=0.2, rwr_normalizer="prompt", rwr_rewards="raw", per_prompt_stat_tracking=False,
    train_fresh_optimizer=True
)
PAPER = {  # settings; samples an epoch, samples an update, updates an epoch
    "ddpo-is": (TRACKED, 256, 64, 4),
    "ddpo-sf": (TRACKED, 256, 256, 1),
    "flow-grpo": (
        COMMON | dict(baseline="group", kl_coef=0.04, samples_per_prompt=8, per_prompt_stat_tracking=False),
        256, 64, 4
    ),
    # NVlabs/DiffusionNFT, config/base.py and config/nft.py: one update of all samples, no guidance in
    # the loss
    "nft": (
        COMMON | dict(
            train_cfg=False, kl_coef=1e-4, baseline="leave-one-out", samples_per_prompt=8, nft_beta=1.0,
            train_adv_clip_max=5.0, train_timestep_fraction=0.99, nft_decay_rate=0.001, nft_decay_max=0.5,
            nft_decay_delay=0, per_prompt_stat_tracking=False
        ),
        256, 256, 1
    ),
    # no source for the papers' numbers was found: others' settings, in updates of 16
    "draft": (COMMON | dict(draft_steps=1, per_prompt_stat_tracking=False), 16, 16, 1),
    "alignprop": (COMMON | dict(alignprop_draw="chain", per_prompt_stat_tracking=False), 16, 16, 1),
    "rwr": (WEIGHED | dict(rwr_draws=1, train_num_inner_epochs=5), 10_240, 128, 400),
    "rwr-sparse": (
        WEIGHED | dict(rwr_fraction=0.1, rwr_draws=10, train_num_inner_epochs=5),
        10_240, 128, 400
    ),
}
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("lora,rate", [(True, 3e-4), (False, 1e-5)], ids=["lora", "full"])
def test_the_papers_settings(algorithm, lora, rate):
    settings, samples, update, updates = PAPER[algorithm]
    c = make_config(algorithm, "some/stable-diffusion", lora=lora)
    assert {k: getattr(c, k) for k in settings} == settings and c.train_learning_rate == rate
    assert (c.samples_per_epoch, c.samples_per_update) == (samples, update)
    assert c.samples_per_epoch // c.samples_per_update * c.train_num_inner_epochs == updates

def test_presets_give_way_to_what_is_asked_for():
    "A normalisation that is asked for is used by RWR too, and a preset's repeats fit smaller epochs"
    for asked in (
        dict(baseline="group", samples_per_prompt=4), dict(per_prompt_stat_tracking=True),
        dict(advantage_min_std=0.1)
    ):
        for model in (EMOJI_SD, "some/stable-diffusion"):
            assert make_config("rwr-sparse", model, **asked).rwr_rewards == "normalized"
    own = make_config("rwr-sparse")
    assert (own.rwr_rewards, own.rwr_normalizer, own.samples_per_prompt) == ("raw", "prompt", 8)
    assert (
        make_config(
            "rwr-sparse", sample_batch_size=6, sample_num_batches_per_epoch=2, train_batch_size=12
        ).samples_per_prompt
        == 4
    )
    with pytest.raises(InputError, match="^baseline"):
        make_config("rwr-sparse", baseline="group", samples_per_prompt=2, rwr_rewards="raw")

@pytest.mark.parametrize("algorithm,seen", [("rwr", 5), ("rwr-sparse", 50)])
def test_an_update_holds_what_the_papers_does(algorithm, seen):
    "128 examples an update, 400 updates a round; a kept sample is seen so many times"
    c = make_config(algorithm, "some/stable-diffusion")
    objective, n = make_objective(c), c.samples_per_epoch
    prompts = [f"animal {i % 512}" for i in range(n)]   # 20 pictures each
    counts = objective.weigh(prompts, np.random.default_rng(0).normal(size=n), None)
    thin = SimpleNamespace(latents=torch.zeros(n, 1, 1, 1, 1), device=torch.device("cpu"))
    ex = objective.examples(
        SimpleNamespace(draw_levels=lambda n, g: torch.randint(1000, (n,), generator=g)),
        thin, counts, torch.Generator()
    )
    sizes = {len(i) for i in split_updates(ex["sample"], n, n // c.samples_per_update, torch.Generator())}
    assert sizes == {128}
    assert set((ex["sample"].bincount()[ex["sample"].unique()] * c.train_num_inner_epochs).tolist()) == {seen}

@pytest.mark.parametrize("tracking", [False, True], ids=["batch", "history"])
def test_a_floor_makes_advantages_small(tracking):
    a, b = (
        trainer(advantage_min_std=m, per_prompt_stat_tracking=tracking, per_prompt_stat_tracking_min_count=2)
        .collect()
        .advantages
        for m in (0.0, 1000.0)
    )
    assert a.abs().max() > 0.5 and b.abs().max() < 0.01 and (a.sign() * b.sign() >= 0).all()

@pytest.mark.parametrize(
    "bad,says",
    [
        (
            dict(baseline="group"),
            "^baseline: 'group' compares a prompt's samples, and there is only one of each",
        ),
        (dict(baseline="leave-one-out", samples_per_prompt=1), "^baseline: "),
        (
            dict(baseline="group", samples_per_prompt=2, per_prompt_stat_tracking=True),
            "^per_prompt_stat_tracking: it is a baseline of its own",
        ),
    ],
)
def test_baselines_that_do_not_fit_the_rest(bad, says):
    with pytest.raises(InputError, match=says) as e: make_config("ddpo-is", **bad)
    assert "\n" not in str(e.value)

def test_a_chosen_baseline_takes_the_place_of_the_bundled_models_history():
    assert (
        make_config("ddpo-is").per_prompt_stat_tracking
        and make_config("ddpo-is", samples_per_prompt=2).per_prompt_stat_tracking
    )
    assert not make_config("ddpo-is", baseline="leave-one-out", samples_per_prompt=2).per_prompt_stat_tracking

@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 30))
def test_repeats_that_do_not_divide_are_refused(size, processes, k):
    c = DDPOConfig(sample_batch_size=size, samples_per_prompt=k)
    if 2 * size * processes % k == 0:
        check_repeats(c, processes)
    else:
        with pytest.raises(
            InputError, match=f"^samples_per_prompt: {k} does not divide the {2 * size * processes} samples"
        ):
            check_repeats(c, processes)

def test_the_trainer_refuses_repeats_that_do_not_divide():
    with pytest.raises(InputError, match="^samples_per_prompt: 3 does not divide the 8 samples"):
        trainer(samples_per_prompt=3)

NEW = ("baseline", "samples_per_prompt", "advantage_min_std")
@pytest.mark.parametrize(
    "changed,named",
    [
        ({}, None), (dict(samples_per_prompt=2), "samples_per_prompt was 1"),
        (dict(advantage_min_std=0.1), "advantage_min_std was 0.0"),
        (
            dict(baseline="group", samples_per_prompt=2, per_prompt_stat_tracking=False),
            "baseline was 'normalize'",
        ),
    ],
)
def test_a_checkpoint_of_before_there_were_baselines_is_taken_up_with_the_settings_it_had(
    tmp_path, monkeypatch, changed, named
):
    made = dict(logdir=str(tmp_path), per_prompt_stat_tracking=False)
    trainer(**made).train(1, progress=False)
    load = T.load_state
    older = lambda state: (
        state | dict(config={k: v for k, v in state["config"].items() if k not in NEW})
        if "config" in state
        else state
    )
    monkeypatch.setattr(T, "load_state", lambda place: older(load(place)))
    if named is None:
        assert trainer(**made, resume_from=str(tmp_path)).epochs_done == 1
    else:
        with pytest.raises(InputError, match=f"^resume_from: {named}"):
            trainer(**(made | changed), resume_from=str(tmp_path))

def test_rwr_trains_on_deterministic_samples():
    "Its loss needs no noise of the sampler's; DDPO's does, and says so (test_trl_config)"
    t = trainer("rwr", sample_eta=0.)
    before, row = weights(t).clone(), t.epoch()
    assert (weights(t) != before).any() and not t.policy.stochastic.any() and np.isfinite(row["loss"])

# Settings that cannot work, or would do nothing

IDLE = [
    (dict(lr_warmup_updates=5), "lr_warmup_updates: .*constant_with_warmup"),
    (dict(reward_pool="process"), "reward_pool: .*async_reward_computation"),
    (dict(rwr_beta=0.5), "rwr_beta: ddpo-is does nothing"), (dict(rwr_draws=3), "rwr_draws: ddpo-is"),
    (dict(algorithm="rwr", rwr_fraction=0.5), "rwr_fraction: rwr does"),
    (dict(algorithm="rwr", train_clip_range=0.1), "train_clip_range: rwr"),
    (dict(algorithm="rwr", step_weighting="variance"), "step_weighting: rwr"),
    (dict(algorithm="rwr", train_timestep_fraction=0.5), "train_timestep_fraction: rwr"),
    (dict(algorithm="ddpo-sf", train_batch_size=2, train_clip_range=0.1), "train_clip_range: ddpo-sf"),
    (dict(seed=2**32), "seed: .*2³²"), (dict(run_name="../x"), "run_name: .*leads out"),
    (dict(run_name="/x"), "run_name: .*leads out"),
    (dict(project_kwargs=dict(total_limits=3)), r"project_kwargs\['total_limits'\]: .*total_limit"),
    (dict(tracker_kwargs=dict(wandbb={})), r"tracker_kwargs\['wandbb'\]: .*wandb"),
    (dict(tracker_kwargs=dict(wandb=3)), r"tracker_kwargs\['wandb'\]: 3 is not a dictionary"),
    (
        dict(tracker_kwargs=dict(tensorboard=dict(max_que=1))),
        r"tracker_kwargs\['tensorboard'\]\['max_que'\]: .*max_queue"
    ),
]

@pytest.mark.parametrize("settings,message", IDLE, ids=[str(o[0]) for o in IDLE])
def test_a_setting_that_would_fail_later_or_do_nothing_is_refused_at_once(settings, message):
    if "tensorboard" in str(settings): pytest.importorskip("tensorboard")
    with pytest.raises(InputError, match=f"^{message}") as e: DDPOConfig(**settings)
    assert "\n" not in str(e.value)

def test_no_algorithms_own_settings_do_nothing():
    from ddpo_nb.trainer import idle_notes
    for a in ALGORITHMS:
        for c in (
            make_config(a), make_config(a, "another/model"), make_config(a, lora=False),
            make_config(a, rwr_beta=0.7, rwr_fraction=0.3, train_clip_range=0.2)
        ):
            assert idle_notes(c) == []
    assert idle_notes(DDPOConfig()) == []
    assert (
        make_config("rwr", rwr_beta=0.7).rwr_beta == 0.7
        and make_config("ddpo-is", rwr_beta=0.7).rwr_beta == DDPOConfig().rwr_beta
    )

@pytest.mark.parametrize(
    "settings,note",
    [
        (dict(max_workers=4), "max_workers does nothing without async"),
        (
            dict(per_prompt_stat_tracking_min_count=2),
            "per_prompt_stat_tracking_min_count does nothing without per_prompt"
        ),
        (
            dict(per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=32),
            "per_prompt_stat_tracking does nothing: no prompt's buffer",
        ),
        (dict(negative_prompts="ugly", sample_guidance_scale=1.0), "negative_prompts does nothing"),
        (dict(tracker_kwargs=dict(wandb=dict(entity="ada"))), r"tracker_kwargs\['wandb'\] does nothing"),
    ],
)
def test_trls_settings_that_do_nothing_are_named_and_run(settings, note):
    import re
    from ddpo_nb.trainer import idle_notes
    (found,) = idle_notes(DDPOConfig(**settings))
    assert re.match(note, found)

def test_what_the_machine_or_the_model_lacks_is_said_before_anything_is_written(
    tmp_path, monkeypatch, capsys
):
    (tmp_path/"file").write_text("")
    make = lambda **kw: DDPOTrainer(
        DDPOConfig(mixed_precision="no", **dict(logdir=str(tmp_path / "run")) | kw),
        jpeg_compressibility, lambda: ("cat", {}), StableDiffusionPolicy(load_pipeline())
    )
    with pytest.raises(InputError, match="logdir: "): make(logdir=str(tmp_path/"file/x"))
    with pytest.raises(InputError, match="logdir: "):
        make(project_kwargs=dict(project_dir=str(tmp_path / "file")))
    with pytest.raises(InputError, match="sample_num_steps: 1001 is more than the model's 1000"):
        make(sample_num_steps=1001)
    monkeypatch.setattr("shutil.which", lambda *a, **k: None)
    with pytest.raises(InputError, match=r"compile: there is no C(\+\+)? compiler"): make(compile=True)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", lambda net: net)
    monkeypatch.setattr("ddpo_nb.prepare._check_compiler", lambda: None)
    make(compile=True, max_workers=3)
    err = capsys.readouterr().err
    assert "compile: the network is compiled at its first passes" in err and "max_workers does nothing" in err
    assert [o.name for o in tmp_path.iterdir()] == ["file"]
