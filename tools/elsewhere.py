"""Run the notebooks as somebody does who has only installed the package: each by itself in an empty folder,
from its first cell to its last, in the kernel of another environment; slow cells wait, as they do there.

    python tools/elsewhere.py --python ~/colabvenv/bin/python --colab
    python tools/elsewhere.py --gpu 09_trainer   # on a GPU that is only pretended (tests/pretend.py)
    python tools/elsewhere.py --path             # the learner's path, here, and how long it takes

One line for each notebook: seconds on the clock and of the processor, ok or its first error. The exit
status is 1 if one failed. Needs the extra `dev`; the other environment needs the package and ipykernel."""
import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import nbformat
import psutil
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

root = Path(__file__).resolve().parents[1]

# The shortest way through the course: what issue and README call the learner's path.
PATH = [
    "00_0_whole_game", "00_likelihood", "01_mdp", "03_rollout", "06_advantages", "08_ddpo", "10_compare"
]

# Outside of a checkout nothing may find it, and a plot is drawn by the kernel's own backend.
_OURS = {
    "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "VIRTUAL_ENV", "MPLBACKEND", "IPYTHONDIR", "DDPO_NB_SLOW",
    "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME",
}

# The first cell of each notebook asks for this module, and nothing else of Colab.
COLAB = """import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
sys.modules["google.colab"] = module_from_spec(ModuleSpec("google.colab", None))"""

GPU = """import sys; sys.path.insert(0, {!r})
from pretend import pretend_gpu
pretended = pretend_gpu(); pretended.__enter__()"""

class Ran(NamedTuple):
    "What came of a notebook: its first error, None if there was none, and what it took."
    name: str
    error: str|None
    seconds: float
    cpu: float  # of the kernel and of the processes that it started and waited for

    def __str__(self):
        said = self.error or "ok"
        return f"{self.name:26} {self.seconds:7.1f} s {self.cpu:7.1f} s CPU  {said}"

def names(folder: Path = root/"nbs") -> list:
    "All notebooks, in reading order; the index makes the README and is none of them."
    files = [o.relative_to(folder).with_suffix("") for o in folder.rglob("*.ipynb")]
    found = [o.as_posix() for o in files if not any(p[0] in "._" for p in o.parts)]
    return sorted((o for o in found if o != "index"), key=lambda o: ("/" in o, o))

def environment(
    home: Path,  # of whoever has just come: no caches, no settings
    python: str,  # of the kernel
    colab: bool,  # leave out what is asked of apt
) -> dict:
    "The environment variables of a kernel that knows nothing of this checkout."
    kept = {k: v for k, v in os.environ.items() if k not in _OURS}
    path = [str(Path(python).parent), kept.get("PATH", "")]
    if colab:
        stand_in = home/"bin/apt-get"  # the font is this machine's, and stays as it is
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text("#!/bin/sh\nexit 0\n")
        stand_in.chmod(0o755)
        path.insert(0, str(stand_in.parent))
    return kept | {
        "HOME": str(home), "USERPROFILE": str(home), "PATH": os.pathsep.join(path), "PYTHONNOUSERSITE": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # the kernel's debugger talks about itself otherwise
    }

def kernel_of(python: str) -> type:
    "How to start a kernel of an interpreter that Jupyter here need not know."
    class Elsewhere(AsyncKernelManager):
        kernel_spec = KernelSpec(
            argv=[python, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python"
        )
    return Elsewhere

def cpu_seconds(pid: int) -> float:
    "Processor time of a process and of its children that have ended."
    try: t = psutil.Process(pid).cpu_times()
    except psutil.Error: return float("nan")  # it died
    return t.user + t.system + getattr(t, "children_user", 0.0) + getattr(t, "children_system", 0.0)

def first_line(text: str) -> str:
    "A message's first line that says something, short enough for a table."
    return next((o.strip() for o in str(text).splitlines() if o.strip()), "")[:160]

def execute(
    file: Path,  # a notebook
    python: str = sys.executable,  # whose kernel runs it
    colab: bool = False,  # make the notebook believe that it is in Colab
    gpu: bool = False,  # and that there is a GPU, which finds out what of the CPU's meets what of a GPU's
    slow: bool = False,  # run slow cells too
    keep: Path|None = None,  # the notebook as it was run goes into this folder
    limit: float|None = None,  # seconds for a cell
    name: str|None = None,  # in the table
) -> Ran:
    "Run one notebook by itself in an empty folder, which is thrown away."
    nb = nbformat.read(file, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs, cell.execution_count = [], None
    before = [COLAB] * colab + [GPU.format(str(root/"tests"))] * gpu
    nb.cells[:0] = [nbformat.v4.new_code_cell(o) for o in before]
    with tempfile.TemporaryDirectory(prefix="elsewhere-") as tmp:
        home, place = Path(tmp)/"home", Path(tmp)/"content"
        for o in (home, place): o.mkdir()
        env = environment(home, python, colab) | ({"DDPO_NB_SLOW": "1"} if slow else {})
        where = {"metadata": {"path": str(place)}}
        client = NotebookClient(nb, kernel_manager_class=kernel_of(python), timeout=limit, resources=where)
        error, start, cpu = None, time.perf_counter(), float("nan")

        def measure(**_):
            nonlocal cpu
            cpu = cpu_seconds(client.km.provisioner.pid)

        client.on_cell_executed = measure
        try: client.execute(env=env)
        except CellExecutionError as e: error = f"{e.ename}: {first_line(e.evalue)}"
        except (CellTimeoutError, DeadKernelError, RuntimeError) as e: error = first_line(e)
        if error:
            ran = [i for i, c in enumerate(nb.cells) if c.get("execution_count") or c.get("outputs")]
            error = f"cell {max(ran, default=0) - len(before)}: {error}"
        seconds = time.perf_counter() - start
    if keep:
        target = (keep/(name or file.stem)).with_suffix(".ipynb")
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, target)
    return Ran(name or file.stem, error, seconds, cpu)

def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("names", nargs="*", metavar="NAME", help="notebooks, as 03_rollout; else all of them")
    p.add_argument("--path", action="store_true", help="the learner's path: " + ", ".join(PATH))
    p.add_argument("--python", default=sys.executable, help="the interpreter whose kernel runs them")
    p.add_argument("--nbs", type=Path, default=root/"nbs", metavar="DIR",
                   help="where they are; else in this checkout, which may be newer than that package")
    p.add_argument("--colab", action="store_true", help="let them believe that they are in Colab")
    p.add_argument("--gpu", action="store_true", help="let them believe that there is a GPU")
    p.add_argument("--slow", action="store_true", help="run slow cells too")
    p.add_argument("--keep", type=Path, metavar="DIR", help="keep the notebooks as they were run here")
    p.add_argument("--limit", type=float, metavar="SECONDS", help="the most a single cell may take")
    return p

def main(args: list|None = None) -> int:
    parser = arguments()
    a = parser.parse_args(args)
    if a.path and a.names: parser.error("NAME: --path names the notebooks; give one or the other")
    known = names(a.nbs)
    if not known: parser.error(f"--nbs: there are no notebooks in {str(a.nbs)!r}")
    for o in a.names:
        if o not in known: parser.error(f"NAME: no notebook {o!r} in {str(a.nbs)!r}")
    python = os.path.abspath(os.path.expanduser(a.python))  # a venv's link is not to be followed
    if not os.access(python, os.X_OK): parser.error(f"--python: {a.python!r} is no program")
    done = []
    for name in (PATH if a.path else a.names or known):
        file = a.nbs/f"{name}.ipynb"
        done.append(execute(file, python, a.colab, a.gpu, a.slow, a.keep, a.limit, name))
        print(done[-1], flush=True)
    failed = sum(o.error is not None for o in done)
    seconds, cpu = sum(o.seconds for o in done), sum(o.cpu for o in done)
    print(f"{len(done)} notebooks, {failed} failed, {seconds:.0f} s, {cpu:.0f} s of the processor")
    return int(failed > 0)

if __name__ == "__main__": sys.exit(main())
