"A script written for TRL's AlignProp trainer runs with only its import lines changed."
import inspect
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_sd import tiny_sd

from ddpo_nb import (AlignPropConfig, AlignPropTrainer, DDPOConfig, DDPOTrainer,
                     DefaultDDPOStableDiffusionPipeline)
from ddpo_nb.config import idle_notes, make_objective
from ddpo_nb.models import auxiliary_modules
from ddpo_nb.prompts import InputError
from ddpo_nb.rewards import jpeg_compressibility
from ddpo_nb.rollout import sample_generator

pytestmark = pytest.mark.filterwarnings("ignore:train_learning_rate", "ignore:mixed_precision. fp16 needs")

# TRL 0.23.1's fields and defaults, all but exp_name
TRL = dict(
    run_name="", seed=0, log_with=None, log_image_freq=1, tracker_kwargs={}, accelerator_kwargs={},
    project_kwargs={}, tracker_project_name="trl", logdir="logs", num_epochs=100, save_freq=1,
    num_checkpoint_limit=5, mixed_precision="fp16", allow_tf32=True, resume_from="", sample_num_steps=50,
    sample_eta=1.0, sample_guidance_scale=5.0, train_batch_size=1, train_use_8bit_adam=False,
    train_learning_rate=1e-3, train_adam_beta1=0.9, train_adam_beta2=0.999, train_adam_weight_decay=1e-4,
    train_adam_epsilon=1e-8, train_gradient_accumulation_steps=1, train_max_grad_norm=1.0,
    truncated_backprop_rand=True, truncated_backprop_timestep=49, truncated_rand_backprop_minmax=(0, 50),
    push_to_hub=False
)

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tiny_sd().save_pretrained(home := tmp_path_factory.mktemp("model"))
    return str(home)

def warmth(images, prompts, metadata): return (images[:, 0] - 0.5 * images[:, 2]).mean((1, 2)), {}
def prompt(): return "cat", {}

def config(**kw):
    few = dict(
        sample_num_steps=4, train_batch_size=2, train_gradient_accumulation_steps=2, num_epochs=2, logdir="",
        mixed_precision="no", truncated_rand_backprop_minmax=(0, 4))
    return AlignPropConfig(**few | kw)

def make(folder, kind=AlignPropTrainer, reward=warmth, hook=None, **kw):
    torch.manual_seed(0)
    return kind(config(**kw), reward, prompt, DefaultDDPOStableDiffusionPipeline(folder), hook)

def weights(t): return torch.cat([p.detach().flatten() for p in t.trainable_layers])
def gradient(t): return torch.cat([p.grad.flatten() for p in t.trainable_layers])

def test_config_has_trls_fields_and_defaults():
    c = AlignPropConfig()
    assert {k: getattr(c, k) for k in TRL} == TRL and not c.negative_prompts
    assert inspect.signature(AlignPropConfig).parameters["negative_prompts"].default is None
    assert {*TRL} <= {*c.to_dict()} | {"tracker_kwargs", "accelerator_kwargs", "project_kwargs"}
    assert list(inspect.signature(AlignPropTrainer).parameters) == [
        "config", "reward_function", "prompt_function", "sd_pipeline", "image_samples_hook"]

def test_an_epoch_is_one_update_of_batch_times_accumulation(folder):
    t = make(folder)
    before = weights(t).clone()
    rows = t.train(progress=False)
    assert [(r["queries"], r["global_step"], r["updates"]) for r in rows] == [(4, 1, 1), (8, 2, 1)]
    assert rows[0]["algorithm"] == "alignprop" and (weights(t) != before).any()

@pytest.mark.parametrize("cut", [0, 1, 3])
def test_a_fixed_cut_gives_the_gradient_of_rgb_with_grad(folder, cut):
    "TRL's own way through the sampler, one graph of all, with the same noise"
    t = make(folder, truncated_backprop_rand=False, truncated_backprop_timestep=cut, train_max_grad_norm=1e9)
    assert make_objective(t.config).passed(1, 4, torch.Generator()).tolist() == [[i >= cut for i in range(4)]]
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for p in t.trainable_layers: p.add_(0.1 * torch.randn(p.shape, generator=g))
    work = t.collect()
    examples = t.objective.examples(t.policy, work.trajectories, work.advantages, torch.Generator())
    t.gradient(work.trajectories, examples)
    ours = gradient(t)
    t.optimizer.zero_grad()
    cond = t.policy.encode(["cat"] * 4)
    out = t.sd_pipeline.rgb_with_grad(
        prompt_embeds=cond.prompt, negative_prompt_embeds=cond.negative, num_inference_steps=4,
        guidance_scale=5.0, eta=1.0, truncated_backprop_rand=False, truncated_backprop_timestep=cut,
        generator=[sample_generator(0, 0, i) for i in range(4)])
    torch.testing.assert_close(out.images.detach(), work.trajectories.images, rtol=0, atol=1e-4)
    t.calculate_loss(warmth(out.images, None, None)[0]).backward()
    theirs = gradient(t)
    assert theirs.norm() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())

def test_a_cut_by_chance_is_drawn_anew_for_each_step_as_trl_draws_it():
    "randint(lo, hi), both included, at every step i, which has no gradient if i is below"
    c = AlignPropConfig(sample_num_steps=10, truncated_rand_backprop_minmax=(2, 50))
    passed = make_objective(c).passed(20_000, 10, torch.Generator().manual_seed(0))
    want = torch.tensor([max(0, i - 2 + 1) / 49 for i in range(10)])
    torch.testing.assert_close(passed.double().mean(0), want.double(), atol=0.01, rtol=0)
    assert ((passed[:, 1:] != passed[:, :-1]).sum(1) > 1).any()

def test_a_config_that_was_changed_after_it_was_made_is_followed(folder):
    c = config()
    c.train_batch_size, c.truncated_backprop_rand, c.truncated_backprop_timestep = 4, False, 2
    t = AlignPropTrainer(c, warmth, prompt, DefaultDDPOStableDiffusionPipeline(folder))
    assert t.config.samples_per_epoch == t.config.samples_per_update == 8
    assert t.objective.most_passed(4) == 2 == t.objective.fewest

def test_the_hook_gets_trls_dictionary_when_it_is_due(folder):
    seen = []
    t = make(folder, hook=lambda *a: seen.append(a), num_epochs=3, log_image_freq=2)
    t.train(progress=False)
    (pair, step, tracker), = seen
    assert {*pair} == {"images", "prompts", "prompt_metadata", "rewards"} and step == 2
    assert pair["images"].shape == (2, 3, 16, 16) and list(pair["prompts"]) == ["cat"] * 2
    assert pair["rewards"].shape == (2,) and not pair["images"].requires_grad
    tracker.log_images({"a": pair["images"][:1]}, step=step)

def test_without_a_hook_pictures_are_logged_as_often(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(DDPOTrainer, "_show", lambda self, batches: shown.append(self.global_step + 1))
    make(folder, num_epochs=4, log_image_freq=2).train(progress=False)
    assert shown == [2, 4]

def test_samples_are_generated_for_a_user_as_trl_generates_them(folder):
    t = make(folder, truncated_backprop_rand=False, truncated_backprop_timestep=2)
    drawn = t._generate_samples(2)
    assert {*drawn} == {"images", "prompts", "prompt_metadata"} and drawn["prompts"] == ("cat", "cat")
    drawn["images"].mean().backward()
    assert sum(p.grad.norm() for p in t.trainable_layers) > 0
    shown = t._generate_samples(batch_size=1, with_grad=False, prompts=["a fox"])
    assert shown["images"].shape == (1, 3, 16, 16) and not shown["images"].requires_grad
    assert shown["prompts"] == ("a fox",) and shown["prompt_metadata"] == ({},)
    with pytest.raises(InputError, match="^prompts: there are 1 for 2 images"):
        t._generate_samples(2, prompts=["a fox"])

def test_the_loss_that_is_logged_is_calculate_losss(folder):
    class Mine(AlignPropTrainer):
        def calculate_loss(self, rewards): return 7 - 3 * rewards.mean()
    # whatever a reward says beside its rewards, it is none of the loss
    curt = lambda *batch: (warmth(*batch)[0], ["warm"])
    usual, mine = make(folder, reward=curt).epoch(), make(folder, Mine).epoch()
    assert usual["loss"] == pytest.approx(10 - usual["reward_mean"], rel=1e-5)
    assert mine["loss"] == pytest.approx(7 - 3 * mine["reward_mean"], rel=1e-5)
    assert usual["reward_info"] == {}

def test_overridden_methods_are_called_with_trls_arguments(folder):
    calls = []
    class Mine(AlignPropTrainer):
        def compute_rewards(self, prompt_image_pairs):
            calls.append(sorted(prompt_image_pairs))
            return 2 * super().compute_rewards(prompt_image_pairs)
        def calculate_loss(self, rewards):
            calls.append(tuple(rewards.shape))
            return (rewards**2).mean()
    usual, mine = make(folder), make(folder, Mine)
    for t in (usual, mine):
        work = t.collect()
        t.found = work.trajectories.uphill, torch.as_tensor(work.advantages)
    assert calls == [["images", "prompt_metadata", "prompts"], (2,)] * 2
    torch.testing.assert_close(mine.found[1], 2 * usual.found[1])
    r = usual.found[1].view(-1, 1, 1, 1)
    torch.testing.assert_close(mine.found[0], -8 * r * usual.found[0], rtol=1e-3, atol=1e-7)

def test_what_would_not_be_called_or_cannot_be_is_refused_in_one_line(folder):
    def refused(argument, kind=AlignPropTrainer, reward=warmth, **kw):
        with pytest.raises(InputError, match=f"^{argument}: ") as e: make(folder, kind, reward, **kw).epoch()
        assert "\n" not in str(e.value)
    class Samples(AlignPropTrainer):
        def _generate_samples(self, batch_size, with_grad=True, prompts=None): return {}
    refused("_generate_samples", Samples)
    class Odd(AlignPropTrainer):
        def calculate_loss(self, rewards): return rewards
    refused("calculate_loss", Odd)
    class Elsewhere(AlignPropTrainer):
        def calculate_loss(self, rewards): return self.trainable_layers[0].sum() ** 2
    refused("calculate_loss", Elsewhere)
    class Ddpo(DDPOTrainer):
        def compute_rewards(self, prompt_image_pairs, is_async=False): return (), ()
    refused("compute_rewards", Ddpo)
    refused("reward_function", reward=jpeg_compressibility)
    with pytest.raises(InputError, match="^config: a DDPOConfig is no AlignPropConfig"):
        AlignPropTrainer(DDPOConfig(), warmth, prompt, DefaultDDPOStableDiffusionPipeline(folder))

def fixed_at(cut): return dict(truncated_backprop_rand=False, truncated_backprop_timestep=cut)

@pytest.mark.parametrize("settings,message", [
    (dict(truncated_rand_backprop_minmax=(50, 0)), "truncated_rand_backprop_minmax: .*where to cut"),
    (dict(truncated_rand_backprop_minmax="0"), "truncated_rand_backprop_minmax: .*where to cut"),
    (dict(truncated_rand_backprop_minmax=(50, 60)), "truncated_rand_backprop_minmax: no gradient is left"),
    (fixed_at(50), "truncated_backprop_timestep: no gradient is left"),
    (fixed_at(-1), "truncated_backprop_timestep: .*where to cut"),
    (dict(truncated_backprop_rand="maybe"), "truncated_backprop_rand: 'maybe' is not of type bool"),
    (dict(log_image_freq=0), "log_image_freq: 0 is not positive"),
    (dict(train_batch_size=0), "train_batch_size: 0 is not positive"),
    (dict(algorithm="ddpo-is"), "algorithm: 'ddpo-is' is not what"),
    (dict(train_clip_range=0.1), "train_clip_range: alignprop does nothing"),
    (dict(mixed_precision="tf32"), "mixed_precision: there is no 'tf32'"),
])
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(InputError, match=f"^{message}") as e: AlignPropConfig(**settings)
    assert "\n" not in str(e.value)

def test_settings_that_do_nothing_as_others_stand_are_told():
    assert any("truncated_backprop_timestep" in o for o in idle_notes(
        AlignPropConfig(truncated_backprop_timestep=10)))
    assert not any("truncated" in o for o in idle_notes(AlignPropConfig()))
    assert AlignPropConfig(mixed_precision="none").mixed_precision == "no"

def test_resumed_to_the_same_bits(folder, tmp_path):
    whole = make(folder, num_epochs=3, logdir=str(tmp_path/"a"), run_name="a")
    whole.train(progress=False)
    make(folder, num_epochs=2, logdir=str(tmp_path/"b"), run_name="b").train(progress=False)
    again = make(
        folder, num_epochs=3, logdir=str(tmp_path/"b"), run_name="b", resume_from=str(tmp_path/"b/b"))
    again.train(progress=False)
    assert torch.equal(weights(again), weights(whole))

# What a user of TRL would have in a file: its example's shape, in words of our own
SCRIPT = '''
from dataclasses import dataclass, field
import numpy as np
from transformers import HfArgumentParser
from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline
from trl.models.auxiliary_modules import aesthetic_scorer

@dataclass
class ScriptArguments:
    pretrained_model: str = field(default="runwayml/stable-diffusion-v1-5", metadata={"help": "the model"})
    scorer: str = field(default="trl-lib/ddpo-aesthetic-predictor", metadata={"help": "the scorer's weights"})
    file: str = field(default="aesthetic-model.pth", metadata={"help": "their file"})
    use_lora: bool = field(default=True, metadata={"help": "LoRA"})

def prompt_fn(): return np.random.choice(["cat", "dog", "bee"]), {}

def log_images(pair, global_step, tracker):
    images, prompts, _ = pair["images"], pair["prompts"], pair["rewards"]
    tracker.log_images({f"{p}": o.unsqueeze(0).float() for p, o in zip(prompts, images)}, step=global_step)

if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, AlignPropConfig))
    script_args, training_args = parser.parse_args_into_dataclasses()
    training_args.project_kwargs = {
        "logging_dir": "./logs", "automatic_checkpoint_naming": True, "total_limit": 5,
        "project_dir": "./save"
    }
    pipeline = DefaultDDPOStableDiffusionPipeline(
        script_args.pretrained_model, pretrained_model_revision="main", use_lora=script_args.use_lora)
    trainer = AlignPropTrainer(
        training_args, aesthetic_scorer(script_args.scorer, script_args.file), prompt_fn, pipeline,
        image_samples_hook=log_images)
    trainer.train()
    trainer.save_model(training_args.output_dir)
'''
FLAGS = ("--num_epochs 2 --train_gradient_accumulation_steps 2 --sample_num_steps 5 --train_batch_size 2"
         " --mixed_precision no")

def run_script(source, folder, place, monkeypatch):
    "With its import lines changed, and a scorer that needs no weights of gigabytes."
    source, n = re.subn(r"(?m)^from trl(?=[. ])", "from ddpo_nb", source)
    assert n == 2
    monkeypatch.chdir(place)
    monkeypatch.setattr(auxiliary_modules, "aesthetic_scorer", lambda model_id, file: warmth)
    monkeypatch.setattr(sys, "argv", ["alignprop.py", "--pretrained_model", folder, *FLAGS.split()])
    monkeypatch.setitem(sys.modules, "__main__", module := type(sys)("__main__"))
    np.random.seed(0)
    exec(compile(source, "alignprop.py", "exec"), vars(module))
    rows = [json.loads(o) for o in (place/"save/metrics.jsonl").read_text().splitlines()]
    assert [(r["queries"], r["algorithm"]) for r in rows] == [(4, "alignprop"), (8, "alignprop")]
    assert (place/"save/model/pytorch_lora_weights.safetensors").is_file()

def test_a_trl_script_runs(folder, tmp_path, monkeypatch): run_script(SCRIPT, folder, tmp_path, monkeypatch)

# where benchmarks/trl_agreement.py keeps it
THEIRS = Path("~/.cache/ddpo_nb/trl-0.23.1").expanduser().glob(
    "lib/*/site-packages/examples/scripts/alignprop.py")

@pytest.mark.skipif(not (found := [*THEIRS]), reason="TRL's sources are not here")
def test_trl_s_own_script_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", os.environ.get("TRACKIO_SPACE_ID", ""))
    run_script(found[0].read_text(encoding="utf-8"), folder, tmp_path, monkeypatch)
