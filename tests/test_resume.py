"""A run that is stopped or killed anywhere goes on to the same metrics and the same weights, to the last bit
(FIELD's traps 5 and 7)."""
import json, os, shlex, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from ddpo_nb import resume as T
from ddpo_nb.checkpoints import CheckpointError, checkpoints, load_state, save_state, seal
from ddpo_nb.objectives import get_objective
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import InputError, PromptSource
from ddpo_nb.rewards import jpeg_compressibility
from ddpo_nb.trainer import ALGORITHMS, make_config, make_trainer
from stopping import stop_after

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

SMALL = dict(
    sample_num_steps=3, sample_batch_size=4, sample_num_batches_per_epoch=2, train_batch_size=4,
    micro_batch_size=5, train_learning_rate=1e-2, num_epochs=3, train_num_inner_epochs=1, rwr_fraction=0.5,
    per_prompt_stat_tracking=True, per_prompt_stat_tracking_min_count=2
)
clock = ("seconds", "images_per_second", "peak_memory")
def timeless(line): return {k: v for k, v in json.loads(line).items() if not k.startswith(clock)}
def metrics(home): return [timeless(o) for o in (Path(home)/"metrics.jsonl").read_text().splitlines()]
def weights(t): return torch.cat([p.detach().flatten() for p in t.policy.trainable_parameters()])

def trainer(home, algorithm="ddpo-is", lora=True, reward=jpeg_compressibility, **kw):
    settings = (
        SMALL
        | (dict(train_batch_size=8) if get_objective(algorithm).on_policy else {})
        | (dict(per_prompt_stat_tracking=False) if get_objective(algorithm).of_gradients else {})
        | (dict(train_num_inner_epochs=2) if algorithm == "ddpo-is" else {})
        | (dict(per_prompt_stat_tracking=False, samples_per_prompt=2) if algorithm == "flow-grpo" else {})
    )
    c = make_config(algorithm, **(settings | dict(logdir=str(home)) | kw))
    torch.manual_seed(c.seed)
    if get_objective(algorithm).of_gradients: reward = lambda images, *about: (images[:, 0].mean((1, 2)), {})
    return make_trainer(
        c, reward, PromptSource(["cat", "dog"], c.seed), StableDiffusionPolicy(load_pipeline(), use_lora=lora)
    )

@pytest.mark.parametrize("algorithm,lora", [(a, True) for a in ALGORITHMS] + [("ddpo-is", False)])
def test_trap_7_stopped_anywhere_and_resumed_is_the_same_run(device, exact, tmp_path, algorithm, lora):
    whole = trainer(tmp_path/"whole", algorithm, lora, train_learning_rate=1e-2 if lora else 1e-4)
    places = stop_after(whole, -1)
    whole.train(progress=False)
    t = None
    for i, n in enumerate((2, places[0] // 3, places[0] // 2)):  # each counted from the last stop
        t = trainer(
            tmp_path / "cut", algorithm, lora, train_learning_rate=1e-2 if lora else 1e-4,
            resume_from=str(tmp_path / "cut") if i else ""
        )
        stop_after(t, n)
        t.train(progress=False)
    t = trainer(
        tmp_path / "cut", algorithm, lora, train_learning_rate=1e-2 if lora else 1e-4,
        resume_from=str(tmp_path / "cut")
    )
    t.train(progress=False)
    assert metrics(tmp_path/"cut") == metrics(tmp_path/"whole")
    assert torch.equal(weights(t), weights(whole))

@pytest.mark.parametrize("weighting", ["equal", "ratio-norm"])  # the second keeps more than states
def test_stopped_and_resumed_with_several_samples_of_a_prompt(tmp_path, weighting):
    kw = dict(
        baseline="leave-one-out", samples_per_prompt=4, per_prompt_stat_tracking=False, num_epochs=2,
        step_weighting=weighting, train_num_inner_epochs=2
    )
    whole = trainer(tmp_path/"whole", **kw)
    places = stop_after(whole, -1)
    whole.train(progress=False)
    for i, n in enumerate((2, places[0] // 2)):  # while sampling, and later
        t = trainer(tmp_path/"cut", **kw, resume_from=str(tmp_path/"cut") if i else "")
        stop_after(t, n)
        t.train(progress=False)
    t = trainer(tmp_path/"cut", **kw, resume_from=str(tmp_path/"cut"))
    t.train(progress=False)
    assert metrics(tmp_path/"cut") == metrics(tmp_path/"whole") and torch.equal(weights(t), weights(whole))

@pytest.mark.parametrize("algorithm", ["rwr", "rwr-sparse"])
def test_published_rwr_stopped_and_resumed_is_the_same_run(tmp_path, algorithm):
    "Raw rewards per prompt, and an optimizer that is fresh each round but not in the middle of one"
    kw = dict(
        rwr_rewards="raw", rwr_normalizer="prompt", rwr_beta=2.0, per_prompt_stat_tracking=False,
        train_fresh_optimizer=True, num_epochs=2, train_num_inner_epochs=2
    )
    whole = trainer(tmp_path/"whole", algorithm, **kw)
    places = stop_after(whole, -1)
    whole.train(progress=False)
    # among an epoch's updates, and in the next epoch's sampling
    for i, n in enumerate((places[0] // 2 - 1, 2)):
        t = trainer(tmp_path/"cut", algorithm, **kw, resume_from=str(tmp_path/"cut") if i else "")
        stop_after(t, n)
        t.train(progress=False)
    t = trainer(tmp_path/"cut", algorithm, **kw, resume_from=str(tmp_path/"cut"))
    t.train(progress=False)
    assert metrics(tmp_path/"cut") == metrics(tmp_path/"whole") and torch.equal(weights(t), weights(whole))

def test_an_rwr_run_of_before_the_inverse_temperature_is_refused(tmp_path):
    trainer(tmp_path, "rwr", num_epochs=1).train(progress=False)
    stem = tmp_path/"checkpoints/checkpoint_1/trainer"
    state = load_state(stem)
    assert not T.weighed_by_temperature(state["config"])
    state["config"] = {
        k: v
        for k, v in state["config"].items()
        if k not in ("rwr_normalizer", "rwr_rewards", "train_fresh_optimizer")
    }
    assert T.weighed_by_temperature(state["config"]) and not T.weighed_by_temperature(
        state["config"] | dict(algorithm="ddpo-is")
    )
    save_state(stem, state)
    (stem.parent/"files.json").unlink()
    seal(stem.parent)
    with pytest.raises(
        InputError,
        match=(
            "^resume_from: .* was made when rwr_beta was a temperature, and today it is an inverse one; train"
            " anew"
        ),
    ):
        trainer(tmp_path, "rwr", num_epochs=2, resume_from=str(tmp_path))

def test_stopped_while_sampling_and_gone_on_in_the_same_process(tmp_path):
    whole, t = trainer(tmp_path/"whole"), trainer(tmp_path/"cut")
    whole.train(progress=False)
    stop_after(t, 2)
    t.train(progress=False)
    assert t.queries == 0
    t.train(progress=False)
    assert metrics(tmp_path/"cut") == metrics(tmp_path/"whole") and torch.equal(weights(t), weights(whole))

def test_trap_7_checkpoints_are_kept_to_the_limit_with_the_last_epoch_among_them(tmp_path):
    t = trainer(tmp_path, num_epochs=5, save_freq=2, num_checkpoint_limit=2)
    t.train(progress=False)
    assert [o.name for o in checkpoints(tmp_path/"checkpoints")] == ["checkpoint_5", "checkpoint_4"]
    assert (tmp_path/"checkpoints/checkpoint_5/pytorch_lora_weights.safetensors").is_file()

def test_a_checkpoint_is_a_lora_for_plain_diffusers(tmp_path):
    t = trainer(tmp_path, num_epochs=1)
    t.train(progress=False)
    pipe = load_pipeline(lora=str(tmp_path/"checkpoints/checkpoint_1"))
    own = {k: v for k, v in t.policy.pipeline.unet.state_dict().items() if "lora" in k}
    assert own and all(torch.equal(v, pipe.unet.state_dict()[k]) for k, v in own.items())

def test_nothing_is_kept_if_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer("", num_epochs=1).train(progress=False)
    assert not list(tmp_path.iterdir())

def test_another_runs_folder_is_not_overwritten(tmp_path):
    home = tmp_path/"run"
    trainer(home, num_epochs=1).train(progress=False)
    kept = (home/"metrics.jsonl").read_bytes()
    again = trainer(home, num_epochs=1)
    again.train(progress=False)
    assert (
        again.home == tmp_path / "run-2"
        and (home / "metrics.jsonl").read_bytes() == kept
        and (tmp_path / "run-2/checkpoints/checkpoint_1").is_dir()
    )

@pytest.mark.parametrize(
    "change,named",
    [
        (dict(train_learning_rate=1.0), "train_learning_rate"), (dict(seed=4), "seed"),
        (dict(algorithm="rwr"), "algorithm|train_num_inner_epochs")
    ],
)
def test_resume_with_other_settings_is_refused(tmp_path, change, named):
    trainer(tmp_path, num_epochs=1).train(progress=False)
    algorithm = change.pop("algorithm", "ddpo-is")
    with pytest.raises(InputError, match=f"resume_from: ({named})"):
        trainer(tmp_path, algorithm, resume_from=str(tmp_path), **change)

def test_settings_that_do_not_matter_may_change(tmp_path):
    trainer(tmp_path, num_epochs=1).train(progress=False)
    t = trainer(tmp_path, num_epochs=2, micro_batch_size=3, save_freq=7, resume_from=str(tmp_path))
    assert len(t.train(progress=False)) == 2 and t.global_step == 8

def test_8_bit_adam_is_resumed(device, exact, tmp_path):
    pytest.importorskip("bitsandbytes")
    kw = dict(lora=False, train_use_8bit_adam=True, train_learning_rate=1e-4, num_epochs=2)
    whole = trainer(tmp_path/"whole", **kw)
    whole.train(progress=False)
    trainer(tmp_path/"cut", **kw).train(1, progress=False)
    t = trainer(tmp_path/"cut", **kw, resume_from=str(tmp_path/"cut"))
    assert any(
        v.dtype == torch.uint8
        for s in t.optimizer.state.values()
        for v in s.values()
        if isinstance(v, torch.Tensor)
    )
    t.train(progress=False)
    assert torch.equal(weights(t), weights(whole)) and metrics(tmp_path/"cut") == metrics(tmp_path/"whole")

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_whose_learning_rate_follows_its_length_keeps_it(tmp_path, schedule):
    trainer(tmp_path, num_epochs=2, lr_scheduler=schedule).train(1, progress=False)
    with pytest.raises(InputError, match="resume_from: num_epochs was 2 when .* and is 3 now"):
        trainer(tmp_path, num_epochs=3, lr_scheduler=schedule, resume_from=str(tmp_path))
    assert (
        trainer(tmp_path, num_epochs=2, lr_scheduler=schedule, resume_from=str(tmp_path)).train(
            progress=False
        )[-1]["learning_rate"]
        < 1e-2
    )
    with pytest.raises(InputError, match="resume_from: lr_scheduler was"):
        trainer(tmp_path, lr_scheduler="constant", resume_from=str(tmp_path))

def test_a_run_with_a_steady_learning_rate_may_become_longer(tmp_path):
    steady = dict(lr_scheduler="constant_with_warmup", lr_warmup_updates=6)
    trainer(tmp_path/"whole", **steady).train(progress=False)
    trainer(tmp_path/"cut", num_epochs=1, **steady).train(progress=False)
    trainer(tmp_path/"cut", num_epochs=3, resume_from=str(tmp_path/"cut"), **steady).train(progress=False)
    assert metrics(tmp_path/"cut") == metrics(tmp_path/"whole")

@pytest.mark.parametrize("place", ["nowhere", "."])
def test_nothing_to_resume_from(tmp_path, place):
    with pytest.raises(InputError, match="resume_from: there is no whole checkpoint"):
        trainer(tmp_path, resume_from=str(tmp_path / place))

def test_full_disk(tmp_path, monkeypatch):
    t = trainer(tmp_path)
    t.train(1, progress=False)
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(T, "save_state", full)
    with pytest.raises(CheckpointError, match="No space left on device; earlier checkpoints are whole"):
        t.train(progress=False)
    monkeypatch.undo()
    assert [o.name for o in (tmp_path/"checkpoints").iterdir()] == ["checkpoint_1"]  # and no half of another
    assert trainer(tmp_path, resume_from=str(tmp_path)).epochs_done == 1

def test_an_error_in_the_reward_leaves_the_last_checkpoint_whole(tmp_path):
    calls = [0]
    def reward(images, prompts, metadata):
        calls[0] += 1
        return (1 / 0, {}) if calls[0] == 4 else jpeg_compressibility(images, prompts, metadata)
    t = trainer(tmp_path, reward=reward)
    with pytest.raises(ZeroDivisionError): t.train(progress=False)
    assert trainer(tmp_path, reward=reward, resume_from=str(tmp_path)).epochs_done == 1

def test_trl_style_prompt_functions_are_resumed(tmp_path):
    "They draw from Python's global generator, which a checkpoint remembers."
    import random
    def make(home, **kw):
        t = trainer(home, **kw)
        t.prompt_function = lambda: (random.choice(["cat", "dog", "bear"]), {})
        return t
    make(tmp_path/"whole").train(progress=False)
    make(tmp_path/"cut", num_epochs=1).train(progress=False)
    random.seed(99)
    make(tmp_path/"cut", resume_from=str(tmp_path/"cut")).train(progress=False)
    assert metrics(tmp_path/"cut") == metrics(tmp_path/"whole")

# From outside: another process, real signals

LINE = (
    "train --reward jpeg_compressibility --prompts simple_animals --queries 32 --evaluation-samples 2"
    " --sample-num-steps 3 --sample-batch-size 4 --train-batch-size 2 --save-freq 1 --no-progress"
)

def start(output, more=""):
    return subprocess.Popen(
        [sys.executable, "-m", "ddpo_nb", *shlex.split(f"{LINE} --output {output} {more}")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1")
    )

def wait_for_epochs(output, n):
    "Until the run has finished `n` epochs"
    file = Path(output)/"metrics.jsonl"
    for _ in range(2400):
        if file.exists() and len(file.read_text().splitlines()) >= n: return
        time.sleep(0.05)
    pytest.fail("the run does not get anywhere")

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")/"run"
    p = start(folder)
    assert p.wait(300) == 0, p.stderr.read()
    return folder

def same(a, b):
    name = "weights/ddpo-is-seed0/pytorch_lora_weights.safetensors"
    x, y = load_file(a/name), load_file(b/name)
    assert metrics(a) == metrics(b) and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)

def killed(tmp_path, moments):
    for epochs, seconds in moments:
        p = start(tmp_path/"run", "--resume" if (tmp_path/"run/config.json").exists() else "")
        wait_for_epochs(tmp_path/"run", epochs)
        time.sleep(seconds)
        p.kill(); p.wait()
    p = start(tmp_path/"run", "--resume")
    assert p.wait(300) == 0, p.stderr.read()

@pytest.mark.slow
def test_killed_at_ten_random_moments_and_resumed_is_the_same_run(tmp_path, whole):
    import random
    rng = random.Random(time.time_ns())
    killed(tmp_path, [(k, rng.random() * 0.5) for k in range(1, 11)])
    same(tmp_path/"run", whole)

def stopped(p, signum, status):
    "The command that a run which got a signal says to go on with"
    p.send_signal(signum)
    out, err = p.communicate(timeout=120)
    assert p.returncode == status and "Traceback" not in err, err
    command = err.strip().splitlines()[-1].strip()
    assert command.startswith("ddpo-nb train") and command.endswith("--resume")
    return command

def go_on(command):
    return subprocess.Popen(
        [sys.executable, "-m", "ddpo_nb", *shlex.split(command)[1:]], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1")
    )

def test_killed_interrupted_terminated_and_resumed_is_the_same_run(tmp_path, whole):
    "One after the other: SIGKILL, then SIGINT and SIGTERM, which save and say how to go on."
    p = start(tmp_path/"run")
    wait_for_epochs(tmp_path/"run", 2)
    time.sleep(0.13)
    p.kill(); p.wait()
    p = start(tmp_path/"run", "--resume")
    wait_for_epochs(tmp_path/"run", 4)
    p = go_on(stopped(p, signal.SIGINT, 130))
    wait_for_epochs(tmp_path/"run", 6)
    p = go_on(stopped(p, signal.SIGTERM, 143))
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    same(tmp_path/"run", whole)
