"One epoch's loss and gradients are TRL's. The first run installs TRL into an environment of its own."
import subprocess
import sys
from pathlib import Path

import pytest

script = Path(__file__).parents[1]/"benchmarks/trl_agreement.py"

@pytest.mark.slow
def test_trl_agrees():
    res = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr
