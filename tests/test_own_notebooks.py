"How the notebooks reach whoever installed the package: a copy of one's own, the first cell, slow cells."
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

import ddpo_nb.notebooks as N
from ddpo_nb.cli import main
from ddpo_nb.prompts import InputError

@pytest.fixture
def course(tmp_path):
    "A small course to copy: `course(version)` writes it."
    folder = tmp_path/"course"
    for o in ("images", "tutorials"): (folder/o).mkdir(parents=True)
    def write(version):
        for name in ("index.ipynb", "00_a.ipynb", "01_b.ipynb", "images/x.png", "tutorials/t.ipynb"):
            (folder/name).write_text(f"{name} {version}")
        return folder
    return write

@pytest.fixture
def small(course, monkeypatch, tmp_path):
    "The command hands out a small course, in an empty folder."
    monkeypatch.setattr(N, "course_folder", lambda source=course(1): source)
    monkeypatch.chdir(tmp_path)
    return tmp_path

def texts(folder): return {o: (folder/o).read_text() for o in N.course_files(folder)}

# The copy

def test_this_installation_has_its_notebooks():
    files = N.course_files(N.course_folder())
    assert {"index.ipynb", "00_likelihood.ipynb", "images/curves.png", "tutorials/a100.ipynb"} <= {*files}
    assert all(o.is_file() for o in files.values())

def test_a_copy_is_whole_and_a_second_one_changes_nothing(course, tmp_path):
    source, mine = course(1), tmp_path/"a folder"/"of mine"
    first = N.copy_notebooks(mine, source)
    assert texts(mine) == texts(source) and first.written == [*texts(source)]
    assert not first.kept and not first.unchanged
    times = {o: (mine/o).stat().st_mtime_ns for o in texts(mine)}
    second = N.copy_notebooks(mine, source)
    assert second.unchanged == first.written and not second.written and not second.kept
    assert times == {o: (mine/o).stat().st_mtime_ns for o in texts(mine)}

def test_what_the_reader_changed_is_kept_and_the_rest_refreshed(course, tmp_path):
    mine = tmp_path/"mine"
    N.copy_notebooks(mine, course(1))
    (mine/"00_a.ipynb").write_text("my notes")
    (mine/"01_b.ipynb").unlink()
    (mine/"my own.ipynb").write_text("mine alone")
    done = N.copy_notebooks(mine, course(2))
    assert done.kept == ["00_a.ipynb"] and "01_b.ipynb" in done.written and not done.unchanged
    assert texts(mine) == texts(course(2)) | {"00_a.ipynb": "my notes", "my own.ipynb": "mine alone"}
    # whoever puts the old text back gets the new one
    (mine/"00_a.ipynb").write_text("00_a.ipynb 1")
    assert N.copy_notebooks(mine, course(2)).written == ["00_a.ipynb"]

@pytest.mark.parametrize("note", ["", "[]", "{", '{"00_a.ipynb": 3}', None])
def test_without_a_readable_note_nothing_is_overwritten(course, tmp_path, note):
    mine = tmp_path/"mine"
    N.copy_notebooks(mine, course(1))
    if note is None: (mine/N._COPIED).unlink()
    else: (mine/N._COPIED).write_text(note)
    assert N.copy_notebooks(mine, course(2)).kept == [*texts(mine)]
    assert texts(mine)["00_a.ipynb"] == "00_a.ipynb 1"

def test_files_that_are_no_part_of_the_course_are_not_copied(course, tmp_path):
    source = course(1)
    for name in (".hidden.ipynb", "_draft.ipynb", "notes.txt"): (source/name).write_text("private")
    (source/"runs").mkdir()
    (source/"runs/x.ipynb").write_text("private")
    N.copy_notebooks(tmp_path/"mine", source)
    assert "private" not in {o.read_text() for o in (tmp_path/"mine").rglob("*") if o.is_file()}

def in_the_way(mine, what):
    "Put something where the notebooks should go; what the complaint says."
    if what == "file":
        mine.write_text("a file")
        return "'mine' is a file"
    mine.mkdir()
    if what == "file for a folder":
        (mine/"tutorials").write_text("a file")
        return "tutorials' is a file"
    if what == "folder for a file":
        (mine/"00_a.ipynb").mkdir()
        return "00_a.ipynb' is a folder"

@pytest.mark.parametrize("what", ["file", "file for a folder", "folder for a file"])
def test_a_place_that_cannot_be_used_is_refused(course, tmp_path, what, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(N, "course_folder", lambda source=course(1): source)
    says = in_the_way(tmp_path/"mine", what)
    before = sorted(tmp_path.rglob("*"))
    assert main(["notebooks", "mine", "--no-open"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("ddpo-nb notebooks: DIR: ") and says in err and err.count("\n") == 1 and not out
    assert sorted(tmp_path.rglob("*")) == before

@pytest.mark.skipif(not os.path.isdir("/proc"), reason="no folder that even the superuser cannot write to")
def test_a_place_without_permission_is_refused(small, capsys):
    assert main(["notebooks", "/proc/mine", "--no-open"]) == 2
    assert capsys.readouterr().err.startswith("ddpo-nb notebooks: DIR: cannot write to '/proc' (")

def test_the_originals_are_not_copied_onto_themselves(course):
    with pytest.raises(InputError, match="holds the originals"): N.copy_notebooks(course(1), course(1))

def test_an_installation_without_notebooks_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(N.resources, "files", lambda name: tmp_path/"site"/name)
    with pytest.raises(InputError, match="without its notebooks; install it again"): N.course_folder()

# The command

def test_the_command_copies_and_says_how_to_open(small, capsys):
    assert main(["notebooks", "--no-open"]) == 0
    out = capsys.readouterr().out
    assert "4 notebooks in ddpo_nb-notebooks" in out and "jupyter lab ddpo_nb-notebooks" in out
    assert (small/"ddpo_nb-notebooks/tutorials/t.ipynb").is_file()
    (small/"ddpo_nb-notebooks/00_a.ipynb").write_text("my notes")
    assert main(["notebooks", "--no-open"]) == 0
    out = capsys.readouterr().out
    assert "kept as you changed them: 00_a.ipynb" in out and "another folder" in out

def test_a_path_with_spaces_is_quoted_and_the_home_folder_known(small, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(small/"my home"))
    assert main(["notebooks", "~/my notebooks", "--no-open"]) == 0
    assert f"jupyter lab '{small}/my home/my notebooks'" in capsys.readouterr().out
    assert (small/"my home/my notebooks/00_a.ipynb").is_file()

def test_jupyterlab_is_started_where_the_copy_is(small, monkeypatch, capsys):
    calls = []
    class Lab:
        def __init__(self, command, cwd): calls.append((command, str(cwd)))
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def poll(self): return 3
        def wait(self):
            if len(calls) == 1:
                calls.append("Ctrl-C")
                raise KeyboardInterrupt  # JupyterLab asks whether that is meant
            return 3
    monkeypatch.setattr(N.subprocess, "Popen", Lab)
    assert main(["notebooks", "mine"]) == 3
    assert calls == [([sys.executable, "-m", "jupyterlab", "00_a.ipynb"], "mine"), "Ctrl-C"]

def test_jupyterlab_ends_when_the_command_is_told_to(course, monkeypatch):
    told = []
    class Lab:
        def __init__(self, command, cwd): pass
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def poll(self): return None
        def wait(self): raise SystemExit(143)
        def terminate(self): told.append("end")
    monkeypatch.setattr(N.subprocess, "Popen", Lab)
    with pytest.raises(SystemExit): N.open_notebooks(course(1))
    assert told == ["end"]

def test_without_jupyterlab_there_is_one_line_and_no_copy(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jupyterlab", None)
    assert main(["notebooks"]) == 2
    out, err = capsys.readouterr()
    assert "JupyterLab is not installed" in err and "ddpo_nb[notebooks]" in err and "--no-open" in err
    assert err.count("\n") == 1 and not out and not (small/"ddpo_nb-notebooks").exists()
    assert main(["notebooks", "--no-open"]) == 0

# Slow cells

@pytest.mark.parametrize("cell", ["#| slow\nf()", "#|slow\nf()", "# | slow\nf()", "\n#| hide\n#| slow\nf()"])
def test_slow_cells_are_skipped_unless_asked_for(cell, monkeypatch):
    lines = cell.splitlines(keepends=True)
    monkeypatch.delenv("DDPO_NB_SLOW", raising=False)
    made = "".join(N.skip_slow(lines))
    assert "f()" not in made.replace(N.SKIPPED, "") and "Skipped" in made
    compile(made, "cell", "exec")
    monkeypatch.setenv("DDPO_NB_SLOW", "1")
    assert N.skip_slow(lines) == lines

@pytest.mark.parametrize("cell", ["f()", "", "f()\n#| slow", "#| export\nf()", "#| slower\nf()", "#slow"])
def test_other_cells_run(cell):
    lines = cell.splitlines(keepends=True)
    assert N.skip_slow(lines) == lines

def test_a_kernel_skips_slow_cells_and_runs_them_when_asked(tmp_path):
    "As a reader has it: a notebook outside of the repository, run from top to bottom by a kernel."
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook
    cells = ["from ddpo_nb.notebooks import ready; ready(); ready()", "#| slow\nprint('slow ran')",
             "print('quick ran')", "%env DDPO_NB_SLOW=1", "#| slow\nprint('slow ran')"]
    nb = new_notebook(cells=[*map(new_code_cell, cells)])
    NotebookClient(nb, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = ["".join(o.get("text", "") for o in c.outputs) for c in nb.cells]
    assert said[1].startswith("Skipped") and said[2] == "quick ran\n" and said[4] == "slow ran\n"

# The first cell, in Colab

@pytest.fixture
def colab(monkeypatch):
    "What Colab's kernel looks like to the first cell; the commands that it runs."
    ran = []
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    monkeypatch.setattr(N.subprocess, "run", lambda command, **_: ran.append(command))
    return ran

def test_nothing_is_asked_for_where_nothing_old_is_loaded(colab):
    import ipywidgets, numpy, torch, transformers  # noqa: F401
    assert N.stale_packages() == [] and N.ready() is None and colab == []

@pytest.mark.parametrize("name", ["ipywidgets", "pillow", "numpy"])
def test_a_restart_is_asked_for_if_an_old_package_is_in_use(colab, monkeypatch, name):
    module = "PIL" if name == "pillow" else name
    old = ModuleType(module)
    old.__version__ = "0.7.7"
    monkeypatch.setitem(sys.modules, module, old)
    says = rf"{name} \S+ \(in use: 0\.7\.7\).*Restart session"
    with pytest.raises(N.RestartNeeded, match=says) as e: N.ready()
    assert e.value._render_traceback_() == [str(e.value)]

def test_a_local_label_is_no_other_version(colab, monkeypatch):
    import torch
    monkeypatch.setattr(torch, "__version__", torch.__version__.partition("+")[0] + "+cu999")
    assert N.ready() is None

def test_the_font_is_installed_where_it_is_drawn_from(colab, monkeypatch):
    N.ready(font=True)
    assert [o[-1] for o in colab] == ["fonts-noto-color-emoji"]
    monkeypatch.delitem(sys.modules, "google.colab")
    N.ready(font=True)
    assert len(colab) == 1

# The tool that runs them as others have them

@pytest.fixture(scope="module")
def elsewhere(module_at): return module_at(Path(__file__).parents[1]/"tools/elsewhere.py")

def test_the_tool_runs_a_notebook_by_itself_and_says_where_it_failed(elsewhere, tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
    alone = ("import os, sys\nassert os.listdir() == [] and 'PYTHONPATH' not in os.environ\n"
             "assert 'google.colab' in sys.modules\n"
             "open('mine', 'w').write('x')")
    old = [nbformat.v4.new_output("stream", text="of another day")]
    cells = [new_markdown_cell("# t"), new_code_cell(alone), new_code_cell("1 / 0"),
             new_code_cell("print('never')", outputs=old)]
    nbformat.write(new_notebook(cells=cells), tmp_path/"t.ipynb")
    before = dict(os.environ)
    ran = elsewhere.execute(tmp_path/"t.ipynb", colab=True, keep=tmp_path/"kept", limit=300)
    assert ran.error == "cell 2: ZeroDivisionError: division by zero" and ran.error in str(ran)
    assert 0 < ran.cpu and 0 < ran.seconds and os.environ == before
    kept = nbformat.read(tmp_path/"kept/t.ipynb", as_version=4)
    assert not kept.cells[-1].outputs and "ZeroDivisionError" in str(kept.cells[-2].outputs)
    assert sorted(o.name for o in tmp_path.iterdir()) == ["kept", "t.ipynb"]

def test_the_tool_knows_the_course(elsewhere, capsys, tmp_path):
    names = elsewhere.names()
    assert {*elsewhere.PATH} < {*names} and "index" not in names and "tutorials/counting" in names
    for wrong, says in ((["99_none"], "no notebook '99_none'"), (["--path", names[0]], "one or the other"),
                        (["--nbs", str(tmp_path)], "there are no notebooks"),
                        (["--python", "/nowhere/python"], "is no program")):
        with pytest.raises(SystemExit) as e: elsewhere.main(wrong)
        assert e.value.code == 2 and says in capsys.readouterr().err
