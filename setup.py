"""Package metadata; every value comes from settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def listed(key):
    "Requirements under `key`; `_and_` and `_or_` stand for blanks inside an environment marker."
    return [r.replace("_and_", " and ").replace("_or_", " or ") for r in cfg.get(key, "").split()]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    license="Apache-2.0",
    packages=find_packages(include=["hapnb", "hapnb.*"]),
    package_data={"hapnb": ["assets/*", "assets/recipes/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=listed("requirements"),
    extras_require={extra: listed(f"{extra}_requirements")
                    for extra in ("dev", "docs", "course", "numba", "pml", "huggingface")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["hapnb=hapnb._modidx:d"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
    ],
)
