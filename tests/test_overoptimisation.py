"""The instruments against over-optimisation: the price on leaving the pretrained model, a watched reward,
early stopping, diversity."""
import numpy as np, pytest, torch
from ddpo_nb.ddpo import DDPO, DDPOSF
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import InputError, PromptSource
from ddpo_nb.rewards import REWARDS, jpeg_compressibility, reward
from ddpo_nb.rollout import rollout, sample_generator
from ddpo_nb.trainer import DDPOConfig, RWRConfig, _diversity, make_config, make_trainer

SMALL = dict(
    logdir="", sample_num_steps=3, sample_batch_size=4, train_batch_size=4, micro_batch_size=8,
    train_timestep_fraction=1.0, train_learning_rate=1e-2
)
def trainer(home="", lora=True, function=jpeg_compressibility, **overrides):
    c = make_config("ddpo-is", **(SMALL | dict(logdir=str(home)) | overrides))
    torch.manual_seed(c.seed)  # of the adapters
    return make_trainer(
        c, function, PromptSource(["cat", "dog"], 0), StableDiffusionPolicy(load_pipeline(), use_lora=lora)
    )
def weights(t): return torch.cat([p.detach().flatten() for p in t.policy.trainable_parameters()])
def grads(policy, loss):
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(loss.mean(), policy.trainable_parameters(), retain_graph=True)
        ]
    )

@pytest.fixture(scope="module", params=[True, False], ids=["lora", "full"])
def sampled(request):
    policy = StableDiffusionPolicy(load_pipeline(), use_lora=request.param, num_steps=4, guidance_scale=3.)
    policy.keep_reference()
    batch = rollout(policy, ["cat", "dog"], [sample_generator(0, 0, i) for i in range(2)])
    ex = DDPO().examples(policy, batch, torch.tensor([1., -1.]), torch.Generator().manual_seed(0))
    start = [p.detach().clone() for p in policy.trainable_parameters()]
    yield policy, batch, ex
    with torch.no_grad():
        for p, s in zip(policy.trainable_parameters(), start): p.copy_(s)

def move(policy, by):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.trainable_parameters(): p.add_(by * torch.randn(p.shape, generator=g))

@pytest.mark.parametrize("weighting", ["equal", "variance"])
def test_at_the_pretrained_weights_the_price_is_nothing(sampled, weighting):
    policy, batch, ex = sampled
    plain, _ = DDPO(step_weighting=weighting).loss(policy, batch, ex)
    priced, figures = DDPO(step_weighting=weighting, kl_coef=100.).loss(policy, batch, ex)
    assert (
        torch.equal(plain, priced) and (figures["kl_pretrained"] == 0).all() and (figures["ratio"] == 1).all()
    )

# a sum's ratio overflows so far from home
@pytest.mark.parametrize("cls,reduction", [(DDPO, "mean"), (DDPOSF, "mean"), (DDPOSF, "sum")])
def test_the_divergence_is_exact_and_differentiated(sampled, cls, reduction):
    "Against the two predictions of a second, untouched model."
    policy, batch, ex = sampled
    policy.reduction = reduction
    move(policy, 0.01)
    other = StableDiffusionPolicy(load_pipeline(), use_lora=False, num_steps=4, guidance_scale=3.)
    plain, _ = cls().loss(policy, batch, ex)
    priced, figures = cls(kl_coef=2.).loss(policy, batch, ex)
    x, t, prev, _ = batch.transitions(ex["sample"], ex["step"])
    cond = batch.conditioning[ex["sample"]]
    step = policy.step(x, t, cond, prev_sample=prev)
    with torch.no_grad(): mean = other.step(x, t, cond, prev_sample=prev).mean
    by_hand = (step.mean - mean).square().flatten(1)
    by_hand = (by_hand.mean(1) if reduction == "mean" else by_hand.sum(1)) / (2 * step.std**2)
    torch.testing.assert_close(figures["kl_pretrained"], by_hand.detach(), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close((priced - plain).detach(), 2 * by_hand.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        grads(policy, cls(kl_coef=2.0).loss(policy, batch, ex)[0]) - grads(policy, plain),
        grads(policy, 2 * by_hand), rtol=1e-2, atol=1e-3 * grads(policy, 2 * by_hand).abs().max().item()
    )
    policy.reduction = "mean"
    move(policy, -0.01)

def test_the_reference_is_left_even_by_an_error(sampled):
    policy, *_ = sampled
    unet, move_by = policy.wrapped, 0.02
    move(policy, move_by)
    x, t, cond = torch.zeros(1, 8, 8, 8), policy.timesteps[:1], policy.encode(["cat"])
    with torch.no_grad():
        trained = policy.predict(x, t, cond)
        with pytest.raises(KeyError), policy.reference(): raise KeyError
        assert policy.wrapped is unet and torch.equal(policy.predict(x, t, cond), trained)
        with policy.reference(): assert not torch.equal(policy.predict(x, t, cond), trained)
    move(policy, -move_by)

@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_high_price_keeps_the_policy_at_home(lora):
    free, held = (
        trainer(lora=lora, kl_coef=k, train_learning_rate=5e-3 if lora else 1e-4, seed=1) for k in (0.0, 1e4)
    )
    base = held.policy
    for t in (free, held): t.train(4, progress=False)
    def away(t):
        latents = t.sample()
        ex = t.objective.examples(t.policy, latents, torch.zeros(4), torch.Generator().manual_seed(0))
        if not t.config.kl_coef and not lora: t.policy._pretrained = base._pretrained
        return DDPO(kl_coef=1.).loss(t.policy, latents, ex)[1]["kl_pretrained"].mean().item()
    assert (
        away(held) < away(free) / 3
        and held.rows[-1]["kl_pretrained"] < 1
        and "kl_pretrained" not in free.rows[-1]
    )

def test_rwr_has_no_steps_to_compare():
    with pytest.raises(InputError, match="^kl_coef: RWR"): RWRConfig(kl_coef=0.1)
    with pytest.raises(InputError, match="^kl_coef"): DDPOConfig(kl_coef=-1.)
    with pytest.raises(InputError, match="^kl_coef"): DDPO(kl_coef=-1.)

@pytest.mark.parametrize(
    "settings,says",
    [
        (dict(watch_reward="beauty"), "^watch_reward: there is no reward named 'beauty'"),
        (dict(stop_patience=3), "^stop_patience: no reward is watched"),
        (dict(watch_reward="jpeg_compressibility+jpeg_compressibility"), "^watch_reward: .*twice"),
        (dict(watch_reward="jpeg_compressibility", stop_patience=-1), "^stop_patience"),
    ],
)
def test_settings_that_cannot_work(settings, says):
    with pytest.raises(InputError, match=says): DDPOConfig(**settings)

def test_a_watched_reward_is_logged_and_changes_nothing():
    plain, watching = trainer(), trainer(watch_reward="jpeg_incompressibility")
    for t in (plain, watching): t.train(2, progress=False)
    assert torch.equal(weights(plain), weights(watching)) and "watch_mean" not in plain.rows[0]
    for row in watching.rows: assert row["watch_mean"] == pytest.approx(-row["reward_mean"])

def test_the_parts_of_a_sum_are_in_the_row():
    from ddpo_nb.rewards import get_reward
    row = trainer(function=get_reward("jpeg_compressibility - jpeg_incompressibility")).epoch()
    assert (
        row["reward_info"]["reward/jpeg_compressibility"]
        == pytest.approx(row["reward_mean"] / 2)
        == pytest.approx(-row["reward_info"]["reward/jpeg_incompressibility"])
    )

def test_only_numbers_of_each_picture_are_averaged():
    def told(images, prompts, metadata):
        return [1.0] * len(images), dict(
            a=range(len(images)), b=["x"] * len(images), c=3.0, d=[1.0], e=torch.ones(len(images)), f=None
        )
    assert trainer(function=told).epoch()["reward_info"] == dict(a=1.5, e=1.)

def test_what_is_not_a_number_is_left_out_of_the_average():
    "So that a reward can report each kind of prompt by itself."
    def told(images, prompts, metadata):
        some = torch.ones(len(images))
        some[0] = torch.nan
        return [1.0] * len(images), dict(some=some, none=some * torch.nan, up=some * torch.inf)
    found = trainer(function=told).epoch()["reward_info"]
    assert found["some"] == 1 and found["up"] == float("inf") and found["none"] != found["none"]

class Falling:
    "A watched reward that climbs for four epochs and falls from then on."
    def __init__(self, best=4): self.calls, self.best = 0, best
    def __call__(self, images, prompts, metadata):
        self.calls += 1
        return np.full(len(images), -abs(self.calls - self.best), float), {}

@pytest.fixture
def falling():
    reward("falling")(Falling())
    yield REWARDS["falling"]
    REWARDS.pop("falling")

def test_it_stops_after_its_best_and_takes_the_best_weights(falling):
    t, seen = trainer(watch_reward="falling", stop_patience=2, num_epochs=20), []
    t.train(on_row=lambda row: seen.append(weights(t).clone()), progress=False)
    # means of three: the highest is that of epochs 3, 4, 5; its weights are those that drew epoch 5's
    # pictures: after 4 epochs
    assert (
        t.best["epoch"] == 4
        and t.epochs_done == 7
        and torch.equal(weights(t), seen[3])
        and not torch.equal(weights(t), seen[-1])
    )

def test_without_patience_it_runs_on(falling):
    t = trainer(watch_reward="falling", num_epochs=6)
    assert len(t.train(progress=False)) == 6 and t.best is None

def test_a_resumed_run_stops_where_the_unbroken_one_does(falling, tmp_path):
    whole = trainer(tmp_path/"a", watch_reward="falling", stop_patience=2, num_epochs=20, save_freq=1)
    whole.train(progress=False)
    REWARDS["falling"].calls = 0
    first = trainer(tmp_path/"b", watch_reward="falling", stop_patience=2, num_epochs=20)
    first.train(5, progress=False)
    again = trainer(
        tmp_path / "b", watch_reward="falling", stop_patience=2, num_epochs=20,
        resume_from=str(tmp_path / "b")
    )
    again.train(progress=False)
    assert again.epochs_done == whole.epochs_done == 7 and torch.equal(weights(again), weights(whole))
    over = trainer(
        tmp_path / "b", watch_reward="falling", stop_patience=2, num_epochs=20,
        resume_from=str(tmp_path / "b")
    )
    # nothing is left to do
    assert len(over.train(progress=False)) == 7 and torch.equal(weights(over), weights(whole))

def test_diversity_is_the_spread_of_the_latents():
    x = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert _diversity(x) == pytest.approx(x.var(0, correction=0).mean().sqrt().item(), rel=1e-5)
    assert _diversity(x[:1].expand(6, -1, -1, -1)) == pytest.approx(0, abs=1e-6)
    assert trainer().epoch()["diversity"] > 0

