"Write README.md from nbs/index.ipynb: `python tools/readme.py`. (nbdev's own command for this needs Quarto.)"
import re
from pathlib import Path
from posixpath import join, normpath

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]
_directive = re.compile(r"#\|.*")
_link = re.compile(r"""(\]\(|\b(?:src|href)=")(?![a-z]+:|[#/])([^)"\s]+)""")

def _shown(cell):
    "`cell` without its nbdev directives, or None if they hide it"
    lines = cell.source.splitlines()
    flags = {l[2:].strip() for l in lines if _directive.match(l)}
    if flags & {"hide", "default_exp index"}: return None
    cell.source = "\n".join(l for l in lines if not _directive.match(l)).strip()
    if flags & {"echo: false"}: cell.source = ""
    return cell

def readme(root=root):
    "The README's text: the index notebook as Markdown, with links that hold from the repository's root"
    nb = nbformat.read(root/"nbs/index.ipynb", as_version=4)
    nb.cells = [c for c in map(_shown, nb.cells) if c]
    nb.metadata["language_info"] = {"name": "python"}  # so that code is coloured; nbdev-clean leaves it out
    md, res = MarkdownExporter().from_notebook_node(nb)
    if res["outputs"]:
        raise ValueError(
            "nbs/index.ipynb shows a picture as a cell's output: put it into nbs/images and link it"
        )
    md = _link.sub(lambda m: m[1] + normpath(join("nbs", m[2])), md)
    md = "\n".join(l.rstrip() for l in md.splitlines())
    note = "<!-- Generated from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", md).strip() + "\n"

if __name__ == "__main__": (root/"README.md").write_text(readme(), encoding="utf-8")
