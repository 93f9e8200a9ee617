"""Several processes are one run: the same images, advantages and gradient, checkpoints that hang nobody, and
an end with a message (FIELD's trap 5)."""
import json, os, re, socket, subprocess, sys, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file

SCRIPT = '''
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import PromptSource
from ddpo_nb.rewards import jpeg_compressibility
from ddpo_nb.rollout import sample_generator
from ddpo_nb.trainer import make_config, make_trainer

out, size = Path(sys.argv[1]), int(sys.argv[2])
c = make_config(
    "ddpo-is", sample_num_steps=4, sample_batch_size=size, train_batch_size=size, train_timestep_fraction=1.0,
    train_learning_rate=1e-2, micro_batch_size=5, num_epochs=3, num_checkpoint_limit=9, logdir=str(out),
    resume_from=sys.argv[3] if len(sys.argv) > 3 else "")
torch.manual_seed(0)
policy = StableDiffusionPolicy(load_pipeline())
t = make_trainer(c, jpeg_compressibility, PromptSource(["cat", "dog", "bear"], 0), policy)
rank, n = t.accelerator.process_index, t.accelerator.num_processes
if not c.resume_from:
    work = t.collect()
    examples = t.objective.examples(t.policy, work.trajectories, work.advantages, sample_generator(0, 0, 0))
    t.gradient(work.trajectories, examples)
    gradient = torch.cat([p.grad.flatten() for p in t.policy.trainable_parameters()])
    first = dict(images=work.trajectories.images.contiguous(), advantages=work.advantages, gradient=gradient)
    save_file(first, out/f"first-{n}-{rank}.safetensors")
    t.optimizer.zero_grad(); t.queries = 0; t.tracker.rewards.clear(); t.prompt_function.rng.seed(0)
t.train(progress=False)
weights = torch.cat([p.detach().flatten() for p in t.policy.trainable_parameters()])
save_file(dict(weights=weights), out/f"last-{n}-{rank}.safetensors")
'''

def launch(n, *args, timeout=300):
    """Run a script with `n` processes; torchrun is what `accelerate launch` uses for several, and on a
    CPU it talks by gloo"""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), "--master_port",
        str(free_port()), *map(str, args)
    ]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout,
        env=os.environ | dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true"),
    )

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The same global batch of 8, in one process and in two"
    home = tmp_path_factory.mktemp("processes")
    (home/"script.py").write_text(SCRIPT)
    for n in (1, 2):
        (home/str(n)).mkdir()
        p = launch(n, home/"script.py", home/str(n), 8 // n)
        assert p.returncode == 0, p.stderr[-3000:]
    one = load_file(home/"1/first-1-0.safetensors")
    return home, one, [load_file(home/f"2/first-2-{r}.safetensors") for r in (0, 1)]

def test_images_are_the_same(runs):
    _, one, two = runs
    assert (torch.cat([o["images"] for o in two]) - one["images"]).abs().max() < 1e-5

def test_advantages_are_over_all_processes(runs):
    _, one, two = runs
    assert torch.cat([o["advantages"] for o in two]).tolist() == pytest.approx(
        one["advantages"].tolist(), abs=1e-6
    )

def test_trap_5_gradients_are_synchronised(runs):
    _, one, two = runs
    assert torch.equal(two[0]["gradient"], two[1]["gradient"])
    assert (two[0]["gradient"] - one["gradient"]).norm() < 1e-6 * one["gradient"].norm()

def test_weights_stay_alike(runs):
    home, *_ = runs
    a, b = (load_file(home/f"2/last-2-{r}.safetensors")["weights"] for r in (0, 1))
    assert torch.equal(a, b)

def test_trap_5_checkpoints_are_written_by_all_and_resume(runs):
    home, *_ = runs
    assert sorted(o.name for o in (home / "2/checkpoints/checkpoint_2").glob("process-*.json")) == [
        "process-0.json", "process-1.json"
    ]
    (home/"again").mkdir()
    p = launch(2, home/"script.py", home/"again", 4, home/"2/checkpoints/checkpoint_2")
    assert p.returncode == 0, p.stderr[-3000:]
    assert torch.equal(
        load_file(home / "again/last-2-0.safetensors")["weights"],
        load_file(home / "2/last-2-0.safetensors")["weights"]
    )

def test_another_number_of_processes_is_refused(runs):
    home, *_ = runs
    p = launch(1, home/"script.py", home/"other", 8, home/"2/checkpoints/checkpoint_2")
    assert p.returncode != 0 and "sample_batch_size was 4" in p.stderr

def test_the_command_line_under_accelerate(tmp_path):
    p = launch(
        2, "-m", "ddpo_nb", "train", "--queries", "16", "--sample-num-steps", "2", "--sample-batch-size", "4",
        "--train-batch-size", "4", "--evaluation-samples", "2", "--output", tmp_path / "run", "--no-progress"
    )
    assert p.returncode == 0, p.stderr[-3000:]
    rows = [json.loads(o) for o in (tmp_path/"run/metrics.jsonl").read_text().splitlines()]
    assert [r["queries"] for r in rows] == [8, 16] and (tmp_path/"run/report.html").exists()

def test_a_process_that_dies_ends_the_run(tmp_path):
    (tmp_path / "r.py").write_text(
        "import os\ndef f(images, prompts, metadata):\n    if os.environ['RANK'] == '1': os._exit(7)\n   "
        " return images.mean((1, 2, 3)), {}\n"
    )
    start = time.monotonic()
    p = launch(
        2, "-m", "ddpo_nb", "train", "--reward", f"{tmp_path}/r.py:f", "--queries", "16",
        "--sample-num-steps", "2", "--sample-batch-size", "4", "--train-batch-size", "4",
        "--evaluation-samples", "2", "--output", tmp_path / "run", "--no-progress", timeout=120
    )
    assert p.returncode != 0 and time.monotonic() - start < 100
    assert re.search("exitcode *: *7", p.stdout + p.stderr)
