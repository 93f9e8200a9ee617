"What the site looks like; what is on it, docs/pages.py says."
import os
import sys
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes

sys.path.insert(0, str(Path(__file__).parent))
from pages import config, repository, root  # noqa: E402

settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(root/"settings.ini", encoding="utf-8")
project = config.lib_name
author = copyright = settings["DEFAULT"]["author"]
html_title = project
html_baseurl = os.environ.get("DOCS_URL", "")

extensions = ["myst_nb", "sphinx.ext.mathjax"]
# MathJax from a package, not from another server; as an extension, it would forbid reading in parallel
offline = Path(find_spec("sphinx-mathjax-offline").origin).parent/"static"
mathjax_path = "mathjax/tex-chtml.js"
myst_enable_extensions = ["dollarmath", "colon_fence", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # comes from another server; a page has no kernel to talk to anyway
smartquotes = False  # a default of "" is no “”
python_maximum_signature_line_length = 80
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_static_path = ["static", str(offline)]
html_css_files = ["site.css"]
html_extra_path = [os.environ["DOCS_EXTRA"]]
html_copy_source = False
html_theme_options = dict(
    navigation_with_keys=True,
    footer_icons=[dict(name="GitHub", url=repository.partition("/blob/")[0], html="GitHub", **{"class": ""})],
)

def give_pictures_boxes(app, doctree, page):
    "A picture that stands by itself gets a box, in which it scrolls where it is wider than the window"
    for image in [*doctree.findall(nodes.image)]:
        alone = image.parent
        if isinstance(alone, nodes.paragraph):
            if len(alone) > 1 or isinstance(alone.parent, nodes.entry): continue
        elif "cell_output" in alone.get("classes", []): alone = image
        else: continue
        alone.replace_self(nodes.container("", image.deepcopy(), classes=["picture"]))

def setup(app): app.connect("doctree-resolved", give_pictures_boxes)
