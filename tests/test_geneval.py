"""GenEval as a reward: its rules on boxes written down by hand, its line format, and the code around the
detectors on tiny ones with random weights, made and saved here."""
import json, os, re
from importlib import resources
from functools import partial
from shutil import copytree
from types import SimpleNamespace
import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (AutoModelForZeroShotObjectDetection, AutoProcessor, BertTokenizer,
                          GroundingDinoConfig, GroundingDinoForObjectDetection,
                          GroundingDinoImageProcessorPil, GroundingDinoProcessor, MMGroundingDinoConfig,
                          MMGroundingDinoForObjectDetection, Owlv2Config,
                          Owlv2ForObjectDetection, Owlv2ImageProcessorPil, Owlv2Processor,
                          OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessorPil, OwlViTProcessor,
                          PreTrainedTokenizerFast)
from ddpo_nb.clip import load_embedder
from ddpo_nb.geneval import (COCO, COLORS, POSITIONS, TAGS, Box, ColorReader, GenEval, facts, geneval,
                             geneval_strict, kept, load_detector, overlap, relations, specification, to_color)
from ddpo_nb.loading import ModelError
from ddpo_nb.prompts import InputError, PromptSource, prompt_source
from ddpo_nb.rewards import REWARDS, WeightedSum, can_score, check_prompts, get_reward

EMOJI = str(resources.files("ddpo_nb")/"weights/emoji-clip")
thing = lambda name, count=1, **more: {"class": name, "count": count} | more
def line(tag, *include, exclude=None, prompt="a photo"):
    found = dict(tag=tag, include=[*include], prompt=prompt)
    return found if exclude is None else found | dict(exclude=exclude)
def at(name, x, y, size=20, score=.9):
    return Box(name, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), score)
def judged(metadata, *boxes, threshold=.3, colors=None, exact=False):
    "The facts of a line for boxes written down by hand; colours by the order of their boxes."
    asked, found = specification(metadata), kept([*boxes], threshold)
    return facts(asked, found, colors, exact)

# what a line asks for

LINES = [  # one of each tag, as prompts/create_prompts.py of djghosh13/geneval makes them
    line("single_object", thing("bench"), prompt="a photo of a bench"),
    line("two_object", thing("bench"), thing("sports ball"), prompt="a photo of a bench and a sports ball"),
    line("counting", thing("clock", 3), exclude=[thing("clock", 4)], prompt="a photo of three clocks"),
    line("colors", thing("zebra", color="purple"), prompt="a photo of a purple zebra"),
    line("position", thing("cow"), thing("dog", position=["left of", 0]),
         prompt="a photo of a dog left of a cow"),
    line("color_attr", thing("bus", color="red"), thing("cup", color="pink"),
         prompt="a photo of a red bus and a pink cup"),
]

def test_every_tag_is_understood():
    asked = [specification(o) for o in LINES]
    assert [o.tag for o in asked] == [*TAGS] and len(COCO) == len({*COCO}) == 80 and len(COLORS) == 10
    assert asked[2].exclude[0].count == 4 and asked[3].include[0].color == "purple"
    assert asked[4].include[1].position == ("left of", 0)

@pytest.mark.parametrize("metadata, says", [
    ({}, "does not say what a picture of it must show"), (None, "does not say"),
    ({"tag": "colors"}, "does not say"),
    (line("spatial", thing("cow")), "tag 'spatial'"), (dict(include=[thing("cow")]), "tag None"),
    (line("colors"), "nothing in 'include'"), (line("colors") | dict(include="[]"), "no list"),
    (line("colors", "cow"), "no object"), (line("colors", thing("unicorn")), "'unicorn'"),
    (line("colors", thing("mouse")), "did you mean 'computer mouse'"),
    (line("colors", thing("remote")), "did you mean 'tv remote'"),
    (line("colors", thing(["cow"])), "80 things"),
    (line("counting", {"class": "cow"}), "None as the count"),
    (line("counting", thing("cow", 0)), "0 as the count"),
    (line("counting", thing("cow", 2.)), "2.0 as the count"),
    (line("counting", thing("cow", True)), "True as the count"),
    (line("counting", thing("cow", 17)), "17 as the count"),
    (line("colors", thing("cow", color="gray")), "'gray'"),
    (line("colors", thing("cow", colour="red")), "'colour' in 'include'"),
    (line("position", thing("cow", position=["left of", 0])), "not before it"),
    (line("position", thing("cow"), thing("dog", position=["left of", -1])), "not before it"),
    (line("position", thing("cow"), thing("dog", position=["behind", 0])), "the position"),
    (line("position", thing("cow"), thing("dog", position="left of")), "the position"),
    (line("position", thing("cow"), thing("dog", position=["above", "0"])), "the position"),
    (line("color_attr", thing("cow", color="red"), thing("cow", color="blue")), "'cow' twice"),
    (line("counting", thing("cow", 2), exclude=[thing("cow", 2)]), "excludes as many"),
    (line("counting", thing("cow", 2), exclude=[thing("dog", color="red")]), "'color' in 'exclude'"),
    (line("counting", thing("cow", 2), exclude=[thing("wolf")]), "'wolf'"),
])
def test_what_cannot_be_meant_is_refused_in_one_line(metadata, says):
    with pytest.raises(InputError, match=re.escape(says)) as e: specification(metadata)
    assert "\n" not in str(e.value)

def test_fields_that_tables_leave_empty_are_no_fields():
    plain, padded = thing("cow"), thing("cow", color=None, position=None)
    assert specification(line("colors", padded) | dict(exclude=None)) == specification(line("colors", plain))

# which boxes count

def test_boxes_are_kept_as_geneval_keeps_them():
    sure, less = at("cow", 20, 20, score=.9), at("cow", 22, 20, score=.5)
    doubtful = at("cow", 80, 20, score=.3)
    assert kept([less, doubtful, sure], .3) == {"cow": (sure, less)}   # surer than, the surest first
    assert kept([less, sure], .3, max_overlap=.5) == {"cow": (sure,)}  # a copy
    assert overlap(sure, sure) == 1 and overlap(sure, at("cow", 90, 90)) == 0
    assert len(kept([at("cow", 9 * i, 9, 4) for i in range(40)], 0)["cow"]) == 16  # of each name
    # names do not hide each other
    assert {*kept([sure, at("dog", 20, 20)], .3, max_overlap=.1)} == {"cow", "dog"}
    assert kept([], .3) == {}

def test_a_chain_of_overlaps_keeps_what_overlaps_no_survivor():
    chain = [at("cow", 20 + 8 * i, 20, score=.9 - .1 * i) for i in range(3)]
    assert kept(chain, 0, max_overlap=.3) == {"cow": (chain[0], chain[2])}

# where

corners = st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 60)] * 2).map(
    lambda o: Box("cow", (o[0], o[1], o[0] + o[2], o[1] + o[3]), .9))
mirror = lambda o: Box(o.name, (200 - o.corners[2], o.corners[1], 200 - o.corners[0], o.corners[3]), o.score)
turn = lambda o: Box(o.name, tuple(o.corners[i] for i in (1, 0, 3, 2)), o.score)
move = lambda o, d: Box(o.name, tuple(v + d for v in o.corners), o.score)
grow = lambda o, f: Box(o.name, tuple(v * f for v in o.corners), o.score)
across = {"left of": "right of", "right of": "left of", "above": "above", "below": "below"}
turned = {"left of": "above", "above": "left of", "right of": "below", "below": "right of"}
opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

@settings(max_examples=200, deadline=None)
@given(corners, corners)
def test_positions_follow_the_picture(a, b):
    "Mirrored boxes swap left and right; the diagonal swaps the axes; the other's eyes see the opposite."
    seen = relations(a, b)
    assert relations(mirror(a), mirror(b)) == {across[o] for o in seen}
    assert relations(turn(a), turn(b)) == {turned[o] for o in seen}
    assert relations(b, a) == {opposite[o] for o in seen}
    assert relations(move(a, 64), move(b, 64)) == seen == relations(grow(a, 2), grow(b, 2))
    assert seen <= {*POSITIONS} and len(seen) <= 2 and not {"left of", "right of"} <= seen

@settings(max_examples=200, deadline=None)
@given(corners, corners)
def test_positions_are_the_published_rule(a, b):
    "Written out once more, a coordinate at a time (relative_position, POSITION_THRESHOLD 0.1)."
    (l, t, r, d), (l2, t2, r2, d2) = a.corners, b.corners
    x, y = (l + r - l2 - r2) / 2, (t + d - t2 - d2) / 2
    far = (x * x + y * y) ** .5
    short = lambda v, sizes: max(abs(v) - .1 * sizes, 0) * (1 if v > 0 else -1)
    x, y = short(x, r - l + r2 - l2), short(y, d - t + d2 - t2)
    expected = set() if max(abs(x), abs(y)) < 1e-3 else {
        name for name, v in (("left of", -x), ("right of", x), ("above", -y), ("below", y)) if v / far > .5}
    assume(all(abs(abs(v) / far - .5) > 1e-9 for v in (x, y)) if far else True)
    assert relations(a, b) == expected

def test_the_margin_counts():
    "Of two things 20 wide, 4 pixels are the margin's; what is left must be more than half of the way."
    cow = at("cow", 50, 50)
    assert relations(at("dog", 42, 50), cow) == set() == relations(cow, cow)
    assert relations(at("dog", 41, 50), cow) == {"left of"} == relations(at("dog", 45, 50), cow, margin=0)
    assert relations(at("dog", 50, 90), cow) == {"below"}
    assert relations(at("dog", 90, 50), cow) == {"right of"}
    assert relations(at("dog", 10, 10), cow) == {"left of", "above"}

# facts

def test_one_thing():
    bench = LINES[0]
    assert judged(bench, at("bench", 20, 20)) == {"bench ≥ 1": 1}
    assert judged(bench, at("bench", 20, 20), at("bench", 60, 60)) == {"bench ≥ 1": 1}  # no mistake
    assert judged(bench, at("cow", 20, 20)) == {"bench ≥ 1": 0} == judged(bench)
    assert judged(bench, at("bench", 20, 20, score=.2)) == {"bench ≥ 1": 0}

def test_two_things_are_two_facts():
    assert judged(LINES[1], at("sports ball", 9, 9)) == {"bench ≥ 1": 0, "sports ball ≥ 1": 1}

@pytest.mark.parametrize("n, value", [(0, 0), (1, 1/3), (2, 2/3), (3, 1), (4, 2/3), (5, 1/3), (6, 0), (9, 0)])
def test_counting_is_exact_and_more_is_as_wrong_as_fewer(n, value):
    "Flow-GRPO's 1 - |n - asked| / asked, and never below 0."
    held = judged(LINES[2], *(at("clock", 30 * i, 9) for i in range(n)))
    assert held == {"clock = 3": pytest.approx(value)}

def test_counts_without_a_limit_are_at_least():
    two = line("two_object", thing("cow", 2))
    cows = [at("cow", 30 * i, 9) for i in range(5)]
    assert judged(two, *cows[:1]) == {"cow ≥ 2": .5} and judged(two, *cows) == {"cow ≥ 2": 1}
    assert judged(two, *cows[:3], exact=True) == {"cow = 2": .5}

def test_excluded_things():
    no_dog = line("single_object", thing("cow"), exclude=[thing("dog")])
    assert judged(no_dog, at("cow", 9, 9)) == {"cow ≥ 1": 1, "dog < 1": 1}
    assert judged(no_dog, at("cow", 9, 9), at("dog", 60, 9)) == {"cow ≥ 1": 1, "dog < 1": 0}
    loose = line("counting", thing("cow"), exclude=[thing("cow", 3)])  # one or two
    assert judged(loose, at("cow", 9, 9), at("cow", 60, 9)) == {"cow ≥ 1": 1, "cow < 3": 1}
    assert judged(loose, *(at("cow", 30 * i, 9) for i in range(3)))["cow < 3"] == 0

def test_colours_are_asked_of_the_surest_boxes():
    zebra, sure, less = LINES[3], at("zebra", 9, 9, score=.9), at("zebra", 60, 9, score=.5)
    colors = {sure: "white", less: "purple"}
    assert judged(zebra, less, sure, colors=colors) == {"zebra ≥ 1": 1, "zebra purple": 0}
    assert judged(zebra, less, colors=colors) == {"zebra ≥ 1": 1, "zebra purple": 1}
    assert judged(zebra) == {"zebra ≥ 1": 0, "zebra purple": 0}
    assert to_color(specification(zebra), kept([less, sure], .3)) == [sure]
    assert to_color(specification(zebra), {}) == []
    assert to_color(specification(LINES[0]), kept([at("bench", 9, 9)], .3)) == []

def test_a_colour_is_worth_nothing_while_the_count_is_wrong():
    two = line("color_attr", thing("cow", 2, color="red"))
    a, b = at("cow", 9, 9), at("cow", 60, 9)
    assert judged(two, a, colors={a: "red"}) == {"cow ≥ 2": .5, "cow red": 0}
    assert judged(two, a, b, colors={a: "red", b: "blue"}) == {"cow ≥ 2": 1, "cow red": .5}
    assert to_color(specification(two), kept([a], .3)) == []

def test_positions_need_both():
    cow, dog = at("cow", 80, 50), at("dog", 20, 50)
    assert judged(LINES[4], cow, dog) == {"cow ≥ 1": 1, "dog ≥ 1": 1, "dog left of cow": 1}
    assert judged(LINES[4], at("cow", 20, 50), at("dog", 80, 50))["dog left of cow"] == 0
    assert judged(LINES[4], dog) == {"cow ≥ 1": 0, "dog ≥ 1": 1, "dog left of cow": 0}
    assert judged(LINES[4], cow) == {"cow ≥ 1": 1, "dog ≥ 1": 0, "dog left of cow": 0}

def test_each_stands_so_to_each():
    metadata = line("position", thing("cow", 2), thing("dog", position=["left of", 0]))
    dog, cows = at("dog", 50, 50), (at("cow", 90, 50), at("cow", 120, 50))
    assert judged(metadata, dog, *cows)["dog left of cow"] == 1
    assert judged(metadata, dog, cows[0], at("cow", 10, 50))["dog left of cow"] == 0

def test_what_is_seen_from_a_thing_of_the_wrong_colour_is_nowhere():
    metadata = line("position", thing("cow", color="red"), thing("dog", position=["left of", 0]))
    cow, dog = at("cow", 80, 50), at("dog", 20, 50)
    assert judged(metadata, cow, dog, colors={cow: "red"})["dog left of cow"] == 1
    assert judged(metadata, cow, dog, colors={cow: "blue"})["dog left of cow"] == 0

names = st.sampled_from(["cow", "dog", "bus"])
@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(names, corners, st.sampled_from([.1, .4, .8])), max_size=7), st.sampled_from([
    line("single_object", thing("cow")), line("two_object", thing("cow"), thing("dog", 2)),
    line("position", thing("cow"), thing("dog", position=["above", 0])),
    line("counting", thing("cow", 2), exclude=[thing("cow", 3)]), line("colors", thing("bus", color="red"))]))
def test_all_facts_hold_where_the_benchmark_says_correct(drawn, metadata):
    "GenEval's `evaluate`, written out once more on boxes of all sorts; every bus is red if it is wide."
    boxes = [Box(name, box.corners, score) for name, box, score in drawn]
    color = lambda o: "red" if o.corners[2] - o.corners[0] > 30 else "blue"
    found = kept(boxes, .3)
    correct, groups = True, []
    for o in metadata["include"]:
        those = found.get(o["class"], ())[:o["count"]]
        fine = len(those) >= o["count"]
        if fine and "color" in o: fine = all(color(box) == o["color"] for box in those)
        if fine and "position" in o:
            word, other = o["position"]
            seen_from = groups[other]
            fine = seen_from is not None and all(word in relations(a, b) for a in those for b in seen_from)
        groups.append(those if fine else None)
        correct = correct and fine
    few = lambda o: len(found.get(o["class"], ())) < o["count"]
    correct = correct and all(map(few, metadata.get("exclude", [])))
    asked = specification(metadata)
    held = facts(asked, found, {o: color(o) for o in to_color(asked, found)})
    assert (min(held.values()) == 1) == correct and all(0 <= v <= 1 for v in held.values())

# the reward, on recorded boxes

RECORDED = [
    [at("bench", 20, 20)], [at("bench", 20, 20)],
    [at("clock", 30 * i, 9, score=s) for i, s in enumerate((.9, .8, .7, .35))],
    [at("zebra", 20, 20)], [at("cow", 50, 20), at("dog", 10, 20)], [at("bus", 20, 20), at("cup", 50, 50)],
]
COLOURS = dict(zebra="purple", bus="red", cup="blue")
def reward(recorded=RECORDED, **kwargs):
    asked = []
    def colors(pieces, names):
        asked.append([o.shape for o in pieces])
        return [COLOURS[name] for name in names]
    found = GenEval(lambda images: recorded, colors, **dict(threshold=.3, counting_threshold=.5) | kwargs)
    found.asked = asked
    return found
given_all = lambda n=6: (torch.rand(n, 3, 64, 64), [o["prompt"] for o in LINES[:n]], LINES[:n])

def test_shares_for_training_and_all_or_nothing_for_the_benchmark():
    score = reward()
    rewards, info = score(*given_all())
    assert rewards.tolist() == [1, .5, 1, 1, 1, .75] and info["right"].tolist() == [1, 0, 1, 1, 1, 0]
    assert reward(strict=True)(*given_all())[0].tolist() == info["right"].tolist()
    for i, tag in enumerate(TAGS):
        of_tag = info[f"right_{tag}"]
        assert of_tag[i] == info["right"][i] and np.isnan(np.delete(of_tag, i)).all()
    assert [[*o] for o in score.asked] == [[(20, 20, 3)] * 3]  # one call for all pictures

def test_counting_has_a_threshold_of_its_own():
    "The doubtful fourth clock is none; at the other threshold it would be."
    assert reward(counting_threshold=.3)(*given_all())[0][2] == pytest.approx(2 / 3)
    assert reward(threshold=.95)(*given_all())[0].tolist() == [0, 0, 1, 0, 0, 0]

def test_flow_grpos_counts_are_exact_everywhere():
    two = [[at("bench", 20, 20), at("bench", 60, 60)]]
    assert reward(two)(*given_all(1))[0] == 1 and reward(two, exact=True)(*given_all(1))[0] == 0

def test_copies_are_no_count():
    clocks = [at("clock", x, 30, score=s) for x, s in ((30, .9), (32, .8), (60, .9), (90, .9))]
    assert reward([[], [], clocks])(*given_all(3))[0][2] == 1
    assert reward([[], [], clocks], max_overlap=1)(*given_all(3))[0][2] == pytest.approx(2 / 3)

def test_a_cut_out_is_never_empty():
    edge = [[Box("zebra", (63.8, 63.7, 64., 64.), .9)], [Box("zebra", (-3., -2., 9.6, 9.4), .9)]]
    score = reward(edge)
    score(torch.rand(2, 3, 64, 64), ["", ""], [LINES[3]] * 2)
    assert all(h >= 1 and w >= 1 for h, w, _ in score.asked[0])

@pytest.mark.parametrize("bad", [{}, None, {"count": 3}])
def test_a_prompt_that_does_not_say_what_it_asks_for_is_refused(bad):
    with pytest.raises(InputError, match="'a cow' does not say what a picture") as e:
        reward()(torch.rand(1, 3, 8, 8), ["a cow"], [bad])
    assert str(e.value).startswith("--prompts: ") and "\n" not in str(e.value)

@pytest.mark.parametrize("name", ["threshold", "counting_threshold", "max_overlap", "margin"])
def test_settings_are_shares(name):
    for value in (-.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=name): reward(**{name: value})

def test_checkpoints_know_the_judges():
    same = reward().identity
    assert same == reward().identity and same["name"] == "GenEval"
    others = [{}, dict(strict=True), dict(threshold=.4), dict(exact=True)]
    assert len({reward(**o).identity["digest"] for o in others}) == 4

# prompts from files

def write(place, lines):
    place.write_text("".join(json.dumps(o) + "\n" if isinstance(o, dict) else o + "\n" for o in lines))
    return place

def test_genevals_file_is_a_set_of_prompts(tmp_path):
    source = prompt_source(write(tmp_path/"evaluation_metadata.jsonl", LINES))
    assert source.prompts == [o["prompt"] for o in LINES]
    check_prompts(reward(), source)
    prompt, metadata = source()
    assert specification(metadata).tag in TAGS

@pytest.mark.parametrize("bad, says", [
    (line("colors", thing("unicorn"), prompt="a unicorn"), "asks for 'unicorn'"),
    (dict(prompt="a unicorn"), "does not say what a picture of it must show"),
])
def test_a_wrong_line_is_named_by_its_number(tmp_path, bad, says):
    place = write(tmp_path/"x.jsonl", [LINES[0], "", bad, LINES[1]])
    with pytest.raises(InputError, match=f"line 3 of .*x.jsonl', 'a unicorn', {says}") as e:
        check_prompts(reward(), prompt_source(place))
    assert "\n" not in str(e.value)
    both = WeightedSum(dict(a=(1, len), b=(1, reward())))
    with pytest.raises(InputError, match="line 3"): check_prompts(both, prompt_source(place))

def test_places_of_other_kinds(tmp_path):
    (tmp_path/"x.json").write_text(json.dumps(["a cat", LINES[0]]))
    (tmp_path/"x.txt").write_text("\na cat\n")
    places = {"x.json": "entry 1 of", "x.txt": "line 2 of", "simple_animals": "number 1, 'cat'"}
    for name, place in places.items():
        source = prompt_source(tmp_path/name if "." in name else name)
        with pytest.raises(InputError, match=place): check_prompts(reward(), source)
    assert can_score(reward(), [(o["prompt"], o) for o in LINES]) and not can_score(reward(), ["a cat"])
    check_prompts(reward(), lambda: ("a cat", {}))  # nobody can look through a function

def test_a_trainer_of_ones_own_looks_through_its_prompts():
    from ddpo_nb import DDPOConfig, DDPOTrainer
    with pytest.raises(InputError, match="number 2, 'a cat', does not say"):
        DDPOTrainer(DDPOConfig(), reward(), PromptSource([("two", LINES[1]), "a cat"]), object())

def test_a_reward_of_ones_own_may_refuse_prompts_as_well(tmp_path):
    (tmp_path/"mine.py").write_text("""
from ddpo_nb.prompts import InputError
class Picky:
    def check_prompt(self, prompt, metadata):
        metadata.clear()
        if "cat" not in prompt: raise InputError("metadata", "asks for no cat", "ask for one")
    def __call__(self, images, prompts, metadata): return [0.] * len(prompts), {}
""")
    mine, source = get_reward(f"{tmp_path}/mine.py:Picky"), PromptSource([("a cat", dict(n=1)), "a dog"])
    with pytest.raises(InputError, match="number 2, 'a dog', asks for no cat"): check_prompts(mine, source)
    assert source.items[0][1] == dict(n=1) and can_score(mine, source.items[:1])

def test_questions_and_answers_are_looked_for_too():
    from ddpo_nb.vlm import VLMQuestions
    judge = VLMQuestions(client=None)
    assert can_score(judge, prompt_source("counting").items)
    with pytest.raises(InputError, match="number 1, 'cat', has no lists of questions"):
        check_prompts(judge, prompt_source("simple_animals"))

# detectors: tiny ones with random weights, through the code that loads real ones

def words_of(texts): return sorted({w for text in texts for w in text.lower().split()})

def owl_tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>", *words_of(["a photo of a", *COCO])]
    vocab = {word: i for i, word in enumerate(words)}
    t = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", model_max_length=16)

def save_owl(place, classes):
    config, model, processor, image_processor = classes
    tokenizer = owl_tokenizer()
    layers = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    special = dict(eos_token_id=2, bos_token_id=1, pad_token_id=0)
    text = layers | special | dict(vocab_size=len(tokenizer), max_position_embeddings=16)
    config = config(text_config=text,
                    vision_config=layers | dict(image_size=64, patch_size=16), projection_dim=16)
    model(config).save_pretrained(place)
    processor(image_processor(size=dict(height=64, width=64)), tokenizer).save_pretrained(place)

def save_dino(place, classes=(GroundingDinoConfig, GroundingDinoForObjectDetection)):
    vocab = {f"[unused{i}]": i for i in range(1030)}   # the model knows . and ? by BERT's numbers
    named = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    named |= {200 + i: word for i, word in enumerate(words_of(COCO))}
    vocab = {named.get(i, word): i for word, i in vocab.items()}
    config = classes[0](
        backbone_config=dict(model_type="swin", image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4,
                             window_size=2, out_indices=[2, 3, 4]),
        text_config=dict(model_type="bert", vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1,
                         num_attention_heads=2, intermediate_size=16),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=12, encoder_n_points=2, decoder_n_points=2)
    classes[1](config).save_pretrained(place)
    sizes = dict(shortest_edge=64, longest_edge=128)
    images = GroundingDinoImageProcessorPil(size=sizes)
    GroundingDinoProcessor(images, BertTokenizer(vocab=vocab)).save_pretrained(place)

OWLS = dict(owlv2=(Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor, Owlv2ImageProcessorPil),
            owlvit=(OwlViTConfig, OwlViTForObjectDetection, OwlViTProcessor, OwlViTImageProcessorPil))
SAVERS = {kind: partial(save_owl, classes=classes) for kind, classes in OWLS.items()}
SAVERS |= {"grounding-dino": save_dino, "mm-grounding-dino": partial(save_dino, classes=(
    MMGroundingDinoConfig, MMGroundingDinoForObjectDetection))}

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "kind -> folder with a tiny detector of it"
    top = tmp_path_factory.mktemp("detectors")
    for kind, save in SAVERS.items():
        torch.manual_seed(2)  # weights that see something in every picture
        save(str(top/kind))
    return {kind: str(top/kind) for kind in SAVERS}

kinds = pytest.mark.parametrize("kind", SAVERS)
def pictures(n=3): return torch.rand(n, 3, 64, 48, generator=torch.Generator().manual_seed(1))

def close(a, b):
    key = lambda o: (o.name, -o.score)
    a, b = sorted(a, key=key), sorted(b, key=key)
    assert [o.name for o in a] == [o.name for o in b]
    for x, y in zip(a, b): assert (*x.corners, x.score) == pytest.approx((*y.corners, y.score), abs=2e-3)

@kinds
def test_a_detector_from_a_folder_reads_pictures(folders, kind):
    detector, x = load_detector(folders[kind]), pictures()
    found = detector(x)
    assert len(found) == 3 and sum(map(len, found)) > 0 and not detector.model.training
    for box in (o for boxes in found for o in boxes):
        left, top, right, bottom = box.corners
        assert box.name in COCO and detector.least < box.score <= 1
        assert 0 <= left < right <= 48 and 0 <= top < bottom <= 64

@kinds
def test_a_picture_is_read_as_if_it_were_alone(folders, kind):
    x, detector = pictures(), load_detector(folders[kind], batch_size=2)
    for image, boxes in zip(x, detector(x)): close(boxes, detector(image[None])[0])

@pytest.mark.parametrize("kind", ["owlv2", "owlvit"])
def test_boxes_are_those_of_transformers(folders, kind):
    "The library's own way from pictures and texts to boxes, for all 80 things."
    detector, x = load_detector(folders[kind]), pictures(1)
    processor = AutoProcessor.from_pretrained(folders[kind])
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folders[kind]).eval()
    pixels = (x[0].permute(1, 2, 0) * 255).round().byte().numpy()
    inputs = processor(text=[[f"a photo of a {o}" for o in COCO]], images=[pixels], return_tensors="pt",
                       padding="max_length", max_length=16)
    with torch.no_grad(): out = model(**inputs)
    theirs = processor.post_process_grounded_object_detection(out, .05, [(64, 48)], [COCO])[0]
    cut = lambda o: tuple(min(max(v, 0), side) for v, side in zip(o, (48, 64, 48, 64)))
    each = zip(theirs["text_labels"], theirs["boxes"].tolist(), theirs["scores"].tolist())
    theirs = [Box(name, cut(box), score) for name, box, score in each]
    theirs = [o for o in theirs if o.corners[2] - o.corners[0] >= 1 and o.corners[3] - o.corners[1] >= 1]
    assert theirs
    close(detector(x)[0], theirs)

def test_grounding_dinos_names_are_the_means_of_their_tokens(folders):
    detector = load_detector(folders["grounding-dino"])
    tokens = detector.words["input_ids"][0].tolist()
    decode = detector.processor.tokenizer.decode
    for name, column in zip(COCO, detector.of_token.T):
        places = column.nonzero()[:, 0].tolist()
        assert decode([tokens[i] for i in places]) == name and column.sum() == pytest.approx(1)
    logits = torch.full((1, 1, 256), -20.)
    hot_dog = detector.of_token[:, COCO.index("hot dog")].nonzero()[:, 0]
    logits[0, 0, hot_dog] = 20.
    score, name = (o.item() for o in detector.best(logits))
    assert COCO[name] == "hot dog" and score == pytest.approx(1)
    logits[0, 0, hot_dog[0]] = -20.
    assert detector.best(logits)[0].item() == pytest.approx(.5)  # the mean of both tokens

@kinds
def test_half_precision_sees_the_same(folders, kind):
    "As on a GPU, where the networks run under autocast: boxes move by little."
    detector, x = load_detector(folders[kind]), pictures(1)
    single = {o.name for o in detector(x)[0]}
    with torch.autocast("cpu", torch.bfloat16): half = detector(x)[0]
    assert half and all(np.isfinite(o.corners).all() for o in half) and {o.name for o in half} & single

@pytest.mark.cuda
@kinds
def test_on_a_gpu(folders, kind):
    detector, x = load_detector(folders[kind]), pictures(2)
    on_cpu = detector(x)
    on_gpu = detector.to("cuda")(x.to("cuda"))
    assert [{o.name for o in a} & {o.name for o in b} or a == b == [] for a, b in zip(on_cpu, on_gpu)]

def test_values_that_are_not_finite_are_no_empty_picture(folders):
    detector = load_detector(folders["owlv2"])
    detector.model.class_head.dense0.bias.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"): detector(pictures(1))
    with pytest.raises(InputError, match="finite"): detector(torch.full((1, 3, 8, 8), float("nan")))

@pytest.mark.parametrize("name, says", [
    ("/no/such/folder", "there is no such folder"), ("nobody/nothing", "cannot load 'nobody/nothing'"),
    (EMOJI, "kind 'clip', none of owlv2"),
])
def test_what_is_no_detector_is_refused(name, says):
    with pytest.raises(ModelError, match=says) as e: load_detector(name)
    assert str(e.value).startswith("--geneval-detector: ") and "\n" not in str(e.value)

def test_pickles_are_not_opened(folders, tmp_path):
    place = copytree(folders["owlv2"], tmp_path/"x")
    torch.save({}, place/"pytorch_model.bin")
    os.remove(place/"model.safetensors")
    with pytest.raises(ModelError, match="cannot load"): load_detector(str(place))

def test_weights_that_are_missing_are_not_made_up(folders, tmp_path):
    from safetensors.torch import load_file, save_file
    place = copytree(folders["owlv2"], tmp_path/"x")
    state = load_file(place/"model.safetensors")
    del state["class_head.dense0.weight"]
    save_file(state, place/"model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 of its weights are missing .first: class_head.dense0.weight"):
        load_detector(str(place))

def test_a_models_own_code_is_not_run(folders, tmp_path):
    place = copytree(folders["owlv2"], tmp_path/"x")
    config = json.loads((place/"config.json").read_text())
    config |= dict(model_type="mine", auto_map=dict(AutoConfig="mine.Mine"))
    (place/"config.json").write_text(json.dumps(config))
    (place/"mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError): load_detector(str(place))

# colours

def test_a_colour_is_the_text_that_fits_best():
    "Of a CLIP whose pictures are their mean colour and whose texts are the colours' names."
    seen = {"red": (1., 0, 0), "green": (0, 1., 0), "blue": (0, 0, 1.)}
    asked = []
    def texts(those):
        asked.append(those)
        vector = lambda text: seen.get(next(w for w in re.split(r"[ -]", text) if w in COLORS), (.1, .1, .1))
        return torch.nn.functional.normalize(torch.tensor([vector(o) for o in those]), dim=-1)
    clip = SimpleNamespace(
        batch_size=2, device=torch.device("cpu"), texts=texts,
        image_processor=lambda images, return_tensors: SimpleNamespace(pixel_values=torch.stack(
            [torch.from_numpy(np.asarray(o).mean((0, 1))).float() for o in images])),
        model=SimpleNamespace(get_image_features=lambda pixel_values: pixel_values))
    piece = lambda place, h=5, w=9: np.full((h, w, 3), np.eye(3, dtype=np.uint8)[place] * 200)
    read = ColorReader(clip)
    assert read([piece(0), piece(2), piece(1, 3, 3)], ["cow", "cow", "bus"]) == ["red", "blue", "green"]
    assert read([], []) == [] and len(asked) == 2                     # each name's texts once
    assert {"a photo of a red cow", "a photo of a red-colored cow", "a photo of a red object"} <= {*asked[0]}

@pytest.mark.filterwarnings("ignore:.*longer than the 16 tokens")  # which real ones are not
def test_a_real_clip_takes_pieces_of_any_size():
    read = ColorReader(load_embedder(EMOJI))
    pieces = [np.zeros((h, w, 3), np.uint8) for h, w in ((1, 1), (3, 40), (64, 2))]
    said = read(pieces, ["cow"] * 3)
    assert len(said) == 3 and {*said} <= {*COLORS}

# by name

@pytest.fixture
def told(monkeypatch, folders):
    "The environment as the command line's flags leave it."
    for name, value in dict(DETECTOR=folders["owlv2"], CLIP=EMOJI, THRESHOLD="0.1").items():
        monkeypatch.setenv(f"DDPO_GENEVAL_{name}", value)
    monkeypatch.delenv("DDPO_GENEVAL_COUNTING_THRESHOLD", raising=False)

def test_both_rewards_have_names(told, folders):
    assert {"geneval", "geneval_strict"} <= {*REWARDS}
    soft, strict = get_reward("geneval", "some/model"), geneval_strict(counting_threshold=.7)
    assert (soft.strict, soft.threshold, soft.counting_threshold) == (False, .1, .3)
    assert (strict.strict, strict.threshold, strict.counting_threshold) == (True, .1, .7)
    assert soft.detector.name == folders["owlv2"] and soft.colors.embedder.name == EMOJI
    rewards, info = soft.to("cpu")(*given_all(3))
    assert rewards.shape == (3,) and ((0 <= rewards) & (rewards <= 1)).all()
    assert {*info} == {"right", *(f"right_{tag}" for tag in TAGS)}

def test_a_low_threshold_is_not_lost_on_the_way(folders):
    detector = load_detector(folders["owlv2"])
    GenEval(detector, None, threshold=.01)
    assert detector.least == .01 and sum(map(len, detector(pictures()))) >= 1

def test_thresholds_of_the_environment_are_numbers(told, monkeypatch):
    monkeypatch.setenv("DDPO_GENEVAL_THRESHOLD", "much")
    with pytest.raises(InputError, match="--geneval-threshold: 'much' is not a number"): geneval()

# by the command line

SMALL = ("--queries 4 --evaluation-samples 2 --sample-num-steps 2 --train-batch-size 2 --sample-batch-size 2"
         " --sample-num-batches-per-epoch 1 --train-num-inner-epochs 1 --no-progress").split()

@pytest.fixture
def run(capsys, tmp_path, monkeypatch, small_unet):
    "Run a command line in an empty folder, where GenEval's file lies; status, output, errors."
    from ddpo_nb import cli
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_told", {})
    write(tmp_path/"lines.jsonl", LINES)
    def go(*words):
        capsys.readouterr()
        status = cli.main([*map(str, words)])
        return status, *capsys.readouterr()
    yield go
    for name in [o for o in os.environ if o.startswith("DDPO_GENEVAL_")]: del os.environ[name]

@pytest.mark.filterwarnings("ignore:.*longer than the 16 tokens")
def test_training_on_genevals_file_from_the_command_line(run, folders, tmp_path):
    status, out, err = run(
        "train", "--reward", "geneval", "--prompts", "lines.jsonl", "--geneval-detector", folders["owlv2"],
        "--geneval-clip", EMOJI, "--geneval-threshold", ".1", "--output", "run", *SMALL)
    assert status == 0, err
    rows = [json.loads(o) for o in (tmp_path/"run/metrics.jsonl").read_text().splitlines()]
    assert rows and all(0 <= row["reward_mean"] <= 1 for row in rows)
    assert {"right", *(f"right_{tag}" for tag in TAGS)} <= {*rows[0]["reward_info"]}
    # sets of prompts that say nothing of what they ask for are not examined
    found = json.loads(next((tmp_path/"run").rglob("*base*.json")).read_text())
    assert {*found["rewards"]} == {"seen"}
    assert "--geneval-detector" in json.loads((tmp_path/"run/config.json").read_text())["command"]

@pytest.mark.filterwarnings("ignore:.*longer than the 16 tokens")
def test_evaluating_all_or_nothing(run, folders):
    status, out, err = run(
        "evaluate", "--reward", "geneval_strict", "--prompts", "lines.jsonl", "--samples", 6, "--steps", 2,
        "--geneval-detector", folders["grounding-dino"], "--geneval-clip", EMOJI)
    assert status == 0 and out.startswith("geneval_strict: "), err
    assert float(out.split()[1]) in [pytest.approx(n / 6, abs=.01) for n in range(7)]

@pytest.mark.parametrize("words, says", [
    ("train --reward geneval --prompts simple_animals", "--prompts: number 1, 'cat', does not say"),
    ("evaluate --reward geneval --prompts simple_animals", "--prompts: number 1, 'cat', does not say"),
    ("train --reward geneval --prompts bad.jsonl", "line 2 of 'bad.jsonl', 'two unicorns', asks for"),
    ("train --watch-reward geneval --prompts simple_animals", "--prompts: number 1, 'cat', does not say"),
])
def test_prompts_are_looked_through_before_anything_is_painted(run, folders, told, tmp_path, words, says):
    write(tmp_path/"bad.jsonl", [LINES[0], line("colors", thing("unicorn"), prompt="two unicorns")])
    status, out, err = run(*words.split(), *(SMALL if "train" in words else ()))
    assert status == 2 and says in err and err.count("\n") == 1, err

@pytest.mark.parametrize("words, says", [
    ("--geneval-detector /no/folder --reward geneval", "--geneval-detector: cannot load '/no/folder'"),
    ("--geneval-detector x/y", "--geneval-detector: the reward is jpeg_compressibility"),
    ("--geneval-threshold 2 --reward geneval", "--geneval-threshold: '2' is not a number from 0 to 1"),
    ("--geneval-clip /no/clip --reward geneval", "--geneval-clip: cannot load '/no/clip'"),
])
def test_flags_that_cannot_be_meant(run, folders, monkeypatch, words, says):
    monkeypatch.setenv("DDPO_GENEVAL_DETECTOR", folders["owlv2"])
    status, out, err = run("train", "--prompts", "lines.jsonl", *words.split(), *SMALL)
    assert status == 2 and err.count("\n") == 1, err
    assert says.split(":")[0] in err and says.split(": ")[1] in err, err

@pytest.mark.filterwarnings("ignore:.*longer than the 16 tokens")
def test_flags_of_one_command_are_not_the_nexts(run, folders):
    words = "evaluate --reward geneval --prompts lines.jsonl --steps 2 --geneval-clip".split()
    assert run(*words, EMOJI, "--geneval-detector", folders["owlv2"])[0] == 0
    assert "DDPO_GENEVAL_DETECTOR" in os.environ
    run("evaluate", "--reward", "jpeg_compressibility", "--steps", 2, "--samples", 1)
    assert not [o for o in os.environ if o.startswith("DDPO_GENEVAL_")]
