"benchmarks/gradient_noise.py: signal and noise of gradients whose signal is known."
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]/"benchmarks"))
import gradient_noise as noise

def drawn(signal, k, d=200, seed=0):
    "k gradients, whose common part has the squared length `signal` and whose noise has that of 1."
    g, common = torch.Generator().manual_seed(seed), torch.zeros(d)
    common[0] = signal**0.5
    return common + torch.randn(k, d, generator=g) / d**0.5

@pytest.mark.parametrize("signal", [0.0, 0.05, 1.0])
def test_the_known_share_is_found_within_its_errors(signal):
    found = np.array([noise.signal_to_noise(drawn(signal, 12, seed=s)) for s in range(100)])
    mean, spread = found[:, 0].mean(), found[:, 0].std(ddof=1)
    assert abs(mean - signal) < 4 * spread / 10 + 0.1 * signal  # a ratio of estimates is off by a little
    assert spread / 2 < np.median(found[:, 1]) < 2 * spread  # the jackknife says how far it scatters

def test_the_gradient_is_the_one_that_training_begins_with(small_unet):
    settings = dict(
        sample_num_steps=3, sample_batch_size=4, train_batch_size=4, per_prompt_stat_tracking=False,
        mixed_precision="no", sample_num_batches_per_epoch=1, lora_rank=2)
    found, reward = noise.gradients_of(
        "ddpo-is", "emoji-sd", "jpeg_compressibility", "simple_animals", 3, 0, settings, lambda _: None)
    again, _ = noise.gradients_of(
        "ddpo-is", "emoji-sd", "jpeg_compressibility", "simple_animals", 3, 0, settings, lambda _: None)
    assert len(found) == 3 and torch.equal(found, again) and reward < 0
    assert found.norm(dim=1).min() > 0 and not torch.equal(found[0], found[1])
