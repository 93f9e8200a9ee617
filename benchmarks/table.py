"""From RWR to DiffusionNFT in one table: every method of this library on equal reward queries, and on equal
seconds.

    python benchmarks/table.py search TASK METHOD [--output DIR]      # trials of one method on one task
    python benchmarks/table.py run TASK METHOD SEED [--output DIR]    # train and examine; finished runs stay
    # four times the queries: what becomes of it when it goes on, as it is or with other settings
    python benchmarks/table.py run TASK METHOD SEED --times 4 [--set NAME=VALUE ...] [--output DIR]
    # one factor at a time, from the best setting
    python benchmarks/table.py vary FACTOR SEED [--output DIR]
    # pictures by runs, below the untouched model's
    python benchmarks/table.py look TASK METHOD ... [--seed 0 ...] [--times 4] [--output DIR]
    python benchmarks/table.py base [--output DIR]                    # what Emoji SD3 gets right as it comes
    # how many things the reader sees where two, three or four were asked for
    python benchmarks/table.py seen NAME WEIGHTS ... [--output DIR]
    python benchmarks/table.py time [TASK] [--output DIR]             # what a query of each costs, in turn
    # all that is there, beside what benchmarks/results has already
    python benchmarks/table.py collect [--output DIR]
    # the tables and figures, from the results
    python benchmarks/table.py table

The rule of the search, the same for everybody: the settings that `compare` takes by default for the model
and three learning rates: a third of the default when the search began (`STARTS`), that default, three times
it. Each is trained on half of the task's budget with seed 100, which no reported run has, and examined as
the reported runs are, from other noise; the highest mean reward on the prompts of training wins (on scenes:
the largest share that the bundled reader finds wholly right, of other scenes), among the trials that keep at
least half of the untouched model's alignment, since a broken model draws small files; if none does, the one
that keeps most of it; of equals, the smallest rate.

Several runs may share a machine, since no run's own clock is used: `time` measures what a query costs, an
epoch of each method in turn and alone on the machine.
"""
import argparse
import json
import time as clock
from collections import Counter
from dataclasses import asdict
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from ddpo_nb.checkpoints import write_atomic
from ddpo_nb.cli import _option
from ddpo_nb.compare import BASE, Table, compare, mean_interval, pm
from ddpo_nb.config import make_config
from ddpo_nb.objectives import get_objective
from ddpo_nb.playground import paint_alike
from ddpo_nb.policy import load_policy
from ddpo_nb.prompts import PROMPT_SETS, prompt_source
from ddpo_nb.rewards import get_reward
from ddpo_nb.scenes import KINDS, SHOWN, draw_scene, readings, scene_prompts, scenes_logprob, wordings
from ddpo_nb.trainer import make_trainer
from scenes import asked_scenes, judges, listed, measure, paint
from speed import hardware

RESULTS, SEARCH_SEED, RATES = Path(__file__).parent / "results" / "table", 100, (1 / 3, 1.0, 3.0)
PACKAGED = Path(__file__).parent.parent / "ddpo_nb/data/methods.json"  # what a notebook finds anywhere
_emoji = dict(model="emoji-sd", prompts="simple_animals", queries=1024)
_scenes = dict(model="emoji-sd3", prompts="scenes", queries=3072, each=60)
TASKS = dict(
    compressibility=_emoji | dict(reward="jpeg_compressibility"),
    incompressibility=_emoji | dict(reward="jpeg_incompressibility"),
    aesthetic=_emoji | dict(reward="aesthetic"), scenes=_scenes | dict(reward="scenes"),
    # for a factor that flows alone have
    flow_compressibility=dict(
        model="emoji-sd3", prompts="scenes", queries=1024, reward="jpeg_compressibility"))
_group = dict(baseline="leave-one-out", per_prompt_stat_tracking=False)
METHODS = {  # name -> the algorithm, and settings that make it another method
    "rwr": ("rwr", {}),
    "rwr-sparse": ("rwr-sparse", {}), "ddpo-sf": ("ddpo-sf", {}), "ddpo-is": ("ddpo-is", {}),
    "leave-one-out": ("ddpo-is", _group), "flow-grpo": ("flow-grpo", {}), "nft": ("nft", {}),
    "draft": ("draft", {})
}
STARTS = {  # the default learning rates of November 2026, before any search by this rule
    "emoji-sd": {"rwr": 3e-3, "rwr-sparse": 1e-3, "ddpo-sf": 1e-3, "ddpo-is": 3e-3, "leave-one-out": 3e-3,
                 "flow-grpo": 3e-3, "nft": 1e-2, "draft": 1e-2},
    "emoji-sd3": dict.fromkeys(METHODS, 1e-3)}
NEW = (("base", "new to fine-tuning"), ("neither", "new to the model"))
LABELS = {m: get_objective(algorithm).label for m, (algorithm, _) in METHODS.items()}
LABELS["leave-one-out"] += ", leave-one-out"
COLOURS = {m: get_objective(algorithm).colour for m, (algorithm, _) in METHODS.items()}
COLOURS["leave-one-out"] = "#1f4e79"

_some = lambda name, *values: [{name: v} for v in values]
# factor -> what it takes, one change at a time, from the best setting of VARIED, or of what OTHERS names
VARIED, FLOW = ("compressibility", "leave-one-out"), ("flow_compressibility", "flow-grpo")
FACTORS = {
    "step weighting": _some("step_weighting", "equal", "variance", "ratio-norm"),
    "clip range": _some("train_clip_range", 1e-4, 1e-3, 1e-2, 1e-1),
    "group size": _some("samples_per_prompt", 2, 4, 8, 16),
    "share of the steps": _some("train_timestep_fraction", 0.2, 0.5, 1.0),
    "window of noisy steps": [
        dict(sample_window=0), dict(sample_window=2), dict(sample_window=2, sample_window_start=2),
        dict(sample_window=2, sample_window_every=4)],
    "price on leaving": _some("kl_coef", 0.0, 0.01, 0.1, 1.0),
    "guidance in training": _some("train_cfg", True, False),
    "step weighting, a flow": _some("step_weighting", "equal", "variance", "ratio-norm")}
OTHERS = {"window of noisy steps": FLOW, "step weighting, a flow": FLOW}

def base_of(factor):
    "(task, method) whose best setting it changes."
    return OTHERS.get(factor, VARIED)

def applies(task, method):
    "A reward without a gradient cannot be followed by it; a task for one factor has one method."
    if task == FLOW[0]: return method == FLOW[1]
    return method != "draft" or task in ("aesthetic", "scenes")

def settings_of(task, method, rate=1.0):
    "The reward's name, the algorithm and its settings; InputError if they do not go together."
    (algorithm, own), t, reward = METHODS[method], TASKS[task], TASKS[task]["reward"]
    if method == "leave-one-out": own = own | dict(samples_per_prompt=8 if task == "scenes" else 4)
    if method == "draft" and task == "scenes": reward = "scenes_logprob"  # the share of facts has no gradient
    start = STARTS[t["model"]][method]
    return reward, algorithm, own | dict(train_learning_rate=float(f"{start * rate:.3g}"))

def is_usual(factor, change):
    "Whether the setting that is varied has these values anyway, so that its reported runs show what they do."
    task, method = base_of(factor)
    _, algorithm, own = settings_of(task, method)
    config = make_config(algorithm, TASKS[task]["model"], True, logdir="", **own)
    return all(getattr(config, k) == v for k, v in change.items())

def verdicts_of(weights, settings, each, seed=0):
    """What reader and examiner say of what these weights, or the untouched model's, paint of `each` scenes of
    every kind, from noise that training never sees; with another seed, of other scenes and noise."""
    policy = load_policy("emoji-sd3", weights, use_lora=weights is not None)
    policy.configure(settings["sample_num_steps"], settings["sample_guidance_scale"], kind="ode")
    verdicts, sharp, variety = measure(policy, asked_scenes(each, seed), judges(), seed)
    return dict(verdicts=listed(verdicts), sharpness=sharp, variety=variety)

def exam_seed(seed):
    "Of the scenes that a run is examined with: one for all that are reported, another for the search."
    return seed if seed == SEARCH_SEED else 0

def usual_settings():
    "Those that Emoji SD3 paints with by default, whatever trains it."
    return asdict(make_config("nft", "emoji-sd3", True, logdir=""))

def seen_of(weights, each=100):
    """What the reader sees where so many of a thing are asked for, in `each` pictures of each number by these
    weights or by the untouched model: number asked for -> number seen -> pictures, mean log-probability."""
    policy = load_policy("emoji-sd3", weights, use_lora=weights is not None)
    settings, rng = usual_settings(), np.random.default_rng(977)
    policy.configure(settings["sample_num_steps"], settings["sample_guidance_scale"], kind="ode")
    reader, asked, found = scenes_logprob(), {2: [], 3: [], 4: []}, {}
    while any(len(o) < each for o in asked.values()):
        scene = draw_scene(rng, "counting")
        if len(asked[scene.count]) < each: asked[scene.count].append(wordings(scene)[0])
    for n, prompts in asked.items():
        images = paint(policy, prompts, seed=0)
        with torch.no_grad(): outputs = reader.look(images)
        seen = np.array([len(o.objects) for o in readings(outputs, reader.threshold)])
        log_prob = reader(images, prompts, [{}] * each)[0]
        of = {int(k): log_prob[seen == k] for k in np.unique(seen)}
        found[str(n)] = {k: dict(pictures=len(o), log_prob=round(o.mean(), 3)) for k, o in of.items()}
    return found

def name_of(method, seed, rate, changes=None, times=1):
    "The folder of a run."
    return ",".join([f"{method}-{seed}-{rate:.2g}"] + [f"{k}={v}" for k, v in (changes or {}).items()]
                    + [f"times={times}"] * (times != 1))

def look(folder, task, methods, seeds=(0,), times=1):
    """Every so many-th prompt of training by the untouched model and, below, by each method's run with each
    seed, from the same noise; on scenes in two such blocks. Returns the picture and the prompts."""
    t, lines = TASKS[task], {"untouched": None}
    for method, seed in product(methods, seeds):
        name = name_of(method, seed, chosen_rate(task, method, folder), times=times)
        weights = folder / task / name / "comparison/weights"
        lines[method, seed] = weights / f"{METHODS[method][0]}-seed{seed}"
    config, policies = make_config("ddpo-is", t["model"], True, logdir=""), {}
    sampler = dict(kind="ode") if t["model"] == "emoji-sd3" else dict(eta=config.sample_eta)
    for who, lora in lines.items():
        policies[who] = load_policy(t["model"], lora, use_lora=lora is not None)
        policies[who].configure(config.sample_num_steps, config.sample_guidance_scale, **sampler)
    n, blocks = (16, 2) if task == "scenes" else (10, 1)
    every = scene_prompts() if t["prompts"] == "scenes" else PROMPT_SETS[t["prompts"]]()
    prompts = every[1::len(every) // n][:n]
    painted = [o.permute(0, 2, 3, 1).numpy() for o in paint_alike(policies, prompts).values()]
    width = n // blocks
    rows = [np.hstack(images[i:i + width]) for i in range(0, n, width) for images in painted]
    return Image.fromarray((np.vstack(rows) * 255).round().astype("uint8")), prompts

def train(task, method, seed, folder, rate, changes=None, times=1):
    """Train on `times` the task's queries and examine, and write `row.json`; a run that was stopped goes on,
    a finished one is left alone."""
    name = name_of(method, seed, rate, changes, times)
    place, t = folder / task / name, TASKS[task]
    if (place / "row.json").exists(): return json.loads((place / "row.json").read_text())
    reward, algorithm, own = settings_of(task, method, rate)
    own, queries = own | (changes or {}), t["queries"] * times // (2 if seed == SEARCH_SEED else 1)
    c = compare(
        reward, [algorithm], queries, [seed], model=t["model"], prompts=t["prompts"],
        output=place / "comparison", overrides={algorithm: own}, progress=False
    )
    base, found = c.evaluations[BASE, seed], c.evaluations[algorithm, seed]
    rounded = lambda numbers: [round(float(o), 5) for o in numbers]
    kept = lambda e: dict(
        rewards={k: rounded(v) for k, v in e.rewards.items()}, diversity=rounded(e.diversity.values()),
        alignment={k: rounded(v) for k, v in e.second.items()})
    row = dict(
        task=task, method=method, seed=seed, rate=rate, changes=changes or {}, times=times, reward=reward,
        settings=own, queries=c.settings["queries"], machine=hardware(), base=kept(base), trained=kept(found),
        curve=[[r["queries"], round(r["reward_mean"], 5)] for r in c.rows]
    )
    if task == "scenes":
        weights = place / "comparison" / "weights" / f"{algorithm}-seed{seed}"
        config = c.settings["configs"][algorithm]
        # what the search chooses by is not what the chosen is reported on
        row["scenes"] = verdicts_of(weights, config, t["each"], exam_seed(seed))
    write_atomic(place / "row.json", json.dumps(row))
    return row

def score(row):
    """What the search goes by: the mean reward on training's prompts; on scenes the share that is wholly
    right."""
    if "scenes" not in row: return float(np.mean(row["trained"]["rewards"]["seen"]))
    return float(
        np.mean([v for k, o in row["scenes"]["verdicts"].items() if k.endswith("/both") for v in o["reader"]])
    )

def kept_alignment(row):
    "The share of the untouched model's alignment that is left on the prompts of training."
    left, before = (np.mean(row[who]["alignment"]["seen"]) for who in ("trained", "base"))
    return float(left / before)

def best_of(trials):
    "The trial that the rule chooses."
    whole = [o for o in trials if kept_alignment(o) >= 0.5]
    return max(whole, key=score) if whole else max(trials, key=kept_alignment)

def search(task, method, folder):
    "The trials of a method; prints the rate that won, and its neighbours."
    trials = [train(task, method, SEARCH_SEED, folder, rate) for rate in RATES]
    best = best_of(trials)
    for row in trials:
        print(f"{task}, {method}, learning rate {row['settings']['train_learning_rate']:g}: {score(row):.4f},"
              f" {kept_alignment(row):.0%} of the alignment" + " <- the best" * (row is best), flush=True)

def chosen_rate(task, method, folder, results=RESULTS):
    "The rate that the search found."
    trials = trials_of([o for o in kept_rows(folder, results) if o["task"] == task], method)
    if not trials: raise SystemExit(f"{task}, {method}: search first")
    return best_of(trials)["rate"]

def read_row(text):
    "A finished run; the first ones say nothing of how many times the queries they had: once."
    row = json.loads(text)
    return row | {"times": row.get("times", 1)}

def kept_rows(folder, results):
    "Every run that is kept in the results or finished in the folder; of two of a kind, the folder's."
    found = [o for task in TASKS for o in rows_of(results, task)]
    found += [read_row(o.read_text()) for o in sorted(folder.glob("*/*/row.json"))]
    like = lambda o: (o["task"], name_of(o["method"], o["seed"], o["rate"], o["changes"], o["times"]))
    return list({like(o): o for o in found}.values())

def seconds_of(task, rounds):
    "method -> a query's seconds, one for each round: an epoch of each method in turn, after one to warm up."
    t, trainers = TASKS[task], {}
    for method in METHODS:
        if not applies(task, method): continue
        reward, algorithm, own = settings_of(task, method)
        config = make_config(algorithm, t["model"], True, logdir="", num_epochs=rounds + 1, **own)
        policy = load_policy(t["model"], lora_rank=config.lora_rank)
        trainers[method] = make_trainer(
            config, get_reward(reward, t["model"]), prompt_source(t["prompts"], 0), policy)
    found = {method: [] for method in trainers}
    for i in range(rounds + 1):
        for method, trainer in trainers.items():
            began = clock.perf_counter()
            trainer.train(i + 1, progress=False)
            if i: found[method].append((clock.perf_counter() - began) / trainer.config.samples_per_epoch)
        print(i, {k: round(v[-1], 4) for k, v in found.items() if v}, flush=True)
    return found

def collect(folder, results=RESULTS):
    "A file for each task, a line for each run, with those that are there already, and what a query costs."
    results.mkdir(parents=True, exist_ok=True)
    rows = kept_rows(folder, results)
    for task in TASKS:
        mine = sorted(
            (o for o in rows if o["task"] == task),
            key=lambda o: (o["method"], o["seed"], o["rate"], o["times"], json.dumps(o["changes"]))
        )
        if mine: write_atomic(results / f"{task}.jsonl", "".join(json.dumps(o) + "\n" for o in mine))
    for o in [o for kind in ("seconds-*", "seen-*", "scenes-base") for o in folder.glob(f"{kind}.json")]:
        write_atomic(results / o.name, o.read_text())
    print(f"{len(rows)} runs, in {results}")

def rows_of(results, task):
    "Every kept run of a task, trials and changed ones too."
    file = results / f"{task}.jsonl"
    return list(map(read_row, file.read_text().splitlines())) if file.exists() else []

def trials_of(rows, method):
    "A method's trials, by learning rate; none unless all of them are there."
    mine = [o for o in rows if (o["method"], o["seed"]) == (method, SEARCH_SEED) and not o["changes"]]
    return sorted(mine, key=lambda o: o["rate"]) if len(mine) == len(RATES) else []

def reported(results, task):
    "method -> seed -> row, of the runs that count: other seeds than the search's, with the rate that won."
    rows, found = rows_of(results, task), {}
    won = {m: best_of(trials)["rate"] for m in METHODS if (trials := trials_of(rows, m))}
    for row in rows:
        if row["seed"] == SEARCH_SEED or row["changes"] or row["times"] != 1: continue
        if won.get(row["method"], row["rate"]) == row["rate"]:
            found.setdefault(row["method"], {})[row["seed"]] = row
    return {m: found[m] for m in METHODS if m in found}

def gain(row, key="seen"):
    "Mean of the trained model's rewards less the base's, picture by picture."
    return float(np.mean(np.subtract(row["trained"]["rewards"][key], row["base"]["rewards"][key])))

def right(verdicts, who, to="both", kind=None):
    """Share wholly right in somebody's eyes, of prompts shown to `to`, of one kind or of all; None if not
    looked at."""
    taken = [o[who] for k, o in verdicts.items() if k.endswith(f"/{to}") and kind in (None, k.split("/")[0])
             and who in o]
    return float(np.mean(np.concatenate(taken))) if taken else None

@lru_cache
def counts_asked(each, seed):
    "How many of a thing each prompt of counting asks for, by whom its scene was shown to."
    asked = asked_scenes(each, seed)
    return {to: [o.count for o in asked["counting", to]] for to in SHOWN}

def right_by_count(verdicts, who, seed=0):
    "Share wholly right by how many of a thing the prompt asks for, whoever was shown it: '2' -> share."
    asked = counts_asked(len(verdicts["counting/both"][who]), seed)
    said = [(n, o) for to, counts in asked.items() for n, o in zip(counts, verdicts[f"counting/{to}"][who])]
    return {str(n): float(np.mean([o for k, o in said if k == n])) for n in sorted({k for k, _ in said})}

def held_out(row):
    "Mean gain over all prompts that training did not show."
    keys = [k for k in row["trained"]["rewards"] if k != "seen"]
    return float(np.mean([gain(row, k) for k in keys])) if keys else None

def alignment(row):
    "Mean change of the untouched model's alignment on the prompts of training."
    return float(np.mean(np.subtract(row["trained"]["alignment"]["seen"], row["base"]["alignment"]["seen"])))

def variety(row):
    "Share of the base's variety that is left."
    return float(np.mean(row["trained"]["diversity"]) / np.mean(row["base"]["diversity"]))

def at_seconds(row, seconds_a_query, seconds):
    "Mean reward of the last 256 pictures of training that so many seconds paid for."
    spent = [o for o in row["curve"] if o[0] * seconds_a_query <= seconds * (1 + 1e-9)]
    if not spent: return None
    last = [r for q, r in spent if q > spent[-1][0] - 256] or [spent[-1][1]]
    return float(np.mean(last))

def figure_of(values, sign=True, scale=1.0, places=3):
    "Mean and 95 % interval over seeds, as a table shows them."
    values = [o * scale for o in values if o is not None]
    return pm(*mean_interval(values), sign=sign, places=places) if values else ""

def cost_of(results, task):
    "method -> median seconds a query; empty if none were taken."
    at = results / f"seconds-{task}.json"
    return {m: median(v) for m, v in json.loads(at.read_text())["seconds"].items()} if at.exists() else {}

def equal_seconds(results, task):
    "The seconds in which the fastest method has used up its queries; None if none were taken."
    cost = cost_of(results, task)
    return min((cost[m] * TASKS[task]["queries"] for m in reported(results, task) if m in cost), default=None)

def table_of(results, task):
    "What each method did with the task's queries: one row per method."
    found, rows = reported(results, task), []
    cost, budget = cost_of(results, task), equal_seconds(results, task)
    for method, by_seed in found.items():
        runs = list(by_seed.values())
        row = {
            "": LABELS[method], "seeds": len(runs),
            "learning rate": f"{runs[0]['settings']['train_learning_rate']:g}"
        }
        if task == "scenes":
            verdicts = [o["scenes"]["verdicts"] for o in runs]
            for who in ("reader", "examiner"):
                row[f"right ({who}), %"] = figure_of([right(v, who) for v in verdicts], False, 100, 1)
            for to, label in NEW:
                row[f"{label} (reader), %"] = figure_of(
                    [right(v, "reader", to) for v in verdicts], False, 100, 1
                )
            row["sharpness"] = figure_of([o["scenes"]["sharpness"] for o in runs], False, places=4)
        own = runs[0]["reward"] == TASKS[task]["reward"]  # DRaFT on scenes climbs another
        row |= {
            "gain": figure_of(map(gain, runs)) if own else "",
            "held-out gain": figure_of(map(held_out, runs)) if own else "",
            "alignment": figure_of(map(alignment, runs)),
            "variety, %": figure_of(map(variety, runs), False, 100, 0)
        }
        if method in cost:
            row["s a query"] = f"{cost[method]:.3f}"
            row["reward at equal seconds"] = figure_of(
                [at_seconds(o, cost[method], budget) for o in runs], False) if own else ""
        rows.append(row)
    return Table(rows), budget

def outcome(row):
    "The number that methods are ranked by."
    return right(row["scenes"]["verdicts"], "reader") if row["task"] == "scenes" else gain(row)

def pairs_of(results, task):
    "Who is ahead of whom, seed by seed: one row per pair, the better method first."
    found, rows = reported(results, task), []
    for a, b in combinations(found, 2):
        both = sorted(set(found[a]) & set(found[b]))
        if len(both) < 2: continue
        ahead = [outcome(found[a][s]) - outcome(found[b][s]) for s in both]
        if np.mean(ahead) < 0: a, b, ahead = b, a, [-o for o in ahead]
        mean, half = mean_interval(ahead)
        rows.append({"ahead": LABELS[a], "of": LABELS[b], "by": pm(mean, half, sign=True), "seeds": len(both),
                     "beyond doubt": "yes" if mean > half else "no"})
    return Table(rows)

def base_line(results):
    "What the untouched Emoji SD3 gets right, in a sentence."
    if not (results / "scenes-base.json").exists(): return ""
    about = json.loads((results / "scenes-base.json").read_text())
    verdicts = about["verdicts"]
    said = [
        f"{right(verdicts, who):.1%} by the {who}" for who in ("reader", "examiner") if right(verdicts, who)
    ]
    kept = [f"{right(verdicts, 'reader', to):.1%} of {what}" for to, what in
            (("base", "combinations new to fine-tuning"), ("neither", "those new to the model"))]
    sharp = f"sharpness {about['sharpness']:.4f}"
    return f"The untouched model: {', '.join(said)}; {', '.join(kept)}; {sharp}."

def longer_table(results):
    """Emoji SD3: runs that went on for several times the queries, each below the usual one with its seed and
    rate."""
    rows, found = rows_of(results, "scenes"), []
    long = [o for o in rows if o["times"] != 1]
    key = lambda o: [o[k] for k in ("method", "seed", "rate")]
    for mine in sorted(map(list, {tuple(key(o)) for o in long})):
        same = [o for o in rows if key(o) == mine and (o in long or not o["changes"])]
        for row in sorted(same, key=lambda o: (o["queries"], len(o["changes"]), str(o["changes"]))):
            verdicts = row["scenes"]["verdicts"]
            share = lambda who, to="both": f"{right(verdicts, who, to):.1%}"
            found.append({
                "": LABELS[row["method"]], "with": ", ".join(f"{k} {v}" for k, v in row["changes"].items()),
                "seed": row["seed"], "queries": f"{row['queries']:,}",
                "right (reader)": share("reader"), "right (examiner)": share("examiner")}
                | {f"{label} (examiner)": share("examiner", to) for to, label in NEW}
                | {"sharpness": f"{row['scenes']['sharpness']:.4f}", "variety": f"{variety(row):.0%}"})
    return Table(found)

def pieces_of(results):
    """factor -> value -> changes, and rows by seed; the best setting's own runs stand for the value that it
    has."""
    found = {}
    for factor, values in FACTORS.items():
        task, method = base_of(factor)
        own = reported(results, task).get(method, {})
        rows = [o for o in rows_of(results, task) if o["method"] == method and o["times"] == 1]
        for change in values:
            name = ", ".join(f"{k} {v}" for k, v in change.items())
            same = {} if is_usual(factor, change) else change
            by_seed = {o["seed"]: o for o in rows if o["changes"] == same} if same else own
            if by_seed: found.setdefault(factor, {})[name] = (same, by_seed)
    return {factor: by_value for factor, by_value in found.items() if len(by_value) > 1}

def ahead_of(by_seed, own):
    "The lead of runs over others, seed by seed, as a table shows it; nothing for one seed."
    both = sorted(set(by_seed) & set(own))
    leads = [gain(by_seed[s]) - gain(own[s]) for s in both]
    return pm(*mean_interval(leads), sign=True) if len(both) > 1 else ""

def pieces_table(results):
    "One row for each value of each factor."
    rows = []
    for factor, by_value in pieces_of(results).items():
        task, method = base_of(factor)
        own = reported(results, task).get(method, {})
        for name, (changes, by_seed) in by_value.items():
            runs = [*by_seed.values()]
            rows.append({
                "of": f"{LABELS[method]}, {task}", "factor": factor, "value": name, "seeds": len(runs),
                "gain": figure_of(map(gain, runs)),
                "against the best setting": ahead_of(by_seed, own) if changes else "its value",
                "alignment left, %": figure_of(map(kept_alignment, runs), False, 100, 0),
                "variety, %": figure_of(map(variety, runs), False, 100, 0)})
    return Table(rows)

def kinds_of(results):
    "Emoji SD3: what each method gets right of each kind of prompt, in each reader's eyes."
    found, rows = reported(results, "scenes"), []
    base = json.loads(at.read_text()) if (at := results / "scenes-base.json").exists() else None
    for who in ("reader", "examiner"):
        if base and right(base["verdicts"], who) is not None:
            rows.append(
                {"": "base", "eyes": who} | {k: f"{right(base['verdicts'], who, kind=k):.1%}" for k in KINDS}
            )
        for method, by_seed in found.items():
            verdicts = [o["scenes"]["verdicts"] for o in by_seed.values()]
            if right(verdicts[0], who) is None: continue
            rows.append({"": LABELS[method], "eyes": who} | {
                k: figure_of([right(v, who, kind=k) for v in verdicts], False, 100, 1) for k in KINDS})
    return Table(rows)

def searched(results, task):
    "What the search saw: one row per method."
    rows, found = rows_of(results, task), []
    for method in METHODS:
        if not (mine := trials_of(rows, method)): continue
        best = best_of(mine)
        shown = [f"{o['settings']['train_learning_rate']:g}: {score(o):.4f} ({kept_alignment(o):.0%})"
                 for o in mine]
        found.append({"": LABELS[method], "a third": shown[0], "default": shown[1], "three times": shown[2],
                      "won": f"{best['settings']['train_learning_rate']:g}"})
    return Table(found)

def markdown(results):
    "All tables, as text."
    parts = ["# From RWR to DiffusionNFT, in numbers\n\nMade by `python benchmarks/table.py table`;"
             " intervals are 95 % by Student's t over seeds."]
    for task, t in TASKS.items():
        table, budget = table_of(results, task)
        if not table: continue
        on = Counter(o["machine"] for by_seed in reported(results, task).values() for o in by_seed.values())
        machines = ", ".join(f"{n} on {machine}" for machine, n in on.most_common())
        parts.append(
            f"## {task}\n\n`{t['model']}`, reward `{t['reward']}`, {t['queries']:,} queries each;"
            f" runs: {machines}."
        )
        if task == "scenes" and (line := base_line(results)): parts.append(line)
        parts.append(table.markdown())
        if budget:
            on = json.loads((results / f"seconds-{task}.json").read_text())["machine"]
            parts.append(f"Equal seconds: {budget:.0f} of training each ({on}, an epoch of each in turn).")
        if task == "scenes": parts += ["By kind of prompt, %:", kinds_of(results).markdown()]
        if task == "scenes" and (longer := longer_table(results)):
            parts += ["And if one goes on:", longer.markdown()]
        if pairs := pairs_of(results, task): parts += ["Who is ahead:", pairs.markdown()]
        if trials := searched(results, task): parts += [
            "Trials, by learning rate (in brackets: the share of alignment that is left):", trials.markdown()]
    if pieces := pieces_table(results):
        parts += ["## What the pieces are worth\n\nOne change at a time, from the best setting.",
                  pieces.markdown()]
    return "\n\n".join(o.strip("\n") for o in parts) + "\n"

def smooth(curve, window=256):
    "Mean reward of each `window` pictures of training, [[queries, mean], ...]."
    return [[at, round(float(np.mean([r for q, r in curve if at - window < q <= at])), 5)]
            for at in range(window, curve[-1][0] + 1, window)]

def summary(results):
    "What the package carries of all this: one entry per run, for `tutorials/table`."
    found, base_at = [], results / "scenes-base.json"
    shares = lambda verdicts, seed=0: {
        who: {to: round(right(verdicts, who, to), 6) for to in SHOWN}
        | {kind: round(right(verdicts, who, kind=kind), 6) for kind in KINDS}
        | {n: round(share, 6) for n, share in right_by_count(verdicts, who, seed).items()}
        for who in ("reader", "examiner") if right(verdicts, who) is not None}
    for task in TASKS:
        counting = [o for by_seed in reported(results, task).values() for o in by_seed.values()]
        cost, budget = cost_of(results, task), equal_seconds(results, task)
        for row in rows_of(results, task):
            own = row["reward"] == TASKS[task]["reward"]
            entry = {k: row[k] for k in ("task", "method", "seed", "queries", "changes")} | dict(
                times=row["times"], reported=row in counting,
                learning_rate=row["settings"]["train_learning_rate"],
                score=round(score(row), 5), gain=round(gain(row), 5) if own else None,
                held_out=round(held_out(row), 5) if own else None,
                alignment=round(alignment(row), 5), alignment_kept=round(kept_alignment(row), 4),
                variety=round(variety(row), 4),
                curve=smooth(row["curve"]) if own else None)
            if own and row in counting and row["method"] in cost:
                entry["at_equal_seconds"] = round(at_seconds(row, cost[row["method"]], budget), 5)
            if task == "scenes": entry |= dict(
                right=shares(row["scenes"]["verdicts"], exam_seed(row["seed"])),
                sharpness=round(row["scenes"]["sharpness"], 5))
            found.append(entry)
    seconds = {task: {k: round(v, 5) for k, v in cost.items()}
               for task in TASKS if (cost := cost_of(results, task))}
    pieces = {factor: dict(zip(("task", "method"), base_of(factor)), values={
        name: changes for name, (changes, _) in by_value.items()})
        for factor, by_value in pieces_of(results).items()}
    return dict(
        command="python benchmarks/table.py table", labels=LABELS, colours=COLOURS, seconds_a_query=seconds,
        pieces=pieces,
        seen={o.stem.removeprefix("seen-"): json.loads(o.read_text())
              for o in sorted(results.glob("seen-*.json"))},
        base=shares(json.loads(base_at.read_text())["verdicts"]) if base_at.exists() else None, runs=found)

def written(summary):
    "A line for each run, so that a new one is one line of a difference."
    head = {k: v for k, v in summary.items() if k != "runs"}
    lines = ",\n".join(json.dumps(o) for o in summary["runs"])
    return json.dumps(head)[:-1] + ', "runs": [\n' + lines + "\n]}\n"

def plot(results, task):
    "Training reward against queries, a line per method with the range of its seeds."
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for method, by_seed in reported(results, task).items():
        runs = [o for o in by_seed.values() if o["reward"] == TASKS[task]["reward"]]
        if not runs: continue
        window = 256
        grid = [at for at, _ in smooth(min(runs, key=lambda o: o["queries"])["curve"], window)]
        curves = np.array([[r for _, r in smooth(o["curve"], window)[:len(grid)]] for o in runs])
        ax.plot(grid, curves.mean(0), color=COLOURS[method], label=LABELS[method])
        ax.fill_between(grid, curves.min(0), curves.max(0), color=COLOURS[method], alpha=0.15, lw=0)
    ax.set(xlabel="reward queries", ylabel=f"{TASKS[task]['reward']},\nmean of {window} pictures of training")
    ax.legend(fontsize=7)
    fig.savefig(results / f"{task}.png", dpi=110)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", type=Path, default=Path("out-table"), help="folder of the runs")
    task, method = dict(choices=list(TASKS)), dict(choices=list(METHODS))
    for name in ("search", "run"):
        one = commands.add_parser(name, parents=[common])
        one.add_argument("task", **task)
        one.add_argument("method", **method)
        if name == "run":
            one.add_argument("seed", type=int)
            one.add_argument(
                "--rate", type=float, help="times the default learning rate; default: what the search found"
            )
            one.add_argument(
                "--times", type=int, default=1, help="so many times the task's queries; default: 1"
            )
            one.add_argument("--set", nargs="*", type=_option, default=[], metavar="NAME=VALUE",
                             help="settings that it has instead of its own")
    one = commands.add_parser("look", parents=[common])
    one.add_argument("task", **task)
    one.add_argument("method", nargs="+", **method)
    one.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several; default: 0")
    one.add_argument("--times", type=int, default=1)
    one.add_argument("--to", type=Path, default=Path("look.png"), help="the file")
    one = commands.add_parser("seen", parents=[common])
    one.add_argument("name", help="of what is written: seen-NAME.json")
    one.add_argument("weights", type=Path, nargs="+", help="folders of trained weights of Emoji SD3")
    one = commands.add_parser("vary", parents=[common])
    one.add_argument("factor", choices=list(FACTORS))
    one.add_argument("seed", type=int)
    commands.add_parser("base", parents=[common])
    one = commands.add_parser("time", parents=[common])
    one.add_argument("task", nargs="*", choices=list(TASKS), default=list(TASKS))
    one.add_argument("--rounds", type=int, default=3)
    commands.add_parser("collect", parents=[common])
    one = commands.add_parser("table")
    one.add_argument("--results", type=Path, default=RESULTS)
    one.add_argument(
        "--check", action="store_true", help="say whether table.md is what it makes, and write nothing"
    )
    args = parser.parse_args()
    if args.command in ("search", "run") and not applies(args.task, args.method):
        raise SystemExit(f"{args.task} has no gradient for {args.method} to follow")
    if args.command == "search": search(args.task, args.method, args.output)
    if args.command == "run":
        if args.seed == SEARCH_SEED: raise SystemExit(f"seed {SEARCH_SEED} is the search's: choose another")
        rate = args.rate or chosen_rate(args.task, args.method, args.output)
        row = train(args.task, args.method, args.seed, args.output, rate, dict(args.set), args.times)
        print(f"{args.task}, {args.method}, seed {args.seed}: {outcome(row):+.4f}", flush=True)
    if args.command == "vary":
        base = base_of(args.factor)
        rate = chosen_rate(*base, args.output)
        for change in FACTORS[args.factor]:
            if is_usual(args.factor, change): continue
            row = train(*base, args.seed, args.output, rate, change)
            print(f"{args.factor}, {change}, seed {args.seed}: {outcome(row):+.4f}", flush=True)
    if args.command == "look":
        picture, prompts = look(args.output, args.task, args.method, args.seed, args.times)
        picture.quantize(255).save(args.to, optimize=True)  # a third of the bytes; looks the same
        print(*prompts, sep=", ")
    if args.command == "seen":
        if len({o.name for o in args.weights}) < len(args.weights):
            raise SystemExit("two folders of weights have one name, and one line of what is written")
        said = {o.name if o else "untouched": seen_of(o) for o in (None, *args.weights)}
        write_atomic(args.output / f"seen-{args.name}.json", json.dumps(said))
    if args.command == "base":
        found = verdicts_of(None, usual_settings(), TASKS["scenes"]["each"])
        write_atomic(args.output / "scenes-base.json", json.dumps(found))
    if args.command == "time":
        for task in args.task:
            about = dict(machine=hardware(), torch=torch.__version__, seconds=seconds_of(task, args.rounds))
            write_atomic(args.output / f"seconds-{task}.json", json.dumps(about))
    if args.command == "collect": collect(args.output)
    if args.command == "table":
        made = {args.results / "table.md": markdown(args.results)}
        if args.results == RESULTS: made[PACKAGED] = written(summary(RESULTS))
        if args.check:
            stale = [str(at) for at, text in made.items() if not at.exists() or at.read_text() != text]
            raise SystemExit(f"not what the rows make: {', '.join(stale)}" if stale else None)
        for at, text in made.items(): write_atomic(at, text)
        for task in TASKS:
            if reported(args.results, task): plot(args.results, task)
        print(made[args.results / "table.md"])

if __name__ == "__main__": main()
