"""One folder, one run: a second one is refused before it writes, whoever died is forgotten, and nothing waits
for ever."""
import json, os, shlex, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest
from ddpo_nb import checkpoints as C
from ddpo_nb.checkpoints import FolderLock, check_free
from ddpo_nb.cli import main
from ddpo_nb.prompts import InputError

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

HOLD = """
import datetime, fcntl, json, os, pathlib, socket, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir(exist_ok=True)
f = open(folder/".lock", "w"); fcntl.flock(f, fcntl.LOCK_EX)
holder = dict(pid=os.getpid(), host=socket.gethostname(), started=datetime.datetime.now().isoformat())
json.dump(holder, f); f.flush()
print("held", flush=True); time.sleep(60)
"""  # what FolderLock does, without the seconds that importing torch takes

@pytest.fixture
def holder(tmp_path):
    "Another process that writes to tmp_path/run"
    p = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path/"run")], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "held\n"
    yield p
    p.kill(); p.wait()

def files(folder):
    return sorted((str(o.relative_to(folder)), o.stat().st_mtime_ns) for o in folder.rglob("*"))

def test_the_second_is_told_who_has_it_and_a_dead_holder_is_forgotten(tmp_path, holder):
    run, before = tmp_path/"run", files(tmp_path)
    for ask in (FolderLock(run).__enter__, lambda: check_free(run)):
        with pytest.raises(
            InputError,
            match=(
                f"being written to by process {holder.pid} on this machine since 20.*wait for it, or name"
                " another"
            ),
        ):
            ask()
    assert files(tmp_path) == before
    holder.kill(); holder.wait()
    assert (run/".lock").exists()
    check_free(run)
    with FolderLock(run): assert json.loads((run/".lock").read_text())["pid"] == os.getpid()
    assert not list(run.iterdir())

@pytest.mark.parametrize("line", ["compare --seeds 0,1", "train", "train --resume"])
def test_the_command_line_is_refused_before_anything_is_written(tmp_path, holder, capsys, line):
    (tmp_path/"run/config.json").write_text("{}")
    before = files(tmp_path)
    assert main(shlex.split(f"{line} --output {tmp_path}/run")) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"process {holder.pid}" in err and "--output" in err, err
    assert files(tmp_path) == before

def test_a_trainer_is_refused_too_before_it_samples(tmp_path, holder):
    from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
    from ddpo_nb.trainer import DDPOConfig, DDPOTrainer
    c = DDPOConfig(logdir=str(tmp_path), run_name="run", mixed_precision="no")
    before = files(tmp_path)
    with pytest.raises(InputError, match=f"logdir: .*process {holder.pid}"):
        DDPOTrainer(c, lambda *a: 1 / 0, lambda: ("cat", {}), StableDiffusionPolicy(load_pipeline()))
    assert files(tmp_path) == before

def test_inside_a_lock_the_same_lock_may_be_taken_again_and_another_may_not(tmp_path):
    with FolderLock(tmp_path/"a/b") as lock:
        with lock: pass
        check_free(tmp_path/"a/b")  # this process's own
        with pytest.raises(InputError, match="this very process"): FolderLock(tmp_path/"a/b").__enter__()
        with pytest.raises(InputError, match="this very process"): check_free(tmp_path/"a/b", own=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), FolderLock(tmp_path): 1 / 0
    assert not list(tmp_path.iterdir())

def note(folder, **kw):
    (folder / ".lock").write_text(
        json.dumps(dict(pid=os.getpid(), host=socket.gethostname(), started="2026-01-01T00:00:00") | kw)
    )

@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"pid": "x"}', "\0\xff", '{"pid": -1, "host": "", "started": "yesterday"}'],
)
def test_a_lock_file_with_nonsense_in_it_locks_nothing(tmp_path, text, monkeypatch):
    monkeypatch.setattr(C, "_beat", 0.01)
    (tmp_path/".lock").write_text(text, encoding="latin-1")
    if "pid\": -1" in text:
        with pytest.warns(UserWarning, match="waiting"), FolderLock(tmp_path): pass
    else:
        with FolderLock(tmp_path): pass

def test_another_machines_lock_is_watched(tmp_path, monkeypatch):
    "A file system may not pass locks on: a sign of life decides"
    monkeypatch.setattr(C, "_beat", 0.05)
    note(tmp_path, host="elsewhere", pid=7)
    with pytest.warns(UserWarning, match="process 7 on elsewhere"), FolderLock(tmp_path): pass
    note(tmp_path, host="elsewhere", pid=7)
    touches = subprocess.Popen(
        ["sh", "-c", f"for i in 1 2 3 4 5 6 7 8 9; do sleep 0.05; touch {tmp_path}/.lock; done"]
    )
    monkeypatch.setattr(C, "_beat", 1.)
    with pytest.warns(UserWarning), pytest.raises(InputError, match="process 7 on elsewhere"):
        FolderLock(tmp_path).__enter__()
    touches.wait()

def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(C, "_beat", 0.02)
    with FolderLock(tmp_path):
        first = (tmp_path/".lock").stat().st_mtime_ns
        for _ in range(200):
            if (tmp_path/".lock").stat().st_mtime_ns != first: break
            time.sleep(0.02)
        else: pytest.fail("none")

def test_where_there_are_no_locks_the_process_number_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(C, "_grab", lambda *a: None)
    monkeypatch.setattr(C, "_beat", 0.01)
    note(tmp_path, started="2099-01-01T00:00:00")
    with pytest.raises(InputError, match="this very process"): FolderLock(tmp_path).__enter__()
    note(tmp_path, pid=2**22 + 5)  # nobody
    with FolderLock(tmp_path): pass
    note(tmp_path, started="1999-01-01T00:00:00")  # somebody younger than the lock
    with FolderLock(tmp_path): pass

def test_what_a_killed_process_was_writing_is_cleared(tmp_path):
    for name in (".writing-a", "weights/.writing-b/w", "results/.writing-c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path/".writing-file").write_text("half")
    with FolderLock(tmp_path):
        assert sorted(str(o.relative_to(tmp_path)) for o in tmp_path.rglob("*")) == [
            ".lock", "results", "weights"
        ]

def test_two_runs_of_one_second_get_two_folders(tmp_path, monkeypatch):
    from ddpo_nb import cli
    monkeypatch.chdir(tmp_path)
    args = cli.make_parser().parse_args(["train"])
    class Now(cli.datetime.datetime):
        @classmethod
        def now(cls, tz=None): return cls(2026, 11, 27, 3, 4, 5)
    monkeypatch.setattr(cli.datetime, "datetime", Now)
    assert [cli._output(args) for _ in range(3)] == [
        f"runs/train-jpeg_compressibility-20261127-030405{o}" for o in ("", "-2", "-3")
    ]

def test_resume_takes_the_newest_that_nobody_writes_to(tmp_path, monkeypatch):
    from ddpo_nb import cli
    monkeypatch.chdir(tmp_path)
    args = cli.make_parser().parse_args(["train", "--resume"])
    names = [f"runs/train-jpeg_compressibility-2026112{i}-000000" for i in (1, 2, 3)]
    for name in names[:2]: Path(name).mkdir(parents=True); (Path(name)/"config.json").write_text("{}")
    Path(names[2]).mkdir()  # never began
    assert cli._output(args) == names[1]
    with FolderLock(names[1]): assert cli._output(args) == names[0]
    with (
        FolderLock(names[1]), FolderLock(names[0]),
        pytest.raises(InputError, match="--resume: .*is being written to")
    ):
        cli._output(args)
