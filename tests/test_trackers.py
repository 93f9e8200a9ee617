"""What arrives at Weights & Biases and at trackio, both without a network, and at any other of accelerate's
trackers."""
import json, sqlite3
import numpy as np, pytest, torch
from PIL import Image
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import InputError, PromptSource
from ddpo_nb.rewards import jpeg_compressibility
from ddpo_nb.trainer import DDPOConfig, make_config, make_trainer

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

PROMPTS = ["a cat on a blue background", "dog"]

def trainer(home, reward=jpeg_compressibility, prompts=PROMPTS, **kw):
    c = make_config(
        "ddpo-is",
        **(
            dict(
                logdir=str(home), run_name="first", num_epochs=2, sample_num_steps=2, sample_batch_size=4,
                train_batch_size=4, tracker_project_name="tidy"
            )
            | kw
        ),
    )
    torch.manual_seed(0)
    return make_trainer(
        c, reward, PromptSource(prompts), StableDiffusionPolicy(load_pipeline())
    )

class Diary:
    """A tracker that makes of images what accelerate's wandb tracker does (channels first), and what its
    TensorBoard tracker does (a batch)"""
    name = "diary"
    def __init__(self): self.images, self.numbers = [], []
    def log(self, values, step=None): self.numbers.append((step, values))
    def log_images(self, values, step=None):
        for k, v in values.items():
            self.images += [
                (
                    step, k,
                    Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype("uint8")),
                    np.asarray(v).shape,
                )
                for image in v
            ]

def test_without_a_hook_some_pictures_go_to_the_trackers(tmp_path):
    t = trainer(tmp_path)
    t.accelerator.trackers = [diary := Diary()]
    t.train(progress=False)
    assert [(step, image.size, shape) for step, _, image, shape in diary.images] == [
        (s, (64, 64), (1, 3, 64, 64)) for s in (0, 1) for _ in range(4)
    ]
    assert {k.partition(" | ")[0] for _, k, *_ in diary.images} <= {*PROMPTS} and max(
        np.asarray(o).max() for _, _, o, _ in diary.images
    ) > 200
    assert [(step, v["reward_mean"]) for step, v in diary.numbers] == [
        (1, t.rows[0]["reward_mean"]), (2, t.rows[1]["reward_mean"])
    ]

@pytest.mark.parametrize("setting", ["run_name", "tracker_project_name"])
def test_names_that_become_folders(setting, tmp_path):
    make = lambda name, **kw: DDPOConfig(mixed_precision="no", logdir=str(tmp_path), **{setting: name} | kw)
    for name in ("", "first", "<script>alert(1)</script>", "猫", "a b"):
        assert getattr(make(name), setting) == name
    for name, says in {
        "../x": "leads out of", "a/../../x": "leads out of", "/x": "leads out of", "a\nb": "line break",
        "a\x1b[31m": "cannot be printed", "x" * 300: "more than 200 bytes", "猫" * 90: "more than 200 bytes"
    }.items():
        with pytest.raises(InputError, match=f"^{setting}: .*{says}") as e: make(name)
        assert "\n" not in str(e.value) and len(str(e.value)) < 250

def test_projects_that_wandb_does_not_take(monkeypatch):
    monkeypatch.setattr("ddpo_nb.config.get_available_trackers", lambda: ["wandb"])
    make = lambda name: DDPOConfig(mixed_precision="no", log_with="wandb", tracker_project_name=name)
    make("tidy <b>")
    for name in ("a/b", "50%", "a#b", "x" * 129):
        with pytest.raises(InputError, match="^tracker_project_name: wandb does not take '"): make(name)

@pytest.mark.filterwarnings("ignore:2 of 8 prompts are longer")
def test_texts_of_users_become_keys_that_lead_nowhere_and_stay_apart(tmp_path):
    long = "a cat " * 50
    prompts = ["../../x", "a/b", "a\nb", "a b", "<script>", long + "one", long + "two", ".."]
    def reward(images, prompts, metadata):
        zeros = [0.0] * len(prompts)
        return zeros, {"<b>": zeros, "../../up": zeros, "reward/clip": zeros}
    pytest.importorskip("tensorboard")
    t = trainer(
        tmp_path/"a", reward, prompts, num_epochs=1, sample_batch_size=8, train_batch_size=8,
        log_with="tensorboard", per_prompt_stat_tracking=False
    )
    t.prompt_function = iter([(p, {}) for p in prompts]).__next__  # each once
    t.accelerator.trackers.append(diary := Diary())
    t.train(progress=False)
    keys = [k for _, values in diary.numbers for k in values] + [k for _, k, *_ in diary.images]
    assert all(k.isprintable() and len(k) < 150 and not {"..", ""} & {*k.split("/")} for k in keys)
    of_prompts = [k for k in keys if k.startswith("reward/")]
    assert len(of_prompts) == len(prompts) and {"reward/a b", "reward/<script>"} <= {*of_prompts}
    assert all(k.count("/") == 1 for k in of_prompts) and "reward_info/reward/clip" in keys
    assert len({k for _, k, *_ in diary.images}) == 8
    assert {*t.rows[0]["reward_by_prompt"]} == {*prompts}  # the run's own files have them as they are
    files = [*tmp_path.rglob("events.out*")]
    assert files and all(o.is_relative_to(tmp_path / "a/first/tidy") for o in files)

def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for k, v in dict(WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true").items():
        monkeypatch.setenv(k, v)
    t = trainer(
        tmp_path, log_with="wandb",
        tracker_kwargs=dict(wandb=dict(tags=["small"], settings=dict(api_key="swordfish" * 5))),
    )
    t.train(progress=False)
    run = t.accelerator.get_tracker("wandb", unwrap=True)
    assert (run.project, run.name, run.tags, run.step) == ("tidy", "first", ("small",), 2)
    assert run.config["train_batch_size"] == 4 and "swordfish" not in str(dict(run.config))
    run.log({"end": 1}, step=3)  # until then, the last step waits for more
    assert run.summary["reward_mean"] == t.rows[-1]["reward_mean"]
    wandb.finish()
    pictures = list(tmp_path.rglob("media/images/*.png"))
    assert len(pictures) == 8 and all(Image.open(o).size == (64, 64) for o in pictures)
    assert not [o for o in tmp_path.rglob("*") if o.is_file() and b"swordfish" in o.read_bytes()]

def test_trackio(tmp_path):
    pytest.importorskip("trackio")
    import subprocess, sys, os  # its folder is decided when it is imported
    code = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_trackers import trainer
t = trainer({str(tmp_path)!r}, log_with="trackio")
t.train(progress=False)
for tracker in t.accelerator.trackers: tracker.finish()"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | dict(TRACKIO_DIR=str(tmp_path / "trackio"))
    )
    with sqlite3.connect(tmp_path / "trackio/tidy.db") as db:
        logged = [
            (name, step, json.loads(o))
            for name, step, o in db.execute("select run_name, step, metrics from metrics order by id")
        ]
    rows = [json.loads(o) for o in (tmp_path/"first/metrics.jsonl").read_text().splitlines()]
    assert {name for name, *_ in logged} == {"first"}
    assert [(step, o["reward_mean"]) for _, step, o in logged if "reward_mean" in o] == [
        (r["global_step"], r["reward_mean"]) for r in rows
    ]
    assert (
        sum(isinstance(v, dict) and v["_type"] == "trackio.image" for _, _, o in logged for v in o.values())
        == 8
    )
    assert len(list((tmp_path/"trackio/media").rglob("*.png"))) == 8
