"""The docs site: built by its one command, every link and picture of it there, and usable in a browser
without a network."""
import json
import os
import re
import subprocess
import sys
import threading
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from fastcore.nbio import dict2nb
from filelock import FileLock

root = Path(__file__).resolve().parents[1]
places = [o.relative_to(root/"nbs").with_suffix("") for o in (root/"nbs").rglob("*.ipynb")]
notebooks = sorted(o.as_posix() for o in places if not any(part[0] in "._" for part in o.parts))

@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of the built site: built once, whichever of pytest-xdist's processes asks first"
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: place = place.parent
    with FileLock(place/"docs.lock"):
        html = place/"docs/html"
        if not (html/"index.html").exists():
            env = os.environ | dict(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
            command = ["sh", root/"tools/docs.sh", place/"docs"]
            res = subprocess.run(command, env=env, capture_output=True, text=True)
            assert res.returncode == 0, (res.stdout + res.stderr)[-6000:]
            assert res.stdout.splitlines()[-1] == f"The site: {html}/index.html"
    return html

class Page(HTMLParser):
    "What a page fetches or links to, its anchors, its text, its cells' code and output, the links beside it"
    named = dict(a="href", link="href", img="src", script="src", source="src", iframe="src", form="action")

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.side, self.code, self.text, self.shown = [], set(), set(), [], [], []
        self.where = []  # what is open, for which it matters where one is
        self.feed(path.read_text(encoding="utf-8"))
        self.text, self.shown = "".join(self.text), "".join(self.shown)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if (address := attrs.get(self.named.get(tag))) is not None:
            self.links.append((tag, address))
            if "sidebar-tree" in self.where: self.side.add(address)
        kinds = (attrs.get("class") or "").split()
        if tag in ("div", "pre", "article"):
            known = [o for o in ("sidebar-tree", "cell_input", "cell_output") if o in kinds]
            self.where.append(known[0] if known else tag)
            if tag == "pre" and "cell_input" in self.where: self.code.append("")

    def handle_endtag(self, tag):
        if tag in ("div", "pre", "article") and self.where: self.where.pop()

    def handle_data(self, data):
        if "article" in self.where: self.text.append(data)
        if "cell_output" in self.where: self.shown.append(data)
        if self.where and self.where[-1] == "pre" and "cell_input" in self.where: self.code[-1] += data

page_of = cache(Page)

def flaw(site, page, tag, address):
    "What is wrong with a link of `page`; None if nothing is"
    parts = urlsplit(address)
    if parts.scheme in ("http", "https"): return None if tag == "a" else f"{tag} fetched from elsewhere"
    if parts.scheme == "data": return None
    if parts.scheme or parts.netloc: return "no address"
    target = (page.parent/unquote(parts.path)).resolve() if parts.path else page
    if not target.is_relative_to(site.resolve()): return "outside of the site"
    if not target.is_file(): return "not there"
    anchor = unquote(parts.fragment)
    if not anchor or target.suffix != ".html" or anchor in page_of(target).anchors: return None
    return f"no anchor {anchor}"

def test_no_dead_link_and_no_missing_picture(site):
    pages = [o.resolve() for o in site.rglob("*.html")]
    found = [(p, *o) for p in pages for o in page_of(p).links]
    flaws = [f"{p.name}: {o} {why}" for p, tag, o in found if (why := flaw(site, p, tag, o))]
    assert not flaws, "\n".join(flaws[:30])
    assert len(pages) > len(notebooks) and len(found) > 50 * len(notebooks)

def test_the_check_of_links_finds_what_it_looks_for(tmp_path):
    page = tmp_path/"a.html"
    page.write_text('<p id="here"></p>')
    bad = [("a", "b.html"), ("img", "x.png"), ("a", "#there"), ("a", "../../etc/passwd"),
           ("img", "https://a.b/c.png"), ("script", "//cdn.net/x.js"), ("a", "a.html#there")]
    good = [("a", "#here"), ("a", "a.html#here"), ("a", "https://a.b/c"), ("img", "data:image/png;base64,x")]
    assert [flaw(tmp_path, page, *o) is None for o in bad + good] == [False] * len(bad) + [True] * len(good)

def test_every_notebook_and_module_has_a_page_in_the_side_bar(site):
    import ddpo_nb
    listed = page_of(site/"index.html").side
    assert {f"{o}.html" for o in notebooks if o != "index"} <= listed
    modules = {o.stem for o in Path(ddpo_nb.__file__).parent.glob("[!_]*.py")}
    assert modules and {f"api/{o}.html" for o in modules} <= listed

def test_the_side_bar_tells_lessons_from_the_appendix(site):
    "Under the headings of the index, and in its order"
    from ddpo_nb.notebooks import course_parts
    cells = json.loads((root/"nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = course_parts("\n".join("".join(o["source"]) for o in cells if o["cell_type"] == "markdown"))
    bar = (site/"index.html").read_text(encoding="utf-8").partition('class="sidebar-tree"')[2]
    captions = re.split(r'<span class="caption-text">([^<]+)</span>', bar.partition("</aside>")[0])[1:]
    listed = {k: re.findall(r'href="([^"#]+)\.html"', v) for k, v in zip(captions[::2], captions[1::2])}
    assert [*listed] == [*parts] and len(parts) == 4
    reference = [*parts.pop("Reference"), "api/index"]  # under which all modules follow
    assert listed.pop("Reference")[:len(reference)] == reference
    assert listed == {k: [*v] for k, v in parts.items()}

def test_the_landing_page_begins_with_the_course(site):
    page = (site/"index.html").read_text(encoding="utf-8")
    page = page[page.index("<article"):page.index("</article>")]
    first = min(o for o in notebooks if o[0].isdigit())
    assert page.index(f'href="{first}.html"') < page.index("The notebooks") < page.index("Try it")
    assert page.index('href="course.html"') < page.index("The notebooks")
    assert "<details>" not in page[:page.index("Try it")]  # nobody has to unfold the list of notebooks
    assert page.index("<img") < page.index("The notebooks")

def test_pictures_are_described_in_words(site):
    "By their axes, by what draws them, by their section"
    drawn = {o: re.findall(r'<img alt="([^"]*)"', (site/f"{o}.html").read_text("utf-8")) for o in notebooks}
    assert sum(map(len, drawn.values())) > 80 and all(min(map(len, o), default=9) > 8 for o in drawn.values())
    assert "One dimension: log-density ℓ against x" in drawn["00_likelihood"]
    assert any("the untouched model" in o for o in drawn["tutorials/table"])

def test_llms_txt_names_every_page(site):
    text = (site/"llms.txt").read_text(encoding="utf-8")
    assert re.match(r"# ddpo_nb\n\n> .+\n\n.{200,}\n\n## ", text)
    links = set(re.findall(r"^- \[[^\]]+\]\(([^)]+)\)", text, re.M))
    pages = {o.relative_to(site).as_posix() for o in site.rglob("*.html")}
    assert links == pages - {"index.html", "search.html", "genindex.html", "py-modindex.html"}

@pytest.mark.parametrize("name", notebooks)
def test_a_page_shows_what_nbdev_lets_it(site, name):
    "No directive, nothing hidden; exported code is the lesson, and stays; nothing that needs a kernel"
    page = page_of((site/f"{name}.html").resolve())
    assert page.text and not [o for o in page.code if re.search(r"(?m)^#\|", o)]
    assert not re.search(r"interactive\(children|\x1b|Box\(children", page.shown)
    code = {o.strip() for o in page.code}
    for cell in json.loads((root/f"nbs/{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code": continue
        source = "".join(cell["source"])
        bare = re.sub(r"(?m)\A(\s*#\|.*\n?)+", "", source).strip()
        if bare and re.search(r"(?m)^#\| *export\b", source) and "#| hide" not in source: assert bare in code
        if bare and re.search(r"(?m)^#\| *hide$", source): assert bare not in code

def test_a_module_page_says_what_the_comments_say(site):
    from fastcore.docments import docments
    from ddpo_nb.likelihood import gaussian_log_prob
    from ddpo_nb.config import AlignPropConfig
    text = " ".join(page_of(site/"api/likelihood.html").text.split())
    said = {k: v for k, v in docments(gaussian_log_prob).items() if v}
    plain = lambda s: re.sub(r"[`*]", "", " ".join(s.split()))
    assert len(said) > 3 and all(plain(v) in text for v in said.values())
    assert plain(gaussian_log_prob.__doc__).split(".")[0] in text
    fields = " ".join(page_of(site/"api/config.html").text.split())
    for name in AlignPropConfig.__dataclass_fields__: assert name in fields
    assert "counted from 0, have no gradient" in fields  # a comment above or beside a field

# The pages' sources

@pytest.fixture(scope="module")
def pages(module_at): return module_at(root/"docs/pages.py")

def code_cell(source, *outputs):
    return dict(cell_type="code", source=source, outputs=[*outputs], metadata={}, execution_count=None)

def processed(pages, *cells):
    "Code cells as a page shows them"
    cells = [code_cell(o) if isinstance(o, str) else o for o in cells]
    nb = dict2nb(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5))
    pages.Lessons().nb_proc(nb).process()
    return nb.cells

def test_directives_become_what_sphinx_understands(pages):
    kept = processed(pages, "#| default_exp x", "#| hide\n1", "#| export\ndef f(): pass", "#| echo: false\n2",
                     "#| include: false\n3", "#| slow\n4", "#| code-fold: true\n5", "6\n7 #|hide_line")
    assert [o.source for o in kept] == ["def f(): pass", "2", "4", "5", "6"]
    assert [o.metadata.get("tags") for o in kept] == [None, ["remove-input"], None, ["hide-input"], None]

def test_widgets_and_terminal_codes(pages):
    live = "application/vnd.jupyter.widget-view+json"
    data = [{live: {}, "text/plain": ["interactive(children=())"]},
            {live: {}, "image/png": "x", "text/plain": ["Box"]},
            {live: {}, "text/plain": ["Loading:   0%|          | 0/9"]}, {"text/plain": ["100 %"]}]
    shown = [dict(output_type="display_data", data=o, metadata={}) for o in data]
    told = dict(output_type="stream", name="stderr", text=["\x1b[31mred\x1b[0m"])
    [cell] = processed(pages, code_cell("w", *shown, told))
    first, picture, plain, stream = cell.outputs
    assert "needs a running notebook" in first["data"]["text/markdown"] and "text/plain" not in first["data"]
    assert picture["data"] == {"image/png": "x"}
    assert plain["data"] == {"text/plain": "100 %"} and stream["text"] == "red"

def printed(text): return code_cell("p", dict(output_type="stream", name="stdout", text=[text]))

def test_sentences_are_told_from_a_table(pages):
    "What is aligned may not be broken, everything else may; so may the sentence above a table"
    texts = "It rose from 0.58 to 0.80.\n", "{'a': 1,\n 'b': 2}\n", "one\n" + "two " * 40 + "\n"
    tables = "a  1\nb  2\n", "a ─▶ b\n   ▲\n"
    cells = processed(pages, *map(printed, [*texts, *tables]), "x = 1")
    assert [o.metadata.get("tags") for o in cells] == [["wraps"]] * 3 + [None] * 3
    long = " ".join(["word"] * 60)
    [cell] = processed(pages, printed(f"{long}\na  1\n{'b' * 100}  {'2' * 30}\n"))
    *filled, one, two = cell.outputs[0]["text"].rstrip("\n").split("\n")
    assert " ".join(filled) == long and max(map(len, filled)) <= 110
    assert (one, two) == ("a  1", f"{'b' * 100}  {'2' * 30}")

def test_a_number_keeps_its_interval_and_its_unit(pages):
    hard = "\u00a0"
    text = "It is 0.806 ± 0.079 of 72 %, 5 %d ± σ;\n\n```\n1 ± 2 %\n```\n"
    kept = pages.outside_fences(pages.keep_numbers, text)
    assert kept == f"It is 0.806{hard}±{hard}0.079 of 72{hard}%, 5 %d ± σ;\n\n```\n1 ± 2 %\n```\n"
    html = dict(output_type="display_data", data={"text/html": ["<td>1 ± 2</td>"]}, metadata={})
    [cell] = processed(pages, code_cell("t", html))
    assert cell.outputs[0]["data"]["text/html"] == f"<td>1{hard}±{hard}2</td>"

def test_names_become_links_where_they_mean_one_thing(pages):
    link = lambda name, full: f"{{py:obj}}`{name} <{full}>`"
    step = link("ddim_step", "ddpo_nb.mdp.ddim_step")
    assert pages.link_names("see `ddim_step`, `nothing_of_ours`") == f"see {step}, `nothing_of_ours`"
    assert pages.link_names("`ddim_step()`") == link("ddim_step()", "ddpo_nb.mdp.ddim_step")
    for kept in ("# `ddim_step`", "[`ddim_step`](x.md)", "```\n`ddim_step`\n```", "``ddim_step``", "`load`"):
        assert pages.link_names(kept) == kept
    assert pages.link_names("`load`", "ddpo_nb.emoji_sd") == link("load", "ddpo_nb.emoji_sd.load")
    assert pages.link_names("`emoji_sd3.load`") == link("emoji_sd3.load", "ddpo_nb.emoji_sd3.load")

def test_a_class_says_whose_methods_it_has(pages):
    "The trainer's own are the loop; what saves, stops and resumes has a page of its own"
    from ddpo_nb import config, run, trainer
    told = pages.describe("DDPOTrainer", trainer.DDPOTrainer, trainer)
    for name in ("prepare.Prepared", "run.Run", "release.Releasable", "resume.Resumable", "trl.TrlTrainer"):
        assert f"<ddpo_nb.{name}>`" in told.partition("Inherits from ")[2].splitlines()[0]
    assert "Inherits" not in pages.describe("Run", run.Run, run)
    # a dataclass that is made of one of its own name
    assert "Inherits" not in pages.describe("DDPOConfig", config.DDPOConfig, config)

def test_links_of_a_notebook_hold_on_the_site(pages):
    assert pages.page_links("[a](07_rwr.ipynb) [b](../LICENSE) [c](https://x.y) [d](#e)", "08_ddpo") == (
        f"[a](07_rwr.ipynb) [b]({pages.repository}/LICENSE) [c](https://x.y) [d](#e)")
    assert pages.page_links("![p](images/curves.png)", "index") == "![p](images/curves.png)"
    with pytest.raises(ValueError, match="nbs/08_ddpo.ipynb links to 99_none.ipynb"):
        pages.page_links("[a](99_none.ipynb)", "08_ddpo")

def test_a_notebook_that_no_table_names_is_not_lost(pages, monkeypatch):
    index = pages.read_nb(root/"nbs/index.ipynb")
    index.cells[0].source = "# T\n\n> s\n\n## Lessons\n\n| a | |\n|---|---|\n| [1](07_rwr.ipynb) | x |"
    index.cells = index.cells[:1]
    monkeypatch.setattr(pages, "lessons", lambda: {"index": index, "07_rwr": index, "course": index})
    pages.course.cache_clear()
    assert pages.course() == {"Around the course": ["course"], "Lessons": ["07_rwr"]}
    pages.course.cache_clear()
    table = pages.as_list(index.cells[0].source)
    assert table.endswith("- **[07_rwr: T](07_rwr.ipynb)**\\\n  x")
    assert "|" not in table.partition("Lessons")[2]

# In a browser

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope="module")
def address(site):
    "The site below a folder, as GitHub serves it"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{site.name}/"
    server.shutdown()
    server.server_close()

@pytest.fixture
def tab(browser, address, request):
    "Open a page at a width; all that is asked for is noted, and has to come from this machine"
    width, scheme = request.param
    page = browser.new_page(viewport=dict(width=width, height=844), color_scheme=scheme)
    page.set_default_timeout(120_000)
    asked, failed = [], []
    page.on("request", lambda o: asked.append(o.url))
    page.on("response", lambda o: failed.append(o.url) if o.status >= 400 else None)
    # what a page that is left no longer needs is aborted
    page.on("requestfailed", lambda o: failed.append(o.url) if "ABORTED" not in (o.failure or "") else None)
    page.on("pageerror", lambda o: failed.append(str(o)))
    yield page
    assert asked and not [o for o in asked if not o.startswith((address, "data:", "blob:"))] and not failed
    page.close()

SEEN = ["index", "01_mdp", "08_ddpo", "10_compare", "tutorials/performance", "api/config"]
phone, desk = (390, "light"), (1280, "dark")

@pytest.mark.parametrize("tab", [phone, desk], indirect=True)
def test_pages_fit_their_window_and_formulas_are_seen(tab, address):
    width = tab.viewport_size["width"]
    formulas = 0
    for name in SEEN:
        tab.goto(f"{address}{name}.html", wait_until="load")
        tab.wait_for_function("!window.MathJax || MathJax.startup.promise.then(() => true)")
        wanted, drawn, wrong = tab.evaluate(
            "[document.querySelectorAll('.math').length, [...document.querySelectorAll('mjx-container')]"
            ".filter(o => o.getBoundingClientRect().height > 4 || o.closest('details')).length,"
            " document.querySelectorAll('mjx-merror').length]")
        assert drawn >= wanted and not wrong, name
        formulas += drawn
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, name
        # whoever writes within 110 characters, and prints a sentence, is read without scrolling
        cut = "[...document.querySelectorAll('{}')].filter(o => o.scrollWidth > o.clientWidth + 1).length"
        assert not tab.evaluate(cut.format(".tag_wraps .cell_output pre")), name
        if width > 1000: assert not tab.evaluate(cut.format(".cell_input pre")), name
        assert tab.evaluate("[...document.images].every(o => o.complete && o.naturalWidth)"), name
        # letters in a picture are as large as they were drawn: on a phone it scrolls in its box
        drawn = tab.evaluate("[...document.querySelectorAll('.cell_output .picture img')]"
                             ".map(o => [Math.min(o.naturalWidth, 960), o.clientWidth])")
        assert drawn or name.startswith(("index", "01", "tutorials", "api")), name
        if width < 400: assert all(shown >= own for own, shown in drawn), name
    assert formulas > 80

@pytest.mark.parametrize("tab", [phone, desk], indirect=True)
def test_search_finds_a_function_and_a_word(tab, address):
    for query, wanted in (("gaussian_log_prob", "likelihood"), ("over-optimisation", "overoptimisation")):
        tab.goto(f"{address}search.html?q={query}")
        tab.wait_for_selector(f"#search-results ul.search li a[href*='{wanted}']")
    if tab.viewport_size["width"] > 1000:  # the field beside every page leads there
        tab.goto(f"{address}01_mdp.html")
        tab.fill(".sidebar-search", "trajectory")
        tab.press(".sidebar-search", "Enter")
        tab.wait_for_selector("#search-results ul.search li a")

@pytest.mark.parametrize("tab", [(1280, "light"), (1280, "dark")], indirect=True)
def test_light_and_dark_follow_the_reader(tab, address):
    tab.goto(f"{address}01_mdp.html")
    def paper():
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))
    before = paper()
    assert (before < 200) == tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    toggle = tab.locator(".theme-toggle:visible").first
    toggle.click()  # from the system's choice to the other
    other = paper()
    toggle.click()
    assert (other < 200) != (before < 200) and paper() == before

# On GitHub

def test_workflows_use_the_commands_of_the_readme():
    readme = (root/"README.md").read_text(encoding="utf-8")
    jobs = lambda name: yaml.safe_load((root/f".github/workflows/{name}.yml").read_text())["jobs"].values()
    steps = lambda name: [o for job in jobs(name) for o in job["steps"]]
    runs = lambda name: "\n".join(o["run"] for o in steps(name) if "run" in o)
    assert ".ci/run" in runs("tests")  # which takes the command out of the README
    line = 'pip install -c constraints.txt -e ".[docs]" && sh tools/docs.sh'
    assert line in readme and line in runs("pages")
    assert [o for o in steps("pages") if o.get("with", {}).get("path") == "_docs/html"]
