"""Vision-language models as they are: they think aloud, speak dialects, decline, and keep us waiting while
somebody wants to stop."""
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from test_vlm import (
    ENVIRONMENT, KEY, MODEL, SMALL, Server, client, described, no_environment, pictures, prompts, quiz,
    server
)  # noqa: F401
from ddpo_nb import chat as C
from ddpo_nb.cli import main
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import InputError, PromptSource
from ddpo_nb.trainer import make_config, make_trainer
from ddpo_nb.chat import (Refusal, ServerGone, VLMClient, chat_request, declines, read_answer, refused_field,
                          without_thoughts)
from ddpo_nb.vlm import VLMAlignment, VLMQuestions, vlm_client

def reply(finish="stop", **message):
    return dict(choices=[dict(finish_reason=finish, message=dict(role="assistant", **message))])
def read(finish="stop", **message): return read_answer(json.dumps(reply(finish, **message)).encode())

# Thoughts

MARKS = [
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>"),
    ("<Thought>", "</Thought>"), ("◁think▷", "◁/think▷"), ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<think type='x'>\n", "\n</ think >"),
]

@pytest.mark.parametrize("begin,end", MARKS)
def test_a_thought_is_no_answer(begin, end):
    assert read(content=f"{begin}I see 3 bears. Or 4?{end}\n\nTwo.") == "Two."
    # it began before the text did
    assert read(content=f"I see 3 bears.{end}Two.") == "Two."
    assert read(content=f"{begin}3{end}{begin}4{end}Two.") == "Two." == read(content=f"Two.{begin}3{end}")
    assert read(content=f"{begin}3{begin}4{end}5{end}Two.") == "Two."
    # it had its say, and said nothing
    assert read(content=f"{begin}I see 3 bears") == "" == read(content=f"{begin}3{end}")
    for finish in ("length", None) if "channel" not in begin else ("length",):
        with pytest.raises(InputError, match="--vlm-max-tokens: the model used up its tokens"):
            read(finish, content=f"{begin}I see 3 bears")
    with pytest.raises(InputError, match="--vlm-max-tokens"): read("length", content=f"{begin}3{end}")

def test_marks_of_answers_are_taken_off():
    assert (
        read(content="<think>3</think><answer>Two.</answer>")
        == "Two."
        == read(content="So: <|begin_of_box|>Two.<|end_of_box|>")
    )
    assert (
        read(content="<answer>Two") == "Two"
        and read(content="a <b>bear</b> thinks <3") == "a <b>bear</b> thinks <3"
    )

@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_in_a_field_of_their_own(field):
    assert read(content="Two.", **{field: "3"}) == "Two." and read(
        content=None, **{field: "3"}
    ) == "" == read(content="", **{field: "3"})
    for content in (None, ""):
        with pytest.raises(InputError, match="--vlm-max-tokens"):
            read("length", content=content, **{field: "3"})

def test_content_in_parts():
    text = lambda o: dict(type="text", text=o)
    assert (
        read(content=[text("a bear"), text("on blue")]) == "a bear\non blue"
        and read(content=[dict(type="output_text", text="Two.")]) == "Two."
    )
    assert (
        read(content=[dict(type="thinking", thinking=[text("3")]), text("Two.")])
        == "Two."
        == read(content=[dict(type="reasoning", text="3"), text("Two.")])
    )
    assert (
        read(content=[text("<think>3"), text("4</think>"), text("Two.")]) == "Two."
        and read(content=[dict(type="reasoning", text="3")]) == ""
    )
    assert isinstance(read(content=[dict(type="refusal", refusal="No.")]), Refusal)
    for bad in ([], ["bear"], [3], [dict(type="image_url")], [text("a"), None], dict(text="a")):
        with pytest.raises(C._Again): read(content=bad)

def test_a_number_in_a_thought_is_not_counted(server):
    server.see = lambda picture, question: "<think>There are three of them, or 3.</think> There are two."
    rewards, info = VLMQuestions(client(server))(
        pictures(2), ["x"] * 2, [quiz(("How many?", "3")), quiz(("How many?", "2"))]
    )
    assert rewards.tolist() == [0, 1] and info["answers"] == [["There are two."], ["There are two."]]
    server.see = lambda picture, question: "a bear on a blue background, they said</think> a fish"
    rewards, info = VLMAlignment(client(server))(pictures(1), ["a bear on a blue background"], [{}])
    assert rewards.tolist() == [0] and info == dict(answers=["a fish"], refused=[0], silent=[0])

@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_what_is_no_thought_stays(text):
    assert without_thoughts(text.replace("<", "").replace("[", "")) == (
        text.replace("<", "").replace("[", "").strip(), False
    )

def test_thoughts_that_an_older_version_kept_are_taken_out(server, tmp_path):
    c = client(server)
    names = [c._name((o.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8), "q") for o in pictures(3)]
    kept = ["<think>3</think>two", "<think>3", "I'm sorry, but I can't help with that."]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(dict(name=n, question="q", answer=a)) + "\n" for n, a in zip(names, kept))
    )
    c = client(server, answers=tmp_path/"a.jsonl")
    said = c.ask(pictures(3), ["q"] * 3)
    assert said == ["two", described(3)[1], kept[2]] and isinstance(said[2], Refusal) and c.requests == 1

# Refusals

SORRY = [
    "I'm sorry, but I can't help with that.", "I’m sorry, I can’t assist with that request.",
    "Sorry, I cannot describe this image.", "I cannot fulfill this request.", "I am unable to view images.",
    "As an AI language model, I cannot view images.", "I apologize, but I'm not able to do that.",
    "Unfortunately, I can't assist with that.", "I must decline to comply"
]
FINE = [
    "a bear", "I can't see any bears.", "No, there is no bear.", "I cannot find a bear in this picture",
    "a sorry bear that can't help it", "The bear says: I'm sorry, I can't.", "", "There are 3.",
    "Unfortunately, there is no bear."
]

@pytest.mark.parametrize("text", SORRY)
def test_refusals_in_words(text): assert declines(text) and isinstance(read(content=text), Refusal)
@pytest.mark.parametrize("text", FINE)
def test_answers_that_are_no_refusals(text): assert not declines(text) and type(read(content=text)) is str

def test_refusals_are_told_from_silence_and_counted(server, tmp_path):
    said = iter(
        [
            reply(content="", refusal="I won't."), reply(content="  "), reply("content_filter", content=None),
            reply(content=SORRY[0]), reply(content="two bears")
        ]
    )
    server.plan = [f"json:{json.dumps(o)}" for o in said]
    c = client(server, concurrency=1, answers=tmp_path/"a.jsonl")
    rewards, info = VLMAlignment(c)(pictures(5), ["two bears that can't help it"] * 5, [{}] * 5)
    assert (
        info["refused"] == [1, 0, 1, 1, 0]
        and info["silent"] == [0, 1, 0, 0, 0]
        and rewards[:4].tolist() == [0] * 4
        and rewards[4] > 0
    )
    assert (
        info["answers"][0] == "I won't."
        and info["answers"][1] == ""
        and "content_filter" in info["answers"][2]
    )
    again = client(server, answers=tmp_path/"a.jsonl")
    assert VLMAlignment(again)(pictures(5), ["x"] * 5, [{}] * 5)[1] == info and again.requests == 0
    quizzes = [quiz(("How many?", "3"), ("Which colour?", "blue"))]
    server.plan = [
        f"json:{json.dumps(o)}"
        for o in (reply(content="I'm sorry, I can't help with three."), reply(content="blue"))
    ]
    rewards, info = VLMQuestions(client(server, concurrency=1))(pictures(1), ["x"], quizzes)
    assert rewards.tolist() == [.5] and info["refused"] == [.5] and info["silent"] == [0]

@pytest.mark.parametrize(
    "status,code",
    [(400, "content_filter"), (400, "content_policy_violation"), (403, "ResponsibleAIPolicyViolation")],
)
def test_a_picture_that_the_server_holds_back_is_a_refusal(server, status, code):
    server.refuse = lambda asked: (status, dict(error=dict(code=code, message="The response was filtered")))
    assert [type(o) for o in client(server).ask(pictures(2), ["q"] * 2)] == [Refusal, Refusal]

# Dialects

def complaint(message, param=None, code=None):
    return dict(error=dict(message=message, type="invalid_request_error", param=param, code=code))
TOKENS = [
    complaint(
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'"
        " instead.",
        "max_tokens", "unsupported_parameter"
    ),
    complaint(
        "this model is not supported MaxTokens, please use MaxCompletionTokens: max_tokens is deprecated"
    ),
    dict(
        detail=[
            dict(
                type="extra_forbidden", loc=["body", "max_tokens"], msg="Extra inputs are not permitted",
                input=64
            )
        ]
    ),
    dict(
        object="error",
        message=(
            "[{'type': 'extra_forbidden', 'loc': ('body', 'max_tokens'), 'msg': 'Extra inputs are not"
            " permitted'}]"
        ),
        type="BadRequestError", code=400
    ),
]
HEAT = [
    complaint(
        "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is"
        " supported.",
        "temperature", "unsupported_value"
    ),
    complaint(
        "Unsupported parameter: 'temperature' is not supported with this model.",
        "temperature", "unsupported_parameter"
    ),
    complaint("`temperature` is deprecated for this model."),
    complaint(
        "litellm.UnsupportedParamsError: openai does not support parameters: ['temperature'], for model=o1"
    ),
    dict(error="Input validation error: `temperature` must be strictly positive", error_type="validation"),
    [
        dict(
            error=dict(
                code=400,
                message='Invalid JSON payload received. Unknown name "temperature": Cannot find field.',
                status="INVALID_ARGUMENT",
            )
        )
    ],
    dict(
        message=(
            "Malformed input request: extraneous key [temperature] is not permitted, please reformat your"
            " input and try again."
        )
    ),
]
SEED = [
    complaint("Unknown parameter: 'seed'.", "seed", "unknown_parameter"),
    complaint("property 'seed' is unsupported"),
    dict(detail=[dict(type="extra_forbidden", loc=["body", "seed"], msg="Extra inputs are not permitted")]),
]
KINDS = [
    complaint("Invalid image type: image/png. Supported: image/jpeg"),
    complaint("Unsupported image format: only JPEG is allowed", "image_url", "invalid_image_format"),
    dict(detail="media type must be image/jpeg"),
]

def server_that_refuses(server, field, said, status=400):
    sent = lambda o: (
        field in o
        if field != "png"
        else o["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png")
    )
    server.refuse = lambda asked: (status, said) if sent(asked) else None

def bodies(server): return [json.loads(body) for *_, body in server.requests]

@pytest.mark.parametrize("said", TOKENS)
@pytest.mark.parametrize("status", [400, 422])
def test_max_completion_tokens_are_found_out_once(server, said, status):
    server_that_refuses(server, "max_tokens", said, status)
    c = client(server, max_tokens=99)
    assert c.ask(pictures(8), ["q"] * 8) == described(8) and c.ask(pictures(8), ["p"] * 8) == described(8)
    assert [(o.get("max_tokens"), o.get("max_completion_tokens")) for o in bodies(server)] == [(99, None)] + [
        (None, 99)
    ] * 16

@pytest.mark.parametrize(
    "field,says", [(f, o) for f, all in (("temperature", HEAT), ("seed", SEED), ("png", KINDS)) for o in all]
)
def test_what_is_not_taken_is_left_out_once_and_said(server, field, says):
    server_that_refuses(server, field, says)
    c = client(server, options=dict(seed=1) if field == "seed" else None)
    with pytest.warns(
        UserWarning,
        match=dict(temperature="takes no temperature of 0", seed="takes no seed", png="takes no PNG: .*JPEG")[
            field
        ],
    ):
        assert c.ask(pictures(8), ["q"] * 8) == described(8)
    assert c.ask(pictures(8), ["p"] * 8) == described(8) and len(server.requests) == 17 and c.retried == 1

def test_several_dialects_at_once(server):
    def refuse(asked):
        for field, said in (("temperature", HEAT[0]), ("max_tokens", TOKENS[0])):
            if field in asked: return 400, said
    server.refuse = refuse
    with pytest.warns(UserWarning, match="temperature"):
        assert client(server).ask(pictures(8), ["q"] * 8) == described(8)
    assert len(server.requests) == 10 and {*bodies(server)[-1]} == {
        "model", "messages", "max_completion_tokens"
    }

def test_a_limit_of_either_name_may_be_refused(server):
    server.refuse = lambda asked: (
        (
            400,
            complaint(
                "Unrecognized request argument supplied:"
                f" {'max_tokens' if 'max_tokens' in asked else 'max_completion_tokens'}"
            ),
        )
        if any("tokens" in k for k in asked)
        else None
    )
    with pytest.warns(UserWarning, match="takes no max_tokens: it is left out"):
        assert client(server).ask(pictures(2), ["q"] * 2) == described(2)
    assert len(server.requests) == 4

def test_a_complaint_that_does_not_end_is_an_error(server):
    server.refuse = lambda asked: (400, complaint("Unsupported image format: png"))
    with (
        pytest.warns(UserWarning, match="PNG"),
        pytest.raises(InputError, match="--vlm-model: .*Unsupported image format"),
    ):
        client(server).ask(pictures(2), ["q"] * 2)
    assert len(server.requests) == 2

@pytest.mark.parametrize(
    "said",
    [
        (
            "'max_tokens' or 'max_completion_tokens' is too large: 9000. This model's maximum context length"
            " is 4096 tokens"
        ),
        "the model `x` does not exist", "max_tokens must be at least 1, got 0",
        "At most 0 image(s) may be provided in one prompt.", "x is not a multimodal model", "Invalid API key",
        ""
    ],
)
def test_other_complaints_are_not_taken_for_a_dialect(said):
    sent = chat_request("m", "q", np.zeros((4, 4, 3), np.uint8), 64)
    assert (
        refused_field(json.dumps(complaint(said)).encode(), sent) is None
        and refused_field(said.encode(), sent) is None
    )

@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.text(max_size=8) | st.integers(),
        lambda o: st.lists(o, max_size=3)
        | st.dictionaries(st.sampled_from(["param", "loc", "error", "message"]), o),
    ).map(lambda o: json.dumps(o).encode())
)
@settings(max_examples=100, deadline=None)
def test_any_complaint_can_be_read(data):
    assert refused_field(data, ("model", "temperature", "max_tokens")) in (
        None, "temperature", "max_tokens", "png"
    )

def test_by_flag_and_by_environment(server, monkeypatch, tmp_path, capfd):
    for k in ENVIRONMENT: monkeypatch.setenv(k, "")
    line = [
        "evaluate", "--samples", "2", "--steps", "1", "--reward", "vlm_alignment", "--vlm-url", server.url,
        "--vlm-model", MODEL, "--vlm-similarity", "words", "--vlm-max-tokens", "999", "--vlm-timeout", "7",
        "--vlm-set", "temperature=none", "--vlm-set", "reasoning_effort=low", "--vlm-set",
        'chat_template_kwargs={"enable_thinking": false}'
    ]
    assert main(line) == 0, capfd.readouterr()
    sent = bodies(server)[0]
    assert (
        sent["max_tokens"] == 999
        and "temperature" not in sent
        and sent["reasoning_effort"] == "low"
        and sent["chat_template_kwargs"] == dict(enable_thinking=False)
    )
    c = vlm_client()
    assert (c.max_tokens, c.timeout, c.options["temperature"]) == (999, 7., None)
    for name, bad in (("MAX_TOKENS", "many"), ("TIMEOUT", "soon"), ("SET", "temperature"), ("SET", "[1]")):
        with monkeypatch.context() as m:
            m.setenv(f"DDPO_VLM_{name}", bad)
            with pytest.raises(InputError, match=f"DDPO_VLM_{name}"): vlm_client()
    for flags in (
        ["--vlm-max-tokens", "0"], ["--vlm-timeout", "-1"], ["--vlm-set", "temperature"], ["--vlm-set", "=1"]
    ):
        assert main([*line, *flags]) == 2 and flags[0] in capfd.readouterr().err

# Stopping

SCRIPT = """
import sys, threading, torch
from ddpo_nb.chat import VLMClient
c = VLMClient(sys.argv[1], "emoji-eye", timeout=60, backoff=60, retries=5)
def go(): c.ask(torch.rand(3, 3, 16, 16), ["q"] * 3)
print("ready", flush=True)
try:
    if sys.argv[2] == "main": go()
    (thread := threading.Thread(target=go, daemon=True)).start()
    thread.join()
except KeyboardInterrupt: print("left", flush=True); raise
"""

@pytest.mark.parametrize(
    "signum,where,act",
    [(signal.SIGINT, "main", "slow:8"), (signal.SIGTERM, "thread", "drip"), (signal.SIGINT, "thread", "500")],
)
def test_a_process_that_waits_for_a_server_ends_at_once(server, signum, where, act):
    server.plan = [act] * 20
    p = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, server.url, where], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True
    )
    try:
        assert p.stdout.readline() == "ready\n"
        while not server.requests:
            time.sleep(0.02)
        time.sleep(0.2)
        start = time.perf_counter()
        p.send_signal(signum)
        assert (
            p.stdout.readline() == ("left\n" if signum == signal.SIGINT else "")
            and time.perf_counter() - start < 5
        )
        # far less than the server's minute, if a busy machine takes its time to unload torch
        assert p.wait(30) != 0
    finally:
        p.kill()
        p.wait()

def small_trainer(home, reward, **kw):
    c = make_config("ddpo-is", **(SMALL | dict(logdir=str(home)) | kw))
    torch.manual_seed(c.seed)
    return make_trainer(
        c, reward, PromptSource([("a bear", quiz(("What colour?", "gray")))], c.seed),
        StableDiffusionPolicy(load_pipeline())
    )

def stopped(t, signum, ready):
    "Train, and send ourselves a signal once `ready`; how long it took to leave, and how"
    sent = []
    def send():
        while not ready(): time.sleep(.02)
        time.sleep(.1)
        sent.append(time.perf_counter()); os.kill(os.getpid(), signum)
    threading.Thread(target=send, daemon=True).start()
    with pytest.raises((KeyboardInterrupt, SystemExit)) as e: t.train(progress=False)
    return time.perf_counter() - sent[0], e.value

@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("act", ["slow:8", "429:200"])
def test_a_run_that_waits_for_a_server_ends_soon_and_goes_on(server, tmp_path, asynchronous, act):
    server.plan = [act] * 9
    t = small_trainer(
        tmp_path, VLMQuestions(client(server, timeout=100)), async_reward_computation=asynchronous
    )
    seconds, how = stopped(t, signal.SIGTERM, lambda: server.requests)
    assert (
        seconds < 5
        and isinstance(how, SystemExit)
        and how.code == 143
        and [o.name for o in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_0"]
    )
    server.plan = []
    assert len(t.train(progress=False)) == 2   # the flag is down again

def test_a_reward_of_ones_own_that_waits_is_left_too(tmp_path):
    asked = []
    def reward(images, prompts, metadata):
        asked.append(1)
        try: time.sleep(60)
        except Exception: pass
        return [0.] * len(prompts), {}
    seconds, how = stopped(small_trainer(tmp_path, reward), signal.SIGINT, lambda: asked)
    assert seconds < 5 and isinstance(how, KeyboardInterrupt)
