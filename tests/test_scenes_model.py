"The bundled Emoji SD3 and its reader of scenes: what they can do, and that they come as anybody's models do."
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ddpo_nb.cli import main
from ddpo_nb.compare import compare, exam_generators
from ddpo_nb.config import make_config
from ddpo_nb.policy import load_policy
from ddpo_nb.rewards import get_reward
from ddpo_nb.rollout import rollout
from ddpo_nb.scene_reader import examine
from ddpo_nb.scenes import KINDS, load_reader, parse, scene_prompts

WEIGHTS = Path(str(resources.files("ddpo_nb")))/"weights"
PIPELINE, READER = WEIGHTS/"emoji-sd3", WEIGHTS/"emoji-scenes"

@pytest.mark.parametrize("folder, most", [(PIPELINE, 20e6), (READER, 3e6)])
def test_small_half_precision_safetensors(folder, most):
    files = [o for o in folder.rglob("*") if o.is_file()]
    assert 0 < sum(o.stat().st_size for o in files) <= most
    assert {o.suffix for o in files} <= {".safetensors", ".json", ".txt"}
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_tensor(k).dtype for k in tensors.keys()} <= {torch.float16, torch.int64}

def test_no_file_tells_where_it_was_made():
    told = [o for o in WEIGHTS.rglob("*.json") if '"_name_or_path": "/' in o.read_text(encoding="utf-8")]
    assert not told

def test_diffusers_loads_it_with_no_code_of_ours():
    code = f"""
import sys
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained({str(PIPELINE)!r})
picture = pipe("two dogs on a blue background", num_inference_steps=2).images[0]
assert not any(o.partition(".")[0] == "ddpo_nb" for o in sys.modules)
print(picture.size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.split("\n")[-2] == "(64, 64)", done.stderr[-2000:]

def test_the_reader_reads_scenes_and_nothing_where_there_is_nothing():
    found = examine(*load_reader(), n=200)
    assert found["scenes"] >= 0.98 and found["broken"] >= 0.94

@pytest.fixture(scope="module")
def drawn():
    "The share that the reward calls right, by kind, of 20 pictures of each as fine-tuning would draw them."
    c, policy = make_config("flow-grpo", "emoji-sd3"), load_policy("emoji-sd3", use_lora=False)
    policy.configure(c.sample_num_steps, c.sample_guidance_scale, **policy.drawing({}))
    prompts = [p for k in range(len(KINDS)) for p in scene_prompts()[80 * k:80 * k + 20]]
    images = rollout(policy, prompts, exam_generators(0, len(prompts)), batch_size=50).images
    right = get_reward("scenes_strict", "emoji-sd3")(images, prompts, [{}] * len(prompts))[0]
    kinds = np.array([parse(p).kind for p in prompts])
    return {kind: right[kinds == kind].mean() for kind in KINDS}

def test_the_base_model_is_good_and_imperfect(drawn):
    assert min(drawn["single"], drawn["colour"]) >= 0.75  # large glyphs ask for steps and guidance
    assert 0.6 <= np.mean([*drawn.values()]) <= 0.85
    assert drawn["two"] < min(drawn["single"], drawn["colour"])

def test_the_readme_s_command(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1]/"README.md").read_text(encoding="utf-8")
    line = readme.partition("<!-- scenes-command -->\n```sh\n")[2].partition("\n")[0]
    program, *words = line.split()
    tiny = ("--queries 8 --evaluation-samples 5 --sample-num-steps 2 --sample-batch-size 8"
            " --train-batch-size 8").split()
    monkeypatch.chdir(tmp_path)
    assert program == "ddpo-nb" and main(words + tiny + ["--output", "r"]) == 0
    kept = json.loads((tmp_path/"r/config.json").read_text(encoding="utf-8"))
    assert kept["prompts"] == "scenes"
    report = (tmp_path/"r/report.html").read_text(encoding="utf-8")
    assert "DiffusionNFT" in report and all(f"right {kind}" in report for kind in KINDS)

def test_a_comparison_from_names_alone(tmp_path):
    c = compare(
        "scenes", ("flow-grpo", "rwr"), 8, model="emoji-sd3", output=tmp_path/"r", evaluation_samples=5,
        progress=False, sample_num_steps=4, sample_batch_size=8, sample_num_batches_per_epoch=1,
        train_batch_size=8, samples_per_prompt=4)
    assert c.settings["prompts"] == "scenes" and c.names == ["flow-grpo", "rwr"]
    assert {*c.evaluations["base", 0].rewards} == {"seen", "new_scenes", "unseen_scenes"}
    row = c.breakdown()[1]
    assert [*row] == ["weights", "right", *(f"right {kind}" for kind in KINDS)]
    assert "right position" in (tmp_path/"r/report.html").read_text()
    assert (tmp_path/"r/weights/flow-grpo-seed0/pytorch_lora_weights.safetensors").is_file()
