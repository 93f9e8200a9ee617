"""Several processes are one run: the same images, advantages and gradient, checkpoints that hang nobody, and
an end with a message (FIELD's trap 5)."""
import json, os, re, socket, subprocess, sys, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file

SCRIPT = '''
import os, signal, sys, threading, time, torch
from pathlib import Path
from safetensors.torch import save_file
from ddpo_nb.policy import StableDiffusionPolicy
from ddpo_nb.prompts import PromptSource
from ddpo_nb.rewards import jpeg_compressibility
from ddpo_nb.rollout import sample_generator
from ddpo_nb.trainer import make_config, make_trainer
sys.path.insert(0, os.environ["TESTS"])
from tiny_sd import tiny_sd

out, size = Path(sys.argv[1]), int(sys.argv[2])
c = make_config(
    "ddpo-is", sample_num_steps=4, sample_batch_size=size, train_batch_size=size, train_timestep_fraction=1.0,
    train_learning_rate=1e-2, micro_batch_size=5, num_epochs=3, num_checkpoint_limit=9, logdir=str(out),
    resume_from=sys.argv[3] if len(sys.argv) > 3 else "")
torch.manual_seed(0)
policy = StableDiffusionPolicy(tiny_sd())
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
def draws_of_their_own(examples, first, shape):
    "The noise and level of a sample's k-th draw, wherever it is drawn; trainers have generators of their own"
    count = {}
    for i, s in enumerate((first + examples["sample"]).tolist()):
        g = torch.Generator().manual_seed(1000 * s + count.setdefault(s, 0))
        count[s] += 1
        examples["noise"][i] = torch.randn(shape, generator=g)
        examples["timestep"][i] = torch.randint(1000, (), generator=g)
    return examples

def own_seeds(examples, first):
    "The same for DiffusionNFT, whose noise is drawn from a number"
    count = {}
    for i, s in enumerate((first + examples["sample"]).tolist()):
        examples["seed"][i] = 1000 * s + count.setdefault(s, 0)
        examples["step"][i] = count[s]
        count[s] += 1
    return examples

def rwr(algorithm, **kw):
    "The first epoch's weights and gradient, and the adapters after two."
    c = make_config(
        algorithm, sample_num_steps=2, sample_batch_size=size, sample_num_batches_per_epoch=1,
        train_batch_size=size, train_num_inner_epochs=1, rwr_draws=2, samples_per_prompt=1, num_epochs=2,
        logdir="", **kw)
    torch.manual_seed(0)
    policy = StableDiffusionPolicy(tiny_sd())
    prompts = PromptSource(["cat", "dog", "bear"], 1)
    t = make_trainer(c, lambda images, prompts, _: (images.mean((1, 2, 3)) * 30, {}), prompts, policy)
    work, first = t.collect(), rank * size
    examples = t.objective.examples(t.policy, work.trajectories, work.advantages, sample_generator(0, 0, 0))
    if algorithm == "nft":
        own_seeds(examples, first)
        away = torch.Generator().manual_seed(0)  # where the policy is no longer the one that sampled
        for p in t.policy.trainable_parameters(): p.data += 0.02 * torch.randn(p.shape, generator=away)
    elif algorithm != "draft": draws_of_their_own(examples, first, work.trajectories.latents.shape[2:])
    t.gradient(work.trajectories, examples)
    flat = lambda of: torch.cat([of(p).detach().flatten() for p in t.policy.trainable_parameters()])
    found = dict(weights=work.advantages, gradient=flat(lambda p: p.grad))
    t.optimizer.zero_grad(); t.queries = 0; t.tracker.rewards.clear(); prompts.rng.seed(1)
    t.train(progress=False)
    if algorithm == "nft": found["averaged"] = torch.cat([o.flatten() for o in t.objective.old])
    return {f"{algorithm}-{k}": v for k, v in (found | dict(trained=flat(lambda p: p))).items()}

def family(kind):
    "The adapters of another family's policy after two epochs."
    from ddpo_nb.loading import family_of
    from ddpo_nb.tiny import tiny_pipeline
    torch.manual_seed(0)
    pipe = tiny_pipeline(kind)
    of = family_of(pipe)
    of.text_window = 16
    c = make_config("ddpo-is", sample_num_steps=3, sample_batch_size=size, sample_num_batches_per_epoch=1,
                    train_batch_size=size, train_timestep_fraction=1.0, num_epochs=2, logdir="", lora_rank=4,
                    sample_resolution=16)
    reward = lambda images, prompts, _: (images.mean((1, 2, 3)) * 30, {})
    t = make_trainer(c, reward, PromptSource(["a cat", "a dog", "a fox"], 1), of(pipe))
    t.train(progress=False)
    return torch.cat([p.detach().flatten() for p in t.policy.trainable_parameters()])

def stopped():
    "Seconds from a signal, which comes while the reward is waited for, to the run's end."
    began = []
    def kill():
        began.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)
    def reward(images, prompts, metadata):
        threading.Timer(0.2, kill).start()
        time.sleep(60)
    c = make_config("ddpo-is", sample_num_steps=2, sample_batch_size=size, train_batch_size=size,
                    sample_num_batches_per_epoch=1, num_epochs=2, logdir=str(out/"stopped"))
    t = make_trainer(c, reward, PromptSource(["cat"], 0), StableDiffusionPolicy(tiny_sd()))
    try: t.train(progress=False)
    except SystemExit as e: return torch.tensor([e.code, time.monotonic() - began[0]])

t.train(progress=False)
weights = torch.cat([p.detach().flatten() for p in t.policy.trainable_parameters()])
save_file(dict(weights=weights), out/f"last-{n}-{rank}.safetensors")
if not c.resume_from:
    more = rwr("rwr", rwr_normalizer="prompt", rwr_rewards="raw", rwr_beta=1.0,
               per_prompt_stat_tracking=False)
    more |= rwr("rwr-sparse", rwr_fraction=0.4)
    more |= rwr("nft", train_timestep_fraction=1.0, kl_coef=0.1, nft_decay_rate=0.2, train_learning_rate=1e-2)
    more |= rwr("draft", draft_steps=2, train_learning_rate=1e-2)
    more |= {f"family-{kind}": family(kind) for kind in ("sdxl", "sd3-without-t5", "flux")}
    if n > 1: more["stopped"] = stopped()
    save_file(more, out/f"more-{n}-{rank}.safetensors")
'''

def launch(n, *args, timeout=300):
    """Run a script with `n` processes; torchrun is what `accelerate launch` uses for several, and on a
    CPU it talks by gloo"""
    torchrun = [
        "-m", "torch.distributed.run", "--nproc_per_node", str(n), "--master_port", str(free_port())
    ]
    return subprocess.run(
        [sys.executable, *(torchrun if n > 1 else []), *map(str, args)], capture_output=True, text=True,
        timeout=timeout,
        env=os.environ | dict(
            OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", TESTS=str(Path(__file__).parent)
        ),
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

@pytest.mark.parametrize("kind", ["sdxl", "sd3-without-t5", "flux"])
def test_every_family_is_the_same_in_two_processes(runs, kind):
    home, *_ = runs
    one, *two = (
        load_file(home / f"{n}/more-{n}-{r}.safetensors")[f"family-{kind}"]
        for n, r in ((1, 0), (2, 0), (2, 1))
    )
    assert torch.equal(*two)
    torch.testing.assert_close(two[0], one, atol=1e-4, rtol=1e-3)

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

@pytest.mark.parametrize("algorithm", ["rwr", "rwr-sparse"])
def test_rwr_is_the_same_in_two_processes(runs, algorithm):
    "Weights compare the samples of a prompt, wherever they were drawn; the gradient is that of all."
    home, *_ = runs
    one, *two = (load_file(home/f"{n}/more-{n}-{r}.safetensors") for n, r in ((1, 0), (2, 0), (2, 1)))
    weights, gradient, trained = (f"{algorithm}-{o}" for o in ("weights", "gradient", "trained"))
    joined = torch.cat([o[weights] for o in two])
    assert (joined - one[weights]).abs().max() < 1e-4 and one[weights].std() > 0.1
    assert torch.equal(two[0][gradient], two[1][gradient])
    assert (two[0][gradient] - one[gradient]).norm() < 1e-4 * one[gradient].norm() > 0
    assert torch.equal(two[0][trained], two[1][trained])

def test_nft_is_the_same_in_two_processes(runs):
    "Optimality compares all samples; gradient and averaged policy are one, though no noise was kept"
    home, *_ = runs
    one, *two = (load_file(home/f"{n}/more-{n}-{r}.safetensors") for n, r in ((1, 0), (2, 0), (2, 1)))
    joined = torch.cat([o["nft-weights"] for o in two])
    assert (joined - one["nft-weights"]).abs().max() < 1e-4 and one["nft-weights"].std() > 0.05
    assert torch.equal(two[0]["nft-gradient"], two[1]["nft-gradient"])
    gap = (two[0]["nft-gradient"] - one["nft-gradient"]).norm()
    assert gap < 1e-4 * one["nft-gradient"].norm() > 0
    for what in ("trained", "averaged"): assert torch.equal(two[0][f"nft-{what}"], two[1][f"nft-{what}"])
    assert not torch.equal(two[0]["nft-trained"], two[0]["nft-averaged"])

def test_draft_is_the_same_in_two_processes(runs):
    "Its walk back through the steps goes round the wrapper that would have averaged the gradients"
    home, *_ = runs
    one, *two = (load_file(home/f"{n}/more-{n}-{r}.safetensors") for n, r in ((1, 0), (2, 0), (2, 1)))
    joined = torch.cat([o["draft-weights"] for o in two])
    assert (joined - one["draft-weights"]).abs().max() < 1e-3 and one["draft-weights"].std() > 0.01
    assert torch.equal(two[0]["draft-gradient"], two[1]["draft-gradient"])
    gap = (two[0]["draft-gradient"] - one["draft-gradient"]).norm()
    assert gap < 1e-4 * one["draft-gradient"].norm() > 0
    assert torch.equal(two[0]["draft-trained"], two[1]["draft-trained"])
    assert (two[0]["draft-trained"] - one["draft-trained"]).abs().max() < 1e-3

def test_a_stop_does_not_wait_for_a_reward(runs):
    "SIGTERM, as torchrun passes it on, in the middle of a reward that takes a minute: all leave at once."
    home, *_ = runs
    for r in (0, 1):
        code, seconds = load_file(home/f"2/more-2-{r}.safetensors")["stopped"].tolist()
        assert code == 143 and seconds < 5
    assert (home/"2/stopped/checkpoints/checkpoint_0/files.json").is_file()

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
