"""The seam of algorithms: one class says all that the trainer, the comparison and the command line ask."""
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import ddpo_nb
from ddpo_nb.objectives import OBJECTIVES, Objective, get_objective, objective, objective_modules, takes
from ddpo_nb.prompts import InputError
from ddpo_nb.trainer import ALGORITHMS, DDPOConfig, make_config, make_objective

def test_names_are_found_by_reading_as_they_are_by_importing():
    assert tuple(objective_modules()) == ALGORITHMS
    for name in ALGORITHMS:
        kind = get_objective(name)
        assert OBJECTIVES[name] is kind and kind.name == name and kind.label
        assert re.fullmatch("#[0-9a-f]{6}", kind.colour)
    assert len({get_objective(o).colour for o in ALGORITHMS}) == len(
        {get_objective(o).label for o in ALGORITHMS}
    )

@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_objective_reads_its_settings_and_no_others(name):
    kind, known = get_objective(name), {f.name for f in fields(DDPOConfig)}
    for setting in kind.config_settings().values(): assert setting in known and takes(name, setting)
    changed = make_config(name, train_cfg=False)
    assert make_objective(changed).guidance is False
    for model in kind.defaults.values(): assert {*model} <= known

def test_reading_the_names_imports_no_torch():
    code = (
        "import sys; from ddpo_nb.objectives import objective_modules; print(len(objective_modules()),"
        " 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(len(ALGORITHMS)), "False"]

def test_a_class_that_is_no_objective_is_refused():
    with pytest.raises(TypeError, match="no Objective"):
        objective("odd", "Odd", "#000000")(type("Odd", (), {}))
    with pytest.raises(InputError, match="there is no 'odd'"): get_objective("odd")
    with pytest.raises(TypeError, match="needs a default"):
        @dataclass
        class Lacking(Objective):
            alpha: float
        Lacking.name = "lacking"
        Lacking.own_fields()

NEW = '''
"An algorithm that somebody adds: one file."
from dataclasses import dataclass
from ddpo_nb.ddpo import DDPO
from ddpo_nb.objectives import objective

@objective("centred", label="Centred", colour="#445566")
@dataclass
class Centred(DDPO):
    "DDPO-IS whose ratio is drawn towards 1."
    pull: float = 0.5  # how much
    defaults = {k: v | dict(train_learning_rate=1e-3) for k, v in DDPO.defaults.items()}

    def objective(self, advantage, ratio, log_prob):
        return super().objective(advantage, 1 + self.pull * (ratio - 1), log_prob)
'''

@pytest.mark.slow
def test_a_new_algorithm_is_one_file(tmp_path):
    "In a copy of the package: trained, compared and listed, with its own setting as a flag."
    copytree(Path(ddpo_nb.__file__).parent, tmp_path/"ddpo_nb", ignore=ignore_patterns("__pycache__"))
    (tmp_path/"ddpo_nb/centred.py").write_text(NEW)
    def run(*args):
        r = subprocess.run(
            [sys.executable, "-m", "ddpo_nb", *args], cwd=tmp_path, capture_output=True, text=True,
            env=dict(PYTHONPATH=str(tmp_path), PATH="/usr/bin:/bin", HF_HUB_OFFLINE="1"),
        )
        assert r.returncode == 0, r.stderr
        return r.stdout
    assert "--centred-pull" in run("train", "--help")
    run(
        "compare", "--algorithms", "centred,rwr", "--queries", "8", "--sample-num-steps", "2",
        "--evaluation-samples", "2", "--sample-batch-size", "4", "--sample-num-batches-per-epoch", "1",
        "--train-batch-size", "4", "--output", "out", "--centred-pull", "0.25", "--no-progress"
    )
    report = (tmp_path/"out/report.html").read_text()
    assert "Centred" in report and "#445566" in report

@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_has_settings_for_every_kind_of_model(algorithm):
    of = get_objective(algorithm)
    for kind in ("emoji-sd", "paper", "flow"): assert of.settings_for(kind) is of.defaults[kind]
    c = make_config(algorithm, "emoji-sd3")
    assert c.mixed_precision == "no" and c.samples_per_epoch <= 512 and c.sample_num_steps == 5
