"What is written as JSON any reader takes: a reward may say infinity, a file may not."
import json
import math

import numpy as np
import pytest
import torch

from ddpo_nb.checkpoints import load_state, save_state

def strict(text):
    def refuse(name): raise AssertionError(f"{name} is no JSON")
    return json.loads(text, parse_constant=refuse)

@pytest.mark.parametrize(
    "value",
    [
        math.inf, -math.inf, math.nan, dict(a=[1.0, (math.inf, "inf")], b={"float": "x"}), np.float32("-inf"),
        np.float64("nan"), [1e308 * 10, 3]
    ],
)
def test_a_checkpoint_keeps_numbers_that_json_has_not(tmp_path, value):
    save_state(tmp_path/"s", dict(v=value))
    strict((tmp_path/"s.json").read_text())
    found = load_state(tmp_path/"s")["v"]
    assert repr(found) == repr(value.item() if hasattr(value, "item") else value)

def test_a_reward_that_says_infinity_leaves_metrics_that_can_be_read(tmp_path):
    "In metrics.jsonl and in the checkpoint; nothing but the words it said of its pictures is lost"
    from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
    from ddpo_nb.resume import _plain
    from ddpo_nb.trainer import make_config, make_trainer
    def reward(images, prompts, metadata):
        n = len(images)
        return images.mean((1, 2, 3)), dict(
            up=[math.inf] * n, both=[math.inf, -math.inf][:n], lost=torch.full((n,), math.nan),
            kept=[1.0] * n, huge=np.full(n, 1e308)
        )
    config = make_config(
        "ddpo-is", sample_num_steps=2, sample_batch_size=2, train_batch_size=2, logdir=str(tmp_path),
        run_name="r"
    )
    t = make_trainer(
        config, reward, lambda: ("a bear", {}), StableDiffusionPolicy(load_pipeline(), lora_rank=1)
    )
    rows = t.train(1, progress=False)
    written = [strict(line) for line in (tmp_path/"r/metrics.jsonl").read_text().splitlines()]
    assert (
        len(written) == 1
        and written[0]["reward_info"]["kept"] == 1
        and written[0]["reward_info"]["up"] is None is written[0]["reward_info"]["lost"]
    )
    assert written[0]["reward_mean"] == pytest.approx(rows[0]["reward_mean"])
    for file in tmp_path.rglob("*.json"): strict(file.read_text())
    assert _plain(dict(a=(np.float32(1), math.nan), b=torch.tensor(2))) == dict(a=[1, None], b=2)
