"""Any file of a run may be damaged: what is whole is taken, or one line says what is not. Never a traceback,
never a wrong number."""
import json, random, shutil, warnings
from pathlib import Path
import pytest, torch
from ddpo_nb.checkpoints import (CheckpointError, check_whole, checkpoints, load_state, read_lines,
                                 save_state, seal)
from ddpo_nb.compare import BASE, Comparison, compare
from ddpo_nb.policy import ModelError, StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import InputError, PromptSource
from ddpo_nb.rewards import jpeg_compressibility, jpeg_incompressibility
from ddpo_nb.trainer import make_config, make_trainer

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

noise = random.Random(0).randbytes(300)
def text(value): return lambda path: path.write_bytes(value)
def folder(path): path.unlink(); path.mkdir()
HARMS = dict(
    cut=lambda p: p.write_bytes(p.read_bytes()[: len(p.read_bytes()) // 2]),
    empty=text(b""), list=text(b"[]\n"), null=text(b"null\n"), dict=text(b"{}\n"), number=text(b"7\n"),
    strange=text(b'{"..": 1, "a": [1, "x"]}\n'), noise=text(noise), deep=text(b"[" * 100_000),
    zeros=lambda p: p.write_bytes(bytes(p.stat().st_size)), gone=Path.unlink, folder=folder
)
quiet = pytest.mark.filterwarnings("ignore::UserWarning")
tiny = dict(
    queries=4, evaluation_samples=2, sample_num_steps=2, train_batch_size=2, sample_batch_size=2,
    sample_num_batches_per_epoch=1, train_num_inner_epochs=1, rwr_draws=1, progress=False,
    keep_checkpoints=True
)

def one_line(e): assert "\n" not in str(e.value if hasattr(e, "value") else e) and len(str(e)) < 1000

# The folder of a comparison

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")/"run"
    return compare(output=folder, **tiny), folder

def files_of(folder): return sorted(o for o in folder.rglob("*") if o.is_file())

def same(a, b): return a.json() | dict(seconds=0) == b.json() | dict(seconds=0)

@quiet
@pytest.mark.parametrize("harm", HARMS)
def test_a_comparison_is_loaded_as_far_as_it_is_whole(whole, tmp_path, harm):
    c, home = whole
    top = [o for o in files_of(home) if "checkpoints" not in o.parts]
    assert {o.name for o in top} >= {
        "config.json", "metrics.jsonl", "base-seed0.json", "base-seed0.png", "rwr-seed0.json"
    }
    for file in top:
        shutil.copytree(home, copy := tmp_path/"copy")
        HARMS[harm](copy/file.relative_to(home))
        try:
            found = Comparison.load(copy)
        except InputError as e:
            assert file.name == "config.json"
            one_line(e)
        else:
            assert file.name != "config.json" and all(
                same(e, c.evaluations[k]) for k, e in found.evaluations.items()
            )
            assert len(found.evaluations) == 3 - ("results" in file.parts)
            assert found.rows == c.rows  # a run's own metrics.jsonl stands in for the other
            if harm == "cut" and file.parent.name == "results":
                assert "<!doctype html>" in found.html()
        shutil.rmtree(copy)

@pytest.mark.parametrize("name", ["results/base-seed0.json", "results/rwr-seed0.png", "metrics.jsonl"])
def test_a_warning_names_what_is_damaged(whole, tmp_path, name):
    shutil.copytree(whole[1], tmp_path/"copy")
    HARMS["noise"](tmp_path/"copy"/name)
    with pytest.warns(UserWarning, match=Path(name).stem): Comparison.load(tmp_path/"copy")

@pytest.mark.parametrize(
    "change",
    [
        dict(rewards={}), dict(rewards=[1]), dict(rewards={"seen": ["x", 1]}), dict(second={"seen": [1]}),
        dict(shown=[["seen", 99, "cat"]]), dict(shown=[]), dict(seed=5), dict(name=None), dict(diversity={}),
        dict(more=1), dict(shown=[["nowhere", 0, "cat"]])
    ],
    ids=str,
)
def test_a_result_that_is_json_and_nonsense_is_left_out(whole, tmp_path, change):
    shutil.copytree(whole[1], tmp_path/"copy")
    file = tmp_path/"copy/results/rwr-seed0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.warns(UserWarning, match="rwr-seed0.json or its picture is damaged"):
        assert set(Comparison.load(tmp_path / "copy").evaluations) == {(BASE, 0), ("ddpo-is", 0)}

@quiet
@pytest.mark.parametrize(
    "names",
    [
        ["results/rwr-seed0.json", "runs/rwr-seed0/metrics.jsonl"],
        [
            "metrics.jsonl", "results/base-seed0.png", "curves.png",
            "weights/rwr-seed0/pytorch_lora_weights.safetensors"
        ],
    ],
)
def test_a_damaged_comparison_is_made_whole_again(whole, tmp_path, names):
    c, home = whole
    shutil.copytree(home, copy := tmp_path/"copy")
    for name in names: HARMS["noise"](copy/name)
    again = compare(output=copy, **tiny)
    assert not again.missing and all(same(e, c.evaluations[k]) for k, e in again.evaluations.items())
    clock = ("seconds", "images_per", "peak")
    lines = [
        [{k: v for k, v in r.items() if not k.startswith(clock)} for r in read_lines(o / "metrics.jsonl")]
        for o in (home, copy)
    ]
    assert sorted(lines[0], key=str) == sorted(lines[1], key=str)

@quiet
def test_a_run_whose_examination_is_lost_is_examined_and_not_trained_again(whole, tmp_path, monkeypatch):
    c, home = whole
    shutil.copytree(home, copy := tmp_path/"copy")
    shutil.rmtree(copy/"runs")  # as without keep_checkpoints
    HARMS["cut"](copy/"results/rwr-seed0.json")
    monkeypatch.setattr("ddpo_nb.trainer.DDPOTrainer.train", lambda self, *a, **k: 1 / 0)
    again = compare(output=copy, **tiny)
    assert same(again.evaluations["rwr", 0], c.evaluations["rwr", 0]) and len(again.rows) == len(c.rows)

# Checkpoints

SMALL = dict(
    sample_num_steps=2, sample_batch_size=2, sample_num_batches_per_epoch=1, train_batch_size=2,
    micro_batch_size=8, per_prompt_stat_tracking=False
)

def trainer(home, lora=True, reward=jpeg_compressibility, prompts=("cat", "dog"), model=None, **kw):
    torch.manual_seed(0)
    policy = StableDiffusionPolicy(model or load_pipeline(), use_lora=lora)
    prompts = prompts if callable(prompts) else PromptSource(list(prompts), 0)
    return make_trainer(
        make_config("ddpo-is", **SMALL | dict(logdir=str(home), train_learning_rate=1e-4, num_epochs=2) | kw),
        reward, prompts, policy
    )

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of two epochs, with a checkpoint after each, and a trainer that can take them up"
    home = tmp_path_factory.mktemp("run")
    trainer(home).train(progress=False)
    return home, trainer("")

@quiet
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_left_for_the_one_before(run, tmp_path, harm):
    home, t = run
    for file in files_of(home/"checkpoints/checkpoint_2"):
        shutil.copytree(home, copy := tmp_path/"copy")
        HARMS[harm](copy/file.relative_to(home))
        t.load_checkpoint(copy)
        assert t.epochs_done == 1 and [r["epoch"] for r in t.rows] == [1]
        with pytest.raises(InputError, match="resume_from: ") as e:
            t.load_checkpoint(copy / "checkpoints/checkpoint_2")
        one_line(e)
        HARMS[harm](copy/"checkpoints/checkpoint_1"/file.name)
        with pytest.raises(InputError, match="resume_from: there is no whole checkpoint") as e:
            t.load_checkpoint(copy)
        one_line(e)
        shutil.rmtree(copy)

@quiet
def test_a_manifest_that_leads_out_of_the_folder_is_not_followed(run, tmp_path):
    shutil.copytree(run[0], copy := tmp_path/"copy")
    (tmp_path/"copy/secret").write_text("secret")
    folder = copy/"checkpoints/checkpoint_2"
    for name in ("../../secret", str(tmp_path/"copy/secret"), "a/../../../secret", ""):
        (folder/"files.json").write_text(json.dumps({name: [6, "0"]}))
        with pytest.raises(CheckpointError, match="files.json is missing or damaged"): check_whole(folder)

def sealed(home, tmp_path, change, name="trainer"):
    "A copy of the newest checkpoint with another state, sealed as if it had been written so"
    shutil.copytree(home/"checkpoints/checkpoint_2", copy := tmp_path/"checkpoint_2")
    (copy/"files.json").unlink()
    state = load_state(copy/name)
    save_state(copy/name, change(state) or state)
    seal(copy)
    return copy

CHANGES = dict(
    nothing=lambda s: [], no_dict=lambda s: 3, tracker=lambda s: s.update(tracker=5),
    rows=lambda s: s.pop("optimizer"), epochs=lambda s: s.update(epochs_done="2"),
    task=lambda s: s.pop("task"), groups=lambda s: s["optimizer"].update(param_groups=3),
    state=lambda s: s["optimizer"].update(state=[]), schedule=lambda s: s.update(schedule=None),
    config=lambda s: s.update(config=[1]),
    figures=lambda s: s["optimizer"]["state"].update({0: dict(step=torch.tensor(1.0))}),
    more=lambda s: s["optimizer"]["state"].update({999: {}}),
    fewer=lambda s: s["optimizer"]["param_groups"][0]["params"].pop(),
    beta=lambda s: s["optimizer"]["param_groups"][0].update(betas=(0.1, 0.2)),
    text=lambda s: s["optimizer"]["state"][0].update(exp_avg="x"),
    shape=lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(2)),
    dtype=lambda s: s["optimizer"]["state"][1].update(
        exp_avg_sq=s["optimizer"]["state"][1]["exp_avg_sq"].half()
    ),
)

@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_does_not_fit_is_refused_in_one_line(run, tmp_path, change):
    "A fused AdamW would write past the end of tensors of another shape, and end the process"
    folder = sealed(run[0], tmp_path, CHANGES[change])
    with pytest.raises((InputError, CheckpointError), match="checkpoint_2") as e:
        run[1].load_checkpoint(folder)
    one_line(e)

@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("outside"), lambda s: s.update(outside=3),
        lambda s: s["outside"].update(rng=dict(python=1)),
        lambda s: s.update(work=dict(latents=torch.zeros(2)))
    ],
)
def test_a_processes_own_state_that_does_not_fit_is_refused_in_one_line(run, tmp_path, change):
    with pytest.raises((InputError, CheckpointError), match="checkpoint_2") as e:
        run[1].load_checkpoint(sealed(run[0], tmp_path, change, "process-0"))
    one_line(e)

def test_lost_rows_are_said_and_the_run_goes_on(run, tmp_path):
    shutil.copytree(run[0], copy := tmp_path/"copy")
    file = copy/"metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    # and half a line, as a kill leaves it
    file.write_bytes(b"\xff\x00 nonsense\n" + lines[1] + lines[1][:20])
    with pytest.warns(UserWarning) as caught: t = trainer(copy, resume_from=str(copy), num_epochs=3)
    assert [w for o in caught if "lacks the rows of 1 of the 2 epochs" in (w := str(o.message))]
    t.train(progress=False)
    assert [r["epoch"] for r in read_lines(file)] == [2, 3]

def test_rows_after_the_checkpoint_are_cut_off(run, tmp_path):
    shutil.copytree(run[0], copy := tmp_path/"copy")
    before = (copy/"metrics.jsonl").read_text()
    t = trainer(copy, resume_from=str(copy/"checkpoints/checkpoint_1"), num_epochs=1)
    t.train(progress=False)
    assert (copy/"metrics.jsonl").read_text() == before.splitlines(keepends=True)[0]

# What it was trained on

def mine(images, prompts, metadata): return images.mean((1, 2, 3)), {}

@pytest.mark.parametrize(
    "change,named",
    [
        (
            dict(reward=jpeg_incompressibility),
            (
                ".*checkpoint_2. was made with the reward .*jpeg_compressibility, and this run has"
                " .*jpeg_incompressibility"
            ),
        ),
        (dict(reward=mine), ".*the reward .*this run has .*mine"),
        (
            dict(prompts=("cat", "cow")),
            ".*the prompts 2 prompts, 'cat' the first .*this run has 2 prompts, 'cat' the first",
        ),
        (dict(prompts=mine), ".*the prompts 2 prompts.*this run has .*mine"),
        (dict(watch_reward="jpeg_incompressibility"), "watch_reward was ''")
    ],
)
def test_a_checkpoint_of_something_else_is_refused(run, tmp_path, change, named):
    with pytest.raises(InputError, match=f"resume_from: {named}") as e:
        trainer(tmp_path, resume_from=str(run[0]), **change)
    one_line(e)

def test_another_model_of_the_same_shape_is_refused_and_a_moved_one_is_not(run, tmp_path):
    other = load_pipeline()
    other.config["_name_or_path"] = "somewhere/else"
    trainer(tmp_path, model=other, resume_from=str(run[0]))
    with torch.no_grad():
        for p in other.unet.parameters(): p.mul_(1.5)
    with pytest.raises(
        InputError, match="resume_from: .*the model emoji-sd, and this run has somewhere/else"
    ):
        trainer(tmp_path, model=other, resume_from=str(run[0]))

def test_what_has_no_name_is_taken_on_trust(run, tmp_path):
    assert trainer(tmp_path, reward=lambda *a: mine(*a), resume_from=str(run[0])).epochs_done == 2
    with pytest.raises(InputError, match="state of a prompt function, and this run's takes none"):
        trainer(tmp_path, prompts=lambda: ("cat", {}), resume_from=str(run[0]))
