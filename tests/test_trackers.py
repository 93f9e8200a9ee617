"""What arrives at Weights & Biases and at trackio, both without a network, and at any other of accelerate's
trackers."""
import json, sqlite3
import numpy as np, pytest, torch
from PIL import Image
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import PromptSource
from ddpo_nb.rewards import jpeg_compressibility
from ddpo_nb.trainer import make_config, make_trainer

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

PROMPTS = ["a cat on a blue background", "dog"]

def trainer(home, **kw):
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
        c, jpeg_compressibility, PromptSource(PROMPTS), StableDiffusionPolicy(load_pipeline())
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
