"Configs as TRL's users make them: by HfArgumentParser, tyro, YAML, and in subclasses."
from __future__ import annotations
import copy, dataclasses
from dataclasses import dataclass, field
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from ddpo_nb import DDPOConfig, RWRConfig
from ddpo_nb.prompts import InputError
from ddpo_nb.trainer import idle_notes, make_config

@dataclass
class ScriptArguments:
    pretrained_model: str = field(
        default="runwayml/stable-diffusion-v1-5", metadata={"help": "the pretrained model to use"}
    )
    use_lora: bool = field(default=True, metadata={"help": "Whether to use LoRA."})

@dataclass
class MyConfig(DDPOConfig):
    "Annotations are texts here: see the first line of this file."
    clip_model: str | None = None
    weights: list[float] = field(default_factory=lambda: [1.0])
    train_learning_rate: float = 1e-5

LINE = """--num_epochs 200 --train_gradient_accumulation_steps 1 --sample_num_steps 50 --sample_batch_size 6
          --train_batch_size 3 --sample_num_batches_per_epoch 4 --per_prompt_stat_tracking True
          --per_prompt_stat_tracking_buffer_size 32 --tracker_project_name stable_diffusion_training
          --log_with tensorboard --no_train_cfg""".split()

@pytest.mark.parametrize("kind", [DDPOConfig, RWRConfig, MyConfig])
def test_hf_argument_parser_as_often_as_one_likes(kind):
    from transformers import HfArgumentParser
    pytest.importorskip("tensorboard")
    for _ in range(2):
        script, c = HfArgumentParser((ScriptArguments, kind)).parse_args_into_dataclasses(
            [*LINE, "--use_lora", "False", *(["--rwr_rewards", "normalized"] if kind is RWRConfig else [])]
        )
        assert (
            c.num_epochs, c.sample_batch_size, c.per_prompt_stat_tracking, c.train_cfg, c.log_with,
            script.use_lora
        ) == (200, 6, True, False, "tensorboard", False)
    for again in (
        DDPOConfig(), RWRConfig(), MyConfig(), dataclasses.replace(c, seed=3), copy.deepcopy(c),
        make_config("rwr")
    ):
        assert again.seed in (0, 3)
    with pytest.raises(InputError, match="^log_with: "): DDPOConfig(log_with="nowhere")

def test_hf_argument_parser_from_a_yaml_file(tmp_path):
    from transformers import HfArgumentParser
    (tmp_path / "c.yaml").write_text(
        "train_learning_rate: 1e-5\nnum_epochs: 3\nrun_name: null\nproject_kwargs: {project_dir:"
        " save}\nlog_with: null\nsample_eta: 1\n"
    )
    c, = HfArgumentParser(DDPOConfig).parse_yaml_file(str(tmp_path/"c.yaml"))
    assert (c.train_learning_rate, c.num_epochs, c.run_name, c.project_kwargs, c.log_with, c.sample_eta) == (
        1e-5, 3, "", {"project_dir": "save"}, None, 1.0
    )

def test_tyro():
    tyro = pytest.importorskip("tyro")
    @dataclass
    class Script:
        model: str = "x"
        ddpo: DDPOConfig = field(default_factory=lambda: DDPOConfig(num_epochs=7, mixed_precision="no"))
    got = tyro.cli(
        Script,
        args=[
            "--ddpo.sample-num-steps", "10", "--ddpo.train-learning-rate", "1e-5",
            "--ddpo.per-prompt-stat-tracking", "--ddpo.log-with", "None"
        ],
    )
    assert (
        got.ddpo.num_epochs, got.ddpo.sample_num_steps, got.ddpo.train_learning_rate,
        got.ddpo.per_prompt_stat_tracking
    ) == (7, 10, 1e-5, True)
    assert tyro.cli(DDPOConfig, args=["--seed", "3"]).seed == 3

def test_a_subclass_keeps_its_own_fields():
    c = MyConfig(clip_model=3, weights="mine", num_epochs="2")
    # its own are not our business, ours are
    assert (c.clip_model, c.weights, c.num_epochs, c.train_learning_rate) == (3, "mine", 2, 1e-5)
    with pytest.raises(InputError, match="^num_epochs: "): MyConfig(num_epochs="two")

TEXTS = [f.name for f in dataclasses.fields(DDPOConfig) if isinstance(f.default, str)]
CHOICES = {
    "algorithm", "log_prob_reduction", "step_weighting", "baseline", "lr_scheduler", "reward_pool",
    "rwr_normalizer", "rwr_rewards", "sample_sde", "quantize", "nft_space", "alignprop_draw"
}

@pytest.mark.parametrize("name", TEXTS)
def test_no_text_is_none(name):
    if name in CHOICES:
        with pytest.raises(InputError, match=f"^{name}: "):
            DDPOConfig(**{name: None})
    else:
        assert getattr(DDPOConfig(**{name: None}), name) == {
            "mixed_precision": "no", "tracker_project_name": "trl"
        }.get(name, "")

@given(
    st.sampled_from([int, float, str, np.int64, np.int32, np.float64, torch.tensor]), st.integers(1, 10**6)
)
def test_a_count_is_a_count_however_it_is_written(kind, n):
    assert type(v := DDPOConfig(num_epochs=kind(n)).num_epochs) is int and v == n

@given(st.sampled_from([float, str, repr, np.float64, torch.tensor]), st.floats(1e-8, 1e3))
def test_a_number_is_a_number_however_it_is_written(kind, x):
    assert DDPOConfig(train_learning_rate=kind(x)).train_learning_rate == pytest.approx(x, rel=1e-6)

@pytest.mark.parametrize(
    "bad",
    [
        dict(num_epochs=2.5), dict(num_epochs="2.5"), dict(num_epochs=None), dict(num_epochs=[2]),
        dict(num_epochs=np.array([2])), dict(num_epochs=True), dict(num_epochs=float("inf")),
        dict(num_epochs=float("nan")), dict(train_learning_rate="fast"), dict(train_learning_rate="nan"),
        dict(train_learning_rate=None), dict(train_cfg=2), dict(train_cfg=None), dict(train_cfg="maybe"),
        dict(tracker_kwargs=[1]), dict(tracker_kwargs="x"), dict(run_name=3), dict(run_name=["a"]),
        dict(sample_guidance_scale=-1), dict(sample_eta=0), dict(sample_eta=-1),
        dict(algorithm="ddpo-sf", sample_eta="0", train_batch_size=2), dict(mixed_precision="fp8"),
        dict(log_with="")
    ],
)
def test_the_rest_is_refused_in_one_line(bad):
    with pytest.raises(InputError) as e: DDPOConfig(**bad)
    assert str(e.value).split(":")[0] in bad and "\n" not in str(e.value)

def test_paths_switches_and_dictionaries():
    c = DDPOConfig(
        logdir=Path("a") / "b", train_cfg="False", allow_tf32=0, per_prompt_stat_tracking=np.bool_(True),
        project_kwargs=None, tracker_kwargs={"wandb": {"name": "x"}}
    )
    assert (c.logdir, c.train_cfg, c.allow_tf32, c.per_prompt_stat_tracking, c.project_kwargs) == (
        "a/b", False, False, True, {}
    )
    assert c.to_dict()["tracker_kwargs/wandb"] == {"name": "x"}

def test_no_guidance_and_no_noise():
    assert DDPOConfig(sample_guidance_scale=0).sample_guidance_scale == 0
    assert [RWRConfig(algorithm=a, sample_eta=0).sample_eta for a in ("rwr", "rwr-sparse")] == [0, 0]

def test_accelerates_own_limit_of_checkpoints_is_ours():
    make = lambda **kw: DDPOConfig(mixed_precision="no", **kw)
    assert make(project_kwargs=dict(total_limit=2)).num_checkpoint_limit == 2
    assert make(project_kwargs=dict(total_limit=2), num_checkpoint_limit=2).num_checkpoint_limit == 2
    assert make(project_kwargs=dict(total_limit=None), num_checkpoint_limit=3).num_checkpoint_limit == 3
    with pytest.raises(InputError, match=r"^project_kwargs\['total_limit'\]: it is 2, .*set num_"):
        make(project_kwargs=dict(total_limit=2), num_checkpoint_limit=3)
    for limit in (0, -1, "3", 2.5, True):
        with pytest.raises(InputError, match=r"^project_kwargs\['total_limit'\]: "):
            make(project_kwargs=dict(total_limit=limit))

@pytest.mark.parametrize("name, value", [("iteration", 3), ("save_on_each_node", True), ("project_dir", 3)])
def test_what_a_project_configuration_would_do_nothing_with_is_refused(name, value):
    with pytest.raises(InputError, match=rf"^project_kwargs\['{name}'\]: "):
        DDPOConfig(mixed_precision="no", project_kwargs={name: value})

def test_what_a_project_configuration_does():
    usual = dict(iteration=0, save_on_each_node=False, automatic_checkpoint_naming=True, total_limit=None)
    c = DDPOConfig(mixed_precision="no", project_kwargs=usual | dict(logging_dir="logs"))
    assert [o for o in idle_notes(c) if "logging_dir" in o] and c.num_checkpoint_limit == 5
