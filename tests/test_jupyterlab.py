"""The live view in a real JupyterLab, clicked in a real browser: what a kernel's thread, the widgets' wire
and the page make of it."""
import json, os, re, subprocess, sys, time
import nbformat, pytest
from ddpo_nb.checkpoints import check_whole, checkpoints

TOKEN = "only-for-this-test"
CELL = """from ddpo_nb.dashboard import Dashboard
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import PromptSource
from ddpo_nb.trainer import make_config, make_trainer
def brightness(images, prompts, metadata): return images.mean((1, 2, 3)), {}
few = dict(num_epochs=1000, sample_num_steps=3, sample_batch_size=4, train_batch_size=4)
policy, prompts = StableDiffusionPolicy(load_pipeline()), PromptSource(["a cat on a blue background", "dog"])
t = make_trainer(make_config("ddpo-is", logdir="run", **few), brightness, prompts, policy)
Dashboard(t).start()"""

TASTE = """import torch
from ddpo_nb.taste import Pool, TasteWidget
images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
pool = Pool(images, ["left", "right"] * 6, list(range(12)), {})
mine = TasteWidget(pool, images.mean((2, 3)).numpy(), "clicks.jsonl")
mine.show()"""

def write_notebook(path, cell):
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3"))
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)], metadata=kernel), path)

def private(home):
    "Environment of a JupyterLab that knows nobody's settings, and asks neither a question nor the network"
    for name, value in {"notification": dict(fetchNews="false", checkForUpdates=False)}.items():
        file = home/f"settings/@jupyterlab/apputils-extension/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(value))
    return (
        os.environ
        | {f"JUPYTER_{o}_DIR": str(home / o.lower()) for o in ("CONFIG", "DATA", "RUNTIME")}
        | dict(JUPYTERLAB_SETTINGS_DIR=str(home / "settings"))
    )

@pytest.fixture
def lab(tmp_path):
    "The address of a JupyterLab on the loopback interface, in a folder that holds the notebooks"
    for name, cell in dict(board=CELL, taste=TASTE).items(): write_notebook(tmp_path/f"{name}.ipynb", cell)
    args, log = [
        f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={tmp_path}", "--ServerApp.port=0"
    ], tmp_path / ".lab.log"
    with log.open("w") as out:
        p = subprocess.Popen(
            [
                sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
                "--ServerApp.ip=127.0.0.1", *args
            ],
            cwd=tmp_path, env=private(tmp_path / ".jupyter"), stdout=out, stderr=out
        )
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())):
            assert p.poll() is None, log.read_text()
            time.sleep(0.05)
        yield found[0]
    finally:
        p.terminate()
        p.wait(60)

def run_the_cell(lab, browser, name):
    "A page with the notebook, whose cell was just run in a kernel of its own"
    from playwright.sync_api import expect
    page = browser.new_page(viewport=dict(width=1200, height=900))
    page.set_default_timeout(120_000)  # a cold start: JupyterLab's pages, the kernel, PyTorch
    # what is expected has a limit of its own, five seconds else, too few for a kernel on a busy
    # machine
    expect.set_options(timeout=120_000)
    page.goto(f"{lab}lab/tree/{name}.ipynb?token={TOKEN}")
    # the kernel's, in the status bar; a cell run before is lost (the toolbar's indicator says idle
    # even before there is a kernel)
    expect(page.get_by_role("button", name=re.compile("[|] Idle$"))).to_be_visible()
    page.locator(".jp-Notebook .cm-content").first.click()
    page.get_by_role("button", name=re.compile("^Run this cell")).click()
    return page

def test_watch_pause_go_on_and_stop(lab, browser, tmp_path):
    from playwright.sync_api import expect
    page = run_the_cell(lab, browser, "board")
    text, (curve, pictures) = page.locator(".widget-html-content").first, (
        page.locator("img.widget-image").nth(i) for i in (0, 1)
    )
    button = lambda name: page.get_by_role("button", name=name)
    says = lambda pattern: expect(text).to_have_text(re.compile(pattern))
    epoch = lambda: int(re.search(r"epoch (\d+)", text.inner_text())[1])

    says("^running: epoch [1-9].* of 1000, .* reward 0[.]")
    drawn, first = [o.screenshot() for o in (curve, pictures)], epoch()
    says(f"^running: epoch (?!{first} |{first + 1} )")
    assert all(a != b for a, b in zip(drawn, [o.screenshot() for o in (curve, pictures)]))
    if place := os.environ.get("SCREENSHOT"): page.screenshot(path=place)  # to look at

    button("Pause").click()
    says("^paused")
    page.wait_for_timeout(1000)
    held = epoch(), curve.screenshot()
    page.wait_for_timeout(1500)
    assert held == (epoch(), curve.screenshot())
    button("Go on").click()
    says(f"^running: epoch (?!{held[0]} )")

    button("Stop and save").click()
    says("^stopped")
    for name in ("Pause", "Stop and save"): expect(button(name)).to_be_disabled()
    saved = checkpoints(tmp_path/"run/checkpoints")[0]
    check_whole(saved)
    assert re.match(rf"checkpoint_{epoch()}(-|$)", saved.name) and text.inner_text().endswith(
        f"resume_from='run/checkpoints/{saved.name}'"
    )
    if place: page.screenshot(path=place.replace(".png", "-end.png"))
    page.close()

def test_choosing_with_keys(lab, browser, tmp_path):
    "← → ↓ choose once somebody has clicked into the widget, and JupyterLab does not take them for its own"
    from playwright.sync_api import expect
    page = run_the_cell(lab, browser, "taste")
    text = page.locator(".ddpo-taste .widget-html-content").first
    says = lambda pattern: expect(text).to_have_text(re.compile(pattern))
    says("^No clicks yet")
    page.get_by_role("button", name="this one").first.click()
    says("^1 click[.]")
    for n, key in enumerate(("ArrowRight", "ArrowDown", "ArrowLeft"), 2):
        page.keyboard.press(key)
        says(f"^{n} clicks[.]")
    page.locator(".ddpo-taste img.widget-image").first.click()   # a picture will do as well
    page.keyboard.press("ArrowRight")
    says("^5 clicks[.]")
    page.keyboard.press("Control+ArrowDown")                     # this is not ours
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    says("^6 clicks[.]")
    if place := os.environ.get("SCREENSHOT"): page.screenshot(path=place.replace(".png", "-taste.png"))
    lines = [json.loads(o) for o in (tmp_path/"clicks.jsonl").read_text().splitlines()]
    assert [o["choice"] for o in lines[1:]] == ["a", "b", "tie", "a", "b", "b"]
    page.close()
