"""The course's first pages: the map knows every algorithm, words are used where the glossary says, and the
functions that formulas point to exist, in the notebook that is named beside them."""
import ast
import json
import re
from importlib import import_module
from inspect import unwrap
from pathlib import Path

import pytest

from ddpo_nb.advantages import BASELINES
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
