"""`~` is the home folder wherever a path can be given: a shell leaves that of --output=~/run alone, and a
config file knows no shell."""
import argparse
import os
from pathlib import Path

import pytest

from ddpo_nb import cli
from ddpo_nb.prompts import InputError

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path/"home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path/"home").mkdir()
    yield tmp_path/"home"
    assert not [o for o in os.listdir(tmp_path) if o.startswith("~")]

def path_options():
    "(command, option, action) of everything that names a place"
    commands = next(
        a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction)
    ).choices
    no_path = {"--vlm-url", "--push-to-hub", "--hub-model-id", "--run-name"}
    for command, p in commands.items():
        for a in p._actions:
            words = f"{a.metavar} {a.help}".lower()
            if (
                any(o in words for o in ("dir", "file", "folder", ".txt", ".png"))
                and a.option_strings
                and a.nargs != 0
                and a.type is None
                and not {*a.option_strings} & no_path
                and not a.const
            ):
                yield command, p, a

OPTIONS = [*path_options()]

def test_the_walk_finds_them_all():
    found = {o for _, _, a in OPTIONS for o in a.option_strings}
    assert {
        "--model", "--reward", "--prompts", "--output", "--lora", "--network", "--init-lora", "--ratings",
        "--images", "--clip", "--cache"
    } <= found

@pytest.mark.parametrize(
    "command,parser,action", OPTIONS, ids=[f"{c}{a.option_strings[0]}" for c, _, a in OPTIONS]
)
def test_every_path_option_knows_the_home_folder(command, parser, action, home):
    others = [
        w for a in parser._actions if a.required and a is not action for w in (a.option_strings[0], "x")
    ]
    value = "~/x.py:f" if action.dest == "reward" else "~/x"
    for words in ([action.option_strings[0], value], [f"{action.option_strings[0]}={value}"]):
        args = cli.make_parser().parse_args([command, *others, *words])
        assert getattr(args, action.dest) in (
            str(home / value[2:]), [str(home / value[2:])]
        ), action.option_strings

def test_files_of_all_kinds_are_read_from_and_written_to_it(home, capsys):
    (home/"r.py").write_text("def f(images, prompts, metadata): return images.mean((1, 2, 3)), {}")
    (home/"p.txt").write_text("a bear\n")
    assert (
        cli.main("sample --prompt bear --steps 1 --output=~/pics/a.png".split()) == 0
        and (home / "pics/a.png").is_file()
    )
    assert cli.main("evaluate --samples 1 --steps 1 --reward=~/r.py:f --prompts=~/p.txt".split()) == 0
    assert "f: " in capsys.readouterr().out

def test_python_knows_it_too(home):
    import numpy as np
    from ddpo_nb.aesthetic import find_images, read_ava
    from ddpo_nb.clip import load_embedder
    from ddpo_nb.compare import Comparison
    from ddpo_nb.policy import ModelError, StableDiffusionPolicy, load_pipeline
    from ddpo_nb.run import _home
    from ddpo_nb.taste import BradleyTerry, Clicks
    from ddpo_nb.trainer import DDPOConfig
    policy = StableDiffusionPolicy(load_pipeline(), num_steps=1)
    policy.save_pretrained("~/w")
    assert (home/"w/pytorch_lora_weights.safetensors").is_file() and load_pipeline(lora="~/w")
    load_pipeline().save_pretrained(home/"model")
    assert load_pipeline("~/model").unet.config.in_channels == policy.pipeline.unet.config.in_channels
    for bad in (lambda: load_pipeline("~/nowhere"), lambda: load_embedder("~/nowhere")):
        with pytest.raises(ModelError): bad()
    BradleyTerry(np.zeros(2)).save("~/t/head.safetensors")
    assert (home/"t/head.safetensors").is_file() and BradleyTerry.load("~/t/head.safetensors").clicks == 0
    Clicks("~/c.jsonl").add(dict(prompt="a", seed=0), dict(prompt="b", seed=1), "a")
    assert len(Clicks("~/c.jsonl")) == 1
    (home/"AVA.txt").write_text("1 953619 0 1 5 17 38 36 15 6 5 1 1 22 1396\n")
    (home/"953619.jpg").touch()
    assert find_images("~", read_ava("~/AVA.txt").ids) == {953619: home/"953619.jpg"}
    assert _home(DDPOConfig(logdir="~/logs", run_name="x")) == home/"logs/x"
    with pytest.raises(InputError, match=str(home)): Comparison.load("~/nowhere")
