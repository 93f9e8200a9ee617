"The comparison: statistics, budgets, the examination, and a run directory that survives interruption."
import json
import math
import pickle
import re
import shlex
import shutil
from html import escape
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from hypothesis import given, settings, strategies as st

from ddpo_nb import checkpoints, compare as C
from ddpo_nb.checkpoints import write_atomic
from ddpo_nb.compare import (BASE, Comparison, Evaluation, RewardError, Table, compare, exam_generators,
                             exam_sets, fit_budget, latent_spread, load_reward, mean_interval, pm, spread,
                             t_quantile)
from ddpo_nb.figures import _colours, _labels
from ddpo_nb.plan import join_plans, made_anew, plain_command
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline, load_policy
from ddpo_nb.prompts import InputError, held_out_sets, prompt_source, usual_prompts
from ddpo_nb.rewards import jpeg_compressibility
from ddpo_nb.rollout import rollout
from ddpo_nb.scenes import KINDS, parse, shown
from ddpo_nb.trainer import ALGORITHMS, make_config

NO_GROUPS = [o for o in ALGORITHMS if o != "flow-grpo"]  # which wants two pictures of each prompt

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

tiny = dict(
    queries=4, evaluation_samples=2, sample_num_steps=2, train_batch_size=2, sample_batch_size=2,
    sample_num_batches_per_epoch=1, train_num_inner_epochs=1, rwr_draws=1, progress=False
)

# Statistics

@pytest.mark.parametrize(
    "df,t", [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (29, 2.0452), (1000, 1.96234)]
)
def test_t_quantile_is_that_of_the_tables(df, t):
    assert t_quantile(df) == pytest.approx(t, rel=2e-5)

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 60), st.floats(.5, .99))
def test_t_quantile_integrates_to_its_level(df, level):
    "Independent of the closed form: integrate torch's density"
    t = t_quantile(df, level)
    x = torch.linspace(0, t, 4001, dtype=torch.float64)
    inside = 2 * torch.trapezoid(
        torch.distributions.StudentT(torch.tensor(float(df), dtype=torch.float64)).log_prob(x).exp(), x
    )
    assert float(inside) == pytest.approx(level, abs=1e-5)

def test_mean_interval():
    m, h = mean_interval([1, 2, 3])
    assert (m, h) == (2, pytest.approx(4.3027 / math.sqrt(3), rel=1e-4))
    assert math.isnan(mean_interval([1])[1])
    with pytest.raises(ValueError): mean_interval([])
    with pytest.raises(ValueError): t_quantile(0)

def test_pm():
    assert [pm(-1.2345, 0.0321), pm(0.5, math.nan), pm(12, 3, sign=True), pm(0, 0)] == [
        "−1.234 ± 0.032", "0.500", "+12.0 ± 3.0", "0.000 ± 0.000"
    ]
    assert pm(83.3333, 0, places=1) == "83.3 ± 0.0"  # seeds that agree

# Budget

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.sets(st.sampled_from(NO_GROUPS), min_size=1), st.integers(1, 3))
def test_every_algorithm_gets_the_same_number_of_queries(queries, algorithms, processes):
    configs = {a: make_config(a) for a in sorted(algorithms)}
    if queries < processes:
        with pytest.raises(InputError): fit_budget(configs, queries, processes)
        return
    fitted, budget, notes = fit_budget(configs, queries, processes)
    assert 0 < budget <= queries
    assert {c.num_epochs * c.samples_per_epoch * processes for c in fitted.values()} == {budget}
    changed = budget < queries or any(
        fitted[a].samples_per_epoch != c.samples_per_epoch for a, c in configs.items()
    )
    assert changed == bool(notes)  # nothing is changed silently

def test_a_budget_too_small_for_groups_is_refused():
    configs = {a: make_config(a) for a in ("flow-grpo", "rwr")}
    fitted, budget, _ = fit_budget(configs, 1024)
    assert budget == 1024 and fitted["flow-grpo"].samples_per_prompt == 8
    with pytest.raises(InputError, match="samples_per_prompt"): fit_budget(configs, 1)

# Examination

@given(st.integers(1, 200), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_spread(n, k):
    chosen = spread(list(range(n)), k)
    assert len(chosen) == k
    if k <= n: assert chosen == sorted(set(chosen))
    else: assert set(chosen) == set(range(n))

def test_held_out_prompts_are_not_trained_on():
    items = prompt_source("imagenet_animals").items
    sets = exam_sets(items)
    seen = {p for p, _ in items}
    assert len(sets["seen"]) == 64
    assert not seen & {p for k in ("unseen_animals", "everyday_objects") for p, _ in sets[k]}

def test_scenes_are_held_out_where_scenes_are_trained_on():
    items = prompt_source("scenes").items
    sets = exam_sets(items, None, held_out_sets("scenes"))
    asked = {k: {shown(parse(p)) for p, _ in o} for k, o in sets.items()}
    assert asked == {"seen": {"both"}, "new_scenes": {"base"}, "unseen_scenes": {"neither"}}
    assert {parse(p).kind for p, _ in sets["seen"]} == {*KINDS}
    assert usual_prompts("emoji-sd3") == usual_prompts("a/model", "scenes_strict") == "scenes"
    assert usual_prompts("a/model", "scenes + 0.1*aesthetic") == "scenes"
    for reward in ("aesthetic", "my/scenes.py:scenes", lambda *o: o, ""):
        assert usual_prompts("emoji-sd", reward) == usual_prompts("a/model", reward) == "simple_animals"

def test_exam_noise_is_not_that_of_training():
    from ddpo_nb.rollout import sample_generator
    a, b = torch.randn(8, generator=exam_generators(3, 1)[0]), torch.randn(
        8, generator=exam_generators(3, 1)[0]
    )
    assert torch.equal(a, b)
    assert not any(torch.equal(a, torch.randn(8, generator=sample_generator(3, e, 0))) for e in range(3))

def test_a_small_budget_cuts_repeats_too_and_says_so():
    configs, budget, notes = fit_budget({"rwr-sparse": make_config("rwr-sparse")}, 4)
    assert budget == 4 and (
        configs["rwr-sparse"].samples_per_epoch, configs["rwr-sparse"].samples_per_prompt
    ) == (4, 4)
    assert (
        "rwr-sparse gets 4 pictures of each prompt that is drawn, not 8: they have to fit its epochs."
        in notes
    )

def test_latent_spread_is_the_mean_pairwise_distance():
    policy = load_policy()
    vae, x = policy.pipeline.vae, torch.rand(6, 3, 64, 64, generator=torch.manual_seed(0))
    with torch.no_grad():
        z = (vae.encode(2 * x - 1).latent_dist.mode() * vae.config.scaling_factor).flatten(1)
    by_hand = [
        np.mean(
            [
                float((z[i] - z[j]).square().mean().sqrt())
                for i in range(a, a + 3)
                for j in range(i + 1, a + 3)
            ]
        )
        for a in (0, 3)
    ]
    assert latent_spread(x, 3, policy.latents_of, batch_size=4) == pytest.approx(by_hand, rel=1e-4)
    assert latent_spread(x[:1].repeat(3, 1, 1, 1), 3, policy.latents_of) == pytest.approx([0], abs=1e-3)

# A run directory

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")/"first"
    return compare(output=folder, seeds=(0, 1), **tiny), folder

def test_run_directory_is_that_of_the_contract(run):
    c, folder = run
    for name in (
        "config.json", "metrics.jsonl", "report.html", "curves.png", "before_after.png",
        "weights/ddpo-is-seed0/pytorch_lora_weights.safetensors",
        "weights/rwr-seed1/pytorch_lora_weights.safetensors"
    ):
        assert (folder / name).stat().st_size > 0
    rows = [json.loads(o) for o in (folder/"metrics.jsonl").read_text().splitlines()]
    assert {(r["algorithm"], r["seed"]) for r in rows} == {(a, s) for a in ("ddpo-is", "rwr") for s in (0, 1)}
    for r in rows:
        assert {
            "algorithm", "seed", "reward", "epoch", "queries", "reward_mean", "reward_std", "seconds"
        } <= {*r} and r["reward"] == "jpeg_compressibility"
    assert {max(r["queries"] for r in rows if r["algorithm"] == a) for a in ("ddpo-is", "rwr")} == {4}
    assert not list(folder.rglob(".writing*")) and not list(folder.rglob("*unfinished*"))

def test_report_is_self_contained(run):
    page = (run[1]/"report.html").read_text()
    assert (
        not re.search(r'(?:src|href)="(?!data:|#)', page) and "<script" not in page and "url(http" not in page
    )
    assert (
        "prefers-color-scheme:dark" in page
        and 'name="viewport"' in page
        and "image-rendering:pixelated" in page
    )
    assert page.count("data:image/png") == 3 * len(run[0].evaluations[BASE, 0].shown)
    assert "DDPO-IS" in page and run[0].headline()[:30] in page

@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_on_a_phone(run, browser, scheme):
    page = browser.new_page(viewport=dict(width=390, height=844), color_scheme=scheme)
    failed = []
    page.on("requestfailed", lambda o: failed.append(o.url))
    page.goto((run[1]/"report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("[...document.images].every(o => o.naturalWidth > 0)") and not failed
    light = lambda css: sum(map(int, re.findall(r"\d+", css)[:3])) / 3
    ink, paper = page.evaluate(
        "[getComputedStyle(document.querySelector('svg')).color,"
        " getComputedStyle(document.querySelector('section')).backgroundColor]"
    )
    assert abs(light(ink) - light(paper)) > 150 and (light(paper) < 100) == (scheme == "dark")
    page.close()

def legs(images, prompts, metadata):
    "A reward that says more than one number: of animals alone, and nothing of the others"
    known = np.array([float(len(p)) if len(p) < 4 else np.nan for p in prompts])
    return images.mean((1, 2, 3)), dict(legs=known, height=images.amax((1, 2, 3)), words=prompts)

def test_what_a_reward_says_besides_has_a_table(tmp_path):
    c = compare(legs, output=tmp_path/"r", seeds=(0, 1), **tiny | dict(evaluation_samples=3))
    one = c.evaluations["rwr", 1]
    assert {*one.details} == {*one.rewards} and {*one.details["seen"]} == {"legs", "height"}
    row = c.breakdown()[2]
    assert [*row] == ["weights", "legs", "height"] and len(c.breakdown()) == 3
    means = [np.nanmean(c.evaluations["rwr", s].details["seen"]["legs"]) for s in (0, 1)]
    assert row["legs"] == pm(*mean_interval(means))
    page = (tmp_path/"r/report.html").read_text()
    assert "What the reward says in detail" in page and page.count("<th>legs</th>") >= 1
    again = Comparison.load(tmp_path/"r")
    assert again.breakdown() == c.breakdown() and again.html() == c.html()
    file = tmp_path/"r/results/rwr-seed1.json"
    said = json.loads(file.read_text())
    said["details"]["seen"]["legs"].pop()
    file.write_text(json.dumps(said))
    with pytest.warns(UserWarning, match="what the reward said in detail"):
        damaged = Comparison.load(tmp_path/"r")
    assert damaged.missing == [("rwr", 1)]

def test_a_result_of_before_there_were_details_is_whole(run, tmp_path):
    shutil.copytree(run[1], tmp_path/"old")
    for file in (tmp_path/"old/results").glob("*.json"):
        found = json.loads(file.read_text())
        del found["details"]
        file.write_text(json.dumps(found))
    old = Comparison.load(tmp_path/"old")
    assert not old.missing and not old.breakdown() and "in detail" not in old.html()

def test_load_gives_the_same_back(run):
    c, folder = run
    d = Comparison.load(folder)
    assert (d.headline(), d.table(), d.rows, d.settings) == (c.headline(), c.table(), c.rows, c.settings)
    assert d.html() == c.html()
    assert all(
        np.array_equal(a, b)
        for a, b in zip(d.evaluations["rwr", 1].pictures, c.evaluations["rwr", 1].pictures)
    )
    with pytest.raises(InputError, match="holds no comparison"): Comparison.load(folder.parent)

def test_rwr_runs_of_before_the_inverse_temperature_are_not_gone_on_with(run, tmp_path):
    folder = tmp_path/"old"
    shutil.copytree(run[1], folder)
    s = json.loads((folder/"config.json").read_text())
    for k in ("rwr_normalizer", "rwr_rewards"): del s["configs"]["rwr"][k]
    (folder/"config.json").write_text(json.dumps(s))
    assert len(Comparison.load(folder).table()) == 3   # its results can still be looked at
    with pytest.raises(
        InputError,
        match=(
            "--output: the RWR runs kept there are of when rwr_beta was a temperature, .*; name a new folder"
        ),
    ):
        compare(output=folder, seeds=(0, 1, 2), **tiny)

def test_trained_weights_load_and_reproduce_the_examination(run):
    c, folder = run
    s = c.settings["configs"]["ddpo-is"]
    items = exam_sets(prompt_source("simple_animals").items, 2)["seen"]
    policy = StableDiffusionPolicy(
        load_pipeline(lora=folder / "weights/ddpo-is-seed1"), num_steps=2,
        guidance_scale=s["sample_guidance_scale"]
    )
    images = rollout(policy, [p for p, _ in items], exam_generators(1, 2)).images
    assert jpeg_compressibility(images, [], [])[0] == pytest.approx(
        c.evaluations["ddpo-is", 1].rewards["seen"], abs=0.02
    )

def test_figures_and_table(run):
    c, _ = run
    assert len(c.table()) == 3 and [r["weights"] for r in c.table()] == ["base", "DDPO-IS", "RWR"]
    assert len(c.plot().axes[0].lines) >= 3 and len(c.gallery().axes) == 3 * len(c.evaluations[BASE, 0].shown)
    assert c.table().markdown().count("\n") == 4 and "<td>DDPO-IS</td>" in c.table()._repr_html_()

def test_rerun_keeps_what_is_finished(run, monkeypatch):
    c, folder = run
    before = {o: o.stat().st_mtime_ns for o in (folder/"weights").rglob("*.safetensors")}
    monkeypatch.setattr(C, "make_trainer", lambda *a, **k: pytest.fail("trained again"))
    again = compare(output=folder, seeds=(0, 1), **tiny)
    assert again.headline() == c.headline() and {o: o.stat().st_mtime_ns for o in before} == before

@pytest.mark.parametrize(
    "change,named",
    [
        (dict(queries=8), "queries is 4 there and 8 here"),
        (dict(reward="jpeg_incompressibility"), "reward is"),
        (dict(train_learning_rate=0.5), "train_learning_rate"),
        (dict(prompts="animal_activities"), "prompts is")
    ],
)
def test_a_different_comparison_is_refused(run, change, named):
    with pytest.raises(InputError, match=named): compare(output=run[1], seeds=(0, 1), **tiny | change)

def test_a_folder_of_before_there_were_baselines_is_gone_on_with(run):
    settings = run[0].settings
    old = settings | dict(
        configs={
            a: {k: v for k, v in c.items() if k not in ("baseline", "samples_per_prompt")}
            for a, c in settings["configs"].items()
        }
    )
    assert join_plans(settings, old)["configs"] == settings["configs"]
    other = settings | dict(
        configs={a: c | dict(samples_per_prompt=2) for a, c in settings["configs"].items()}
    )
    with pytest.raises(InputError, match="samples_per_prompt is 1 there and 2 here"): join_plans(other, old)

def test_interrupt_keeps_finished_runs_and_goes_on(tmp_path):
    calls = [0]
    def reward(images, prompts, metadata):
        calls[0] += 1
        # 3 for the base, 2 epochs and 3 for the first run, then the second run's first epoch
        if calls[0] == 9: raise KeyboardInterrupt
        return images.mean((1, 2, 3)), {}
    c = compare(reward, output=tmp_path/"run", **tiny)
    assert c.interrupted and c.names == ["ddpo-is"] and c.missing == [("rwr", 0)]
    assert "Not finished: RWR seed 0" in (tmp_path/"run/report.html").read_text()
    kept = (tmp_path/"run/weights/ddpo-is-seed0/pytorch_lora_weights.safetensors").stat().st_mtime_ns
    d = compare(reward, output=tmp_path/"run", **tiny)
    assert not d.interrupted and d.missing == [] and d.names == ["ddpo-is", "rwr"]
    assert (tmp_path/"run/weights/ddpo-is-seed0/pytorch_lora_weights.safetensors").stat().st_mtime_ns == kept
    assert not list((tmp_path/"run").rglob("*unfinished*"))

def test_everything_is_escaped(tmp_path):
    evil = '<img src=x onerror="alert(1)">'
    c = compare(
        lambda i, p, m: (i.mean((1, 2, 3)), {}), algorithms=("rwr",), prompts=[evil, "a|b"], command=evil,
        **tiny
    )
    assert evil not in c.html() and c.html().count("&lt;img src=x") >= 2

# Rewards

def test_load_reward_from_file(tmp_path):
    (tmp_path/"neighbour.py").write_text("K = 2.0")
    (tmp_path / "r.py").write_text(
        "from neighbour import K\ndef twice(i, p, m): return [K] * len(p), {}\ndef boom(i, p, m): raise"
        " KeyError('mine')\ndef bare(i, p, m): return [1.0] * len(p)"
    )
    function, name, *_ = load_reward(f"{tmp_path/'r.py'}:twice")
    assert name == "twice" and function(None, ["a", "b"], None)[0] == [2, 2]
    with pytest.raises(RewardError) as e: load_reward(f"{tmp_path/'r.py'}:boom")[0](None, [], [])
    frames = []
    tb = e.value.__cause__.__traceback__
    while tb: frames.append(tb.tb_frame.f_code.co_filename); tb = tb.tb_next
    assert frames == [str(tmp_path/"r.py")]  # the user's frames and none of ours
    with pytest.raises(InputError, match="return a pair"):
        load_reward(f"{tmp_path/'r.py'}:bare")[0](None, ["a"], [{}])
    with pytest.raises(InputError, match="has no function"): load_reward(f"{tmp_path/'r.py'}:nothing")
    with pytest.raises(InputError, match="there is no file"): load_reward(f"{tmp_path/'none.py'}:f")
    with pytest.raises(InputError, match="names no function"): load_reward(str(tmp_path/"r.py"))
    with pytest.raises(InputError, match="no reward named"): load_reward("beauty")

def test_a_files_reward_travels_to_another_process(tmp_path, monkeypatch):
    "Its module is nowhere to be imported from: what is sent is where the file is"
    monkeypatch.chdir(tmp_path)
    Path("r.py").write_text("def twice(i, p, m): return [2.0] * len(p), {}")
    sent = pickle.dumps(load_reward("r.py:twice")[0])
    monkeypatch.chdir("/")
    again = pickle.loads(sent)
    assert (
        again.__name__ == "twice"
        and again(None, ["a"], [{}]) == ([2.0], {})
        and pickle.loads(pickle.dumps(again))(None, [], []) == ([], {})
    )
    assert pickle.loads(pickle.dumps(load_reward("jpeg_compressibility")[0])).function is jpeg_compressibility

# Bad input

@pytest.mark.parametrize(
    "bad,named",
    [
        (dict(algorithms=("ppo",)), "algorithms"), (dict(algorithms=()), "algorithms"),
        (dict(algorithms=("rwr", "rwr")), "twice"), (dict(seeds=(-1,)), "seeds"),
        (dict(seeds=("a",)), "seeds"), (dict(queries=0), "queries"), (dict(nonsense=1), "nonsense"),
        (dict(evaluation_samples=1), "evaluation_samples"),
        (dict(overrides={"rwr": dict(sample_num_steps=9)}), "sample_num_steps"),
        (dict(overrides={"ddpo-sf": {}}), "overrides"), (dict(sample_num_steps=1001), "sample_num_steps"),
        (dict(reward="beauty"), "--reward"), (dict(prompts="nowhere.txt"), "--prompts"),
        (dict(samples_per_prompt=4), "samples_per_prompt: 4 does not divide the 2 samples"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(bad, named, tmp_path):
    with pytest.raises(InputError, match=named): compare(output=tmp_path/"run", **tiny | bad)
    assert list(tmp_path.iterdir()) == []

def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path/"thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds other files"): compare(output=tmp_path, **tiny)
    with pytest.raises(InputError, match="is a file"): compare(output=tmp_path/"thesis.tex", **tiny)
    assert [o.name for o in tmp_path.iterdir()] == ["thesis.tex"]

def test_write_atomic_leaves_the_old_file_whole(tmp_path, monkeypatch):
    write_atomic(tmp_path/"f", "old")
    monkeypatch.setattr(
        checkpoints.os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(InputError, match="No space left"): write_atomic(tmp_path/"f", "new")
    assert (tmp_path/"f").read_text() == "old" and len(list(tmp_path.iterdir())) == 1

# The report

def made_up(algorithms=("ddpo-is", "rwr"), seeds=(0,), reward="jpeg_compressibility", **settings):
    "A comparison whose numbers are invented: 4 pictures a set, for each algorithm and seed"
    sets = ("seen", "unseen_animals", "everyday_objects")
    facts = dict(
        model="emoji-sd", reward=reward, reward_name=reward, prompts="simple_animals", queries=8,
        algorithms=[*algorithms], seeds=[*seeds], lora=True, configs={a: dict(seed=0) for a in algorithms},
        notes=["A note."], machine="two cores", versions="0", command=None
    )
    c = Comparison(facts | settings)
    for i, name in enumerate((BASE, *algorithms)):
        for s in seeds:
            rng = np.random.default_rng([i, s])
            numbers = lambda: {k: [*(i + rng.normal(size=4) / 9)] for k in sets}
            c.keep(Evaluation(name, s, numbers(), numbers(), numbers(), [("seen", 0, "a cat")],
                              [Image.new("RGB", (8, 8))], 1.0))
            if i: c.add_row(dict(algorithm=name, seed=s, epoch=0, queries=8, reward_mean=1., reward_std=.1,
                                 seconds_sampling=3., seconds_reward=1., seconds_training=2.))
    return c

def test_headline_says_what_its_numbers_count():
    said = made_up().headline()
    assert "moved jpeg_compressibility (kB, negated) by +" in said
    assert len(re.findall(r"\d ± [\d.]+ kB\b", said)) == 4  # two gains, the base, the lead
    assert "jpeg_incompressibility (kB) by" in made_up(reward="jpeg_incompressibility").headline()
    points = made_up(reward="aesthetic").headline()
    assert re.search(r"aesthetic \(points, from 1 to 10\) by \S+ ± \S+ points ", points)
    own = made_up(reward="legs").headline()
    assert "moved legs by +" in own and "kB" not in own and not re.search(r"\d [;.]|  ", own)
    assert made_up().plot().axes[0].get_ylabel() == "jpeg_compressibility (kB, negated)"

def test_headline_owns_up_to_one_seed():
    assert made_up().headline().endswith(
        "One seed: ± is over pictures, and says nothing about another seed.")
    several = made_up(seeds=(0, 1, 2))
    assert "One seed" not in several.headline()
    del several.evaluations["rwr", 1], several.evaluations["rwr", 2]
    assert "One seed of RWR: " in several.headline() and "One seed of RWR:" in several.html()

def test_a_colour_of_the_report_means_one_algorithm():
    page = re.sub(r"<svg.*?</svg>|data:[^\"]+", "", made_up().html(), flags=re.S)
    hexes = [o.lower() for o in re.findall(r"#[0-9a-fA-F]{3,8}\b", page)]
    style = page[page.index("<style>"):page.index("</style>")]
    mine = {_colours[o] for o in (BASE, "ddpo-is", "rwr")}
    assert mine <= {*hexes} and not {*_colours.values()} & {*re.findall(r"#\w{3,8}\b", style)}
    # a dot of an algorithm's colour stands beside its name, and nowhere else
    dots = re.findall(r'background:(#\w+)"></span>([\w-]+)', page)
    assert {*dots} == {(_colours[o], _labels[o]) for o in (BASE, "ddpo-is", "rwr")}
    assert page.count("background:#") - style.count("background:#") == len(dots)
    far = lambda a, b: sum((int(a[k:k+2], 16) - int(b[k:k+2], 16)) ** 2 for k in (1, 3, 5)) ** .5
    colours = [*_colours.values()]
    assert min(far(a, b) for i, a in enumerate(colours) for b in colours[:i]) > 30

@pytest.mark.parametrize("name,home", [
    ("BASE", "figures"), ("Table", "figures"), ("pm", "figures"), ("QUERIES", "plan"),
    ("load_reward", "plan"), ("made_anew", "plan"),
    ("check_output", "folder"), ("RewardError", "reward_files"),
])
def test_what_moved_to_the_appendix_is_still_had_from_compare(name, home):
    assert getattr(C, name) is getattr(import_module(f"ddpo_nb.{home}"), name)

def test_a_comparison_brings_its_figures_its_report_and_its_folder():
    "As it did when all of it stood in one notebook"
    there = {o for o in dir(Comparison) if not o.startswith("_")}
    assert {"plot", "gallery", "times", "html", "report", "keep", "add_row", "write_rows", "write_plan",
            "save", "load", "summary", "table", "breakdown", "headline", "side_effects", "curve"} <= there
    kinds = pickle.loads(pickle.dumps(made_up().evaluations)).values()  # processes send them to each other
    assert all(type(o) is Evaluation for o in kinds)

@pytest.mark.parametrize("command,again", [
    ("ddpo-nb compare --output runs/a --seeds 0", "ddpo-nb compare --seeds 0 --output runs/a-again"),
    ("ddpo-nb train --output='my runs/a/' --resume", "ddpo-nb train --output 'my runs/a-again'"),
    ("ddpo-nb train --resume-from a --queries 8", "ddpo-nb train --queries 8 --output a-again"),
    ("ddpo-nb compare --queries 8", "ddpo-nb compare --queries 8"),
    ("it's mine", "it's mine"), ("# a note\nddpo-nb compare --output a\nddpo-nb compare --output a --resume",
                                 "# a note\nddpo-nb compare --output a-again"),
])
def test_the_way_to_make_it_again_names_a_new_folder(command, again):
    assert made_anew(command) == again and C.made_anew is made_anew
    page = made_up(command=command).html()
    assert f"<pre>{escape(again)}</pre>" in page

def test_a_folder_gone_on_with_names_all_its_commands(run, tmp_path):
    shutil.copytree(run[1], tmp_path/"more")
    c = Comparison.load(tmp_path/"more")
    new = c.settings | dict(seeds=[2], command="ddpo-nb compare --seeds 2 --output more")
    joined = join_plans(new, c.settings)
    assert joined["command"].splitlines() == [c.settings["command"], new["command"]]
    assert join_plans(joined, joined)["command"] == joined["command"]

def test_a_call_from_python_is_told_with_its_settings(run):
    said = run[0].settings["command"]
    flags = "--sample-num-steps 2", "--rwr-draws 1", "--evaluation-samples 2", "--seeds 0,1", "--queries 4"
    assert all(o in said for o in flags)
    plan = run[0].settings | dict(lora=False, init_lora=None, evaluation_samples=None)
    given = dict(allow_tf32=False, tracker_kwargs=dict(key="k"))
    more = plain_command(plan, "x", given, {"rwr": dict(rwr_beta=2.0)})
    assert "--no-allow-tf32 --no-lora --set rwr.rwr_beta=2.0 --output x" in more and "key" not in more
    from ddpo_nb.cli import make_parser
    args = make_parser().parse_args(shlex.split(more)[1:])
    assert args.lora is False and args.allow_tf32 is False and args.output == "x"

def test_wide_tables_scroll_on_a_phone_and_say_so(browser, tmp_path):
    made_up(seeds=(0, 1, 2)).report(tmp_path/"report.html")
    page = browser.new_page(viewport=dict(width=390, height=844))
    page.set_default_timeout(120_000)
    page.goto((tmp_path/"report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    tables = page.evaluate(
        "[...document.querySelectorAll('.wide')].filter(o => o.checkVisibility()).map(o =>"
        " [o.innerText.includes('alignment'), o.scrollWidth > o.clientWidth + 1,"
        "  parseFloat(getComputedStyle(o, '::after').fontSize) > 9, o.tabIndex])")
    [alignment] = [o for o in tables if o[0]]
    assert alignment == [True, True, True, 0]
    assert all(hint == wide for _, wide, hint, _ in tables)  # said where it is so, and only there
    last = "[...document.querySelectorAll('.wide')].find(o => o.innerText.includes('alignment'))"
    page.evaluate(f"{last}.scrollLeft = 9999")
    assert page.evaluate(f"{last}.querySelector('tr').lastChild.getBoundingClientRect().right") <= 390
    page.set_viewport_size(dict(width=1280, height=900))
    page.reload()
    assert not page.evaluate("[...document.querySelectorAll('.wide')].some("
                             "o => parseFloat(getComputedStyle(o, '::after').fontSize) > 9)")
    page.close()

def test_of_several_unknown_settings_always_the_same_is_named():
    unknown = dict.fromkeys("fedcbag", 1)
    with pytest.raises(InputError, match="^a: there is no such setting"):
        compare("aesthetic", ["ddpo-is"], 64, overrides={"ddpo-is": unknown})
