"What the lessons show and say: saved results, stored outputs, and prose that fits them."
import json
import re
from pathlib import Path

root = Path(__file__).resolve().parents[1]

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
    assert race.names == ["ddpo-is", "ddpo-sf", "rwr", "rwr-sparse"] and race.missing == []
    spent = {(r["algorithm"], r["seed"]): r["queries"] for r in race.rows}  # the last row of each run
    assert len(spent) == 12 and set(spent.values()) == {race.settings["queries"]} == {1024}
    said = prose("10_compare")
    for line in race.table().markdown().splitlines()[2:]: assert line in said, line
    assert race.settings["command"] in said
    assert all(len(e.pictures) == len(e.shown) for e in race.evaluations.values())
