"""The aesthetic predictor: votes read and learnt, pictures embedded once, and every slip on the way to a
score noticed."""
import json
import os
import shutil
import struct
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import TOKEN, Repo, Server
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr, wasserstein_distance
from transformers import (AutoImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig,
                          SiglipImageProcessor, SiglipModel)
from transformers.activations import ACT2FN

import ddpo_nb.aesthetic as A
from ddpo_nb.aesthetic import (EMOJI_HEAD, LAION_HEAD, LAION_SCORES, OPENAI_L14, AestheticHead,
                               AestheticReward, CalibrationError, aesthetic, agreement, cache_key, calibrate,
                               calibration_pictures, check_head, check_pixels, check_published,
                               check_settings, clip_pixels, crowd, embed, embed_files, emd, emd_loss,
                               find_images, fixed_vectors, held_out, hidden_preference, load_head, read_ava,
                               render_ava, save_head, train_aesthetic, train_head)
from ddpo_nb.checkpoints import CheckpointError
from ddpo_nb.cli import main
from ddpo_nb.clip import Embedder, load_embedder
from ddpo_nb.policy import ModelError
from ddpo_nb.prompts import InputError
from ddpo_nb.rewards import get_reward

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
needs_font = pytest.mark.skipif(not FONT.exists(), reason="needs Noto Color Emoji")
LINE = "1 953619 0 1 5 17 38 36 15 6 5 1 1 22 1396"   # in AVA's format

def load(folder):
    return torch.cat(
        [A._pixels(Image.open(folder / f"{i}.jpg")) for i in read_ava(folder.parent / "AVA.txt").ids]
    )
def units(n, dim=128, seed=0):
    return torch.nn.functional.normalize(
        torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1
    )
def some_votes(n, seed=0): return np.random.default_rng(seed).integers(0, 40, (n, 10)) + 1

@pytest.fixture(scope="module")
def embedder(): return load_embedder()

@pytest.fixture(scope="module")
def ava(tmp_path_factory): return render_ava(tmp_path_factory.mktemp("ava"), 700, seed=5)

@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    "Scenes of pairs of noun and colour that no head here was trained on, nor its CLIP"
    return load(render_ava(tmp_path_factory.mktemp("exam"), 120, seed=77, unseen=True)[1])

@pytest.fixture
def few(tmp_path):
    "Thirty rated pictures of unlike sizes, without a font; one is missing, three are broken"
    rng, folder = np.random.default_rng(0), tmp_path/"pictures"
    folder.mkdir()
    lines = []
    for i in range(30):
        size = (40 + 3*i, 90 - i)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            folder / f"{500 + i}.{('jpg', 'jpeg', 'png', 'JPG')[i % 4]}"
        )
        lines.append(" ".join(map(str, [i + 1, 500 + i, *rng.integers(1, 30, 10), 0, 0, 0])))
    (folder/"500.jpg").unlink()
    (folder/"502.png").write_bytes((folder/"502.png").read_bytes()[:200])
    (folder/"504.jpg").write_bytes((folder/"504.jpg").read_bytes()[:700])
    (folder/"506.png").write_bytes(b"")
    (tmp_path/"AVA.txt").write_text("\n".join(lines) + "\n")
    return tmp_path/"AVA.txt", folder

# The format

def test_ava_is_read(tmp_path):
    (tmp_path/"AVA.txt").write_text(f"\ufeff{LINE}\n\n2 7 1 0 0 0 0 0 0 0 0 1 0 0 3\r\n", encoding="utf-8")
    r = read_ava(tmp_path/"AVA.txt")
    assert r.ids.tolist() == [953619, 7] and r.votes.tolist() == [
        [0, 1, 5, 17, 38, 36, 15, 6, 5, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    ]
    assert (
        r.means.tolist()
        == pytest.approx([sum(v * n for v, n in enumerate([0, 1, 5, 17, 38, 36, 15, 6, 5, 1], 1)) / 124, 5.5])
        and len(r) == 2
    )

@pytest.mark.parametrize(
    "line,says",
    [
        ("2 3 4", "line 2 .* has 3 columns"), (LINE + " 1", "line 2 .* has 16 columns"),
        (LINE.replace("38", "3.8"), "line 2 .* '3.8'"), (LINE.replace("953619", "-4"), "line 2 .* '-4'"),
        ("2 8" + " 0" * 13, "line 2 .* no vote"), (LINE, "line 2 .* image 953619 again, after line 1"),
        (LINE.replace("953619", "9" * 40), "line 2 .* '9999"),
        (LINE.replace("38", "٣"), "line 2 .* whole number")
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, says):
    (tmp_path/"AVA.txt").write_text(f"{LINE}\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=says) as e: read_ava(tmp_path/"AVA.txt")
    assert "\n" not in str(e.value) and e.value.argument == "--ratings"

def test_a_file_that_is_none(tmp_path):
    (tmp_path/"empty").write_text("\n \n"); (tmp_path/"binary").write_bytes(b"\xff\xfe\x00")
    for name, says in dict(nowhere="No such file", empty="no ratings", binary="not text").items():
        with pytest.raises(InputError, match=says): read_ava(tmp_path/name)
    with pytest.raises(InputError, match="directory"): read_ava(tmp_path)

@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="0123456789 -.x\n\t", max_size=120))
def test_any_text_is_read_or_refused_in_one_line(tmp_path, text):
    (tmp_path/"f").write_text(text)
    try: r = read_ava(tmp_path/"f")
    except InputError as e: assert "\n" not in str(e)
    else: assert r.votes.shape == (len(r.ids), 10) and (r.votes.sum(1) > 0).all()

# The crowd

def test_the_crowd_by_its_formula():
    picture = torch.full((1, 3, 64, 64), .0) + torch.tensor([.9, .5, .4])[:, None, None]
    picture[..., 16:48, 16:48] = torch.tensor([0., .2, 1.])[:, None, None]
    difference, share = (.9**2 + .3**2 + .6**2)**.5, (32/64)**2
    tau = 5.5 + 4*.5 + 8*(difference*share - .22) + 3*(1.*share + .5*(1 - share) - .36)
    assert A.taste(picture).item() == pytest.approx(min(tau, 9.5), abs=1e-5) and 1.5 < tau < 9.5
    camp = lambda c: (lambda p: p/p.sum())(np.exp(-(np.arange(1, 11) - c)**2/2.88))
    expected = .8*camp(tau) + .2*camp(tau - 4)
    np.testing.assert_allclose(crowd(picture)[0], expected, atol=1e-6)
    assert hidden_preference(picture).item() == pytest.approx(expected @ np.arange(1, 11), abs=1e-5)

@needs_font
def test_rendered_sets_are_ava_and_keep_pairs_apart(tmp_path):
    seen, unseen = (render_ava(tmp_path/str(u), 60, seed=3, unseen=u) for u in (False, True))
    pairs = [{tuple(line.split()[12:14]) for line in r.read_text().splitlines()} for r, _ in (seen, unseen)]
    assert not pairs[0] & pairs[1]
    r = read_ava(seen[0])
    assert (
        len(find_images(seen[1], r.ids)) == 60
        and (r.votes.sum(1) >= 78).all()
        and (r.votes.sum(1) < 550).all()
    )
    render_ava(tmp_path/"again", 60, seed=3)
    assert (tmp_path/"again/AVA.txt").read_bytes() == seen[0].read_bytes()

# The losses

rows = (
    st.lists(st.lists(st.floats(0.01, 10), min_size=10, max_size=10), min_size=2, max_size=2)
    .map(lambda v: torch.tensor(v, dtype=torch.float64))
    .map(lambda v: v / v.sum(1, keepdim=True))
)

@settings(max_examples=60, deadline=None)
@given(rows)
def test_emd_by_independent_computations(v):
    p, q = v
    assert 10 * emd(p[None], q[None], r=1).item() == pytest.approx(
        wasserstein_distance(range(1, 11), range(1, 11), p, q), abs=1e-9
    )
    total = sum((sum(p[:k+1]).item() - sum(q[:k+1]).item())**2 for k in range(10))
    assert emd(p[None], q[None]).item() == pytest.approx((total/10)**.5, abs=1e-9)
    assert emd_loss(v, v.flip(0)).item() == pytest.approx(total/10, abs=1e-9)
    assert emd(p[None], p[None]).item() == 0 and emd(p[None], q[None]).item() == pytest.approx(
        emd(q[None], p[None]).item()
    )

def test_emd_knows_the_order_and_the_loss_has_a_slope_of_zero_at_the_truth():
    one = lambda k: torch.nn.functional.one_hot(torch.tensor([k]), 10).double()
    assert [round(10*emd(one(0), one(k), r=1).item()) for k in range(10)] == [*range(10)]
    p = torch.full((1, 10), .1, requires_grad=True)
    emd_loss(p, p.detach()).backward()
    assert (p.grad == 0).all()

def test_agreement_is_scipys():
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    assert agreement(a, b) == pytest.approx(
        dict(mse=((a - b) ** 2).mean(), spearman=spearmanr(a, b)[0], pearson=pearsonr(a, b)[0])
    )
    # nothing to correlate, and no warning
    assert agreement(np.ones(5), np.arange(5.)) == dict(mse=3, spearman=0, pearson=0)

# The head

@pytest.mark.parametrize("kind", ["votes", "mean"])
def test_scores_by_their_formula(kind):
    head, u = AestheticHead(kind, 12, 7).eval(), units(5, 12)
    head.shift.fill_(.1); head.spread.fill_(2.)
    first, last = head.layers[0], head.layers[-1]
    z = ((u - .1)/2).double() @ first.weight.double().T + first.bias.double()
    out = (z*(1 + torch.erf(z/2**.5))/2) @ last.weight.double().T + last.bias.double()
    expected = (
        out[:, 0]
        if kind == "mean"
        else out.exp() / out.exp().sum(1, keepdim=True) @ torch.arange(1.0, 11.0).double()
    )
    torch.testing.assert_close(head.score(u).double(), expected, atol=1e-5, rtol=1e-5)
    if kind == "mean":
        with pytest.raises(ValueError, match="mean vote alone"): head.votes(u)

@pytest.mark.parametrize(
    "change,says",
    [
        (lambda u: 15 * u, "length 15 "), (lambda u: u * 0.9, "length 0.9 "),
        (lambda u: u * float("nan"), "length nan"), (lambda u: u[:, :5], r"12 numbers .* \(5,\)"),
        (lambda u: torch.cat([u, 3 * u[:1]]), "length 3 ")
    ],
)
@pytest.mark.parametrize("kind", ["votes", "mean"])
def test_a_head_refuses_vectors_it_was_not_made_for(kind, change, says):
    with pytest.raises(CalibrationError, match=says):
        AestheticHead(kind, 12, 7).eval().score(change(units(4, 12)))

def test_unknown_kinds_and_losses():
    with pytest.raises(ValueError, match="votes, mean or linear"): AestheticHead("cubic")
    with pytest.raises(ValueError, match="emd or mse"): train_head(units(4), some_votes(4), loss="l1")

# Training

@pytest.mark.parametrize("loss", ["emd", "mse"])
def test_training_stopped_anywhere_ends_with_the_same_bits(loss, tmp_path, monkeypatch):
    u, votes, keep = units(90), some_votes(90), A._keep
    state = torch.get_rng_state()
    whole = train_head(u, votes, loss, epochs=6, batch_size=32, seed=3, progress=False).state_dict()
    assert torch.equal(torch.get_rng_state(), state)   # nobody else's random numbers are touched
    def stop(home, epoch, **parts):
        keep(home, epoch, **parts)
        if epoch in (1, 4): raise KeyboardInterrupt
    monkeypatch.setattr(A, "_keep", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_head(u, votes, loss, epochs=6, batch_size=32, seed=3, home=tmp_path, progress=False)
    again = train_head(
        u, votes, loss, epochs=6, batch_size=32, seed=3, home=tmp_path, progress=False
    ).state_dict()
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    other = train_head(u, votes, loss, epochs=6, batch_size=32, seed=4, progress=False).state_dict()
    assert not torch.equal(whole["layers.0.weight"], other["layers.0.weight"])

def test_votes_that_divide_are_learnt_as_such():
    u = units(2)[torch.arange(64) % 2]
    # the mean is 5.5 in both
    votes = np.array([[0, 0, 40, 0, 0, 0, 0, 40, 0, 0], [0, 0, 0, 0, 40, 40, 0, 0, 0, 0]])[np.arange(64) % 2]
    p = train_head(u, votes, epochs=150, progress=False).votes(units(2))
    assert (p[0, [2, 7]] > .3).all() and (p[1, [4, 5]] > .3).all()
    torch.testing.assert_close(p @ A.VOTES, torch.tensor([5.5, 5.5]), atol=.2, rtol=0)

def test_the_choice_of_held_out_pictures_depends_on_the_id_alone():
    ids = np.arange(3000)
    chosen = held_out(ids, .1)
    assert (held_out(ids[::-1], 0.1)[::-1] == chosen).all() and held_out(ids[500:], 0.1).tolist() == chosen[
        500:
    ].tolist()
    assert (
        abs(chosen.mean() - 0.1) < 0.02
        and (held_out(ids, 0.1, seed=1) != chosen).any()
        and (held_out(ids, 0.3) >= chosen).all()
    )

# Pictures

def test_missing_and_broken_pictures_are_reported_and_skipped(few, embedder, tmp_path):
    rated = read_ava(few[0])
    paths = find_images(few[1], rated.ids)
    assert [*paths] == list(range(501, 530))
    ids, vectors, broken = embed_files(embedder, paths, tmp_path/"cache", progress=False)
    assert {*broken} == {"502", "504", "506"} and not [
        w for w in broken.values() if "\n" in w or str(tmp_path) in w
    ]
    assert ids.tolist() == [i for i in range(501, 530) if str(i) not in broken]
    i = ids.tolist().index(513)
    torch.testing.assert_close(
        vectors[i : i + 1], embedder.images(A._pixels(Image.open(paths[513]))), atol=1e-5, rtol=1e-5
    )

def test_embedding_goes_on_where_it_was_stopped_and_is_done_once(few, embedder, tmp_path, monkeypatch):
    paths, chunks, real = find_images(few[1], read_ava(few[0]).ids), [], A._embed_chunk
    whole = embed_files(embedder, paths, tmp_path/"a", progress=False)
    def slow(embedder, chunk):
        if len(chunks) == 2: chunks.append("stop"); raise KeyboardInterrupt
        chunks.append(len(chunk))
        return real(embedder, chunk)
    monkeypatch.setattr(A, "_embed_chunk", slow)
    with pytest.raises(KeyboardInterrupt): embed_files(embedder, paths, tmp_path/"b", chunk=8, progress=False)
    part = sorted((tmp_path/"b").rglob("*-8.safetensors"))[1]
    part.write_bytes(part.read_bytes()[:-9])   # half written by a machine that went down
    again = embed_files(embedder, paths, tmp_path/"b", chunk=8, progress=False)
    assert chunks == [8, 8, "stop", 8, 8, 5]   # 0 was kept; 1 was damaged; 2 and 3 were to do
    torch.testing.assert_close(again[1], whole[1], atol=1e-6, rtol=1e-6)
    assert torch.equal(again[0], whole[0]) and again[2] == whole[2]
    assert [o.suffix for o in (tmp_path/"b").iterdir()] == [".safetensors"]
    embed_files(embedder, paths, tmp_path/"b", chunk=8, progress=False)
    assert len(chunks) == 6

def test_the_cache_knows_what_it_was_computed_from(few, embedder):
    paths = find_images(few[1], read_ava(few[0]).ids)
    keys = [cache_key(embedder, paths), cache_key(embedder, dict([*paths.items()][1:]))]
    other = load_embedder(); other.image_processor.resample = 2
    keys.append(cache_key(other, paths))
    other = load_embedder(); other.model.vision_model.post_layernorm.bias[0] += 1
    keys.append(cache_key(other, paths))
    paths[501].write_bytes(paths[501].read_bytes() + b" ")
    keys.append(cache_key(embedder, paths))
    assert len({*keys}) == 5 and cache_key(load_embedder(), paths) == keys[-1]

def test_folders_without_pictures(tmp_path):
    with pytest.raises(InputError, match="cannot read the folder"): find_images(tmp_path/"nowhere", [1])
    with pytest.raises(InputError, match="none of the 2 .* 1.jpg"): find_images(tmp_path, [1, 2])

# What people's folders hold

def corners(image): return [image.getpixel(o) for o in ((0, 0), (image.width - 1, 0), (0, image.height - 1))]

def near(a, b, eps=12): return all(abs(x - y) <= eps for x, y in zip(a, b))

@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side", [None, 8])
def test_a_picture_is_seen_as_its_camera_was_held(tmp_path, orientation, side):
    """Red, green and blue corners of the scene come back to their places from each of the eight ways to
    store it"""
    scene = Image.new("RGB", (96, 64), "white")
    for box, colour in {(0, 0, 48, 32): "red", (48, 0, 96, 32): "lime", (0, 32, 48, 64): "blue"}.items():
        scene.paste(colour, box)
    stored = [
        None,
        *(
            [Image.Transpose.FLIP_LEFT_RIGHT], [Image.Transpose.ROTATE_180],
            [Image.Transpose.FLIP_TOP_BOTTOM], [Image.Transpose.TRANSPOSE], [Image.Transpose.ROTATE_90],
            [Image.Transpose.TRANSVERSE], [Image.Transpose.ROTATE_270]
        ),
    ][orientation - 1]
    exif = Image.Exif(); exif[0x0112] = orientation
    (scene.transpose(stored[0]) if stored else scene).save(tmp_path/"1.jpg", exif=exif, quality=95)
    found = A.read_picture(tmp_path/"1.jpg", side)
    assert found.size == ((96, 64) if side is None else (48, 32)) and all(
        map(near, corners(found), [(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    )

def grey16(mode="I;16"):
    return (
        Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16))
        if mode == "I;16"
        else Image.fromarray(np.arange(64 * 64, dtype=np.int32).reshape(64, 64) * 16)
    )

def palette(alpha):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255]); image.paste(0, (0, 0, 4, 8))
    image.info["transparency"] = alpha
    return image

CLEAR = Image.new("RGBA", (8, 8), (0, 0, 0, 0)); CLEAR.paste((0, 0, 255, 255), (4, 0, 8, 8))
HALF = Image.new("LA", (8, 8), (0, 128))

@pytest.mark.parametrize(
    "name,image,left,right,kwargs",
    [
        ("1.png", CLEAR, (255, 255, 255), (0, 0, 255), {}),
        ("1.webp", CLEAR, (255, 255, 255), (0, 0, 255), dict(lossless=True)),
        ("1.png", HALF, (127, 127, 127), (127, 127, 127), {}),
        ("1.png", palette(0), (255, 255, 255), (0, 0, 255), {}),
        ("1.png", palette(bytes([0, 255])), (255, 255, 255), (0, 0, 255), {}),
        ("1.gif", palette(0), (255, 255, 255), (0, 0, 255), {}),
        ("1.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0), (255, 0, 0), dict(quality=95)),
        ("1.png", Image.new("1", (8, 8), 1), (255, 255, 255), (255, 255, 255), {}),
        (
            "1.png", Image.new("RGB", (8, 8), "red"), (255, 255, 255), (255, 255, 255),
            dict(transparency=(255, 0, 0))
        ),
        ("1.jpg", Image.new("L", (8, 8), 99), (99,) * 3, (99,) * 3, {}),
    ],
)
def test_a_picture_is_what_a_viewer_shows(tmp_path, name, image, left, right, kwargs):
    image.save(tmp_path/name, **kwargs)
    for side in (None, 1):
        found = A.read_picture(tmp_path/name, side)
        assert (
            found.mode == "RGB"
            and near(found.getpixel((0, 0)), left)
            and near(found.getpixel((found.width - 1, 0)), right)
        )

@pytest.mark.parametrize("name,mode", [("1.png", "I;16"), ("1.tif", "I;16"), ("1.tif", "I")])
def test_greys_of_16_bits_keep_their_order(tmp_path, name, mode):
    grey16(mode).save(tmp_path/name)
    values = np.asarray(A.read_picture(tmp_path/name))[..., 0].ravel()
    assert (
        values[0] == 0
        and values[-1] == 255
        and (np.diff(values.astype(int)) >= 0).all()
        and len({*values}) == 256
    )

def test_a_moving_picture_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), o) for o in ("red", "blue", "lime")]
    frames[0].save(tmp_path/"1.gif", save_all=True, append_images=frames[1:], duration=50, loop=0)
    (tmp_path/"1.gif").rename(tmp_path/"1.png")   # whatever its name says
    frames[0].save(tmp_path/"2.png", save_all=True, append_images=frames[1:], duration=50)
    assert all(near(A.read_picture(tmp_path/f"{i}.png").getpixel((0, 0)), (255, 0, 0)) for i in (1, 2))

def test_what_is_no_picture_is_left_out_with_its_reason(tmp_path, embedder, monkeypatch, recwarn):
    "And nothing waits for a pipe"
    folder = tmp_path/"pictures"; folder.mkdir()
    good = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    for name in ("1.jpg", "5.jpg", "6.png"): good.save(folder/name)
    (folder/"2.jpg").symlink_to(tmp_path/"nowhere.jpg")
    os.mkfifo(folder/"3.jpg")
    (folder/"4.png").mkdir()
    for name in ("5.jpg", "6.png"): (folder/name).write_bytes((folder/name).read_bytes()[:500])
    (folder/"7.jpg").touch()
    (folder/"8.png").write_text("<svg/>")
    chunk = (
        lambda kind, data: struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
    )
    # would be 2.7 GB
    (folder / "9.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(9999)))
    )
    Image.fromarray(np.full((9, 9), .5, dtype=np.float32)).save(folder/"10.tif")
    Image.fromarray(np.full((9, 9), 70_000, dtype=np.int32)).save(folder/"11.tif")
    (folder/"12.jpg").symlink_to(folder/"1.jpg")
    (folder/"13.jpg").symlink_to(folder/"13.jpg")
    paths = find_images(folder, range(1, 15))
    ids, vectors, broken = embed_files(embedder, paths, tmp_path/"cache", progress=False)
    assert ids.tolist() == [1, 12] and torch.equal(vectors[0], vectors[1])
    says = {
        2: "link to nothing", 3: "no plain file", 4: "folder", 5: "truncated", 6: "", 7: "cannot identify",
        8: "cannot identify", 9: "decompression bomb", 10: "fractions", 11: "70,000", 13: ""
    }
    assert {int(k) for k in broken} == {*says} and all(
        w in broken[str(i)].lower() for i, w in says.items()
    ), broken
    assert not [w for w in broken.values() if "\n" in w or not w or str(tmp_path) in w] and not [*recwarn]

def test_two_files_of_one_id_are_named(tmp_path):
    for name in ("1.png", "1.jpg", "2.png", "1.gif"): (tmp_path/name).touch()
    with pytest.warns(
        UserWarning, match="2 pictures have the id of another: 1.jpg is read, 1.(gif|png) is not"
    ):
        found = find_images(tmp_path, [1, 2])
    assert [o.name for o in found.values()] == ["1.jpg", "2.png"]

def test_memory_stays_flat_however_large_the_photographs(tmp_path, embedder, monkeypatch):
    "One decoded picture is alive at a time, and the network's processor is never given a large one"
    alive, most, sizes, real = set(), [], [], A.read_picture
    noise = Image.effect_noise((1200, 900), 60).convert("RGB")
    for i in range(1, 6): noise.save(tmp_path/f"{i}.{'jpg' if i % 2 else 'png'}")
    def watched(*args):
        most.append(len(alive))   # those of before that are still there
        picture = real(*args)
        alive.add(id(picture))
        weakref.finalize(picture, alive.discard, id(picture))
        sizes.append(picture.size)
        return picture
    monkeypatch.setattr(A, "read_picture", watched)
    ids, *_ = embed_files(embedder, find_images(tmp_path, range(1, 6)), tmp_path/"cache", progress=False)
    assert len(ids) == 5 and most == [0]*5 and all(256 <= min(o) < 512 for o in sizes)

@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_large_picture_is_embedded_as_in_full(tmp_path, embedder, suffix):
    y, x = np.mgrid[:900, :1300]
    Image.fromarray(
        np.stack([x * 255 // 1300, y * 255 // 900, (x // 100 + y // 100) % 2 * 255], -1).astype(np.uint8)
    ).save(tmp_path / f"1.{suffix}", **(dict(quality=95) if suffix == "jpg" else {}))
    small, full = (embed(embedder, [A.read_picture(tmp_path/f"1.{suffix}", side)]) for side in (64, None))
    assert A.angle(small, full).item() < 1

# Calibration

@pytest.fixture(scope="module")
def calibrated(embedder):
    head = train_head(
        embedder.images(torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))),
        some_votes(64), epochs=20, progress=False
    )
    head.calibration = calibrate(embedder, head)
    return head

def quick(e):
    for layer in e.model.vision_model.encoder.layers: layer.mlp.activation_fn = ACT2FN["quick_gelu"]
def processor(**settings): return lambda e: [setattr(e.image_processor, k, v) for k, v in settings.items()]
def swapped(e): e.images = lambda x: Embedder.images(e, x.flip(1))
def scaled(e): e.images = lambda x: Embedder.images(e, x*2 - 1)
def raw(e): e.images = lambda x: Embedder.images(e, x)*16

@pytest.mark.parametrize(
    "slip,says",
    [
        (quick, "turned by 0"), (processor(image_mean=[0.5] * 3, image_std=[0.5] * 3), "turned by"),
        (processor(resample=2), "turned by"),
        (processor(do_center_crop=False, size={"height": 64, "width": 64}), "turned by"),
        (processor(do_rescale=False), "turned by"), (swapped, "turned by"), (scaled, "turned by"),
        (raw, "length 16 ")
    ],
)
def test_every_slip_on_the_way_to_the_vectors_is_noticed(calibrated, slip, says):
    e = load_embedder()
    AestheticReward(e, calibrated)
    slip(e)
    with pytest.raises(CalibrationError, match=says) as err: AestheticReward(e, calibrated)
    assert "\n" not in str(err.value)

def test_rounding_is_forgiven(calibrated, embedder):
    e = load_embedder()
    e.images = lambda x: torch.nn.functional.normalize(Embedder.images(e, x).bfloat16().float(), dim=1)
    AestheticReward(e, calibrated)

def test_a_head_with_another_activation_is_noticed(calibrated, embedder):
    usual = calibrated.layers[1]
    calibrated.layers[1] = torch.nn.ReLU()
    try:
        with pytest.raises(CalibrationError, match="the head is not as it was made: it moved a score from"):
            AestheticReward(embedder, calibrated)
    finally:
        calibrated.layers[1] = usual
    AestheticReward(embedder, calibrated)

def test_broken_weights_are_noticed(calibrated, embedder):
    e = load_embedder(); e.model.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError): AestheticReward(e, calibrated)

def test_the_calibration_pictures_stay_what_they_are():
    x = calibration_pictures()
    assert x.shape == (4, 3, 72, 104) and x.min() >= 0 and x.max() <= 1
    assert x.double().mean((2, 3)).flatten()[:4].tolist() == pytest.approx(CALIBRATION_MEANS, abs=1e-4)

CALIBRATION_MEANS = [0.52019, 0.37653, 0.25049, 0.36824]

# Kept, and loaded

def test_a_head_comes_back_from_its_folder(calibrated, embedder, tmp_path):
    save_head(calibrated, tmp_path/"deep"/"head", embedder)
    assert sorted(o.name for o in (tmp_path / "deep" / "head").iterdir()) == sorted(A.HEAD_FILES) and [
        o.name for o in (tmp_path / "deep").iterdir()
    ] == ["head"]
    again = load_head(tmp_path/"deep"/"head")
    assert (
        torch.equal(again.score(units(3)), calibrated.score(units(3))) and again.config == calibrated.config
    )
    save_head(calibrated, tmp_path/"deep"/"head", embedder)   # in its place

def test_a_damaged_head_is_refused_in_one_line(calibrated, embedder, tmp_path):
    save_head(calibrated, tmp_path/"head", embedder)
    def broken(name, change):
        shutil.copytree(tmp_path/"head", folder := tmp_path/name, dirs_exist_ok=True)
        change(folder)
        with pytest.raises((ModelError, CalibrationError)) as e: load_head(folder)
        assert "\n" not in str(e.value)
        return str(e.value)
    assert "cannot load" in broken("a", lambda f: (f/"head.safetensors").write_bytes(b"x"*50))
    assert "config.json" in broken("b", lambda f: (f/"config.json").unlink())
    assert "cannot load" in broken(
        "c", lambda f: (f / "config.json").write_text(json.dumps(calibrated.config | dict(hidden=9)))
    )
    def bend(folder):
        from safetensors.torch import save_file
        tensors = load_file(folder / "head.safetensors")
        tensors["layers.3.bias"][9] += 3
        save_file(tensors, folder / "head.safetensors")
    assert "not as it was made" in broken("d", bend)
    with pytest.raises(ModelError, match="no such file or folder"): load_head("./nowhere")

def pth(tmp_path, seed=0, **changes):
    "A head of the published shape, random, as a .pth file"
    torch.manual_seed(seed)
    state = AestheticHead("linear", 768).state_dict() | changes
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path/"head.pth")
    return tmp_path/"head.pth", state

def collapse(state, vectors):
    "The published head's scores, by matrix products in float64"
    out = vectors.double().numpy()
    for i in (0, 2, 4, 6, 7):
        out = (
            out @ state[f"layers.{i}.weight"].double().numpy().T + state[f"layers.{i}.bias"].double().numpy()
        )
    return out[:, 0]

def test_the_published_shape_is_five_matrices(tmp_path, monkeypatch):
    path, state = pth(tmp_path)
    monkeypatch.setattr(A, "LAION_SCORES", collapse(state, fixed_vectors(768)).tolist())
    head, u = load_head(path), units(20, 768)
    np.testing.assert_allclose(head.score(u), collapse(state, u), atol=1e-5)

def test_another_head_of_the_published_shape_is_refused(tmp_path):
    with pytest.raises(CalibrationError, match="not as it was made"): load_head(pth(tmp_path)[0])

@pytest.mark.parametrize(
    "changes",
    [{"layers.7.bias": None}, {"layers.0.weight": torch.zeros(1024, 512)}, {"more": torch.zeros(1)}],
)
def test_the_published_file_is_read_strictly(tmp_path, changes):
    with pytest.raises(ModelError, match="tensors are not those"): load_head(pth(tmp_path, **changes)[0])

def test_a_program_in_disguise_is_not_run(tmp_path):
    class Trojan:
        def __reduce__(self): return (Path.touch, (tmp_path/"ran",))
    torch.save({"layers.0.weight": Trojan()}, tmp_path/"head.pth")
    with pytest.raises(ModelError): load_head(tmp_path/"head.pth")
    assert not (tmp_path/"ran").exists()

def test_the_real_published_head_if_it_is_here():
    """Set DDPO_NB_LAION_HEAD to the published file (sac+logos+ava1-l14-linearMSE.pth, or
    aesthetic-model.pth from the hub)"""
    if not (path := os.environ.get("DDPO_NB_LAION_HEAD")): pytest.skip("DDPO_NB_LAION_HEAD is not set")
    head, u = load_head(path), torch.cat([fixed_vectors(768), units(50, 768)])
    exact = collapse(torch.load(path, map_location="cpu", weights_only=True), u)
    np.testing.assert_allclose(head.score(u), exact, atol=1e-5)
    np.testing.assert_allclose(exact[:4], LAION_SCORES, atol=1e-5)
    assert (head(15*u)[:, 0] > 20).any()
    bent = AestheticHead("linear", 768).eval()
    bent.load_state_dict(head.state_dict())
    bent.layers[1] = torch.nn.ReLU()
    with pytest.raises(CalibrationError, match="not as it was made"):
        check_head(bent, head.calibration["vectors"], head.calibration["scores"])

@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub.constants as c
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"): monkeypatch.setattr(c, name, str(tmp_path/"cache"))
    with Server() as s:
        for name, value in dict(
            ENDPOINT=s.url,
            HUGGINGFACE_CO_URL_TEMPLATE=s.url + "/{repo_id}/resolve/{revision}/{filename}",
            HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True, HF_HUB_DISABLE_TELEMETRY=True,
            HF_HUB_DISABLE_PROGRESS_BARS=True
        ).items():
            monkeypatch.setattr(c, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield s

def test_heads_come_from_the_hub(hub, tmp_path, monkeypatch, calibrated, embedder):
    path, state = pth(tmp_path)
    hub.repos[LAION_HEAD] = Repo(False)
    hub.files(LAION_HEAD)["aesthetic-model.pth"] = path.read_bytes()
    monkeypatch.setattr(A, "LAION_SCORES", collapse(state, fixed_vectors(768)).tolist())
    assert load_head(LAION_HEAD).kind == "linear"
    save_head(calibrated, tmp_path/"head", embedder)
    hub.repos["ada/taste"] = Repo(False)
    hub.files("ada/taste").update({o.name: o.read_bytes() for o in (tmp_path/"head").iterdir()})
    assert torch.equal(load_head("ada/taste").score(units(2)), calibrated.score(units(2)))
    with pytest.raises(ModelError, match="cannot load 'ada/nothing'") as e: load_head("ada/nothing")
    assert "\n" not in str(e.value)

# The CLIP under the published head, in miniature: the same checks on a network of its settings and a
# fraction of its size

SMALL = dict(
    vision=OPENAI_L14["vision"] | dict(hidden_size=16, num_hidden_layers=1, patch_size=56),
    processor=OPENAI_L14["processor"],
)

@pytest.fixture
def l14():
    def make(act="quick_gelu", **settings):
        torch.manual_seed(0)
        vision = dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224,
            patch_size=56, hidden_act=act
        )
        text = dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20
        )
        return Embedder(
            CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)),
            CLIPImageProcessor(**settings), None, "l14"
        )
    return make

def test_the_published_clip_passes(l14):
    e, head = l14(), AestheticHead("linear", 768).eval()
    with torch.no_grad(): head.layers[-1].bias.fill_(5)
    check_published(e, head, SMALL)
    with torch.no_grad(): head.layers[-1].bias.fill_(50)
    with pytest.raises(CalibrationError, match="score from 4.* to 5|score from 5"):
        check_published(e, head, SMALL)

@pytest.mark.parametrize(
    "act,changes,says",
    [
        ("gelu", {}, "hidden_act = gelu.*quick_gelu"),
        ("quick_gelu", dict(image_mean=[0.5] * 3), "image_mean"),
        ("quick_gelu", dict(image_std=[0.5] * 3), "image_std"),
        ("quick_gelu", dict(do_center_crop=False), "do_center_crop = False"),
        ("quick_gelu", dict(resample=2), "resample = 2|resample"),
        ("quick_gelu", dict(do_rescale=False), "do_rescale"),
        ("quick_gelu", dict(size={"shortest_edge": 256}), "size = 256"),
        ("quick_gelu", dict(size={"height": 224, "width": 224}), "size = "),
        ("quick_gelu", dict(crop_size={"height": 200, "width": 200}), "crop_size = 200"),
    ],
)
def test_a_setting_that_is_not_as_published_is_named(l14, act, changes, says):
    with pytest.raises(CalibrationError, match=says): check_settings(l14(act, **changes), SMALL)
    check_settings(l14(), SMALL)

def test_the_old_form_of_the_published_settings_is_understood(l14, tmp_path):
    "Two plain numbers for the sizes, and nothing about rescaling: so they stand on the hub"
    old = dict(
        crop_size=224, do_center_crop=True, do_normalize=True, do_resize=True,
        feature_extractor_type="CLIPFeatureExtractor", resample=3, size=224,
        **{k: OPENAI_L14["processor"][k] for k in ("image_mean", "image_std")},
    )
    (tmp_path/"preprocessor_config.json").write_text(json.dumps(old))
    e = l14()
    e.image_processor = AutoImageProcessor.from_pretrained(tmp_path)
    check_settings(e, SMALL); check_pixels(e, SMALL)

@pytest.mark.parametrize(
    "slip",
    [
        swapped, scaled,
        lambda e: setattr(e, "images", lambda x: Embedder.images(e, x * 255)),
        lambda e: setattr(e, "images", lambda x: Embedder.images(e, x[..., ::2])),
    ],
)
def test_pixels_that_are_not_as_published_are_noticed(l14, slip):
    e = l14()
    check_pixels(e, SMALL)
    slip(e)
    with pytest.raises(CalibrationError, match="off by"): check_pixels(e, SMALL)

@pytest.mark.parametrize("size", [(72, 104), (300, 225), (224, 224)])
def test_our_preprocessing_is_transformers(l14, size):
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    theirs = CLIPImageProcessor()(
        images=[*(x * 255).round().byte().permute(0, 2, 3, 1).numpy()], return_tensors="pt"
    ).pixel_values
    assert (clip_pixels(x) - theirs).abs().mean() < .01

def test_siglip_serves_as_well(few, tmp_path):
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    e = Embedder(
        SiglipModel(
            SiglipConfig(
                text_config=small | dict(vocab_size=20),
                vision_config=small | dict(image_size=32, patch_size=16)
            )
        ),
        SiglipImageProcessor(size=dict(height=32, width=32)), None, "siglip"
    )
    rated = read_ava(few[0])
    ids, vectors, _ = embed_files(e, find_images(few[1], rated.ids), tmp_path/"cache", progress=False)
    head = train_head(vectors, rated.votes[:len(ids)], epochs=2, progress=False, clip="siglip")
    save_head(head, tmp_path/"head", e)
    assert AestheticReward(e, load_head(tmp_path / "head"))(torch.rand(2, 3, 40, 50), [""] * 2, [{}] * 2)[
        0
    ].shape == (2,)
    e.image_processor.image_std = [.1]*3
    with pytest.raises(CalibrationError, match="siglip does not see"):
        AestheticReward(e, load_head(tmp_path / "head"))

def test_a_disk_that_is_full_is_one_line(tmp_path, monkeypatch):
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(A, "save_state", full)
    with pytest.raises(CheckpointError, match="No space left"):
        train_head(units(20), some_votes(20), epochs=1, home=tmp_path, progress=False)

# The reward

def test_the_bundled_reward(embedder):
    reward = get_reward("aesthetic")
    assert load_head(EMOJI_HEAD).config["clip"] == "emoji-clip"
    assert sum(o.stat().st_size for o in (Path(A.__file__).parent/"weights"/EMOJI_HEAD).iterdir()) < 300_000
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores, info = reward(x, ["a"]*3, [{}]*3)
    assert (
        scores.shape == (3,)
        and scores.dtype == np.float64
        and (scores > 1).all()
        and (scores < 10).all()
        and info == {}
    )
    np.testing.assert_allclose(reward.to("cpu")(x[1:2], ["b"], [{}])[0], scores[1:2], atol=1e-4)
    for bad in (x*255, x*2 - 1):
        with pytest.raises(InputError, match="values from 0 to 1"): reward(bad, ["a"]*3, [{}]*3)

def test_other_models_get_the_published_head(monkeypatch):
    asked = []
    monkeypatch.setattr(
        A, "hf_hub_download",
        lambda repo, file: asked.append((repo, file)) or (_ for _ in ()).throw(OSError("no network")),
    )
    with pytest.raises(ModelError, match="trl-lib/ddpo-aesthetic-predictor.*no network"):
        aesthetic("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert asked == [(LAION_HEAD, "aesthetic-model.pth")]

@needs_font
def test_the_bundled_head_found_the_hidden_preference(exam):
    assert agreement(aesthetic()(exam, [""]*120, [{}]*120)[0], hidden_preference(exam))["spearman"] >= .95

# All of it, by the command

@needs_font
@pytest.mark.parametrize("loss", ["emd", "mse"])
def test_the_hidden_preference_is_found_from_votes_alone(
    loss, ava, exam, tmp_path, monkeypatch, capsys, shared_cache
):
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "train-aesthetic", "--ratings", str(ava[0]), "--images", str(ava[1]), "--output", "run",
                "--loss", loss, "--cache", str(shared_cache), "--no-progress"
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert all(w in out for w in ("mse", "spearman", "pearson", "run/head")) and (loss == "emd") == (
        "emd  " in out
    )
    scores = aesthetic(head="run/head")(exam, [""]*120, [{}]*120)[0]
    assert agreement(scores, hidden_preference(exam))["spearman"] >= .9

@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory): return tmp_path_factory.mktemp("cache")

def files(folder): return sorted(str(o.relative_to(folder)) for o in folder.rglob("*"))

@pytest.mark.parametrize(
    "change,words",
    [
        ("--ratings nowhere.txt", "--ratings nowhere.txt"), ("--ratings bad.txt", "--ratings line 3"),
        ("--images nowhere", "--images nowhere"), ("--images empty", "--images empty"),
        ("--clip ./nowhere", "--clip nowhere"), ("--loss l1", "--loss emd mse"),
        ("--epochs 0", "--epochs above"), ("--validation 1.5", "--validation share"), ("--seed -1", "--seed"),
        ("--output full", "--output full"), ("--resume --output none", "--resume none"),
        ("--validation 0.0001", "--validation examine"), ("--images torn", "--images read"),
        ("--output AVA.txt/x", "--output write")
    ],
)
def test_bad_input_is_answered_in_one_line_and_nothing_is_written(
    few, change, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    lines = few[0].read_text().splitlines()
    Path("bad.txt").write_text("\n".join([*lines[:2], "3 4 5"]))
    for name in ("empty", "full", "torn"): Path(name).mkdir()
    Path("full/thesis.tex").write_text("precious")
    for i in range(500, 530): Path(f"torn/{i}.jpg").write_bytes(b"\xff\xd8")
    before = files(tmp_path)
    given = dict(zip(("--ratings", "--images", "--output", "--epochs"), ("AVA.txt", "pictures", "out", "2")))
    words_given = change.split()
    if words_given[0] != "--resume": given.pop(words_given[0], None)
    else: given.pop("--output")
    status = main(
        ["train-aesthetic", *[w for pair in given.items() for w in pair], *words_given, "--no-progress"]
    )
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err, err
    assert [w for w in words.split() if w not in err] == [], err
    assert files(tmp_path) == before

def test_a_run_that_was_stopped_goes_on_to_the_same_bits(few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = [
        "train-aesthetic", "--ratings", "AVA.txt", "--images", "pictures", "--epochs", "4", "--validation",
        "0.3", "--no-progress", "--output"
    ]
    assert main([*line, "whole"]) == 0
    assert "4 pictures left out, such as 500: there is no such file" in capsys.readouterr().out
    assert {*json.loads(Path("whole/left_out.json").read_text())} == {"500", "502", "504", "506"}
    keep = A._keep
    def stop(home, epoch, **parts):
        keep(home, epoch, **parts)
        if epoch == 2: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(A, "_keep", stop)
        assert main([*line, "parts"]) == 130
    assert "--output parts --resume" in capsys.readouterr().err
    assert main([*line, "parts"]) == 2 and "--resume" in capsys.readouterr().err
    assert main([*line, "parts", "--resume", "--seed", "1"]) == 2 and "--seed" in capsys.readouterr().err
    assert main([*line, "parts", "--resume"]) == 0
    for name in ("head.safetensors", "calibration.safetensors", "config.json"):
        assert Path("whole/head", name).read_bytes() == Path("parts/head", name).read_bytes()
