"What the lessons show and say: saved results, stored outputs, and prose that fits them."
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from ddpo_nb.notebooks import course_parts

root = Path(__file__).resolve().parents[1]
NAMES = sorted(
    o.relative_to(root/"nbs").with_suffix("").as_posix()
    for o in (root/"nbs").rglob("*.ipynb")
    if not any(p.startswith((".", "_")) for p in o.relative_to(root).parts)
)

def cells(name):
    "The cells of a notebook, each with its source as one string"
    found = json.loads((root/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [c | dict(source="".join(c["source"])) for c in found]

def prose(name): return "\n\n".join(c["source"] for c in cells(name) if c["cell_type"] == "markdown")

def test_the_comparison_that_comes_with_the_package():
    "Whole runs of four algorithms, on one budget, and the figures that notebook 10 prints of them"
    from ddpo_nb.compare import Comparison
    import ddpo_nb
    race = Comparison.load(Path(ddpo_nb.__file__).parent/"data/comparison")
    assert race.names == ["ddpo-is", "ddpo-sf", "rwr", "rwr-sparse"]
    assert race.missing == []
    spent = {(r["algorithm"], r["seed"]): r["queries"] for r in race.rows}  # the last row of each run
    assert len(spent) == 12 and set(spent.values()) == {race.settings["queries"]} == {1024}
    said = prose("10_compare")
    for line in race.table().markdown().splitlines()[2:]: assert line in said, line
    assert race.settings["command"] in said
    assert all(len(e.pictures) == len(e.shown) for e in race.evaluations.values())

# Exercises

PARTS = course_parts(prose("index"))
LESSONS = [*PARTS["Lessons"], *PARTS["Tutorials"]]

def exercise(name):
    "Stub, check and answer of a lesson's exercise, and the module that it makes, None if it makes none"
    found = cells(name)
    code = [c["source"] for c in found if c["cell_type"] == "code"]
    stubs = [i for i, s in enumerate(code) if s.rstrip().endswith("raise NotImplementedError")]
    assert len(stubs) == 1, f"{name} has {len(stubs)} exercises"
    after = prose(name).split("## Exercise\n")[-1]
    answers = re.findall(r"<details><summary>Answer</summary>\n\n```python\n(.+?)\n```\n", after, re.S)
    assert len(answers) == 1, f"{name} has {len(answers)} folded answers"
    module = re.search(r"(?m)^#\| default_exp (\w+)", "\n".join(code))
    return code[stubs[0]], code[stubs[0] + 1], answers[0], module and module[1]

@pytest.mark.parametrize("name", LESSONS)
def test_an_exercise_tells_right_from_wrong(name, capsys):
    "The stub waits, nothing at all is not enough, and the folded answer is right"
    stub, check, answer, module = exercise(name)
    known = dict(vars(importlib.import_module(f"ddpo_nb.{module}"))) if module else {}
    said = []
    empty = stub.replace("raise NotImplementedError", "return None")
    for attempt in (stub, empty, answer):
        exec(attempt, known)
        exec(check, known)
        said.append(capsys.readouterr().out)
    assert said[0] == "Your turn: the function above is still empty.\n"
    assert said[1].startswith("Not yet: ")
    assert said[2] == "Right.\n"
    stored = [c["outputs"] for c in cells(name) if c["source"] == check]
    assert ["".join(o["text"]) for o in stored[0]] == [said[0]]   # nobody's solution is shown

def test_every_lesson_has_an_exercise():
    "Whatever the index calls a lesson, and no exercise besides"
    having = [n for n in NAMES if n != "00a_lessons" and "raise NotImplementedError" in json.dumps(cells(n))
              and "attempt(check" in json.dumps(cells(n))]
    assert having == sorted(LESSONS)

def test_the_trainers_notebook_has_the_loop_and_no_bookkeeping():
    "Each cell is a screenful at most; files, threads, signals and the machine are the appendix's"
    code = [c["source"] for c in cells("09_trainer") if c["cell_type"] == "code"]
    assert max(len(o.splitlines()) for o in code) <= 60
    exported = "\n".join(o for o in code if o.startswith("#| export"))
    imported = " ".join(re.findall(r"(?m)^(?:from|import) .+", exported))
    kept_away = "accelerate.state|checkpoints|hub|json|os|shutil|sys|tempfile|threading|tqdm|warnings"
    assert re.findall(rf"\b(?:{kept_away})\b", imported) == []

def test_sliders_redraw_and_stand_still():
    import base64
    import ipywidgets
    from matplotlib.figure import Figure
    from ddpo_nb.lessons import with_sliders, with_still
    drawn = []
    def draw(width):
        drawn.append(width)
        fig = Figure(figsize=(width, 1))
        return fig
    slider = ipywidgets.IntSlider(2, 1, 4)
    view = with_sliders(draw, width=slider)
    still = view._repr_mimebundle_()
    assert drawn == [2] and set(still) == {"image/png", "text/plain", WIDGET}
    slider.value = 3
    now = base64.b64decode(view._repr_mimebundle_()["image/png"])
    assert drawn == [2, 3] and now == view.children[-1].value and now.startswith(b"\x89PNG")
    assert "image/png" not in with_still(ipywidgets.HTML(), lambda: b"")._repr_mimebundle_()

def test_a_widget_of_ipywidgets_7_is_sent_with_its_picture(monkeypatch):
    "It has no bundle to add to, but shows itself; in Colab, which has it, the page is live: no picture"
    from ddpo_nb.lessons import with_still
    sent, still = [], ["image/png", "text/plain", WIDGET]
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: sent.append((bundle, raw)))
    class Widget:
        model_id = "abc"
        def __repr__(self): return "Widget()"
        def _ipython_display_(self, **kwargs): sent.append("without its picture")
    widget = with_still(Widget(), lambda: b"x")
    widget._ipython_display_()
    [(bundle, raw)] = sent
    assert raw and sorted(bundle) == sorted(still) and bundle["text/plain"] == "Widget()"
    assert bundle[WIDGET]["model_id"] == "abc" and bundle[WIDGET]["version_major"] == 2
    monkeypatch.setitem(sys.modules, "google.colab", None)
    assert sorted(widget._repr_mimebundle_()) == sorted({*still} - {"image/png"})

# Stored outputs: what somebody sees who runs nothing

WIDGET = "application/vnd.jupyter.widget-view+json"

def text_of(output): return "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))

def flaws(output):
    "What a reader without a kernel would stumble over in a stored output"
    data = output.get("data", {})
    found = []
    if "\\u001b" in json.dumps(output): found.append("terminal codes")
    nothing = text_of(output).strip() in ("", "[]", "{}", "()", "None", "set()")
    if nothing and not data.keys() - {"text/plain"}: found.append("nothing in it")
    if WIDGET in data: found.append("a widget of a kernel that is gone: store the picture alone")
    widget = re.match(r"(interactive|[VH]?Box|Output|HTML)\(", text_of(output))
    if widget and not {"image/png", "image/jpeg", "text/html"} & data.keys():
        found.append("a widget's name")
    return found

@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_can_be_read(name):
    found = [
        (i, flaw) for i, c in enumerate(cells(name)) for o in c.get("outputs", []) for flaw in flaws(o)
        if "#| hide" not in c["source"]
    ]
    assert found == []

def test_the_check_of_stored_outputs_finds_what_it_looks_for():
    shown = lambda **data: flaws(dict(output_type="display_data", data=data))
    printed = lambda text: flaws(dict(output_type="stream", text=text))
    assert printed("\x1b[31mred") == ["terminal codes"] and printed("\n") == ["nothing in it"] == shown(
        **{"text/plain": ["[]"]})
    view = {"text/plain": "interactive(children=(…", WIDGET: "{}"}
    assert len(shown(**view)) == 2 and len(shown(**view, **{"image/png": "…"})) == 1
    assert printed("[1, 2]") == [] == shown(**{"image/png": "…", "text/plain": "VBox(children=(…"})

# Prose and what it speaks of

def test_what_the_front_page_says_of_notebook_10_is_there():
    rises = r"Over three seeds the score rises from (.+?) by DDPO-IS and to (.+?) by RWR"
    said = re.search(rises, prose("index"))
    base, ddpo = said[1].split(" to ")
    table = prose("10_compare")
    assert all(f"| {o} |" in table or f"| {o} ±" in table for o in (base, ddpo, said[2]))

SPEAKS_OF_OUTPUT = re.compile(r"The (last|first|second|printed|upper|lower) (line|numbers?|column|row)\b")

@pytest.mark.parametrize("name", NAMES)
def test_prose_that_begins_with_an_output_follows_it(name):
    "“The last line is why …” is lost on a reader once another cell has come between"
    found = cells(name)
    starts = lambda c: c["cell_type"] == "markdown" and SPEAKS_OF_OUTPUT.match(c["source"])
    places = [i for i, c in enumerate(found) if starts(c)]
    assert [i for i in places if not found[i - 1].get("outputs")] == []

FOREIGN = re.compile(
    r"\bbelongs? into\b|\bare let \w+\b|\bthe own \w+|\bfor ever\b|\bdearer\b|\bis no (?:number|text)\b"
    r"|\b(?:one|numbers?|prompt|line|row) an? (?:sample|picture|prompt|epoch|batch|line|image|update)\b"
    r"|\b(?:plain|bold|which|the|eight|named?) grounds?\b(?! truth)"
)

@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_said_that_only_a_translation_says(name):
    "Prose, comments and messages: what a native editor struck out stays out"
    said = [c["source"] if c["cell_type"] == "markdown" else
            "\n".join(re.findall(r'#[^\n]*|"[^"\n]*"', c["source"])) for c in cells(name)]
    assert [m[0] for text in said for m in FOREIGN.finditer(text)] == []
