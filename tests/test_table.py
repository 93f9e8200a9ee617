"""benchmarks/table.py: what is made of the rows, on rows that are made up and on those that are kept."""
import json, sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]/"benchmarks"))
import table
from ddpo_nb.config import make_config
from ddpo_nb.policy import load_policy
from ddpo_nb.prepare import configure_policy

def row(method, seed, gained, rate=1.0, task="compressibility", right=None, **kw):
    "A finished run whose pictures all gained as much."
    base = dict(rewards=dict(seen=[1.0, 2.0], unseen_animals=[1.0]), diversity=[1.0, 2.0],
                alignment=dict(seen=[0.5, 0.5]))
    trained = dict(
        rewards=dict(seen=[1 + gained, 2 + gained], unseen_animals=[1 + gained / 2]), diversity=[0.5, 1.0],
        alignment=dict(seen=[0.6, 0.6]))
    found = dict(
        task=task, method=method, seed=seed, rate=rate, changes={}, reward=table.TASKS[task]["reward"],
        queries=1024, settings=dict(train_learning_rate=1e-3 * rate), machine="a machine", base=base,
        trained=trained, curve=[[128 * i, 1 + gained * i / 8] for i in range(1, 9)]
    )
    if right is not None:
        said = lambda share: [1] * round(10 * share) + [0] * round(10 - 10 * share)
        shown = ("both", "base", "neither")
        found["scenes"] = dict(verdicts={
            f"{kind}/{to}": dict(reader=said(right), examiner=said(right - 0.1))
            for kind in ("single", "colour", "counting", "two", "position") for to in shown
            if to == "both" or kind not in ("single", "colour")}, sharpness=0.05, variety=1.0)
    return found | kw

def written(folder, rows):
    for task in table.TASKS:
        mine = [json.dumps(o) for o in rows if o["task"] == task]
        if mine: (folder / f"{task}.jsonl").write_text("\n".join(mine) + "\n")
    return folder

def test_gains_are_paired_and_intervals_are_over_seeds(tmp_path):
    rows = [row("ddpo-is", s, g) for s, g in enumerate((0.1, 0.2, 0.3))]
    (line,), _ = table.table_of(written(tmp_path, rows), "compressibility")
    half = 4.302653 * 0.1 / 3**0.5  # Student's t with two degrees of freedom
    assert line["gain"] == table.pm(0.2, half, sign=True)
    assert line["held-out gain"] == table.pm(0.1, half / 2, sign=True)
    assert line["alignment"].startswith("+0.100 ± 0.000") and line["variety, %"].startswith("50")
    assert line["seeds"] == 3

def test_trials_count_for_the_search_and_for_nothing_else(tmp_path):
    trials = [row("ddpo-is", table.SEARCH_SEED, g, rate) for rate, g in zip(table.RATES, (0.1, 9.0, 0.2))]
    folder = written(tmp_path, [*trials, row("ddpo-is", 0, 0.1), row("ddpo-is", 1, 0.1)])
    (line,), _ = table.table_of(folder, "compressibility")
    assert line["seeds"] == 2 and line["gain"].startswith("+0.100")
    assert table.reported(folder, "compressibility")["ddpo-is"][0]["rate"] == 1.0
    written(tmp_path, [*trials, row("ddpo-is", 0, 0.1), row("ddpo-is", 0, 0.7, 3.0), row("ddpo-is", 1, 0.1)])
    assert {o["rate"] for o in table.reported(folder, "compressibility")["ddpo-is"].values()} == {1.0}
    (trial,) = table.searched(folder, "compressibility")
    assert trial["won"] == "0.001" and trial["three times"] == "0.003: 1.7000 (120%)"

def test_the_search_passes_over_trials_that_lost_half_of_the_alignment():
    def trial(gained, kept):
        found = row("ddpo-sf", table.SEARCH_SEED, gained)
        found["trained"]["alignment"]["seen"] = [0.5 * kept, 0.5 * kept]
        return found
    broken, whole, better = trial(0.6, -0.4), trial(0.1, 0.5), trial(0.3, 0.9)
    assert table.best_of([whole, broken, better]) is better
    assert table.best_of([whole, broken]) is whole  # half is enough
    least = trial(0.1, 0.3)
    assert table.best_of([broken, least, trial(0.5, 0.2)]) is least  # all are broken: the least of them
    equal = trial(0.3, 1.0)
    assert table.best_of([better, equal]) is better  # of equals the first, which has the smallest rate

def test_an_unfinished_search_chooses_nothing(tmp_path):
    place = tmp_path / "compressibility" / "ddpo-is-100-1"
    place.mkdir(parents=True)
    (place / "row.json").write_text(json.dumps(row("ddpo-is", table.SEARCH_SEED, 0.1)))
    with pytest.raises(SystemExit, match="search first"):
        table.chosen_rate("compressibility", "ddpo-is", tmp_path, tmp_path / "results")

def test_runs_of_another_machine_stay_and_the_newest_of_its_like_counts(tmp_path):
    folder, results = tmp_path / "runs", tmp_path / "results"
    results.mkdir()
    trials = [row("ddpo-is", table.SEARCH_SEED, g, rate) for rate, g in zip(table.RATES, (0.1, 0.2, 0.9))]
    changed = row("ddpo-is", 0, 0.4, changes=dict(kl_coef=0.1))
    written(results, [*trials, row("ddpo-is", 0, 0.1), changed])
    place = folder / "compressibility" / "any-name"
    place.mkdir(parents=True)
    (place / "row.json").write_text(json.dumps(row("ddpo-is", 0, 0.3)))
    assert table.chosen_rate("compressibility", "ddpo-is", folder, results) == 3.0
    table.collect(folder, results)
    rows = table.rows_of(results, "compressibility")
    usual, = (table.gain(o) for o in rows if o["seed"] == 0 and not o["changes"])
    other, = (table.gain(o) for o in rows if o["changes"])
    assert len(rows) == 5 and usual == pytest.approx(0.3) and other == pytest.approx(0.4)
    table.collect(folder, results)
    assert table.rows_of(results, "compressibility") == rows

def test_who_is_ahead_of_whom(tmp_path):
    gains = dict(rwr=(0.1, 0.2, 0.3), nft=(0.6, 0.71, 0.8), draft=(0.1, 0.25, 0.25))
    rows = [row(m, s, g) for m, of in gains.items() for s, g in enumerate(of)]
    pairs = {(o["ahead"], o["of"]): o for o in table.pairs_of(written(tmp_path, rows), "compressibility")}
    sure = pairs["DiffusionNFT", "RWR"]
    assert sure["by"].startswith("+0.503") and sure["beyond doubt"] == "yes"
    assert [o["beyond doubt"] for o in pairs.values() if {o["ahead"], o["of"]} == {"RWR", "DRaFT"}] == ["no"]

def test_equal_seconds_cut_the_dearer_method_short(tmp_path):
    folder = written(tmp_path, [row(m, s, 0.8) for m in ("rwr", "nft") for s in (0, 1)])
    (folder / "seconds-compressibility.json").write_text(json.dumps(
        dict(seconds={"rwr": [0.1, 0.1], "nft": [0.2, 0.2]})))
    lines, budget = table.table_of(folder, "compressibility")
    assert budget == pytest.approx(102.4)
    reached = {o[""]: float(o["reward at equal seconds"].split()[0]) for o in lines}
    # the last 256 pictures of 1,024 and of 512 queries
    assert reached == {"RWR": pytest.approx(1.75), "DiffusionNFT": pytest.approx(1.35)}

def test_who_trains_on_another_reward_has_no_reward_at_equal_seconds(tmp_path):
    rows = [row("rwr", 0, 0.8, task="scenes", right=0.6)]
    rows.append(row("draft", 0, 0.2, task="scenes", right=0.9) | dict(reward="scenes_logprob"))
    folder = written(tmp_path, rows)
    (folder / "seconds-scenes.json").write_text(json.dumps(dict(seconds={"rwr": [0.1], "draft": [0.1]})))
    rwr, draft = table.table_of(folder, "scenes")[0]
    assert rwr["reward at equal seconds"] and not draft["reward at equal seconds"] and not draft["gain"]

def test_scenes_are_ranked_by_what_is_wholly_right_in_each_readers_eyes(tmp_path):
    rows = [row(m, s, 0.1, task="scenes", right=r) for m, r in (("rwr", 0.6), ("nft", 0.9)) for s in (0, 1)]
    folder = written(tmp_path, rows)
    (_, line), _ = table.table_of(folder, "scenes")
    assert line["right (reader), %"].startswith("90.0") and line["right (examiner), %"].startswith("80.0")
    assert table.pairs_of(folder, "scenes")[0]["ahead"] == "DiffusionNFT"
    assert {o["eyes"] for o in table.kinds_of(folder)} == {"reader", "examiner"}
    text = table.markdown(folder)
    assert "By kind of prompt" in text and "Who is ahead" in text
    table.plot(folder, "scenes")
    assert (folder / "scenes.png").stat().st_size > 5000

def test_a_run_that_went_on_is_shown_below_its_own_beginning_and_nowhere_else(tmp_path):
    rows = [row("nft", s, 0.1, task="scenes", right=0.8) for s in (0, 1)]
    longer = dict(task="scenes", times=4, queries=4096)
    rows.append(row("nft", 0, 0.1, right=0.5, **longer))
    rows.append(row("nft", 0, 0.1, right=0.9, changes=dict(kl_coef=1.0), **longer))
    rows.append(row("nft", 0, 0.1, task="scenes", right=0.1, changes=dict(kl_coef=1.0)))  # another matter
    folder = written(tmp_path, rows)
    (line,), _ = table.table_of(folder, "scenes")
    assert line["seeds"] == 2 and line["right (reader), %"].startswith("80.0")
    short, long, priced = table.longer_table(folder)
    assert (priced["with"], priced["right (reader)"]) == ("kl_coef 1.0", "90.0%") and long["with"] == ""
    assert (short["queries"], short["right (reader)"]) == ("1,024", "80.0%")
    assert (long["queries"], long["right (reader)"], long["right (examiner)"]) == ("4,096", "50.0%", "40.0%")
    assert "And if one goes on" in table.markdown(folder)

def test_the_pieces_are_told_from_the_reported_runs(tmp_path):
    varied = [row("leave-one-out", s, g, changes=change) for s in (0, 1) for change, g in
              ((dict(train_cfg=False), 0.1), (dict(kl_coef=1.0), 0.0))]
    folder = written(tmp_path, [*varied, row("leave-one-out", 0, 0.5)])
    (line,), _ = table.table_of(folder, "compressibility")
    assert line["seeds"] == 1 and line["gain"].startswith("+0.50")
    pieces = {factor: {name: {s: round(table.gain(o), 5) for s, o in by_seed.items()}
                       for name, (_, by_seed) in by_value.items()}
              for factor, by_value in table.pieces_of(folder).items()}
    usual = {0: 0.5}  # the reported run stands for its values
    assert pieces == {"price on leaving": {"kl_coef 0.0": usual, "kl_coef 1.0": {0: 0, 1: 0}},
                      "guidance in training": {"train_cfg True": usual, "train_cfg False": {0: 0.1, 1: 0.1}}}
    assert "What the pieces are worth" in table.markdown(folder)

def test_a_piece_is_compared_with_the_best_setting_seed_by_seed(tmp_path):
    varied = [row("leave-one-out", s, g, changes=dict(kl_coef=1.0)) for s, g in enumerate((0.1, 0.4, 0.2))]
    own = [row("leave-one-out", s, g) for s, g in enumerate((0.2, 0.5, 0.31))]
    lines = {o["value"]: o for o in table.pieces_table(written(tmp_path, [*varied, *own]))}
    assert lines["kl_coef 0.0"]["against the best setting"] == "its value"
    assert lines["kl_coef 1.0"]["against the best setting"].startswith("−0.103 ± 0.01")
    about = table.summary(tmp_path)["pieces"]["price on leaving"]
    assert (about["task"], about["method"]) == ("compressibility", "leave-one-out")
    assert about["values"] == {"kl_coef 0.0": {}, "kl_coef 1.0": {"kl_coef": 1.0}}

@pytest.mark.parametrize("factor", table.FACTORS)
def test_every_change_of_a_piece_can_be_trained_and_one_of_them_is_usual(factor):
    task, method = table.base_of(factor)
    assert table.applies(task, method)
    model, (_, algorithm, own) = table.TASKS[task]["model"], table.settings_of(task, method)
    policy = load_policy(model, lora_rank=4)
    for change in table.FACTORS[factor]:
        config = make_config(algorithm, model, True, logdir="", **own | change)
        configure_policy(config, policy)
        assert all(getattr(config, k) == v for k, v in change.items())
    usual = [o for o in table.FACTORS[factor] if table.is_usual(factor, o)]
    assert len(usual) == 1 and len(table.FACTORS[factor]) > 1

def test_every_method_makes_a_config_for_every_task_it_applies_to():
    for task in table.TASKS:
        for method in filter(lambda m: table.applies(task, m), table.METHODS):
            rates = [table.settings_of(task, method, rate)[2]["train_learning_rate"] for rate in table.RATES]
            assert np.allclose(np.array(rates) / rates[1], table.RATES, rtol=0.01)
            assert table.TASKS[task]["queries"] % 512 == 0
    assert not table.applies("compressibility", "draft")

def test_the_table_says_which_machines_its_runs_come_from(tmp_path):
    rows = [row("nft", 0, 0.1), row("nft", 1, 0.1), row("rwr", 0, 0.1, machine="another")]
    rows.append(row("rwr", table.SEARCH_SEED, 0.1, machine="a trial's"))
    text = table.markdown(written(tmp_path, rows))
    assert "1,024 queries each; runs: 2 on a machine, 1 on another.\n" in text

def test_the_kept_table_is_made_of_the_kept_rows(monkeypatch):
    "`python benchmarks/table.py table --check` is content, and is not when something is left to make"
    monkeypatch.setattr(sys, "argv", ["table.py", "table", "--check"])
    with pytest.raises(SystemExit) as left: table.main()
    assert left.value.code is None
    monkeypatch.setattr(table, "markdown", lambda results: "another")
    with pytest.raises(SystemExit, match="not what the rows make: .*table.md"): table.main()

def test_what_readme_and_tutorials_say_of_the_rows_is_in_the_rows():
    rows = table.rows_of(table.RESULTS, "scenes")
    place = table.RESULTS.parents[2]
    readme = (place / "README.md").read_text(encoding="utf-8")
    counting = (place / "nbs/tutorials/counting.ipynb").read_text(encoding="utf-8")
    share = lambda runs, who: table.figure_of(
        [table.right(o["scenes"]["verdicts"], who) for o in runs], False, 100, 1)
    plain = [o for o in rows if o["seed"] != table.SEARCH_SEED and not o["changes"]]
    usual = [o for o in plain if (o["method"], o["rate"], o["times"]) == ("nft", 1.0, 1)]
    assert len(usual) == 3
    for who in ("reader", "examiner"):
        assert share(usual, who) + " %" in readme and share(usual, who) in counting
    best = {m: [*o.values()] for m, o in table.reported(table.RESULTS, "scenes").items()}
    for method in ("draft", "flow-grpo", "rwr"): assert share(best[method], "examiner") + " %" in readme
    for runs in best.values():  # a row of the tutorial's table
        rate = runs[0]["settings"]["train_learning_rate"]
        said = f"| {len(runs)} | {rate:g} | {share(runs, 'reader')} | {share(runs, 'examiner')} |"
        assert said in counting, said
    found = table.reported(table.RESULTS, "scenes")
    by_examiner = lambda o: 100 * table.right(o["scenes"]["verdicts"], "examiner")
    leads = [by_examiner(found["draft"][s]) - by_examiner(o) for s, o in found["nft"].items()]
    tutorial = (place / "nbs/tutorials/table.ipynb").read_text(encoding="utf-8")
    assert table.figure_of(leads, False, 1, 1) + " points" in tutorial
    (long,) = [o for o in plain if o["times"] == 4]
    right = table.right(long["scenes"]["verdicts"], "examiner")
    assert f"come to {right:.0%}".replace("%", " %") in readme and f"**{100 * right:.0f}**" in counting

def test_the_papers_order_is_what_the_tutorial_says_it_becomes():
    "among DDPO-IS, DDPO-SF and the two regressions, on Emoji SD"
    order, said = ("ddpo-is", "ddpo-sf", "rwr", "rwr-sparse"), {}
    for task in ("compressibility", "incompressibility", "aesthetic"):
        found = table.reported(table.RESULTS, task)
        for a, b in combinations(order, 2):
            seeds = sorted(set(found[a]) & set(found[b]))
            leads = [table.gain(found[a][s]) - table.gain(found[b][s]) for s in seeds]
            lead, half = table.mean_interval(leads)
            regressions = {a, b} == {"rwr", "rwr-sparse"}
            assert len(seeds) == 5 and (lead > -half or regressions), (task, a, b)
            if lead > half and not regressions: said.setdefault(task, set()).add((a, b))
    assert said == dict(
        compressibility={("ddpo-is", "ddpo-sf")},
        incompressibility={("ddpo-is", "rwr"), ("ddpo-is", "rwr-sparse"), ("ddpo-sf", "rwr-sparse")},
        aesthetic={("ddpo-is", "rwr-sparse"), ("ddpo-sf", "rwr-sparse")})

def test_of_three_things_the_reward_of_log_probabilities_is_paid_in_a_fourth():
    "as `tutorials/table` says: its text is about these numbers"
    of = {name: json.loads((table.RESULTS / f"seen-{name}.json").read_text()) for name in
          ("draft", "nft", "nft-logprob")}
    before = {n: o["pictures"] for n, o in of["draft"]["untouched"]["3"].items()}
    nats = {n: o["log_prob"] for n, o in of["draft"]["untouched"]["3"].items()}
    assert (round(nats["2"], 1), round(nats["4"], 1)) == (-4.8, -1.4)
    seen = {name: [{n: o["3"].get(n, dict(pictures=0))["pictures"] for n in "234"} for who, o in runs.items()
                   if who != "untouched"] for name, runs in of.items()}
    assert len(seen["draft"]) == 5 and all(o["2"] < before["2"] for o in seen["draft"] + seen["nft-logprob"])
    assert sum(o["4"] > before["4"] for o in seen["draft"]) == 4
    assert all(o["4"] < before["4"] and o["2"] > before["2"] for o in seen["nft"])
    assert all(abs(o["4"] - before["4"]) <= 1 for o in seen["nft-logprob"])

def test_with_one_update_an_epoch_ddpos_two_forms_are_one_run():
    "as `tutorials/table` says of scenes"
    found = table.reported(table.RESULTS, "scenes")
    pairs = [(found["ddpo-sf"][s], o) for s, o in found["ddpo-is"].items() if s in found["ddpo-sf"]]
    assert pairs and all(a[k] == b[k] for a, b in pairs for k in ("curve", "trained", "scenes"))

def test_the_recipes_baseline_is_ahead_as_often_as_is_said():
    "of leave-one-out and the prompt's own history, in recipes.py and `tutorials/table`"
    leads = []
    for task in ("compressibility", "incompressibility", "aesthetic"):
        found = table.reported(table.RESULTS, task)
        new, old = found["leave-one-out"], found["ddpo-is"]
        leads += [table.gain(new[s]) - table.gain(old[s]) for s in sorted(set(new) & set(old))]
    said = f"ahead of the prompt's own history in {sum(o > 0 for o in leads)} of {len(leads)} runs"
    assert said in (table.RESULTS.parents[2] / "ddpo_nb/recipes.py").read_text(encoding="utf-8")
    tutorial = (table.RESULTS.parents[2] / "nbs/tutorials/table.ipynb").read_text(encoding="utf-8")
    assert f"ahead in {sum(o > 0 for o in leads)} of {len(leads)} runs" in tutorial

def test_settings_are_read_as_the_command_line_reads_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table.py", "run", "scenes", "nft", "0", "--set", "kl_coef"])
    with pytest.raises(SystemExit) as left: table.main()
    assert left.value.code == 2 and "not FIELD=VALUE" in capsys.readouterr().err

def test_what_the_package_carries_says_what_the_rows_say(tmp_path):
    rows = [row("nft", 0, 0.1), row("nft", 0, 0.1, task="scenes", right=0.8)]
    rows.append(row("draft", 1, 0.2, task="scenes", right=0.5) | dict(reward="scenes_logprob"))
    folder = written(tmp_path, rows)
    carried = json.loads(table.written(table.summary(folder)))
    assert [(o["task"], o["method"], o["seed"], o["gain"]) for o in carried["runs"]] == [
        ("compressibility", "nft", 0, 0.1), ("scenes", "nft", 0, 0.1), ("scenes", "draft", 1, None)]
    emoji, nft, draft = carried["runs"]
    assert nft["right"]["examiner"]["counting"] == 0.7 and "right" not in emoji and draft["curve"] is None
    assert emoji["curve"][-1] == [1024, pytest.approx(1 + 0.1 * 7.5 / 8)]

def test_counting_is_told_apart_by_how_many_were_asked_for():
    asked = {to: table.asked_scenes(5, 0)["counting", to] for to in ("both", "base", "neither")}
    not_three = lambda scenes: dict(reader=[int(o.count != 3) for o in scenes])
    said = {f"counting/{to}": not_three(scenes) for to, scenes in asked.items()}
    assert table.right_by_count(said, "reader") == {"2": 1.0, "3": 0.0, "4": 1.0}
    other = table.right_by_count(said, "reader", seed=1)    # of other scenes, which are in another order
    assert set(other) == {"2", "3", "4"} and other["3"] > 0

def test_runs_are_looked_at_below_the_untouched_model(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "chosen_rate", lambda *_: 1.0)
    policy = load_policy(lora_rank=2)
    for o in policy.trainable_parameters(): torch.nn.init.constant_(o.data, 0.05)
    policy.save_weights(tmp_path / "compressibility" / "rwr-0-1/comparison/weights/rwr-seed0")
    picture, prompts = table.look(tmp_path, "compressibility", ["rwr"], (0,))
    untouched, trained = np.split(np.asarray(picture), 2)
    assert untouched.shape == (64, 64 * len(prompts), 3) and len(set(prompts)) == len(prompts) == 10
    assert (untouched.astype(int) != trained).any()

def test_how_many_things_are_seen_where_so_many_were_asked_for(tmp_path, monkeypatch):
    policy = load_policy("emoji-sd3", lora_rank=2)
    for o in policy.trainable_parameters(): torch.nn.init.constant_(o.data, 0.05)
    policy.save_weights(tmp_path / "trained")
    monkeypatch.setattr(table.seen_of, "__defaults__", (3,))
    command = ["table.py", "seen", "mine", str(tmp_path / "trained"), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command[:4], str(tmp_path / "other/trained"), *command[4:]])
    with pytest.raises(SystemExit, match="one name"): table.main()
    monkeypatch.setattr(sys, "argv", command)
    table.main()
    said = json.loads((tmp_path / "seen-mine.json").read_text())
    assert list(said) == ["untouched", "trained"] and said["untouched"] != said["trained"]
    for found in said.values():
        assert [sum(o["pictures"] for o in of.values()) for of in found.values()] == [3, 3, 3]
        assert all(o["log_prob"] < 0 for of in found.values() for o in of.values())
    assert said["untouched"]["4"]["4"]["pictures"] == 3  # four fill the picture
    table.collect(tmp_path, results=tmp_path / "results")
    assert table.summary(tmp_path / "results")["seen"] == dict(mine=said)
