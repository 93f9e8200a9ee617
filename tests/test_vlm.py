"A server that misbehaves in every way we could think of changes no reward and loses no answer."
import ast, base64, copy, io, json, multiprocessing, os, pickle, random, socket, threading, time, traceback
import types
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
import httpx2, numpy as np, pytest, torch
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from vlm_server import MODEL, Server, background
from ddpo_nb import chat as C, vlm as V
from ddpo_nb.checkpoints import check_whole, newest_whole
from ddpo_nb.cli import _vlm
from ddpo_nb.emoji_sd import COLOURS
from ddpo_nb.plan import _identity, join_plans
from ddpo_nb.policy import ModelError, StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import InputError, PromptSource
from ddpo_nb.reward_files import Guarded
from ddpo_nb.rewards import WeightedSum
from ddpo_nb.resume import _called, _other
from ddpo_nb.trainer import make_config, make_trainer
from ddpo_nb.chat import (QUESTION, ServerGone, VLMClient, append_alone, chat_request, pause, png_url,
                          read_answer, retry_after)
from ddpo_nb.vlm import (BERTScoreRecall, EmbeddingSimilarity, VLMAlignment, VLMQuestions, WordRecall,
                         answer_matches, bertscore_recall, make_similarity, vlm_alignment, vlm_client,
                         vlm_questions)

ENVIRONMENT = (
    "OPENAI_API_KEY",
    *(f"DDPO_VLM_{o}" for o in "URL MODEL SIMILARITY ANSWERS MAX_TOKENS TIMEOUT SET".split()),
)
KEY = "sk-" + "Qm7dR2xT" * 3
colours = list(COLOURS)

@pytest.fixture
def server():
    with Server() as s: yield s

@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for k in ENVIRONMENT: monkeypatch.delenv(k, raising=False)

def pictures(n=8):
    "Each of one colour, and no two the same"
    x = torch.tensor([COLOURS[colours[i % 8]] for i in range(n)], dtype=torch.float32)[
        :, :, None, None
    ].repeat(1, 1, 16, 16)
    x[torch.arange(n), 0, 8, 8] = torch.arange(n, dtype=torch.float32)
    return x / 255

def client(server, **kw):
    return VLMClient(
        server.url if isinstance(server, Server) else server, MODEL,
        **(dict(backoff=0.001, timeout=5, retries=4) | kw)
    )
def described(n=8): return [f"something on a {colours[i % 8]} background" for i in range(n)]
def prompts(n=8): return [f"a bear on a {colours[(i // 2) % 8]} background" for i in range(n)]

# What is sent

def test_the_request_is_the_protocols_and_the_picture_arrives_whole(server):
    x = torch.rand(3, 3, 20, 12, generator=torch.Generator().manual_seed(0))
    client(server, api_key=KEY, max_tokens=7).ask(x, ["what?"] * 3)
    found = set()
    for method, path, headers, body in server.requests:
        assert (method, path, headers["Content-Type"], headers["Authorization"]) == (
            "POST", "/v1/chat/completions", "application/json", f"Bearer {KEY}"
        )
        sent = json.loads(body)
        (message,) = sent.pop("messages")
        assert sent == dict(model=MODEL, temperature=0, max_tokens=7)
        text, image = message["content"]
        assert (
            message["role"] == "user"
            and text == dict(type="text", text="what?")
            and image["type"] == "image_url"
        )
        found.add(
            np.asarray(
                Image.open(
                    io.BytesIO(
                        base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
                    )
                )
            ).tobytes()
        )
        assert KEY not in path and KEY.encode() not in body
    assert found == {o.permute(1, 2, 0).numpy().tobytes() for o in (x * 255).round().byte()}

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_a_png_url_is_the_same_pixels(h, w, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    assert (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(png_url(pixels).partition(",")[2])))) == pixels
    ).all()

def test_options_add_change_and_take_out_fields(server):
    client(server, options=dict(max_tokens=None, max_completion_tokens=9, temperature=0.5)).ask(
        pictures(1), ["q"]
    )
    sent = json.loads(server.requests[0][3])
    assert (sent.get("max_tokens"), sent["max_completion_tokens"], sent["temperature"]) == (None, 9, .5)

def test_without_a_key_none_is_sent(server):
    client(server).ask(pictures(1), ["q"])
    assert "Authorization" not in server.requests[0][2]

def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    client(server).ask(pictures(1), ["q"])
    assert server.requests[0][2]["Authorization"] == f"Bearer {KEY}"

def test_an_address_may_be_whole_or_have_a_query(server):
    for url in (server.url + "/", server.url + "/chat/completions", server.url + "?api-version=2"):
        assert client(url).ask(pictures(1), ["q"]) == described(1)
    assert server.requests[-1][1] == "/v1/chat/completions?api-version=2"

# Mischief

ACTS = [
    "500", "502", "503", "429", "408", "409", "429:0", "garbage", "binary", "pickle", "empty", "deep", "cut",
    "hangup", "reset", "nothttp", "error200", "huge", "slow:.3", "json:[]", 'json:{"choices": []}',
    'json:{"choices": [3]}', 'json:{"choices": {"a": 1}}',
    'json:{"choices": [{"message": {"content": null}}]}',
    'json:{"choices": [{"message": {"content": ["bear"]}}]}', 'json:{"choices": [{"text": "bear"}]}',
    "json:null", 'json:"bear"'
]

@pytest.mark.parametrize("act", ACTS)
def test_mischief_changes_no_reward(server, act):
    server.plan, server.trap = [act, "", act, act], "/nowhere/at/all"
    c = client(server)
    rewards, info = VLMAlignment(c)(pictures(), prompts(), [{}] * 8)
    assert (
        info["answers"] == described() and rewards.tolist() == WordRecall()(described(), prompts()).tolist()
    )
    assert (
        len(server.requests) == c.requests == (8 if act.startswith("slow") else 11)
        and c.retried == c.requests - 8
    )

MISCHIEF = [o for o in ACTS if not o.startswith("slow")]

@pytest.fixture(scope="module")
def one_server():
    with Server() as s: yield s

@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from([*MISCHIEF, ""]), max_size=40), st.integers(1, 9))
@example(MISCHIEF, 1)  # all of it meets the first question, which goes alone
@example(["", *MISCHIEF, *MISCHIEF], 9)
def test_any_mischief_in_any_order(one_server, plan, concurrency):
    "Without pauses: those double, and after seventeen failures in a row one of them takes a minute"
    one_server.requests, one_server.plan, one_server.trap = [], list(plan), "/nowhere/at/all"
    c = client(one_server, concurrency=concurrency, retries=len(plan), backoff=0)
    assert c.ask(pictures(12), [QUESTION] * 12) == described(12)
    c.close()
    assert len(one_server.questions) <= 12 + sum(map(bool, plan)) and not one_server.requests[12 + len(plan):]

@pytest.mark.parametrize("act", ["slow:3", "dribble", "drip"])
def test_a_try_takes_no_longer_than_its_timeout(server, act):
    server.plan, start = [act] * 2, time.perf_counter()
    with pytest.raises(
        ServerGone, match=r"2 tries in \d\.\d s, the last gave: no (whole )?answer within 0.2 s"
    ):
        client(server, timeout=0.2, retries=1).ask(pictures(1), ["q"])
    assert .4 <= time.perf_counter() - start < 1.5

def test_a_body_without_end_is_left(server):
    server.plan = ["endless"]
    with pytest.raises(ServerGone, match="a body of more than 1,048,576 bytes"):
        client(server, retries=0).ask(pictures(1), ["q"])

def test_a_pickle_is_not_loaded(server, tmp_path):
    server.trap = str(tmp_path/"owned")
    server.plan = ["pickle"] * 3
    assert client(server).ask(pictures(2), ["q"] * 2) == described(2)
    assert not (tmp_path/"owned").exists()
    from vlm_server import Trap
    pickle.loads(pickle.dumps(Trap(server.trap))).close()
    assert (tmp_path/"owned").exists()   # it would have gone off

@pytest.mark.parametrize("module", [C, V])
def test_the_module_has_nothing_that_runs_what_it_reads(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names} | {
        n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)
    }
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not imported & {
        "pickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "joblib"
    } and not called & {"eval", "exec"}

def test_retry_after_is_waited_for(server):
    server.plan, start = ["429:1"], time.perf_counter()
    client(server).ask(pictures(1), ["q"])
    assert time.perf_counter() - start >= 1

def test_a_server_that_says_tomorrow_is_gone(server):
    server.plan, start = ["429:86400"], time.perf_counter()
    with pytest.raises(ServerGone, match="1 try in .*to come back in 86400 s, 429: in a bad mood"):
        client(server).ask(pictures(1), ["q"])
    assert time.perf_counter() - start < 1

@pytest.mark.parametrize(
    "value,seconds",
    [
        (None, 0), ("", 0), ("7", 7), (" 2.5 ", 2.5), ("-3", 0), ("soon", 0), ("inf", 0), ("nan", 0),
        ("9" * 400, 0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0)
    ],
)
def test_retry_after(value, seconds):
    assert retry_after(value) == seconds

def test_retry_after_as_a_date():
    assert (
        28
        <= retry_after(format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True))
        <= 30
    )

@given(st.integers(1, 10_000), st.floats(0, 10))
def test_pauses_double_with_jitter_up_to_a_minute(k, b):
    full = min(b * 2.**min(k - 1, 60), 60)
    assert full / 2 <= pause(k, b) <= full

def test_hiccups_leave_the_global_generators_alone(server):
    random.seed(3); np.random.seed(3); torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    server.plan = ["500", "cut", "garbage"]
    client(server).ask(pictures(), ["q"] * 8)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before

# What will not pass

@pytest.mark.parametrize(
    "status,argument",
    [
        (400, "--vlm-model"), (401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "--vlm-url"),
        (413, "--vlm-model"), (422, "--vlm-model")
    ],
)
def test_refusals_end_it_at_once_in_the_servers_words(server, status, argument):
    server.says = "image_url is\n\x1b[31mnot supported\x07 " + "x" * 500
    server.plan = [str(status)]
    with pytest.raises(InputError) as e: client(server, concurrency=1).ask(pictures(), ["q"] * 8)
    text = str(e.value)
    assert (
        e.value.argument == argument
        and f"{status}: image_url is [31mnot supported xxx" in text
        and text.isprintable()
        and len(text) < 500
    )
    assert len(server.requests) == 1

def test_the_model_is_unknown(server):
    with pytest.raises(
        InputError, match="does not know the path or the model 'llava'.*The model `llava` does not exist"
    ):
        VLMClient(server.url, "llava").ask(pictures(1), ["q"])

def test_redirects_are_not_followed(server):
    with Server() as other:
        server.plan = [f"moved:{other.url}/chat/completions"]
        with pytest.raises(InputError, match=f"sends us elsewhere .*{other.url}"):
            client(server, api_key=KEY).ask(pictures(1), ["q"])
        assert not other.requests

def test_a_model_that_thinks_too_long(server):
    server.plan = ['json:{"choices": [{"finish_reason": "length", "message": {"content": null}}]}']
    with pytest.raises(InputError, match="--vlm-max-tokens: the model used up its tokens before it answered"):
        client(server).ask(pictures(1), ["q"])

@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff\xfe", b"{}", b"[1]", b'{"choices": [{"message": {}}]}', b"9" * 10_000,
        b'{"choices": ' * 50_000
    ],
)
def test_read_answer_refuses(data):
    with pytest.raises(C._Again): read_answer(data)

@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
        lambda o: st.lists(o, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "error", "detail", "x"]), o, max_size=3
        ),
    )
)
def test_read_answer_returns_text_or_asks_again(o):
    try: text = read_answer(json.dumps(o).encode())
    except C._Again as e: assert isinstance(e.args[0], str) and e.args[0]
    else: assert text == o["choices"][0]["message"]["content"].strip()

def test_answers_can_be_written_down(server):
    server.plan = [r'json:{"choices": [{"message": {"content": " half \ud800 a pair \n"}}]}']
    assert client(server).ask(pictures(1), ["q"]) == ["half ? a pair"]

def test_broken_pictures_are_not_sent(server):
    x = pictures(3); x[1, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="1 of 3"): client(server).ask(x, ["q"] * 3)
    assert not server.requests

# The key

def everything(e):
    """What a debugger could show of an error: all messages of its chain, and the variables of all frames
    but the test's own and the libraries'"""
    seen, todo = [], [e]
    while todo:
        e = todo.pop()
        if e is None or any(e is o for o in seen): continue
        seen.append(e); todo += [e.__cause__, e.__context__]
    frames = [
        f for e in seen for f, _ in traceback.walk_tb(e.__traceback__)
        if f.f_code.co_filename in (C.__file__, V.__file__)
    ]
    return "\n".join(
        [*("".join(traceback.format_exception(e)) for e in seen), *(repr(f.f_locals) for f in frames)]
    )

@pytest.mark.parametrize(
    "act,error",
    [
        ("401", InputError), ("400", InputError), ("500", ServerGone), ("error200", ServerGone),
        ("garbage", ServerGone), ("hangup", ServerGone), ("slow:1", ServerGone)
    ],
)
@pytest.mark.parametrize("padding", [0, 180, 195])
def test_the_key_leaks_nowhere_even_if_the_server_repeats_it(server, act, error, padding):
    server.says, server.plan = "x" * padding + f" no such key: {KEY}", [act] * 9
    c = client(server, api_key=KEY, retries=1, timeout=.3)
    with pytest.raises(error) as e: c.ask(pictures(2), ["q"] * 2)
    for text in (everything(e.value), repr(c), repr(vars(c)), str(e.value), repr(e.value)):
        assert KEY[:12] not in text
    assert server.requests[0][2]["Authorization"] == f"Bearer {KEY}"

def test_the_key_is_hidden_in_answers_too(server, tmp_path):
    server.see = lambda picture, question: f"a note that says {KEY}"
    assert client(server, api_key=KEY, answers=tmp_path / "a.jsonl").ask(pictures(1), ["q"]) == [
        "a note that says ***"
    ]
    assert KEY not in (tmp_path/"a.jsonl").read_text()

def test_stand_ins_for_a_key_do_not_spoil_answers(server):
    assert client(server, api_key="blue").ask(pictures(8), ["q"] * 8) == described(8)

def test_a_client_is_not_pickled_with_its_key(server):
    with pytest.raises(TypeError): pickle.dumps(client(server, api_key=KEY))
    with pytest.raises(TypeError, match="not written"): copy.deepcopy(client(server, api_key=KEY).key)

@pytest.mark.parametrize("key", ["sk-änderung", "sk-with a space", "sk-\nnew line"])
def test_a_key_that_cannot_be_one_is_not_repeated(server, key):
    with pytest.raises(InputError, match="OPENAI_API_KEY: the key has characters") as e:
        client(server, api_key=key)
    assert key not in str(e.value)

# Gone

def free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]

def test_gone_for_good_is_one_line_soon():
    url, start = f"http://127.0.0.1:{free_port()}/v1", time.perf_counter()
    c = client(url, retries=3)
    with pytest.raises(
        ServerGone,
        match=rf"^the VLM at {url} does not answer: 4 tries in \d\.\d s, the last gave: .*[Cc]onnect",
    ) as e:
        c.ask(pictures(64), ["q"] * 64)
    assert time.perf_counter() - start < 2 and str(e.value).isprintable() and e.value.__context__ is None
    assert c.requests <= 4 * c.concurrency   # those behind were not even tried

def test_once_it_is_gone_the_next_call_tries_once(server):
    c = client(server, retries=3, concurrency=1, backoff=.05)
    server.plan = ["500"] * 5
    with pytest.raises(ServerGone, match="4 tries"): c.ask(pictures(1), ["q"])
    with pytest.raises(ServerGone, match="1 try "): c.ask(pictures(1), ["q"])
    assert c.ask(pictures(1), ["q"]) == described(1)   # and is back
    server.plan = ["500"] * 2
    assert c.ask(pictures(2), ["p"] * 2) == described(2)

def test_nothing_that_was_answered_is_asked_again(server):
    x, bad = pictures(20), [True]
    server.doom = lambda picture, question: "500" if bad and np.asarray(picture)[8, 8, 0] == 11 else None
    c = client(server, concurrency=3, retries=2)
    with pytest.raises(ServerGone, match="500: in a bad mood"): c.ask(x, ["q"] * 20)
    before, known = len(server.requests), len(c._memory)
    assert 11 <= known < 20
    bad.clear()
    time.sleep(.02)
    assert c.ask(x, ["q"] * 20) == described(20)
    assert len(server.requests) - before == 20 - known

def test_the_same_question_about_the_same_picture_is_asked_once(server):
    x, c = pictures(3), client(server)
    assert c.ask(x[[0, 1, 0, 2, 1, 0]], ["q"] * 6) == [described()[i] for i in (0, 1, 0, 2, 1, 0)]
    assert len(server.requests) == 3
    c.ask(x, ["another"] * 3)
    assert len(server.requests) == 6
    client(server).ask(x, ["q"] * 3)
    assert len(server.requests) == 9

def test_memory_is_bounded_and_smaller_than_a_batch_if_need_be(server):
    c = client(server, remembered=3)
    assert c.ask(pictures(8), ["q"] * 8) == described() and len(c._memory) == 3
    assert c.ask(pictures(8), ["q"] * 8) == described() and len(c._memory) == 3

def test_answers_outlive_the_process(server, tmp_path):
    file = tmp_path/"deep"/"answers.jsonl"
    client(server, answers=file).ask(pictures(6), ["q"] * 6)
    # strange lines, and one that a kill cut off
    with file.open("a") as f: f.write('{"name": "x", "answer": 3}\n[]\n{"name": "cut of')
    c = client(server, answers=file)
    assert c.ask(pictures(8), ["q"] * 8) == described() and c.requests == 2
    c = client(server, answers=file)
    assert c.ask(pictures(8), ["q"] * 8) == described() and c.requests == 0
    server.see = lambda picture, question: "two\u2028lines\x85and a \"quote\""
    said = client(server, answers=file).ask(pictures(1), ["p"])
    assert (
        client(server, answers=file).ask(pictures(1), ["p"]) == said == ["two\u2028lines\x85and a \"quote\""]
        and len(server.requests) == 9
    )
    # other settings, other answers
    assert client(server, answers=file, max_tokens=5).ask(pictures(1), ["q"]) and len(server.requests) == 10

def test_two_writers_of_one_file_of_answers(tmp_path):
    "Long lines from two processes, and half a line that a third has left: each answer is a line of its own."
    file = tmp_path/"answers.jsonl"
    file.write_text('{"name": "half')
    def write(who):
        for i in range(200):
            append_alone(file, json.dumps(dict(name=f"{who}{i}", answer=who * 20_000)))
    writers = [multiprocessing.get_context("fork").Process(target=write, args=(o,)) for o in "ab"]
    for o in writers: o.start()
    for o in writers: o.join()
    half, *lines = file.read_text().splitlines()
    found = [json.loads(o) for o in lines]
    assert half == '{"name": "half' and sorted(o["name"] for o in found) == sorted(
        f"{who}{i}" for who in "ab" for i in range(200)
    )
    assert all(o["answer"] == o["name"][0] * 20_000 for o in found)

def test_answers_are_kept_where_the_environment_says(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DDPO_VLM_ANSWERS", "~/kept/answers.jsonl")
    c = vlm_client(server.url, MODEL)
    c.ask(pictures(2), ["q"] * 2)
    assert len((tmp_path/"kept/answers.jsonl").read_text().splitlines()) == 2
    monkeypatch.setenv("DDPO_VLM_ANSWERS", str(tmp_path))
    with pytest.raises(InputError, match="^DDPO_VLM_ANSWERS: .*it is not a file"):
        vlm_client(server.url, MODEL)
    (tmp_path/"file").write_text("")
    c = vlm_client(server.url, MODEL, answers=tmp_path/"file/answers.jsonl")
    with pytest.raises(InputError, match="^DDPO_VLM_ANSWERS: answers cannot be kept in"):
        c.ask(pictures(1), ["q"])

def test_a_run_keeps_answers_in_its_folder_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("DDPO_VLM_ANSWERS", raising=False)
    args = types.SimpleNamespace(**dict.fromkeys(
        ("vlm_url", "vlm_set", "vlm_max_tokens", "vlm_timeout", "vlm_model", "vlm_similarity")
    ))
    said = lambda output=None: (_vlm(args, output), os.environ.get("DDPO_VLM_ANSWERS"))[1]
    assert [said("a"), said("b"), said()] == ["a/vlm_answers.jsonl", "b/vlm_answers.jsonl", None]
    monkeypatch.setenv("DDPO_VLM_ANSWERS", "~/mine.jsonl")
    assert [said("a"), said()] == ["~/mine.jsonl"] * 2

@pytest.mark.parametrize("other", [
    dict(client=dict(vlm_model="other")), dict(client=dict(max_tokens=5)),
    dict(client=dict(options={"seed": 1})), dict(question="What colour?"),
    dict(similarity=make_similarity("emoji-clip"))
])
def test_a_run_knows_whom_it_asks(server, other):
    def alignment(client=(), **kw):
        own = dict(vlm_model="seer", max_tokens=64) | dict(client)
        return VLMAlignment(vlm_client(server.url, **own), **dict(similarity=make_similarity("words")) | kw)
    was, now = (_called(Guarded(o, "vlm_alignment")) for o in (alignment(), alignment(**other)))
    assert was == _called(Guarded(alignment(), "vlm_alignment")) and not _other(was, dict(was))
    assert _other(was, now) and was["digest"].startswith("seer, 64 tokens, words, settings ")
    total = _called(WeightedSum(dict(a=(1, alignment()), b=(1, alignment(**other)))))
    assert was["digest"] in total["digest"] and now["digest"] in total["digest"]
    assert not _other(dict(name="vlm_alignment", module=None, digest=None), now)  # older checkpoints

def test_a_comparison_goes_on_with_the_model_that_it_began_with(server):
    def digest(vlm_model="seer"):
        return Guarded(VLMQuestions(vlm_client(server.url, vlm_model)), "q").identity
    plan = lambda d: dict(reward_digest=d, configs={}, algorithms=[], seeds=[]) | dict.fromkeys(
        set(_identity) - {"reward_digest"}
    )
    was = plan(digest()["digest"])
    join_plans(plan(digest()["digest"]), was)
    join_plans(plan(digest()["digest"]), plan(None))  # a folder of an older version
    with pytest.raises(InputError, match="reward_digest is 'seer, 64 tokens.* there and 'other, 64"):
        join_plans(plan(digest(vlm_model="other")["digest"]), was)

def test_concurrency_is_bounded_over_all_threads(server):
    server.pause, found = .02, {}
    c = client(server, concurrency=3)
    def call(k): found[k] = c.ask(pictures(8), [f"q{k}"] * 8)
    threads = [threading.Thread(target=call, args=[k]) for k in range(4)]
    [t.start() for t in threads]; [t.join() for t in threads]
    assert server.most == 3 and [found[k] for k in range(4)] == [described()] * 4

def test_threads_end_with_an_interrupt(server, monkeypatch):
    "Ctrl-C while pictures are waiting: no more requests after that"
    c = client(server, concurrency=2, backoff=5, retries=9)
    server.plan = ["500"] * 2
    def interrupted(*a, **k): time.sleep(.2); raise KeyboardInterrupt
    monkeypatch.setattr(C, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt): c.ask(pictures(8), ["q"] * 8)
    before = len(server.requests)
    for o in c._crew.threads: o.join(.1)   # they wait for work
    assert before <= 2 and len(server.requests) == before and c._crew.jobs.empty()

def test_check(server):
    assert client(server).check() == [MODEL, "other"]
    with pytest.raises(InputError, match=f"--vlm-model: .* has no 'llava'; choose from {MODEL}, other"):
        VLMClient(server.url, "llava").check()
    server.plan = ["401"]
    with pytest.raises(InputError, match="OPENAI_API_KEY"): client(server).check()
    server.plan = ["404", "405", "garbage", "503"]
    c = client(server)
    assert [c.check() for _ in range(3)] == [[], [], []] and c.check() == [MODEL, "other"]
    server.plan = ["500"] * 5
    assert client(server).check() == []   # as some servers do that are well otherwise
    with pytest.raises(ServerGone): client(f"http://127.0.0.1:{free_port()}/v1", retries=1).check()

# Bad input

@pytest.mark.parametrize(
    "url",
    [
        "", "localhost:8000/v1", "ftp://example.org", "http://", "http://exa mple.org", "/v1", None, 3,
        "http://[::1", "http://example.org:port"
    ],
)
def test_addresses_that_are_none(url):
    with pytest.raises(InputError, match="--vlm-url: .*such as http://localhost:8000/v1") as e:
        VLMClient(url, MODEL)
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("url", ["http://ada:pa55@example.org/v1", "ftp://ada:pa55@example.org/v1"])
def test_passwords_in_addresses_are_refused_and_not_repeated(url):
    with pytest.raises(InputError, match="--vlm-url") as e: VLMClient(url, MODEL)
    assert "pa55" not in str(e.value)

def test_a_query_is_not_shown(): assert "s3cr" not in repr(VLMClient("http://example.org/v1?key=s3cr", MODEL))

@pytest.mark.parametrize(
    "name,value",
    [
        ("timeout", 0), ("timeout", float("nan")), ("retries", -1), ("concurrency", 0), ("max_tokens", 0),
        ("backoff", -1), ("remembered", 0)
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(InputError, match=f"{name}: "):
        VLMClient("http://localhost/v1", MODEL, **{name: value})

@pytest.mark.parametrize("model", ["", "  ", None])
def test_no_model(model):
    with pytest.raises(InputError, match="--vlm-model"): VLMClient("http://localhost/v1", model)

def test_as_many_questions_as_images(server):
    with pytest.raises(ValueError, match="2 questions for 3 images"):
        client(server).ask(pictures(3), ["q"] * 2)

def test_nothing_to_ask(server):
    assert client(server).ask(torch.zeros(0, 3, 8, 8), []) == [] and VLMAlignment(client(server))(
        torch.zeros(0, 3, 8, 8), [], []
    )[0].shape == (0,)

def test_from_the_environment(server, monkeypatch):
    for make in (vlm_alignment, vlm_questions):
        with pytest.raises(InputError, match="--vlm-url: there is no server .*DDPO_VLM_URL"): make()
    monkeypatch.setenv("DDPO_VLM_URL", server.url)
    with pytest.raises(InputError, match="--vlm-model: there is no model .*DDPO_VLM_MODEL"): vlm_questions()
    monkeypatch.setenv("DDPO_VLM_MODEL", MODEL)
    reward = vlm_alignment(similarity="words", timeout=3)
    assert reward.client.timeout == 3 and reward(pictures(2), ["white", "red"], [{}] * 2)[0].tolist() == [
        1, 0
    ]
    monkeypatch.setenv("DDPO_VLM_SIMILARITY", "words")
    assert isinstance(vlm_alignment().similarity, WordRecall)
    assert vlm_client("http://localhost:1/v1", "m").model == "m"

def test_the_bundled_clip_compares_what_is_said_of_bundled_pictures(server, monkeypatch):
    monkeypatch.setenv("DDPO_VLM_URL", server.url); monkeypatch.setenv("DDPO_VLM_MODEL", MODEL)
    same, other = vlm_alignment("emoji-sd").similarity(
        ["a bear on a blue background"] * 2, ["a bear on a blue background", "a frog on a red background"]
    )
    assert same == pytest.approx(1, abs=1e-5) and other < .8
    named = []
    monkeypatch.setattr(V, "make_similarity", lambda name: named.append(name))
    vlm_alignment("stable-diffusion-v1-5/stable-diffusion-v1-5"), vlm_questions("any")
    assert named == ["sentence-transformers/all-MiniLM-L6-v2"]

@pytest.mark.parametrize("name", ["no/such-model", "bertscore:no/such-model"])
def test_text_models_that_are_not_there(name):
    with pytest.raises(ModelError, match="--vlm-similarity: cannot load 'no/such-model'.*words") as e:
        make_similarity(name)
    assert "\n" not in str(e.value)

# Similarity

def test_word_recall():
    r = WordRecall()
    assert r(
        ["The BEAR, on blue.", "a cub", "", "the on"],
        ["a bear on a blue background", "a bear", "a bear", "on the"]
    ).tolist() == [2 / 3, 0, 0, 1]
    assert r.score("", "") == 0

words = st.text("ab cä.,", max_size=12)
@given(words, words, words)
def test_word_recall_is_a_share_and_grows_with_the_answer(a, b, p):
    r = WordRecall()
    assert 0 <= r.score(a, p) <= r.score(f"{a} {b}", p) <= 1
    assert r.score(p, p) == (1 if V._words(p) else 0)

def test_embedding_similarity_is_the_cosine():
    table = dict(a=[3., 4.], b=[4., -3.], c=[5., 0.])
    s = EmbeddingSimilarity(lambda texts: torch.tensor([table.get(t, [1., 1.]) for t in texts]), batch_size=2)
    np.testing.assert_allclose(
        s(["a", "a", "a", "", "c"], ["a", "b", "c", "a", "a"]), [1, 0, 0.6, 0, 0.6], atol=1e-6
    )
    assert s([], []).shape == (0,)

def naive_recall(reference, candidate):
    total = 0.
    for r in reference:
        best = -2.
        for c in candidate:
            best = max(
                best,
                sum(x * y for x, y in zip(r, c))
                / (sum(x * x for x in r) ** 0.5 * sum(y * y for y in c) ** 0.5),
            )
        total += best
    return total / len(reference)

vectors = lambda d: st.lists(
    st.lists(st.floats(-5, 5), min_size=d, max_size=d).filter(lambda v: sum(x * x for x in v) > 1e-6),
    min_size=1, max_size=6
)
@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4).flatmap(lambda d: st.tuples(vectors(d), vectors(d))))
def test_bertscore_recall_is_the_papers_formula(o):
    reference, candidate = o
    assert bertscore_recall(
        torch.tensor(reference, dtype=torch.float64), torch.tensor(candidate, dtype=torch.float64)
    ) == pytest.approx(naive_recall(reference, candidate), abs=1e-9)

@pytest.fixture(scope="module")
def pipe(): return load_pipeline()

@pytest.mark.filterwarnings("ignore:. of . prompts and answers are longer")
def test_bertscore_of_texts(pipe):
    s = BERTScoreRecall((pipe.tokenizer, pipe.text_encoder))
    texts = ["a bear on a blue background", "a fox", "a bear", "two words more than the other one has"]
    assert s(texts, texts) == pytest.approx([1] * 4, abs=1e-6)
    # unlike a cosine of the whole, the recall does not mind what else is said; precision would. A
    # causal encoder sees the same prefix.
    assert (
        s(["a bear on a blue background"], ["a bear"])[0] == pytest.approx(1, abs=1e-5)
        and s(["a bear"], ["a bear on a blue background"])[0] < 0.99
    )
    # independent of padding
    np.testing.assert_allclose(
        [s([a], [p])[0] for a, p in zip(texts, texts[::-1])], s(texts, texts[::-1]), atol=1e-5
    )
    np.testing.assert_allclose(
        BERTScoreRecall(s.parts, batch_size=1)(texts, texts[::-1]), s(texts, texts[::-1]), atol=1e-5
    )
    assert s(["", "a fox"], ["a fox", ""]).tolist() == [0, 0]

def test_bertscore_by_hand(pipe):
    "Against states taken one text at a time, without our batching and masks"
    def states(text):
        with torch.no_grad():
            return (
                pipe.text_encoder(**pipe.tokenizer(text, return_tensors="pt"), output_hidden_states=True)
                .hidden_states[1][0, 1:-1]
                .tolist()
            )
    expected = naive_recall(states("a fox on a pink background"), states("a pink whale"))
    assert BERTScoreRecall((pipe.tokenizer, pipe.text_encoder), layer=1)(
        ["a pink whale"], ["a fox on a pink background"]
    )[0] == pytest.approx(expected, abs=1e-5)

def test_a_similarity_that_reads_less_than_the_texts_says_so_once(pipe):
    s = BERTScoreRecall((pipe.tokenizer, pipe.text_encoder))
    pipe.text_encoder.told_cut = False
    with pytest.warns(UserWarning, match="^1 of 2 prompts and answers .* the similarity reads"):
        s(["a bear " * 40], ["a bear"])
    s(["a bear " * 50], ["a bear"])

def test_bertscore_is_rescaled(pipe):
    parts = pipe.tokenizer, pipe.text_encoder
    raw, scaled = (
        BERTScoreRecall(parts, baseline=b)(["a fox", "a fox"], ["a fox", "a bear"]) for b in (0, 0.5)
    )
    np.testing.assert_allclose(scaled, (raw - .5) / .5)

def test_mean_pooling_ignores_padding(pipe, tmp_path):
    pipe.tokenizer.save_pretrained(tmp_path); pipe.text_encoder.save_pretrained(tmp_path)
    embed = V.mean_pooled(str(tmp_path))
    texts = ["a fox", "a bear on a blue background"]
    torch.testing.assert_close(embed(texts)[0], embed(texts[:1])[0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        alone = (
            pipe.text_encoder(**pipe.tokenizer(texts[1], return_tensors="pt")).last_hidden_state[0].mean(0)
        )
    torch.testing.assert_close(embed(texts)[1], alone, atol=1e-4, rtol=1e-4)
    assert make_similarity(str(tmp_path))(["a fox"], ["a fox"])[0] == pytest.approx(1)

# Questions

@pytest.mark.parametrize(
    "said,expected,matches",
    [
        ("3", "3", True), ("There are three bears.", "3", True), ("Three.", "three", True),
        ("THREE!", "3", True), ("13", "3", False), ("30 bears", "3", False), ("2 or 3", "3", False),
        ("2 or 3", "2", True), ("There are no bears", "0", True), ("None.", "zero", True),
        ("No, there are 3", "3", True), ("three bears, one of them brown", "3", True), ("", "3", False),
        ("1,200 bees", "1200", True), ("03", "3", True), ("３", "3", True), ("someone", "one", False),
        ("It is blue.", "blue", True), ("It is bluish.", "blue", False), ("a polar bear", "Polar Bear", True),
        ("a bear that is polar", "polar bear", False), ("Yes, it is.", "yes", True), ("No.", "yes", False),
        ("Yes, no doubt", "no", False), ("a blue background", "the blue background", True), ("", "", True),
        ("blue", "", False)
    ],
)
def test_answers_match(said, expected, matches):
    assert answer_matches(said, expected) is matches

@given(st.integers(0, 20), st.integers(0, 20))
def test_number_words_are_digits(i, j):
    word = (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
        " sixteen seventeen eighteen nineteen twenty".split()
    )
    for said in (word[i], str(i), f"There are {word[i]} bears.", f"I see {i}!"):
        for expected in (word[j], str(j), f" {word[j].upper()}."):
            assert answer_matches(said, expected) == (i == j)

@given(st.text(), st.text())
def test_matching_survives_any_text(said, expected): assert answer_matches(said, expected) in (True, False)

def quiz(*pairs): return dict(questions=[q for q, _ in pairs], answers=[a for _, a in pairs])

def test_questions(server):
    ask = "What colour is the background?"
    metadata = [
        quiz((ask, colours[0]), ("How many bears are there?", "3")), quiz((ask, "no such")),
        quiz((ask, colours[2]), ("How many?", "4"))
    ]
    rewards, info = VLMQuestions(client(server))(pictures(3), ["x"] * 3, metadata)
    assert rewards.tolist() == [1, 0, 0.5] and info["answers"] == [
        ["It is white.", "There are three of them."], ["It is gray."],
        ["It is red.", "There are three of them."]
    ]
    assert len(server.requests) == 5

@pytest.mark.parametrize(
    "bad",
    [
        {}, dict(questions=["q"]), dict(questions=["q"], answers=[]), dict(questions=[], answers=[]),
        dict(questions="q", answers="a"), dict(questions=["q"], answers=[3]), None
    ],
)
def test_questions_that_do_not_fit(server, bad):
    with pytest.raises(InputError, match=r"prompt 1 \(counted from 0\).*\.jsonl") as e:
        VLMQuestions(client(server))(pictures(2), ["x"] * 2, [quiz(("q", "a")), bad])
    assert not server.requests and "\n" not in str(e.value)

# Training

SMALL = dict(
    sample_num_steps=3, sample_batch_size=3, sample_num_batches_per_epoch=2, train_batch_size=6,
    micro_batch_size=12, train_learning_rate=1e-2, num_epochs=2
)
def timeless(line):
    return {
        k: v
        for k, v in json.loads(line).items()
        if not k.startswith(("seconds", "images_per_second", "peak_memory"))
    }
def metrics(home): return [timeless(o) for o in (Path(home)/"metrics.jsonl").read_text().splitlines()]
def weights(t): return torch.cat([p.detach().flatten() for p in t.policy.trainable_parameters()])

def trainer(home, reward, pipe, **kw):
    c = make_config("ddpo-is", **(SMALL | dict(logdir=str(home)) | kw))
    torch.manual_seed(c.seed)
    asks = [
        (f"a {noun}", quiz(("What colour is the background?", c)))
        for noun, c in (("bear", "gray"), ("frog", "gray"), ("bee", "gray"))
    ]
    return make_trainer(c, reward, PromptSource(asks, c.seed), StableDiffusionPolicy(copy.deepcopy(pipe)))

@pytest.fixture(scope="module")
def unbroken(pipe, tmp_path_factory):
    "The run of a server that behaves"
    home = tmp_path_factory.mktemp("unbroken")
    with Server() as s:
        t = trainer(home, VLMQuestions(client(s)), pipe)
        t.train(progress=False)
        assert len(s.questions) == 12
    rows = metrics(home)
    assert len(rows) == 2 and all(o["reward_std"] > 0 for o in rows)
    return rows, weights(t)

@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_server_that_dies_in_the_middle_costs_nothing(tmp_path, pipe, unbroken, asynchronous):
    with Server() as s:
        # dies in the middle of the second epoch
        s.plan, s.answers_left = ["500", "cut", "", "garbage"] * 2, 9
        t = trainer(
            tmp_path, VLMQuestions(client(s, answers=tmp_path / "answers.jsonl")), pipe,
            async_reward_computation=asynchronous
        )
        with pytest.raises(ServerGone, match="does not answer"): t.train(progress=False)
    assert [o["epoch"] for o in metrics(tmp_path)] == [1]
    found = newest_whole(tmp_path/"checkpoints")
    check_whole(found)
    assert found.name == "checkpoint_1"
    with Server() as s:
        t = trainer(
            tmp_path, VLMQuestions(client(s, answers=tmp_path / "answers.jsonl")), pipe,
            async_reward_computation=asynchronous, resume_from=str(tmp_path)
        )
        t.train(progress=False)
        assert metrics(tmp_path) == unbroken[0] and torch.equal(weights(t), unbroken[1])
        assert len(s.questions) == 12 - 9   # not one answer was asked for twice

def test_going_on_in_the_same_process(tmp_path, pipe, unbroken):
    with Server() as s:
        s.answers_left = 9
        t = trainer(tmp_path, VLMQuestions(client(s, retries=1)), pipe)
        with pytest.raises(ServerGone): t.train(progress=False)
        s.answers_left = None
        t.train(progress=False)
    assert metrics(tmp_path) == unbroken[0] and torch.equal(weights(t), unbroken[1])

# From the command line

TINY = (
    "--sample-num-steps 2 --sample-batch-size 4 --train-batch-size 4 --queries 4 --evaluation-samples 2"
    " --no-progress"
)

@pytest.fixture
def command(capsys, monkeypatch):
    from ddpo_nb.cli import main
    for k in ENVIRONMENT[1:]: monkeypatch.setenv(k, "")  # put back afterwards
    def go(line):
        capsys.readouterr()
        return main(line.split()), *capsys.readouterr()
    return go

def test_without_a_server_the_flag_is_named(command, tmp_path):
    status, out, err = command(f"train --reward vlm_alignment --output {tmp_path/'run'} {TINY}")
    assert (
        status == 2
        and err.startswith("ddpo-nb train: --vlm-url: there is no server to ask")
        and err.count("\n") == 1
        and not (tmp_path / "run").exists()
    )

def test_a_run_with_a_server_keeps_its_answers_and_ends_in_a_line_when_it_is_gone(
    command, server, tmp_path, monkeypatch
):
    monkeypatch.setattr(C, "pause", lambda *args, **kw: 0.001)
    line = (
        f"train --reward vlm_alignment --vlm-url {server.url} --vlm-model {MODEL} --vlm-similarity words"
        f" --output {tmp_path/'run'} {TINY}"
    )
    server.gone = True
    status, out, err = command(line)
    assert (
        status == 1
        and "no answer is asked for twice" in err
        and "--vlm-url" in err
        and "Traceback" not in err
    )
    server.gone = False
    assert command(line)[0] == 0
    kept = (tmp_path/"run"/"vlm_answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(o) for o in (tmp_path/"run"/"metrics.jsonl").read_text().splitlines()]
    assert len(kept) >= 4 and rows[-1]["reward"] == "vlm_alignment" and 0 <= rows[-1]["reward_mean"] <= 1
