"The live view: what it shows, its buttons, and what is left of it in a terminal."
import io, time
import pytest, torch
from PIL import Image
from ddpo_nb.checkpoints import checkpoints
from ddpo_nb.dashboard import Dashboard, draw_curve, draw_pictures
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import PromptSource
from ddpo_nb.trainer import make_config, make_trainer

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

def brightness(images, prompts, metadata): return images.mean((1, 2, 3)), {}

def trainer(home="", reward=brightness, epochs=3):
    c = make_config(
        "ddpo-is", logdir=str(home), num_epochs=epochs, sample_num_steps=3, sample_batch_size=4,
        train_batch_size=4, micro_batch_size=2
    )
    return make_trainer(
        c, reward, PromptSource(["cat", "a dog that is on the moon"]), StableDiffusionPolicy(load_pipeline())
    )

def is_picture(data): return Image.open(io.BytesIO(data)).size[0] >= 90

def test_it_shows_curve_pictures_and_state():
    t, seen = trainer(), []
    t.hook = lambda *args: seen.append(args)
    board = Dashboard(t, widgets=True)
    view = board.start()
    assert not board.stop.disabled
    board.wait()
    assert view is board.view and is_picture(board.curve.value) and is_picture(board.pictures.value)
    # the user's hook goes on being called
    assert board.text.value.startswith("finished: epoch 3 of 3, 12 queries, reward 0.") and len(seen) == 3
    assert (
        board.stop.disabled
        and board.pause.disabled
        and (board.bar.description, board.bar.value, board.bar.max) == ("training", 1, 1)
    )

def test_pause_and_go_on():
    t = trainer(epochs=40)
    board = Dashboard(t, widgets=True)
    board.start()
    while not t.rows: time.sleep(0.01)
    board.pause.value = True
    time.sleep(1)
    held = (len(t.rows), t.global_step)
    time.sleep(1)
    assert (
        held == (len(t.rows), t.global_step)
        and board.text.value.startswith("paused")
        and board.thread.is_alive()
    )
    board.pause.value = False
    while len(t.rows) == held[0]: time.sleep(0.01)
    t.stop()
    board.wait()

def test_stop_saves_and_the_run_can_go_on(tmp_path):
    t = trainer(tmp_path, epochs=1000)
    board = Dashboard(t, widgets=True)
    board.start()
    while not t.rows: time.sleep(0.01)
    board.stop.click()
    board.wait()
    assert (
        board.text.value.startswith("stopped")
        and board.text.value.endswith(f"go on with resume_from='{checkpoints(tmp_path/'checkpoints')[0]}'")
        and t.epochs_done < 1000
    )
    again = trainer(tmp_path)
    again.load_checkpoint(tmp_path)
    assert again.epochs_done == t.epochs_done and again.global_step == t.global_step

def test_stopped_while_paused_and_started_again(tmp_path):
    t = trainer(tmp_path)
    board = Dashboard(t, widgets=True)
    board.start()
    board.pause.value = True
    board.stop.click()
    board.wait()
    assert board.text.value.startswith("stopped") and not t.paused
    board.start()
    board.wait()
    assert board.text.value.startswith("finished") and t.epochs_done == 3

@pytest.mark.parametrize("home,name", [("", "Stop"), ("logs", "Stop and save")])
def test_the_button_promises_no_more_than_it_does(tmp_path, home, name):
    assert Dashboard(trainer(home and tmp_path/home), widgets=True).stop.description == name

def test_an_error_is_shown_and_raised():
    def boom(images, prompts, metadata): raise KeyError("no <such> thing")
    board = Dashboard(trainer(reward=boom), widgets=True)
    board.start()
    with pytest.raises(KeyError): board.wait()
    assert "no &lt;such&gt; thing" in board.text.value

def test_started_twice():
    t = trainer(epochs=1000)
    board = Dashboard(t, widgets=True)
    board.start()
    with pytest.raises(RuntimeError, match="under way"): board.start()
    t.stop(); board.wait()

def test_a_terminal_gets_lines(capsys):
    Dashboard(trainer()).start()
    lines = capsys.readouterr().out.strip().splitlines()
    assert (
        len(lines) == 4
        and lines[0].startswith("running: epoch 1 of 3, 4 queries, reward 0.")
        and lines[-1].startswith("finished: epoch 3 of 3")
    )

def test_any_prompt_can_be_drawn():
    for prompt in ("", "$", "a $\\frac$ of a cat", "x" * 200, "a bear on a blue background " * 9):
        assert is_picture(draw_pictures([torch.rand(2, 3, 8, 8), [prompt] * 2, [{}] * 2, torch.rand(2), {}]))

def test_drawings_of_one():
    images = torch.rand(1, 3, 8, 8)
    row = dict(queries=8, reward_mean=1., reward_q10=0., reward_q90=2.)
    assert is_picture(draw_pictures([images, ["cat"], [{}], torch.tensor([1.0]), {}])) and is_picture(
        draw_curve([row])
    )
