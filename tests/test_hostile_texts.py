"""Every figure, page and table shows the words of others as they are: TeX's signs, Markdown's, HTML's, and
letters of no font."""
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from ddpo_nb import dashboard
from ddpo_nb.compare import BASE, Comparison, Evaluation, Table
from ddpo_nb.dashboard import Dashboard, draw_curve, draw_pictures, drawable, write
from ddpo_nb.hub import _code, _md, model_card
from ddpo_nb.taste import Pool, TasteWidget, draw_ranking

pytestmark = pytest.mark.usefixtures("small_unet")  # what the network draws is not looked at here

HOSTILE = [
    "$", "$x$", "costs 5$ or 6$", r"$\frac{$", "a_b^c \\alpha", "猫 と 犬", "🐈‍⬛ cat 👩‍🚀", "قطة כלב",
    "a|b`c`<b>&amp;</b>", "two\nlines\r\n\tand a tab", "\x1b[31mred\x07", "x" * 3000, "", "  ",
    "𝕬 𓀀 ﷽ \u200b\u202e", "'; DROP", "%s %(x)s {0} {", "<script>alert(1)</script>",
    "#| [a](b) ![c](d)",
    "- * 1. ```", "\\", "\ufffe", "é́́́"
]

@pytest.fixture(autouse=True)
def strict():
    "A missing glyph, or anything else that a library warns of, fails"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield

def picture(): return Image.new("RGB", (8, 8), "red")

def comparison(reward_name, prompts):
    "As if two runs were finished and a third was not"
    shown = [["seen", i, p] for i, p in enumerate(prompts)]
    def evaluation(name):
        return Evaluation(
            name, 0, {k: [0.1] * len(prompts) for k in ("seen", "unseen_animals")},
            {k: [0.2] * len(prompts) for k in ("seen", "unseen_animals")}, {p: 0.5 for p in prompts}, shown,
            [picture() for _ in prompts], 1.0
        )
    rows = [
        dict(
            algorithm=a, seed=0, reward=reward_name, epoch=e, queries=4 * e, reward_mean=float(e),
            reward_std=0.1, seconds_sampling=1.0, seconds_reward=1.0, seconds_training=1.0
        )
        for a in ("ddpo-is", "rwr")
        for e in (1, 2)
    ]
    settings = dict(
        model=reward_name, reward=reward_name, reward_name=reward_name, prompts=reward_name, queries=8,
        algorithms=["ddpo-is", "rwr"], seeds=[0], lora=True, notes=[reward_name],
        configs={a: dict(negative_prompts=reward_name) for a in ("ddpo-is", "rwr")},
        machine=reward_name, versions=reward_name, command=reward_name
    )
    return Comparison(settings, rows, {(n, 0): evaluation(n) for n in (BASE, "ddpo-is")})

def literal(fig):
    "No text of the figure is read as TeX, and all of it is drawn"
    fig.draw_without_rendering()
    bad = [t.get_text() for t in fig.findobj(Text) if "$" in t.get_text() and t.get_parse_math()]
    assert bad == []
    return [t.get_text() for t in fig.findobj(Text)]

def test_a_comparisons_figures_and_its_page(tmp_path):
    prompts = [p for p in HOSTILE if p.strip()]
    for name in prompts[::2]:
        c = comparison(name, prompts[:1])
        shown = literal(c.plot())
        assert any(" ".join(drawable(name)[0].split())[:20] in " ".join(o.split()) for o in shown), (
            name, shown
        )
    for name in ("<script>alert(1)</script>", HOSTILE[3], HOSTILE[8]):
        page = comparison(name, [name]).html()
        assert "<script>alert" not in page and "<b>&amp;" not in page
    c = comparison("reward", prompts)
    titles = [t for t in literal(c.gallery()) if t]
    assert "$x$" in titles and "costs 5$ or 6$" in titles and "$\\frac{$" in titles
    c.report(tmp_path/"report.html")
    assert str(c.table()) and c.table().markdown() and c.headline() and c.side_effects()

def test_the_dashboards_figures(monkeypatch):
    batch = torch.rand(len(HOSTILE), 3, 8, 8), HOSTILE, [{}] * len(HOSTILE), torch.zeros(len(HOSTILE)), {}
    figures = []
    monkeypatch.setattr(dashboard, "_png", lambda fig: figures.append(fig))
    draw_pictures(batch, most=len(HOSTILE))
    draw_curve([dict(queries=4, reward_mean=1., reward_q10=0., reward_q90=2.)])
    shown = [literal(f) for f in figures]
    assert "$x$" in shown[0] and "costs 5$ or 6$" in [" ".join(o.split()) for o in shown[0]]

def test_the_taste_widget():
    n = len(HOSTILE)
    pool = Pool(torch.rand(n, 3, 8, 8), HOSTILE, list(range(n)), {})
    seen = np.random.default_rng(0).normal(size=(n, 4))
    t = TasteWidget(pool, seen, widgets=True, same_prompt=False)
    for _ in range(3): t.choose("a")
    assert all("<b>" not in o.value and "<script>" not in o.value for o in t.names)
    assert draw_ranking(pool.images, np.zeros(n), np.ones(n))

@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_figure_is_given_has_a_picture(text):
    shown, families = drawable(text)
    assert families or not dashboard._lacks(None, [c for c in shown if c != "\n"])
    kept = SimpleNamespace()
    write(lambda s, **style: vars(kept).update(text=s, style=style), text, 20, 8, fontsize=3)
    assert (
        kept.style["parse_math"] is False
        and len(kept.text.replace("\n", "")) <= 20
        and all(len(o) <= 8 for o in kept.text.split("\n"))
    )

def test_letters_of_no_font_are_boxes_and_orders_are_left_out(monkeypatch):
    monkeypatch.setattr(dashboard, "_fallbacks", lambda: [])
    assert drawable("猫 $x$ 🐈 a\x07\ue0001b\ud800") == ("□ $x$ □ a□1b□", [])

def test_a_font_that_has_the_letters_is_taken(monkeypatch):
    real = dashboard._lacks
    monkeypatch.setattr(dashboard, "_fallbacks", lambda: ["Useless", "Good"])
    monkeypatch.setattr(
        dashboard, "_lacks",
        lambda family, characters: (
            [] if family == "Good" else characters if family == "Useless" else real(family, characters)
        ),
    )
    assert drawable("a 猫") == ("a 猫", ["Good"])

@pytest.mark.parametrize("reward", [o for o in HOSTILE if o.strip()])
def test_a_model_card_shows_a_rewards_name_as_it_is(reward):
    "As CommonMark reads it: nothing of it becomes a tag, a column, a heading or a formula"
    MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
    card = model_card(
        "emoji-sd", "ddpo-is", reward, dict(negative_prompts=reward, seed=0),
        [dict(queries=4, reward_mean=1.0, seed=0)], "ada/x",
        numbers={"before": (1.0, 0.1), "after": (2.0, 0.1)}, pictures=()
    )
    body = card.split("---\n", 2)[2]
    html = MarkdownIt("commonmark").enable("table").render(body)
    assert (
        "<script" not in html
        and "<b>" not in html
        and "<h1>" in html
        and html.count("<h1>") == 1
        and html.count("<a href=\"b\"") == 0
    )
    assert html.count("<table>") == 2 and all(
        row.count("<td") == 2 for row in html.split("<tr>") if "<td" in row
    )
    assert body.count("```") % 2 == 0 or "```" in reward

def test_markdowns_signs():
    assert (
        _md("a_b <c> |d| `e` $f$ _g_ h*i* [j](k)\nl")
        == r"a_b \<c\> \|d\| \`e\` \$f\$ \_g\_ h\*i\* \[j\](k) l"
    )
    assert _code("a") == "`a`" and _code("a`b``c") == "``` a`b``c ```"
    assert Table([{"a|b": "1|2"}]).markdown() == "| a\\|b |\n|---|\n| 1\\|2 |"
