"The command line: what it writes, what it prints, and how it answers bad input (FIELD's trap 12 among it)."
import json
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from ddpo_nb import cli
from ddpo_nb.cli import config_fields, main

tiny = "--queries 4 --evaluation-samples 2 --sample-num-steps 2 --train-batch-size 2 --sample-batch-size 2 --sample-num-batches-per-epoch 1 --train-num-inner-epochs 1 --rwr-draws 1 --no-progress"

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

def files(folder): return sorted(str(o.relative_to(folder)) for o in folder.rglob("*") if "__pycache__" not in o.parts)

@pytest.mark.parametrize("line,words", [
    ("train --algorithm ppo", "--algorithm ppo ddpo-is rwr-sparse"), ("compare --algorithms ddpo-is,ppo", "--algorithms ppo rwr-sparse"),
    ("compare --algorithms rwr,rwr", "--algorithms twice"), ("compare --seeds 0,a", "--seeds 'a' whole"), ("compare --seeds 1,1", "--seeds twice"), ("compare --seeds=-1", "--seeds -1 whole"),
    ("compare --queries 0", "--queries above"), ("compare --queries many", "--queries above"), ("train --seed x", "--seed whole"), ("train --epochs 2 --queries 8", "--epochs --queries one"),
    ("train --sample-num-steps 0", "--sample-num-steps above"), ("train --sample-num-steps two", "--sample-num-steps whole"), ("train --sample-eta 1.5", "--sample-eta (0,"),
    ("train --sample-batch-size 6 --sample-num-batches-per-epoch 1 --train-batch-size 5", "--train-batch-size divide"), ("train --train-learning-rate nan", "--train-learning-rate number"),
    ("compare --reward beauty", "--reward beauty jpeg_compressibility"), ("train --reward r.py", "--reward r.py:function"), ("train --reward none.py:f", "--reward none.py file"),
    ("train --reward r.py:none", "--reward none"), ("train --prompts nowhere.txt", "--prompts nowhere.txt simple_animals"), ("train --prompts empty.txt", "--prompts empty.txt one"),
    ("train --model ./nowhere", "--model nowhere emoji-sd"), ("train --model nomodel", "--model model_index.json emoji-sd"), ("train --model nonsense", "--model nonsense emoji-sd"),
    ("compare --output full", "--output 'full' new"), ("compare --output r.py", "--output r.py folder"), ("compare --output r.py/x", "--output folder"),
    ("compare --set rwr.nothing=1", "--set rwr.nothing=1 rwr.rwr_beta=0.5"), ("compare --set rwr.rwr_beta=hot", "--set hot float"), ("compare --set rwr.sample_num_steps=3", "--sample-num-steps alike"),
    ("compare --bogus 1", "--bogus --help"), ("bogus", "bogus compare"), ("sample --output a.png", "--prompt required"), ("sample --prompt cat --output a.gif", "--output a.gif .png"),
    ("sample --prompt cat --output a.png --steps 0", "--steps above"), ("sample --prompt cat --output a.png --steps 1001", "--steps 1000"),
    ("sample --prompt cat --output a.png --lora nowhere", "--lora nowhere"), ("sample --prompt cat --output r.py/a.png --steps 1", "--output write folder"),
    ("evaluate --samples 0", "--samples above"), ("evaluate --reward beauty", "--reward beauty"), ("evaluate --eta 2", "--eta (0,"), ("evaluate --unet nowhere", "--unet nowhere"),
    (f"train {tiny} --reward r.py:nan --output out", "nan finite"), (f"train {tiny} --reward r.py:short --output out", "short 1 2"),
    ("evaluate --samples 2 --steps 1 --reward r.py:nan", "nan finite")])
def test_bad_input_is_answered_in_one_line_and_nothing_is_written(line, words, run, scratch):
    before = files(scratch)
    status, out, err = run(line)
    assert status == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err, err
    assert [w for w in words.split() if w not in err] == [], err
    assert files(scratch) == before

@pytest.mark.parametrize("line", [f"train {tiny} --reward r.py:boom --output out", "evaluate --samples 2 --steps 1 --reward r.py:boom", "train --reward broken.py:f"])
def test_a_reward_that_raises_shows_its_own_traceback(line, run, scratch):
    status, out, err = run(line)
    assert status == 1 and err.startswith(("Traceback", "  File")) and "ddpo_nb/" not in err
    assert ('prompts["first"]' in err and "TypeError" in err) or "SyntaxError" in err
    assert not (scratch/"out").exists()

def test_a_reward_that_raises_later_keeps_what_is_finished(run, scratch):
    (scratch/"late.py").write_text("n = 0\ndef f(images, prompts, metadata):\n    global n; n += 1\n    if n == 9: raise OSError('the judge went home')\n    return images.mean((1, 2, 3)), {}\n")
    status, out, err = run(f"compare {tiny} --reward late.py:f --output out")
    assert status == 1 and "the judge went home" in err and "ddpo_nb/" not in err
    assert {"config.json", "report.html", "metrics.jsonl", "weights/ddpo-is-seed0/pytorch_lora_weights.safetensors"} <= {*files(scratch/"out")}
    assert not (scratch/"out/weights/rwr-seed0").exists()

def test_train_sample_evaluate(run, scratch):
    status, out, err = run(f"train {tiny} --reward r.py:good --algorithm rwr --seed 3 --output out")
    assert status == 0 and "report: out/report.html" in out, err
    assert {"config.json", "metrics.jsonl", "report.html", "curves.png", "before_after.png"} <= {*files(scratch/"out")}
    rows = [json.loads(o) for o in (scratch/"out/metrics.jsonl").read_text().splitlines()]
    assert [r["queries"] for r in rows] == [2, 4] and {(r["algorithm"], r["seed"], r["reward"]) for r in rows} == {("rwr", 3, "good")}
    assert json.loads((scratch/"out/config.json").read_text())["command"].startswith("ddpo-nb train --queries 4")
    lora = "out/weights/rwr-seed3"
    assert run(f"sample --lora {lora} --prompt cat --prompt 'an owl' --count 3 --steps 2 --output pics/a.png")[0] == 0
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
    for name, extra in dict(a="", b="", c="--batch-size 1", d="--seed 1").items(): assert run(f"sample --prompt cat --count 3 --steps 2 --output {name}.png {extra}")[0] == 0
    a, b, c, d = (list(Image.open(f"{o}.png").tobytes()) for o in "abcd")
    assert a == b and a != d and max(abs(x - y) for x, y in zip(a, c)) <= 1

def test_interrupt_prints_how_to_go_on(run, scratch):
    (scratch/"stop.py").write_text("n = 0\ndef f(images, prompts, metadata):\n    global n; n += 1\n    if n == 9: raise KeyboardInterrupt\n    return images.mean((1, 2, 3)), {}\n")
    status, out, err = run(f"compare {tiny} --reward stop.py:f")
    assert status == 130 and "To go on:" in err
    line = err.strip().splitlines()[-1].split("ddpo-nb ", 1)[1]
    assert "--output runs/compare-f-" in line
    status, out, err = run(line)
    assert status == 0 and "RWR" in out and len(list((scratch/"runs").iterdir())) == 1

def test_flags_are_the_fields_of_the_config():
    from ddpo_nb.trainer import ALGORITHMS, DDPOConfig
    assert [f[:3] for f in config_fields()] == [(f.name, f.type, f.default) for f in fields(DDPOConfig)] and cli.algorithms() == ALGORITHMS

def test_help_and_errors_come_without_torch():
    code = "import sys; from ddpo_nb.cli import main; s = [main(['--help']), main(['train', '--help']), main(['train', '--algorithm', 'x'])]; print(s, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "[0, 0, 2] False" and "--train-learning-rate" in out

def test_python_m_exits_with_the_status():
    res = subprocess.run([sys.executable, "-m", "ddpo_nb", "train", "--prompts", "nowhere.txt"], capture_output=True, text=True)
    assert res.returncode == 2 and res.stderr.startswith("ddpo-nb train: --prompts") and res.stderr.count("\n") == 1
