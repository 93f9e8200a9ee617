"""benchmarks/gpu.py on a machine without a GPU: the way is walked, what cannot run is said, and nothing that
did not run passes."""
import json, sys, zipfile
from pathlib import Path
from types import SimpleNamespace
import pytest, torch

sys.path.append(str(Path(__file__).resolve().parents[1]/"benchmarks"))
import gpu, gpu_wheels

def arguments(folder, **kw):
    usual = dict(
        tiny=True, device="cpu", wheels=None, env=None, folder=folder, budgets={},
        passed_on=["--device", "cpu", "--tiny"]
    )
    return SimpleNamespace(**usual | kw)

def test_the_whole_unet_part(tmp_path, monkeypatch):
    "In this process: figures are kept after each half, and a missing bitsandbytes is named"
    kept = []
    monkeypatch.setattr(gpu, "estimate", lambda *args, **kw: 1.5)  # test_cuda.py asks for it
    gpu.whole(arguments(tmp_path), lambda found: kept.append(json.loads(json.dumps(found))))
    assert [list(o) for o in kept] == [["8-bit AdamW"], ["8-bit AdamW", "AdamW"]] and kept[-1]["AdamW"][
        "seconds"
    ] > 0
    rows = gpu.rows_of_whole(kept[-1], True)
    assert len(rows) == 2 and ("bitsandbytes" in rows[0][1] or rows[0][2])

def test_a_part_is_cut_off_and_what_it_kept_stays(tmp_path):
    gpu.write(tmp_path/"whole.json", {"AdamW": dict(problem="half of it")})
    out = gpu.run_part("whole", arguments(tmp_path, budgets=dict(whole=0)))
    assert out["how"] == "cut off after 0 s" and out["found"] == {"AdamW": dict(problem="half of it")}

def test_without_a_gpu_nothing_passes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for k in (
        "PYTHONPATH", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "CUBLAS_WORKSPACE_CONFIG", "MPLBACKEND"
    ):
        monkeypatch.setenv(k, "")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path/"gpu.json")])
    assert gpu.main() == 1
    said, kept = capsys.readouterr().out, json.loads((tmp_path/"gpu.json").read_text())
    assert (
        said.count("not run: there is no CUDA GPU") == len(gpu.PARTS) == len(kept["parts"])
        and "passed" not in said
    )

def test_the_table_names_failures_and_what_was_cut():
    tests = dict(passed=3, failed=1, error=0, skipped=2, names_failed=["tests/test_cuda.py::test_x[cuda]"])
    medians = {
        k: dict(seconds=s, sampling=1.0, rest=s - 1, memory=9.0, idle_memory=4.0)
        for k, s in dict(ours=10.0, floor=9.0).items()
    }
    speed = {
        "without_trl": "TRL is not here",
        "TRL's setting": dict(
            settings=dict(sample_batch_size=6, sample_num_batches_per_epoch=4, sample_num_steps=10),
            medians=medians, estimate=8.5, ratios={"ours / floor": dict(seconds=1.11)}
        ),
    }
    parts = dict(
        tests=dict(how="ended with 1", seconds=50, found=tests),
        speed=dict(how="cut off after 210 s", seconds=210, found=speed),
        whole=dict(how="ended with 1", seconds=2, found={})
    )
    about = dict(
        date="2026-11-27", card="NVIDIA H100, 80 GB", driver="580", cuda="13.0", python="3.12", torch="2.11"
    )
    text = gpu.table(dict(machine=about, tiny=False, parts=parts))
    for o in (
        "driver 580, CUDA 13.0",
        "3 passed, 1 failed, 2 skipped; failed: tests/test_cuda.py::test_x[cuda]",
        "TRL is not here", "9.00, 8.50 expected", "**1.11**", "| speed | **cut off after 210 s** | 210",
        "| whole UNet | nothing found", "| whole | **ended with 1**"
    ):
        assert o in text, o

@pytest.mark.parametrize(
    "given,said",
    [
        (["--device", "cpu"], "add --tiny"), (["--parts", "x"], "there is no 'x'"),
        (["--wheels", "nowhere"], "--collect-wheels"), (["--budget", "tests"], "PART=SECONDS")
    ],
)
def test_bad_arguments_are_one_line(given, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *given])
    with pytest.raises(SystemExit) as e: gpu.parse()
    assert e.value.code == 2 and said in capsys.readouterr().err

def test_wheels_are_slimmed_and_laid_out(tmp_path):
    "Of bitsandbytes' libraries the one for this CUDA stays"
    wheel = tmp_path/"bitsandbytes-1-py3-none-any.whl"
    names = [
        "bitsandbytes/__init__.py",
        *(f"bitsandbytes/libbitsandbytes_{o}.so" for o in ("cpu", "cuda118", "cuda130")),
    ]
    with zipfile.ZipFile(wheel, "w") as f:
        for o in names: f.writestr(o, o)
    gpu_wheels.slim(wheel, "130")
    assert gpu_wheels.unpack(tmp_path, tmp_path / "out") and not gpu_wheels.unpack(
        tmp_path / "none", tmp_path / "other"
    )
    assert sorted(o.name for o in (tmp_path / "out/bitsandbytes").iterdir()) == [
        "__init__.py", "libbitsandbytes_cuda130.so"
    ]
    with pytest.raises(SystemExit, match="--cuda 999"): gpu_wheels.slim(wheel, "999")

def test_nothing_that_is_carried_brings_torch():
    assert not [o for o in gpu_wheels.OURS + gpu_wheels.TRL if o.startswith(("torch", "nvidia", "triton"))]
