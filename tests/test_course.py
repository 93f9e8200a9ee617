"""The course's first pages: lessons and appendix are told apart everywhere as in the index, the map knows
every algorithm, words are used where the glossary says, and the functions that formulas point to exist, in
the notebook that is named beside them."""
import ast
import json
import re
from importlib import import_module
from inspect import unwrap
from pathlib import Path

import pytest

from ddpo_nb.advantages import BASELINES
from ddpo_nb.notebooks import course_files, course_parts
from ddpo_nb.objectives import get_objective, objective_modules

root = Path(__file__).resolve().parents[1]

def cells(name, kind):
    "Sources of a notebook's cells of that kind."
    nb = json.loads((root/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == kind]

def text(name): return "\n\n".join(cells(name, "markdown"))

def source_of(module) -> str:
    "The notebook that a module was exported from."
    code = (root/f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    return re.search(r"File to edit: \.\./nbs/(\S+)\.ipynb", code)[1]

def methods() -> dict:
    "The table that the map is drawn from, without running the page."
    for source in cells("course", "code"):
        for node in ast.parse("" if "%pip" in source else source).body:
            if isinstance(node, ast.Assign) and node.targets[0].id == "METHODS":
                return {key.value: value.elts for key, value in zip(node.value.keys, node.value.values)}

# Lessons and appendix: the index says which is which

PARTS = course_parts(text("index"))
APPENDIX = {name: row[1] for name, row in PARTS["Appendix"].items()}  # -> after which lesson, and when
linked = lambda md: re.findall(r"\]\(([\w/]+)\.ipynb\)", md)

def test_every_notebook_has_one_place():
    assert [*PARTS] == ["Lessons", "Tutorials", "Reference", "Appendix"]
    listed = [o for part in PARTS.values() for o in part]
    there = [o.removesuffix(".ipynb") for o in course_files(root/"nbs") if o.endswith(".ipynb")]
    assert sorted(listed) == [o for o in there if o != "index"]
    # one, then what all share
    assert [o for o in PARTS["Lessons"] if o[:2] == "02"][:2] == ["02a_sd", "02_policy"]
    in_order = lambda part: [o for o in part if o != "02_policy"]
    assert all(in_order(part) == sorted(in_order(part)) for part in PARTS.values())
    assert all(o[0].isdigit() for name in ("Lessons", "Appendix") for o in PARTS[name])

@pytest.mark.parametrize("name", APPENDIX)
def test_a_page_of_the_appendix_says_so_first(name):
    "In the index's words: after which lesson, and when"
    assert re.fullmatch(r"\[[\w ]+\]\(\w+\.ipynb\), when .+[^.]", APPENDIX[name])
    assert linked(APPENDIX[name])[0] in PARTS["Lessons"]
    title, subtitle, first, *_ = cells(name, "markdown")[0].split("\n\n")
    assert first == f"*Appendix: look in here after {APPENDIX[name]}.*"

@pytest.mark.parametrize("name", [o for part in PARTS if part != "Appendix" for o in PARTS[part]])
def test_no_other_page_calls_itself_an_appendix(name):
    assert "ppendix" not in cells(name, "markdown")[0] and "plumbing" not in cells(name, "markdown")[0]

def test_the_course_page_tells_them_apart():
    found = text("course").partition("### All of them, in order")[2].partition("\n## ")[0]
    lessons, appendix = (linked(o) for o in found.partition("The tutorials")[::2])
    assert lessons == [*PARTS["Lessons"]]
    lines = [linked(o) for o in found.splitlines() if o.startswith("- after ")]
    told = {page: lesson for lesson, *pages in lines for page in pages}
    assert told == {name: linked(where)[0] for name, where in APPENDIX.items()}
    assert {*appendix} == {*told, *told.values(), "index"} and len(appendix) == 1 + len(told) + len(lines)

def test_rows_are_read_as_they_stand():
    assert course_parts("## A\n| x | |\n|---|---|\n| [a](t/a.ipynb) | b [c](c.ipynb) | d |\n| [e](e.py) | |"
                        "\n### B ###") == {"A": {"t/a": ["b [c](c.ipynb)", "d"]}}

# The map

def test_the_map_has_every_algorithm(): assert set(methods()) == set(objective_modules())

@pytest.mark.parametrize("name", objective_modules())
def test_an_algorithm_is_told_in_words_and_in_its_own_notebook(name):
    _, parent, *_, notebook = methods()[name]
    assert source_of(objective_modules()[name]) == notebook.value
    assert parent.value is None or parent.value in methods()
    told = [o for o in text("course").splitlines() if o.startswith(f"- **{get_objective(name).label}**")]
    assert len(told) == 1 and f"({notebook.value}.ipynb)" in told[0]

def test_the_map_has_every_baseline():
    assert "BASELINES" in "".join(cells("course", "code")) and set(BASELINES) == {
        "normalize", "group", "leave-one-out"}  # a new one wants a word on the page
    assert "**Leave-one-out**" in text("course")

# The glossary

WORDS = text("course").partition("## Glossary")[2]
GLOSSARY = re.findall(r"- \*\*(.+?)\*\*: (.+) \(\[[^\]]+\]\(([^)]+)\.ipynb\)\)", WORDS)

def test_the_glossary_is_sorted_and_long_enough():
    terms = [term.lower() for term, _, _ in GLOSSARY]
    assert terms == sorted(set(terms)) and len(terms) >= 30
    assert len(GLOSSARY) == WORDS.count("\n- ")

@pytest.mark.parametrize("term,meaning,notebook", GLOSSARY, ids=[o[0] for o in GLOSSARY])
def test_a_word_acts_where_the_glossary_says(term, meaning, notebook):
    used = " ".join([text(notebook), *cells(notebook, "code")]).lower().replace("-", " ").replace("_", " ")
    words = [o for o in term.lower().replace("-", " ").split(" and ")]
    assert all(word in used for word in words), f"{notebook} never says {term!r}"
    assert meaning[-1] in ".!" and 1 <= len(re.findall(r"[.!?](?: |$)", meaning)) <= 3

# Formulas

PLACES = [(place, paragraph) for paragraph in re.split(r"\n\s*\n", text("course"))
          for place in re.findall(r"`(ddpo_nb\.[\w.]+)`", paragraph)]

def test_every_paper_of_the_course_has_formulas():
    assert len(PLACES) >= 25
    for paper in ("2305.13301", "2505.05470", "2509.16117", "2309.17400", "2310.03739"):
        assert f"https://arxiv.org/abs/{paper}" in text("course")

@pytest.mark.parametrize("place,paragraph", PLACES, ids=[o[0] for o in PLACES])
def test_a_formula_names_a_function_that_is_there(place, paragraph):
    "As `ddpo_nb.module.name` or `.Class.name`, exported from one of the notebooks linked beside it"
    _, module, name, *attribute = place.split(".")
    found = getattr(import_module(f"ddpo_nb.{module}"), name)
    for o in attribute: found = getattr(found, o)
    assert callable(found)
    home = source_of(unwrap(found).__module__)
    assert home in re.findall(r"\]\(([^)]+)\.ipynb\)", paragraph), f"{place} is made in {home}"

# Both pages

@pytest.mark.parametrize("name", ["00_0_whole_game", "course"])
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text(name))
    assert links and [o for o in links if not (root/"nbs"/o).exists()] == []

def test_the_first_page_links_to_them():
    first = cells("index", "markdown")[0]
    assert "](00_0_whole_game.ipynb)" in first and "](course.ipynb)" in first

def signs(formula) -> int:
    "About how many signs wide a formula is set: a command is one, a fraction as wide as its longer half."
    silent = r"\\(?:text|mathbf|mathbb|mathcal|tilde|hat|bar|sqrt|lVert|rVert|[bB]ig)\b|\\[,;! ]"
    one = re.sub(silent, "", formula)
    fraction = r"\\[td]?frac\{((?:[^{}]|\{[^{}]*\})*)\}\{((?:[^{}]|\{[^{}]*\})*)\}"
    one = re.sub(fraction, lambda m: max(m[1], m[2], key=len), one)
    return len(re.sub(r"[{}_^\s]", "", re.sub(r"\\[a-zA-Z]+", "x", one)))

@pytest.mark.parametrize("name", ["00_0_whole_game", "course"])
def test_formulas_fit_a_telephone(name):
    wide = {o: signs(o) for o in re.findall(r"\$\$(.+?)\$\$", text(name), re.S)}
    assert {o: n for o, n in wide.items() if n > 40} == {}

def test_the_width_of_a_formula_is_found():
    assert [*map(signs, (r"\frac{a+b}{c}=\sigma_t", r"\text{clip}(x)", "a" * 50))] == [6, 7, 50]
