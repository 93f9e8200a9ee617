"""Write what Sphinx reads: `python docs/pages.py FOLDER`. The notebooks, through nbdev's own processors, a
page for each module from its docments, and llms.txt. Nothing is run, and no list of pages is kept by hand."""
import ast
import dataclasses
import importlib
import inspect
import re
import shutil
import sys
import textwrap
from copy import deepcopy
from functools import cache
from pathlib import Path
from pkgutil import walk_packages
from posixpath import normpath, relpath

from fastcore.docments import docments
from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.processors import (FilterDefaults, ai_magics, clean_magics, filter_stream_, hide_, hide_line,
                              populate_language, rm_header_dash, strip_hidden_metadata)
from nbdev.process import NBProcessor
from ddpo_nb.notebooks import course_parts

root = Path(__file__).resolve().parents[1]
config = get_config(root, also_settings=True)
repository = f"https://github.com/{config.user}/{config.repo}/blob/{config.branch}"
colab = repository.replace("https://github.com", "https://colab.research.google.com/github")

# Names, and what a name in backticks leads to

@cache
def modules() -> tuple:
    "Every module of the package that says what is public, imported, in the order of their notebooks"
    package = importlib.import_module(config.lib_path.name)
    names = [o.name for o in walk_packages(package.__path__, f"{package.__name__}.")]
    found = [importlib.import_module(o) for o in names if not re.search(r"\._", o)]
    places = [f"{package.__name__}.{o}" for o in notebook_of()]
    place = lambda o: places.index(o.__name__) if o.__name__ in places else len(places)
    return tuple(sorted((o for o in found if "__all__" in vars(o)), key=place))

def public(module) -> dict:
    "Name → object of what `module` defines itself, in the order in which it does"
    own = {o: vars(module)[o] for o in module.__all__ if o in vars(module)}
    return {k: v for k, v in own.items() if getattr(v, "__module__", module.__name__) == module.__name__}

def methods(cls) -> dict:
    "Name → function of the public methods that this package gives to `cls`, patched ones among them"
    found = {}
    for owner in reversed(cls.__mro__):
        if owner is not cls and owner.__qualname__ != cls.__qualname__: continue
        found |= vars(owner)
    plain = {k: getattr(v, "__func__", getattr(v, "fget", v)) for k, v in found.items()}
    ours = lambda o: inspect.isfunction(o) and o.__module__.startswith(config.lib_path.name)
    return {k: v for k, v in plain.items() if ours(v) and (k[0] != "_" or k == "__call__")}

@cache
def symbols() -> dict:
    "Name as written → set of full names that it may mean"
    meant = {}
    def add(full, *written):
        for o in (full, *written): meant.setdefault(o, set()).add(full)
    for m in modules():
        add(m.__name__)
        short = m.__name__.rpartition(".")[2]
        for name, obj in public(m).items():
            add(f"{m.__name__}.{name}", name, f"{short}.{name}")
            if not inspect.isclass(obj): continue
            for method in methods(obj): add(f"{m.__name__}.{name}.{method}", f"{name}.{method}")
    return meant

_fence = re.compile(r"(^(```|~~~).*?^\2[^\n]*$)", re.M | re.S)
def outside_fences(change, md: str) -> str:
    "Markdown `md`, changed wherever it is not a block of code"
    text, fences = _fence.split(md)[::3], _fence.split(md)[1::3]
    return "".join(change(o) + fence for o, fence in zip(text, [*fences, ""]))

_linkable = re.compile(
    r"(?P<keep>\[[^\]]*\]\([^)]*\)|^#.*$)|(?<!`)`(?P<name>[A-Za-z_][\w.]*)(?P<call>\(\))?`(?!`)", re.M
)

def link_names(md: str, here: str = "") -> str:
    """Markdown `md` with public names in backticks as links; a name that two modules have means that of
    module `here`, or nothing"""
    def link(m):
        if m["keep"] or not m["name"]: return m[0]
        meant = symbols().get(m["name"], set())
        near = {o for o in meant if here and o.startswith(f"{here}.")}
        [full] = near if len(near) == 1 else meant if len(meant) == 1 else [None]
        return f"{{py:obj}}`{m['name']}{m['call'] or ''} <{full}>`" if full and full != here else m[0]
    return outside_fences(lambda o: _linkable.sub(link, o), md)

_numbers = re.compile(r"(?<=[\d%]) (?=± \d|%(?!\w))|(?<=[\d%] ±) (?=\d)")

def keep_numbers(text: str) -> str:
    "No line begins with the ± of an interval, nor with the % of a share: their spaces do not break"
    return _numbers.sub("\u00a0", text)

# Pictures, for those who cannot see them

_draws = re.compile(r"plt\.|imshow|Figure|Image|\bax\.|\bpictures\(|sheet")

def first_lines(nb) -> dict:
    "Name → docstring's first paragraph, of the functions with a picture in them that a notebook defines"
    found = {}
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        try: tree = ast.parse(cell.source)
        except SyntaxError: continue  # a cell with a magic defines nothing to draw with
        for o in ast.walk(tree):
            said = isinstance(o, ast.FunctionDef) and ast.get_docstring(o)
            if said and _draws.search(ast.unparse(o)): found[o.name] = " ".join(said.split("\n\n")[0].split())
    return found

_label = re.compile(r"""\b(?:set_)?([xy]label|title)\s*[=(]\s*(["'])(.+?)\2""")
_marks = re.compile(r"[*`#$]|\[([^\]]*)\]\([^)]*\)")

def alternative(code: str, heading: str, said: dict) -> str:
    """What the picture of a cell shows, in words: the section that it is in, and what the function that draws
    it says of itself, or its axes and title"""
    calls = [o for o in re.findall(r"^(?:\w+\.)?(\w+)\(", code, re.M) if o in said]
    labels = {kind: text for kind, _, text in _label.findall(code)}
    if calls: shown = said[calls[-1]].rstrip(".")
    elif {"xlabel", "ylabel"} <= {*labels}: shown = f"{labels['ylabel']} against {labels['xlabel']}"
    else: shown = labels.get("title") or labels.get("ylabel") or ""
    plain = _marks.sub(lambda m: m[1] or "", f"{heading}: {shown}" if shown else f"{heading}, a picture")
    return plain.replace("\\n", " ").replace("\n", " ").strip()

def name_pictures(nb):
    "An alternative text for the pictures of every cell"
    said, heading = first_lines(nb), ""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            heads = re.findall(r"^#+ (.+)$", _fence.sub("", cell.source), re.M)  # code has comments
            if heads: heading = heads[-1].strip()
        else: cell.metadata["mystnb"] = dict(image=dict(alt=alternative(cell.source, heading, said)))

# Notebooks

def default_exp_(cell, *args):
    "Drop the cell that only names the module"
    del cell["source"]

_tags = {("echo", "false"): "remove-input", ("output", "false"): "remove-output",
         ("code-fold", ""): "hide-input"}

def quarto_tags(cell):
    "What nbdev leaves to Quarto, in MyST-NB's words"
    said = {k: v.strip().lower() for k, v in cell.directives_.items()}
    if "hide_input" in said: said["echo"] = "false"
    if said.get("include") == "false":
        del cell["source"]
        return
    tags = [tag for (key, value), tag in _tags.items() if said.get(key) == value]
    if tags: cell.metadata["tags"] = [*cell.metadata.get("tags", []), *tags]

_terminal = re.compile(r"\x1B(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])")
_aligned = re.compile(r"\S(?: {2,}|\t)\S|[\u2500-\u25ff]")  # columns, or a drawing
_wide = 110  # characters, as in code
_live = "application/vnd.jupyter.widget-view+json"

def is_table(text: str) -> bool:
    "Are there lines of which the columns stand below each other, so that none may be broken?"
    return "\n" in text.strip() and bool(_aligned.search(text))

def fill_sentences(text: str) -> str:
    "A table with the sentences around it broken where a line of code would end"
    fill = lambda o: o if len(o) <= _wide or _aligned.search(o) else textwrap.fill(o, _wide)
    return "\n".join(map(fill, text.split("\n")))

def keep_readable(cell):
    """Outputs as a page can show them: without terminal codes and progress bars; a widget, which needs a
    kernel, as the picture or the page stored beside it, or as a word about itself"""
    if cell.cell_type != "code": return
    bar = lambda out: re.match(r"[^\n]*\d+%\|", "".join(out.get("data", {}).get("text/plain", "")))
    cell["outputs"] = [o for o in cell.outputs if not bar(o)]
    for out in cell.outputs:
        if "text" in out: out["text"] = _terminal.sub("", "".join(out["text"]))
    said = [o.get("text") or "".join(o.get("data", {}).get("text/plain", "")) for o in cell.outputs]
    if any(said) and not any(map(is_table, said)):
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), "wraps"]
    for out in cell.outputs:
        if is_table(out.get("text", "")): out["text"] = fill_sentences(out["text"])
        if html := out.get("data", {}).get("text/html"):
            out["data"]["text/html"] = keep_numbers("".join(html))
        if _live not in out.get("data", {}): continue
        del out["data"][_live]
        if any(re.match("image/|text/html|text/markdown", o) for o in out["data"]):
            out["data"].pop("text/plain", None)
        else: out["data"] = {"text/markdown": "*Here is a widget: it needs a running notebook.*"}

class Lessons(FilterDefaults):
    """nbdev's processors without those that run cells and those that hide exported code: here the code is
    the lesson, and the modules have pages of their own"""
    def base_procs(self):
        return [populate_language, default_exp_, hide_, hide_line, filter_stream_, rm_header_dash, ai_magics,
                clean_magics, quarto_tags, keep_readable, strip_hidden_metadata]
    def nb_proc(self, nb): return NBProcessor(nb=nb, procs=self.procs(), rm_directives=True)

def name_of(path: Path) -> str: return path.relative_to(root/config.nbs_path).with_suffix("").as_posix()

@cache
def lessons() -> dict:
    "Path without suffix, seen from nbs/ → the notebook as its page shows it"
    found = {}
    for path in sorted(nbglob(root/config.nbs_path, as_path=True)):
        nb = read_nb(path)
        Lessons()(nb)
        # nbdev-clean leaves the language out, without which code has no colours
        nb.metadata["language_info"] = dict(name="python", pygments_lexer="ipython3")
        found[name_of(path)] = nb
    return found

@cache
def notebook_of() -> dict:
    "Module without the package's name → its notebook, in reading order"
    found = {}
    for path in sorted(nbglob(root/config.nbs_path, as_path=True)):
        code = "\n".join(c.source for c in read_nb(path).cells)
        if m := re.search(r"#\|\s*default_exp\s+([\w.]+)", code): found[m[1]] = name_of(path)
    return found

_link = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()(?![a-z]+:|[#/])([^)\s#]+)")
_badge = re.compile(r"\[!\[[^\]]*\]\(https://colab[^)]*badge\.svg\)\]")

def page_links(md: str, page: str) -> str:
    """Links of `page` that hold on the site: to other pages as they are, to other files of the repository on
    GitHub, to nothing: ValueError. Badges, pictures of another server, become words."""
    def local(m):
        target = normpath((root/config.nbs_path/page).parent/m[2])
        if not Path(target).exists():
            raise ValueError(f"nbs/{page}.ipynb links to {m[2]}, which is not there")
        inside = Path(target).is_relative_to(root/config.nbs_path)
        return m[0] if inside else f"{m[1]}{repository}/{relpath(target, root)}"
    return _link.sub(local, _badge.sub("[Colab]", md))

def title_of(page: str) -> tuple:
    "(title, subtitle) of a notebook, as its first cell says them"
    first = lessons()[page].cells[0].source
    return tuple(re.search(rf"^{mark} (.+)$", first, re.M)[1].strip() for mark in "#>")

@cache
def course() -> dict:
    "Heading → pages, as the index notebook's tables have them; what no table names comes under the first"
    text = "\n".join(o.source for o in lessons()["index"].cells if o.cell_type == "markdown")
    parts = {heading: [*pages] for heading, pages in course_parts(text).items()}
    listed = {"index", *(o for part in parts.values() for o in part)}
    missing = [o for o in lessons() if o not in listed]
    if missing: parts = {"Around the course": missing} | parts
    return parts

def toctree(caption: str, pages: list) -> str:
    "A list of pages for the side bar"
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])

def row_of(line: str) -> tuple:
    "(notebook, the other cells) of a row of a table of notebooks; None, None of any other line"
    for pages in course_parts(line).values():
        for page, said in pages.items(): return page, said
    return None, None

def as_list(md: str) -> str:
    """Tables of notebooks as lists, which a phone can show: each with its title and what its row says, from
    the third column on after the column's name"""
    lines, heads = [], None
    for line in md.splitlines():
        page, said = row_of(line)
        if not page:
            lines.append(line)
            heads = None
            continue
        if heads is None:
            heads = [o.strip() for o in lines[-2].split("|")[3:-1]]
            lines[-2:] = [""]
        more = [f"{head} {o}".strip() for head, o in zip(heads, said[1:]) if o]
        name = f"{page.rpartition('/')[2]}: {title_of(page)[0]}"
        lines += [f"- **[{name}]({page}.ipynb)**\\", f"  {' · '.join([said[0], *more])}"]
    return "\n".join(lines)

def overviews() -> list:
    "Pages about the course rather than in it: neither numbered nor in a folder"
    return [o for part in course().values() for o in part if o[0].isalpha() and "/" not in o]

def course_picture() -> list:
    "The cell that draws the course's map, without its code; nothing if there is none"
    drawn = [deepcopy(c) for o in overviews() for c in lessons()[o].cells
             if any("image/png" in out.get("data", {}) for out in c.get("outputs", []))]
    for cell in drawn:
        cell.metadata["tags"] = ["remove-input"]
        cell.metadata["mystnb"] = dict(image=dict(alt="the map of the course"))
        cell.pop("id", None)
    return drawn[:1]

def landing(nb):
    "The index notebook with the course before everything else, and the side bar's lists"
    table = max(nb.cells, key=lambda o: sum(map(len, course_parts(o.source).values())))
    nb.cells.remove(table)
    table.source = as_list(table.source).replace("<details>", "<details open>")  # the README folds them
    parts = course()
    first = next(o for part in parts.values() for o in part if o[0].isdigit())
    links = [f"**[Begin: {title_of(first)[0]}]({first}.ipynb)**"]
    links += [f"[{title_of(o)[0]}]({o}.ipynb)" for o in overviews()]
    links += ["[All modules](api/index.md)", f"[Source]({repository.partition('/blob/')[0]})"]
    nb.cells[1:1] = [mk_cell(" · ".join(links), "markdown"), *course_picture(), table]
    parts = parts | {"Reference": [*parts.get("Reference", []), "api/index"]}
    nb.cells.append(mk_cell("\n\n".join(toctree(*o) for o in parts.items()), "markdown"))

def doors(page: str) -> str:
    "Where else this page can be read: on Colab, on GitHub, and as a module"
    path = f"nbs/{page}.ipynb"
    links = [f"[Open in Colab]({colab}/{path})", f"[on GitHub]({repository}/{path})"]
    up = "../" * page.count("/")
    links += [f"[module `{k}`]({up}api/{k}.md)" for k, v in notebook_of().items() if v == page and paged(k)]
    return " · ".join(links)

def paged(name: str) -> bool: return any(o.__name__.endswith(f".{name}") for o in modules())

def write_lessons(to: Path):
    "Every notebook, and the files that they show"
    own = {v: f"{config.lib_path.name}.{k}" for k, v in notebook_of().items()}
    for page, nb in lessons().items():
        name_pictures(nb)
        for cell in nb.cells:
            if cell.cell_type != "markdown": continue
            said = outside_fences(keep_numbers, link_names(cell.source, own.get(page, "")))
            cell.source = page_links(said, page)
        if page == "index": landing(nb)
        else: nb.cells.insert(1, mk_cell(doors(page), "markdown"))
        for i, cell in enumerate(nb.cells):
            cell.setdefault("metadata", {})
            cell.setdefault("id", f"{i:08x}")
        (to/page).parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, to/f"{page}.ipynb")
    for path in (root/config.nbs_path/"images").iterdir():
        (to/"images").mkdir(exist_ok=True)
        shutil.copy(path, to/"images")

# Modules

def prose(text: str, here: str) -> str:
    "A docstring or docment as Markdown: what is code in it stays, nothing else becomes markup by accident"
    parts = re.split(r"(`[^`\n]+`)", inspect.cleandoc(text or ""))
    parts[::2] = [re.sub(r"([*<\[$|{])", r"\\\1", o) for o in parts[::2]]
    return link_names("".join(parts), here)

def brief(value, most=60) -> str:
    "A default or a constant in so few characters"
    text = getattr(value, "__name__", None) or repr(value)
    text = re.sub(r" at 0x\w+", "", re.sub(r"<([\w.]+)\.(\w+): .*>", r"\2", text))
    return text if len(text) <= most else text[:most - 1] + "…"

class _Written:
    "A default or an annotation that prints as this text"
    def __init__(self, text): self.text = text
    def __repr__(self): return self.text

def signature(obj) -> str:
    "The arguments of `obj` with their kinds, short defaults, and what it returns"
    try: sig = inspect.signature(obj)
    except (TypeError, ValueError): return "(…)"
    none = inspect.Parameter.empty
    text_of = lambda o: o if isinstance(o, str) else inspect.formatannotation(o)
    given = [p.replace(default=none if p.default is none else _Written(brief(p.default, 40)),
                       annotation=none if p.annotation is none else _Written(text_of(p.annotation)))
             for p in sig.parameters.values() if p.name != "self"]
    text, back = str(sig.replace(parameters=given, return_annotation=none)), sig.return_annotation
    if back not in (none, None) and not inspect.isclass(obj): text += f" -> {text_of(back)}"
    return text.replace("typing.", "")

def parameters(obj, here: str) -> str:
    "Sphinx's list of parameters, from the comments beside them"
    said = {k: " ".join(prose(v, here).split()) for k, v in docments(obj, args_kwargs=True).items() if v}
    return "\n".join(f":{'returns' if k == 'return' else f'param {k}'}: {v}" for k, v in said.items())

def fields_list(cls, here: str) -> str:
    "The fields of a dataclass with their defaults and comments, those of its bases too"
    said, lines = {}, []
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner): said |= {k: v for k, v in docments(owner).items() if v}
    for f in dataclasses.fields(cls):
        made = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        default = "" if made is dataclasses.MISSING else f" = {brief(made)}"
        words = " ".join(prose(said.get(f.name), here).split())
        lines.append(f"- `{f.name}{default}`" + (f": {words}" if words else ""))
    return "\n".join(lines)

def block(kind: str, name: str, *inside: str, depth=0) -> str:
    "One of Sphinx's descriptions of an object"
    fence = ":" * (6 - depth)
    return "\n".join([f"{fence}{{py:{kind}}} {name}", "", *(f"{o}\n" for o in inside if o), fence])

def inherited(cls) -> str:
    "A sentence with the public classes of this package that `cls` has more methods from"
    ours = [o.__name__ for o in cls.__bases__ if o.__module__.partition(".")[0] == config.lib_path.name]
    named = ", ".join(f"`{o}`" for o in ours if o != cls.__name__ and o[0] != "_")
    return f"Inherits from {named}." if named else ""

def describe(name: str, obj, module) -> str:
    "What there is to say of one public name"
    here = module.__name__
    if inspect.isclass(obj):
        table = dataclasses.is_dataclass(obj) and len(dataclasses.fields(obj)) > 0
        own_init = "__init__" in vars(obj) and not table
        parts = [prose(obj.__doc__ if "__doc__" in vars(obj) else "", here)]
        parts.append(link_names(inherited(obj), here))
        parts += [fields_list(obj, here)] if table else [parameters(obj, here)] if own_init else []
        for method, function in methods(obj).items():
            if isinstance(inspect.getattr_static(obj, method), property): kind, args = "property", ""
            else: kind, args = "method", signature(function)
            said = prose(function.__doc__, here), parameters(function, here)
            parts.append(block(kind, method + args, *said, depth=1))
        if issubclass(obj, BaseException): return block("exception", name, *parts)
        return block("class", name + (signature(obj) if own_init else ""), *parts)
    if inspect.isroutine(obj) or callable(obj):
        said = prose(getattr(obj, "__doc__", ""), here), parameters(obj, here)
        return block("function", name + signature(obj), *said)
    return block("data", name, f"`{brief(obj, 300)}`".replace("\n", " "))

def module_page(module) -> str:
    "The page of one module"
    short = module.__name__.partition(".")[2]
    lesson = notebook_of().get(short)
    where = f"Explained and made in [{title_of(lesson)[0]}](../{lesson}.ipynb)." if lesson else ""
    head = [f"# {short}", f"> {prose(about(module) or short, module.__name__)}", where,
            f"```{{py:module}} {module.__name__}\n```"]
    parts = [*filter(None, head), *(describe(k, v, module) for k, v in public(module).items())]
    return "\n\n".join(parts) + "\n"

def about(module) -> str: return (module.__doc__ or "").partition("\n")[0]

def write_modules(to: Path):
    "A page for each module, and one that lists them"
    package = importlib.import_module(config.lib_path.name)
    (to/"api").mkdir(parents=True, exist_ok=True)
    names = [o.__name__.partition(".")[2] for o in modules()]
    for name, module in zip(names, modules()):
        (to/f"api/{name}.md").write_text(module_page(module), encoding="utf-8")
    home = lambda o: f"{getattr(package, o).__module__}.{o}"
    top = [f"{{py:obj}}`{o} <{home(o)}>`" for o in package.__all__]
    rows = [f"| [{n}]({n}.md) | {prose(about(m), '')} |" for n, m in zip(names, modules())]
    text = ["# Modules", "> What there is to import, in the order in which the notebooks explain it",
            f"`from {package.__name__} import …` knows {', '.join(top)};"
            " everything else lives in its module.",
            "| module | |\n|---|---|\n" + "\n".join(rows),
            "```{toctree}\n:hidden:\n\n" + "\n".join(names) + "\n```"]
    (to/"api/index.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")

def write_llms(to: Path):
    "llms.txt (llmstxt.org): what this is, and every page in one line"
    title, subtitle = title_of("index")
    first = lessons()["index"].cells[0].source.split("\n\n")[2]
    lines = [f"# {title}", "", f"> {subtitle}", "", re.sub(r"[*`]|\]\([^)]*\)|\[", "", first), ""]
    for part, pages in course().items():
        named = [(o, *title_of(o)) for o in pages]
        lines += [f"## {part}", "", *(f"- [{name}]({o}.html): {said}" for o, name, said in named), ""]
    lines += ["## Modules", "", "- [All of them](api/index.html)"]
    for m in modules():
        name = m.__name__.partition(".")[2]
        lines.append(f"- [{name}](api/{name}.html)" + (f": {about(m)}" if about(m) else ""))
    (to/"extra").mkdir(parents=True, exist_ok=True)
    (to/"extra/llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

if __name__ == "__main__":
    to = Path(sys.argv[1])
    sys.argv[0] = "train.py"  # a default of DDPOConfig is the name of the script that runs
    write_llms(to)
    write_modules(to)
    write_lessons(to)
