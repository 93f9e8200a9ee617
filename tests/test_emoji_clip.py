"The bundled CLIP: what it was trained on, its loss, and what it can do on scenes that it never saw."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers.models.clip.modeling_clip import image_text_contrastive_loss
from ddpo_nb import emoji_clip as E
from ddpo_nb.clip import load_embedder
from ddpo_nb.emoji_sd import COLOUR_NAMES, NOUNS

def test_held_out_pairs_are_never_shown():
    seen = {
        p
        for s in range(30)
        for p in zip(*(o.tolist() for o in E.batch(np.random.default_rng(s), nouns=10)[1:]))
    }
    assert not any(E.held_out(*p) for p in seen) and len(seen) > 300

def test_every_noun_and_every_colour_is_shown():
    kept = [p for p in E.PAIRS if not E.held_out(*p)]
    assert (
        {n for n, _ in kept} == set(range(len(NOUNS)))
        and {c for _, c in kept} == set(range(len(COLOUR_NAMES)))
        and len(E.PAIRS) - len(kept) == 92
    )

def test_a_batch_has_distinct_pairs_and_comes_from_its_generator():
    x, n, c = E.batch(np.random.default_rng(3), nouns=6)
    again = E.batch(np.random.default_rng(3), nouns=6)
    assert x.shape == (12, 3, 64, 64) and len({*zip(n, c)}) == 12 and torch.equal(x, again[0])

@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_with_one_truth_a_picture_the_loss_is_clips(n, seed):
    logits = torch.randn(n, n, generator=torch.Generator().manual_seed(seed)) * 5
    torch.testing.assert_close(
        E.contrastive_loss(logits, torch.eye(n)), image_text_contrastive_loss(logits.T)
    )

@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 6)), min_size=1, max_size=8))
def test_what_a_caption_is_true_of(items):
    n, c, p = map(list, zip(*items))
    M = E.matches(n, c, torch.tensor(p))
    for i, (noun, colour, _) in enumerate(items):
        for j, (said_noun, said_colour, pattern) in enumerate(items):
            assert M[i, j] == (
                noun == said_noun and (colour == said_colour or "{c}" not in E._patterns[pattern])
            )
    assert M.diag().all()

def test_the_loss_is_least_where_all_that_is_true_is_nearest():
    M = E.matches([1, 1, 2], [0, 1, 0], torch.tensor([2, 0, 2]))
    right, wrong = 20. * M.float(), 20. * (~M).float()
    assert E.contrastive_loss(right, M) < 0.5 < E.contrastive_loss(wrong, M)

def test_softened_scenes_stay_scenes():
    x, *_ = E.batch(np.random.default_rng(0), nouns=4)
    y = E.soften(x, np.random.default_rng(1))
    assert (
        y.shape == x.shape
        and y.abs().max() <= 1
        and 0 < (x - y).abs().mean() < 0.2
        and torch.equal(y, E.soften(x, np.random.default_rng(1)))
    )

def test_pixels_are_what_the_processor_makes():
    from ddpo_nb.rewards import to_uint8
    x, *_ = E.batch(np.random.default_rng(0), nouns=2)
    processor = E.build_image_processor()
    torch.testing.assert_close(
        E.pixels(x, processor),
        processor(images=list(to_uint8((x + 1) / 2)), return_tensors="pt").pixel_values,
        atol=1e-4, rtol=0
    )

def test_it_finds_the_caption_of_scenes_it_never_saw():
    embedder = load_embedder()
    for pairs in (E.PAIRS[::4], [p for p in E.PAIRS if E.held_out(*p)]):
        assert min(E.retrieval(embedder, *E.unseen_scenes(seed=5, pairs=pairs))) >= 0.98

@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole, real = E.train_clip(tmp_path/"whole", 3), E.batch
    def dies(rng, **kw):
        dies.left -= 1
        if dies.left < 0: raise KeyboardInterrupt
        return real(rng, **kw)
    dies.left = 2
    monkeypatch.setattr(E, "batch", dies)
    with pytest.raises(KeyboardInterrupt): E.train_clip(tmp_path/"cut", 3, save_every=2)
    monkeypatch.setattr(E, "batch", real)
    again = E.train_clip(tmp_path/"cut", 3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values())
    )
    E.save_clip(again, tmp_path/"clip")
    assert load_embedder(str(tmp_path/"clip")).texts(["a cat"]).shape == (1, 128)

def test_without_the_font_it_says_so(tmp_path, capsys):
    assert E.main(["--output", str(tmp_path/"x"), "--font", "/no/such/font.ttf"]) == 2
    assert "--font" in capsys.readouterr().err and not (tmp_path/"x").exists()
