"""A run may be long: an epoch costs the same after thousands of others, on disk and in memory. Bytes are
counted, not seconds."""
import json
import numpy as np, pytest, torch
from ddpo_nb import policy as P
from ddpo_nb.checkpoints import append_line, checkpoints, read_lines
from ddpo_nb.compare import Comparison
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import PromptSource
from ddpo_nb.rewards import jpeg_compressibility
from ddpo_nb.trainer import make_config, make_trainer

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

@pytest.fixture(scope="module")
def pipe(): return load_pipeline()

def trainer(home, pipe, **kw):
    c = make_config(
        "ddpo-is",
        **dict(
            sample_num_steps=2, sample_batch_size=2, train_batch_size=2, micro_batch_size=8, logdir=str(home),
            num_epochs=30_000
        )
        | kw,
    )
    return make_trainer(c, jpeg_compressibility, PromptSource(["cat"], 0), StableDiffusionPolicy(pipe))

def size(folder): return sum(o.stat().st_size for o in folder.rglob("*") if o.is_file())

def test_an_epoch_writes_as_much_after_thousands(tmp_path, pipe):
    written, names = [], ("short", "long")
    for name in names:
        t = trainer(tmp_path/name, pipe, watch_reward="jpeg_incompressibility", stop_patience=30_000)
        t.train(4, progress=False)
        if name == "long":  # as if there had been so many
            t.rows = [dict(t.rows[0], epoch=i, queries=2 * i) for i in range(1, 4_001)]
            t.epochs_done, t.queries, t.kept = 4_000, 8_000, None
            t._keep_rows()
        file, n = tmp_path/name/"metrics.jsonl", t.epochs_done
        before = file.stat()
        t.train(n + 2, progress=False)
        after = file.stat()
        assert after.st_ino == before.st_ino  # the same file, and not another one of this name
        written.append(
            dict(
                rows=after.st_size - before.st_size,
                checkpoint=size(checkpoints(tmp_path / name / "checkpoints")[0])
            )
        )
    short, long = written
    assert (
        abs(long["rows"] - short["rows"]) < 200 and abs(long["checkpoint"] - short["checkpoint"]) < 1000
    ), written
    again = trainer(
        tmp_path / "long", pipe, watch_reward="jpeg_incompressibility", stop_patience=30_000,
        resume_from=str(tmp_path / "long")
    )
    assert len(again.rows) == 4_002 and again.recent == t.recent and again.best["value"] == t.best["value"]

def test_a_comparison_appends_its_rows(tmp_path):
    c = Comparison(
        dict(algorithms=[], seeds=[]), folder=tmp_path, rows=[dict(epoch=i) for i in range(20_000)]
    )
    c.write_rows()
    before = (tmp_path/"metrics.jsonl").stat()
    c.add_row(dict(epoch=20_000))
    after = (tmp_path/"metrics.jsonl").stat()
    assert after.st_ino == before.st_ino and after.st_size - before.st_size == len('{"epoch": 20000}\n')
    assert read_lines(tmp_path/"metrics.jsonl") == c.rows

def test_half_a_line_is_none_and_a_damaged_one_is_named(tmp_path):
    file = tmp_path/"a"
    assert read_lines(file) == []
    append_line(file, '{"a": 1}')
    with open(file, "a") as f: f.write('{"a": ')
    assert read_lines(file) == [dict(a=1)]
    file.write_text('{"a": 1}\nx\n[]\n{"a": 2}')
    with pytest.warns(UserWarning, match=r"line 2 is damaged, and left out \(2 such lines\)"):
        assert read_lines(file) == [dict(a=1), dict(a=2)]

def test_embeddings_of_prompts_are_kept_as_far_as_there_is_room(pipe, monkeypatch):
    p = StableDiffusionPolicy(pipe)
    one = p.encode(["cat"]).negative[0].nbytes
    monkeypatch.setattr(P, "EMBEDDINGS_KEPT", 4 * one)
    asked, encode = [], p.pipeline.encode_prompt
    monkeypatch.setattr(
        p.pipeline, "encode_prompt", lambda texts, *a: asked.extend(texts) or encode(texts, *a)
    )
    whole = p.encode([f"a {i}" for i in range(9)])
    assert len(p._embeddings) == 4 and len(whole) == 9 and len(asked) == 9
    # and no view of something larger
    assert sum(o.untyped_storage().nbytes() for o in p._embeddings.values()) == 4 * one
    last = next(reversed([k for k in p._embeddings if k]))
    asked.clear()
    assert torch.allclose(p.encode([last]).prompt, whole.prompt[[int(last[2:])]], atol=1e-6) and asked == []
    for i in range(20): p.encode([f"b {i}", last])
    assert last not in asked and len(p._embeddings) == 4  # what is used stays
