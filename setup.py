"The package's metadata: `settings.ini` says what it is, `ddpo_nb/__init__.py` which version, `pyproject.toml` the rest."
import re
from configparser import ConfigParser
from pathlib import Path
from shutil import rmtree

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(here/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

docs = cfg["docs_requirements"].split()  # a test builds the site, so that `dev` has them too
licences = dict(apache2="Apache-2.0")
statuses = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
min_minor = int(cfg["min_python"].split(".")[1])
init = (here/"ddpo_nb/__init__.py").read_text(encoding="utf-8")

course = ("*.ipynb", "images/*.png", "tutorials/*.ipynb")  # what ddpo_nb/notebooks.py hands out

class build_with_notebooks(build_py):
    "The package with the notebooks in it; an editable install finds those of the checkout."
    def run(self):
        super().run()
        if self.editable_mode: return
        place = Path(self.build_lib, "ddpo_nb/nbs")
        rmtree(place, ignore_errors=True)  # an earlier build's
        files = [o for pattern in course for o in (here/"nbs").glob(pattern) if o.name[0] not in "._"]
        if not files: raise FileNotFoundError("there are no notebooks in nbs/: build from a whole checkout")
        for f in files:
            target = place/f.relative_to(here/"nbs")
            self.mkpath(str(target.parent))
            self.copy_file(str(f), str(target))

setup(
    version=re.search(r'^__version__ = "(.+)"$', init, re.M)[1],
    description=cfg["description"],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    license_expression=licences[cfg["license"]],
    classifiers=[f"Development Status :: {statuses[cfg['status']]}",
                 *[f"Intended Audience :: {o.strip()}" for o in cfg["audience"].split(",")],
                 "Natural Language :: English", "Programming Language :: Python :: 3 :: Only",
                 *[f"Programming Language :: Python :: 3.{o}" for o in range(min_minor, 15)],
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=find_packages(include=["ddpo_nb", "ddpo_nb.*"]),
    package_data={"ddpo_nb": ["weights/**/*", "data/**/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": [*dict.fromkeys([*cfg["dev_requirements"].split(), *docs])], "docs": docs,
                    "notebooks": cfg["notebooks_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["ddpo_nb=ddpo_nb._modidx:d"]},
    cmdclass={"build_py": build_with_notebooks},
    zip_safe=False,
)
