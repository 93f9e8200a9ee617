"""Uploading: what arrives, what the card says, what is answered when it fails, and that the token stays in
the requests' header."""
import json
import logging
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from hub_server import READ, STRANGER, TOKEN, Server
from huggingface_hub.utils import validate_repo_id
from hypothesis import given, settings, strategies as st
from safetensors.torch import load, load_file, save_file

from ddpo_nb import hub
from ddpo_nb.hub import HubError, check_access, check_repo_id, model_card, public, push, without_secrets
from ddpo_nb.loading import family_of, load_pipeline
from ddpo_nb.prompts import InputError
from ddpo_nb.tiny import tiny_pipeline

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

root = Path(__file__).resolve().parents[1]
SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
WRONG = "hf_" + "wRong" * 6
ROWS = [
    dict(algorithm="ddpo-is", seed=3, epoch=i + 1, queries=64 * (i + 1), reward_mean=-2 + i / 8)
    for i in range(5)
]
CONFIG = dict(seed=3, sample_num_steps=4, sample_guidance_scale=3.0, sample_eta=1.0, lora_rank=4)

@pytest.fixture
def server(monkeypatch, tmp_path):
    "A hub of our own, in place of the real one; no login of whoever runs the tests is seen"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    with Server() as s:
        for name, value in dict(
            ENDPOINT=s.url, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True, HF_HUB_DISABLE_TELEMETRY=True,
            HF_TOKEN_PATH=str(tmp_path / "hf_home" / "token")
        ).items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield s

@pytest.fixture
def weights(tmp_path):
    "A folder of LoRA weights, with something beside them that must stay"
    folder = tmp_path/"run"/"weights"
    folder.mkdir(parents=True)
    save_file(
        {"unet.a.lora_A.weight": torch.randn(4, 8), "unet.a.lora_B.weight": torch.randn(8, 4)},
        folder / "pytorch_lora_weights.safetensors",
    )
    (folder/"optimizer.pt").write_bytes(b"not for others")
    return folder

def card(**kwargs):
    given = (
        dict(
            base_model=SD, algorithm="ddpo-is", reward="jpeg_compressibility", config=CONFIG, rows=ROWS,
            repo_id="ada/tidy"
        )
        | kwargs
    )
    return model_card(**given)

def front(text): return yaml.safe_load(text.split("---\n")[1])

FILES = {
    "curves.png": b"\x89PNG curves", "before_after.png": b"\x89PNG pictures",
    "metrics.jsonl": "".join(json.dumps(r) + "\n" for r in ROWS), "config.json": json.dumps(CONFIG).encode()
}

# What arrives

def test_everything_arrives_in_one_commit(server, weights):
    assert push(weights, "ada/tidy", card(), FILES, TOKEN) == f"{server.url}/ada/tidy"
    there, file = server.files("ada/tidy"), "pytorch_lora_weights.safetensors"
    assert {*there} == {"README.md", file, *FILES}
    assert (
        there["README.md"].decode() == card()
        and there["metrics.jsonl"].decode() == FILES["metrics.jsonl"]
        and there["curves.png"] == FILES["curves.png"]
    )
    assert there[file] == (weights/file).read_bytes()
    ours, theirs = load_file(weights/file), load(there[file])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert len(server.repos["ada/tidy"].commits) == 1 and not server.repos["ada/tidy"].private
    assert server.heard("/storage/") and server.heard("objects/batch"), "nothing went by LFS"

def test_a_whole_unet_keeps_its_folder(server, tmp_path):
    (tmp_path/"w"/"unet").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, tmp_path/"w/unet/diffusion_pytorch_model.safetensors")
    (tmp_path/"w/unet/config.json").write_text("{}")
    push(tmp_path/"w", "ada/whole", card(lora=False), {"config.json": b"{1}"}, TOKEN)
    assert {*server.files("ada/whole")} == {
        "README.md", "config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
    }
    assert (
        server.files("ada/whole")["unet/config.json"] == b"{}"
        and server.files("ada/whole")["config.json"] == b"{1}"
    )

def test_twice_is_fine(server, weights):
    push(weights, "ada/tidy", card(), FILES, TOKEN)
    assert push(weights, "ada/tidy", card(), FILES, TOKEN) == f"{server.url}/ada/tidy"   # nothing new
    assert len(server.repos["ada/tidy"].commits) == 1
    save_file({"unet.b.lora_A.weight": torch.zeros(2, 2)}, weights/"pytorch_lora_weights.safetensors")
    push(weights, "ada/tidy", card(repo_id="ada/tidy", reward="other"), FILES, TOKEN, commit_message="again")
    assert server.repos["ada/tidy"].commits[1] == (
        "main", "again", ["README.md", "pytorch_lora_weights.safetensors"]
    )
    assert load(server.files("ada/tidy")["pytorch_lora_weights.safetensors"]).keys() == {
        "unet.b.lora_A.weight"
    }

def test_private_branch_and_pull_request(server, weights):
    push(weights, "looms/tidy", card(), token=TOKEN, private=True)
    assert server.repos["looms/tidy"].private
    for _ in range(2):
        assert (
            push(weights, "looms/tidy", card(reward="x"), token=TOKEN, revision="trial")
            == f"{server.url}/looms/tidy/tree/trial"
        )
    assert (
        b"`x`" in server.files("looms/tidy", "trial")["README.md"]
        and b"`x`" not in server.files("looms/tidy")["README.md"]
    )
    assert push(weights, "looms/tidy", card(reward="y"), token=STRANGER, create_pr=True).startswith(
        f"{server.url}/looms/tidy/discussions/"
    )
    assert b"`y`" not in server.files("looms/tidy")["README.md"]
    with pytest.raises(InputError, match="create_pr"):
        push(weights, "looms/tidy", card(), token=TOKEN, revision="trial", create_pr=True)

def test_the_address_may_be_an_argument(server, weights, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert (
        check_access("ada/tidy", TOKEN, server.url) == "ada"
        and push(weights, "ada/tidy", card(), token=TOKEN, endpoint=server.url) == f"{server.url}/ada/tidy"
    )

# The card

@pytest.mark.parametrize("base", ["emoji-sd", SD, "someone/painter", "models/mine", "/data/models/mine"])
@pytest.mark.parametrize("lora", [True, False])
def test_card_is_whole(base, lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"models/mine").mkdir(parents=True)
    on_hub, kept = base in (SD, "someone/painter"), CONFIG | dict(model=base)
    text = card(
        base_model=base, lora=lora, config=kept,
        numbers={"before": (-2.0, 0.05), "after": (-1.5, 0.04), "once": (-1.7, float("nan"))},
    )
    data = front(text)
    assert (
        data["library_name"] == "diffusers"
        and data["pipeline_tag"] == "text-to-image"
        and data.get("base_model") == (base if on_hub else None)
    )
    assert {"ddpo", "ddpo-is", "text-to-image", "reinforcement-learning", "lora" if lora else "unet"} <= {
        *data["tags"]
    }
    assert data["license"] == {"emoji-sd": "apache-2.0", SD: "creativeml-openrail-m"}.get(base, "other")
    assert data.get("base_model_relation") == (("adapter" if lora else "finetune") if on_hub else None)
    assert re.findall("^## (.+)", text, re.M) == [
        "How to load", "Training", "Evaluation", "Limits", "Licence", "Citation"
    ]
    assert text.count("](before_after.png)") == text.count("](curves.png)") == 1 and "All settings" in text
    assert (
        "| queries | 320 |" in text
        and "| seed | 3 |" in text
        and "first epoch | -2 |" in text
        and "last epoch | -1.5 |" in text
        and "| after | -1.5 ± 0.04 |" in text
        and "| once | -1.7 |" in text
    )
    assert (
        "2305.13301" in text
        and "@software{ddpo_nb" in text
        and hub.PROJECT in text
        and "/data/models" not in text
    )
    code = re.search("```python\n(.+?)\n```", text, re.S)[1]
    compile(code, "card", "exec")
    assert (
        "load_lora_weights('ada/tidy')"
        if lora
        else "UNet2DConditionModel.from_pretrained('ada/tidy', subfolder='unet')"
    ) in code
    assert ("emoji_sd.load()" in code) == (base == "emoji-sd") and (f"'{base}'" in code) == on_hub
    settings = json.loads(re.search("```json\n(.+?)\n```", text, re.S)[1])
    assert settings == kept | dict(model="mine" if base.endswith("mine") else base)

FAMILIES = {
    "sd": ("StableDiffusionPipeline", "unet", "stable-diffusion"),
    "sdxl": ("StableDiffusionXLPipeline", "unet", "stable-diffusion-xl"),
    "sd3": ("StableDiffusion3Pipeline", "transformer", "stable-diffusion-3"),
    "flux": ("FluxPipeline", "transformer", "flux"),
}

@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_card_of_every_family_draws_by_its_own_lines(kind, lora, tmp_path):
    pipeline, network, tag = FAMILIES[kind]
    torch.manual_seed(0)
    base, trained = tmp_path/"base", tmp_path/"trained"
    tiny_pipeline(kind).save_pretrained(base)
    pipe = load_pipeline(str(base))
    policy = family_of(pipe)(pipe, use_lora=lora)
    for p in policy.trainable_parameters(): p.data += 0.05 * torch.randn_like(p)
    policy.save_pretrained(trained)
    config = dict(sample_num_steps=2, sample_guidance_scale=3.0, sample_eta=1.0, sample_resolution=16)
    about = dict(base_model=str(base), lora=lora, config=config, rows=[])
    text = card(**about)  # the folder says what it is
    assert text == card(**about, family=type(policy)) == card(**about, family=pipeline)
    said = "UNet" if network == "unet" else network
    assert (f"LoRA of the {said}'s attention layers" if lora else f"the whole {said}") in text
    assert {tag, "lora" if lora else network} <= {*front(text)["tags"]} and str(tmp_path) not in text
    assert ("ddpo-nb export" in text) == (lora and network == "unet")
    code = re.search("```python\n(.+?)\n```", text, re.S)[1]
    flows = network == "transformer"
    assert ("DDIMScheduler" in code) != flows and ("eta=" in code) != flows
    assert f"{pipeline}.from_pretrained('path/to/base')" in code and "height=16, width=16" in code
    *lines, last = code.replace("path/to/base", str(base)).replace("ada/tidy", str(trained)).splitlines()
    space = {}
    exec("\n".join(lines), space)
    theirs, own = getattr(space["pipe"], network), policy.trained
    theirs.eval()
    space["pipe"].set_progress_bar_config(disable=True)
    assert eval(last, space).size == (16, 16)
    policy.configure(num_steps=2, resolution=16)
    x, t = policy.initial_latents([torch.Generator().manual_seed(0)]), policy.timesteps[:1]
    given = policy.blank(1)
    with torch.no_grad():
        seen, wanted = (policy.forward(o, x, t, given) for o in (theirs, own))
    assert torch.allclose(seen, wanted, atol=1e-5)

def test_what_a_card_cannot_know_is_stable_diffusion():
    for base, pipeline in (("stabilityai/stable-diffusion-3.5-large", "StableDiffusion3Pipeline"),
                           ("black-forest-labs/FLUX.1-schnell", "FluxPipeline"),
                           ("someone/painter", "StableDiffusionPipeline"),
                           ("emoji-sd", None), ("emoji-sd3", None)):
        text = card(base_model=base, family="StableDiffusion3Pipeline" if base == "emoji-sd3" else None)
        code = re.search("```python\n(.+?)\n```", text, re.S)[1]
        assert f"{pipeline}.from_pretrained({base!r})" in code if pipeline else (
            f"{base.replace('-', '_')}.load()" in code)
    assert "[Emoji SD3](" in text and "transformer's attention" in text
    assert front(card(base_model="black-forest-labs/FLUX.1-schnell"))["license"] == "apache-2.0"
    assert front(card(base_model="black-forest-labs/FLUX.1-dev"))["license"] == "other"
    assert front(card(base_model="stabilityai/stable-diffusion-xl-base-1.0"))["license"] == "openrail++"

def test_card_of_little():
    "No rows, no pictures, no evaluation, RWR, values that JSON lacks, and texts that would break a table"
    text = card(
        rows=[], pictures=(), numbers=None, algorithm="rwr-sparse", reward="a|b\nc",
        config=dict(beta=float("nan"), where=Path("x"), n=torch.tensor(3)), licence="mit"
    )
    assert (
        "](" + "curves" not in text
        and "Evaluation" not in text
        and "| reward | a\\|b c |" in text
        and front(text)["license"] == "mit"
    )
    assert {"rwr", "rwr-sparse"} <= {*front(text)["tags"]} and "ddpo" not in front(text)["tags"]
    assert json.loads(re.search("```json\n(.+?)\n```", text, re.S)[1]) == dict(beta=None, where="x", n=3)
    assert "| a | b |" in card(numbers="| a | b |\n|---|---|")

def test_a_name_that_starts_like_a_known_model_elsewhere_is_not_taken_for_it(tmp_path):
    assert front(card(base_model="stabilityai/stable-diffusion-2-1"))["license"] == "openrail++"
    assert front(card(base_model="stabilityai/stable-diffusion-3-medium"))["license"] == "other"
    assert (
        "license_link" not in front(card(base_model="./my-own-model"))
        and front(card(base_model="someone/painter"))["license_link"]
        == "https://huggingface.co/someone/painter"
    )

def test_the_project_is_named_as_in_its_own_files():
    assert f'Repository = "{hub.PROJECT}"' in (root / "pyproject.toml").read_text()

def test_only_weights_are_uploaded(server, weights):
    for name in (
        "vlm_answers.jsonl", "config.json", "checkpoints/checkpoint_1/trainer.json", "unet/notes.json",
        "checkpoints/checkpoint_1/trainer.safetensors", ".writing-x/pytorch_lora_weights.safetensors",
        ".hidden.safetensors", "results/base-seed0.json", "unet/.secret.json"
    ):
        (weights/name).parent.mkdir(parents=True, exist_ok=True)
        (weights/name).write_text("{}")
    push(weights, "ada/tidy", card(), token=TOKEN)
    assert {*server.files("ada/tidy")} == {"README.md", "pytorch_lora_weights.safetensors"}

# Secrets

secret_names = (
    "token", "hf_user_access_token", "HF_TOKEN", "api_key", "apikey", "wandb-api-key", "password",
    "db_passwd", "client_secret", "credentials", "key", "Authorization", "accessKey"
)

@pytest.mark.parametrize("name", secret_names)
def test_secrets_in_a_config_stay_out(name):
    for config in (
        {name: "swordfish"}, dict(tracker_kwargs={"wandb": {name: "swordfish", "entity": "ada"}}),
        dict(runs=[{name: dict(value="swordfish")}])
    ):
        assert "swordfish" not in card(config=config) and "swordfish" not in json.dumps(public(config))
    assert public({"a": {name: 1, "b": 2}}) == {"a": {"b": 2}}

@pytest.mark.parametrize(
    "value",
    [
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b", "wandb_v1_" + "a1B2" * 19, TOKEN,
        "https://ada:swordfish@example.org"
    ],
)
def test_settings_of_trackers_are_written_down_without_what_looks_like_a_secret(value):
    given = dict(
        wandb=dict(
            entity="ada", anything=value, tags=["small", value], resume=True,
            name="emoji-compressibility-seed0"
        )
    )
    clean = dict(wandb=dict(entity="ada", tags=["small"], resume=True, name="emoji-compressibility-seed0"))
    assert without_secrets(given) == clean and without_secrets(clean) == clean
    assert public(dict(tracker_kwargs=given)) == dict(tracker_kwargs=clean) and value not in card(
        config=dict(tracker_kwargs=given)
    )

def test_secrets_within_texts_are_blacked_out():
    for text in (
        f"ddpo-nb train --hf-user-access-token {TOKEN} --seed 1", "x --wandb-api-key=swordfish --seed 1",
        "x --hub-token swordfish --seed 1",
        """x --tracker-kwargs '{"wandb": {"api_key": "swordfish"}}' --seed 1""",
        f"see {TOKEN}", "http://ada:swordfish@example.org/x"
    ):
        shown = public(dict(command=text, more=[text]))
        assert (
            "swordfish" not in str(shown)
            and TOKEN not in str(shown)
            and ("--seed 1" in shown["command"]) == ("--seed" in text)
        )
    assert TOKEN not in card(reward=f"r.py:{TOKEN}", config={TOKEN: 1})

def test_a_config_of_ours_is_shown_in_full():
    from dataclasses import asdict
    from ddpo_nb.trainer import DDPOConfig
    assert public(asdict(DDPOConfig())) == asdict(DDPOConfig())

def test_the_home_folder_is_not_shown(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada"); monkeypatch.setenv("USERPROFILE", "/home/ada")
    assert public(["/home/ada/runs/x", "/home/adah", "at /home/ada"]) == ["~/runs/x", "/home/adah", "at ~"]

def test_the_token_goes_into_the_header_and_nowhere_else(
    server, weights, monkeypatch, caplog, capfd, tmp_path
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    monkeypatch.chdir(tmp_path)
    check_access("ada/tidy")
    push(weights, "ada/tidy", card(), FILES)
    hub_calls = [h for _, p, h, _ in server.requests if not p.startswith("/storage/")]
    assert len(hub_calls) >= 6 and all(
        {k.lower(): v for k, v in h.items()}["authorization"] == f"Bearer {TOKEN}" for h in hub_calls
    )
    for method, path, headers, body in server.requests:
        assert TOKEN not in path and TOKEN.encode() not in body
        assert not path.startswith("/storage/") or TOKEN not in str(
            headers
        ), "the storage was shown the token"
    assert not [k for k, v in server.files("ada/tidy").items() if TOKEN.encode() in v]
    assert not [o for o in tmp_path.rglob("*") if o.is_file() and TOKEN.encode() in o.read_bytes()]
    assert TOKEN not in caplog.text and TOKEN not in "".join(capfd.readouterr())

def test_the_hubs_own_login_is_used(server, weights):
    home = Path(huggingface_hub.constants.HF_TOKEN_PATH)
    home.parent.mkdir()
    home.write_text(TOKEN + "\n")
    assert check_access("ada/tidy") == "ada"
    assert check_access("bob/tidy", STRANGER) == "bob", "an argument comes first"

@pytest.mark.parametrize("place", ["config.json", "README.md", "message"])
def test_a_token_in_what_would_be_uploaded_stops_it(server, weights, place):
    text = json.dumps(dict(hub=TOKEN))
    with pytest.raises(InputError, match="holds the token") as e:
        push(
            weights, "ada/tidy", card() + text * (place == "README.md"),
            {place: text} if place == "config.json" else {}, TOKEN,
            commit_message=text if place == "message" else "x"
        )
    assert TOKEN not in str(e.value) and server.requests == []

# Bad input, before anything is contacted

names = st.one_of(
    st.text(max_size=30), st.text("ab-._/ ", max_size=12),
    st.from_regex(r"[\w.-]{0,5}/[\w.-]{0,5}", fullmatch=True), st.none(), st.integers()
)

@settings(max_examples=300, deadline=None)
@given(names)
def test_a_repo_id_is_refused_in_one_line_or_good_for_the_hub(name):
    try:
        assert check_repo_id(name) == name
    except InputError as e:
        assert e.argument == "--push-to-hub" and "USER/NAME" in str(e) and len(str(e).splitlines()) == 1
    else:
        validate_repo_id(name)
        assert re.fullmatch(r"[^/]+/[^/]+", name)

@pytest.mark.parametrize(
    "name",
    [
        "", "tidy", "a/b/c", "ada/", "/tidy", "ada/ti dy", "ada/-x", "ada/x.", "a--b/x", "ada/x..y",
        "ada/x.git", "https://huggingface.co/ada/tidy", "ada/" + "x" * 97, "ada/tidy\n", TOKEN, f"{TOKEN}/x",
        None, 7
    ],
)
def test_bad_repo_ids_contact_nobody(name, server, weights):
    for call in (lambda: push(weights, name, card(), token=TOKEN), lambda: check_access(name, TOKEN)):
        with pytest.raises(InputError, match="--push-to-hub") as e: call()
        assert "\n" not in str(e.value) and TOKEN not in str(e.value)
    assert server.requests == []

def test_good_repo_ids(): assert [check_repo_id(o) for o in ("ada/tidy", "Ada_1/x.y-z", "a/" + "x" * 96)]

@pytest.mark.parametrize("token", [None, "", "  "])
def test_no_token(server, weights, token):
    for call in (
        lambda: push(weights, "ada/tidy", card(), token=token), lambda: check_access("ada/tidy", token)
    ):
        with pytest.raises(InputError, match="hf auth login.*HF_TOKEN.*--hf-user-access-token"): call()
    assert server.requests == []

@pytest.mark.parametrize("token", ["hf_two words", "hf_café", "hf_x\ny", "hf_\x00"])
def test_a_token_that_no_header_can_hold(server, weights, token):
    with pytest.raises(InputError, match="characters") as e: check_access("ada/tidy", token)
    assert "hf_" not in str(e.value) and server.requests == []

def test_a_folder_without_weights(server, tmp_path):
    for folder in (tmp_path/"none", tmp_path):
        with pytest.raises(InputError, match="safetensors"): push(folder, "ada/tidy", card(), token=TOKEN)
    assert server.requests == []

# What the hub may answer

def one_line(e, *words):
    text = str(e.value)
    assert "\n" not in text and [w for w in words if w not in text] == [], text
    shown = "".join(traceback.format_exception(e.value))
    assert not [t for t in (TOKEN, READ, STRANGER, WRONG) if t in shown]

def test_wrong_tokens(server, weights):
    for token, status in ((WRONG, "401"), (READ, "403"), (STRANGER, "403")):
        with pytest.raises(HubError) as e: push(weights, "ada/tidy", card(), token=token)
        one_line(
            e, status, "settings/tokens", f"the weights are safe in {weights}",
            f"hf upload ada/tidy {weights} ."
        )
    for token, word in ((WRONG, "401"), (READ, "only read"), (STRANGER, "bob")):
        with pytest.raises(HubError) as e: check_access("ada/tidy", token)
        one_line(e, word)
    assert (
        check_access("looms/tidy", TOKEN) == check_access("ADA/tidy", TOKEN) == "ada" and server.repos == {}
    )

def test_the_command_to_upload_again_is_the_callers(server, weights):
    with pytest.raises(HubError) as e:
        push(
            weights, "ada/tidy", card(), token=WRONG, again="ddpo-nb train --output x --push-to-hub ada/tidy"
        )
    one_line(e, "ddpo-nb train --output x --push-to-hub ada/tidy")

@pytest.mark.parametrize(
    "place,status",
    [
        ("create", 500), ("validate-yaml", 400), ("preupload", 404), ("objects/batch", 403),
        ("/commit/", 409), ("whoami", 418)
    ],
)
def test_whatever_fails_is_one_line_without_the_token(server, weights, place, status):
    server.fail = {place: (status, f"no, {TOKEN}\nis not welcome")}   # a server that repeats what it was sent
    with pytest.raises(HubError) as e:
        (
            check_access("ada/tidy", TOKEN)
            if place == "whoami"
            else push(weights, "ada/tidy", card(), FILES, TOKEN)
        )
    one_line(e, "--push-to-hub", str(status), *([] if status == 403 else ["no, *** is not welcome"]))
    assert not server.repos.get("ada/tidy") or server.files("ada/tidy") == {}

def test_no_hub_is_told_at_once(server, weights, monkeypatch):
    server.shutdown(); server.server_close()
    start = time.perf_counter()
    for call in (
        lambda: push(weights, "ada/tidy", card(), token=TOKEN), lambda: check_access("ada/tidy", TOKEN)
    ):
        with pytest.raises(HubError) as e: call()
        one_line(e, server.url, "does not answer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as e: push(weights, "ada/tidy", card(), token=TOKEN)
    one_line(e, "HF_HUB_OFFLINE")
    assert time.perf_counter() - start < 15   # the client's own retries would take 23 s

# As a user has it: a process of its own that knows the hub by HF_ENDPOINT and the token by HF_TOKEN, and
# the lines of the card

SCRIPT = """
import sys
from pathlib import Path
import torch
from ddpo_nb import hub
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
config = dict(sample_num_steps=2, sample_guidance_scale=3.0, sample_eta=1.0)
for lora in (True, False):
    policy, name = StableDiffusionPolicy(load_pipeline(), use_lora=lora), f"ada/emoji-{lora}"
    # otherwise a LoRA's B is 0 and changes nothing
    for p in policy.trainable_parameters(): p.data += .05 * torch.randn_like(p)
    policy.save_pretrained(f"w-{lora}")
    card = hub.model_card("emoji-sd", "ddpo-is", "jpeg_compressibility", config, [], name, lora=lora)
    hub.check_access(name)
    print(hub.push(f"w-{lora}", name, card))
    *first, last = card.split("```python\\n")[1].split("\\n```")[0].splitlines()
    space = {}
    exec("\\n".join(first), space)
    own = load_pipeline(**{"lora" if lora else "network": f"w-{lora}"})
    size = own.unet.config.sample_size
    x = torch.randn(1, own.unet.config.in_channels, size, size)
    text = torch.randn(1, 4, own.unet.config.cross_attention_dim)
    with torch.no_grad():
        theirs, ours, base = (p.unet(x, 10, text).sample for p in (space["pipe"], own, load_pipeline()))
        assert torch.allclose(theirs, ours, atol=1e-5) and not torch.allclose(base, ours, atol=1e-3)
        print(eval(last, space).size)
"""

def test_a_stranger_loads_it_by_the_cards_own_lines(tmp_path):
    home, work = tmp_path/"home", tmp_path/"work"
    for o in (home, work, tmp_path/"tmp"): o.mkdir()
    with Server() as s:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS"))}
        env |= dict(
            HF_ENDPOINT=s.url, HF_HOME=str(home), HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1", HF_DEBUG="1", TMPDIR=str(tmp_path / "tmp")
        )
        res = subprocess.run(
            [sys.executable, "-c", SCRIPT], cwd=work, env=env, capture_output=True, text=True, timeout=500
        )
        assert res.returncode == 0, res.stderr[-4000:]
        assert res.stdout.split("\n")[:4] == [
            f"{s.url}/ada/emoji-True", "(64, 64)", f"{s.url}/ada/emoji-False", "(64, 64)"
        ]
        assert (work / "w-True/pytorch_lora_weights.safetensors").read_bytes() == s.files("ada/emoji-True")[
            "pytorch_lora_weights.safetensors"
        ]
        assert "unet/diffusion_pytorch_model.safetensors" in s.files("ada/emoji-False")
        assert s.heard("/resolve/") and all(
            f"Bearer {TOKEN}" in str(h) for _, p, h, _ in s.requests if p.startswith("/api/")
        )
    assert TOKEN not in res.stdout + res.stderr
    assert len([o for o in home.rglob("*") if o.is_file()]) > 1 and not [
        o for o in tmp_path.rglob("*") if o.is_file() and TOKEN.encode() in o.read_bytes()
    ]
