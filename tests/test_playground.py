"Models side by side: the same noise for all, what a reader marks, a text box that says what it cannot do."
import io

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo_nb.playground import Playground, draw_alike, paint_alike
from ddpo_nb.policy import load_policy
from ddpo_nb.prompts import InputError
from ddpo_nb.scenes import GROUNDS, NOUNS

pytestmark = pytest.mark.usefixtures("small_unet")

@pytest.fixture(scope="module")
def policy(small_unet):
    found = load_policy(use_lora=False)
    found.configure(2, 1.0)
    return found

class OneCat(torch.nn.Module):
    "A reader that finds a cat in the middle of every picture, on white."
    def forward(self, images):
        n = len(images)
        heat, ground = torch.full((n, len(NOUNS), 16, 16), -9.), torch.zeros(n, len(GROUNDS) + 1)
        heat[:, NOUNS.index("cat"), 8, 8] = 9.
        ground[:, GROUNDS.index("white")] = 9.
        return heat, torch.zeros(n, 3, 16, 16), ground

READER = OneCat(), 0.5

def test_one_noise_for_all_and_another_for_each_picture(policy):
    images = paint_alike({"a": policy, "b": policy}, "a cat", 3, seed=1)
    assert torch.equal(images["a"], images["b"]) and images["a"].shape == (3, 3, 64, 64)
    assert not torch.equal(images["a"][0], images["a"][1])
    assert torch.equal(paint_alike({"a": policy}, "a cat", 2, seed=1)["a"], images["a"][:2])
    assert not torch.equal(paint_alike({"a": policy}, "a cat", 3, seed=2)["a"], images["a"])

ASKED = [("a cat", "✓"), ("a cat on white", "✓"), ("two cats", "✗"), ("a dog", "✗")]

@pytest.mark.parametrize("prompt, tick", ASKED)
def test_what_the_reader_finds_is_marked(prompt, tick):
    images = {"base": torch.rand(2, 3, 64, 64), "trained": torch.rand(2, 3, 64, 64)}
    figure = draw_alike(images, prompt, READER)
    assert [o.get_ylabel() for o in figure.axes] == ["base", "", "trained", ""]
    for ax in figure.axes:
        assert ax.get_xlabel() == f"{tick} on white" and [o.get_text() for o in ax.texts] == ["cat"]
        box = ax.patches[0]
        assert (box.get_x(), box.get_y(), box.get_width()) == (16, 16, 32)

def test_larger_pictures_are_marked_at_their_own_scale():
    box = draw_alike({"base": torch.rand(1, 3, 128, 128)}, "a cat", READER).axes[0].patches[0]
    assert (box.get_x(), box.get_width()) == (32, 64)

def test_without_a_reader_any_prompt_is_painted_and_nothing_marked(policy):
    figure = Playground({"a": policy}, "three $unicorns$", n=2, widgets=False).show()
    assert not any(ax.patches or ax.texts or ax.get_xlabel() for ax in figure.axes)

def test_the_text_box_paints_or_says_why_not(policy):
    play = Playground({"a": policy}, "a cat", n=2, reader=READER, widgets=True)
    assert play.show() is play.view
    first = play.image.value
    assert np.asarray(Image.open(io.BytesIO(first))).std() > 0
    play.text.value = "a dog"
    second = play.image.value
    assert second != first and play.said.value == ""
    for asked, said in (("three <b>unicorns", "asks for no scene"), ("", "asks for nothing")):
        play.text.value = asked
        assert said in play.said.value and "<b>" not in play.said.value
        assert play.image.value == second and play.prompt == "a dog"
    play.noise.value = 7
    assert play.seed == 0  # what stands in the text box cannot be painted
    play.text.value = "a dog"
    assert play.seed == 7 and play.image.value != second and play.said.value == ""

def test_a_prompt_that_is_none_is_refused(policy):
    with pytest.raises(InputError, match="prompt"): paint_alike({"a": policy}, "a\0cat")
    with pytest.raises(InputError, match="asks for nothing"):
        Playground({"a": policy}, "", reader=READER, widgets=False).show()

def test_each_column_may_have_a_prompt_of_its_own(policy):
    prompts = ["a cat", "two cats", "a dog on white"]
    images = paint_alike({"a": policy}, prompts)
    assert len(images["a"]) == 3
    cat = paint_alike({"a": policy}, "a cat", 1)["a"]
    torch.testing.assert_close(images["a"][:1], cat, atol=1e-5, rtol=0)
    figure = draw_alike(images, prompts, READER)
    assert [o.get_title() for o in figure.axes] == prompts
    assert [o.get_xlabel()[0] for o in figure.axes] == ["✓", "✗", "✗"]
