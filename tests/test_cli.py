"The command line: what it writes, what it prints, and how it answers bad input (FIELD's trap 12 among it)."
import json
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from ddpo_nb import cli
from ddpo_nb.cli import config_fields, main

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

tiny = (
    "--queries 4 --evaluation-samples 2 --sample-num-steps 2 --train-batch-size 2 --sample-batch-size 2"
    " --sample-num-batches-per-epoch 1 --train-num-inner-epochs 1 --rwr-draws 1 --no-progress"
)

@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    (tmp_path/"r.py").write_text("""
from helper import mean
def good(images, prompts, metadata): return mean(images), {}
def nan(images, prompts, metadata): return mean(images) * float("nan"), {}
def short(images, prompts, metadata): return mean(images)[1:], {}
def boom(images, prompts, metadata): return prompts["first"], {}
""")
    (tmp_path/"helper.py").write_text("def mean(images): return images.mean((1, 2, 3))\n")
    (tmp_path/"broken.py").write_text("def f(:\n")
    (tmp_path/"empty.txt").write_text("\n")
    (tmp_path/"full").mkdir()
    (tmp_path/"full/thesis.tex").write_text("precious")
    (tmp_path/"nomodel").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.fixture
def run(capsys):
    "Run a command line; its status, standard output and standard error"
    def go(line):
        capsys.readouterr()
        status = main(shlex.split(line))
        return status, *capsys.readouterr()
    return go

def files(folder):
    return sorted(str(o.relative_to(folder)) for o in folder.rglob("*") if "__pycache__" not in o.parts)

@pytest.mark.parametrize(
    "line,words",
    [
        ("train --algorithm ppo", "--algorithm ppo ddpo-is rwr-sparse"),
        ("compare --algorithms ddpo-is,ppo", "--algorithms ppo rwr-sparse"),
        ("compare --algorithms rwr,rwr", "--algorithms twice"), ("compare --seeds 0,a", "--seeds 'a' whole"),
        ("compare --seeds 1,1", "--seeds twice"), ("compare --seeds=-1", "--seeds -1 whole"),
        ("compare --queries 0", "--queries above"), ("compare --queries many", "--queries above"),
        ("train --seed x", "--seed whole"), ("train --epochs 2 --queries 8", "--epochs --queries one"),
        ("train --epochs 2 --num-epochs 3", "--epochs --num-epochs one"),
        ("train --num_epochs 2 --queries 8", "--epochs --queries one"),
        ("compare --num-epochs 3", "--num-epochs --help"),
        ("train --train-cfg maybe", "--train-cfg maybe --no-train-cfg"),
        ("train --no-train_cfg true", "--no-train-cfg true"),
        ("train --logdir a --output b", "--logdir a b one"),
        ("train --run-name a --output b", "--run-name runs/a b one"),
        ("train --resume-from full", "--resume-from full folder"),
        ("train --resume_from nowhere", "--resume-from nowhere folder"),
        ("train --hub-model-id ada/x", "--hub-model-id --push-to-hub"),
        ("train --push-to-hub", "--push-to-hub USER/NAME"),
        ("train --push-to-hub ada/x --hub-model-id ada/y", "--push-to-hub ada/x --hub-model-id ada/y one"),
        (
            "train --accelerator-kwargs '{\"gradient_accumulation_steps\": 4}'",
            "accelerator_kwargs train_gradient_accumulation_steps"
        ),
        ("train --sample-num-steps 0", "--sample-num-steps above"),
        ("train --sample-num-steps two", "--sample-num-steps whole"),
        ("train --sample-eta 1.5", "--sample-eta [0,"), ("train --sample-eta 0", "--sample-eta (0, RWR"),
        (
            "train --sample-batch-size 6 --sample-num-batches-per-epoch 1 --train-batch-size 5",
            "--train-batch-size divide",
        ),
        ("train --train-learning-rate nan", "--train-learning-rate number"),
        ("compare --reward beauty", "--reward beauty jpeg_compressibility"),
        ("train --reward r.py", "--reward r.py:function"),
        ("train --reward none.py:f", "--reward none.py file"), ("train --reward r.py:none", "--reward none"),
        ("train --prompts nowhere.txt", "--prompts nowhere.txt simple_animals"),
        ("train --prompts empty.txt", "--prompts empty.txt one"),
        ("train --model ./nowhere", "--model nowhere emoji-sd"),
        ("train --model nomodel", "--model model_index.json emoji-sd"),
        ("train --model nonsense", "--model nonsense emoji-sd"),
        ("compare --output full", "--output 'full' new"), ("compare --output r.py", "--output r.py folder"),
        ("compare --output r.py/x", "--output folder"),
        ("compare --set rwr.nothing=1", "--set rwr.nothing rwr.rwr_beta=0.5"),
        ("compare --set rwr.rwr_beta=hot", "--set hot float"),
        ("compare --set rwr.sample_num_steps=3", "--sample-num-steps alike"),
        ("compare --bogus 1", "--bogus --help"), ("bogus", "bogus compare"),
        ("sample --output a.png", "--prompt required"),
        ("sample --prompt cat --output a.gif", "--output a.gif .png"),
        ("sample --prompt cat --output a.png --steps 0", "--steps above"),
        ("sample --prompt cat --output a.png --steps 1001", "--steps 1000"),
        ("sample --prompt cat --output a.png --lora nowhere", "--lora nowhere"),
        ("sample --prompt cat --output r.py/a.png --steps 1", "--output write folder"),
        ("evaluate --samples 0", "--samples above"), ("evaluate --reward beauty", "--reward beauty"),
        ("evaluate --eta 2", "--eta [0,"), ("evaluate --unet nowhere", "--network"),
        (f"train {tiny} --reward r.py:nan --output out", "nan finite"),
        (f"train {tiny} --reward r.py:short --output out", "short 1 2"),
        ("evaluate --samples 2 --steps 1 --reward r.py:nan", "nan finite")
    ],
)
def test_bad_input_is_answered_in_one_line_and_nothing_is_written(line, words, run, scratch):
    before = files(scratch)
    status, out, err = run(line)
    assert status == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err, err
    assert [w for w in words.split() if w not in err] == [], err
    assert files(scratch) == before

@pytest.mark.parametrize(
    "line",
    [
        f"train {tiny} --reward r.py:boom --output out", "evaluate --samples 2 --steps 1 --reward r.py:boom",
        "train --reward broken.py:f"
    ],
)
def test_a_reward_that_raises_shows_its_own_traceback(line, run, scratch):
    status, out, err = run(line)
    assert status == 1 and err.startswith(("Traceback", "  File")) and "ddpo_nb/" not in err
    assert ('prompts["first"]' in err and "TypeError" in err) or "SyntaxError" in err
    assert not (scratch/"out").exists()

def test_a_reward_that_raises_later_keeps_what_is_finished(run, scratch):
    (scratch / "late.py").write_text(
        "n = 0\ndef f(images, prompts, metadata):\n    global n; n += 1\n    if n == 9: raise OSError('the"
        " judge went home')\n    return images.mean((1, 2, 3)), {}\n"
    )
    status, out, err = run(f"compare {tiny} --reward late.py:f --output out")
    assert status == 1 and "the judge went home" in err and "ddpo_nb/" not in err
    assert {
        "config.json", "report.html", "metrics.jsonl",
        "weights/ddpo-is-seed0/pytorch_lora_weights.safetensors"
    } <= {*files(scratch / "out")}
    assert not (scratch/"out/weights/rwr-seed0").exists()

def test_train_sample_evaluate(run, scratch):
    status, out, err = run(f"train {tiny} --reward r.py:good --algorithm rwr --seed 3 --output out")
    assert status == 0 and "report: out/report.html" in out, err
    assert {"config.json", "metrics.jsonl", "report.html", "curves.png", "before_after.png"} <= {
        *files(scratch / "out")
    }
    rows = [json.loads(o) for o in (scratch/"out/metrics.jsonl").read_text().splitlines()]
    assert [r["queries"] for r in rows] == [2, 4] and {
        (r["algorithm"], r["seed"], r["reward"]) for r in rows
    } == {("rwr", 3, "good")}
    assert json.loads((scratch / "out/config.json").read_text())["command"].startswith(
        "ddpo-nb train --queries 4"
    )
    lora = "out/weights/rwr-seed3"
    assert (
        run(f"sample --lora {lora} --prompt cat --prompt 'an owl' --count 3 --steps 2 --output pics/a.png")[0]
        == 0
    )
    assert Image.open("pics/a.png").size == (3 * 64, 2 * 64)
    # the same samples for every weight file: what `train` measured is what `evaluate` prints
    status, out, err = run(f"evaluate --reward r.py:good --samples 2 --steps 2 --seed 3 --lora {lora}")
    measured = json.loads((scratch/"out/results/rwr-seed3.json").read_text())["rewards"]["seen"]
    assert status == 0 and "2 pictures" in out
    assert float(out.split()[1].replace("−", "-")) == pytest.approx(sum(measured) / 2, abs=.006)

def test_full_finetuning_saves_a_unet_that_loads(run, scratch):
    assert run(f"train {tiny} --no-lora --output out")[0] == 0
    assert (scratch/"out/weights/ddpo-is-seed0/unet/diffusion_pytorch_model.safetensors").exists()
    assert run("sample --unet out/weights/ddpo-is-seed0 --prompt cat --steps 2 --output a.png")[0] == 0

def test_sampling_is_repeatable_and_does_not_depend_on_the_batch(run):
    for name, extra in dict(a="", b="", c="--batch-size 1", d="--seed 1").items():
        assert run(f"sample --prompt cat --count 3 --steps 2 --output {name}.png {extra}")[0] == 0
    a, b, c, d = (list(Image.open(f"{o}.png").tobytes()) for o in "abcd")
    assert a == b and a != d and max(abs(x - y) for x, y in zip(a, c)) <= 1

def test_interrupt_prints_how_to_go_on(run, scratch):
    (scratch / "stop.py").write_text(
        "n = 0\ndef f(images, prompts, metadata):\n    global n; n += 1\n    if n == 9: raise"
        " KeyboardInterrupt\n    return images.mean((1, 2, 3)), {}\n"
    )
    status, out, err = run(f"compare {tiny} --reward stop.py:f")
    assert status == 130 and "To go on:" in err
    line = err.strip().splitlines()[-1].split("ddpo-nb ", 1)[1]
    assert "--output runs/compare-f-" in line
    status, out, err = run(line)
    assert status == 0 and "RWR" in out and len(list((scratch/"runs").iterdir())) == 1

def test_flags_are_the_fields_of_the_config():
    from ddpo_nb.trainer import ALGORITHMS, DDPOConfig
    made = DDPOConfig()
    for (name, kind, default, comment), f in zip(config_fields(), fields(DDPOConfig), strict=True):
        assert (name, kind) == (f.name, {str | None: str}.get(f.type, f.type)) and comment
        assert default == getattr(made, name) or (default is None and (kind is dict or name == "exp_name"))
    assert cli.algorithms() == ALGORITHMS

NUMBERS = [(n, k) for n, k, *_ in config_fields() if k in (int, float) and n not in cli._of_a_run]
CHOICES = ["mixed_precision", "log_prob_reduction", "step_weighting", "log_with", "lr_scheduler", "baseline"]
# may be 0, besides those that are so by default
free = {n for n, _, default, _ in config_fields() if default == 0} | {
    "train_adam_weight_decay", "train_adam_beta1", "train_adam_beta2", "sample_guidance_scale",
    "sample_noise_level"
}

@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_bad_values_of_any_setting(run, scratch, data):
    "One line that names the flag, exit 2, nothing written"
    if data.draw(st.booleans()):
        name, kind = data.draw(st.sampled_from(NUMBERS))
        bad = (
            ["x", "", "nan", "-1", "1e400", "0x1"]
            + ([] if name in free else ["0"])
            + (["1.5", "1e3"] if kind is int else [])
        )
        value = data.draw(st.sampled_from(bad) | st.text("abcxyz ,;", min_size=1))
    else:
        name, value = data.draw(st.sampled_from(CHOICES)), data.draw(st.text("abcdefghij", min_size=1))
    flag, before = "--" + name.replace("_", "-"), files(scratch)
    status, out, err = run(f"train --output out {flag}={shlex.quote(value)}")
    assert status == 2 and out == "" and err.count("\n") == 1 and flag in err, (value, err)
    assert files(scratch) == before

FLAG = dict(
    log_with="tensorboard", mixed_precision="bf16", algorithm="rwr", log_prob_reduction="sum",
    step_weighting="variance", baseline="group", lr_scheduler="cosine", reward_pool="process",
    watch_reward="jpeg_compressibility", hub_model_id="ada/x", push_to_hub="ada/x"
)

@pytest.mark.parametrize("name,kind", [(n, k) for n, k, *_ in config_fields()])
def test_every_field_is_a_flag_under_its_own_name(name, kind):
    "With - or _, and on or off for a switch."
    text, want = {int: ("3", 3), float: ("0.5", 0.5), dict: ('{"a": 1}', {"a": 1})}.get(kind) or (
        FLAG.get(name, "text"),
    ) * 2
    parse = lambda *words: getattr(cli.make_parser().parse_args(["train", *words]), name)
    for flag in {f"--{name}", f"--{name.replace('_', '-')}"}:
        if kind is not bool or name == "push_to_hub":
            assert parse(flag, text) == parse(f"{flag}={text}") == want
        else:
            off = flag.replace("--", "--no-", 1)
            assert (
                parse(flag) is parse(flag, "True") is parse(off, flag) is True
                and parse(off) is parse(flag, "false") is False
            )
            assert parse(off.replace("--no-", "--no_")) is False and parse() is None

def test_compare_has_them_too_but_for_what_a_comparison_decides():
    known = vars(cli.make_parser().parse_args(["compare", "--seed", "3", "--algorithm", "rwr"]))
    assert known["seeds"] == [3] and known["algorithms"] == ["rwr"]
    assert {n for n, *_ in config_fields()} - known.keys() == {*cli._of_a_run}

def test_a_run_by_trls_names_is_the_run_by_ours(run, scratch):
    words = tiny.replace("--queries 4", "--num_epochs=2").replace("-", "_").replace("__", "--")
    assert run(f"train {words} --logdir logs --run_name cats --exp-name study --reward r.py:good")[0] == 0
    kept = json.loads((scratch/"logs/cats/config.json").read_text())
    assert kept["queries"] == 4 and kept["configs"]["ddpo-is"]["exp_name"] == "study"
    status, out, err = run(f"train {words} --queries 4 --resume-from logs/cats --reward r.py:good")
    assert status == 0 and "report: logs/cats/report.html" in out, err

@pytest.mark.parametrize("flag", ["tracker", "accelerator", "project"])
@pytest.mark.parametrize("value", ["{", "[1]", "3", "x"])
def test_dictionaries_are_json(run, flag, value):
    status, out, err = run(f"train --{flag}-kwargs '{value}'")
    assert status == 2 and f"--{flag}-kwargs" in err and err.count("\n") == 1

def test_help_and_errors_come_without_torch():
    code = (
        "import sys; from ddpo_nb.cli import main; s = [main(['--help']), main(['train', '--help']),"
        " main(['train', '--algorithm', 'x'])]; print(s, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "[0, 0, 2] False" and "--train-learning-rate" in out

def test_python_m_exits_with_the_status():
    res = subprocess.run(
        [sys.executable, "-m", "ddpo_nb", "train", "--prompts", "nowhere.txt"], capture_output=True, text=True
    )
    assert (
        res.returncode == 2
        and res.stderr.startswith("ddpo-nb train: --prompts")
        and res.stderr.count("\n") == 1
    )

# Recipes, plans, going on, sharing

def test_a_recipe_is_listed_planned_and_overridden(run, scratch):
    status, out, err = run("train --list-recipes")
    assert status == 0 and "a100-aesthetic-lora" in out and "emoji-compressibility" in out
    before = files(scratch)
    status, out, err = run("train --recipe a100-aesthetic-lora --dry-run")
    assert status == 0 and files(scratch) == before, err
    words = " ".join(out.split())
    for part in (
        "samples per epoch 24", "updates per epoch 8", "updates in all 1,600", "reward queries in all 4,800",
        "LoRA of rank 4", "peak"
    ):
        assert part in words, out
    out = run("train --recipe a100-aesthetic-lora --dry-run --epochs 10 --train-batch-size 6")[1]
    assert "updates in all 40" in " ".join(out.split())
    assert (
        run("train --recipe a100-aesthetic-lora --dry-run --baseline leave-one-out --samples-per-prompt 2")[0]
        == 0
    )
    status, out, err = run("train --recipe emoji-compresibility --dry-run")
    assert status == 2 and "did you mean 'emoji-compressibility'" in err and err.count("\n") == 1

def test_a_recipe_runs(run, scratch):
    assert run(f"train --recipe emoji-rwr {tiny} --output out")[0] == 0
    s = json.loads((scratch/"out/config.json").read_text())
    assert s["algorithms"] == ["rwr"] and s["reward"] == "jpeg_incompressibility" and s["queries"] == 4

@pytest.mark.parametrize(
    "line,words",
    [
        ("train --resume", "--resume runs/train-jpeg_compressibility-"),
        ("train --resume --output out", "--resume 'out'"),
        ("train --push-to-hub nobody", "--push-to-hub USER/NAME"),
        ("train --init-lora nowhere", "--init-lora 'nowhere'"),
        ("train --log-with wandb", "--log-with wandb pip")
    ],
)
def test_more_bad_input(run, scratch, line, words):
    before = files(scratch)
    status, out, err = run(line)
    assert (
        status == 2
        and out == ""
        and err.count("\n") == 1
        and [w for w in words.split() if w not in err] == []
    ), err
    assert files(scratch) == before

def test_a_lora_goes_on_training(run, scratch):
    assert run(f"train {tiny} --train-learning-rate 0.01 --output first")[0] == 0
    assert run(f"train {tiny} --init-lora first/weights/ddpo-is-seed0 --output second")[0] == 0
    seen = lambda file: json.loads((scratch/file).read_text())["rewards"]["seen"]
    # begins where the first ended
    assert seen("second/results/base-seed0.json") == seen("first/results/ddpo-is-seed0.json")
    assert seen("second/results/base-seed0.json") != seen("first/results/base-seed0.json")

def test_the_newest_run_is_found_again(run, scratch):
    assert run(f"train {tiny}")[0] == 0
    status, out, err = run(f"train {tiny} --resume")
    assert status == 0 and len(list((scratch/"runs").iterdir())) == 1, err

KWARGS = shlex.quote('{"wandb": {"entity": "ada", "settings": {"api_key": "swordfish"}}}')
OPEN = shlex.quote('{"wandb": {"entity": "ada", "settings": {}}}')

@pytest.mark.parametrize("line,clean", [
    (f"train --tracker-kwargs {KWARGS} --resume", f"train --tracker-kwargs {OPEN} --resume"),
    (f"train --accelerator-kwargs={KWARGS}", f"train --accelerator-kwargs {OPEN}"),
    ("train --hf-user-access-token swordfish --project-kwargs '{\"total_limit\":  3}'",
     "train --project-kwargs '{\"total_limit\":  3}'"),
    ("train --hf-user-access-token=swordfish --seed=3", "train --seed=3")])
def test_the_command_to_go_on_holds_no_secret(line, clean):
    assert shlex.join(cli._open_words(shlex.split(line))) == clean

def test_secrets_for_trackers_are_not_written_down(run, scratch, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["ddpo-nb", *shlex.split(f"train {tiny} --tracker-kwargs {KWARGS} --output out")]
    )
    assert main() == 0 and "swordfish" not in f"{sys.argv}{capsys.readouterr()}"
    written = json.loads((scratch/"out/config.json").read_text())["command"]
    assert f"--tracker-kwargs {OPEN}" in written
    assert not [o for o in scratch.rglob("*") if o.is_file() and b"swordfish" in o.read_bytes()]

def test_push_to_hub(run, scratch, monkeypatch):
    import huggingface_hub
    from hub_server import TOKEN, Server
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"): monkeypatch.delenv(name, raising=False)
    with Server() as s:
        for name, value in dict(
            ENDPOINT=s.url, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True,
            HF_TOKEN_PATH=str(scratch / "hf/token")
        ).items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        status, out, err = run(
            f"train {tiny} --push-to-hub ada/tidy --hf-user-access-token {TOKEN} --output out"
        )
        assert status == 0 and "uploaded: " in out, err
        there = s.files("ada/tidy")
        assert {
            "README.md", "pytorch_lora_weights.safetensors", "before_after.png", "curves.png",
            "metrics.jsonl", "config.json"
        } <= {*there}
        assert (
            there["pytorch_lora_weights.safetensors"]
            == (scratch / "out/weights/ddpo-is-seed0/pytorch_lora_weights.safetensors").read_bytes()
        )
        assert any(TOKEN in h.get("authorization", h.get("Authorization", "")) for _, _, h, _ in s.requests)
        everything = (
            [o.read_bytes() for o in scratch.rglob("*") if o.is_file()]
            + [bytes(v) for v in there.values()]
            + [out.encode(), err.encode()]
        )
        assert not any(TOKEN.encode() in o for o in everything)
        status, out, err = run(
            f"train {tiny} --push-to-hub ada/tidy --hf-user-access-token hf_wrong --output other"
        )
        assert status == 1 and err.count("\n") == 1 and not (scratch/"other").exists(), err

def test_a_sum_of_rewards_is_trained_on_watched_and_kept_in_a_folder_with_a_plain_name(
    run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(
        "train --reward 'jpeg_compressibility - 2*clip_alignment' --watch-reward jpeg_incompressibility"
        " --stop-patience 3 --kl-coef 0.1 --sample-num-steps 2 --sample-batch-size 4 --train-batch-size 4"
        " --queries 8 --evaluation-samples 2 --no-progress"
    )
    assert status == 0, err
    (folder,) = (tmp_path/"runs").iterdir()
    assert folder.name.startswith("train-jpeg_compressibility_-_2_clip_alignment-20")
    rows = [json.loads(o) for o in (folder/"metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for r in rows:
        parts = r["reward_info"]
        assert r["reward_mean"] == pytest.approx(
            parts["reward/jpeg_compressibility"] - 2 * parts["reward/clip_alignment"]
        ) and r["watch_mean"] == pytest.approx(-parts["reward/jpeg_compressibility"])
        assert r["kl_pretrained"] >= 0

@pytest.mark.parametrize(
    "flags,says",
    [
        ("--watch-reward beauty", "--watch-reward: there is no reward named 'beauty'"),
        ("--stop-patience 2", "--stop-patience: no reward is watched"),
        ("--algorithm rwr --kl-coef 0.1", "--kl-coef: RWR"),
        ("--reward jpeg_compressibility+beauty", "--reward: there is no reward named 'beauty'"),
    ],
)
def test_what_cannot_be_watched_or_summed(run, tmp_path, flags, says):
    status, out, err = run(f"train {flags} --output {tmp_path/'run'}")
    assert status == 2 and says in err and err.count("\n") == 1 and not (tmp_path/"run").exists()

# Terminals

def terminal(code, **env):
    import os
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True,
        env={k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONUTF8"))} | env,
    )

def test_a_terminal_that_knows_ascii_only():
    code = (
        "import sys; from ddpo_nb import cli; cli._main = lambda *a: print('−0.5 ± 0.1, 64×64 … “ä” \\ud800"
        " α') or 3; sys.exit(cli.main(['x']))"
    )
    out = terminal(code, PYTHONIOENCODING="ascii", LANG="C")
    assert out.returncode == 3 and out.stderr == b"" and out.stdout == b'-0.5 +/- 0.1, 64x64 ... "?" ? ?\n'
    assert terminal(code, PYTHONIOENCODING="utf-8").stdout.decode() == "−0.5 ± 0.1, 64×64 … “ä” ? α\n"

def test_help_and_errors_on_such_a_terminal():
    code = (
        "import sys; from ddpo_nb.cli import main; main(['train', '--help']); main(['train', '--queries',"
        " '−1']); main(['compare', '--algorithms', '€'])"
    )
    out = terminal(code, PYTHONIOENCODING="ascii", LANG="C", LC_ALL="C")
    assert out.returncode == 0 and b"Traceback" not in out.stderr and out.stderr.count(b"\n") == 2

def test_a_reader_that_has_had_enough():
    code = (
        "import sys, time; from ddpo_nb import cli; cli._main = lambda *a: [print('x' * 9999) for i in"
        " range(99)] and 0; sys.exit(cli.main(['x']))"
    )
    out = subprocess.run(
        f'{sys.executable} -c "{code}" | head -c 1; echo ${{PIPESTATUS[0]}}', shell=True,
        executable="/bin/bash", capture_output=True, text=True
    )
    assert out.stderr == "" and out.stdout == "x141\n"

# A full disk

@pytest.mark.parametrize("where", ["weights", "results", "report.html", "metrics.jsonl"])
def test_a_full_disk_is_one_line_and_what_is_finished_stays(run, scratch, monkeypatch, where):
    import os
    from safetensors import SafetensorError
    from ddpo_nb import checkpoints
    from ddpo_nb.policy import StableDiffusionPolicy
    replace = os.replace
    def full(source, target):
        if f"out/{where}" in str(target): raise OSError(28, "No space left on device")
        replace(source, target)
    def full_for_weights(self, folder):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    if where == "weights":
        save = StableDiffusionPolicy.save_pretrained
        monkeypatch.setattr(
            StableDiffusionPolicy, "save_pretrained",
            lambda self, folder: (full_for_weights if "out/weights" in str(folder) else save)(self, folder),
        )
    monkeypatch.setattr(checkpoints.os, "replace", full)
    status, out, err = run(f"train {tiny} --reward r.py:good --output out")
    assert (
        status == 1
        and out == ""
        and err.count("\n") == 1
        and "No space left on device" in err
        and "kept" in err
    ), err
    assert not list((scratch/"out").rglob(".writing-*")) and not (scratch/"out/.lock").exists()
    if where != "results": assert (scratch/"out/results/base-seed0.json").exists()
    monkeypatch.undo()
    monkeypatch.chdir(scratch)
    assert run(f"train {tiny} --reward r.py:good --output out")[0] == 0  # there is room again
