"What a user tells a run in confidence is not written, shown, logged or uploaded."
import io, json, logging, os, re, shlex, sys
from pathlib import Path
import huggingface_hub
import pytest
from hub_server import TOKEN, Server as Hub
from hypothesis import given, settings, strategies as st
from vlm_server import MODEL, Server as VLM
from ddpo_nb import cli, redact as R
from ddpo_nb.cli import main
from ddpo_nb.redact import address_secrets, hide, hide_address, named_secrets, redact, without_secrets

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

TINY = ("--queries 4 --evaluation-samples 2 --sample-num-steps 2 --train-batch-size 2 --sample-batch-size 2 "
        "--sample-num-batches-per-epoch 1 --train-num-inner-epochs 1 --no-progress")
SECRETS = dict(
    query="squid-query-1", env="squid-env-2", kwarg="squid-kwarg-3",
    nested="https://ada:squid-user-4@runs.example.org", key="sk-squid" + "5aB" * 8,
    opaque="squid6" + "a1B2" * 8, setting="squid-set-7"
)

@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(R, "_known", set())
    for name in (
        "OPENAI_API_KEY", "DDPO_VLM_URL", "DDPO_VLM_MODEL", "DDPO_VLM_SIMILARITY", "DDPO_VLM_ANSWERS",
        "HF_TOKEN"
    ):
        monkeypatch.setenv(name, "")  # and put back afterwards

def found_in(*places):
    """Where the secrets are to be seen, in texts, bytes and folders: pairs of a secret's name and the
    text around it"""
    texts = []
    for o in places:
        if isinstance(o, Path):
            texts += [p.name.encode() + b": " + p.read_bytes() for p in o.rglob("*") if p.is_file()]
        else:
            texts.append(o if isinstance(o, bytes) else str(o).encode())
    hidden = dict(SECRETS, token=TOKEN, word="squid")
    return {
        (name, t[max(0, t.index(v) - 90) :][:200])
        for name, value in hidden.items()
        for t in texts
        if (v := value.encode()) in t
    }

# A run with secrets everywhere

def test_a_run_keeps_every_secret(tmp_path, monkeypatch, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", SECRETS["key"])
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["env"])
    usual = os.umask(0o027)
    with VLM() as vlm, Hub() as hub:
        vlm.see = lambda picture, question: f"a bear that says {SECRETS['key']} and {SECRETS['query']}"
        vlm.says, vlm.plan = f"busy, {SECRETS['query']}", ["429"]
        for name, value in dict(
            ENDPOINT=hub.url, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True,
            HF_TOKEN_PATH=str(tmp_path.parent / "no")
        ).items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        kwargs = dict(
            wandb=dict(
                api_key=SECRETS["kwarg"],
                settings=dict(base_url=SECRETS["nested"], x=SECRETS["opaque"], entity="ada"),
            ),
            tensorboard=dict(comment="plain"),
        )
        words = [
            *shlex.split(
                f"train {TINY} --reward vlm_alignment --vlm-model {MODEL} --vlm-similarity words --output out"
                " --log_with tensorboard"
            ),
            "--vlm-url", f"{vlm.url}?api_key={SECRETS['query']}", "--tracker_kwargs", json.dumps(kwargs),
            "--push-to-hub", "ada/tidy", "--hf_user_access_token", TOKEN
        ]
        monkeypatch.setattr(sys, "argv", ["ddpo-nb", *words])
        try: status = main()
        finally: os.umask(usual)
        out, err = capfd.readouterr()
        assert status == 0, err
        assert (
            f"api_key={SECRETS['query']}" in vlm.requests[0][1]
            and vlm.requests[0][2]["Authorization"] == f"Bearer {SECRETS['key']}"
        )
        uploaded = [path.encode() + body for _, path, _, body in hub.requests] + [
            *hub.files("ada/tidy").values()
        ]
        there = {*hub.files("ada/tidy")}
    assert found_in(tmp_path, out, err, caplog.text, sys.argv, *uploaded) == set()
    written = json.loads((tmp_path/"out/config.json").read_text())
    assert (
        f"--vlm-url '{vlm.url}?api_key=***'" in written["command"] and '"entity": "ada"' in written["command"]
    )
    assert there == {
        "README.md", "pytorch_lora_weights.safetensors", "before_after.png", "curves.png", "metrics.jsonl",
        "config.json"
    }
    assert (tmp_path/"out/vlm_answers.jsonl").read_text().count("a bear that says *** and ***") > 2
    modes = {oct(o.stat().st_mode & 0o777): o for o in (tmp_path/"out").rglob("*")}
    assert {*modes} == {"0o640", "0o750"}, modes

@pytest.mark.parametrize(
    "line",
    [
        "train --tracker-kwargs '{{\"wandb\": {{\"api_key\": \"{kwarg}\"'",
        "compare --set x.tracker_kwargs={{\"a\":\"{setting}\"}}",
        "compare --set rwr.tracker_kwargs={setting}", "train --wandb-api-key {kwarg}",
        "train --api-key={kwarg}", "train --model {nested}/m", "train --prompts {nested}",
        "train --reward vlm_alignment --vlm-model m --vlm-url https://ada:{query}@example.org/v1",
        "train --vlm-url https://ada:{query}@example.org/v1",
        "train --reward vlm_alignment --vlm-model m --vlm-url 'https://example.org/v1?key=***'",
        "train --reward {key}", "train --model {key}"
    ],
)
def test_complaints_do_not_repeat_a_secret(tmp_path, monkeypatch, capfd, line):
    monkeypatch.chdir(tmp_path)
    status = main(shlex.split(line.format(**SECRETS)))
    out, err = capfd.readouterr()
    assert status == 2 and err.count("\n") == 1 and found_in(tmp_path, out, err) == set(), err

def test_the_traceback_of_a_reward_holds_no_key(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_API_KEY", SECRETS["env"])
    (tmp_path / "r.py").write_text(
        "import os\ndef f(images, prompts, metadata):\n    raise OSError(f\"no answer from"
        " {os.environ['MY_ADDRESS']}, key {os.environ['MY_API_KEY']}\")\n"
    )
    monkeypatch.setenv("MY_ADDRESS", f"https://example.org/x?key={SECRETS['query']}")
    status = main(shlex.split("evaluate --samples 2 --steps 1 --reward r.py:f"))
    out, err = capfd.readouterr()
    assert (
        status == 1
        and "no answer from https://example.org/x?key=***, key ***" in err
        and found_in(out, err) == set()
    )

# Commands

@pytest.mark.parametrize(
    "line,clean",
    [
        (
            "compare --set 'rwr.tracker_kwargs={\"wandb\": {\"api_key\": \"squid\", \"entity\": \"ada\"}}'",
            "compare --set 'rwr.tracker_kwargs={\"wandb\": {\"entity\": \"ada\"}}'",
        ),
        (
            "train --vlm-url http://localhost:8000/v1 --seed 1",
            "train --vlm-url http://localhost:8000/v1 --seed 1"
        ),
        ("train --vlm-url=https://u:squid@h/v1?key=squid", "train --vlm-url 'https://***@h/v1?key=***'"),
        ("train --vlm-url https://h/squid/v1", "train --vlm-url 'https://h/***/v1'"),
        ("train --prompts https://u:squid@h/x.txt", "train --prompts 'https://***@h/x.txt'"),
    ],
)
def test_a_command_is_shown_without_secrets(line, clean):
    assert shlex.join(cli._open_words(shlex.split(line))) == clean

def test_settings_for_one_algorithm_may_be_objects():
    assert cli._overrides(['rwr.tracker_kwargs={"wandb": {"entity": "ada"}}']) == dict(
        rwr=dict(tracker_kwargs=dict(wandb=dict(entity="ada")))
    )

# Texts and addresses

@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "a1B2" * 8, "sk-" + "a1B2" * 6, "ghp_" + "a1B2" * 9, "AKIA" + "A1B2" * 4,
        "xoxb-1234567890-abc", "Authorization: Bearer squid-squid", "https://u:squid@h/x",
        "https://u:sq@uid@h/x", "https://squid@h/x", "postgresql://u:squid@h/db",
        "see http://h/x?token=squid&n=1.",
        "http://h/x#access_token=squid",
        "--my-api-key squid", "--my-token=squid", "{'api_key': 'squid'}", '{"wandb_key": "squid"}',
        "https://hooks.example.org/T0/B0/a1b2c3d4e5f6a1b2c3d4e5f6"
    ],
)
def test_what_looks_like_a_secret_is_hidden(text):
    shown = hide(f"before {text} after")
    assert (
        shown.startswith("before ")
        and "***" in shown
        and "squid" not in shown
        and "a1" not in shown.lower()
        and "after" in shown
    )

@pytest.mark.parametrize(
    "text",
    [
        "a monkey with a key and a secret garden", "http://localhost:8000/v1",
        "https://huggingface.co/ada/tidy", "--seed 1 --sample-num-steps 50", "a token of love",
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "--monkey business", "tokenizer/vocab.json",
        "skip-this-one-please-it-is-long", "C:\\models\\x", '{"monkey": "no"}'
    ],
)
def test_what_is_none_stays(text):
    assert hide(text) == text

@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_can_be_hidden(text):
    hide(text), hide_address(text), hide_address(text, strict=True), address_secrets(text)

word = st.from_regex(r"[a-z0-9]{6,12}", fullmatch=True)
@given(word, word, word, word)
@settings(max_examples=60, deadline=None)
def test_the_strict_form_of_an_address_shows_no_secret_part(user, password, part, value):
    shown = hide_address(f"https://{user}:{password}@h.example/zz{part}/v1?a={value}#{value}", strict=True)
    assert shown == "https://***@h.example/***/v1?a=***#***"

def test_values_that_are_known_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "squid squid")
    monkeypatch.setenv("DDPO_VLM_URL", "https://h/v1?x=squid77")
    assert hide("no squid squid, no squid77, but squid") == "no ***, no ***, but squid"
    R.keep_secret("calamari", "cod", None, "")
    assert hide("calamari and cod") == "*** and cod"

def test_names_in_nested_settings():
    value = dict(a=[dict(api_key="one", b=dict(password="two"))], token=3, tokenizer="t")
    assert named_secrets(value) == ["one", "two"] and redact(value) == dict(
        a=[dict(b={})], tokenizer="t"
    ) == without_secrets(value)
    assert redact(
        dict(tracker_kwargs=dict(x="a1B2" * 8, y="z"), n=1, f=0.5, none=None, t=(1, "hf_" + "x1" * 12))
    ) == dict(tracker_kwargs=dict(y="z"), n=1, f=0.5, none=None, t=[1, "***"])
