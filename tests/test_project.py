"""What the files around the code say about the project: they agree, and what they describe can be built and
installed."""
import ast
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib import import_module
from importlib.metadata import metadata, packages_distributions, requires, version
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ddpo_nb
from ddpo_nb.notebooks import course_files

if sys.version_info >= (3, 11): import tomllib
else: import tomli as tomllib

root = Path(__file__).resolve().parents[1]

def read(name): return (root/name).read_text(encoding="utf-8")

def run(*args, **kwargs):
    "Run a Python command line, and show what it wrote if it fails"
    res = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, **kwargs)
    assert res.returncode == 0, res.stdout + res.stderr
    return res.stdout

@pytest.fixture(scope="module")
def ini():
    c = ConfigParser(delimiters=["="], interpolation=None)
    c.read_string(read("settings.ini"))
    return c["DEFAULT"]

@pytest.fixture(scope="module")
def toml(): return tomllib.loads(read("pyproject.toml"))

# One fact, one file

def test_version(ini, toml):
    assert re.fullmatch(r"\d+\.\d+\.\d+", ddpo_nb.__version__)
    assert version("ddpo_nb") == ddpo_nb.__version__
    assert "version" not in ini and "version" not in toml["project"]

def test_facts_agree(ini, toml):
    project = toml["project"]
    assert ini["lib_name"] == project["name"] == ddpo_nb.__name__
    assert project["requires-python"] == f">={ini['min_python']}"
    url = f"https://github.com/{ini['user']}/{ini['repo']}"
    assert project["urls"]["Repository"] == url and f"git clone {url} && cd {ini['repo']}" in read(
        "README.md"
    )
    assert ini["branch"] == toml["tool"]["nbdev"]["branch"]
    assert ini["license"] == "apache2" and "Apache License\n                           Version 2.0" in read(
        "LICENSE"
    )
    assert {"version", "description", "dependencies"} <= {*project["dynamic"]}

def test_metadata_is_that_of_settings(ini):
    """The installed package says what `settings.ini` says. Fails in an old editable install: `pip install
    -e .` again."""
    md = metadata("ddpo_nb")
    assert (md["Name"], md["Summary"], md["Requires-Python"]) == (
        ini["lib_name"], ini["description"], f">={ini['min_python']}"
    )
    assert md["License-Expression"] == "Apache-2.0" and md["Author"] == ini["author"]
    found = [Requirement(o) for o in requires("ddpo_nb")]
    plain = {str(o) for o in found if not o.marker}
    asked = lambda name: [o for o in found if o.marker and o.marker.evaluate(dict(extra=name))]
    extra = lambda name: {f"{o.name}{o.specifier}" for o in asked(name)}
    listed = lambda *keys: {str(Requirement(o)) for k in keys for o in ini[k].split()}
    assert plain == listed("requirements")
    assert extra("dev") == listed("dev_requirements", "docs_requirements")
    assert extra("docs") == listed("docs_requirements")
    assert extra("notebooks") == listed("notebooks_requirements") <= extra("dev")

def test_constraints(ini):
    "Each requirement is pinned within its range; CUDA's packages are torch's affair"
    pins = [Requirement(o) for o in read("constraints.txt").splitlines() if o and not o.startswith("#")]
    assert all(re.fullmatch(r"==[^,*+]+", str(o.specifier)) for o in pins)
    here = {
        canonicalize_name(o.name): str(o.specifier)[2:] for o in pins if not o.marker or o.marker.evaluate()
    }
    assert not [o for o in here if re.match("nvidia|cuda|triton", o)]
    for req in map(Requirement, " ".join(v for k, v in ini.items() if k.endswith("requirements")).split()):
        assert req.specifier.contains(here[canonicalize_name(req.name)]), req

def test_imports_are_declared(ini):
    "Whatever a module imports comes with Python, with the package, or stands in `requirements`"
    names = set()
    for f in (root/"ddpo_nb").glob("*.py"):
        for node in ast.walk(ast.parse(f.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import): names |= {o.name for o in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level: names.add(node.module)
    # asked for by train_use_8bit_adam, by log_with and by dataset: prompts alone
    names = (
        {o.split(".")[0] for o in names}
        - sys.stdlib_module_names
        - {"ddpo_nb", "bitsandbytes", "trackio", "datasets"}
    )
    declared = {canonicalize_name(Requirement(o).name) for o in ini["requirements"].split()}
    dists = packages_distributions()
    assert {o for o in names if not {*map(canonicalize_name, dists.get(o, [o]))} & declared} == set()

def test_syntax_of_the_oldest_python(ini):
    "Nothing in the package is newer than `min_python`'s grammar"
    oldest = tuple(map(int, ini["min_python"].split(".")))
    for f in (root / "ddpo_nb").glob("*.py"):
        ast.parse(f.read_text(encoding="utf-8"), f.name, feature_version=oldest)

# The package

def test_import_is_light():
    code = (
        "import time; t = time.perf_counter(); import ddpo_nb; print(time.perf_counter() - t); import sys;"
        " print(*sys.modules)"
    )
    outs = [run("-c", code).splitlines() for _ in range(3)]
    assert min(float(o[0]) for o in outs) < .3
    assert not {"torch", "diffusers", "transformers", "numpy", "ddpo_nb.trainer"} & {*outs[0][1].split()}

@pytest.mark.parametrize("name", ddpo_nb.__all__)
def test_exports(name):
    assert name in dir(ddpo_nb)
    obj = getattr(ddpo_nb, name)
    assert obj.__name__ == name and obj is getattr(import_module(obj.__module__), name)

def test_modules_are_attributes():
    out = run(
        "-c",
        "import ddpo_nb; print(ddpo_nb.likelihood.gaussian_log_prob.__name__,"
        " ddpo_nb.compare.compare.__name__)",
    )
    assert out.split() == ["gaussian_log_prob", "compare"]
    assert {"likelihood", "compare", "emoji_sd"} <= {*dir(ddpo_nb)}

def test_unknown_name():
    with pytest.raises(AttributeError, match="'ddpo_nb' has no attribute 'nonsense'"): ddpo_nb.nonsense
    with pytest.raises(ImportError): from ddpo_nb import nonsense  # noqa: F401
    assert not hasattr(ddpo_nb, "__wrapped__")

def test_python_m(): assert "compare" in run("-m", "ddpo_nb", "--help")

# The wheel

@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "What there is to build from: a copy of the checkout."
    return copytree(
        root, tmp_path_factory.mktemp("checkout")/"src",
        ignore=ignore_patterns(".*", "*.egg-info", "build", "dist", "runs", "__pycache__", "venv"),
    )

@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", tmp)
    return next(tmp.glob("*.whl"))

def test_wheel_holds(wheel):
    """The modules, data, notebooks, licence and weights, and nothing else; weights in fp16, without pickles,
    20 MB a model at most, and all of it in 50 MB"""
    assert wheel.stat().st_size <= 50e6
    with zipfile.ZipFile(wheel) as z:
        sizes = {o.filename: o.file_size for o in z.infolist()}
        tops = {o.split("/")[0] for o in sizes}
        assert tops == {"ddpo_nb", f"ddpo_nb-{ddpo_nb.__version__}.dist-info"}
        for f in (root/"ddpo_nb").rglob("*"):
            if f.is_file() and "__pycache__" not in f.parts: assert f.relative_to(root).as_posix() in sizes
        assert {"LICENSE", "NOTICE"} <= {Path(o).name for o in sizes}
        assert not [o for o in sizes if Path(o).suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".ttf"}]
        emoji = [o for o in sizes if "/weights/emoji-sd" in o]
        for model, most in (("emoji-sd", 15e6), ("emoji-sd3", 20e6)):
            own = [o for o in emoji if o.startswith(f"ddpo_nb/weights/{model}/")]
            assert f"ddpo_nb/weights/{model}/model_index.json" in own and sum(sizes[o] for o in own) <= most
        assert sum(v for o, v in sizes.items() if o.startswith("ddpo_nb/weights/")) <= 42e6
        for o in emoji:
            if not o.endswith(".safetensors"): continue
            with z.open(o) as f: head = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
            assert {v["dtype"] for k, v in head.items() if k != "__metadata__"} <= {"F16", "I64"}, o

def test_wheel_holds_the_notebooks(wheel):
    "All that the checkout has, as they are, and no other file"
    with zipfile.ZipFile(wheel) as z:
        inside = {o.removeprefix("ddpo_nb/nbs/"): z.read(o) for o in z.namelist() if "/nbs/" in o}
    assert inside == {name: o.read_bytes() for name, o in course_files(root/"nbs").items()}
    assert {"index.ipynb", "tutorials/a100.ipynb", "images/curves.png"} <= {*inside}

def test_sdist_holds_what_a_wheel_is_built_from(source, tmp_path):
    run("-c", f"from setuptools import build_meta as b; b.build_sdist({str(tmp_path)!r})", cwd=source)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as t:
        names = {o.name.partition("/")[2] for o in t.getmembers() if o.isfile()}
    assert {f"nbs/{o}" for o in course_files(root/"nbs")} == {o for o in names if o.startswith("nbs/")}
    assert {"setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE", "NOTICE"} <= names
    package = {o.relative_to(root).as_posix() for o in (root/"ddpo_nb").rglob("*") if o.is_file()}
    assert {o for o in package if "__pycache__" not in o} <= names

def test_no_wheel_without_notebooks(tmp_path):
    "A checkout in part is no source: the command `ddpo-nb notebooks` would have nothing to hand out"
    for o in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        (tmp_path/o).write_bytes((root/o).read_bytes())
    (tmp_path/"ddpo_nb").mkdir()
    (tmp_path/"ddpo_nb/__init__.py").write_bytes((root/"ddpo_nb/__init__.py").read_bytes())
    command = [sys.executable, "setup.py", "-q", "build"]
    res = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert res.returncode and "there are no notebooks in nbs/" in res.stderr

def test_wheel_works_elsewhere(wheel, tmp_path):
    "Installed into an empty folder, it loads the bundled model from there, and hands out its notebooks"
    target = tmp_path/"site"
    run("-m", "pip", "install", wheel, "--no-deps", "--no-index", "-q", "--target", target)
    code = (
        "import ddpo_nb, ddpo_nb.emoji_sd as e; p = e.load(); print(ddpo_nb.__file__);"
        " print(type(p).__name__);print(p('a cat', num_inference_steps=2).images[0].size)"
    )
    env = {**os.environ, "PYTHONPATH": str(target)}
    file, kind, size = run("-c", code, cwd=tmp_path, env=env).splitlines()[-3:]
    run("-m", "ddpo_nb", "notebooks", "mine", "--no-open", cwd=tmp_path, env=env)
    assert {*course_files(tmp_path/"mine")} == {*course_files(root/"nbs")}
    assert Path(file).is_relative_to(target) and kind == "StableDiffusionPipeline" and size == "(64, 64)"

# Readable without scrolling sideways

def _code():
    "(place, line) of every line of code that somebody reads: cells and scripts."
    for path in sorted(root.glob("nbs/**/*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for i, cell in enumerate(cells):
            if cell["cell_type"] != "code": continue
            for line in "".join(cell["source"]).splitlines(): yield f"{path.name}, cell {i}", line
    for folder in ("ddpo_nb", "tests", "benchmarks", "tools", "docs"):
        for path in sorted((root/folder).glob("**/*.py")):
            text = path.read_text(encoding="utf-8")
            if "autogenerated" in text[:400].lower(): continue
            for line in text.splitlines(): yield str(path.relative_to(root)), line

def test_no_line_of_code_is_over_110_characters():
    long = [f"{place}: {line.strip()[:60]}… ({len(line)})" for place, line in _code() if len(line) > 110]
    assert not long, "\n".join(long)
