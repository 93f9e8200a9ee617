import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from ddpo_nb.prompts import InputError, PROMPT_SETS, PromptSource, prompt_source

@pytest.mark.parametrize("name,n,first,last", [
    ("simple_animals", 45, "cat", "kangaroo"), ("imagenet_animals", 398, "tench", "puffer"),
    ("trl_animals", 27, "cat", "kangaroo"), ("counting", 225, "two cats", "six kangaroos"),
    ("animal_activities", 135, "a cat washing dishes", "a kangaroo playing chess"),
    ("unseen_animals", 26, "elephant", "beaver"), ("everyday_objects", 43, "apple", "key")])
def test_sets(name, n, first, last):
    prompts = prompt_source(name).prompts
    assert (len(prompts), prompts[0], prompts[-1]) == (n, first, last)
    assert len(set(prompts)) == n and all(p == p.strip() and "," not in p for p in prompts)
    assert prompt_source(name).prompts == prompts

def test_unseen_sets_are_unseen():
    seen = set(PROMPT_SETS["simple_animals"]())
    assert not seen & {*PROMPT_SETS["unseen_animals"](), *PROMPT_SETS["everyday_objects"]()}

def test_counting_prompts_come_with_their_questions():
    items = dict(prompt_source("counting").items)
    assert items["three wolves"] == dict(
        questions=["How many wolves are there in this image?"], answers=["3"]
    )
    assert {
        "two mice", "six geese", "four butterflies", "five turkeys", "two foxes", "three sheep", "two fish"
    } <= items.keys()

def test_trls_animals_are_in_its_order():
    assert prompt_source("trl_animals").prompts[11:15] == ["goat", "lion", "frog", "chicken"]

@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings")
    rows = [
        dict(text="a cat", count=1, tags=["x"]), dict(text="two dogs", count=2, tags=[]),
        dict(text="", count=0, tags=[])
    ]
    (folder/"train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (folder / "test.jsonl").write_text(
        json.dumps(dict(text="a frog", count=1, tags=["y"])) + "\n", encoding="utf-8"
    )
    return folder

def test_a_column_of_a_dataset(dataset):
    assert prompt_source(f"dataset:{dataset}:text").items == [
        ("a cat", dict(count=1)), ("two dogs", dict(count=2))
    ]
    assert prompt_source(f"dataset:{dataset}:text:test").prompts == ["a frog"]
    assert [prompt_source(f"dataset:{dataset}:text", 3)() for _ in range(2)] == [
        prompt_source(f"dataset:{dataset}:text", 3)() for _ in range(2)
    ]

@pytest.mark.parametrize(
    "rest,says",
    [
        ("", "no column 'prompt' of texts; choose from text"), (":count", "no column 'count' of texts"),
        (":text:nowhere", "cannot load")
    ],
)
def test_bad_columns_are_named(dataset, rest, says):
    with pytest.raises(InputError, match=says) as e: prompt_source(f"dataset:{dataset}{rest}")
    assert e.value.argument == "--prompts" and "\n" not in str(e.value)

@pytest.mark.parametrize("text", ["dataset:", "dataset::text", "dataset:a:b:c:d", "dataset:a:"])
def test_half_a_dataset(text):
    with pytest.raises(InputError, match="names no column"): prompt_source(text)

def test_activities_article():
    prompts = PROMPT_SETS["animal_activities"]()
    assert "an ant playing chess" in prompts and not [
        p for p in prompts if p[:4] in ("a an", "an b") or p.startswith("a a")
    ]

@settings(max_examples=15, deadline=None)
@given(st.lists(st.text("abc ", min_size=1, max_size=3), min_size=1, max_size=6), st.integers(0, 2**32))
def test_one_seed_one_sequence(prompts, seed):
    a, b = PromptSource(prompts, seed), PromptSource(prompts, seed)
    drawn = [a() for _ in range(20)]
    assert drawn == [b() for _ in range(20)] and {p for p, _ in drawn} <= set(prompts)

def test_draws_are_uniform():
    source, n = PromptSource(["a", "b", "c"], 0), 3000
    drawn = [source()[0] for _ in range(n)]
    assert all(abs(drawn.count(o) - n/3) < 5*(n*2/9)**0.5 for o in "abc")

def test_metadata_is_a_copy():
    source = PromptSource([("a", {"n": 1})])
    source()[1]["n"] = 2
    assert source() == ("a", {"n": 1})

def test_seeds_differ():
    a, b = (prompt_source("imagenet_animals", seed) for seed in (0, 1))
    assert [a() for _ in range(5)] != [b() for _ in range(5)]

@pytest.mark.parametrize("suffix", [".txt", ".prompts", ""])
def test_field_trap_12_prompt_file_by_the_users_own_path(tmp_path, monkeypatch, suffix):
    file = tmp_path/f"mine{suffix}"
    file.write_bytes("\ufeffa cat\r\n\r\n  ein Bär \r\n".encode())
    assert prompt_source(str(file)).prompts == prompt_source(file).prompts == ["a cat", "ein Bär"]
    monkeypatch.chdir(tmp_path)
    assert prompt_source(f"mine{suffix}").prompts == ["a cat", "ein Bär"]

def test_jsonl(tmp_path):
    file = tmp_path/"p.jsonl"
    rows = [{"prompt": "two\u2028cats", "count": 2}, {"prompt": "a dog"}]
    file.write_text("\n\n".join(json.dumps(o, ensure_ascii=False) for o in rows), encoding="utf-8")
    assert prompt_source(file).items == [("two\u2028cats", {"count": 2}), ("a dog", {})]

@pytest.mark.parametrize(
    "name,content,says",
    [
        ("empty.txt", b" \n\n", "holds no prompt"), ("empty.jsonl", b"", "holds no prompt"),
        ("latin.txt", b"caf\xe9", "UTF-8"), ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": }', "line 3"),
        ("b.jsonl", b'["a"]', "line 1"), ("c.jsonl", b'{"text": "a"}', "line 1"),
        ("d.jsonl", b'{"prompt": 3}', "line 1")
    ],
)
def test_bad_files(tmp_path, name, content, says):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(InputError) as e: prompt_source(tmp_path/name)
    assert (
        e.value.argument == "--prompts"
        and says in str(e.value)
        and name in str(e.value)
        and "\n" not in str(e.value)
    )

@pytest.mark.parametrize(
    "name,says",
    [("simple_animal", "simple_animals"), ("no/such/file.txt", "no/such/file.txt"), ("a\0b", "cannot read")],
)
def test_no_such_set_or_file(name, says):
    with pytest.raises(InputError, match=says) as e: prompt_source(name)
    assert len(str(e.value).splitlines()) == 1

# What people's files hold

X = "x" * 5_000_000
nested = lambda n: "[" * n + "]" * n

@pytest.mark.parametrize(
    "name,content,says",
    [
        ("a.txt", f"a cat\n{X}\n", "line 2 .*5,000,000 characters"),
        ("a.jsonl", json.dumps(dict(prompt=X)), "line 1 .*characters"),
        ("a.json", json.dumps(["a", X]), "entry 2 .*characters"),
        ("b.jsonl", '{"prompt": "a"}\n{"prompt": "a", "m": %s}' % nested(100_000), "line 2 .*nested"),
        ("c.jsonl", '{"prompt": "a", "m": %s}' % nested(60), "line 1 .*nested more than 50"),
        ("d.json", nested(100_000), "nested"),
        ("e.json", '["a", {"prompt": "b", "m": %s}]' % nested(60), "entry 2 .*nested"),
        ("f.jsonl", '{"prompt": "\\ud800"}', "line 1 .*half a character"),
        ("g.jsonl", '{"prompt": "a", "\\udfff": 1}', "line 1 .*half a character"),
        ("h.json", '["a\\ud83d"]', "entry 1 .*half a character"), ("i.txt", "a\nb\0c\n", "line 2 .*NUL"),
        ("j.jsonl", '{"prompt": "a\\u0000"}', "line 1 .*NUL"),
        ("k.txt", b"ok\nok\ncaf\xe9\n", "line 3 .*not UTF-8"), ("l.txt", "a cat".encode("utf-16"), "UTF-16"),
        ("l.txt", "a\ncat".encode("utf-16-le"), "line 1 .*NUL"),
        ("m.jsonl", '{"prompt": "a", "n": %s}' % ("9" * 5000), "line 1 .*4300 digits"),
        ("n.jsonl", '{"prompt": "a", "n": NaN}', "line 1 .*NaN"),
        ("o.jsonl", '{"prompt": "a", "n": -1e999}', "line 1 .*not finite"),
        ("p.json", '{"prompt": "a"}', "no list"), ("q.json", "[1]", "entry 1 .*text under"),
        ("r.json", '["a",\n]', "line 2 is not JSON"), ("s.json", "[]", "holds no prompt"),
        ("t.ndjson", "a cat", "line 1 .*not JSON"), ("u.jsonl", '{"prompt": null}', "line 1 .*text under"),
        ("v.jsonl", '{"prompt": ["a"]}', "line 1 .*text under"),
        ("w.txt", b"\xef\xbb\xbf\r\n", "holds no prompt"), ("x.txt", b"", "holds no prompt")
    ],
)
def test_what_cannot_be_a_prompt_is_one_short_line(tmp_path, name, content, says):
    (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.perf_counter()
    with pytest.raises(InputError, match=says) as e: prompt_source(tmp_path/name)
    text = str(e.value)
    assert (
        e.value.argument == "--prompts"
        and "\n" not in text
        and len(text) < 400
        and name in text
        and time.perf_counter() - start < 2
    )
    text.encode()

@pytest.mark.parametrize(
    "name,content,prompts",
    [
        ("a.txt", b"a\rb\r\nc\n", ["a", "b", "c"]),
        ("a.json", b'\xef\xbb\xbf["a", {"prompt": "b", "n": 1}]', ["a", "b"]),
        ("a.ndjson", b'{"prompt": "a"}\r\n', ["a"]),
        ("a.txt", "猫 🐈 قطة $x^2$ | `a` <b>".encode(), ["猫 🐈 قطة $x^2$ | `a` <b>"]),
        ("a.jsonl", b'{"prompt": "\\ud83d\\ude00 a\\nb"}', ["😀 a\nb"]),
        ("a.jsonl", b'{"prompt": "a", "n": 123456789012345678901234567890}', ["a"]),
    ],
)
def test_what_can(tmp_path, name, content, prompts):
    (tmp_path/name).write_bytes(content)
    assert prompt_source(tmp_path/name).prompts == prompts

def test_repeated_prompts_are_told_once(tmp_path):
    (tmp_path/"a.txt").write_text("a cat\na dog\na cat\na cat\n")
    with pytest.warns(UserWarning, match="2 of the 4 prompts .*stand there already") as w:
        assert len(prompt_source(tmp_path / "a.txt")) == 4
    assert len(w) == 1
    (tmp_path/"a.jsonl").write_text('{"prompt": "a cat", "n": 1}\n{"prompt": "a cat", "n": 2}\n')
    assert len(prompt_source(tmp_path/"a.jsonl")) == 2   # each with a question of its own

@pytest.mark.parametrize(
    "prompts,says",
    [
        ([3], "number 1 is of type int"), (["a", None], "number 2 is of type NoneType"),
        ([("a", 3)], "no dictionary"), (["a", "b\0"], "number 2 holds a NUL"), (["\ud800"], "surrogate"),
        ([("a", {}, {})], "number 1 is of type tuple"), ("a cat", "single text"), ([b"a"], "type bytes")
    ],
)
def test_prompts_from_python_are_checked_too(prompts, says):
    with pytest.raises(InputError, match=f"^prompts: .*{says}") as e: PromptSource(prompts)
    str(e.value).encode()

def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path/"p.txt")
    with pytest.raises(InputError, match="no plain file"): prompt_source(tmp_path/"p.txt")

def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path/"mine.txt").write_text("a cat")
    assert prompt_source("~/mine.txt").prompts == prompt_source(Path("~/mine.txt")).prompts == ["a cat"]

def test_folder(tmp_path):
    with pytest.raises(InputError, match="it is a folder"): prompt_source(tmp_path)

def test_no_prompts_at_all():
    with pytest.raises(InputError): PromptSource([])

def test_input_error_survives_pickling():
    e = pickle.loads(pickle.dumps(InputError("--x", "is wrong", "be right")))
    assert str(e) == "--x: is wrong; be right" and isinstance(e, ValueError)

def test_import_is_light():
    code = (
        "import sys, ddpo_nb.prompts; sys.exit(any(m in sys.modules for m in ('torch', 'numpy',"
        " 'diffusers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
