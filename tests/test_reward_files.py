"What people bring as a reward: files of all kinds, functions of all kinds, and ways to end a run."
import functools
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpo_nb.compare import load_reward
from ddpo_nb.prompts import InputError
from ddpo_nb.reward_files import Guarded, RewardError
from ddpo_nb.rewards import ParallelReward, WeightedSum, _work, answer, ask, check_rewards, join_info

args = torch.ones(2, 3, 4, 4), ["a cat", "a dog"], [{}, {}]

@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    "Whatever a file imports is gone after the test, and so is its folder"
    from ddpo_nb import reward_files
    modules, path, meta = {*sys.modules}, sys.path[:], sys.meta_path[:]
    for name in ("_known", "_away"): monkeypatch.setattr(reward_files, name, {})
    monkeypatch.setattr(reward_files, "_here", None)
    yield
    for name in {*sys.modules} - modules: del sys.modules[name]
    sys.path[:], sys.meta_path[:] = path, meta

def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items(): (folder/f"{name}.py").write_text(text)
    return folder

def fetch(folder, name): return load_reward(f"{folder}/{name}")[0]

def test_a_neighbour_may_be_imported_inside_the_function(tmp_path):
    write(
        tmp_path,
        r=(
            "def f(i, p, m):\n    import helper\n    from pack.deep import V\n    return [helper.V + V] *"
            " len(p), {}"
        ),
        helper="V = 2",
    )
    write(tmp_path/"pack", __init__="", deep="V = 3")
    assert fetch(tmp_path, "r.py:f")(*args)[0] == [5, 5]

def test_two_folders_with_files_of_the_same_names(tmp_path):
    "Each sees its own neighbour, whichever is asked last, at the top and inside the function"
    for name in "ab":
        write(
            tmp_path / name,
            r="import top\ndef f(i, p, m):\n    import inside\n    return [top.V + inside.V] * len(p), {}",
            top=f"V = {'ab'.index(name)}", inside=f"V = {'ab'.index(name)}"
        )
    a, b = (fetch(tmp_path/name, "r.py:f") for name in "ab")
    for _ in range(2): assert a(*args)[0] == [0, 0] and b(*args)[0] == [2, 2]

def test_a_changed_neighbour_is_read_again(tmp_path):
    for v in (1, 2):
        write(tmp_path, r="from helper import V\ndef f(i, p, m): return [V] * len(p), {}", helper=f"V = {v}")
        assert fetch(tmp_path, "r.py:f")(*args)[0] == [v, v]

def test_a_neighbour_is_nobody_elses(tmp_path):
    "Only the folder's own files find what lies there first; and Python's own modules stay Python's"
    write(
        tmp_path,
        r=(
            "def f(i, p, m):\n    import wave, fastcore.xml\n    return [1.] * len(p),"
            " dict(wave=wave.__file__)"
        ),
        wave="raise RuntimeError", fastcore="raise RuntimeError"
    )
    sys.modules.pop("wave", None)
    assert str(tmp_path) not in fetch(tmp_path, "r.py:f")(*args)[1]["wave"]

@pytest.mark.parametrize(
    "name", ["json", "torch", "rewards", "ddpo_nb", "my-reward", "a.b", "__main__", "helper"]
)
def test_a_file_may_have_any_name(tmp_path, name):
    before = sys.modules.get(name)
    write(
        tmp_path,
        **{
            name: (
                "import json, torch\nfrom ddpo_nb.rewards import jpeg_size\ndef f(i, p, m): return"
                " [float(len(json.dumps(p)))] * len(p), {}"
            )
        },
    )
    f = fetch(tmp_path, f"{name}.py:f")
    assert len(f(*args)[0]) == 2 and pickle.loads(pickle.dumps(f))(*args) == f(*args)
    assert name in ("rewards", "helper") or sys.modules.get(name) is before

OWN = """
from __future__ import annotations
import pickle, typing
from dataclasses import dataclass, field
print("hello")
@dataclass
class Answer:
    "Dataclasses look at their module while it runs"
    value: float = 1.
    more: typing.ClassVar[int] = 3
    words: list[str] = field(default_factory=list)
def f(images, prompts, metadata):
    again = pickle.loads(pickle.dumps(Answer(2.)))
    return [again.value] * len(prompts), dict(answers=[Answer(o) for o in range(len(prompts))])
"""

@pytest.mark.parametrize("name", ["r", "json"])
def test_a_file_may_have_dataclasses_and_pickle_them(tmp_path, name, capsys):
    write(tmp_path, **{name: OWN})
    rewards, info = fetch(tmp_path, f"{name}.py:f")(*args)
    assert (
        rewards == [2, 2]
        and pickle.loads(pickle.dumps(info["answers"][1])).value == 1
        and capsys.readouterr().out == "hello\n"
    )

def test_a_files_own_classes_come_back_from_another_process(tmp_path):
    write(tmp_path, r=OWN.replace('print("hello")', ""))
    with ParallelReward(fetch(tmp_path, "r.py:f"), 1, "process") as pool: rewards, info = pool(*args)
    assert rewards.tolist() == [2, 2] and info["answers"][1].value == 1

def test_what_cannot_be_sent_back_is_one_line(monkeypatch):
    monkeypatch.setattr("ddpo_nb.rewards._own", lambda i, p, m: ([1., 1.], dict(lock=threading.Lock())))
    found, error, _ = pickle.loads(_work(pickle.dumps(args)))
    assert found is None and "cannot be sent back (TypeError" in str(error) and "\n" not in str(error)

CALLABLES = """
import functools
from ddpo_nb.rewards import jpeg_compressibility
def named(images, prompts, metadata, scale=1.): return [scale] * len(prompts), {}
bent = functools.partial(named, scale=1.)
short = lambda i, p, m: ([1.] * len(p), {})
star = lambda *a: ([1.] * len(a[1]), {})
class Judge:
    def __call__(self, images, prompts, metadata): return self.score(images, prompts, metadata)
    def score(self, images, prompts, metadata): return [1.] * len(prompts), {}
    @staticmethod
    def still(images, prompts, metadata): return [1.] * len(prompts), {}
    @classmethod
    def klass(cls, images, prompts, metadata): return [1.] * len(prompts), {}
judge = Judge()
class Wants(Judge):
    def __init__(self, threshold): pass
class Breaks(Judge):
    def __init__(self): raise OSError("no weights")
class Plain: pass
number = 3
def two(images, prompts): return [1.] * len(prompts), {}
def four(images, prompts, metadata, more): return [1.] * len(prompts), {}
async def later(images, prompts, metadata): return [1.] * len(prompts), {}
"""

@pytest.mark.parametrize(
    "name", ["named", "bent", "short", "star", "judge", "Judge", "judge.score", "Judge.still", "Judge.klass"]
)
def test_anything_that_can_be_called_is_a_reward(tmp_path, name):
    f = fetch(write(tmp_path, r=CALLABLES), f"r.py:{name}")
    assert (
        f.__name__ == name
        and check_rewards(f(*args)[0], 2, name).tolist() == [1, 1]
        and pickle.loads(pickle.dumps(f))(*args)[0] == [1, 1]
    )

@pytest.mark.parametrize(
    "name,says",
    [
        ("Wants", "wants arguments"), ("Plain", "no function"), ("number", "no function"),
        ("two", r"takes \(images, prompts\)"), ("four", "takes .*more"), ("later", "async"),
        ("Judge.score", r"takes \(self"), ("nothing", "no function"), ("judge.nothing", "no function"),
        ("", "no function"), (".", "no function"), ("Judge.", "no function")
    ],
)
def test_what_cannot_be_asked_is_one_line_before_anything_is_drawn(tmp_path, name, says):
    with pytest.raises(InputError, match=says) as e: fetch(write(tmp_path, r=CALLABLES), f"r.py:{name}")
    assert "\n" not in str(e.value) and e.value.argument == "--reward"

def test_python_callables_are_checked_alike():
    assert load_reward(functools.partial(lambda i, p, m, k: ([k] * len(p), {}), k=1.))[1] == "<lambda>"
    with pytest.raises(InputError, match="^reward: '<lambda>' takes"): load_reward(lambda images: 0)

@pytest.mark.parametrize(
    "text,says",
    [
        ("from . import helper", "relative import"), ("from .helper import V", "relative import"),
        ("from ..up import V", "relative import")
    ],
)
def test_a_relative_import_is_one_line(tmp_path, text, says):
    with pytest.raises(InputError, match=says) as e: fetch(write(tmp_path, r=text, helper="V = 1"), "r.py:f")
    assert "\n" not in str(e.value)

@pytest.mark.parametrize(
    "text",
    [
        "import sys\nsys.exit(0)", "raise BaseException('no')", "def f(:", "import nowhere_to_be_found",
        "x = 1\n\0",
        "# \xff\nx = 1 +",
        "def g(): return g()\ng()",
    ],
)
def test_a_file_that_cannot_be_run_shows_its_own_lines(tmp_path, text):
    (tmp_path/"r.py").write_bytes(text.encode("latin-1"))
    with pytest.raises(RewardError, match="cannot be imported") as e: fetch(tmp_path, "r.py:f")
    tb, seen = e.value.__cause__.__traceback__, []
    while tb: seen.append(tb.tb_frame.f_code.co_filename); tb = tb.tb_next
    assert not seen or seen[0] == str(tmp_path/"r.py")
    assert "r" not in sys.modules
    with pytest.raises(RewardError, match="Breaks"): fetch(write(tmp_path, c=CALLABLES), "c.py:Breaks")

# What comes back

@pytest.mark.parametrize(
    "result,says",
    [
        (None, "returned NoneType"), (1.0, "returned float"), ([1.0, 2.0], "returned list"),
        ({}, "returned dict"), ((1, 2, 3), "returned tuple"), (iter("ab"), "iterator"),
        ((1.0, {}), r"shape \(\)"), ((None, {}), "not numbers"),
        (((o for o in (1.0, 2.0)), {}), "not numbers"), ((["high", "low"], {}), "not numbers"),
        (({}, {}), "not numbers"), (([1.0], {}), "1 rewards for 2"), ((torch.ones(2, 3), {}), "shape"),
        (([1j, 2j], {}), "not numbers"), ((torch.tensor([1j, 2]), {}), "not numbers"),
        (([10**400, 1.0], {}), "not numbers"), (([float("inf"), 1.0], {}), "not finite"),
        (([None, 1.0], {}), "not numbers")
    ],
)
def test_what_is_no_answer_is_one_line(result, says):
    with pytest.raises(InputError, match=says) as e:
        check_rewards(Guarded(lambda i, p, m: result, "r")(*args)[0], 2, "r")
    assert "\n" not in str(e.value) and e.value.argument == "reward r"

@pytest.mark.parametrize(
    "rewards",
    [
        [True, False], np.array([True, False]), torch.tensor([True, False]), [torch.tensor(1.0), 0], (1, 0),
        np.float16([1, 0])
    ],
)
def test_what_is_an_answer(rewards):
    assert check_rewards(Guarded(lambda i, p, m: (rewards, None), "r")(*args)[0], 2, "r").tolist() == [1, 0]

def test_a_part_of_a_sum_says_what_it_returned_beside_its_rewards():
    with pytest.raises(InputError, match="reward a: returned list beside"):
        WeightedSum({"a": (1.0, lambda i, p, m: ([1.0, 1.0], [3]))})(*args)
    assert join_info([[1], [2]], [1, 1]) == [[1], [2]]

# What a reward does to what it is given, and to the program

def vandal(images, prompts, metadata):
    assert (
        images.min() == 1 and prompts == ["b", "a"] and metadata[0] == dict(n=[1])
    ), "somebody was here before"
    images.zero_(), prompts.clear(), metadata[0]["n"].append(2), metadata[1].update(x=1)
    return [1., 1.], {}

@pytest.mark.parametrize(
    "reward",
    [
        vandal, Guarded(vandal, "vandal"), WeightedSum({"a": (1.0, vandal), "b": (1.0, vandal)}),
        ParallelReward(vandal, 1), functools.partial(vandal)
    ],
)
def test_nobody_else_sees_what_a_reward_does_to_its_batch(reward):
    images, prompts, metadata = batch = torch.ones(2, 3, 4, 4), ["b", "a"], [dict(n=[1]), {}]
    for _ in range(2): answer(reward, *batch)
    assert images.min() == 1 and prompts == ["b", "a"] and metadata == [dict(n=[1]), {}]

def test_a_trainers_pictures_are_those_that_were_drawn(monkeypatch):
    "Its hook and its watched reward see them untouched, and a prompt's metadata is not written to"
    from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
    from ddpo_nb.rewards import REWARDS
    from ddpo_nb.trainer import make_config, make_trainer
    seen = []
    def spoil(images, prompts, metadata):
        images.fill_(0); prompts[0] = "spoilt"; metadata[0]["questions"].clear()
        return torch.arange(len(images)) * 1., {}
    def watch(images, prompts, metadata):
        seen.append(images.std().item())
        return spoil(images, prompts, metadata)
    monkeypatch.setitem(REWARDS, "watch", watch)
    questions = ["how many?"]
    config = make_config(
        "ddpo-is", sample_num_steps=2, sample_batch_size=2, train_batch_size=2, watch_reward="watch",
        logdir=""
    )
    t = make_trainer(
        config, spoil, lambda: ("a bear", dict(questions=questions)),
        StableDiffusionPolicy(load_pipeline(), lora_rank=1),
        image_samples_hook=lambda batches, *_: seen.append((batches[0][0].std().item(), batches[0][1])),
    )
    t.train(1, progress=False)
    assert seen[0] == seen[1][0] > .01 and seen[1][1] == ["a bear"]*2 and questions == ["how many?"]

class Away(BaseException): pass

@pytest.mark.parametrize(
    "error", [SystemExit(0), SystemExit(), SystemExit(3), SystemExit("bye"), GeneratorExit(), Away()]
)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: functools.partial(ask, f), lambda f: Guarded(f, "f"), lambda f: ParallelReward(f, 1),
        lambda f: WeightedSum({"a": (1.0, f)})
    ],
)
def test_a_reward_cannot_end_the_program(error, wrap):
    def f(images, prompts, metadata): raise error
    with pytest.raises(RewardError, match=f"raised {type(error).__name__}") as e: wrap(f)(*args)
    assert e.value.__cause__ is error and e.value.__cause__.__traceback__.tb_frame.f_code is f.__code__

@pytest.mark.parametrize("error", [SystemExit(143), KeyboardInterrupt()])
def test_an_interruption_is_no_failure_of_the_reward(error):
    def f(images, prompts, metadata): raise error
    with pytest.raises(type(error)): Guarded(f, "f")(*args)

def test_a_run_whose_reward_exits_has_failed(tmp_path, monkeypatch, capsys):
    "Status 1, the function's own lines, and what was finished before is whole"
    from ddpo_nb.checkpoints import newest_whole
    from ddpo_nb.cli import main
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        r=(
            "import sys\nn = 0\ndef f(images, prompts, metadata):\n    global n; n += 1\n    if n == 5:"
            " sys.exit(0)\n    return images.mean((1, 2, 3)), {}"
        ),
    )
    tiny = (
        "--evaluation-samples 2 --sample-num-steps 2 --train-batch-size 2 --sample-batch-size 2"
        " --sample-num-batches-per-epoch 1 --no-progress"
    )
    status = main(f"train --reward r.py:f --queries 4 {tiny} --output out".split())
    err = capsys.readouterr().err
    assert status == 1 and "SystemExit" in err and "sys.exit(0)" in err and "ddpo_nb/" not in err, err
    assert newest_whole(Path("out/runs/ddpo-is-seed0/checkpoints")) and Path("out/report.html").is_file()

# wherever a built-in reward may stand

FILE = '''
def warmth(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2)), {}
'''

def small(**kw):
    from ddpo_nb.trainer import DDPOConfig
    few = dict(mixed_precision="no", sample_num_steps=2, sample_batch_size=2, sample_num_batches_per_epoch=2,
               train_batch_size=4, num_epochs=1, logdir="")
    return DDPOConfig(**few | kw)

def run_small(reward, **kw):
    from ddpo_nb.policy import load_policy
    from ddpo_nb.prompts import PromptSource
    from ddpo_nb.trainer import make_trainer
    return make_trainer(small(**kw), reward, PromptSource(["cat", "dog"], 0), load_policy()).train(
        progress=False
    )[0]

@pytest.mark.usefixtures("small_unet")
def test_a_reward_of_ones_own_is_watched_summed_and_asked_in_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"my-own.py").write_text(FILE)
    from ddpo_nb.compare import load_reward
    from ddpo_nb.rewards import check_name, get_reward, jpeg_compressibility
    own, images = get_reward("my-own.py:warmth"), torch.rand(
        3, 3, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    want = (images[:, 0] - images[:, 2]).mean((1, 2))
    asked = images, ["a"] * 3, [{}] * 3
    np.testing.assert_allclose(np.asarray(own(*asked)[0]), want, rtol=1e-5)
    sum_ = "2*my-own.py:warmth + 0.5*jpeg_compressibility"
    assert check_name(sum_) == {"my-own.py:warmth": 2.0, "jpeg_compressibility": 0.5}
    values, info = load_reward(sum_)[0](*asked)
    np.testing.assert_allclose(values, 2 * want + 0.5 * jpeg_compressibility(*asked)[0], rtol=1e-4)
    assert "reward/my-own.py:warmth" in info
    row = run_small(jpeg_compressibility, watch_reward="my-own.py:warmth")
    assert abs(row["watch_mean"]) < 1
    apart = run_small(load_reward(sum_)[0], async_reward_computation=True, reward_pool="process")
    assert apart["reward_mean"] == pytest.approx(run_small(load_reward(sum_)[0])["reward_mean"], rel=1e-6)

def test_a_file_that_is_not_there_is_no_reward():
    with pytest.raises(InputError, match="^watch_reward: there is no file 'nowhere.py'"):
        small(watch_reward="nowhere.py:warmth")
    with pytest.raises(InputError, match="there is no file 'nowhere.py'"):
        small(watch_reward="jpeg_compressibility + nowhere.py:warmth")
