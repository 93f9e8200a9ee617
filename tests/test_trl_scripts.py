"""Scripts as TRL's users write them: what they override is called with TRL's arguments, or refused when the
trainer is made."""
import types
import numpy as np, pytest, torch
from tiny_sd import tiny_sd
from ddpo_nb import (DDPOConfig, DDPOPipelineOutput, DDPOSchedulerOutput, DDPOStableDiffusionPipeline,
                     DDPOTrainer, DefaultDDPOStableDiffusionPipeline, RWRConfig, RWRTrainer)
from ddpo_nb.models.modeling_sd_base import methods, pipeline_step, scheduler_step
from ddpo_nb.policy import ModelError, StableDiffusionPolicy
from ddpo_nb.prompts import InputError
from ddpo_nb.trl import TRAINER_METHODS

pytestmark = pytest.mark.filterwarnings("ignore:train_learning_rate")

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tiny_sd().save_pretrained(home := tmp_path_factory.mktemp("model"))
    return str(home)

@pytest.fixture
def pipeline(folder): return DefaultDDPOStableDiffusionPipeline(folder)

def reward(images, prompts, metadata): return images.mean((1, 2, 3)), {}
def prompt(): return "cat", {}
def config(**kw):
    return DDPOConfig(
        **dict(
            sample_num_steps=3, sample_batch_size=4, sample_num_batches_per_epoch=2, train_batch_size=2,
            num_epochs=2, mixed_precision="no", logdir=""
        )
        | kw
    )
def make(pipeline, kind=DDPOTrainer, hook=None, **kw):
    return kind(config(**kw), reward, prompt, pipeline, hook)
def weights(t): return torch.cat([p.detach().flatten() for p in t.trainable_layers])
def train(t):
    before = weights(t).clone()
    rows = (
        t.train(progress=False)
        if isinstance(t.train, types.MethodType) and type(t).train is DDPOTrainer.train
        else t.train()
    )
    assert (weights(t) != before).any()
    return rows

# ---- subclasses of the trainer ----

def test_step_around_ours(pipeline):
    seen = []
    class Mine(DDPOTrainer):
        def step(self, epoch, global_step):
            seen.append((epoch, global_step))
            return super().step(epoch, global_step)
    t = make(pipeline, Mine)
    assert len(train(t)) == 2 and seen == [(0, 0), (1, 4)] and t.global_step == 8

def trls_step(self, epoch, global_step):
    "What TRL 0.23.1's own `step` does, as subclasses copy it."
    samples, data = self._generate_samples(
        iterations=self.config.sample_num_batches_per_epoch, batch_size=self.config.sample_batch_size
    )
    samples = {k: torch.cat([s[k] for s in samples]) for k in samples[0]}
    rewards, infos = self.compute_rewards(data, is_async=self.config.async_reward_computation)
    for i, o in enumerate(data): o.extend([rewards[i], infos[i]])
    if self.image_samples_callback is not None:
        self.image_samples_callback(data, global_step, self.accelerator.trackers[0])
    rewards = self.accelerator.gather(torch.cat(rewards)).cpu().numpy()
    self.accelerator.log({"reward": rewards, "epoch": epoch, "reward_mean": rewards.mean()}, step=global_step)
    prompts = self.sd_pipeline.tokenizer.batch_decode(
        self.accelerator.gather(samples.pop("prompt_ids")).cpu().numpy(), skip_special_tokens=True
    )
    assert prompts == ["cat"] * 8
    samples["advantages"] = torch.as_tensor(self.stat_tracker.update(prompts, rewards)).to(
        self.accelerator.device
    )
    batches = [
        {k: v[i : i + self.config.train_batch_size] for k, v in samples.items()}
        for i in range(0, len(rewards), self.config.train_batch_size)
    ]
    self.sd_pipeline.unet.train()
    global_step = self._train_batched_samples(0, epoch, global_step, batches)
    assert self.accelerator.sync_gradients
    return global_step

def test_a_step_of_ones_own(pipeline, tmp_path):
    class Mine(DDPOTrainer): step = trls_step
    hooked = []
    t = make(
        pipeline, Mine,
        lambda data, step, tracker: (
            hooked.append(step), tracker.log_images({"a": data[-1][0][:1]}, step=step)
        ),
        logdir=str(tmp_path),
    )
    rows = train(t)
    assert [(r["epoch"], r["queries"], r["global_step"]) for r in rows] == [
        (1, 8, 4), (2, 16, 8)
    ] and hooked == [0, 4]
    assert all(np.isfinite(r["reward_mean"]) and np.isfinite(r["loss"]) for r in rows)
    assert (tmp_path / "checkpoints/checkpoint_2/files.json").is_file() and len(
        (tmp_path / "metrics.jsonl").read_text().splitlines()
    ) == 2

def test_compute_rewards(pipeline):
    seen = []
    class Mine(DDPOTrainer):
        def compute_rewards(self, prompt_image_pairs, is_async=False):
            seen.append((len(prompt_image_pairs), [len(o) for o in prompt_image_pairs], is_async))
            rewards, infos = super().compute_rewards(prompt_image_pairs, is_async)
            return tuple(r * 0 + 7 for r in rewards), infos
    rows = make(pipeline, Mine, async_reward_computation=True).train(progress=False)
    assert seen == [(2, [3, 3], True)] * 2 and [r["reward_mean"] for r in rows] == [7, 7]

@pytest.mark.parametrize("bad", [None, 3, ([],), ([torch.zeros(4)], [{}])])
def test_compute_rewards_that_returns_something_else(pipeline, bad):
    class Mine(DDPOTrainer):
        def compute_rewards(self, pairs, is_async=False): return bad
    with pytest.raises(InputError, match="^compute_rewards: "): make(pipeline, Mine).train(progress=False)

def test_generate_samples(pipeline):
    "A user's loop around the pipeline, as image-to-image trainers have it; ours trains on what it returns."
    calls = []
    class Mine(DDPOTrainer):
        def _generate_samples(self, iterations, batch_size):
            samples, pairs = [], []
            for _ in range(iterations):
                prompts, metadata = zip(*[self.prompt_fn() for _ in range(batch_size)])
                ids = self.sd_pipeline.tokenizer(
                    prompts, return_tensors="pt", padding="max_length", truncation=True,
                    max_length=self.sd_pipeline.tokenizer.model_max_length
                ).input_ids.to(self.accelerator.device)
                embeds, negative = self.sd_pipeline.text_encoder(ids)[0], self.neg_prompt_embed.repeat(
                    batch_size, 1, 1
                )
                with self.autocast():
                    out = self.sd_pipeline(
                        prompt_embeds=embeds, negative_prompt_embeds=negative,
                        num_inference_steps=self.config.sample_num_steps,
                        guidance_scale=self.config.sample_guidance_scale, eta=self.config.sample_eta,
                        output_type="pt"
                    )
                latents = torch.stack(out.latents, 1)
                samples.append(
                    dict(
                        prompt_ids=ids, prompt_embeds=embeds,
                        timesteps=self.sd_pipeline.scheduler.timesteps.repeat(batch_size, 1),
                        latents=latents[:, :-1], next_latents=latents[:, 1:],
                        log_probs=torch.stack(out.log_probs, 1), negative_prompt_embeds=negative
                    )
                )
                pairs.append([out.images, prompts, metadata])
            calls.append((iterations, batch_size))
            return samples, pairs
    rows = train(t := make(pipeline, Mine))
    assert (
        calls == [(2, 4)] * 2
        and [r["queries"] for r in rows] == [8, 16]
        and [r["updates"] for r in rows] == [4, 4]
        and t.num_train_timesteps == 3
    )
    assert rows[0]["approx_kl"] < 1e-6  # what was sampled is what is scored

def test_train_batched_samples(pipeline):
    seen = []
    class Mine(DDPOTrainer):
        def _train_batched_samples(self, inner_epoch, epoch, global_step, batched_samples):
            seen.append(
                (
                    inner_epoch, epoch, global_step, len(batched_samples),
                    {k: tuple(v.shape) for k, v in batched_samples[0].items()}
                )
            )
            return super()._train_batched_samples(inner_epoch, epoch, global_step, batched_samples)
    train(make(pipeline, Mine, train_num_inner_epochs=2, num_epochs=1))
    assert [o[:4] for o in seen] == [(0, 0, 0, 4), (1, 0, 4, 4)]
    assert seen[0][4] == dict(
        prompt_embeds=(2, 16, 16), timesteps=(2, 3), latents=(2, 3, 4, 8, 8), next_latents=(2, 3, 4, 8, 8),
        log_probs=(2, 3), negative_prompt_embeds=(2, 16, 16), advantages=(2,)
    )

def test_training_with_accelerates_accumulation(pipeline):
    "TRL's own `_train_batched_samples`, which leaves the division to accelerate: the same gradient as ours."
    norms = []
    class Mine(DDPOTrainer):
        def _train_batched_samples(self, inner_epoch, epoch, global_step, batched_samples):
            for sample in batched_samples:
                embeds = torch.cat([sample["negative_prompt_embeds"], sample["prompt_embeds"]])
                for j in range(self.num_train_timesteps):
                    with self.accelerator.accumulate(self.sd_pipeline.unet):
                        loss, *_ = self.calculate_loss(
                            sample["latents"][:, j], sample["timesteps"][:, j], sample["next_latents"][:, j],
                            sample["log_probs"][:, j], sample["advantages"], embeds
                        )
                        self.accelerator.backward(loss)
                        if self.accelerator.sync_gradients:
                            norms.append(
                                self.accelerator.clip_grad_norm_(
                                    self.trainable_layers, self.config.train_max_grad_norm
                                ).item()
                            )
                        self.optimizer.step(); self.optimizer.zero_grad()
                if self.accelerator.sync_gradients: global_step += 1
            return global_step
    kw = dict(train_gradient_accumulation_steps=4, num_epochs=1)
    train(make(pipeline, Mine, **kw))
    class Other(DDPOTrainer):
        def _train_batched_samples(self, *args): return super()._train_batched_samples(*args)
    pipeline.sd_pipeline.unet.delete_adapters("default")
    rows = train(make(pipeline, Other, **kw))
    assert len(norms) == rows[0]["updates"] == 1 and norms[0] == pytest.approx(rows[0]["grad_norm"], rel=1e-4)

def test_calculate_loss_in_trls_shapes(pipeline, folder):
    shapes = []
    class Mine(DDPOTrainer):
        def calculate_loss(self, latents, timesteps, next_latents, log_probs, advantages, embeds):
            shapes.append(
                (
                    len(latents), *(len(o) for o in (timesteps, next_latents, log_probs, advantages)),
                    len(embeds)
                )
            )
            return super().calculate_loss(latents, timesteps, next_latents, log_probs, advantages, embeds)
    rows = train(t := make(pipeline, Mine, num_epochs=1))
    assert set(shapes) == {(2, 2, 2, 2, 2, 4)} and len(shapes) == 4 * 3 and rows[0]["clip_fraction"] >= 0
    plain = make(DefaultDDPOStableDiffusionPipeline(folder), num_epochs=1).train(progress=False)
    for k in ("loss", "grad_norm", "approx_kl"):
        assert rows[0][k] == pytest.approx(plain[0][k], rel=1e-3, abs=1e-9)

def test_loss_alone(pipeline):
    calls = []
    class Mine(DDPOTrainer):
        def loss(self, advantages, clip_range, ratio):
            calls.append(clip_range)
            return torch.mean(-advantages * ratio)
    t = make(pipeline, Mine, num_epochs=1)
    train(t)
    assert (
        set(calls) == {1e-4}
        and DDPOTrainer.loss(t, torch.tensor([-1.0]), 1e-4, torch.tensor([1.0])).item() == 1
    )

def test_train_in_trls_words(pipeline):
    class Stated(DDPOTrainer):
        def __init__(self, state, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.state = state
        def train(self, epochs=None):
            global_step = 0
            for epoch in range(self.first_epoch, epochs or self.config.num_epochs):
                global_step = self.step(epoch, global_step)
                self.state["global_step"] = global_step
    t = Stated(state := {}, config(), reward, prompt, pipeline)
    train(t)
    assert state == {"global_step": 8} and len(t.rows) == 2

def test_a_loop_of_ones_own(pipeline):
    t, global_step = make(pipeline), 0
    for epoch in range(t.first_epoch, 3): global_step = t.step(epoch, global_step)
    assert global_step == 12 == t.global_step and [r["epoch"] for r in t.rows] == [1, 2, 3]

def test_setup_optimizer_and_config_check(pipeline):
    class Mine(DDPOTrainer):
        def _setup_optimizer(self, trainable_layers_parameters):
            return torch.optim.SGD(trainable_layers_parameters, lr=0.1)
        def _config_check(self): return (self.config.sample_batch_size > 1, "too small.")
    assert type(make(pipeline, Mine).optimizer.optimizer) is torch.optim.SGD
    with pytest.raises(InputError, match="^config: too small; "): make(pipeline, Mine, sample_batch_size=1)

def test_methods_put_on_the_object(pipeline):
    t, seen = make(pipeline, num_epochs=1), []
    ours = t.compute_rewards
    t.compute_rewards = lambda pairs, is_async=False: (seen.append("rewards"), ours(pairs, is_async))[1]
    t.calculate_loss = types.MethodType(
        lambda self, *args: (seen.append("loss"), DDPOTrainer.calculate_loss(self, *args))[1], t
    )
    train(t)
    assert {*seen} == {"rewards", "loss"}
    t._save_checkpoint = lambda model, trial: None
    with pytest.raises(InputError, match="^_save_checkpoint: "): t.train(3, progress=False)

@pytest.mark.parametrize("name", ["_save_checkpoint", "generate_model_card", "_from_pretrained"])
def test_what_is_never_called_is_refused(pipeline, name):
    with pytest.raises(InputError, match=f"^{name}: Mine overrides it, and it is never called") as e:
        make(pipeline, type("Mine", (DDPOTrainer,), {name: lambda self, *a: None}))
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("name", ["calculate_loss", "loss", "_generate_samples", "_train_batched_samples"])
def test_rwr_refuses_what_it_would_not_call(pipeline, name):
    with pytest.raises(InputError, match=f"^{name}: Mine overrides it, and rwr does not call it"):
        type("Mine", (RWRTrainer,), {name: lambda self, *a: None})(
            RWRConfig(logdir="", mixed_precision="no"), reward, prompt, pipeline
        )

def test_our_settings_that_an_override_would_not_heed(pipeline):
    class Mine(DDPOTrainer):
        def _generate_samples(self, iterations, batch_size):
            return super()._generate_samples(iterations, batch_size)
        def loss(self, *args): return super().loss(*args)
    for kw in (dict(samples_per_prompt=2), dict(offload_trajectories=True), dict(log_prob_reduction="sum")):
        with pytest.raises(InputError, match=f"^{next(iter(kw))}: "): make(pipeline, Mine, **kw)
    with pytest.raises(InputError, match="^loss: "):
        make(pipeline, Mine, algorithm="ddpo-sf", train_batch_size=8)

# ---- subclasses of the pipelines ----

def test_get_trainable_layers_of_ones_own(folder, tmp_path):
    class Keyword(DefaultDDPOStableDiffusionPipeline):
        "Neither calls the constructor nor trains an adapter: some of the UNet's own weights."
        def __init__(self, sd_pipeline, keyword):
            self.sd_pipeline, self.keyword, self.use_lora = sd_pipeline, keyword, False
        def get_trainable_layers(self):
            return [p for n, p in self.sd_pipeline.unet.named_parameters() if self.keyword in n]
    own = Keyword(tiny_sd(), "attn2.to_v")
    t = make(own, logdir=str(tmp_path))
    assert 0 < len(t.trainable_layers) < 20 and {id(p) for p in t.trainable_layers} == {
        id(p) for p in own.get_trainable_layers()
    }
    still = own.unet.conv_in.weight.clone()
    train(t)
    assert torch.equal(still, own.unet.conv_in.weight)
    again = make(Keyword(tiny_sd(), "attn2.to_v"), logdir=str(tmp_path), resume_from=str(tmp_path))
    assert torch.equal(weights(again), weights(t)) and again.first_epoch == 2

def test_an_adapter_of_ones_own(folder):
    from peft import LoraConfig
    class Better(DefaultDDPOStableDiffusionPipeline):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.sd_pipeline.unet.add_adapter(
                LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=["to_k", "to_v"])
            )
            for p in self.sd_pipeline.unet.parameters():
                if p.requires_grad: p.data = p.to(torch.float32)
        def get_trainable_layers(self): return self.sd_pipeline.unet
    for _ in range(2):  # a second trainer on the same pipeline goes on
        t = make(own := Better(folder) if not _ else own)
        train(t)
        assert [c.r for c in own.unet.peft_config.values()] == [2] and len(t.trainable_layers) == sum(
            "lora_" in n for n, _ in own.unet.named_parameters()
        )

def test_a_call_of_ones_own(folder):
    calls = []
    class Mine(DefaultDDPOStableDiffusionPipeline):
        def __call__(
            self, prompt_embeds=None, negative_prompt_embeds=None, num_inference_steps=10, guidance_scale=7.5,
            eta=0.0, **kwargs
        ):
            calls.append((len(prompt_embeds), num_inference_steps, guidance_scale, eta, kwargs))
            return pipeline_step(
                self.sd_pipeline, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
                num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, eta=eta, **kwargs
            )
    rows = train(make(Mine(folder), num_epochs=1))
    assert calls == [(4, 3, 5.0, 1.0, dict(output_type="pt"))] * 2 and rows[0]["approx_kl"] < 1e-6

def test_a_scheduler_step_of_ones_own(folder):
    seen = []
    class Mine(DefaultDDPOStableDiffusionPipeline):
        def scheduler_step(self, *args, **kwargs):
            seen.append(sorted(kwargs))
            out = scheduler_step(self.sd_pipeline.scheduler, *args, **kwargs)
            return DDPOSchedulerOutput(out.latents, 2 * out.log_probs)
    rows = train(
        make(
            own := Mine(folder), num_epochs=1, train_batch_size=8, sample_batch_size=8,
            sample_num_batches_per_epoch=1
        )
    )
    assert seen and all(o == ["eta", "prev_sample"] for o in seen) and rows[0]["approx_kl"] < 1e-6
    with pytest.raises(InputError, match="^kl_coef: "): make(own, kl_coef=.1)
    with pytest.raises(InputError, match="^scheduler_step: "):
        RWRTrainer(RWRConfig(logdir="", mixed_precision="no"), reward, prompt, own)

class Own(DDPOStableDiffusionPipeline):
    "A pipeline from the abstract class, as image-to-image users write it."
    use_lora = True
    def __init__(self, pipeline):
        self.sd_pipeline, self.calls = pipeline, 0
        from peft import LoraConfig, get_peft_model
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet): part.requires_grad_(False)
        pipeline.unet = get_peft_model(
            pipeline.unet, LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"])
        )
    unet = property(lambda self: self.sd_pipeline.unet)
    vae = property(lambda self: self.sd_pipeline.vae)
    tokenizer = property(lambda self: self.sd_pipeline.tokenizer)
    scheduler = property(lambda self: self.sd_pipeline.scheduler)
    text_encoder = property(lambda self: self.sd_pipeline.text_encoder)
    def __call__(self, *args, **kwargs) -> DDPOPipelineOutput:
        self.calls += 1
        return pipeline_step(self.sd_pipeline, *args, **kwargs)
    def scheduler_step(self, *args, **kwargs):
        return scheduler_step(self.sd_pipeline.scheduler, *args, **kwargs)
    def get_trainable_layers(self): return self.sd_pipeline.unet

def test_a_pipeline_from_the_abstract_class(tmp_path):
    own = Own(tiny_sd())
    t = make(own, logdir=str(tmp_path))
    rows = train(t)
    assert t.sd_pipeline is own and own.calls == 4 and rows[0]["approx_kl"] < 1e-6
    again = make(Own(tiny_sd()), logdir=str(tmp_path), resume_from=str(tmp_path))
    assert torch.equal(weights(again), weights(t))
    t.save_pretrained(tmp_path/"out")
    assert (tmp_path/"out/pytorch_lora_weights.safetensors").is_file()

def test_what_a_pipeline_lacks_is_said():
    class Half(Own): scheduler_step = DDPOStableDiffusionPipeline.scheduler_step
    with pytest.raises(ModelError, match="^Half: it has no scheduler_step; "): make(Half(tiny_sd()))
    with pytest.raises(ModelError, match="^sd_pipeline: a StableDiffusionPipeline is no policy; "):
        make(tiny_sd())

# ---- names that are ours ----

# methods of ours that TRL does not have, as a user's script may well call something of its own
TAKEN = dict(
    update=lambda self, batch: None, sample=lambda self, n=4: None, epoch=lambda self: 3,
    collect=lambda self, folder: None, gradient=lambda self, loss: None, weigh=lambda self, rewards: None,
    judge=lambda self, images: None, advantages=lambda self, rewards: None, stop=lambda self: None,
    ask=lambda self, question: None, checked=lambda self: True, figures=lambda self: [],
    descend=lambda self, x, y: None, overrides=lambda self: [], _log=lambda self, text: None,
    _draw=lambda self, image: None, save_checkpoint=lambda self, path: None,
    load_checkpoint=lambda self: None, updates_per_epoch=lambda self: 3
)

@pytest.mark.parametrize("kind", [DDPOTrainer, RWRTrainer])
def test_a_method_of_ones_own_that_is_called_as_one_of_ours(pipeline, kind):
    c = RWRConfig(logdir="", mixed_precision="no") if kind is RWRTrainer else config()
    for name, method in TAKEN.items():
        with pytest.raises(InputError, match=f"^{name}: Mine has something of this name") as e:
            type("Mine", (kind,), {name: method})(c, reward, prompt, pipeline)
        assert f"rename it, to my_{name.lstrip('_')} say" in str(e.value) and "\n" not in str(e.value)

def test_no_name_of_ours_is_left_out(pipeline):
    ours = {o for o in methods(DDPOTrainer) if o not in (*TRAINER_METHODS, "autocast")}
    assert len(ours) > 60 and {*TAKEN} <= ours
    for name in ours:
        with pytest.raises(InputError, match=f"^{name}: Mine has "):
            make(pipeline, type("Mine", (DDPOTrainer,), {name: 3}))

@pytest.mark.parametrize("own", [3, staticmethod(lambda x: x), property(lambda self: 3)])
def test_other_things_under_the_name_of_a_method(pipeline, own):
    with pytest.raises(InputError, match="^gradient: Mine has"):
        make(pipeline, type("Mine", (DDPOTrainer,), dict(gradient=own)))

@pytest.mark.parametrize("own", [3, lambda self: [], property(lambda self: [])])
def test_other_things_under_the_name_of_a_property(pipeline, own):
    with pytest.raises(InputError, match="^trainable_layers: Mine has .* own is a property; rename it"):
        make(pipeline, type("Mine", (DDPOTrainer,), dict(trainable_layers=own)))

@pytest.mark.parametrize("name", ["rows", "best", "reward_function", "work", "queries", "hook", "task"])
def test_a_method_that_a_value_of_ours_would_hide(pipeline, name):
    with pytest.raises(InputError, match=f"^{name}: Mine has a method of this name, and the trainer a value"):
        make(pipeline, type("Mine", (DDPOTrainer,), {name: lambda self: None}))

def test_an_override_that_is_meant(pipeline):
    "The same arguments under the same names, or a call of super() where there are none."
    seen = []
    class Mine(DDPOTrainer):
        def epoch(self):
            seen.append("epoch")
            return super().epoch()
        def advantages(self, prompts, rewards): return torch.linspace(-1, 1, len(rewards))
        def sample(self, *args, **kwargs): return DDPOTrainer.sample(self, *args, **kwargs)
        def stop(self, signum=0, why=""): super().stop(signum)
        @property
        def updates_per_epoch(self): return super().updates_per_epoch
        def my_update(self, batch): raise AssertionError
    train(make(pipeline, Mine))
    assert seen == ["epoch"] * 2

def test_a_name_that_is_taken_on_the_object(pipeline):
    t = make(pipeline)
    t.gradient = lambda loss: None
    with pytest.raises(InputError, match="^gradient: DDPOTrainer has something of this name"):
        t.train(progress=False)

@pytest.mark.parametrize(
    "name, own",
    dict(
        decode=lambda self, latents, output_type: None, encode=lambda self, image: None,
        predict=lambda self, prompt: None, restore=lambda self: None, step=lambda self: 1,
        configure=lambda self, lr: None, network=3, timesteps=lambda self: [], freeze=lambda self: None
    ).items(),
)
def test_a_pipelines_method_that_is_called_as_one_of_ours(folder, name, own):
    mine = type("Mine", (DefaultDDPOStableDiffusionPipeline,), {name: own})
    with pytest.raises(ModelError, match=f"^{name}: Mine has something of this name.*my_{name} say$"):
        mine(folder)

def test_a_pipeline_that_goes_on_with_ours(folder):
    class Mine(DefaultDDPOStableDiffusionPipeline):
        def freeze(self): super().freeze()
        def predict(self, latents, t, cond, guidance=True):
            return super().predict(latents, t, cond, guidance)
    train(make(Mine(folder)))

def test_gradients_of_ones_own_are_not_called_yet(pipeline, folder):
    class Mine(DefaultDDPOStableDiffusionPipeline):
        def rgb_with_grad(self, *args, **kwargs): raise AssertionError
    with pytest.raises(ModelError, match="^rgb_with_grad: Mine has one of its own, and no trainer"):
        Mine(folder)
    class Mine(Own):
        def rgb_with_grad(self, *args, **kwargs): raise AssertionError
    with pytest.raises(ModelError, match="^rgb_with_grad: Mine has one of its own, and no trainer"):
        make(Mine(pipeline.sd_pipeline))

# ---- the rest of the surface ----

def test_two_trainers_in_one_process_and_folder(folder, tmp_path, capfd):
    first, second = (
        make(DefaultDDPOStableDiffusionPipeline(folder), logdir=str(tmp_path / "logs"), num_epochs=1)
        for _ in range(2)
    )
    for t in (first, second): train(t)
    # the script run again
    train(
        third := make(DefaultDDPOStableDiffusionPipeline(folder), logdir=str(tmp_path / "logs"), num_epochs=1)
    )
    assert [t.home.name for t in (first, second, third)] == ["logs", "logs-2", "logs-3"]
    assert all(
        (tmp_path / o / "checkpoints/checkpoint_1/files.json").is_file() for o in ("logs", "logs-2", "logs-3")
    )
    said = capfd.readouterr().err.splitlines()
    assert [o for o in said if "holds another run" in o] == [
        o for o in said if o.startswith("logdir: ")
    ] and len([o for o in said if o.startswith("logdir: ")]) == 2
    on = make(
        DefaultDDPOStableDiffusionPipeline(folder), logdir=str(tmp_path / "logs"), num_epochs=2,
        resume_from=str(tmp_path / "logs")
    )
    assert on.home.name == "logs" and on.first_epoch == 1

@pytest.mark.parametrize("use_lora", [True, False])
def test_save_pretrained_and_load_again(folder, tmp_path, use_lora):
    from diffusers import StableDiffusionPipeline
    t = make(DefaultDDPOStableDiffusionPipeline(folder, use_lora=use_lora), train_learning_rate=1e-2)
    train(t); t.save_pretrained(tmp_path/"out")
    again = DefaultDDPOStableDiffusionPipeline(str(tmp_path/"out"), use_lora=use_lora)
    draw = lambda p: p(
        "cat", num_inference_steps=3, eta=1.0, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert torch.allclose(draw(t.sd_pipeline), draw(again), atol=1e-5) and not torch.allclose(
        draw(again), draw(DefaultDDPOStableDiffusionPipeline(folder)), atol=1e-3
    )
    base = StableDiffusionPipeline.from_pretrained(tmp_path/"out", safety_checker=None)  # diffusers too
    if use_lora: base.load_lora_weights(str(tmp_path/"out"))
    assert (tmp_path / "out/README.md").is_file() and str(tmp_path) not in (
        tmp_path / "out/README.md"
    ).read_text() + (tmp_path / "out/model_index.json").read_text()

def test_a_call_of_the_pipeline(pipeline):
    out = pipeline(["cat", "dog"], num_inference_steps=3, eta=1.0, output_type="pt")
    assert (
        isinstance(out, DDPOPipelineOutput)
        and len(out.latents) == 4
        and len(out.log_probs) == 3
        and out.images.shape == (2, 3, 16, 16)
        and out.log_probs[0].shape == (2,)
    )
    assert pipeline("cat", num_inference_steps=2).images[0].size == (16, 16) and pipeline(
        "cat", num_inference_steps=2, output_type="latent"
    ).images.shape == (1, 4, 8, 8)
    assert len(pipeline("cat", num_images_per_prompt=3, num_inference_steps=1, output_type="np").images) == 3
    for bad in (
        dict(), dict(prompt="cat", guidance_rescale=0.7), dict(prompt="cat", output_type="gif"),
        dict(prompt=["cat", "dog"], negative_prompt=["x"])
    ):
        with pytest.raises(ValueError): pipeline(num_inference_steps=1, **bad)

def test_a_call_in_the_middle_of_training_changes_nothing(folder):
    def look(data, step, tracker):
        t.sd_pipeline(
            "cat", num_inference_steps=7, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)
        )
    rows = []
    for hook in (None, look):
        t = make(DefaultDDPOStableDiffusionPipeline(folder), hook=hook)
        rows.append([(r["loss"], r["reward_mean"]) for r in t.train(progress=False)])
    assert rows[0] == rows[1]

def test_rgb_with_grad(pipeline):
    pipeline.get_trainable_layers()
    out = pipeline.rgb_with_grad(
        "cat", num_inference_steps=3, truncated_backprop_rand=False, truncated_backprop_timestep=2,
        output_type="pt"
    )
    out.images.mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in pipeline.trainable_parameters())

def test_hooks_that_use_trackers(folder, tmp_path):
    "As TRL hands over a tracker, and as older versions handed over the accelerator."
    def hook(data, step, tracker):
        images, prompts, _, rewards, _ = data[-1]
        pictures = {f"{prompts[0]:.25} | {rewards[0].item():.2f}": images[:1].float().cpu().numpy()}
        tracker.log_images(pictures, step=step)
        tracker.log({"a": 1.0}, step=step)
        tracker.trackers[0].log_images(pictures, step=step)
        tracker.trackers[0].log({"b": 2.0}, step=step)
        if tracker.name == "none": tracker.tracker.log({"c": 3}, step=step)
        else: tracker.tracker.add_scalar("c", 3.0, step)
    make(DefaultDDPOStableDiffusionPipeline(folder), hook=hook, num_epochs=1).train(progress=False)
    pytest.importorskip("tensorboard")
    make(
        DefaultDDPOStableDiffusionPipeline(folder), hook=hook, num_epochs=1, log_with="tensorboard",
        logdir=str(tmp_path)
    ).train(progress=False)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    tags = {
        t
        for o in tmp_path.rglob("events.out.tfevents.*")
        for t in EventAccumulator(str(o.parent)).Reload().Tags()["scalars"]
    }
    assert {"a", "b", "c"} <= tags

@pytest.mark.parametrize(
    "form",
    [
        lambda r: r[:, None], lambda r: r.tolist(), lambda r: r.numpy(), lambda r: r.bfloat16(),
        lambda r: r[:, None].bfloat16(), lambda r: [o for o in r], lambda r: [[o.item()] for o in r]
    ],
    ids=["(n,1)", "list", "numpy", "bf16", "bf16 (n,1)", "tensors", "lists"],
)
def test_rewards_of_any_shape(form):
    from ddpo_nb.rewards import check_rewards
    values = torch.tensor([.25, .5, .75])
    assert check_rewards(form(values), 3, "r").tolist() == values.tolist()
    for wrong in (values[None], values[:, None].expand(3, 2)):
        with pytest.raises(InputError, match="shape"): check_rewards(wrong, 3, "r")

def test_a_reward_with_a_column(pipeline):
    t = make(pipeline, num_epochs=1)
    t.reward_fn = lambda images, prompts, metadata: (images.mean((1, 2, 3))[:, None].bfloat16(), {})
    assert 0 < t.train(progress=False)[0]["reward_mean"] < 1

def test_attributes(pipeline):
    hook = lambda *a: None
    t = make(pipeline, hook=hook, train_timestep_fraction=.5, sample_num_steps=4)
    assert (
        t.sd_pipeline, t.prompt_fn, t.reward_fn, t.image_samples_callback, t.first_epoch,
        t.num_train_timesteps
    ) == (pipeline, prompt, reward, hook, 0, 2)
    assert t.neg_prompt_embed.shape == (1, 16, 16) and t.stat_tracker is t.tracker and t.autocast is not None
    t.prompt_fn = lambda: ("dog", {})
    assert list(t.train(1, progress=False)[0]["reward_by_prompt"]) == ["dog"]

# ---- the hub ----

@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub
    from hub_server import Server
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"): monkeypatch.delenv(name, raising=False)
    with Server() as s:
        for name, value in dict(
            ENDPOINT=s.url, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True, HF_HUB_DISABLE_TELEMETRY=True,
            HF_TOKEN_PATH=str(tmp_path / "token")
        ).items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        token, self = next((t, u) for t, u in s.users.items() if u["role"] == "write")
        monkeypatch.setenv("HF_TOKEN", token)
        s.owner = self["name"]
        yield s

def test_a_bare_name_is_the_token_owners(pipeline, hub):
    t = make(pipeline, num_epochs=1)
    t.train(progress=False)
    assert t.push_to_hub("ddpo-cats") == f"{hub.url}/{hub.owner}/ddpo-cats"

def test_push_to_hub_without_a_name(folder, hub, tmp_path):
    "The run's folder, as TRL has it; asked before the run."
    t = make(
        DefaultDDPOStableDiffusionPipeline(folder), num_epochs=1, push_to_hub=True,
        logdir=str(tmp_path / "cats")
    )
    assert (
        t.hub_model_id == f"{hub.owner}/cats"
        and make(DefaultDDPOStableDiffusionPipeline(folder), push_to_hub=True, exp_name="tidy").hub_model_id
        == f"{hub.owner}/tidy"
    )
    for wrong in ("a b", "nobody/else/x"):
        with pytest.raises(InputError, match="^--push-to-hub: "):
            make(DefaultDDPOStableDiffusionPipeline(folder), push_to_hub=True, hub_model_id=wrong)

def test_a_model_card_of_ones_own_is_uploaded(pipeline, hub, tmp_path):
    class Mine(DDPOTrainer):
        _tag_names = ["herding"]
        def create_model_card(self, model_name=None, dataset_name=None, tags=None):
            return super().create_model_card(model_name, "ada/cats", ["mine"])
    t = make(pipeline, Mine)
    assert (
        t.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="cats") == f"{hub.url}/{hub.owner}/cats"
    )
    text = (tmp_path/"out/README.md").read_text()
    assert all(o in text for o in ("herding", "mine", "ada/cats"))
    with pytest.raises(InputError, match="^repo_id: nothing is uploaded"):
        t.save_pretrained(tmp_path / "out", repo_id="cats")

def test_import_paths():
    from ddpo_nb import models
    from ddpo_nb.models import DefaultDDPOStableDiffusionPipeline as a
    from ddpo_nb.models.modeling_sd_base import DefaultDDPOStableDiffusionPipeline as b
    from ddpo_nb.trainer import DDPOConfig as c, PerPromptStatTracker
    assert (
        a is b is DefaultDDPOStableDiffusionPipeline
        and c is DDPOConfig
        and "DDPOPipelineOutput" in dir(models)
        and issubclass(a, DDPOStableDiffusionPipeline)
    )
