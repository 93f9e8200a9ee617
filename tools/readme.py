"""Write README.md from nbs/index.ipynb: `python tools/readme.py`. (nbdev's command for it needs Quarto.)

What the index counts stands between comments, as in <!-- notebooks -->51<!-- /notebooks -->, and is counted
here, from the files themselves."""
import ast
import re
from pathlib import Path
from posixpath import join, normpath

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]
_directive = re.compile(r"#\|.*")
_link = re.compile(r"""(\]\(|\b(?:src|href)=")(?![a-z]+:|[#/])([^)"\s]+)""")

_counted = re.compile(r"<!-- ([a-z]+) -->[^<]*<!-- /\1 -->")

def _literal_keys(file, name):
    "The keys of the dictionary that a module calls `name`, read from its source"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return [ast.literal_eval(o) for o in node.value.keys]
    raise ValueError(f"{file} has no {name}")

def counts(root=root):
    "What there is to count: the number of each, by the name that the index calls it"
    parts = [o.relative_to(root/"nbs").parts for o in (root/"nbs").rglob("*.ipynb")]
    notebooks = [o for o in parts if not any(p[0] in "._" for p in o) and o != ("index.ipynb",)]
    return dict(notebooks=len(notebooks), recipes=len(_literal_keys(root/"ddpo_nb/recipes.py", "RECIPES")))

def with_counts(text, found):
    "`text` with the right numbers in it; ValueError for something that is not counted"
    def number(m):
        if m[1] not in found: raise ValueError(f"nbs/index.ipynb: {m[1]!r} is not one of {', '.join(found)}")
        return f"<!-- {m[1]} -->{found[m[1]]}<!-- /{m[1]} -->"
    return _counted.sub(number, text)

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
    md = with_counts(md, counts(root))
    md = _link.sub(lambda m: m[1] + normpath(join("nbs", m[2])), md)
    md = "\n".join(l.rstrip() for l in md.splitlines())
    note = "<!-- Generated from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", md).strip() + "\n"

if __name__ == "__main__":
    index = root/"nbs/index.ipynb"
    index.write_text(with_counts(index.read_text(encoding="utf-8"), counts()), encoding="utf-8")
    (root/"README.md").write_text(readme(), encoding="utf-8")
