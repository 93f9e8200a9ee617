"Rewards in threads and processes: the same numbers as alone, and the same errors."
import os, sys, threading, time, traceback
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from ddpo_nb.prompts import InputError
from ddpo_nb.rewards import ParallelReward, join_info, jpeg_compressibility, check_rewards

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

def images(n, seed=0): return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))

def thorough(images, prompts, metadata):
    "A reward that reports all kinds of things"
    own = [m["n"] for m in metadata]
    return images.mean((1, 2, 3)), dict(
        n=own, length=np.array([len(p) for p in prompts]), mean=images.mean((1, 2, 3)), pair=tuple(own),
        version="1", scale=np.float64(2), of=os.getpid()
    )

def thorough_but_where(*args):
    rewards, info = thorough(*args)
    return rewards, {k: v for k, v in info.items() if k != "of"}

def strange(images, prompts, metadata):
    return {
        "list": [1.0] * len(images), "short": [1.0], "text": ["high"] * len(images), "none": None,
        "nan": [float("nan")] + [0.0] * (len(images) - 1), "matrix": np.ones((len(images), 2))
    }[prompts[0]], {}

class Delicate(Exception):
    "An exception that does not survive pickling"
    def __init__(self, a, b): super().__init__(f"{a} and {b}")

def raises(images, prompts, metadata):
    if "boom" in prompts: open("/nowhere/at/all")
    if "delicate" in prompts: raise Delicate(1, 2)
    if "input" in prompts: raise InputError("the judge", "is not in", "come again")
    return images.mean((1, 2, 3)), {}

def any_of(images, prompts, metadata):
    "One pool for many tests: the prompts' metadata says which reward is meant"
    return globals()[metadata[0]["do"] if metadata else "thorough"](images, prompts, metadata)

def do(name, n): return [dict(n=i, do=name) for i in range(n)]

def dies(images, prompts, metadata): os._exit(3)

class WithState:
    "A reward object with weights"
    def __init__(self, scale): self.scale, self.moved = torch.tensor(scale), []
    def to(self, device): self.moved.append(device)
    def __call__(self, images, prompts, metadata):
        return self.scale * images.flatten(1).mean(1).bfloat16(), None

def both(found, n):
    rewards, info = found
    return check_rewards(rewards, n, "r").tolist(), {
        k: v.tolist() if hasattr(v, "tolist") else v for k, v in (info or {}).items() if k != "of"
    }

@pytest.fixture(scope="module")
def pools():
    "A process takes seconds to import torch: all tests that can share two"
    with ParallelReward(any_of, 2, "process") as p, ParallelReward(any_of, 2) as t:
        yield dict(process=p, thread=t)

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(1, 6))
def test_threads_are_the_serial_path(n, workers):
    args = images(n), [f"{i} " * i for i in range(n)], [dict(n=i) for i in range(n)]
    with ParallelReward(thorough, workers) as pool: found = pool(*args)
    assert both(found, n) == both(thorough(*args), n) and found[0].dtype == np.float64
    for k, v in thorough(*args)[1].items(): assert type(found[1][k]) is type(v)

@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 9), st.integers(0, 99))
def test_processes_are_the_serial_path(pools, n, seed):
    args = images(n, seed), ["x" * i for i in range(n)], do("thorough", n)
    found = pools["process"](*args)
    assert both(found, n) == both(thorough(*args), n)
    for k, v in thorough(*args)[1].items(): assert type(found[1][k]) is type(v) or k == "of"

def test_processes_are_others(pools):
    where = pools["process"](images(4), ["a"]*4, do("thorough", 4))[1]["of"]
    assert os.getpid() not in (where if isinstance(where, list) else [where])

def test_threads_overlap_and_keep_the_order():
    entered = threading.Barrier(3, timeout=20)   # passed only by three calls at once
    def waits(images, prompts, metadata):
        entered.wait()
        time.sleep(.05 if prompts[0] == "0" else 0)  # the first part is the last to be ready
        return [float(p) for p in prompts], {}
    with ParallelReward(waits, 3) as pool:
        assert pool(images(7), [str(i) for i in range(7)], [{}] * 7)[0].tolist() == [*range(7)]

@pytest.mark.slow
def test_bf16_and_weights_travel():
    reward = WithState(3.)
    with ParallelReward(reward, 1, "process") as pool:
        assert (
            pool(images(3).bfloat16(), ["a"] * 3, [{}] * 3)[0]
            == reward(images(3).bfloat16(), 0, 0)[0].double().numpy()
        ).all()
        first = pool.pool
        assert pool.to("cpu") is pool and reward.moved == ["cpu"] and pool.pool is None
        # closed, it begins anew
        assert pool(images(3).bfloat16(), ["a"]*3, [{}]*3)[0].shape == (3,) and pool.pool is not first
    assert pool.pool is None

# Metadata

@pytest.mark.parametrize(
    "infos,sizes,joined",
    [
        ([dict(a=[1, 2]), dict(a=[3])], [2, 1], dict(a=[1, 2, 3])),
        ([dict(a=1), dict(a=1)], [2, 1], dict(a=1)), ([dict(a=1), dict(a=2)], [2, 1], dict(a=[1, 2])),
        ([dict(a=[1]), dict(a=[1])], [2, 1], dict(a=[1])),
        ([dict(a=[1]), dict(a=[2])], [2, 2], dict(a=[[1], [2]])),
        ([dict(a=1), {}], [1, 1], dict(a=[1, None])), ([None, None], [1, 1], {}), ([None], [2], {}),
        ([dict(a=[7])], [2], dict(a=[7])), ([dict(a="x"), dict(a="y")], [1, 1], dict(a=["x", "y"])),
        ([dict(a=[1]), dict(a=(2,))], [1, 1], dict(a=[[1], (2,)]))
    ],
)
def test_metadata_is_joined_kept_or_collected(infos, sizes, joined):
    assert join_info(infos, sizes) == joined

# What goes wrong

@pytest.mark.parametrize("kind", ["thread", "process"])
@pytest.mark.parametrize(
    "what,says",
    [
        ("short", "returned 1 rewards for 2"), ("text", "not numbers"), ("none", "not numbers"),
        ("matrix", r"shape \(2, 2\)")
    ],
)
def test_a_part_with_wrong_rewards_is_named(kind, what, says, pools):
    with pytest.raises(InputError, match=f"reward any_of: .*{says}"):
        pools[kind](images(4), [what] * 4, do("strange", 4))

@pytest.mark.parametrize("kind", ["thread", "process"])
def test_what_is_not_finite_is_left_to_the_check_of_the_whole(kind, pools):
    with pytest.raises(InputError, match="2 of 4 values that are not finite, first for prompt 0"):
        check_rewards(pools[kind](images(4), ["nan"] * 4, do("strange", 4))[0], 4, "r")

@pytest.mark.parametrize("kind", ["thread", "process"])
def test_an_error_comes_with_the_functions_own_traceback(kind, pools):
    with pytest.raises(FileNotFoundError) as e:
        pools[kind](images(4), ["a", "a", "a", "boom"], do("raises", 4))
    shown = "".join(traceback.format_exception(e.value))
    assert (
        'if "boom" in prompts: open("/nowhere/at/all")' in shown
        and "in raises" in shown
        and e.value.filename == "/nowhere/at/all"
    )
    if kind == "process": assert "in _work" not in shown
    assert len(pools[kind](images(4), ["a"]*4, do("raises", 4))[0]) == 4   # the pool lives on

def test_an_error_that_cannot_travel_is_told_in_words(pools):
    with pytest.raises(RuntimeError, match="Delicate: 1 and 2") as e:
        pools["process"](images(2), ["delicate"] * 2, do("raises", 2))
    assert "raise Delicate(1, 2)" in "".join(traceback.format_exception(e.value))
    with pytest.raises(Delicate): pools["thread"](images(2), ["delicate"]*2, do("raises", 2))

def test_an_input_error_stays_one(pools):
    for kind in pools:
        with pytest.raises(InputError, match="^the judge: is not in; come again$"):
            pools[kind](images(2), ["input"] * 2, do("raises", 2))

def inner():
    def f(images, prompts, metadata): return [0.] * len(images), {}
    return f

@pytest.mark.parametrize("reward", [lambda *a: 0, inner(), threading.Lock()])
def test_a_reward_that_cannot_be_sent_is_one_line(reward):
    with pytest.raises(InputError, match="^reward_pool: reward .* cannot be sent to another process") as e:
        ParallelReward(reward, 2, "process")(images(2), ["a"] * 2, [{}] * 2)
    assert "\n" not in str(e.value)

def test_metadata_that_cannot_be_sent_is_one_line(pools):
    with pytest.raises(InputError, match="metadata cannot be sent") as e:
        pools["process"](images(2), ["a"] * 2, [dict(n=threading.Lock())] * 2)
    assert "\n" not in str(e.value)

def test_a_reward_that_a_new_process_does_not_know_is_one_line(monkeypatch):
    "As one that was defined in a notebook: found here by its name, and not there"
    def later(images, prompts, metadata): return [0.] * len(images), {}
    later.__qualname__ = "later"
    monkeypatch.setattr(sys.modules[__name__], "later", later, raising=False)
    with (
        ParallelReward(later, 1, "process") as pool,
        pytest.raises(InputError, match="new process cannot load the reward .*AttributeError") as e,
    ):
        pool(images(2), ["a"] * 2, [{}] * 2)
    assert "\n" not in str(e.value)

@pytest.mark.slow
def test_a_worker_that_dies_is_one_line():
    with (
        ParallelReward(dies, 1, "process") as pool,
        pytest.raises(InputError, match="ended before it could answer") as e
    ):
        pool(images(2), ["a"] * 2, [{}] * 2)
    assert "\n" not in str(e.value) and pool.pool is None

@pytest.mark.parametrize(
    "kw,says", [(dict(kind="fork"), "choose from thread, process"), (dict(workers=0), "above 0")]
)
def test_settings_are_checked(kw, says):
    with pytest.raises(InputError, match=says): ParallelReward(thorough, **kw)

# In the trainer

def trainer(reward, **kw):
    from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
    from ddpo_nb.trainer import DDPOConfig, make_trainer
    c = DDPOConfig(
        **dict(
            sample_num_steps=2, sample_batch_size=2, sample_num_batches_per_epoch=3, train_batch_size=2,
            num_epochs=2, mixed_precision="no", logdir=""
        )
        | kw
    )
    torch.manual_seed(0)
    prompts = iter(["cat", "dog", "bee"] * 99)
    return make_trainer(c, reward, lambda: (next(prompts), dict(n=1)), StableDiffusionPolicy(load_pipeline()))

def rows(t):
    return [
        {k: v for k, v in r.items() if not k.startswith(("seconds", "images_per", "peak"))}
        for r in t.train(progress=False)
    ]

def test_a_run_is_the_same_alone_in_threads_and_in_processes():
    "The reward, what it reports, and what is watched besides"
    kinds = [
        dict(), dict(async_reward_computation=True),
        dict(async_reward_computation=True, reward_pool="process", max_workers=1),
    ]
    seen, found = [], []
    for kw in kinds:
        t, shown = trainer(thorough_but_where, watch_reward="jpeg_incompressibility", **kw), []
        t.hook = lambda batches, *_: shown.append(
            [
                (b[1], b[3].tolist(), {k: v.tolist() if hasattr(v, "tolist") else v for k, v in b[4].items()})
                for b in batches
            ]
        )
        found.append(rows(t)); seen.append(shown)
        assert t.pool is None or t.pool.pool is None   # closed at the end
    assert (
        found[0] == found[1] == found[2]
        and seen[0] == seen[1] == seen[2]
        and len(seen[0]) == 2
        and all("watch_mean" in r for r in found[0])
    )

@pytest.mark.slow
def test_a_reward_that_raises_in_a_process_shows_its_own_traceback():
    t = trainer(
        raises, async_reward_computation=True, reward_pool="process", max_workers=1, num_epochs=1,
        sample_num_steps=1
    )
    t.prompt_function = lambda: ("boom", {})
    with pytest.raises(FileNotFoundError) as e: t.train(progress=False)
    assert 'open("/nowhere/at/all")' in "".join(traceback.format_exception(e.value)) and t.pool.pool is None

def test_a_trainers_reward_that_cannot_be_sent_is_one_line():
    t = trainer(lambda *a: 0, async_reward_computation=True, reward_pool="process", sample_num_steps=1)
    with pytest.raises(InputError, match="cannot be sent") as e: t.train(progress=False)
    assert "\n" not in str(e.value)

def test_the_pool_is_a_choice_and_never_a_result():
    from ddpo_nb.trainer import DDPOConfig, RESULT_FREE
    assert DDPOConfig().reward_pool == "thread" and "reward_pool" in RESULT_FREE
    with pytest.raises(InputError, match="reward_pool: .*thread, process"): DDPOConfig(reward_pool="fork")

def test_a_reward_that_is_exchanged_gets_its_own_pool():
    t = trainer(thorough, async_reward_computation=True)
    t.ask()
    one = t.pool
    t.reward_function = jpeg_compressibility
    t.ask()
    two = t.pool
    t.ask()
    assert two.reward.reward is jpeg_compressibility and t.pool is two and one.pool is None

def test_a_worker_ends_with_a_parent_that_is_killed():
    import multiprocessing, signal
    from ddpo_nb.rewards import _begin
    def work(): _begin(b""); time.sleep(60)
    reader, writer = os.pipe()
    if (parent := os.fork()) == 0:
        worker = multiprocessing.get_context("fork").Process(target=work)
        worker.start()
        os.write(writer, str(worker.pid).encode())
        time.sleep(60); os._exit(0)
    worker = int(os.read(reader, 20))
    time.sleep(0.3)
    os.kill(worker, 0)  # it lives
    os.kill(parent, signal.SIGKILL); os.waitpid(parent, 0)
    def gone():
        try: return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError: return True
    for _ in range(100):
        if gone(): break
        time.sleep(0.1)
    else: os.kill(worker, signal.SIGKILL); pytest.fail("the worker lives on")
