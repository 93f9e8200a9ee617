"Checkpoints: nothing is lost in them, nothing half-written is taken for one, and a damaged one is named."
import json, os, random, signal, subprocess, sys, tempfile, threading
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from ddpo_nb import checkpoints as C
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.checkpoints import (CheckpointError, check_whole, checkpoints, complaints, load_state,
                                 newest_whole, publish, rng_state, save_state, set_rng_state, stop_signals,
                                 write_atomic)

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner),
    max_leaves=12,
)

@settings(max_examples=40, deadline=None)
@given(plain)
def test_plain_values_come_back_as_they_were(tmp_path_factory, value):
    stem = tmp_path_factory.mktemp("s")/"state"
    save_state(stem, value)
    again = load_state(stem)
    assert again == value and repr(again) == repr(value)  # repr tells tuples from lists, -0.0 from 0.0

@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool], ids=str
)
def test_arrays_come_back_to_the_last_bit(tmp_path, dtype):
    value = {
        0: torch.randn(3, 4).mul(9).to(dtype), "view": torch.arange(12.0).reshape(3, 4).T,
        "scalar": torch.tensor(1.5), "numpy": np.random.default_rng(0).normal(size=5)
    }
    save_state(tmp_path/"s", value)
    again = load_state(tmp_path/"s")
    assert all(
        torch.equal(again[k], value[k]) and again[k].dtype == value[k].dtype for k in (0, "view", "scalar")
    ) and np.array_equal(again["numpy"], value["numpy"])

def test_an_optimizer_goes_on_as_if_never_stopped(tmp_path):
    def make():
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 4)
        return net, torch.optim.AdamW(net.parameters(), 0.1)
    def step(net, opt): opt.zero_grad(); net(torch.ones(2, 4)).square().sum().backward(); opt.step()
    a, b = make(), make()
    for _ in range(3): step(*a); step(*b)
    save_state(tmp_path/"s", b[1].state_dict())
    weights, b = b[0].state_dict(), make()
    b[0].load_state_dict(weights); b[1].load_state_dict(load_state(tmp_path/"s"))
    step(*a); step(*b)
    assert torch.equal(a[0].weight, b[0].weight)

@pytest.mark.parametrize(
    "value", [object(), {1: {2: lambda: 0}}, [b"bytes"]], ids=["object", "function", "bytes"]
)
def test_other_objects_are_refused(tmp_path, value):
    with pytest.raises(TypeError, match="cannot be kept"): save_state(tmp_path/"s", value)
    assert not list(tmp_path.iterdir())

def test_no_pickle(tmp_path):
    save_state(tmp_path/"s", dict(rng=rng_state(), a=torch.ones(2)))
    json.loads((tmp_path/"s.json").read_text())
    assert {o.suffix for o in tmp_path.iterdir()} == {".json", ".safetensors"}

def test_random_generators(tmp_path):
    draw = lambda: (random.random(), np.random.normal(), np.random.normal(), torch.rand(2).tolist())
    np.random.normal()  # leaves a second value waiting in numpy's generator
    save_state(tmp_path/"s", rng_state())
    first = draw()
    set_rng_state(load_state(tmp_path/"s"))
    assert draw() == first

def write(home, name, limit=5):
    (folder := home/f".writing-{name}").mkdir(parents=True)
    save_state(folder/"state", dict(name=name, x=torch.ones(100)))
    publish(folder, home, name, limit)

def test_the_newest_is_by_number_and_the_oldest_go(tmp_path):
    for name in ("checkpoint_2", "checkpoint_9", "checkpoint_10", "checkpoint_10-3", "checkpoint_10-12"):
        write(tmp_path, name, 4)
    (tmp_path/"checkpoint_old").mkdir(); (tmp_path/"checkpoint_99").write_text("a file")
    assert [o.name for o in checkpoints(tmp_path)] == [
        "checkpoint_10-12", "checkpoint_10-3", "checkpoint_10", "checkpoint_9"
    ]
    assert not list(tmp_path.glob(".*"))

def test_what_a_killed_process_left_is_cleared(tmp_path):
    for name in (".writing-x1/it", ".removing-x2/checkpoint_0"): (tmp_path/name).mkdir(parents=True)
    write(tmp_path, "checkpoint_1")
    assert [o.name for o in tmp_path.iterdir()] == ["checkpoint_1"]

def test_writing_one_again_replaces_it(tmp_path):
    write(tmp_path, "checkpoint_1"); write(tmp_path, "checkpoint_1")
    check_whole(tmp_path/"checkpoint_1")
    assert [o.name for o in tmp_path.iterdir()] == ["checkpoint_1"]

def cut(path): path.write_bytes(path.read_bytes()[:-7])
def flip(path): data = bytearray(path.read_bytes()); data[-1] ^= 1; path.write_bytes(data)
@pytest.mark.parametrize("harm", [cut, flip, Path.unlink], ids=["truncated", "altered", "missing"])
@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "files.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, harm, file):
    for k in (1, 2, 3): write(tmp_path, f"checkpoint_{k}")
    harm(tmp_path/"checkpoint_3"/file)
    with pytest.warns(UserWarning, match=f"checkpoint_3: {file}"):
        assert newest_whole(tmp_path).name == "checkpoint_2"

def test_none_is_whole(tmp_path):
    assert newest_whole(tmp_path) is None
    write(tmp_path, "checkpoint_1"); cut(tmp_path/"checkpoint_1/state.json")
    with pytest.warns(UserWarning): assert newest_whole(tmp_path) is None

def test_a_full_disk_is_said_in_one_line():
    with pytest.raises(CheckpointError, match="^cannot write it: No space left on device; earlier") as e:
        with complaints("it"): raise OSError(28, "No space left on device")
    assert "\n" not in str(e.value)

def test_files_that_may_not_grow(tmp_path):
    "A real refusal, as a full disk gives it: the limit on file sizes."
    code = f"""
import resource, signal, torch
from ddpo_nb.checkpoints import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with complaints("it"): save_state("{tmp_path}/s", torch.ones(100_000))
except CheckpointError as e: print(e)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.startswith("cannot write it: ") and out.stdout.count("\n") == 1, out

def test_first_signal_asks_second_acts():
    asked = []
    with pytest.raises(KeyboardInterrupt):
        with stop_signals(asked.append):
            signal.raise_signal(signal.SIGINT)
            assert asked == [signal.SIGINT]
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

def test_signals_are_left_alone_in_other_threads():
    seen = []
    def work():
        with stop_signals(seen.append): seen.append("ran")
    t = threading.Thread(target=work); t.start(); t.join()
    assert seen == ["ran"]

def test_write_atomic_leaves_the_old_file_if_it_fails(tmp_path):
    write_atomic(tmp_path/"a/f", "old")
    with pytest.raises(TypeError): write_atomic(tmp_path/"a/f", None)
    assert (tmp_path/"a/f").read_text() == "old" and len(list((tmp_path/"a").iterdir())) == 1

# Who may read it

@pytest.fixture(scope="module")
def policies(): return [StableDiffusionPolicy(load_pipeline(), use_lora=o) for o in (True, False)]

@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_what_is_written_follows_the_umask(tmp_path, policies, mask):
    (home := tmp_path/"home").mkdir()
    usual = os.umask(mask)
    try:
        write_atomic(home/"deep"/"report.html", "x")
        save_state((folder := Path(tempfile.mkdtemp(dir=home)))/"state", dict(a=torch.ones(2)))
        publish(folder, home, "checkpoint_1", 3)
        for o in policies: o.save_pretrained(home/"weights")
    finally: assert os.umask(usual) == mask
    found = {o.relative_to(home).as_posix(): o.stat().st_mode & 0o777 for o in home.rglob("*")}
    assert {"deep/report.html", "checkpoint_1/files.json", "weights/pytorch_lora_weights.safetensors"} <= {
        *found
    }
    assert "weights/unet/diffusion_pytorch_model.safetensors" in found
    assert {k: oct(v) for k, v in found.items() if v != (0o777 if (home/k).is_dir() else 0o666) & ~mask} == {}
