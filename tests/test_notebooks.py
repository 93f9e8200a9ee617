"Notebooks are the source: modules and README are what they make, and each runs from top to bottom."
import ast
import filecmp
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree

import pytest

# Nothing of the package up here: a notebook that is run ALONE imports this file first, and huggingface_hub
# reads its environment when it is imported.

root = Path(__file__).resolve().parents[1]
nbs = sorted(
    o
    for o in (root / "nbs").rglob("*.ipynb")
    if not any(p.startswith((".", "_")) for p in o.relative_to(root).parts)
)
names = [o.relative_to(root/"nbs").with_suffix("").as_posix() for o in nbs]

def tool(name, *args, cwd):
    "Run one of nbdev's commands, and show what it wrote if it fails"
    res = subprocess.run(
        [Path(sys.executable).with_name(name), *map(str, args)], cwd=cwd, capture_output=True, text=True
    )
    assert res.returncode == 0, (res.stdout + res.stderr)[-8000:]
    return res.stdout + res.stderr

def copy(tmp, *parts):
    "A copy of the named files and folders of the repository, to run things in"
    for o in ("pyproject.toml", "settings.ini", *parts):
        if (root / o).is_dir():
            copytree(root / o, tmp / o, ignore=ignore_patterns("__pycache__", ".*", "weights", "runs"))
        else:
            (tmp / o).write_bytes((root / o).read_bytes())
    return tmp

@pytest.fixture(scope="module")
def remade(tmp_path_factory):
    """A copy of the repository in which every module has been thrown away and exported again, and every
    notebook cleaned"""
    tmp = copy(tmp_path_factory.mktemp("remade"), "ddpo_nb", "nbs")
    for o in (tmp/"ddpo_nb").glob("*.py"):
        if o.name not in ("__init__.py", "__main__.py"): o.unlink()
    tool("nbdev-export", cwd=tmp)
    tool("nbdev-clean", cwd=tmp)
    return tmp

def differences(a, b):
    "Files that are not the same in folders `a` and `b`"
    def files(d):
        return {
            o.relative_to(d)
            for o in d.rglob("*")
            if o.is_file()
            and o.suffix in (".py", ".ipynb", ".txt", ".yml")
            and not {"__pycache__", ".ipynb_checkpoints", "weights", "runs"} & {*o.parts}
        }
    fa, fb = files(a), files(b)
    return sorted(map(str, fa ^ fb)) + sorted(
        str(o) for o in fa & fb if not filecmp.cmp(a / o, b / o, shallow=False)
    )

def test_modules_are_exported(remade): assert differences(root/"ddpo_nb", remade/"ddpo_nb") == []

def test_notebooks_are_clean(remade): assert differences(root/"nbs", remade/"nbs") == []

@pytest.fixture(scope="module")
def tool_of_the_readme(module_at): return module_at(root/"tools/readme.py")

@pytest.fixture(scope="module")
def readme(): return (root/"README.md").read_text(encoding="utf-8")

def test_readme(tool_of_the_readme, readme):
    assert readme == tool_of_the_readme.readme(), "run `python tools/readme.py`"

def test_readme_counts_what_is_there(tool_of_the_readme, readme):
    """Numbers that change with the project are counted, in the index too; how many tests there are nobody
    counts, because that number would be wrong after each new one"""
    from ddpo_nb.recipes import RECIPES
    counts = tool_of_the_readme.counts()
    assert counts == dict(notebooks=len(names) - 1, recipes=len(RECIPES))
    index = (root/"nbs/index.ipynb").read_text(encoding="utf-8")
    assert index == tool_of_the_readme.with_counts(index, counts), "run `python tools/readme.py`"
    said = re.findall(r"<!-- (\w+) -->(\d+)<!-- /\1 -->", readme)
    assert {(k, int(v)) for k, v in said} == {*counts.items()}
    assert not re.findall(r"\d+ (?:tests|passed|notebooks|recipes)\b", readme)
    with pytest.raises(ValueError, match="'moons' is not one of notebooks, recipes"):
        tool_of_the_readme.with_counts("<!-- moons -->3<!-- /moons -->", counts)

def table_under(text, heading):
    "The first column of the first table under a heading of the README."
    lines = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines()
    return [o.split("|")[1].strip() for o in lines if o.startswith("|")][2:]

def test_readme_lists_every_reward(readme):
    from ddpo_nb.rewards import _built_in as BUILT_IN
    listed = re.findall(r"`([^`]+)`", " ".join(table_under(readme, "What to reward")))
    names_alone = [o for o in listed if re.fullmatch(r"\w+", o)]
    assert sorted(names_alone) == sorted(BUILT_IN) and {*names_alone} < {*listed}

def test_readme_names_every_algorithm(readme):
    "In its first paragraphs, and in the comparison with other projects; and no other"
    from ddpo_nb.objectives import get_objective, objective_modules
    labels = {get_objective(o).label for o in objective_modules()}
    compared = ", ".join(table_under(readme, "What else there is"))
    for text in (readme.partition("\n## ")[0], compared):
        assert [o for o in labels if not re.search(rf"(?<![\w-]){re.escape(o)}(?![\w-])", text)] == []

def command_lines(text):
    "What the README gives `ddpo-nb` to do, in blocks and between lines."
    blocks = re.findall(r"(?ms)^```sh\n(.*?)^```", text)
    lines = [o for b in blocks for line in b.splitlines() for o in line.split("&&")]
    for line in lines + re.findall(r"`(ddpo-nb [^`]+)`", text):
        words = shlex.split(line, comments=True)
        if words[:1] == ["ddpo-nb"]: yield words[1:]
        elif words[:1] == ["accelerate"]: yield words[words.index("ddpo_nb") + 1:]

def test_readme_commands_are_ones_that_there_are(readme):
    from ddpo_nb.cli import make_parser
    from ddpo_nb.recipes import RECIPES
    found = [*command_lines(readme)]
    assert {"compare", "train", "export", "notebooks", "train-aesthetic"} <= {o[0] for o in found}
    for words in found: make_parser().parse_args(words)  # exits for what it does not know
    assert {o[o.index("--recipe") + 1] for o in found if "--recipe" in o} <= {*RECIPES}
    assert {*re.findall(r"recipe `([\w-]+)`", readme)} <= {*RECIPES}

def test_readme_is_complete():
    "Nothing is left to fill in, every file it links to exists, and it lists every notebook with its badge"
    text = (root/"README.md").read_text(encoding="utf-8")
    assert "TODO" not in text
    links = re.findall(r"""(?:\]\(|\b(?:src|href)=")(?![a-z]+:|[#/])([^)"\s#]+)""", text)
    assert [o for o in links if not (root/o).exists()] == []
    badges = re.findall(
        r"\]\(https://colab.research.google.com/github/ddpo-nb/ddpo_nb/blob/main/nbs/(\S+)\.ipynb\)",
        text.partition("\n## The notebooks\n")[2],
    )
    assert sorted(badges) == [o for o in names if o != "index"]

FIRST_CELL = """#| hide
import sys, importlib.util
if "google.colab" in sys.modules and not importlib.util.find_spec("ddpo_nb"):
    print("Installing ddpo_nb: about a minute, once for each runtime.")
    %pip install -q git+https://github.com/ddpo-nb/ddpo_nb
from ddpo_nb.notebooks import ready; ready()"""

def named_font(node):
    "The functions in a tree that draw from the font: they have an argument of that name."
    functions = [o for o in ast.walk(node) if isinstance(o, ast.FunctionDef)]
    return {f.name for f in functions if "font" in {a.arg for a in (*f.args.args, *f.args.kwonlyargs)}}

@cache
def named_font_in(module):
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    # `ready` draws nothing: it installs the font
    return named_font(ast.parse(path.read_text(encoding="utf-8"))) - {"ready"} if path.exists() else set()

def draws_from_the_font(name):
    "Does a notebook call a function that needs the font, of its own module or of another?"
    drawing = named_font_in(f"ddpo_nb.{name.partition('_')[2]}")
    for tree in code_of(name):
        for o in ast.walk(tree):
            if not (isinstance(o, ast.ImportFrom) and (o.module or "").startswith("ddpo_nb.")): continue
            drawing |= {a.asname or a.name for a in o.names if a.name in named_font_in(o.module)}
    calls = [o for t in code_of(name, exported=False) for o in ast.walk(t) if isinstance(o, ast.Call)]
    return bool(drawing & {getattr(o.func, "id", getattr(o.func, "attr", "")) for o in calls})

@pytest.mark.parametrize("name", [o for o in names if o != "index"])
def test_first_cell_installs_what_the_notebook_needs(name):
    """Each notebook opens in Colab, by one and the same cell; the font is for those that draw from it. And
    that cell alone installs anything."""
    cells = json.loads((root/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    font = "font=True" if draws_from_the_font(name) else ""
    assert code[0] == FIRST_CELL.replace("ready()", f"ready({font})")
    assert not [o for o in code[1:] if re.search(r"(?m)^\s*[%!]\s*(pip|apt|apt-get)\b", o)]

def test_no_cell_was_skipped_when_outputs_were_stored():
    "Whoever runs a notebook again to store what it shows does so with DDPO_NB_SLOW=1."
    from ddpo_nb.notebooks import SKIPPED
    found = [name for name in names for text in outputs_of(name) if SKIPPED[:40] in text]
    assert found == []

def outputs_of(name):
    nb = json.loads((root/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))
    printed = [o for c in nb["cells"] for o in c.get("outputs", []) if o["output_type"] == "stream"]
    yield from ("".join(o["text"]) for o in printed)

def text_of(nb):
    "All text in a notebook: sources and textual outputs"
    for cell in nb["cells"]:
        yield "".join(cell["source"])
        for out in cell.get("outputs", []):
            yield "".join(out.get("text", ""))
            yield from ("".join(v) for k, v in out.get("data", {}).items() if k.startswith("text/"))

@pytest.mark.parametrize("name", names)
def test_notebook_is_tidy(name):
    """Opens with a title and a subtitle, holds no author's path and no error, and stays small enough to
    read on the web"""
    file = root/"nbs"/f"{name}.ipynb"
    nb = json.loads(file.read_text(encoding="utf-8"))
    first = "".join(nb["cells"][0]["source"])
    assert re.match(r"(---\n.*?\n---\n+)?# .+\n+> .+", first, re.S), "no title with a `>` subtitle"
    assert not [o for t in text_of(nb) for o in re.findall(r"/(?:home|root|Users|tmp)/\S+", t)]
    assert not [o for c in nb["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert file.stat().st_size < 3e6

def pictures_beside(text):
    "Pictures that Markdown or HTML takes from files near it, which Colab and a copy elsewhere do not have."
    asked = re.findall(r"""!\[[^\]]*\]\(([^)\s]+)|<img[^>]*\bsrc=["']([^"']+)""", text)
    return [o for pair in asked for o in pair if o and not re.match(r"https?:|data:", o)]

@pytest.mark.parametrize("name", [o for o in names if o != "index"])
def test_pictures_travel_with_their_notebook(name):
    "Whoever opens one notebook in Colab has nothing else; the index makes README and landing page"
    nb = json.loads((root/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))
    prose = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown"]
    outs = [o.get("data", {}) for c in nb["cells"] for o in c.get("outputs", [])]
    shown = ["".join(o[k]) for o in outs for k in ("text/markdown", "text/html") if k in o]
    assert [o for text in prose + shown for o in pictures_beside(text)] == []

def test_the_check_of_pictures_finds_what_it_looks_for():
    text = (
        "![a b](images/x.png) ![](https://x.org/y.png) <img alt='' src=\"z.png\">"
        " <img src='data:image/png,'>")
    assert pictures_beside(text) == ["images/x.png", "z.png"] and not pictures_beside("[a](images/x.png)")

def code_of(name, exported=True):
    """A notebook's code, parsed cell by cell, without what is IPython's own, and if so wished without
    what makes the module"""
    for cell in json.loads((root/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and (exported or "#| export" not in "".join(cell["source"])):
            lines = "".join(cell["source"]).splitlines()
            yield ast.parse(
                "\n".join(re.sub(r"\S.*", "pass", o) if re.match(r"\s*[%!]", o) else o for o in lines)
            )

def files_of_the_checkout(tree, place):
    "Strings that name a file or folder of this repository, seen from a notebook's folder `place`"
    texts = [o.value for o in ast.walk(tree) if isinstance(o, ast.Constant) and isinstance(o.value, str)]
    relative = [
        o
        for o in texts
        if "/" in o and len(o) < 200 and "\n" not in o and not o.startswith("/") and re.search(r"\w", o)
    ]
    return [o for o in relative if any((base/o).exists() for base in (place, root, root/"nbs"))]

def pictures_left_on_the_gpu(tree):
    "Calls of `rollout` whose pictures stay where the policy is, by line"
    calls = lambda tree, name: [
        o
        for o in ast.walk(tree)
        if isinstance(o, ast.Call) and getattr(o.func, "id", getattr(o.func, "attr", "")) == name
    ]
    brought = {id(o) for call in calls(tree, "cpu") for o in ast.walk(call)}
    pictures = [
        o.value
        for o in ast.walk(tree)
        if isinstance(o, ast.Attribute) and o.attr == "images" and isinstance(o.value, ast.Call)
    ]
    drawn = [o for o in pictures if getattr(o.func, "id", "") == "rollout" and id(o) not in brought]
    return [o.lineno for o in drawn if "keep_on" not in {k.arg for k in o.keywords}]

@pytest.mark.parametrize("name", names)
def test_notebook_needs_only_the_package(name):
    """Whoever installed it with pip has no checkout; and a policy that was trained may be on a GPU, while
    pictures are looked at on the CPU"""
    assert [o for t in code_of(name) for o in files_of_the_checkout(t, (root/"nbs"/name).parent)] == []
    trees = [*code_of(name, exported=False)]
    trains = any(
        getattr(o, "id", "") in ("make_trainer", "DDPOTrainer", "RWRTrainer")
        for t in trees
        for o in ast.walk(t)
    )
    assert not trains or [o for t in trees for o in pictures_left_on_the_gpu(t)] == []

def shows(source) -> bool:
    "Does a lesson's cell end in something to be looked at, or print, outside of what it only defines?"
    lines = [re.sub(r"\S.*", "pass", o) if re.match(r"\s*[%!]", o) else o for o in source.splitlines()]
    tree = ast.parse("\n".join(lines))
    made = [o for o in ast.walk(tree) if isinstance(o, (ast.FunctionDef, ast.Lambda, ast.ClassDef))]
    defined = {id(o) for f in made for o in ast.walk(f)}
    called = lambda o: getattr(o.func, "id", getattr(o.func, "attr", ""))
    calls = {called(o) for o in ast.walk(tree) if isinstance(o, ast.Call) and id(o) not in defined}
    if {"print"} & calls or "plt.show()" in source and "show" in calls: return True
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr) or source.rstrip().endswith(";"): return False
    nothing = ("chdir", "configure", "expect_fail")  # what these return is None
    name = called(last.value) if isinstance(last.value, ast.Call) else ""
    return not name.startswith("test_") and name not in nothing

# cells whose code is not a lesson's, or does not run
SILENT = re.compile(r"(?m)^#\|\s*(export|hide|default_exp|eval: false)")

@pytest.mark.parametrize("name", names)
def test_what_a_lesson_shows_is_kept(name):
    "Whoever reads a notebook on the web sees what it shows without running it"
    nb = json.loads((root/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))
    silent = [(i, "".join(c["source"])) for i, c in enumerate(nb["cells"]) if c.get("outputs") == []]
    assert [i for i, source in silent if not SILENT.search(source) and shows(source)] == []

@pytest.mark.parametrize("name", names)
def test_no_output_is_the_bare_name_of_an_object(name):
    "As what ax.legend() returns, which a semicolon keeps away; nor a number in numpy's wrapping"
    nb = json.loads((root/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))
    data = [o.get("data", {}) for c in nb["cells"] for o in c.get("outputs", [])]
    alone = ["".join(o["text/plain"]) for o in data if o.keys() == {"text/plain"}]
    assert [t for t in alone if re.match(r"\[?<[\w.]+[ >]|Text\(", t) or "np.float" in t] == []

def test_the_check_of_outputs_finds_what_it_looks_for():
    seen = ["1 + 1", "x = 3\nx", "for x in (1, 2):\n    print(x)", "ax.plot(x)\nplt.show()", "f(2)"]
    unseen = ["x = 3", "test_eq(1, 1)", "def f():\n    print(3)", "os.chdir('x')", "ax.plot(y);", "%pip x"]
    assert [*map(shows, seen)] == [True] * len(seen) and [*map(shows, unseen)] == [False] * len(unseen)

def test_the_check_of_notebooks_finds_what_it_looks_for():
    tree = ast.parse("Path('images/curves.png').read_bytes(); open('runs/x.json'); a = rollout(p, q).images\n"
                     "b = rollout(p, q, keep_on='cpu').images; c = rollout(p).images.float().cpu()")
    assert files_of_the_checkout(tree, root / "nbs") == ["images/curves.png"] and pictures_left_on_the_gpu(
        tree
    ) == [1]

def test_figures_that_notebooks_show_are_the_benchmarks():
    shown = sorted((root/"ddpo_nb/data/benchmarks").iterdir())
    assert (
        shown
        and [o.name for o in shown if o.read_bytes() != (root / "benchmarks/results" / o.name).read_bytes()]
        == []
    )

@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """The notebooks alone, to run them in: what they import is the installed package, and what they read
    is their own"""
    place = copy(tmp_path_factory.mktemp("workshop"), "nbs")
    rmtree(place/"nbs/images")
    return place

# What nearly every notebook imports, and takes longer to import than most of them to run
HEAVY = [
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.models.clip.modeling_clip", "peft", "nbdev.test", "matplotlib.pyplot"
]

ALONE = {"10b_hub"}  # sets what huggingface_hub reads when it is imported

def start(name):
    """How to start a notebook's process: as a fork of one that has only imported `HEAVY`, or as fresh as
    can be"""
    if name in ALONE: return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context

def run_notebook(path, cwd, log):
    "`nbdev-test` on one notebook, in a process of its own: what it writes goes to the file `log`"
    with open(log, "wb") as f:
        for stream in (1, 2): os.dup2(f.fileno(), stream)
    os.chdir(cwd)
    from nbdev.test import nbdev_test
    nbdev_test(path)

@pytest.mark.parametrize("name", names)
def test_notebook_runs(name, workshop, tmp_path):
    p = start(name).Process(target=run_notebook, args=(f"nbs/{name}.ipynb", workshop, tmp_path/"log"))
    p.start()
    p.join()
    said = (tmp_path/"log").read_text(encoding="utf-8")
    assert p.exitcode == 0 and "Success." in said, said[-8000:]
